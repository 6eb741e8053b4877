"""Adapters of other tools: every layer in the form its file has, to be used, trained on and saved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffadapt.algebra.expression import Update
from diffadapt.algebra.full_rank import ColumnScaled
from diffadapt.common.pipeline_components import without_denoiser
from diffadapt.methods.base import Method, Shapes
from diffadapt.methods.dora import rescale
from diffadapt.methods.imported_forms import FORMS, Tensors
from diffadapt.methods.ranked import check_multiplier
from diffadapt.methods.site import LayerKind, Site

MAGNITUDES = ("magnitude", "input_magnitude", "base_magnitude")


@dataclass(frozen=True)
class Imported(Method):
    """A form, a multiplier and shapes for each layer, by its path in the model; read from files alone.

    ``magnitude (out,)`` normalises the rows of ``W + delta`` as DoRA does; ``input_magnitude (in,)`` its
    columns, one norm per input channel, which is what DoRA files with ``dora_scale (1, in, ...)`` mean;
    ``base_magnitude (out,)`` divides by the rows of ``W`` alone, as ComfyUI reads DoRA.
    """

    name: ClassVar[str] = "imported"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"linear", "conv", "norm", "embedding"})
    learning_rate: ClassVar[float] = 1e-4

    forms: dict  # path -> {"form": name, "multiplier": number, "shapes": {tensor: shape}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for path, own in self.forms.items():
            known = isinstance(own, dict) and own.get("form") in FORMS
            if not known or not isinstance(own.get("shapes"), dict):
                raise ValueError(f"imported: {path} has no form of {', '.join(FORMS)} with shapes: {own!r}")
            if type(own.get("multiplier")) not in (int, float):
                raise ValueError(f"imported: the multiplier of {path} is not a number: {own!r}")
            check_multiplier(f"imported: {path}", own["multiplier"])

    def __str__(self) -> str:
        counts = Counter(own["form"] for own in self.forms.values())
        return f"imported({', '.join(f'{form}: {count}' for form, count in sorted(counts.items()))})"

    def supports(self, site: Site) -> bool:
        return without_denoiser(site.name) in self.forms

    def trained_tensors(self, site: Site) -> Shapes:
        own = self._own(site)
        try:
            shapes = {key: tuple(map(int, shape)) for key, shape in own["shapes"].items()}
            tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
            self._check(site, tensors)
        except (RuntimeError, TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{site.name} has shape {site.shape}, which a {own['form']} of {own['shapes']} does not fit"
            ) from error
        return shapes

    def has_weight_decay(self, key: str) -> bool:
        return key not in MAGNITUDES

    def update(self, site: Site, tensors: Tensors, base: Tensor) -> Update:
        own = self._own(site)
        delta, multiplier, bias = FORMS[own["form"]](tensors), float(own["multiplier"]), tensors.get("bias")
        key = next((key for key in MAGNITUDES if key in tensors), None)
        if key is None:
            return Update(delta, multiplier, bias=bias)
        magnitude = tensors[key]
        with torch.no_grad():
            whole = base.to(magnitude.dtype).flatten(1)
            if key != "base_magnitude":
                whole = whole + multiplier * delta.matrix()
            if key == "input_magnitude":
                whole = whole.unflatten(1, (len(magnitude), -1)).transpose(0, 1)
            norm = whole.flatten(1).norm(dim=1)
        scale = rescale(magnitude, norm)
        if key != "input_magnitude":
            return Update(delta, multiplier, scale=scale, bias=bias)
        columns = scale.repeat_interleave(site.fan_in // len(magnitude))
        return Update(ColumnScaled(base, delta, columns, multiplier), bias=bias)

    def _own(self, site: Site) -> dict:
        return self.forms[without_denoiser(site.name)]

    def _check(self, site: Site, tensors: Tensors) -> None:
        update = self.update(site, tensors, torch.empty(site.shape, device="meta"))
        if update.delta is not None and update.delta.matrix().shape != (site.out, site.fan_in):
            raise ValueError("another shape")
        if update.bias is not None and update.bias.shape != site.bias_shape:
            raise ValueError("another bias")
        if update.scale is not None and update.scale.shape != (site.out,):
            raise ValueError("another magnitude")
