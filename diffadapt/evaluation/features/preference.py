"""Preference models of users: a class that gives one number per image and prompt, higher is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn

from diffadapt.evaluation.features.extractors.base import Extractor
from diffadapt.evaluation.features.extractors.custom import import_class, source_sha256
from diffadapt.evaluation.features.prompt_groups import group_numbers
from diffadapt.evaluation.record import ImageRow
from diffadapt.evaluation.scored_set import ScoredSet
from diffadapt.evaluation.scoring import Plan, ScoringResult, score_set
from diffadapt.metrics.feature_set import FeatureSet

METRIC = "preference"
BATCH = 16  # images per call of the model
CONTRACT = (
    "it is constructed without arguments and called with a list of PIL images (RGB) and a list of as many "
    "prompts; it returns as many numbers, higher is better"
)


@dataclass(frozen=True)
class Preference:
    """A preference model.

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

        Raises:
            ValueError: the set has no prompts, or the model does not keep the contract.
        """
        if not scored_set.prompts or scored_set.load_image is None:
            raise ValueError(
                f"{self.name} needs the images and their prompts: give --captions, or score a folder that "
                "`diffadapt sample` wrote"
            )
        names = [info.name for info in scored_set.infos]
        parts = []
        for start in range(0, len(names), BATCH):
            images = []
            for name in names[start : start + BATCH]:
                images.append(scored_set.load_image(name).convert("RGB"))
            prompts = list(scored_set.prompts[start : start + BATCH])
            with torch.inference_mode():
                numbers = torch.as_tensor(self.model(images, prompts)).double().cpu().flatten()
            if len(numbers) != len(images):
                raise ValueError(
                    f"{self.name} gave {len(numbers)} numbers for {len(images)} images: {CONTRACT}"
                )
            parts.append(numbers)
        values = torch.cat(parts)
        bad_rows = (~values.isfinite()).nonzero().flatten().tolist()
        if bad_rows:
            raise ValueError(f"{self.name} gave NaN or infinity for {names[bad_rows[0]]}")
        return values

    @property
    def extractor(self) -> Extractor:
        """An extractor that stands for the model in records; it extracts nothing."""
        return Extractor(
            name=self.name,
            sha256=self.sha256,
            side=0,  # the model gets images as they are
            preset="none",
            layers=(METRIC,),
            feature_layer=None,
            network=self.model,
            role_layers={METRIC: METRIC},
        )


def load_preference(name: str) -> Preference:
    """The preference model of a class.

    Args:
        name: `module:Class`; modules in the current folder are found too.

    Raises:
        ValueError: the class cannot be imported or called.
    """
    _, colon, class_name = name.partition(":")
    if not colon or not class_name:
        raise ValueError(f"--preference takes module:Class, got {name!r}; {CONTRACT}")
    try:
        model_class = import_class(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--preference {name} cannot be imported: {error}") from None
    model = model_class()
    if not callable(model):
        raise ValueError(f"--preference {name} does not keep the contract: {CONTRACT}")
    if isinstance(model, nn.Module):
        model.requires_grad_(False).eval()
    return Preference(name, source_sha256(model_class, model), model)


def score_preference(
    label: str, scored_set: ScoredSet, preference: Preference, plan: Plan
) -> tuple[ScoringResult, dict[str, float]]:
    """The mean preference of a set, with an interval over prompts, and the number of each image by name."""
    values = preference.values(scored_set)
    groups = group_numbers(scored_set.prompts)
    feature_sets = {preference.name: FeatureSet({METRIC: values[:, None], "groups": groups})}
    preference_plan = replace(plan, metrics=(METRIC,))
    scored = score_set(
        label, replace(scored_set, feature_sets=feature_sets), None, preference.extractor, preference_plan
    )
    # by name, as rows of images may come from elsewhere, in another order
    names = [info.name for info in scored_set.infos]
    return scored, dict(zip(names, values.tolist(), strict=True))


def with_preference(
    rows: Sequence[ImageRow], scored_set: ScoredSet, label: str, numbers: dict[str, float]
) -> list[ImageRow]:
    """The rows of a set's images with the number of each; new rows where there are none."""
    if not rows:
        seeds = scored_set.summary.made.get("seeds") or [None] * len(scored_set.infos)
        rows = []
        for info, prompt, seed in zip(scored_set.infos, scored_set.prompts, seeds, strict=True):
            rows.append(ImageRow(label, info.name, prompt=prompt, seed=seed))
    rows_with_preference = []
    for row in rows:
        values = {**row.values, METRIC: numbers[row.name]}
        rows_with_preference.append(replace(row, values=values))
    return rows_with_preference
