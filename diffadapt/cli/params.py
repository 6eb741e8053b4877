"""`diffadapt params`: count the parameters of an adapter, from the configuration of the model alone."""

import argparse
import dataclasses
import json

from diffadapt.adapters.budget import ParameterTable, count_parameters, fit_budget, parse_budget
from diffadapt.methods import Method
from diffadapt.methods.parse_method import make_method
from diffadapt.models.from_config import model_from_config


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffadapt params`."""
    add = parser.add_argument
    add(
        "--model",
        "--pretrained_model_name_or_path",
        required=True,
        metavar="CONFIG_OR_FOLDER",
        help="config.json of a model, folder of a model or pipeline, or name on the hub",
    )
    add("--adapter", required=True, help="method with options: flora(rank=8), 1lora+norms")
    add("--targets", default="attention", help="layers: presets or globs on their names (default: attention)")
    add("--text_encoder_targets", help="layers of the text encoders of a pipeline (default: none)")
    add(
        "--rank_pattern",
        action="append",
        default=[],
        metavar="GLOB=RANK",
        help="another rank for the layers that match; may be repeated",
    )
    add(
        "--param_budget", help="choose the largest rank with at most this many parameters: 500000, 500k, 1.5M"
    )
    add("--blocks", type=int, default=2, help="depth of layer names that are grouped into a row (default: 2)")
    add("--json", action="store_true", help="print the table as JSON")


def params(arguments: argparse.Namespace) -> str:
    """The table of parameters, as text or as JSON."""
    if arguments.blocks < 1:
        raise ValueError(f"--blocks must be at least 1, got {arguments.blocks}")
    method = make_method(arguments.adapter)
    rank_patterns = {}
    for text in arguments.rank_pattern:
        glob, rank = _parse_rank_pattern(text)
        rank_patterns[glob] = rank
    if arguments.param_budget is not None and rank_patterns:
        raise ValueError("--param_budget chooses one rank for all layers; leave --rank_pattern out")
    model = model_from_config(arguments.model, text_encoders=arguments.text_encoder_targets is not None)
    targets = {"targets": arguments.targets, "text_encoder_targets": arguments.text_encoder_targets}
    if arguments.param_budget is not None:
        budget = parse_budget(arguments.param_budget)
        method = fit_budget(model, arguments.adapter, budget=budget, **targets)
    table = count_parameters(model, method, rank_patterns=rank_patterns, depth=arguments.blocks, **targets)
    return as_json(method, table) if arguments.json else as_text(method, table)


def as_text(method: Method, table: ParameterTable) -> str:
    """Rows of block, number of layers, trained parameters, their percentage and bytes; the total last."""
    layer_count = 0
    name_width = len("block")
    for name, layers, _ in table.blocks:
        layer_count += layers
        name_width = max(name_width, len(name))
    rows = [*table.blocks, ("total", layer_count, table.total)]
    lines = [
        str(method),
        f"{'block':<{name_width}} {'layers':>7} {'parameters':>14} {'percent':>10} {'bytes':>16}",
    ]
    for name, layers, parameters in rows:
        percent = f"{100 * parameters / table.base:.4f}"  # of the whole model, not of the block
        lines.append(
            f"{name:<{name_width}} {layers:>7} {parameters:>14,} {percent:>10} {4 * parameters:>16,}"
        )
    lines.append(f"percent of the model's {table.base:,} parameters; bytes in float32")
    return "\n".join(lines)


def as_json(method: Method, table: ParameterTable) -> str:
    """The table and the method with all its options as JSON."""
    members = []  # one, or those joined with +, as adapter files store them
    for member in method.members:
        members.append({"name": member.name, "options": dataclasses.asdict(member)})
    blocks = []
    for name, layers, parameters in table.blocks:
        blocks.append({"name": name, "layers": layers, "parameters": parameters})
    record = {
        "method": members,
        "blocks": blocks,
        "parameters": table.total,
        "base_parameters": table.base,
        "percent": table.percent,
        "bytes": table.bytes,
    }
    return json.dumps(record, indent=1)


def _parse_rank_pattern(text: str) -> tuple[str, int]:
    """GLOB=RANK as (glob, rank)."""
    glob, equals, rank = text.rpartition("=")
    if not (equals and glob and rank.isdecimal()):
        raise ValueError(
            f"--rank_pattern is a glob on layer names and a rank, such as '*.attn1.*=8', got {text!r}"
        )
    return glob, int(rank)
