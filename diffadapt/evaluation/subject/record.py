"""The record of DreamBooth's protocol: the same file, page and comparison as of any other evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from accelerate import PartialState
from PIL import Image

from diffadapt.common.atomic_files import write_utf8
from diffadapt.evaluation.evaluate_sets import REFERENCE
from diffadapt.evaluation.features.extraction import extract
from diffadapt.evaluation.features.extractors import Extractor
from diffadapt.evaluation.features.prompt_lengths import long_prompts_warning
from diffadapt.evaluation.output_files import OutputFiles
from diffadapt.evaluation.record import EvaluationRecord, SetSummary
from diffadapt.evaluation.report.page import write_page
from diffadapt.evaluation.report.tables import per_image_csv, report
from diffadapt.evaluation.run_facts import run_facts, versions
from diffadapt.evaluation.sets.image_sets import fingerprint
from diffadapt.evaluation.subject.generate import Sets
from diffadapt.evaluation.subject.layout import RealImages, real_images
from diffadapt.evaluation.subject.scores import check_extractors, score_subjects
from diffadapt.evaluation.subject.subjects import Subject, SubjectImages, joined, readable


def evaluate_subjects(
    sets: Sets,
    extractors: Sequence[Extractor],
    *,
    token: str,
    seed: int,
    settings: Mapping[str, object] | None = None,
    skip_bad: bool = False,
) -> EvaluationRecord | None:
    """Scores of every set of images, all of the same subjects. None on all but the main process.

    Args:
        sets: label -> the images of every subject, and how they were made.
        token: the unique word of the prompts.
        seed: of the bootstrap.
        skip_bad: leave unreadable images out, instead of raising; the record names them.
    """
    check_extractors(extractors)
    start = time.perf_counter()
    subjects = [own.subject for own in next(iter(sets.values()))[0]]
    real = real_images(subjects, [e for e in extractors if e.perceptual_layer is None], skip_bad=skip_bad)
    scores, rows, refused = [], [], {}
    texts = [text for subject in subjects for text in subject.texts()]
    warnings = [line for e in extractors for line in long_prompts_warning("prompts", texts, e)]
    read: Sets = {}
    skipped = {REFERENCE: real.made.skipped}
    for label, (images, origin) in sets.items():
        together = joined(images, source=label, kind="memory")
        made = extract(together, extractors, skip_bad=skip_bad, title=label)
        names = {facts.name for facts in made.infos}
        images = [readable(own, names) for own in images]
        for own in images:
            if not own.images:
                raise ValueError(f"{label}: no image of subject {own.subject.name!r} can be read")
        read[label] = (images, origin)
        skipped[label] = made.skipped
        if not PartialState().is_main_process:
            continue
        own = score_subjects(label, images, made, real, extractors, token=token, seed=seed)
        scores, rows, refused = scores + own[0], rows + own[1], refused | own[2]
    if not PartialState().is_main_process:
        return None
    return EvaluationRecord(
        tuple(scores),
        _summaries(read, subjects, real, skipped),
        tuple(extractor.summary for extractor in extractors),
        seeds={"metrics": seed},
        versions=versions(),
        warnings=tuple(warnings),
        images=tuple(rows),
        refused=refused,
        settings={**(settings or {}), **run_facts(start)},
    )


def write_record(record: EvaluationRecord, sets: Sets, places: OutputFiles) -> list[str]:
    """The scores, their table, the rows of images, then the page. Returns what could not be made."""
    everything = [(label, own) for label, (images, _) in sets.items() for own in images]
    pictures = {(label, picture.name): picture for label, own in everything for picture in own.images}
    pictures |= {(REFERENCE, picture.name): picture for _, own in everything for picture in own.subject.real}

    def picture(label: str, name: str) -> Image.Image:
        return Image.fromarray(pictures[label, name].load()[0].permute(1, 2, 0).numpy())

    record.write(places.json)
    write_utf8(places.markdown, report(record))
    write_utf8(places.csv, per_image_csv(record))
    return write_page(record, places.page, picture)


def _summaries(
    sets: Sets, subjects: Sequence[Subject], real: RealImages, skipped: Mapping[str, tuple[str, ...]]
) -> dict[str, SetSummary]:
    names = ", ".join(subject.name for subject in subjects)
    found = {label: _summary(label, images, made, skipped[label]) for label, (images, made) in sets.items()}
    count = len(real.made.infos)
    reference = SetSummary("real", names, "subjects", count, real.fingerprint, skipped=skipped[REFERENCE])
    return {**found, REFERENCE: reference}


def _summary(
    label: str, images: Sequence[SubjectImages], made: Mapping[str, object], skipped: tuple[str, ...]
) -> SetSummary:
    pictures = [picture for own in images for picture in own.images]
    kind = "drawn" if made else "folder"
    digests = fingerprint(picture.digest() for picture in pictures)
    return SetSummary("generated", label, kind, len(pictures), digests, skipped=skipped, made=dict(made))
