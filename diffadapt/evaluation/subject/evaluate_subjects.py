"""DreamBooth's protocol (arXiv 2208.12242, section 4.1): image sets whose images know subject and prompt.

The registry's metrics are taken of each subject's images and averaged over prompts, then over subjects. The
record is the same file, with the same page and comparison, as of any other evaluation.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from diffadapt.evaluation.evaluate_sets import REFERENCE
from diffadapt.evaluation.features.extraction import ExtractedFeatures, extract
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.features.prompt_groups import group_numbers
from diffadapt.evaluation.features.prompt_lengths import long_prompts_warning
from diffadapt.evaluation.output_files import EvaluationOutput
from diffadapt.evaluation.record import EvaluationRecord, ImageRow, Score, SetSummary
from diffadapt.evaluation.run_facts import run_facts, versions
from diffadapt.evaluation.scored_set import ScoredSet
from diffadapt.evaluation.scoring import Plan, kind_of, score_metric, values_by_image
from diffadapt.evaluation.sets.image_files import ArrayImage, LazyImage, to_pil_image
from diffadapt.evaluation.sets.image_sets import ImageSet, fingerprint_of
from diffadapt.evaluation.subject.generate import SubjectSets
from diffadapt.evaluation.subject.subjects import Subject, SubjectImages, as_image_set
from diffadapt.metrics.bindings import MetricCall
from diffadapt.metrics.copying import nearest_images
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.registry import METRICS

FIDELITY = {"clip": "clip_i", "dino": "dino"}  # kind of extractor -> its score of likeness to the subject
FEW_SUBJECTS = 10  # below, an interval over subjects says little


@dataclass
class _Results:
    """What the record will hold, set by set."""

    scores: list[Score] = field(default_factory=list)
    rows: list[ImageRow] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # "set: metric" -> why
    summaries: dict[str, SetSummary] = field(default_factory=dict)


def evaluate_subjects(
    sets: SubjectSets,
    extractors: Sequence[Extractor],
    *,
    token: str,
    seed: int,
    settings: Mapping[str, object] | None = None,
    skip_bad: bool = False,
) -> EvaluationOutput | None:
    """Scores every set of images, all of the same subjects. None on all but the main process.

    Args:
        sets: label -> the images of every subject, and how they were generated.
        token: the unique word of the prompts.
        seed: of the bootstrap.
        settings: kept in the record: the command, whether it is a demo, ...
        skip_bad: leave unreadable images out, instead of raising; the record names them.

    Raises:
        ValueError: the extractors do not suit, images cannot be read, or a subject has none left.
    """
    check_extractors(extractors)
    start = time.perf_counter()
    first_images, _ = next(iter(sets.values()))
    subjects = [images.subject for images in first_images]
    real = _real_set(subjects, _similarity_extractors(extractors), skip_bad)
    results = _Results()
    for label, (images, generation) in sets.items():
        image_set = as_image_set(images, source=label)
        extracted = extract(image_set, extractors, skip_bad=skip_bad, title=label)
        origins = _origins_of(label, images, extracted)
        # every process extracts, and raises the errors above; the first one scores
        if not PartialState().is_main_process:
            continue
        generated = _generated_set(label, subjects, origins, extracted, extractors, generation)
        _score(label, generated, real, subjects, extractors, seed, results)
        results.rows += _image_rows(label, generated, real, subjects, origins, extractors, token)
        results.summaries[label] = generated.summary
    if not PartialState().is_main_process:
        return None
    results.summaries[REFERENCE] = real.summary
    texts: list[str] = []
    for subject in subjects:
        texts += subject.texts()
    warnings = []
    for extractor in extractors:
        warnings += long_prompts_warning("prompts", texts, extractor)
    record = EvaluationRecord(
        scores=tuple(results.scores),
        sets=results.summaries,
        extractors=tuple(extractor.summary for extractor in extractors),
        seeds={"metrics": seed},
        versions=versions(),
        warnings=tuple(warnings),
        images=tuple(results.rows),
        refused=results.refused,
        settings={**(settings or {}), **run_facts(start)},
    )
    return EvaluationOutput(record, _image_loader(sets))


def check_extractors(extractors: Sequence[Extractor]) -> None:
    """Checks that the protocol's scores can be computed.

    Raises:
        ValueError: other extractors than one clip or dino, or one of each, and lpips.
    """
    kinds = [kind_of(extractor) for extractor in _similarity_extractors(extractors)]
    has_other_kind = not set(kinds) <= set(FIDELITY)
    has_repeated_kind = len(set(kinds)) < len(kinds)
    if has_other_kind or has_repeated_kind or not kinds:
        names = ", ".join(extractor.name for extractor in extractors) or "none"
        raise ValueError(
            f"likeness to a subject needs one clip or dino extractor, or one of each; got {names}"
        )


def _similarity_extractors(extractors: Sequence[Extractor]) -> list[Extractor]:
    """The extractors that compare images with real ones and with texts: all but LPIPS."""
    return [extractor for extractor in extractors if not extractor.is_perceptual]


# Sets of features


@dataclass(frozen=True)
class _Origin:
    """Where a generated image comes from: the position of its subject, its prompt's number and its seed."""

    subject: int
    prompt: int
    seed: int | None


