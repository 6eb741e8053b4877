"""Scores any number of generated image sets against one reference, and records the result."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
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
from diffadapt.evaluation.output_files import EvaluationOutput
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
TIMEOUT = timedelta(days=1)  # of processes that wait while the first one scores; NCCL's is ten minutes


@dataclass(frozen=True)
class ReadOptions:
    """How images are read, and where their features are kept.

    Attributes:
        batch_size: images per forward of an extractor.
        skip_bad: leave unreadable images out and list them, instead of stopping.
        cache: folder of the reference's features; None keeps none.
        save_features: folder for the features of all sets; None writes none.
        record_folder: folder of the record, from which it names `save_features`.
        allow_overlap: score a set even if all of its images are in the reference.
        download: download named data sets that are missing.
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


def evaluate_sets(
    generated: Mapping[str, str | ImageSet | Path],
    reference: str | ImageSet | Path | None,
    extractors: Sequence[Extractor],
    plan: Plan,
    *,
    read_options: ReadOptions,
    protocol: str | None = None,
    settings: Mapping[str, object] | None = None,
    train: str | ImageSet | None = None,
    preference: Preference | None = None,
) -> EvaluationOutput | None:
    """Scores every generated set against one reference.

    A set that cannot be read or scored, and a metric that cannot be computed, cost themselves alone; they
    are listed in `EvaluationOutput.failures`.

    Args:
        generated: label -> a set, or its name as `open_set` takes it, or a file of features.
        reference: the real images, or their features or statistics.
        extractors: networks, each of which sees every image once.
        plan: the metrics.
        read_options: how images are read.
        protocol: name in `protocols.PROTOCOLS`, whose numbers of images are compared with the sets'.
        settings: kept in the record: the command, whether it is a demo, ...
        train: the images that the generators were trained on.
        preference: a model that gives a number for each image and prompt.

    Returns:
        The record and its images; None on all but the main process.

    Raises:
        ValueError, OSError: as `open_set` and `check_sizes`; or the reference cannot be read; or a single
            generated set cannot be read, or none of several.
        FloatingPointError: an extractor gave NaN or infinity for the reference or for a single set.
    """
    start = time.perf_counter()
    sources = {}
    for label, source in generated.items():
        sources[label] = open_generated(source, read_options)
    reference_source = None if reference is None else open_reference(reference, read_options)
    check_counts(plan, extractors, sources, reference_source)
    evaluator = _SetEvaluator(extractors, plan, read_options, protocol, preference)
    for label, source in {**sources, REFERENCE: reference_source}.items():
        if isinstance(source, ImageSet):  # no file of features, and no missing reference
            evaluator.warnings += set_warnings.excluded_images_warning(label, source)
    if reference_source is not None:
        evaluator.real = evaluator.read(REFERENCE, reference_source, role="real")
        if evaluator.real is not None:
            evaluator.scored_sets[REFERENCE] = evaluator.real
            evaluator.warn_of_images(REFERENCE, evaluator.real)
    if train is not None:
        train_source = open_reference(train, read_options)
        evaluator.train = evaluator.read("training images", train_source, role="real")
    for label, source in sources.items():
        try:
            scored_set = evaluator.read(label, source, role="generated")
            if scored_set is not None:
                evaluator.score(label, scored_set)
        except (ValueError, OSError, FloatingPointError) as error:
            if len(sources) == 1:  # nothing else is lost
                raise
            evaluator.failed[label] = str(error)
    if all(label in evaluator.failed for label in sources):
        raise ValueError("no set could be scored:\n" + "\n".join(evaluator.failures()))
    if not PartialState().is_main_process:
        return None
    return evaluator.output({**(settings or {})}, start)


