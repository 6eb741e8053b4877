"""`diffadapt extract`: an adapter of a chosen method from a fine-tuned model and its base."""

import argparse

import diffadapt as da


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--finetuned", required=True, help="the fine-tuned pipeline: a folder, hub name or .safetensors file")
    add("--base", required=True, help="what it was fine-tuned from")
    add(
        "--adapter",
        default="lora",
        help="lora, dora, flora, 1lora, gamma, full, bitfit, norms, or several with +",
    )
    add("--targets", default="attention", help="presets or globs on layer names (default: attention)")
    add("--text_encoder_targets", help="the same for the text encoders")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="rank of the adapter")
    size.add_argument("--param_budget", help="the largest rank with at most so many parameters, such as 500k")
    add("--out", required=True, help="the file to write")


def extract(arguments: argparse.Namespace) -> str:
    """Writes the file; returns what to say."""
    from diffadapt.adapters.attach import components
    from diffadapt.adapters.budget import parse_budget
    from diffadapt.formats.edit.extract import extract, relative_error, share_outside
    from diffadapt.models.open_pipeline import open_pipeline

    text_targets = arguments.text_encoder_targets
    base = open_pipeline(arguments.base)
    chosen = {"targets": arguments.targets, "text_encoder_targets": text_targets}
    options = {} if arguments.rank is None else {"rank": arguments.rank}
    method = da.make_method(arguments.adapter, **options)
    if arguments.param_budget is not None:
        budget = parse_budget(arguments.param_budget)
        method = da.fit_budget(base, arguments.adapter, budget=budget, **chosen)
    adapter = da.attach(base, method, **chosen)
    tuned = components(open_pipeline(arguments.finetuned), text_targets is not None)
    extract(adapter, tuned)
    error, outside = relative_error(adapter, tuned), share_outside(adapter, tuned)
    da.save(adapter, arguments.out, base=arguments.base, metadata={"extracted_from": arguments.finetuned})
    return (
        f"{arguments.out}: {method} on {len(adapter.sites)} layers, {adapter.num_parameters:,} parameters; "
        f"relative error {error:.3e} on them; {100 * outside:.2f} % of the squared change is in other layers"
    )