def _real_set(subjects: Sequence[Subject], extractors: Sequence[Extractor], skip_bad: bool) -> ScoredSet:
    """The subjects' real images, as they are and mirrored, so that copies are found both ways.

    Raises:
        ValueError: images cannot be read, or a subject has no readable one.
    """
    images: dict[str, LazyImage] = {}  # by name, which begins with the subject's
    subject_of_image: dict[str, int] = {}
    for position, subject in enumerate(subjects):
        for image in subject.real:
            images[image.name] = image
            subject_of_image[image.name] = position
    image_set = ImageSet("real images", "folder", list(images.values()))
    extracted = extract(image_set, extractors, skip_bad=skip_bad, title=image_set.source)
    subject_numbers = []
    mirrored_images = []  # of the readable images, in the order of their features
    for info in extracted.infos:
        subject_numbers.append(subject_of_image[info.name])
        mirrored_images.append(_mirror(images[info.name]))
    for position, subject in enumerate(subjects):
        if position not in subject_numbers:
            raise ValueError(f"subject {subject.name!r} has no readable real image")
    mirrored_set = ImageSet("mirrored", "memory", mirrored_images)
    mirrored = extract(mirrored_set, extractors, title=mirrored_set.source)
    names = [subject.name for subject in subjects]
    feature_sets = {}
    for extractor in extractors:
        layer = extractor.layer_of("unit")
        features = {
            "unit": extracted.features[extractor.name][layer],  # (N, D)
            "mirrored": mirrored.features[extractor.name][layer],  # (N, D)
            "subjects": torch.tensor(subject_numbers),
        }
        feature_sets[extractor.name] = FeatureSet(features, subject_names=names)
    summary = SetSummary(
        role="real",
        source=", ".join(names),
        kind="subjects",
        count=len(extracted.infos),
        fingerprint=fingerprint_of(extracted.infos),
        skipped=extracted.skipped,
    )
    return ScoredSet(summary, feature_sets, extracted.infos, None)


def _mirror(image: LazyImage) -> ArrayImage:
    pixels, _ = image.load()  # (3, H, W)
    flipped = pixels.flip(-1).permute(1, 2, 0)  # (H, W, 3)
    return ArrayImage(image.name, flipped.contiguous().numpy())


def _origins_of(label: str, images: Sequence[SubjectImages], extracted: ExtractedFeatures) -> list[_Origin]:
    """The origin of every readable image, in the order of the features.

    Raises:
        ValueError: no image of a subject can be read.
    """
    origins: dict[str, _Origin] = {}
    for position, generated in enumerate(images):
        for image, prompt, seed in zip(generated.images, generated.numbers, generated.seeds, strict=True):
            origins[image.name] = _Origin(position, prompt, seed)
    readable_origins = []
    subjects_with_images = set()
    for info in extracted.infos:
        origin = origins[info.name]
        readable_origins.append(origin)
        subjects_with_images.add(origin.subject)
    for position, generated in enumerate(images):
        if position not in subjects_with_images:
            raise ValueError(f"{label}: no image of subject {generated.subject.name!r} can be read")
    return readable_origins


def _generated_set(
    label: str,
    subjects: Sequence[Subject],
    origins: Sequence[_Origin],
    extracted: ExtractedFeatures,
    extractors: Sequence[Extractor],
    generation: Mapping[str, object],
) -> ScoredSet:
    """Generated images with the features, prompts and subjects that the protocol's metrics read."""
    # one prompt of one subject is a group: the same words about another subject are another prompt
    groups = group_numbers((origin.subject, origin.prompt) for origin in origins)  # (N,)
    subject_numbers = torch.tensor([origin.subject for origin in origins])  # (N,)
    names = [subject.name for subject in subjects]
    feature_sets = {}
    for extractor in extractors:
        layers = extracted.features[extractor.name]
        features = {"groups": groups, "subjects": subject_numbers}
        if extractor.is_perceptual:
            features["pixels"] = layers[extractor.perceptual_layer]
        else:
            features["unit"] = layers[extractor.layer_of("unit")]  # (N, D)
            if extractor.embed_texts is not None:
                features["texts"] = _text_features(extractor, subjects, origins)  # (N, D)
        feature_sets[extractor.name] = FeatureSet(features, subject_names=names)
    summary = SetSummary(
        role="generated",
        source=label,
        kind="drawn" if generation else "folder",  # "drawn" is the word of the record's format
        count=len(extracted.infos),
        fingerprint=fingerprint_of(extracted.infos),
        skipped=extracted.skipped,
        made=dict(generation),
    )
    return ScoredSet(summary, feature_sets, extracted.infos, None)


