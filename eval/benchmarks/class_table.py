"""The table of docs/class_demo.md: every method on the class-conditional demonstration, at its own rate.

    python eval/benchmarks/class_table.py --seeds 0 1 2 --jobs 2
    python eval/benchmarks/class_table.py --seeds 0 --max_train_steps 100  # other options are the script's

Each run is `train_scripts/class_conditional.py` without data or base; finished runs are not repeated.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from demo_runs import mean_and_deviation, run

import diffadapt as da
from diffadapt.common.runtime import available_cores

FIGURES = {  # name in run.json -> heading
    "held_out_loss": "loss on held-out handwriting",
    "frechet_distance[embedded:digits]": "Frechet distance",
    "class_agreement[embedded:digits]": "recognised as the digit asked for",
}
MARK = "<!-- made by eval/benchmarks/class_table.py from here on -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", nargs="+", default=list(da.METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; they share the cores")
    parser.add_argument("--runs", type=Path, default=Path("runs/class_table"))
    parser.add_argument("--output", type=Path, default=Path("docs/class_demo.md"))
    arguments, further = parser.parse_known_args()
    threads = max(1, available_cores() // arguments.jobs)
    wanted = [(adapter, seed) for seed in arguments.seeds for adapter in arguments.adapters]

    def one(adapter: str, seed: int) -> dict:
        options = {"adapter": adapter, "seed": seed, "num_threads": threads}
        return run("class_conditional.py", arguments.runs / f"{adapter}-seed{seed}", options, further)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        records = list(pool.map(one, *zip(*wanted, strict=True)))
    by_adapter: dict[str, list[dict]] = {}
    for (adapter, _), record in zip(wanted, records, strict=True):
        by_adapter.setdefault(adapter, []).append(record)
    text = arguments.output.read_text(encoding="utf-8") if arguments.output.exists() else f"{MARK}\n"
    kept = text.partition(MARK)[0]
    arguments.output.write_text(kept + MARK + "\n" + table(by_adapter), encoding="utf-8")
    print(table(by_adapter))


def table(by_adapter: dict[str, list[dict]]) -> str:
    """One row per method; mean and, of several seeds, standard deviation."""
    first = next(iter(by_adapter.values()))  # before training all are alike
    seeds, options = len(first), first[0]["options"]
    lines = [
        f"{options['max_train_steps']} steps of {options['train_batch_size']} pictures on "
        f"`{options['targets']}`, {options['num_validation_images']} drawn pictures, "
        + (f"mean ± standard deviation of {seeds} seeds." if seeds > 1 else "one seed."),
        "",
        f"| method | parameters | rate | {' | '.join(FIGURES.values())} |",
        f"|---|---:|---:|{'---:|' * len(FIGURES)}",
        "| before training | 0 | | " + " | ".join(cell(first, name, "before") for name in FIGURES) + " |",
    ]
    for adapter, records in by_adapter.items():
        cells = [cell(records, name, "after") for name in FIGURES]
        rate = f"{records[0]['options']['learning_rate']:g}"
        lines.append(f"| `{adapter}` | {records[0]['parameters']:,} | {rate} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(records: list[dict], figure: str, when: str) -> str:
    found = (record["figures"] for record in records)
    return mean_and_deviation([figures[figure][when] for figures in found if figure in figures])


if __name__ == "__main__":
    main()
