"""Runs the DreamBooth demonstration with several adapters of one size, for docs/dreambooth_demo.md.

    python eval/benchmarks/demo_table.py --adapters lora flora --budget 450000 --seeds 0 1 2

Each run is `train_scripts/dreambooth.py` with its default data and base; finished runs are not repeated.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from demo_runs import mean_and_deviation, run

import diffadapt as da
from diffadapt.common.runtime import silence_libraries
from diffadapt.evaluation.report.tables import list_items
from diffadapt.models.families import load_base

COLUMNS = {  # metric -> heading
    "subject_similarity": "similarity, training prompt",
    "context_similarity": "similarity, new contexts",
    "text_agreement": "agreement with the text, new contexts",
    "drift": "drift on other prompts",
    "nearest_training_image": "nearest training image",
}
EXPLANATIONS = {  # metric -> what its column is; {count} images are generated of the training prompt
    "subject_similarity": (
        "mean cosine between {count} images of the prompt that was trained and the training images"
    ),
    "context_similarity": (
        "the same for images of ten prompts that put the subject in new contexts, as DreamBooth's protocol "
        "and `eval/subject.py` measure it; it is lower, as such images show much context"
    ),
    "text_agreement": "images of ten prompts that put the subject in new contexts, against their words",
    "drift": "1 - cosine between images of unrelated prompts before and after training, on the same seeds",
    "nearest_training_image": (
        "of the training prompt's images, mean cosine to the closest training image; near 1 would mean "
        "copying"
    ),
}


def main() -> None:
    """Runs the demonstrations and writes the page."""
    arguments = _parser().parse_args()
    silence_libraries()
    base = load_base("embedded:emoji")
    targets = base.profile.defaults["targets"]
    rows = []
    for adapter in arguments.adapters:
        rank = da.fit_budget(base.pipe, adapter, targets, budget=arguments.budget).rank
        records = []
        for seed in arguments.seeds:
            output = arguments.runs / f"{adapter}-rank{rank}-seed{seed}"
            options = {"adapter": adapter, "rank": rank, "seed": seed}
            records.append(run("dreambooth.py", output, options))
        rows.append((f"`{adapter}` (rank {rank})", records))
    text = page(rows, command=" ".join(["python", *sys.argv]))
    arguments.output.write_text(text, encoding="utf-8")
    print(text)


def page(rows: list[tuple[str, list[dict]]], *, command: str) -> str:
    """The page.

    Args:
        rows: label of an adapter, and the records of its runs.
        command: that the page is made by.
    """
    _, first_records = rows[0]
    options = first_records[0]["options"]
    columns = {}  # those that the runs have
    for metric, heading in COLUMNS.items():
        if cell(first_records, metric, "after"):
            columns[metric] = heading
    before_cells = [cell(first_records, metric, "before") for metric in columns]
    lines = [
        "# The DreamBooth demonstration in figures",
        "",
        f"Made by `{command}`:",
        f"{options['max_train_steps']} steps of {options['train_batch_size']} images on",
        f'the embedded 64-pixel base, prompt "{options["instance_prompt"]}". Mean ± standard deviation over',
        f"{len(first_records)} seeds. All values are cosines between features of the embedded encoder",
        f"(`{options['extractor']}`), comparable with each other only: a demonstration, not a benchmark.",
        "",
        f"| adapter | parameters | {' | '.join(columns.values())} |",
        f"|---|---:|{'---:|' * len(columns)}",
        f"| before training | 0 | {' | '.join(before_cells)} |",
    ]
    for label, records in rows:
        cells = [cell(records, metric, "after") for metric in columns]
        lines.append(f"| {label} | {records[0]['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *explanations(columns, first_records[0])]) + "\n"


def explanations(columns: Mapping[str, str], record: dict) -> list[str]:
    """The meaning of the columns, as list items.

    Args:
        columns: metric -> heading.
        record: of a run.
    """
    count = record["options"]["num_validation_images"]
    items = []
    for metric, heading in columns.items():
        items.append(f"{heading}: {EXPLANATIONS[metric].format(count=count)}.")
    return list_items(items)


def cell(records: list[dict], metric: str, when: str) -> str:
    """A metric before or after training; empty where no record has it."""
    values = []
    for record in records:
        for name, entry in record["figures"].items():
            if name.startswith(f"{metric}[") and when in entry:
                values.append(entry[when])
    return mean_and_deviation(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--adapters", nargs="+", default=["lora", "flora"], help="methods (default: lora flora)")
    add("--budget", type=int, default=450_000, help="most trained parameters (default: 450000)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run of each method per seed")
    add("--runs", type=Path, default=Path("runs/demo_table"), help="folder of the runs")
    add("--output", type=Path, default=Path("docs/dreambooth_demo.md"), help="page to write")
    return parser


if __name__ == "__main__":
    main()
