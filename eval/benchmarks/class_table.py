"""Runs the class-conditional demonstration with every method, for the table of docs/class_demo.md.

    python eval/benchmarks/class_table.py --seeds 0 1 2 --jobs 2
    python eval/benchmarks/class_table.py --seeds 0 --max_train_steps 100  # other options go to the script

Each run is `train_scripts/class_conditional.py` with its default data and base, and the method's recommended
learning rate; finished runs are not repeated.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from demo_runs import mean_and_deviation, run

import diffadapt as da
from diffadapt.common.runtime import available_cores

METRICS = {  # name in run.json -> heading
    "held_out_loss": "loss on held-out handwriting",
    "frechet_distance[embedded:digits]": "Frechet distance",
    "class_agreement[embedded:digits]": "recognised as the requested digit",
}
MARK = "<!-- made by eval/benchmarks/class_table.py from here on -->"


def main() -> None:
    """Runs the demonstrations and writes the table below the page's text."""
    arguments, extra_words = _parser().parse_known_args()
    threads = max(1, available_cores() // arguments.jobs)
    cases = [(adapter, seed) for seed in arguments.seeds for adapter in arguments.adapters]

    def run_case(adapter: str, seed: int) -> dict:
        options = {"adapter": adapter, "seed": seed, "num_threads": threads}
        output = arguments.runs / f"{adapter}-seed{seed}"
        return run("class_conditional.py", output, options, extra_words)

    adapters, seeds = zip(*cases, strict=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        records = list(pool.map(run_case, adapters, seeds))
    records_by_adapter: dict[str, list[dict]] = {}
    for (adapter, _), record in zip(cases, records, strict=True):
        records_by_adapter.setdefault(adapter, []).append(record)
    text_above = ""
    if arguments.output.exists():
        text_above = arguments.output.read_text(encoding="utf-8").partition(MARK)[0]
    table_text = table(records_by_adapter)
    arguments.output.write_text(f"{text_above}{MARK}\n{table_text}", encoding="utf-8")
    print(table_text)


def table(records_by_adapter: dict[str, list[dict]]) -> str:
    """One row per method: the mean and, of several seeds, the standard deviation."""
    first_records = next(iter(records_by_adapter.values()))  # before training all methods are alike
    num_seeds = len(first_records)
    options = first_records[0]["options"]
    over_seeds = f"mean ± standard deviation of {num_seeds} seeds" if num_seeds > 1 else "one seed"
    before_cells = [cell(first_records, metric, "before") for metric in METRICS]
    lines = [
        f"{options['max_train_steps']} steps of {options['train_batch_size']} images on "
        f"`{options['targets']}`, {options['num_validation_images']} generated images, {over_seeds}.",
        "",
        f"| method | parameters | rate | {' | '.join(METRICS.values())} |",
        f"|---|---:|---:|{'---:|' * len(METRICS)}",
        f"| before training | 0 | | {' | '.join(before_cells)} |",
    ]
    for adapter, records in records_by_adapter.items():
        cells = [cell(records, metric, "after") for metric in METRICS]
        rate = f"{records[0]['options']['learning_rate']:g}"
        lines.append(f"| `{adapter}` | {records[0]['parameters']:,} | {rate} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(records: list[dict], metric: str, when: str) -> str:
    """A metric before or after training; empty where no record has it."""
    values = [record["figures"][metric][when] for record in records if metric in record["figures"]]
    return mean_and_deviation(values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--adapters", nargs="+", default=list(da.METHODS), help="methods (default: all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run of each method per seed")
    add("--jobs", type=int, default=1, help="runs at the same time; they share the cores (default: 1)")
    add("--runs", type=Path, default=Path("runs/class_table"), help="folder of the runs")
    add("--output", type=Path, default=Path("docs/class_demo.md"), help="page to update")
    return parser


if __name__ == "__main__":
    main()
