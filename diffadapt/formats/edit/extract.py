"""The adapter of a chosen method that comes nearest to the difference of a fine-tuned model from its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffadapt.adapters.adapter import Adapter
from diffadapt.methods import Method
from diffadapt.methods.site import Site


@dataclass(frozen=True)
class LayerPair:
    """One layer before and after fine-tuning, in float64 on the CPU.

    Attributes:
        base, tuned: its weight, `(out, in / groups, *kernel)`.
        base_bias, tuned_bias: its bias `(out,)`; None where it has none.
    """

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
    """Fills a freshly attached adapter so that its model comes nearest to a fine-tuned one.

    Args:
        tuned: the fine-tuned models by component, as `adapter.roots`.

    Raises:
        ValueError: a method has no solution here, or the fine-tuned model lacks a layer.
    """
    for part in adapter.parts:
        for site, method, tensors in zip(part.sites, part.methods, part.tensors, strict=True):
            if method.name not in SOLVERS:
                raise ValueError(
                    f"{method.name} cannot be extracted; choose one of {', '.join(SOLVERS)} or train it"
                )
            solve = SOLVERS[method.name]
            solution = solve(method, site, _layer_pair(adapter, site, tuned), dict(tensors.items()))
            for key, value in solution.items():
                tensors[key].data.copy_(_zero_padded(value, tensors[key].shape))


@torch.no_grad()
def relative_error(adapter: Adapter, tuned: Mapping[str, nn.Module]) -> float:
    """`|tuned - adapted| / |tuned - base|` in Frobenius norms over the adapter's weights and biases."""
    squared_error = squared_change = 0.0
    for site in adapter.sites:
        pair = _layer_pair(adapter, site, tuned)
        weight = adapter.adapted_weight(site).double().cpu()
        squared_error += (pair.tuned - weight).square().sum().item()
        squared_change += pair.change.square().sum().item()
        if pair.tuned_bias is not None:
            bias = adapter.adapted_bias(site).double().cpu()
            squared_error += (pair.tuned_bias - bias).square().sum().item()
            squared_change += pair.bias_change.square().sum().item()
    return (squared_error / squared_change) ** 0.5 if squared_change else 0.0


@torch.no_grad()
def share_outside(adapter: Adapter, tuned: Mapping[str, nn.Module]) -> float:
    """The share of the fine-tuned model's squared change that lies in layers the adapter does not have."""
    adapter_change = 0.0
    for site in adapter.sites:
        pair = _layer_pair(adapter, site, tuned)
        layer_change = pair.change.square().sum().item()
        if pair.bias_change is not None:
            layer_change += pair.bias_change.square().sum().item()
        adapter_change += layer_change
    model_change = 0.0
    for component, model in adapter.roots.items():
        tuned_parameters = dict(tuned[component].named_parameters())
        for name, base in model.named_parameters():
            difference = tuned_parameters[name].double().cpu() - base.double().cpu()
            model_change += difference.square().sum().item()
    # rounding can make the part larger than the whole
    return max(0.0, 1 - adapter_change / model_change) if model_change else 0.0


def _layer_pair(adapter: Adapter, site: Site, tuned: Mapping[str, nn.Module]) -> LayerPair:
    component = "" if "" in adapter.roots else site.name.partition(".")[0]  # "" for a bare model
    path = site.name[len(component) + 1 :] if component else site.name
    try:
        layer = tuned[component].get_submodule(path)
    except (AttributeError, KeyError) as error:
        raise ValueError(f"the fine-tuned model has no layer {site.name}") from error
    if tuple(layer.weight.shape) != site.shape:
        raise ValueError(f"{site.name} has shape {tuple(layer.weight.shape)} in the fine-tuned model")
    layer_state = adapter.layer_states[site.name]
    return LayerPair(
        _in_float64(layer_state.base()),
        _in_float64(layer.weight),
        _in_float64(layer_state.base_bias()),
        _in_float64(getattr(layer, "bias", None)),
    )


