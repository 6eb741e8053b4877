"""From names of image sets to the record of their scores: one reference, any number of generated sets."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

from diffadapt.common.runtime import make_accelerator, silence_libraries
from diffadapt.evaluation import protocols
from diffadapt.evaluation.features.cache import FeatureCache, identity_of
from diffadapt.evaluation.features.extraction import extract
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.features.feature_file import (
    SetFeatures,
    file_name,
    read_features,
    write_features,
)
from diffadapt.evaluation.features.preference import Preference, score_preference, with_preference
from diffadapt.evaluation.features.prompt_lengths import long_prompts_warning
from diffadapt.evaluation.record import EvaluationRecord, ImageRow, Score
from diffadapt.evaluation.run_facts import run_facts, versions
from diffadapt.evaluation.scored_set import (
    ScoredSet,
    has_statistics,
    holds_features,
    scored_set_from_file,
    scored_set_from_images,
    with_statistics,
)
from diffadapt.evaluation.scoring import Plan, image_rows, plan_for, score_set
from diffadapt.evaluation.sets import overlap, set_warnings
from diffadapt.evaluation.sets.image_sets import ImageSet, open_set
from diffadapt.evaluation.sets.sizes import check_sizes

REFERENCE = "reference"  # label of the real set
PATIENCE = timedelta(days=1)  # of the processes that wait while the first one scores; NCCL's is ten minutes


@dataclass(frozen=True)
class ReadOptions:
    """How images are read.

    Attributes:
        skip_bad: leave unreadable images out and list them, instead of stopping.
        cache: folder of the reference's features; None keeps none.
        save_features: folder for the features of all sets; None writes none.
        record_folder: where the record will stand, which names that folder.
        allow_overlap: score a set all of whose images stand in the reference.
        download: whether named data sets may be fetched.
        follow_links: follow links out of the sets' folders too.
    """

    batch_size: int = 32
    skip_bad: bool = False
    cache: Path | None = None
    save_features: Path | None = None
    record_folder: Path = Path()
    allow_overlap: bool = False
    download: bool = False
    follow_links: bool = False


@dataclass(frozen=True)
class EvaluationOutput:
    """What an evaluation gave.

    Attributes:
        load_image: (label of a set, name) -> the image, of the images that the record names.
        failures: what should have been computed and was not, "what: why".
    """

    record: EvaluationRecord
    load_image: Callable[[str, str], Image.Image]
    failures: tuple[str, ...] = ()


@dataclass
class _Result:
    scores: list[Score] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    rows: list[ImageRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    scored_sets: dict[str, ScoredSet] = field(default_factory=dict)


def evaluate_sets(
    generated: Mapping[str, str | ImageSet],
    reference: str | ImageSet | None,
    extractors: Sequence[Extractor],
    plan: Plan,
    *,
    read_options: ReadOptions,
    protocol: str | None = None,
    settings: Mapping[str, object] | None = None,
    train: str | ImageSet | None = None,
    preference: Preference | None = None,
) -> EvaluationOutput | None:
    """Scores every generated set against one reference. None on all but the main process.

    Args:
        generated: label -> a set, or its name as `open_set` takes it, or a file of features.
        settings: kept in the record: the command, whether it is a demo, ...
        train: the images that the generators were trained on.
        preference: gives a number for each image and prompt.

    A set that cannot be read or scored, and a metric that cannot be computed, cost themselves alone; they
    stand in `EvaluationOutput.failures`.

    Raises: what `open_set`, `check_sizes` and the reading of the reference raise; with a single generated
        set, what its reading raises.
    """
    start, result = time.perf_counter(), _Result()
    opened = {label: open_generated(source, read_options) for label, source in generated.items()}
    opened_reference = None if reference is None else open_reference(reference, read_options)
    check_counts(plan, extractors, opened, opened_reference)
    real = None
    for label, source in {**opened, REFERENCE: opened_reference}.items():
        if isinstance(source, ImageSet):
            result.warnings += set_warnings.excluded_images_warning(label, source)
    if opened_reference is not None:
        cache = FeatureCache(read_options.cache)
        real = _material(REFERENCE, opened_reference, extractors, read_options, role="real", cache=cache)
        if real is not None:
            result.scored_sets[REFERENCE] = real
            result.warnings += _remarks(REFERENCE, real)
    training = None
    if train is not None:
        cache = FeatureCache(read_options.cache)
        images = open_reference(train, read_options)
        training = _material("training images", images, extractors, read_options, role="real", cache=cache)
    for label, source in opened.items():
        try:
            own = _material(label, source, extractors, read_options, role="generated", cache=None)
            if own is not None:
                _score(label, own, real, training, extractors, plan, read_options, protocol, result)
                if preference is not None:
                    _add_preference(label, own, preference, plan, result)
                result.scored_sets[label] = replace(own, feature_sets={})  # features are needed no more
        except (ValueError, OSError, FloatingPointError) as error:
            if len(opened) == 1:
                raise
            result.failed[label] = str(error)
    if all(label in result.failed for label in opened):
        raise ValueError("no set could be scored:\n" + "\n".join(_failures(result)))
    if not PartialState().is_main_process:
        return None
    if training is not None:
        settings = {**(settings or {}), "train": _in_words(training)}
    facts = {
        **(settings or {}),
        "protocol": protocol,
        "batch_size": read_options.batch_size,
        **run_facts(start),
    }
    used = [*extractors, *([preference.extractor] if preference is not None else [])]
    record = _record(result, used, plan, facts)
    return EvaluationOutput(
        record, lambda label, name: result.scored_sets[label].load_image(name), _failures(result)
    )


def open_reference(source: str | ImageSet | Path, read_options: ReadOptions) -> ImageSet | Path:
    """The images a name stands for; the path of a file of features or statistics."""
    if not isinstance(source, str):
        return source
    if holds_features(source):
        return Path(source)
    return open_set(source, download=read_options.download, follow_links=read_options.follow_links)


def open_generated(source: str | ImageSet | Path, read_options: ReadOptions) -> ImageSet | Path:
    """The same for a set to score, of which the images or their features are needed.

    Raises: ValueError for a file that holds statistics alone.
    """
    if isinstance(source, str) and Path(source).suffix == ".npz" and holds_features(source):
        raise ValueError(
            f"{source!r} holds statistics of images, which serve as a --reference alone; give the images"
        )
    return open_reference(source, read_options)


def check_places(
    generated: Mapping[str, ImageSet | Path], reference: ImageSet | Path | None, read_options: ReadOptions
) -> None:
    """Raises: ValueError for a set that is its own reference, unless `read_options.allow_overlap`."""
    if reference is None or read_options.allow_overlap:
        return
    for label, source in generated.items():
        if _place_of(source) == _place_of(reference):
            raise ValueError(
                f"{label!r} is scored against itself: the same folder twice? Name two different sets, or "
                "give --allow_overlap"
            )


def _place_of(source: ImageSet | Path) -> Path:
    return Path(source.source if isinstance(source, ImageSet) else source).resolve()


def check_counts(
    plan: Plan,
    extractors: Sequence[Extractor],
    generated: Mapping[str, ImageSet | Path],
    reference: ImageSet | Path | None,
) -> None:
    """`check_sizes` with the numbers of images of sets that are not read yet."""
    counts = {label: _count_of(source) for label, source in generated.items()}
    check_sizes(plan, extractors, counts, None if reference is None else _count_of(reference))


def _count_of(source: ImageSet | Path) -> int | None:
    """None where only statistics of the images are at hand."""
    if isinstance(source, ImageSet):
        return len(source)
    return None if source.suffix == ".npz" else len(read_features(source).infos)


def _failures(result: _Result) -> tuple[str, ...]:
    """What is missing, set by set; a set without any score is one, whatever was refused by the rules."""
    lines = [f"{what}: {why}" for what, why in result.failed.items()]
    scored = {score.generated for score in result.scores}
    empty = [label for label in result.scored_sets if label != REFERENCE and label not in scored]
    return (*lines, *(f"{label}: no score could be computed" for label in empty))


def _in_words(scored_set: ScoredSet) -> dict[str, object]:
    """Source, number and fingerprint of a set."""
    summary = scored_set.summary
    return {"source": summary.source, "count": summary.count, "fingerprint": summary.fingerprint}


def _add_preference(label: str, own: ScoredSet, preference: Preference, plan: Plan, result: _Result) -> None:
    scored, numbers = score_preference(label, own, preference, plan)
    result.scores += scored.scores
    result.failed |= scored.failed
    others = [row for row in result.rows if row.generated != label]
    rows = [row for row in result.rows if row.generated == label]
    result.rows[:] = [*others, *with_preference(rows, own, label, numbers)]


def _record(
    result: _Result, extractors: Sequence[Extractor], plan: Plan, settings: Mapping[str, object]
) -> EvaluationRecord:
    return EvaluationRecord(
        scores=tuple(result.scores),
        sets={label: scored_set.summary for label, scored_set in result.scored_sets.items()},
        extractors=tuple(extractor.summary for extractor in extractors),
        seeds={"metrics": plan.seed},
        versions=versions(),
        warnings=tuple(result.warnings),
        images=tuple(result.rows),
        refused={**result.refused, **result.failed},
        settings=settings,
    )


def _material(
    label: str,
    source: ImageSet | Path,
    extractors: Sequence[Extractor],
    read_options: ReadOptions,
    *,
    role: str,
    cache: FeatureCache | None,
) -> ScoredSet | None:
    """A set's features and facts. None on all but the main process, which scores."""
    if isinstance(source, Path):
        return scored_set_from_file(source, extractors, role=role) if PartialState().is_main_process else None
    images = source
    made = extract(
        images,
        extractors,
        batch_size=read_options.batch_size,
        skip_bad=read_options.skip_bad,
        cache=cache,
        title=label,
    )
    if not PartialState().is_main_process:
        return None
    scored_set = scored_set_from_images(images, made, extractors, role=role)
    if role == "real" and has_statistics(images.source):
        scored_set = with_statistics(scored_set, Path(images.source))
    if read_options.save_features is None:
        return scored_set
    for extractor in (e for e in extractors if e.perceptual_layer is None):
        content = SetFeatures(identity_of(extractor), made.features[extractor.name], made.infos)
        write_features(read_options.save_features / label / file_name(extractor.name), content)
    folder = os.path.relpath(read_options.save_features / label, read_options.record_folder)
    return replace(scored_set, summary=replace(scored_set.summary, features=folder))


