"""An adapter of a chosen method from a fine-tuned model and its base: the nearest the method can come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.methods import Method
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class Pair:
    """One layer before and after fine-tuning, in float64."""

    base: Tensor
    tuned: Tensor
    base_bias: Tensor | None
    tuned_bias: Tensor | None

    @property
    def change(self) -> Tensor:
        return self.tuned - self.base

    @property
    def bias_change(self) -> Tensor | None:
        return None if self.tuned_bias is None else self.tuned_bias - self.base_bias


@torch.no_grad()
def extract(adapter: Adapter, tuned: Mapping[str, nn.Module]) -> None:
    """Fill a freshly attached adapter so that its model comes nearest to the fine-tuned ``tuned`` one.

    Args:
        tuned: the fine-tuned models by component, as ``adapter.roots``.

    Raises: ValueError for a method that has no solution here, or a layer the fine-tuned model does not have.
    """
    for part in adapter.parts:
        for site, method, tensors in zip(part.sites, part.methods, part.tensors, strict=True):
            if method.name not in SOLVERS:
                raise ValueError(
                    f"{method.name} cannot be extracted; choose one of {', '.join(SOLVERS)} or train it"
                )
            values = SOLVERS[method.name](method, site, _pair(adapter, site, tuned), dict(tensors.items()))
            for key, value in values.items():
                tensors[key].data.copy_(_padded(value, tensors[key].shape))


@torch.no_grad()
def relative_error(adapter: Adapter, tuned: Mapping[str, nn.Module]) -> float:
    """``|tuned - adapted| / |tuned - base|`` in Frobenius norms over the adapter's weights and biases."""
    lost = whole = 0.0
    for site in adapter.sites:
        pair = _pair(adapter, site, tuned)
        lost += (pair.tuned - adapter.adapted_weight(site).double().cpu()).square().sum().item()
        whole += pair.change.square().sum().item()
        if pair.tuned_bias is not None:
            lost += (pair.tuned_bias - adapter.adapted_bias(site).double().cpu()).square().sum().item()
            whole += pair.bias_change.square().sum().item()
    return (lost / whole) ** 0.5 if whole else 0.0


@torch.no_grad()
def share_outside(adapter: Adapter, tuned: Mapping[str, nn.Module]) -> float:
    """The share of the fine-tuned model's squared change that lies in layers the adapter does not have."""
    inside = sum(
        pair.change.square().sum().item() + (0 if b is None else b.square().sum().item())
        for pair in (_pair(adapter, site, tuned) for site in adapter.sites)
        for b in (pair.bias_change,)
    )
    whole = 0.0
    for root, module in adapter.roots.items():
        own = dict(tuned[root].named_parameters())
        for name, value in module.named_parameters():
            whole += (own[name].double().cpu() - value.double().cpu()).square().sum().item()
    return max(0.0, 1 - inside / whole) if whole else 0.0


def _pair(adapter: Adapter, site: Site, tuned: Mapping[str, nn.Module]) -> Pair:
    root = "" if "" in adapter.roots else site.name.partition(".")[0]
    path = site.name[len(root) + 1 :] if root else site.name
    try:
        layer = tuned[root].get_submodule(path)
    except (AttributeError, KeyError) as error:
        raise ValueError(f"the fine-tuned model has no layer {site.name}") from error
    if tuple(layer.weight.shape) != site.shape:
        raise ValueError(f"{site.name} has shape {tuple(layer.weight.shape)} in the fine-tuned model")
    layer_state = adapter.layer_states[site.name]
    biases = (layer_state.base_bias(), getattr(layer, "bias", None))
    wide = [None if bias is None else bias.detach().double().cpu() for bias in biases]
    return Pair(layer_state.base().double().cpu(), layer.weight.detach().double().cpu(), *wide)


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    """The value with zeros where a tensor has more ranks than the layer can use."""
    if value.shape == shape:
        return value
    padded = value.new_zeros(shape)
    padded[tuple(slice(size) for size in value.shape)] = value
    return padded


def _lora(method: Method, site: Site, pair: Pair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The truncated SVD, the best of a rank (Eckart and Young 1936)."""
    matrix = pair.change.reshape(tensors["up"].shape[0], tensors["down"].shape[1])
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[: method.rank if matrix.shape == (site.out, site.fan_in) else tensors["up"].shape[1]].sqrt()
    up = left[:, : len(root)] * root / method.multiplier
    return {"up": up, "down": root[:, None] * right[: len(root)]}


def _dora(method: Method, site: Site, pair: Pair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA's factors, and the fine-tuned rows' own norms."""
    return _lora(method, site, pair, tensors) | {"magnitude": pair.tuned.flatten(1).norm(dim=1)}


def _flora(method: Method, site: Site, pair: Pair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The truncated higher-order SVD (De Lathauwer et al. 2000): orthonormal factors, core by projection."""
    factors, core = {}, pair.change
    axes = {"up": 0, "down": 1} | {f"kernel_{axis}": 2 + axis for axis in range(len(site.kernel))}
    for key, axis in axes.items():
        unfolded = pair.change.movedim(axis, 0).flatten(1)
        rank = tensors["core"].shape[axis]
        frame = torch.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]  # (size, rank)
        factors[key] = frame.T if key == "down" else frame
        core = torch.movedim(torch.tensordot(core, frame, ([axis], [0])), -1, axis)
    return factors | {"core": core / method.multiplier}


def _one_lora(method: Method, site: Site, pair: Pair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Least squares for ``vector 1^T``: the mean of each row."""
    if method.compression != "sum":
        raise ValueError("1lora can be extracted with compression=sum only")
    return {"vector": pair.change.flatten(1).mean(1)}


def _gamma(method: Method, site: Site, pair: Pair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Least squares for one factor per row, its bias included."""
    base, tuned = pair.base.flatten(1), pair.tuned.flatten(1)
    if pair.base_bias is not None:
        base = torch.cat([base, pair.base_bias[:, None]], 1)
        tuned = torch.cat([tuned, pair.tuned_bias[:, None]], 1)
    squares = base.square().sum(1)
    return {"gamma": torch.where(squares > 0, (base * tuned).sum(1) / squares.clamp(min=1e-300), 1.0)}


def _whole(method: Method, site: Site, pair: Pair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = {"weight": pair.change, "bias": pair.bias_change}
    return {key: values[key] for key in tensors}


SOLVERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "lora": _lora,
    "dora": _dora,
    "flora": _flora,
    "1lora": _one_lora,
    "gamma": _gamma,
    "full": _whole,
    "bitfit": _whole,
    "norms": _whole,
}
