"""The table of docs/dreambooth_demo.md: the demonstration with several adapters at one parameter budget.

    python eval/benchmarks/demo_table.py --adapters lora flora --budget 450000 --seeds 0 1 2

Each run is `train_scripts/dreambooth.py` without further arguments; finished runs are not repeated.
"""

import argparse
import sys
from pathlib import Path

from demo_runs import mean_and_deviation, run

import diffadapt as da
from diffadapt.common.runtime import silence_libraries
from diffadapt.models.families import load_base

COLUMNS = {  # figure -> heading
    "subject_similarity": "similarity, training prompt",
    "context_similarity": "similarity, new contexts",
    "text_agreement": "agreement with the text",
    "drift": "drift on other prompts",
    "nearest_training_image": "nearest training image",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", nargs="+", default=["lora", "flora"])
    parser.add_argument("--budget", type=int, default=450_000, help="trained parameters at most")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_table"))
    parser.add_argument("--output", type=Path, default=Path("docs/dreambooth_demo.md"))
    arguments = parser.parse_args()
    silence_libraries()
    base = load_base("embedded:emoji")
    targets = base.profile.defaults["targets"]
    rows = []
    for adapter in arguments.adapters:
        rank = da.fit_budget(base.pipe, adapter, targets, budget=arguments.budget).rank
        records = [
            run(
                "dreambooth.py",
                arguments.runs / f"{adapter}-rank{rank}-seed{seed}",
                {"adapter": adapter, "rank": rank, "seed": seed},
            )
            for seed in arguments.seeds
        ]
        rows.append((f"`{adapter}` (rank {rank})", records))
    arguments.output.write_text(page(rows, command=" ".join(["python", *sys.argv])), encoding="utf-8")
    print(arguments.output.read_text(encoding="utf-8"))


def page(rows: list[tuple[str, list[dict]]], *, command: str) -> str:
    """The document."""
    first = rows[0][1][0]
    options = first["options"]
    columns = {name: heading for name, heading in COLUMNS.items() if cell(rows[0][1], name, "after")}
    lines = [
        "# The DreamBooth demonstration in figures",
        "",
        f"Made by `{command}`:",
        f"{options['max_train_steps']} steps of {options['train_batch_size']} pictures on",
        f'the embedded 64-pixel base, prompt "{options["instance_prompt"]}". Mean ± standard deviation over',
        f"{len(rows[0][1])} seeds. All figures are cosines between features of the embedded encoder",
        f"(`{options['extractor']}`), comparable with each other only: a demonstration, not a benchmark.",
        "",
        f"| adapter | parameters | {' | '.join(columns.values())} |",
        f"|---|---:|{'---:|' * len(columns)}",
        "| before training | 0 | " + " | ".join(cell(rows[0][1], name, "before") for name in columns) + " |",
    ]
    for label, records in rows:
        cells = [cell(records, name, "after") for name in columns]
        lines.append(f"| {label} | {records[0]['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *explanation(first)]) + "\n"


def explanation(record: dict) -> list[str]:
    count = record["options"]["num_validation_images"]
    return [
        f"- similarity, training prompt: mean cosine between {count} images of the prompt that was trained",
        "  and the training images.",
        "- similarity, new contexts: the same of images of ten prompts that put the subject in new contexts,",
        "  as DreamBooth's protocol and `eval/subject.py` measure it; lower, as much of them is context.",
        "- agreement with the text: the images of those ten prompts against their words.",
        "- drift: 1 - cosine between what unrelated prompts give before and after, on the same seeds.",
        "- nearest training image: of the training prompt's images, mean cosine to the closest training",
        "  image; near 1 would mean copying.",
    ]


def cell(records: list[dict], figure: str, when: str) -> str:
    values = [
        entry[when]
        for record in records
        for name, entry in record["figures"].items()
        if name.startswith(f"{figure}[") and when in entry
    ]
    return mean_and_deviation(values)


if __name__ == "__main__":
    main()
