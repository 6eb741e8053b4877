"""eval/benchmarks/demo_table.py: the page from the records of runs."""

import demo_table as script
import pytest


def record(**after):
    options = {
        "max_train_steps": 9,
        "train_batch_size": 4,
        "instance_prompt": "a sks cat",
        "extractor": "embedded:clip",
        "num_validation_images": 16,
    }
    figures = {}
    for metric, value in after.items():
        figures[f"{metric}[embedded:clip]"] = {"before": 0.5, "after": value}
    return {"options": options, "parameters": 1234, "figures": figures}


def test_mean_and_deviation_of_the_seeds_of_each_method():
    records = [
        record(subject_similarity=0.7, text_agreement=0.6),
        record(subject_similarity=0.9, text_agreement=0.6),
    ]
    text = script.page([("`lora` (rank 8)", records)], command="python demo_table.py")
    assert (
        "| adapter | parameters | similarity, training prompt | agreement with the text, new contexts |"
        in text
    )
    assert "| before training | 0 | 0.500 ± 0.000 | 0.500 ± 0.000 |" in text
    assert "| `lora` (rank 8) | 1,234 | 0.800 ± 0.141 | 0.600 ± 0.000 |" in text
    assert "2 seeds" in text


@pytest.mark.parametrize("metrics", [list(script.COLUMNS), ["subject_similarity", "drift"]])
def test_the_columns_that_the_runs_have_are_explained_and_no_others(metrics):
    text = script.page([("lora", [record(**dict.fromkeys(metrics, 0.5))])], command="python demo_table.py")
    for metric, heading in script.COLUMNS.items():
        assert (f"\n- {heading}:" in text) == (f"| {heading} |" in text) == (metric in metrics)
    assert "mean cosine between 16 images" in text
