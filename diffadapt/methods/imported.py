"""Adapters of other tools: every layer in the form that its file has, to be used, trained on and saved."""

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
from diffadapt.methods.dora import row_scale
from diffadapt.methods.imported_forms import FORMS, Tensors
from diffadapt.methods.ranked import check_multiplier
from diffadapt.methods.site import LayerKind, Site

MAGNITUDES = ("magnitude", "input_magnitude", "base_magnitude")


@dataclass(frozen=True)
class Imported(Method):
    """A form, a multiplier and shapes for each layer, by its path in the model; read from files alone.

    `magnitude (out,)` normalises the rows of `W + delta` as DoRA does; `input_magnitude (in,)` its columns,
    one norm per input channel, which is what DoRA files with `dora_scale (1, in, ...)` mean;
    `base_magnitude (out,)` divides by the rows of `W` alone, as ComfyUI reads DoRA.

    The tensors of a layer are those of its form, and perhaps a bias and a magnitude.
    """

    name: ClassVar[str] = "imported"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"linear", "conv", "norm", "embedding"})
    learning_rate: ClassVar[float] = 1e-4

    forms: dict  # path -> {"form": name, "multiplier": number, "shapes": {tensor: shape}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for path, layer in self.forms.items():
            is_known = isinstance(layer, dict) and layer.get("form") in FORMS
            if not is_known or not isinstance(layer.get("shapes"), dict):
                raise ValueError(f"imported: {path} has no form of {', '.join(FORMS)} with shapes: {layer!r}")
            if type(layer.get("multiplier")) not in (int, float):
                raise ValueError(f"imported: the multiplier of {path} is not a number: {layer!r}")
            check_multiplier(f"imported: {path}", layer["multiplier"])

    def __str__(self) -> str:
        counts = Counter(layer["form"] for layer in self.forms.values())
        return f"imported({', '.join(f'{form}: {count}' for form, count in sorted(counts.items()))})"

    def supports(self, site: Site) -> bool:
        return without_denoiser(site.name) in self.forms

    def trained_tensors(self, site: Site) -> Shapes:
        layer = self._layer(site)
        shapes: Shapes = {}
        tensors = {}
        try:
            for key, shape in layer["shapes"].items():
                shapes[key] = tuple(map(int, shape))
                tensors[key] = torch.empty(shapes[key], device="meta")  # a shape without memory
            self._check_shapes(site, tensors)
        except (RuntimeError, TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
            form = layer["form"]
            raise ValueError(
                f"{site.name} has shape {site.shape}, which a {form} of {layer['shapes']} does not fit"
            ) from error
        return shapes

    def has_weight_decay(self, key: str) -> bool:
        return key not in MAGNITUDES

    def update(self, site: Site, tensors: Tensors, base: Tensor) -> Update:
        layer = self._layer(site)
        delta = FORMS[layer["form"]](tensors)
        multiplier = float(layer["multiplier"])
        bias = tensors.get("bias")
        magnitude_key = next((key for key in MAGNITUDES if key in tensors), None)
        if magnitude_key is None:
            return Update(delta, multiplier, bias=bias)

        # V = W + multiplier * delta; norms of the rows of V, of the columns of V, or of the rows of W
        magnitude = tensors[magnitude_key]
        with torch.no_grad():
            normalized = base.to(magnitude.dtype).flatten(1)  # (out, fan_in)
            if magnitude_key != "base_magnitude":
                normalized = normalized + multiplier * delta.matrix()
            if magnitude_key == "input_magnitude":
                # (out, in * kernel) -> (in, out, kernel)
                normalized = normalized.unflatten(1, (len(magnitude), -1)).transpose(0, 1)
            norm = normalized.flatten(1).norm(dim=1)
        scale = row_scale(magnitude, norm)
        if magnitude_key != "input_magnitude":
            return Update(delta, multiplier, scale=scale, bias=bias)
        columns = scale.repeat_interleave(site.fan_in // len(magnitude))  # (in,) -> (in * kernel,)
        return Update(ColumnScaled(base, delta, columns, multiplier), bias=bias)

    def _layer(self, site: Site) -> dict:
        """Form, multiplier and shapes of a site."""
        return self.forms[without_denoiser(site.name)]

    def _check_shapes(self, site: Site, tensors: Tensors) -> None:
        """Checks that tensors fit the site.

        Raises:
            ValueError: they do not. Torch raises other errors where shapes do not multiply.
        """
        update = self.update(site, tensors, torch.empty(site.shape, device="meta"))
        if update.delta is not None and update.delta.matrix().shape != (site.out, site.fan_in):
            raise ValueError("another shape")
        if update.bias is not None and update.bias.shape != site.bias_shape:
            raise ValueError("another bias")
        if update.bias is not None and site.kind == "norm" and not site.has_bias:
            raise ValueError("a bias for a norm without one")  # which an RMSNorm would not add
        if update.scale is not None and update.scale.shape != (site.out,):
            raise ValueError("another magnitude")
