"""The record of DreamBooth's protocol: the same file, page and comparison as of any other evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import PartialState
from PIL import Image

from diffadapt.evaluation.extraction import extract
from diffadapt.evaluation.extractors import Extractor
from diffadapt.evaluation.image_sets import fingerprint
from diffadapt.evaluation.page import write_page
from diffadapt.evaluation.provenance import run_facts, versions
from diffadapt.evaluation.record import EvaluationRecord, SetSummary
from diffadapt.evaluation.run import REFERENCE
from diffadapt.evaluation.subject_drawing import Sets
from diffadapt.evaluation.subject_layout import RealImages, real_images
from diffadapt.evaluation.subject_scores import check_extractors, score_subjects
from diffadapt.evaluation.subjects import Subject, SubjectImages, joined
from diffadapt.evaluation.tables import markdown, per_image_csv
from diffadapt.files import write_atomically


def evaluate_subjects(
    sets: Sets,
    extractors: Sequence[Extractor],
    *,
    token: str,
    seed: int,
    settings: Mapping[str, object] | None = None,
) -> EvaluationRecord | None:
    """Scores of every set of images, all of the same subjects. None on all but the main process.

    Args:
        sets: label -> the images of every subject, and how they were made.
        token: the unique word of the prompts.
        seed: of the bootstrap.
    """
    check_extractors(extractors)
    start = time.perf_counter()
    subjects = [own.subject for own in next(iter(sets.values()))[0]]
    real = real_images(subjects, [e for e in extractors if e.perceptual is None])
    scores, rows, refused = [], [], {}
    for label, (images, _) in sets.items():
        made = extract(joined(images, source=label, kind="memory"), extractors, title=label)
        if not PartialState().is_main_process:
            continue
        own = score_subjects(label, images, made, real, extractors, token=token, seed=seed)
        scores, rows, refused = scores + own[0], rows + own[1], refused | own[2]
    if not PartialState().is_main_process:
        return None
    return EvaluationRecord(
        tuple(scores),
        _summaries(sets, subjects, real),
        tuple(extractor.summary for extractor in extractors),
        seeds={"metrics": seed},
        versions=versions(),
        images=tuple(rows),
        refused=refused,
        settings={**(settings or {}), **run_facts(start)},
    )


def write_record(record: EvaluationRecord, sets: Sets, folder: Path) -> None:
    """subject.json, subject.md, subject.csv and subject.html, the page with the images of the sets."""
    everything = [(label, own) for label, (images, _) in sets.items() for own in images]
    pictures = {(label, picture.name): picture for label, own in everything for picture in own.pictures}
    pictures |= {(REFERENCE, picture.name): picture for _, own in everything for picture in own.subject.real}

    def picture(label: str, name: str) -> Image.Image:
        return Image.fromarray(pictures[label, name].load()[0].permute(1, 2, 0).numpy())

    record.write(folder / "subject.json")
    for ending, text in (("md", markdown(record)), ("csv", per_image_csv(record))):
        write_atomically(
            folder / f"subject.{ending}", lambda path, text=text: path.write_text(text, encoding="utf-8")
        )
    write_page(record, folder / "subject.html", picture)


def _summaries(sets: Sets, subjects: Sequence[Subject], real: RealImages) -> dict[str, SetSummary]:
    names = ", ".join(subject.name for subject in subjects)
    found = {label: _summary(label, images, made) for label, (images, made) in sets.items()}
    count = len(real.made.facts)
    return {**found, REFERENCE: SetSummary("real", names, "subjects", count, real.fingerprint)}


def _summary(label: str, images: Sequence[SubjectImages], made: Mapping[str, object]) -> SetSummary:
    pictures = [picture for own in images for picture in own.pictures]
    kind = "drawn" if made else "folder"
    digests = fingerprint(picture.digest() for picture in pictures)
    return SetSummary("generated", label, kind, len(pictures), digests, made=dict(made))