def _text_features(extractor: Extractor, subjects: Sequence[Subject], origins: Sequence[_Origin]) -> Tensor:
    """The embedding of each image's prompt without the unique token, (N, D)."""
    embeddings = []  # (prompts, D) of each subject
    for subject in subjects:
        embeddings.append(extractor.embed_texts(subject.texts()))
    rows = []
    for origin in origins:
        rows.append(embeddings[origin.subject][origin.prompt])
    return torch.stack(rows).cpu()


# Scores


def _score(
    label: str,
    generated: ScoredSet,
    real: ScoredSet,
    subjects: Sequence[Subject],
    extractors: Sequence[Extractor],
    seed: int,
    results: _Results,
) -> None:
    """Adds the scores of one set, and why some cannot be computed."""
    first = _similarity_extractors(extractors)[0]
    for extractor in extractors:
        for key in _metrics_of(extractor, with_copies=extractor is first):
            try:
                scores = score_metric(label, METRICS[key], generated, real, extractor, Plan(seed=seed))
            except ValueError as error:
                results.refused[f"{label}: {key}"] = str(error)
            else:
                for score in scores:
                    results.scores.append(_as_protocol_score(score, real, subjects))


def _metrics_of(extractor: Extractor, *, with_copies: bool) -> list[str]:
    """The protocol's metrics of one extractor; copies are looked for with the first one only."""
    if extractor.is_perceptual:
        return ["lpips_diversity"]
    keys = [FIDELITY[kind_of(extractor)]]
    if extractor.embed_texts is not None:
        keys.append("clip_t")
    if with_copies:
        keys.append("copy_rate")
    return keys


def _as_protocol_score(score: Score, real: ScoredSet, subjects: Sequence[Subject]) -> Score:
    """A score with the protocol's identity, which names prompts and real images for every metric."""
    prompts = {subject.name: subject.texts() for subject in subjects}
    # two evaluations compare only if they asked for the same prompts of the same subjects
    digest = hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()
    identity = {
        **score.identity,
        "reference": real.summary.fingerprint,
        "options": {"protocol": "dreambooth", "prompts": digest},
        "n_real": real.summary.count,
    }
    del identity["score"]  # every metric of the protocol has one score
    notes = score.notes
    if len(subjects) < FEW_SUBJECTS:
        notes = (f"few subjects ({len(subjects)}): the interval says little about others", *notes)
    n = {"generated": score.n["generated"], "real": real.summary.count}
    return replace(score, n=n, identity=identity, notes=notes)


def _image_rows(
    label: str,
    generated: ScoredSet,
    real: ScoredSet,
    subjects: Sequence[Subject],
    origins: Sequence[_Origin],
    extractors: Sequence[Extractor],
    token: str,
) -> list[ImageRow]:
    """Values of each image, its nearest real image, prompt and seed."""
    columns: dict[str, Tensor] = {}  # name -> (N,)
    nearest_names: list[str] = []
    for extractor in _similarity_extractors(extractors):
        features = generated.feature_sets[extractor.name]
        reference = real.feature_sets[extractor.name]
        for key in _metrics_of(extractor, with_copies=False):
            columns[key] = METRICS[key].per_image(MetricCall(features, reference, METRICS[key].options))
        if not nearest_names:  # of the first extractor alone, which also judges copies
            columns["nearest_similarity"], nearest_names = _nearest_real_images(features, reference, real)
    values = values_by_image(columns, len(generated.infos))
    prompts = [subject.prompts(token) for subject in subjects]
    rows = []
    for number, (info, origin) in enumerate(zip(generated.infos, origins, strict=True)):
        row = ImageRow(
            generated=label,
            name=info.name,
            values=values[number],
            nearest=nearest_names[number],
            prompt=prompts[origin.subject][origin.prompt],
            seed=origin.seed,
        )
        rows.append(row)
    return rows


def _nearest_real_images(
    features: FeatureSet, reference: FeatureSet, real: ScoredSet
) -> tuple[Tensor, list[str]]:
    """Cosine (N,) and name of the nearest real image of each image's subject, mirrored or not."""
    similarities = torch.empty(features.n, dtype=torch.float64)
    names = [""] * features.n
    reference_rows = reference.rows_by_subject()
    for subject, rows in features.rows_by_subject().items():
        nearest = nearest_images(
            training=reference["unit"][reference_rows[subject]],
            generated=features["unit"][rows],
            mirrored=reference["mirrored"][reference_rows[subject]],
        )
        similarities[rows] = nearest.similarity
        real_rows = reference_rows[subject][nearest.index]
        for row, real_row in zip(rows.tolist(), real_rows.tolist(), strict=True):
            names[row] = real.infos[real_row].name
    return similarities, names


def _image_loader(sets: SubjectSets) -> Callable[[str, str], Image.Image]:
    """(label of a set, image name) -> the image, of all generated and real images."""
    images: dict[tuple[str, str], LazyImage] = {}
    for label, (images_by_subject, _) in sets.items():
        for generated in images_by_subject:
            for image in generated.images:
                images[label, image.name] = image
            for image in generated.subject.real:
                images[REFERENCE, image.name] = image

    def load_image(label: str, name: str) -> Image.Image:
        return to_pil_image(images[label, name])

    return load_image
