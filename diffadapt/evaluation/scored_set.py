"""An image set ready to be scored: its features by extractor, its summary, facts of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffadapt.evaluation.features.cache import identity_of
from diffadapt.evaluation.features.extraction import ExtractedFeatures
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.features.feature_file import read_features
from diffadapt.evaluation.features.weight_files import sha256_of
from diffadapt.evaluation.record import SetSummary
from diffadapt.evaluation.sets.image_files import ImageInfo
from diffadapt.evaluation.sets.image_sets import ImageSet, fingerprint
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.frechet_statistics import read_all_statistics


@dataclass(frozen=True)
class ScoredSet:
    """A set ready to be scored.

    Attributes:
        feature_sets: extractor name -> what metrics read.
        facts: of the images in the order of the rows; () for statistics.
        load_image: image name -> the image; None where only features are at hand.
    """

    summary: SetSummary
    feature_sets: Mapping[str, FeatureSet]
    infos: tuple[ImageInfo, ...]
    load_image: Callable[[str], Image.Image] | None
    prompts: tuple[str, ...] = ()


def scored_set_from_images(
    images: ImageSet, made: ExtractedFeatures, extractors: Sequence[Extractor], *, role: str
) -> ScoredSet:
    """The material of extracted images; texts and groups come from the prompts of drawn ones.

    Images of class labels are grouped by class, but "class 3" is no text to compare an image with.
    """
    prompts, has_words = _prompts_of(images, made.infos), "labels" not in images.generation
    known = [e for e in extractors if e.name in made.features]
    feature_sets = {e.name: _inputs(e, made.features[e.name], prompts, has_words) for e in known}
    by_name = {picture.name: picture for picture in images.images}

    def load_image(name: str) -> Image.Image:
        pixels, _ = by_name[name].load()
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    skipped = (*images.ignored, *made.skipped)
    summary = _summary(role, images.source, images.kind, made.infos, skipped, images.generation)
    return ScoredSet(summary, feature_sets, made.infos, load_image, prompts)


def scored_set_from_file(path: Path, extractors: Sequence[Extractor], *, role: str) -> ScoredSet:
    """Saved features (.safetensors) or published statistics (.npz with mu and sigma).

    Raises: ValueError when the features are not those of the only extractor, naming what differs.
    """
    if path.suffix == ".npz":
        statistics = read_all_statistics(path)
        summary = SetSummary(role, str(path), "statistics", statistics["statistics"].n or 0, sha256_of(path))
        feature_sets = {e.name: FeatureSet({}, statistics=statistics) for e in extractors}
        return ScoredSet(summary, feature_sets, (), None)
    content = read_features(path)
    for extractor in extractors:
        wanted = identity_of(extractor)
        other = [
            f"{n}: {content.identity.get(n)!r}, not {v!r}"
            for n, v in wanted.items()
            if content.identity.get(n) != v
        ]
        if other:
            raise ValueError(
                f"{path} holds features made otherwise than by {extractor.name!r}: {'; '.join(other)}"
            )
    feature_sets = {e.name: _inputs(e, content.layers) for e in extractors}
    summary = _summary(role, str(path), "features", content.infos, (), {})
    return ScoredSet(summary, feature_sets, content.infos, None)


def with_statistics(scored_set: ScoredSet, path: Path) -> ScoredSet:
    """A reference batch as ADM publishes it: images, and Frechet statistics of the whole set they are from.

    The Frechet distances of Inception are taken of the statistics, everything else of the images.
    """
    statistics = read_all_statistics(path)
    feature_sets = dict(scored_set.feature_sets)
    if "inception" in feature_sets:
        feature_sets["inception"] = FeatureSet(feature_sets["inception"].features, statistics=statistics)
    both = fingerprint([scored_set.summary.fingerprint, sha256_of(path)])
    return replace(
        scored_set, summary=replace(scored_set.summary, fingerprint=both), feature_sets=feature_sets
    )


def has_statistics(source: object) -> bool:
    """Whether a name stands for an npz that holds images and statistics."""
    from diffadapt.evaluation.sets.archives import array_names

    path = Path(source) if isinstance(source, str) else None
    if path is None or path.suffix != ".npz" or not path.is_file():
        return False
    return {"arr_0", "mu", "sigma"} <= set(array_names(path))


def holds_features(source: str) -> bool:
    """Whether a name stands for saved features or statistics rather than images."""
    path = Path(source)
    if path.suffix == ".safetensors" and path.is_file():
        return True
    if path.suffix != ".npz" or not path.is_file():
        return False
    from diffadapt.evaluation.sets.archives import array_names

    names = array_names(path)
    return "mu" in names and "arr_0" not in names


def _inputs(
    extractor: Extractor, layers: Mapping[str, Tensor], prompts: Sequence[str] = (), has_words: bool = False
) -> FeatureSet:
    roles = {
        "features": extractor.feature_layer,
        "logits": extractor.logit_layer,
        "pixels": extractor.perceptual_layer,
    }
    roles |= extractor.role_layers
    found = {role: layers[layer] for role, layer in roles.items() if layer in layers}
    if prompts:
        order = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        found["groups"] = torch.tensor([order[prompt] for prompt in prompts])
        if extractor.embed_texts is not None and has_words:
            rows = extractor.embed_texts(list(order)).cpu()
            found["texts"] = rows[found["groups"]]
    return FeatureSet(found)


def _prompts_of(images: ImageSet, facts: Sequence[ImageInfo]) -> tuple[str, ...]:
    if not images.prompts:
        return ()
    prompt = dict(zip((picture.name for picture in images.images), images.prompts, strict=True))
    return tuple(prompt[each.name] for each in facts)


def _summary(
    role: str, source: str, kind: str, facts: Sequence[ImageInfo], skipped: Sequence[str], made: Mapping
) -> SetSummary:
    return SetSummary(
        role,
        source,
        kind,
        len(facts),
        fingerprint(each.sha256 for each in facts),
        formats=dict(Counter(each.format for each in facts)),
        sizes=dict(Counter(f"{each.width}x{each.height}" for each in facts)),
        modes=dict(Counter(each.mode for each in facts)),
        conversions=dict(Counter(conversion for each in facts for conversion in each.conversions)),
        skipped=tuple(skipped),
        made=dict(made),
    )
