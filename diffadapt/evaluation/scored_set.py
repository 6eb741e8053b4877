"""An image set ready to be scored: its features by extractor, its summary, information about its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffadapt.evaluation.features.cache import identity_of
from diffadapt.evaluation.features.extraction import ExtractedFeatures
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.features.feature_file import read_features
from diffadapt.evaluation.features.prompt_groups import group_numbers
from diffadapt.evaluation.features.weight_files import sha256_of
from diffadapt.evaluation.record import SetSummary
from diffadapt.evaluation.sets.archives import IMAGES, array_names
from diffadapt.evaluation.sets.image_files import ImageInfo, to_pil_image
from diffadapt.evaluation.sets.image_sets import ImageSet, fingerprint, fingerprint_of
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.frechet_statistics import read_all_statistics


@dataclass(frozen=True)
class ScoredSet:
    """A set ready to be scored.

    Attributes:
        summary: of the set, for the record.
        feature_sets: extractor name -> what metrics read.
        infos: of each image in the order of the rows; () for statistics.
        load_image: image name -> the image; None where only features are known.
        prompts: of each image; () where they are not known.
    """

    summary: SetSummary
    feature_sets: Mapping[str, FeatureSet]
    infos: tuple[ImageInfo, ...]
    load_image: Callable[[str], Image.Image] | None
    prompts: tuple[str, ...] = ()


def scored_set_from_images(
    image_set: ImageSet, extracted: ExtractedFeatures, extractors: Sequence[Extractor], *, role: str
) -> ScoredSet:
    """The scored set of extracted images; texts and groups come from the prompts of generated ones.

    Images of class labels are grouped by class, but "class 3" is no text to compare an image with.

    Args:
        image_set: the images.
        extracted: their features.
        extractors: those of the features.
        role: "generated" or "real".
    """
    prompts = _prompts_of(image_set, extracted.infos)
    has_texts = "labels" not in image_set.generation
    feature_sets = {}
    for extractor in extractors:
        if extractor.name in extracted.features:
            layers = extracted.features[extractor.name]
            feature_sets[extractor.name] = _feature_set(extractor, layers, prompts, has_texts=has_texts)
    images = {image.name: image for image in image_set.images}

    def load_image(name: str) -> Image.Image:
        return to_pil_image(images[name])

    summary = _summarise(
        role,
        image_set.source,
        image_set.kind,
        extracted.infos,
        skipped=(*image_set.ignored, *extracted.skipped),
        generation=image_set.generation,
    )
    return ScoredSet(summary, feature_sets, extracted.infos, load_image, prompts)


def scored_set_from_file(path: Path, extractors: Sequence[Extractor], *, role: str) -> ScoredSet:
    """The scored set of saved features (.safetensors) or published statistics (.npz with mu and sigma).

    Raises:
        ValueError: the features are not those of the extractors; names what differs.
    """
    if path.suffix == ".npz":
        statistics = read_all_statistics(path)
        count = statistics["statistics"].n or 0
        summary = SetSummary(role, str(path), "statistics", count, sha256_of(path))
        feature_sets = {}
        for extractor in extractors:
            feature_sets[extractor.name] = FeatureSet({}, statistics=statistics)
        return ScoredSet(summary, feature_sets, infos=(), load_image=None)
    content = read_features(path)
    feature_sets = {}
    # one file holds the features of one extractor, so a second one is refused here
    for extractor in extractors:
        mismatches = []
        for field, value in identity_of(extractor).items():
            if content.identity.get(field) != value:
                mismatches.append(f"{field}: {content.identity.get(field)!r}, not {value!r}")
        if mismatches:
            raise ValueError(
                f"{path} holds features of another extractor than {extractor.name!r}: {'; '.join(mismatches)}"
            )
        feature_sets[extractor.name] = _feature_set(extractor, content.layers)
    summary = _summarise(role, str(path), "features", content.infos)
    return ScoredSet(summary, feature_sets, content.infos, load_image=None)


def with_statistics(scored_set: ScoredSet, path: Path) -> ScoredSet:
    """Adds the Frechet statistics in ADM's reference batch, which are those of the whole set.

    The Frechet distances of Inception are computed from the statistics, everything else from the images.

    Args:
        scored_set: the images of the batch.
        path: of the batch.
    """
    statistics = read_all_statistics(path)
    feature_sets = dict(scored_set.feature_sets)
    if "inception" in feature_sets:
        feature_sets["inception"] = FeatureSet(feature_sets["inception"].features, statistics=statistics)
    # the statistics may be of other images than those in the file: a score depends on both
    combined = fingerprint([scored_set.summary.fingerprint, sha256_of(path)])
    summary = replace(scored_set.summary, fingerprint=combined)
    return replace(scored_set, summary=summary, feature_sets=feature_sets)


def has_statistics(source: object) -> bool:
    """Whether a name stands for an npz file that holds images and statistics."""
    if not isinstance(source, str):
        return False
    path = Path(source)
    if path.suffix != ".npz" or not path.is_file():
        return False
    return {IMAGES, "mu", "sigma"} <= set(array_names(path))


def holds_features(source: str) -> bool:
    """Whether a name stands for saved features or statistics rather than images."""
    path = Path(source)
    if path.suffix not in (".safetensors", ".npz") or not path.is_file():
        return False
    if path.suffix == ".safetensors":
        return True
    names = array_names(path)  # ADM's batches hold images and their statistics: those are images
    return "mu" in names and IMAGES not in names


def _feature_set(
    extractor: Extractor,
    layers: Mapping[str, Tensor],
    prompts: Sequence[str] = (),
    *,
    has_texts: bool = False,
) -> FeatureSet:
    """The layers by the roles that metrics read, with the texts and groups of the prompts.

    Args:
        extractor: of the layers.
        layers: layer -> (N, D).
        prompts: of each image.
        has_texts: whether the prompts are texts rather than class labels.
    """
    role_layers = {
        "features": extractor.feature_layer,
        "logits": extractor.logit_layer,
        "pixels": extractor.perceptual_layer,
        **extractor.role_layers,
    }
    features: dict[str, Tensor] = {}
    for role, layer in role_layers.items():
        if layer in layers:
            features[role] = layers[layer]
    if prompts:
        groups = group_numbers(prompts)  # (N,)
        features["groups"] = groups
        if extractor.embed_texts is not None and has_texts:
            unique_prompts = list(dict.fromkeys(prompts))  # in the order of their numbers
            features["texts"] = extractor.embed_texts(unique_prompts).cpu()[groups]  # (N, D)
    return FeatureSet(features)


def _prompts_of(image_set: ImageSet, infos: Sequence[ImageInfo]) -> tuple[str, ...]:
    """The prompts of the images that were read."""
    if not image_set.prompts:
        return ()
    prompt_of = dict(zip(image_set.names, image_set.prompts, strict=True))
    prompts = []
    for info in infos:
        prompts.append(prompt_of[info.name])
    return tuple(prompts)


def _summarise(
    role: str,
    source: str,
    kind: str,
    infos: Sequence[ImageInfo],
    *,
    skipped: Sequence[str] = (),
    generation: Mapping[str, object] | None = None,
) -> SetSummary:
    """The summary of a set, with what differs between its images counted."""
    formats: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    conversions: Counter[str] = Counter()
    for info in infos:
        formats[info.format] += 1
        sizes[f"{info.width}x{info.height}"] += 1
        modes[info.mode] += 1
        conversions.update(info.conversions)
    return SetSummary(
        role,
        source,
        kind,
        len(infos),
        fingerprint_of(infos),
        formats=dict(formats),
        sizes=dict(sizes),
        modes=dict(modes),
        conversions=dict(conversions),
        skipped=tuple(skipped),
        made=dict(generation or {}),
    )