@dataclass
class _SetEvaluator:
    """One evaluation: what all sets share, and the results so far.

    Attributes:
        real: the reference.
        train: the images that the generators were trained on.
        refused: "set: metric" -> why the rules do not allow it.
        failed: "set" or "set: metric" -> why it could not be computed.
        scored_sets: every set that was read, by label.
    """

    extractors: Sequence[Extractor]
    plan: Plan
    read_options: ReadOptions
    protocol: str | None
    preference: Preference | None
    real: ScoredSet | None = None
    train: ScoredSet | None = None
    scores: list[Score] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    rows: list[ImageRow] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    scored_sets: dict[str, ScoredSet] = field(default_factory=dict)

    def read(self, label: str, source: ImageSet | Path, *, role: str) -> ScoredSet | None:
        """The features of a set. None on all but the main process, which scores.

        Args:
            role: "real", whose features are cached, or "generated".
        """
        options = self.read_options
        is_main = PartialState().is_main_process
        if isinstance(source, Path):
            return scored_set_from_file(source, self.extractors, role=role) if is_main else None
        extracted = extract(
            source,
            self.extractors,
            batch_size=options.batch_size,
            skip_bad=options.skip_bad,
            cache=FeatureCache(options.cache) if role == "real" else None,
            title=label,
        )
        if not is_main:
            return None
        scored_set = scored_set_from_images(source, extracted, self.extractors, role=role)
        if role == "real" and has_statistics(source.source):
            scored_set = with_statistics(scored_set, Path(source.source))
        if options.save_features is None:
            return scored_set
        folder = options.save_features / label
        # LPIPS' coordinates depend on the other images of a prompt, so they are of no use elsewhere
        for extractor in self.extractors:
            if not extractor.is_perceptual:
                layers = extracted.features[extractor.name]
                content = SetFeatures(identity_of(extractor), layers, extracted.infos)
                write_features(folder / file_name(extractor.name), content)
        relative_folder = os.path.relpath(folder, options.record_folder)
        return replace(scored_set, summary=replace(scored_set.summary, features=relative_folder))

    def score(self, label: str, scored_set: ScoredSet) -> None:
        """Adds the scores of a set, the values of its images, and warnings about it."""
        self.warn_of_images(label, scored_set)
        self._warn_of_overlap(label, scored_set)
        self._warn_of_protocol(scored_set)
        for extractor in self.extractors:
            features = scored_set.feature_sets.get(extractor.name)
            if features is not None and "texts" in features.roles:
                self.warnings += long_prompts_warning(label, scored_set.prompts, extractor)
            plan = plan_for(extractor, self.extractors, self.plan)
            if plan is not None:  # this extractor has something to compute
                result = score_set(label, scored_set, self.real, extractor, plan, self.train)
                self.scores += result.scores
                self.refused |= result.refused
                self.failed |= result.failed
        self._add_image_rows(label, scored_set)
        if self.preference is not None:
            self._add_preference(label, scored_set)
        self.scored_sets[label] = replace(scored_set, feature_sets={})  # features are needed no more

    def warn_of_images(self, label: str, scored_set: ScoredSet) -> None:
        self.warnings += set_warnings.odd_sizes_warning(label, scored_set.infos)
        self.warnings += set_warnings.conversions_warning(label, scored_set.infos)

    def failures(self) -> tuple[str, ...]:
        """What failed, and every set without a score, whatever was refused by the rules."""
        lines = [f"{name}: {reason}" for name, reason in self.failed.items()]
        labels_with_scores = {score.generated for score in self.scores}
        for label in self.scored_sets:
            if label != REFERENCE and label not in labels_with_scores:
                lines.append(f"{label}: no score could be computed")
        return tuple(lines)

    def output(self, settings: Mapping[str, object], start: float) -> EvaluationOutput:
        """The record of all scores.

        Args:
            start: `time.perf_counter()` at the beginning.
        """
        settings = dict(settings)
        if self.train is not None:
            summary = self.train.summary
            settings["train"] = {
                "source": summary.source,
                "count": summary.count,
                "fingerprint": summary.fingerprint,
            }
        settings["protocol"] = self.protocol
        settings["batch_size"] = self.read_options.batch_size
        extractors = [extractor.summary for extractor in self.extractors]
        if self.preference is not None:
            extractors.append(self.preference.extractor.summary)
        record = EvaluationRecord(
            scores=tuple(self.scores),
            sets={label: scored_set.summary for label, scored_set in self.scored_sets.items()},
            extractors=tuple(extractors),
            seeds={"metrics": self.plan.seed},
            versions=versions(),
            warnings=tuple(self.warnings),
            images=tuple(self.rows),
            refused={**self.refused, **self.failed},
            settings={**settings, **run_facts(start)},
        )

        def load_image(label: str, name: str) -> Image.Image:
            return self.scored_sets[label].load_image(name)

        return EvaluationOutput(record, load_image, self.failures())

    def _warn_of_overlap(self, label: str, scored_set: ScoredSet) -> None:
        self.warnings += overlap.check_repeats(scored_set.infos, label=label)
        if self.real is not None and scored_set.infos and self.real.infos:
            self.warnings += overlap.check_sets(
                scored_set.infos,
                self.real.infos,
                label=label,
                allow_overlap=self.read_options.allow_overlap,
            )

    def _warn_of_protocol(self, scored_set: ScoredSet) -> None:
        if self.protocol is not None:
            self.warnings += protocols.shortfall(
                self.protocol,
                n_generated=scored_set.summary.count,
                n_real=0 if self.real is None else self.real.summary.count,
            )

    def _add_image_rows(self, label: str, scored_set: ScoredSet) -> None:
        """Adds the values of each image, with the first extractor that has features."""
        # realism and the nearest image are of one space; more columns would not say more
        with_features = [e for e in self.extractors if e.feature_layer is not None]
        if not with_features or scored_set.load_image is None:
            return
        try:
            self.rows += image_rows(label, scored_set, self.real, with_features[0])
        except (ValueError, RuntimeError) as error:  # the scores stay
            self.failed[f"{label}: figures of each image"] = str(error)

    def _add_preference(self, label: str, scored_set: ScoredSet) -> None:
        """Adds the score of the model of preference, and its number to the row of each image."""
        result, numbers = score_preference(label, scored_set, self.preference, self.plan)
        self.scores += result.scores
        self.failed |= result.failed
        rows = []
        other_rows = []
        for row in self.rows:
            if row.generated == label:
                rows.append(row)
            else:
                other_rows.append(row)
        self.rows = [*other_rows, *with_preference(rows, scored_set, label, numbers)]


