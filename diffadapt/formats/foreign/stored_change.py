"""The change that a file of another tool makes to a layer, read from the layer's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from diffadapt.formats.foreign.keys import KeyedTensor
from diffadapt.methods.site import Site

# layer, rank (None where nothing is decomposed), alpha of the file (None without) -> multiplier
ScalingRule = Callable[[str, int | None, float | None], float]

Reader = Callable[["LayerTensors"], dict[str, Tensor | None]]


@dataclass(frozen=True)
class StoredChange:
    """The change of one layer in one of the forms that files have.

    Attributes:
        form: a key of `methods.imported_forms.FORMS`, which says what the tensors mean.
        tensors: by the names of that form; any form can have a `bias` and a magnitude beside it.
        multiplier: of the weight's change.
        replacements: `new_weight` and `new_bias`, which stand in the place of the layer's own; `fit_to_layer`
            makes differences of them.
        kernel: size of the kernel of a convolution's factors.
        down_is_shared: `down` is as wide as the widest layer of the model, and each layer takes the columns
            that it has inputs for (PEFT's VeRA).
    """

    form: str
    tensors: dict[str, Tensor]
    multiplier: float = 1.0
    replacements: dict[str, Tensor] = field(default_factory=dict)
    kernel: tuple[int, ...] = ()
    down_is_shared: bool = False

    @property
    def rank(self) -> int | None:
        """Rank of the factors; None where there are none."""
        for key in ("down", "down_1", "left_down"):
            if key in self.tensors:
                return len(self.tensors[key]) if self.tensors[key].dim() else 0
        return None


class LayerTensors:
    """The tensors of a layer in a file, which readers take one after the other."""

    def __init__(self, by_role: Mapping[str, KeyedTensor]):
        self.remaining = dict(by_role)

    def take(self, role: str) -> Tensor | None:
        """A tensor by what it is; None where the file has none."""
        keyed = self.remaining.pop(role, None)
        return None if keyed is None else keyed.tensor

    def remaining_keys(self) -> list[str]:
        """The keys in the file of tensors that nobody took."""
        return [keyed.key for keyed in self.remaining.values()]


def kohya_scaling(layer: str, rank: int | None, alpha: float | None) -> float:
    """`alpha / rank`; 1 without alpha (ComfyUI, A1111), and for a LoKr of two whole factors."""
    return 1.0 if alpha is None or rank is None else alpha / rank


def read_change(
    layer: str, by_role: Mapping[str, KeyedTensor], scaling: ScalingRule
) -> tuple[StoredChange, list[str]]:
    """The change of a layer, and the keys in the file that it does not use.

    Args:
        layer: its name in the file.
        by_role: its tensors by what they are, see `keys.ROLES`.
        scaling: gives the multiplier.

    Raises:
        ValueError: a tensor is missing, or shapes are none that an adapter has.
    """
    tensors = LayerTensors(by_role)
    alpha = tensors.take("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"the alpha of {layer} must be one number, its shape is {tuple(alpha.shape)}")
    form, reader = _form_of(by_role)
    try:
        factors = reader(tensors)
    except (AttributeError, KeyError) as error:
        keys = ", ".join(keyed.key for keyed in by_role.values())
        raise ValueError(f"{layer} lacks a tensor beside {keys}") from error
    except (IndexError, RuntimeError) as error:
        shapes = ", ".join(f"{keyed.key}: {tuple(keyed.tensor.shape)}" for keyed in by_role.values())
        raise ValueError(f"{layer} has tensors of shapes that no adapter has: {shapes}") from error
    # what a form has only at times, such as Tucker's core
    factors = {key: tensor for key, tensor in factors.items() if tensor is not None}
    change = StoredChange(form, factors, kernel=_kernel_of(by_role))
    if change.rank == 0:
        raise ValueError(f"{layer} has factors without a single row")
    if form in ("lora", "tucker", "loha", "lokr"):
        multiplier = scaling(layer, change.rank, None if alpha is None else float(alpha))
        change = replace(change, multiplier=multiplier)
    _read_bias(change, tensors)
    _read_magnitudes(change, tensors)
    _read_replacements(change, tensors)
    return change, tensors.remaining_keys()


def fit_to_layer(change: StoredChange, site: Site, base: Tensor, bias: Tensor | None) -> StoredChange:
    """The change for a known layer: whole tensors in the layer's shape, differences for replacements.

    Args:
        base: the layer's frozen weight.
        bias: its frozen bias `(out,)`; None where it has none.

    Raises:
        ValueError: the layer has no such weight or bias to replace.
    """
    form = change.form
    tensors = dict(change.tensors)
    # files of 1x1 convolutions may hold a Linear layer's shapes, and the other way round
    for key in ("core", "core_1", "core_2"):
        if key in tensors and tensors[key].shape[2:].numel() == base.shape[2:].numel():
            tensors[key] = tensors[key].reshape(*tensors[key].shape[:2], *site.kernel)
    if "weight" in tensors and tensors["weight"].numel() == site.numel:
        tensors["weight"] = tensors["weight"].reshape(site.shape)
    if change.down_is_shared:
        tensors["down"] = tensors["down"][:, : site.fan_in]
    for key, new in change.replacements.items():
        if key == "new_weight" and new.shape == base.shape:
            form = "dense"
            tensors["weight"] = new.double() - base.double().cpu()  # a difference, as all methods are
        elif key == "new_bias" and bias is not None:
            tensors["bias"] = new.double() - bias.double().cpu()
        elif key.removeprefix("new_") not in tensors:
            raise ValueError(f"{site.name} has no {key.removeprefix('new_')} of the shape in the file")
    return replace(change, form=form, tensors=tensors, replacements={}, down_is_shared=False)


def _form_of(by_role: Mapping[str, KeyedTensor]) -> tuple[str, Reader]:
    """The form of a layer, by the tensors that only this form has, and what reads it."""
    if "up" in by_role or "down" in by_role:
        return ("lora" if "mid" not in by_role else "tucker"), _read_low_rank
    if "hada_w1_a" in by_role:
        return "loha", _read_loha
    if "lokr_w1" in by_role or "lokr_w1_a" in by_role:
        return "lokr", _read_lokr
    if "weight" in by_role:
        return "dense", _read_dense
    return "bias", _read_nothing


def _read_low_rank(layer: LayerTensors) -> dict[str, Tensor | None]:
    up = layer.take("up")  # (out, r, 1, ...)
    down = layer.take("down")  # (r, in / groups, *kernel), of Tucker files (r, in / groups, 1, ...)
    return {"up": up.flatten(1), "core": layer.take("mid"), "down": down.flatten(1)}


def _read_loha(layer: LayerTensors) -> dict[str, Tensor | None]:
    tensors: dict[str, Tensor | None] = {}
    for number in (1, 2):
        core = layer.take(f"hada_t{number}")
        up = layer.take(f"hada_w{number}_a")
        tensors[f"up_{number}"] = up if core is None else up.T  # Tucker files have (r, out)
        tensors[f"core_{number}"] = core
        tensors[f"down_{number}"] = layer.take(f"hada_w{number}_b")
    return tensors


def _read_lokr(layer: LayerTensors) -> dict[str, Tensor | None]:
    """`kron(w1, w2)`, where either is whole or a product of two factors."""
    first = layer.take("lokr_w1")  # (a, b)
    second = layer.take("lokr_w2")  # (c, d, *kernel)
    core = layer.take("lokr_t2")  # (r, r, *kernel)
    tensors: dict[str, Tensor | None] = {
        "left": first,
        "right": None if second is None else second.flatten(1),
    }
    if first is None:
        tensors["left_up"] = layer.take("lokr_w1_a").flatten(1)
        tensors["left_down"] = layer.take("lokr_w1_b").flatten(1)
    if second is None:
        up = layer.take("lokr_w2_a")
        tensors["up"] = up.flatten(1) if core is None else up.T  # Tucker files have (r, rows)
        tensors["core"] = core
        tensors["down"] = layer.take("lokr_w2_b").flatten(1)
    return tensors


def _read_dense(layer: LayerTensors) -> dict[str, Tensor | None]:
    return {"weight": layer.take("weight")}


def _read_nothing(layer: LayerTensors) -> dict[str, Tensor | None]:
    return {}


def _kernel_of(by_role: Mapping[str, KeyedTensor]) -> tuple[int, ...]:
    for role in ("mid", "down"):
        if role in by_role:
            return tuple(by_role[role].tensor.shape[2:])
    return ()


def _read_bias(change: StoredChange, layer: LayerTensors) -> None:
    bias = layer.take("bias")
    up_bias = layer.take("up_bias")  # of the branch, which the multiplier scales
    if up_bias is not None:
        scaled = change.multiplier * up_bias.float()
        bias = scaled if bias is None else scaled + bias
    if bias is not None:
        change.tensors["bias"] = bias.flatten()


def _read_magnitudes(change: StoredChange, layer: LayerTensors) -> None:
    for role in ("magnitude", "base_magnitude", "dora_scale"):
        magnitude = layer.take(role)
        if magnitude is None:
            continue
        name = role
        if role == "dora_scale":
            # (1, in, ...) has one value per input channel, (out, 1, ...) one per output
            is_by_input = magnitude.dim() > 1 and magnitude.shape[0] == 1 < magnitude.numel()
            name = "input_magnitude" if is_by_input else "magnitude"
        change.tensors[name] = magnitude.flatten()


def _read_replacements(change: StoredChange, layer: LayerTensors) -> None:
    for role in ("new_weight", "new_bias"):
        replacement = layer.take(role)
        if replacement is not None:
            change.replacements[role] = replacement