def _in_float64(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().cpu()


def _zero_padded(value: Tensor, shape: torch.Size) -> Tensor:
    """The value with zeros where a tensor has more ranks than the layer can use."""
    if value.shape == shape:
        return value
    padded = value.new_zeros(shape)
    corner = tuple(slice(size) for size in value.shape)
    padded[corner] = value
    return padded


# The solvers: the tensors of a method, by name, that come nearest to the change of one layer


def _lora(method: Method, site: Site, pair: LayerPair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The truncated SVD, the best of a rank (Eckart and Young 1936).

    `change = U S Vh`, `up = U_r sqrt(S_r) / s` and `down = sqrt(S_r) Vh_r`, where `s` is the multiplier.
    """
    matrix = pair.change.reshape(len(tensors["up"]), tensors["down"].shape[1])  # (rows, columns)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)  # (rows, n), (n,), (n, columns)
    # loralib's reshape of a convolution has factors of the rank times the kernel's side
    is_reshaped = matrix.shape != (site.out, site.fan_in)
    rank = tensors["up"].shape[1] if is_reshaped else method.rank
    root = values[:rank].sqrt()  # (r,)
    up = u[:, : len(root)] * root / method.multiplier  # (rows, r)
    down = root[:, None] * vh[: len(root)]  # (r, columns)
    return {"up": up, "down": down}


def _dora(method: Method, site: Site, pair: LayerPair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRA's factors, and the norms of the fine-tuned rows."""
    magnitude = pair.tuned.flatten(1).norm(dim=1)  # (out,)
    return _lora(method, site, pair, tensors) | {"magnitude": magnitude}


def _flora(method: Method, site: Site, pair: LayerPair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The truncated higher-order SVD (De Lathauwer et al. 2000): orthonormal factors, core by projection.

    For every axis `i` the factor `U_i` holds the first left singular vectors of the change unfolded along
    `i`; `core = change x_1 U_1^T x_2 U_2^T ...`.
    """
    axes = {"up": 0, "down": 1}
    for axis in range(len(site.kernel)):
        axes[f"kernel_{axis}"] = 2 + axis
    factors = {}
    core = pair.change
    for key, axis in axes.items():
        unfolded = pair.change.movedim(axis, 0).flatten(1)  # (size, all other sizes)
        rank = tensors["core"].shape[axis]
        basis = torch.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]  # (size, rank)
        factors[key] = basis.T if key == "down" else basis
        core = torch.movedim(torch.tensordot(core, basis, ([axis], [0])), -1, axis)
    return factors | {"core": core / method.multiplier}


def _one_lora(
    method: Method, site: Site, pair: LayerPair, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Least squares for `vector 1^T`: the mean of each row."""
    if method.compression != "sum":
        raise ValueError("1lora can be extracted with compression=sum only")
    return {"vector": pair.change.flatten(1).mean(1)}  # (out,)


def _gamma(method: Method, site: Site, pair: LayerPair, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Least squares for one factor per row, its bias included: `<base, tuned> / <base, base>`."""
    base = pair.base.flatten(1)  # (out, fan_in)
    tuned = pair.tuned.flatten(1)
    if pair.base_bias is not None:
        base = torch.cat([base, pair.base_bias[:, None]], 1)  # (out, fan_in + 1)
        tuned = torch.cat([tuned, pair.tuned_bias[:, None]], 1)
    squares = base.square().sum(1)  # (out,)
    factors = (base * tuned).sum(1) / squares.clamp(min=1e-300)
    return {"gamma": torch.where(squares > 0, factors, 1.0)}  # a row of zeros stays one


def _differences(
    method: Method, site: Site, pair: LayerPair, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The change itself, of what the method trains."""
    changes = {"weight": pair.change, "bias": pair.bias_change}
    return {key: changes[key] for key in tensors}


SOLVERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "lora": _lora,
    "dora": _dora,
    "flora": _flora,
    "1lora": _one_lora,
    "gamma": _gamma,
    "full": _differences,
    "bitfit": _differences,
    "norms": _differences,
}
