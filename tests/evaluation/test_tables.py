"""Scores as Markdown, images as CSV."""

import csv
import io
from dataclasses import replace

from example_records import record

from diffadapt.evaluation.tables import markdown, number, per_image_csv


def test_markdown_has_a_row_per_score_and_says_what_was_refused_under_the_stamp():
    text = markdown(record())
    assert text.startswith("**DEMO**")
    rows = [line for line in text.splitlines() if line.startswith("| kernel_distance")]
    assert len(rows) == 2
    assert "0.02" in rows[0]
    assert "0.01 to 0.03" in rows[0]
    assert "30 generated / 40 real" in rows[0]
    assert "not computed: lora: fid: 30 images, needs 128" in text
    assert markdown(record(demo=False, smoke=True)).startswith("**NOT A SCORE**")
    assert markdown(record(demo=False)).startswith("| score |")


def test_the_sets_stand_together_under_each_score():
    made = record()
    other = tuple(replace(score, name="precision") for score in made.scores)
    mixed = replace(made, scores=(made.scores[0], other[0], made.scores[1], other[1]))
    rows = [line.split(" | ")[:2] for line in markdown(mixed).splitlines() if " | " in line][1:]
    assert [row[0].strip("| ") for row in rows] == [made.scores[0].name] * 2 + ["precision"] * 2
    assert [row[1] for row in rows] == ["lora", "flora"] * 2


def test_a_bar_or_a_line_break_in_a_label_does_not_break_the_table():
    made = record(("a|b\nc",))
    row = next(line for line in markdown(made).splitlines() if line.startswith("| kernel"))
    assert "a\\|b c" in row


def test_columns_without_values_are_left_out():
    made = record()
    bare = replace(made, scores=tuple(replace(score, floor=None, interval=None) for score in made.scores))
    assert "interval" not in markdown(bare)
    assert "real against real" not in markdown(bare)


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
