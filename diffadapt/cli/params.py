"""`diffadapt params`: what an adapter would train on a model, from the model's configuration alone."""

import argparse
import dataclasses
import json

from diffadapt.adapters.budget import ParameterTable, count_parameters, fit_budget, parse_budget
from diffadapt.methods import Method
from diffadapt.methods.parse_method import make_method
from diffadapt.models.from_config import model_from_config


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", "--pretrained_model_name_or_path", required=True, metavar="CONFIG_OR_FOLDER")
    add("--adapter", required=True, help="a method, its options in parentheses: flora(rank=8), 1lora+norms")
    add("--targets", default="attention", help="presets or globs on layer names (default: attention)")
    add("--text_encoder_targets", help="the same for the text encoders of a pipeline's folder")
    add(
        "--rank_pattern",
        action="append",
        default=[],
        metavar="GLOB=RANK",
        help="another rank for some layers",
    )
    add("--param_budget", help="the largest rank with at most so many parameters: 500000, 500k or 1.5M")
    add("--blocks", type=int, default=2, help="pieces of a layer's name that make a row (default: 2)")
    add("--json", action="store_true", help="the table as JSON")


def params(arguments: argparse.Namespace) -> str:
    """The table as text, or as JSON."""
    if arguments.blocks < 1:
        raise ValueError(f"--blocks must be at least 1, got {arguments.blocks}")
    method = make_method(arguments.adapter)
    patterns = dict(_rank_pattern(text) for text in arguments.rank_pattern)
    if arguments.param_budget is not None and patterns:
        raise ValueError("--param_budget chooses one rank for all layers; leave --rank_pattern out")
    text_targets = arguments.text_encoder_targets
    model = model_from_config(arguments.model, text_encoders=text_targets is not None)
    chosen = {"targets": arguments.targets, "text_encoder_targets": text_targets}
    if arguments.param_budget is not None:
        method = fit_budget(model, arguments.adapter, budget=parse_budget(arguments.param_budget), **chosen)
    table = count_parameters(model, method, rank_patterns=patterns, depth=arguments.blocks, **chosen)
    return as_json(method, table) if arguments.json else as_text(method, table)


def as_text(method: Method, table: ParameterTable) -> str:
    """Rows of block, number of sites, trained values and their bytes, and the sum of all."""
    sites = sum(count for _, count, _ in table.blocks)
    rows = [(name, count, values) for name, count, values in table.blocks]
    rows.append(("total", sites, table.total))
    wide = max(len("block"), *(len(name) for name, _, _ in rows))
    lines = [f"{method}", f"{'block':<{wide}} {'layers':>7} {'parameters':>14} {'percent':>10} {'bytes':>16}"]
    for name, count, values in rows:
        share = f"{100 * values / table.base:.4f}"
        lines.append(f"{name:<{wide}} {count:>7} {values:>14,} {share:>10} {4 * values:>16,}")
    lines.append(f"percent of the model's {table.base:,} parameters; bytes in float32")
    return "\n".join(lines)


def as_json(method: Method, table: ParameterTable) -> str:
    blocks = [{"name": name, "layers": layers, "parameters": values} for name, layers, values in table.blocks]
    parts = [{"name": part.name, "options": dataclasses.asdict(part)} for part in method.members]
    record = {
        "method": parts,
        "blocks": blocks,
        "parameters": table.total,
        "base_parameters": table.base,
        "percent": table.percent,
        "bytes": table.bytes,
    }
    return json.dumps(record, indent=1)


def _rank_pattern(text: str) -> tuple[str, int]:
    glob, equals, rank = text.rpartition("=")
    if not (equals and glob and rank.isdecimal()):
        raise ValueError(
            f"--rank_pattern is a glob on layer names and a rank, such as '*.attn1.*=8', got {text!r}"
        )
    return glob, int(rank)
