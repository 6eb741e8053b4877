"""eval/benchmarks/gpu.py is rehearsed without a GPU, on tiny models."""

import json
import sys

import gpu
import pytest
import torch


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    gpu.main()


@pytest.mark.slow
def test_a_rehearsal_fills_the_page_and_the_records(tmp_path, monkeypatch):
    records = tmp_path / "gpu.json"
    page = tmp_path / "gpu.md"
    fixed = ("--records", records, "--output", page)
    run(monkeypatch, "--device", "cpu", "--rehearse", "--parts", "sd15-attention", "sdxl-conv", *fixed)
    text = page.read_text(encoding="utf-8")
    assert "| **`flora`** |" in text
    assert "| PEFT lora |" in text
    assert "| floor again |" in text
    assert "never" not in text
    measured = json.loads(records.read_text(encoding="utf-8"))
    row = measured["sd15-attention"]["rows"]["diffadapt:lora"]
    assert row["parameters"] > 0
    assert len(row["step_seconds"]) == gpu.ROUNDS
    assert measured["sd15-attention"]["failed"] == {}
    page.unlink()
    run(monkeypatch, "--page_only", *fixed)
    assert page.read_text(encoding="utf-8") == text


def test_rows_that_the_time_does_not_allow_are_named(tmp_path, monkeypatch):
    records = {"rows": {}, "failed": {}, "title": "A table", "dtype": "float32"}
    saved = []
    table = gpu.shrink(gpu.TABLES["sd15-attention"])
    device = torch.device("cpu")
    gpu.measure_table(table, device, records, lambda: saved.append(1), deadline=0)
    assert records["rows"] == {}
    assert set(records["failed"]) == set(table.variants())


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --rehearse"):
        run(monkeypatch, "--records", tmp_path / "gpu.json")


def test_the_page_says_that_nothing_was_measured():
    assert gpu.NEVER_RUN in gpu.page({})


@pytest.mark.slow
def test_every_row_can_be_made():
    """A name that no program knows would only be noticed on a GPU."""
    base = gpu.cost_models.build("tiny")
    for table in gpu.TABLES.values():
        for variant in table.variants():
            gpu.cost_rivals.make(
                base, "floor" if variant == gpu.FLOOR_AGAIN else variant, table.targets, rank=2
            )