def _score(
    label: str,
    own: ScoredSet,
    real: ScoredSet | None,
    training: ScoredSet | None,
    extractors: Sequence[Extractor],
    plan: Plan,
    read_options: ReadOptions,
    protocol: str | None,
    result: _Result,
) -> None:
    result.warnings += _remarks(label, own)
    result.warnings += overlap.check_repeats(own.infos, label=label)
    if real is not None and own.infos and real.infos:
        found = overlap.check_sets(
            own.infos, real.infos, label=label, allow_overlap=read_options.allow_overlap
        )
        result.warnings += found
    if protocol is not None:
        counts = {"n_generated": own.summary.count, "n_real": real.summary.count if real else 0}
        result.warnings += protocols.shortfall(protocols.protocol(protocol), protocol, **counts)
    for extractor in extractors:
        features = own.feature_sets.get(extractor.name)
        if features is not None and "texts" in features.roles:
            result.warnings += long_prompts_warning(label, own.prompts, extractor)
        its_plan = plan_for(extractor, extractors, plan)
        if its_plan is None:
            continue
        scored = score_set(label, own, real, extractor, its_plan, training)
        result.scores += scored.scores
        result.refused |= scored.refused
        result.failed |= scored.failed
    showing = next((e for e in extractors if e.feature_layer is not None), None)
    if showing is not None and own.load_image is not None:
        try:
            result.rows += image_rows(label, own, real, showing)
        except (ValueError, RuntimeError) as error:  # the scores stay
            result.failed[f"{label}: figures of each image"] = str(error)


def _remarks(label: str, scored_set: ScoredSet) -> list[str]:
    return [
        *set_warnings.odd_sizes_warning(label, scored_set.infos),
        *set_warnings.conversions_warning(label, scored_set.infos),
    ]


def setup_evaluation(num_threads: int | None) -> torch.device:
    """The surroundings of an evaluation: all processes, quiet libraries, the same numbers in every run.

    Returns this process's device.
    """
    silence_libraries()
    warnings.filterwarnings("ignore", module="torch|transformers|diffusers")
    torch.backends.cudnn.deterministic = True  # else cuDNN chooses kernels by their speed
    torch.backends.cudnn.benchmark = False
    return make_accelerator(mixed_precision="no", num_threads=num_threads, timeout=PATIENCE).device
