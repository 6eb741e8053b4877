"""eval/benchmarks/class_table.py: the table from the records of runs; finished runs are not repeated."""

import json

import class_table as script


def record(after):
    options = {
        "max_train_steps": 9,
        "train_batch_size": 4,
        "targets": "qv",
        "num_validation_images": 10,
        "learning_rate": 0.002,
    }
    figures = {"held_out_loss": {"before": 0.5, "after": after}}
    return {"options": options, "parameters": 1234, "figures": figures}


def test_mean_and_deviation_of_the_seeds_of_each_method():
    text = script.table({"lora": [record(0.1), record(0.3)], "flora": [record(0.2), record(0.2)]})
    assert "9 steps of 4 images on `qv`" in text
    assert "of 2 seeds" in text
    assert "| `lora` | 1,234 | 0.002 | 0.200 ± 0.141 |  |  |" in text
    assert "| `flora` | 1,234 | 0.002 | 0.200 ± 0.000 |  |  |" in text
    assert "| before training | 0 | | 0.500 ± 0.000 |  |  |" in text


def test_a_finished_run_is_read_and_the_page_above_the_table_stays(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "lora-seed5"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record(0.1)), encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(f"# A title\n\n{script.MARK}\nold\n", encoding="utf-8")
    arguments = [
        "--adapters",
        "lora",
        "--seeds",
        "5",
        "--runs",
        str(tmp_path / "runs"),
        "--output",
        str(page),
    ]
    monkeypatch.setattr("sys.argv", ["class_table.py", *arguments])
    script.main()
    assert page.read_text(encoding="utf-8").startswith("# A title\n")
    assert "| `lora` | 1,234 | 0.002 | 0.100 |" in page.read_text(encoding="utf-8")
    assert "old" not in page.read_text(encoding="utf-8")
    assert "one seed" in capsys.readouterr().out
