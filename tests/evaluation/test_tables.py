"""Scores as Markdown, images as CSV."""

import csv
import io
from dataclasses import replace

from helpers.example_records import record

from diffadapt.evaluation.report.tables import WIDTH, markdown, number, per_image_csv, report
from diffadapt.metrics.registry import METRICS


def test_markdown_has_a_row_per_score_and_says_what_was_refused_under_the_stamp():
    text = markdown(record())
    assert text.startswith("**DEMO**")
    rows = [line for line in text.splitlines() if line.startswith("| kernel_distance")]
    assert len(rows) == 2
    assert "0.02" in rows[0]
    assert "0.01 to 0.03" in rows[0]
    assert "| 30 / 40 " in rows[0]
    assert "generated / real" in text
    assert "not computed: lora: fid: 30 images, needs 128" in text
    assert markdown(record(demo=False, smoke=True)).startswith("**NOT A SCORE**")
    assert markdown(record(demo=False)).startswith("| score  ")


def test_the_sets_stand_together_under_each_score():
    made = record()
    other = tuple(replace(score, name="precision") for score in made.scores)
    mixed = replace(made, scores=(made.scores[0], other[0], made.scores[1], other[1]))
    rows = [line.split("|")[1:3] for line in markdown(mixed).splitlines() if " | " in line][1:]
    assert [row[0].strip() for row in rows] == [made.scores[0].name] * 2 + ["precision"] * 2
    assert [row[1].strip() for row in rows] == ["lora", "flora"] * 2


def test_a_bar_or_a_line_break_in_a_label_does_not_break_the_table():
    made = record(("a|b\nc",))
    row = next(line for line in markdown(made).splitlines() if line.startswith("| kernel"))
    assert "a\\|b c" in row


def test_columns_without_values_are_left_out():
    made = record()
    bare = replace(made, scores=tuple(replace(score, floor=None, interval=None) for score in made.scores))
    assert "95 % interval" not in markdown(bare)
    assert "real against real" not in markdown(bare)


def test_notes_stand_once_for_each_score_with_its_paper_and_name_the_sets_they_are_of():
    made = record()
    first, second = made.scores
    text = markdown(replace(made, scores=(replace(first, notes=("40 images: small",)), second)))
    (note,) = [line for line in joined_items(text) if line.startswith("- `kernel_distance")]
    assert note.count("lower is better") == 1
    assert note.count("interval: normal") == 1
    assert "lora: 40 images: small" in note
    assert "arXiv:1801.01401" in note


def joined_items(text):
    return text.replace("\n  ", " ").splitlines()


def test_warnings_that_say_the_same_of_several_sets_stand_once():
    text = markdown(replace(record(), warnings=("lora: too few", "flora: too few", "a clock: slow")))
    assert "- warning: lora, flora: too few" in text
    assert "- warning: a clock: slow" in text


def test_a_terminal_has_a_table_for_each_extractor_with_uncut_names_of_scores():
    made = record(("held_out",))
    names = ("frechet_distance[embedded:clip]", "frechet_distance_infinity[embedded:clip]", "fid")
    text = markdown(replace(made, scores=tuple(replace(made.scores[0], name=n) for n in names)), width=WIDTH)
    rows = [line.split("|")[1].strip() for line in text.splitlines() if "held_out" in line]
    assert rows == ["frechet_distance", "frechet_distance_infinity", "fid"]
    assert text.count("extractor: embedded:clip\n") == 1
    assert text.count("| score ") == 2
    assert max(map(len, text.splitlines())) <= WIDTH


def test_a_terminals_table_fits_and_its_notes_have_the_full_names():
    name = "image_similarity_of_a_very_long_name_that_fills_half_of_a_line_of_a_terminal[clip:somebody]"
    made = record(("the-first-adapter-of-a-long-series-of-runs", "b"))
    text = markdown(replace(made, scores=tuple(replace(s, name=name) for s in made.scores)), width=WIDTH)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in table} == {WIDTH}
    assert f"`{name}`" in text


def test_no_empty_table_is_printed():
    text = markdown(replace(record(), scores=()))
    assert "|" not in text
    assert "No score could be computed." in text
    assert "not computed: lora: fid" in text


def test_the_report_has_what_a_citation_needs():
    made = record()
    settings = {**made.settings, "device": "cuda:0", "protocol": "adm"}
    text = " ".join(report(replace(made, settings=settings)).split())
    summary = made.extractors[0]
    for part in (summary.name, summary.sha256, "crop-64 to 64", "metrics 0", "torch 2", "cuda:0", "adm"):
        assert part in text
    for part in ("ef" * 32, "photos", "`python eval/image_quality.py`", "arXiv:1801.01401"):
        assert part in text


def test_every_metric_has_its_paper():
    without_paper = {key for key, metric in METRICS.items() if not metric.source}
    assert without_paper == {"copy_rate", "preference"}  # docs/metrics.md defines them


def test_the_csv_has_a_row_per_image_with_all_its_figures():
    made = record()
    rows = list(csv.DictReader(io.StringIO(per_image_csv(made))))
    assert len(rows) == len(made.images)
    assert rows[3]["image"] == "lora-003.png"
    assert rows[3]["prompt"] == "a <b>cat</b> & number 3"
    assert float(rows[3]["realism"]) == made.images[3].values["realism"]
    assert rows[3]["nearest"] == "real-3.png"


def test_numbers_are_short_and_without_needless_exponents():
    values = (0, 0.25, 12.34567, 999.9, 12345.678, 1.2345e-5, -0.5)
    assert [number(value) for value in values] == [
        "0",
        "0.25",
        "12.35",
        "999.9",
        "12,345.7",
        "1.23e-05",
        "-0.5",
    ]
