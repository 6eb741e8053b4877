"""A number per image and prompt from a class of one's own, such as a model of human preference."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn

from diffadapt.evaluation.features.extractors.base import Extractor
from diffadapt.evaluation.features.extractors.custom import source_sha256
from diffadapt.evaluation.record import ImageRow
from diffadapt.evaluation.scored_set import ScoredSet
from diffadapt.evaluation.scoring import Plan, ScoringResult, score_set
from diffadapt.metrics.feature_set import FeatureSet

METRIC = "preference"
BATCH = 16  # images handed over at a time
CONTRACT = (
    "it is made without arguments and called with a list of PIL images (RGB) and a list of as many prompts; "
    "it returns as many numbers, higher is better"
)


@dataclass(frozen=True)
class Preference:
    """A model of preference.

    Attributes:
        name: module:Class.
        sha256: over its source file and, of a torch module, its tensors.
        model: (images, prompts) -> numbers.
    """

    name: str
    sha256: str
    model: Callable[[list[Image.Image], list[str]], Sequence[float] | Tensor]

    def values(self, scored_set: ScoredSet) -> Tensor:
        """One number per image of a set that knows its prompts, (N,) float64.

        Raises: ValueError when the set has no prompts, or the model does not keep the contract.
        """
        if not scored_set.prompts or scored_set.load_image is None:
            raise ValueError(
                f"{self.name} needs the images and their prompts: give --captions, or score a folder that "
                "`diffadapt sample` wrote"
            )
        parts = []
        for start in range(0, len(scored_set.facts), BATCH):
            names = [facts.name for facts in scored_set.facts[start : start + BATCH]]
            images = [scored_set.load_image(name).convert("RGB") for name in names]
            prompts = list(scored_set.prompts[start : start + BATCH])
            with torch.inference_mode():
                numbers = torch.as_tensor(self.model(images, prompts)).double().cpu().flatten()
            if len(numbers) != len(names):
                raise ValueError(
                    f"{self.name} gave {len(numbers)} numbers for {len(names)} images: {CONTRACT}"
                )
            parts.append(numbers)
        values = torch.cat(parts)
        broken = (~values.isfinite()).nonzero().flatten().tolist()
        if broken:
            raise ValueError(f"{self.name} gave NaN or infinity for {scored_set.facts[broken[0]].name}")
        return values

    @property
    def extractor(self) -> Extractor:
        """What stands for it in records."""
        roles = {METRIC: METRIC}
        return Extractor(self.name, self.sha256, 0, "none", (METRIC,), None, self.model, roles=roles)


def load_preference(name: str) -> Preference:
    """The class `module:Class`; modules of the current folder are found too.

    Raises: ValueError when it cannot be imported or called.
    """
    module_name, colon, class_name = name.partition(":")
    if not colon or not class_name:
        raise ValueError(f"--preference takes module:Class, got {name!r}; {CONTRACT}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--preference {name} cannot be imported: {error}") from None
    model = kind()
    if not callable(model):
        raise ValueError(f"--preference {name} does not keep the contract: {CONTRACT}")
    if isinstance(model, nn.Module):
        model.requires_grad_(False).eval()
    return Preference(name, source_sha256(kind, model), model)


def score_preference(
    label: str, scored_set: ScoredSet, preference: Preference, plan: Plan
) -> tuple[ScoringResult, dict[str, float]]:
    """The mean with its interval over prompts, and the number of each image by its name."""
    values = preference.values(scored_set)
    order = {prompt: index for index, prompt in enumerate(dict.fromkeys(scored_set.prompts))}
    groups = torch.tensor([order[prompt] for prompt in scored_set.prompts])
    feature_sets = {preference.name: FeatureSet({METRIC: values[:, None], "groups": groups})}
    its_plan = replace(plan, metrics=(METRIC,))
    scored = score_set(
        label, replace(scored_set, feature_sets=feature_sets), None, preference.extractor, its_plan
    )
    names = (facts.name for facts in scored_set.facts)
    return scored, dict(zip(names, values.tolist(), strict=True))


def with_preference(
    rows: Sequence[ImageRow], scored_set: ScoredSet, label: str, numbers: dict[str, float]
) -> list:
    """The rows of a set's images with the number of each; new rows where there are none."""
    if not rows:
        seeds = scored_set.summary.made.get("seeds") or [None] * len(scored_set.facts)
        rows = [
            ImageRow(label, facts.name, prompt=prompt, seed=seed)
            for facts, prompt, seed in zip(scored_set.facts, scored_set.prompts, seeds, strict=True)
        ]
    return [replace(row, values={**row.values, METRIC: numbers[row.name]}) for row in rows]