def open_reference(source: str | ImageSet | Path, read_options: ReadOptions) -> ImageSet | Path:
    """The images that a name stands for; the path of a file of features or statistics."""
    if not isinstance(source, str):
        return source
    if holds_features(source):
        return Path(source)
    return open_set(source, download=read_options.download, follow_links=read_options.follow_links)


def open_generated(source: str | ImageSet | Path, read_options: ReadOptions) -> ImageSet | Path:
    """`open_reference` for a set to score, of which the images or their features are needed.

    Raises:
        ValueError: the file holds statistics alone.
    """
    if isinstance(source, str) and Path(source).suffix == ".npz" and holds_features(source):
        raise ValueError(
            f"{source!r} holds statistics of images, which serve as a --reference alone; give the images"
        )
    return open_reference(source, read_options)


def check_not_own_reference(
    generated: Mapping[str, ImageSet | Path], reference: ImageSet | Path | None, read_options: ReadOptions
) -> None:
    """Checks that no set is compared with itself.

    Raises:
        ValueError: a set is its own reference, unless `read_options.allow_overlap`.
    """
    if reference is None or read_options.allow_overlap:
        return
    for label, source in generated.items():
        if _path_of(source) == _path_of(reference):
            raise ValueError(
                f"{label!r} is scored against itself: the same folder twice? Name two different sets, or "
                "give --allow_overlap"
            )


def _path_of(source: ImageSet | Path) -> Path:
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
    """Number of images; None where only their statistics are at hand."""
    if isinstance(source, ImageSet):
        return len(source)
    if source.suffix == ".npz":  # statistics, which do not say
        return None
    return len(read_features(source).infos)


def setup_evaluation(num_threads: int | None) -> torch.device:
    """Prepares this process for an evaluation, and returns its device.

    Starts all processes, silences the loading bars and warnings of torch, transformers and diffusers, and
    makes cuDNN deterministic: for scripts, which own their process (docs/evaluation.md says so).
    """
    silence_libraries()
    warnings.filterwarnings("ignore", module="torch|transformers|diffusers")
    torch.backends.cudnn.deterministic = True  # else cuDNN chooses kernels by their speed
    torch.backends.cudnn.benchmark = False
    return make_accelerator(mixed_precision="no", num_threads=num_threads, timeout=TIMEOUT).device
