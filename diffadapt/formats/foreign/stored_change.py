"""From a layer's named tensors to the form of its change, with the multiplier its tool gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from diffadapt.formats.foreign.keys import Named
from diffadapt.methods.site import Site

# layer, rank (None where nothing is decomposed), alpha of the file (None without) -> multiplier
Rule = Callable[[str, int | None, float | None], float]


@dataclass(frozen=True)
class Form:
    """What a file does to one layer: a key of ``methods.imported.FORMS``, its tensors and multiplier.

    ``new_weight`` and ``new_bias`` replace the layer's own; ``fit`` makes them differences.
    """

    form: str
    tensors: dict[str, Tensor]
    multiplier: float = 1.0
    replaces: dict[str, Tensor] = field(default_factory=dict)
    kernel: tuple[int, ...] = ()  # of a convolution's factors
    cut: bool = False  # ``down`` is as wide as the widest layer of the model; each layer takes its part

    @property
    def rank(self) -> int | None:
        """Of the factors; None where there are none."""
        for key in ("down", "down_1", "left_down"):
            if key in self.tensors:
                return len(self.tensors[key]) if self.tensors[key].dim() else 0
        return None


def kohya_rule(layer: str, rank: int | None, alpha: float | None) -> float:
    """``alpha / rank``; 1 without alpha (ComfyUI, A1111), and for a LoKr of two whole factors."""
    return 1.0 if alpha is None or rank is None else alpha / rank


def form_of(layer: str, roles: dict[str, Named], rule: Rule) -> tuple[Form, list[str]]:
    """The form of a layer and the keys it does not use. Raises ValueError where a tensor is missing."""
    rest = dict(roles)
    take = lambda role: rest.pop(role).tensor if role in rest else None  # noqa: E731
    alpha = take("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"the alpha of {layer} must be one number, its shape is {tuple(alpha.shape)}")
    alpha = None if alpha is None else float(alpha)
    read = next((read for start, read in _READERS.items() if start in rest), _nothing)
    try:
        form, tensors = read(take)
    except (AttributeError, KeyError) as error:
        known = ", ".join(named.key for named in roles.values())
        raise ValueError(f"{layer} lacks a tensor beside {known}") from error
    except (IndexError, RuntimeError) as error:
        shapes = ", ".join(f"{named.key}: {tuple(named.tensor.shape)}" for named in roles.values())
        raise ValueError(f"{layer} has tensors of shapes that no adapter has: {shapes}") from error
    spatial = next((roles[role].tensor.shape[2:] for role in ("mid", "down") if role in roles), ())
    own = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    made = Form(form, own, kernel=tuple(spatial))
    if made.rank == 0:
        raise ValueError(f"{layer} has factors without a single row")
    multiplier = rule(layer, made.rank, alpha) if form in ("lora", "tucker", "loha", "lokr") else 1.0
    made = replace(made, multiplier=multiplier)
    _decorate(made, take)
    return made, [named.key for named in rest.values()]


def fit(form: Form, site: Site, base: Tensor, bias: Tensor | None) -> Form:
    """The form for a known layer: differences instead of replacements, whole tensors in the layer's shape."""
    tensors = dict(form.tensors)
    for key in ("core", "core_1", "core_2"):
        if key in tensors and tensors[key].shape[2:].numel() == base.shape[2:].numel():
            tensors[key] = tensors[key].reshape(*tensors[key].shape[:2], *site.kernel)
    if "weight" in tensors and tensors["weight"].numel() == site.numel:
        tensors["weight"] = tensors["weight"].reshape(site.shape)
    if form.cut:
        tensors["down"] = tensors["down"][:, : site.fan_in]
    name = form.form
    if "new_weight" in form.replaces and form.replaces["new_weight"].shape == base.shape:
        name, tensors["weight"] = "dense", form.replaces["new_weight"].double() - base.double().cpu()
    if "new_bias" in form.replaces and bias is not None:
        tensors["bias"] = form.replaces["new_bias"].double() - bias.double().cpu()
    missing = [key for key in form.replaces if key.removeprefix("new_") not in tensors]
    if missing:
        raise ValueError(f"{site.name} has no {missing[0].removeprefix('new_')} of the shape in the file")
    return replace(form, form=name, tensors=tensors, replaces={}, cut=False)


def _decorate(form: Form, take: Callable[[str], Tensor | None]) -> None:
    """Biases and magnitudes, which any form can have beside it."""
    bias, up_bias = take("bias"), take("up_bias")
    if up_bias is not None:
        bias = form.multiplier * up_bias.float() + (0 if bias is None else bias)
    if bias is not None:
        form.tensors["bias"] = bias.flatten()
    for key in ("magnitude", "base_magnitude", "dora_scale"):
        value = take(key)
        if value is not None:
            by_input = key == "dora_scale" and value.dim() > 1 and value.shape[0] == 1 < value.numel()
            name = "input_magnitude" if by_input else "magnitude" if key == "dora_scale" else key
            form.tensors[name] = value.flatten()
    for key in ("new_weight", "new_bias"):
        value = take(key)
        if value is not None:
            form.replaces[key] = value


def _low_rank(take: Callable[[str], Tensor | None]) -> tuple[str, dict[str, Tensor | None]]:
    up, down, mid = take("up"), take("down"), take("mid")
    tensors = {"up": up.flatten(1), "core": mid, "down": down.flatten(1)}
    return ("lora" if mid is None else "tucker"), tensors


def _loha(take: Callable[[str], Tensor | None]) -> tuple[str, dict[str, Tensor | None]]:
    tensors: dict[str, Tensor | None] = {}
    for number in (1, 2):
        core, up = take(f"hada_t{number}"), take(f"hada_w{number}_a")
        up = up if core is None else up.T  # Tucker files have (r, out)
        tensors |= {f"up_{number}": up, f"core_{number}": core, f"down_{number}": take(f"hada_w{number}_b")}
    return "loha", tensors


def _lokr(take: Callable[[str], Tensor | None]) -> tuple[str, dict[str, Tensor | None]]:
    left, right, core = take("lokr_w1"), take("lokr_w2"), take("lokr_t2")
    tensors = {"left": left, "right": None if right is None else right.flatten(1)}
    if left is None:
        tensors |= {"left_up": take("lokr_w1_a").flatten(1), "left_down": take("lokr_w1_b").flatten(1)}
    if right is None:
        up = take("lokr_w2_a")
        up = up.flatten(1) if core is None else up.T
        tensors |= {"up": up, "core": core, "down": take("lokr_w2_b").flatten(1)}
    return "lokr", tensors


def _dense(take: Callable[[str], Tensor | None]) -> tuple[str, dict[str, Tensor | None]]:
    return "dense", {"weight": take("weight")}


def _nothing(take: Callable[[str], Tensor | None]) -> tuple[str, dict[str, Tensor | None]]:
    return "bias", {}


_READERS = {
    "up": _low_rank,
    "down": _low_rank,
    "hada_w1_a": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "weight": _dense,
}
