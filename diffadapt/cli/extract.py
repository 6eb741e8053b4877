"""`diffadapt extract`: extract an adapter of a chosen method from a fine-tuned model and its base."""

import argparse

import diffadapt as da


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `diffadapt extract`."""
    add = parser.add_argument
    add("--finetuned", required=True, help="fine-tuned pipeline: a folder, hub name or .safetensors file")
    add("--base", required=True, help="base model that it was fine-tuned from")
    add(
        "--adapter",
        default="lora",
        help="method: lora, dora, flora, 1lora, gamma, full, bitfit, norms, or several joined with + "
        "(default: lora)",
    )
    add("--targets", default="attention", help="layers: presets or globs on their names (default: attention)")
    add("--text_encoder_targets", help="layers of the text encoders (default: none)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="rank of the adapter")
    size.add_argument(
        "--param_budget", help="choose the largest rank with at most this many parameters: 500k"
    )
    add("--out", required=True, help="file to write")


def extract(arguments: argparse.Namespace) -> str:
    """Writes the adapter file. Returns a summary to print."""
    from diffadapt.adapters.attach import components
    from diffadapt.adapters.budget import parse_budget
    from diffadapt.formats.edit.extract import extract, relative_error, share_outside
    from diffadapt.models.open_pipeline import open_pipeline  # imports diffusers, which takes seconds

    base = open_pipeline(arguments.base)
    targets = {"targets": arguments.targets, "text_encoder_targets": arguments.text_encoder_targets}
    options = {} if arguments.rank is None else {"rank": arguments.rank}  # else the method's own default
    method = da.make_method(arguments.adapter, **options)
    if arguments.param_budget is not None:
        budget = parse_budget(arguments.param_budget)
        method = da.fit_budget(base, arguments.adapter, budget=budget, **targets)
    adapter = da.attach(base, method, **targets)
    finetuned = components(open_pipeline(arguments.finetuned), arguments.text_encoder_targets is not None)
    extract(adapter, finetuned)
    # what the adapter cannot hold: beyond its rank in its own layers, and all that changed in other layers
    error = relative_error(adapter, finetuned)
    outside = share_outside(adapter, finetuned)
    da.save(adapter, arguments.out, base=arguments.base, metadata={"extracted_from": arguments.finetuned})
    return (
        f"{arguments.out}: {method} on {len(adapter.sites)} layers, {adapter.num_parameters:,} parameters; "
        f"relative error {error:.3e} on them; {100 * outside:.2f} % of the squared change is in other layers"
    )
