"""The model card of a run: README.md with the image grid, metrics, commands and the base's licence."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from diffadapt.common.atomic_files import write_atomically
from diffadapt.models.base_names import is_embedded, resolve
from diffadapt.training.options import TrainOptions
from diffadapt.training.report.summary import metric_rows
from diffadapt.training.start_command import this_command


def write_card(
    output: Path, options: TrainOptions, record: Mapping[str, object], *, title: str, sample_options: str
) -> None:
    """Writes output/README.md.

    Args:
        record: the content of run.json.
        sample_options: options of `diffadapt sample` that say what to generate.
    """
    base = options.pretrained_model_name_or_path
    paragraphs = [_header(options), f"# {title}"]
    paragraphs += _result_paragraphs(output, base, record)
    paragraphs += _use_paragraphs(base, sample_options)
    paragraphs += _origin_paragraphs(output)
    text = "\n\n".join(paragraphs) + "\n"
    write_atomically(output / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def base_licence(name: str) -> str | None:
    """The licence that the base's own card names; None where there is no card at hand."""
    card = Path(resolve(name)) / "README.md"
    try:
        metadata = metadata_load(card) if card.is_file() else None
    except (ValueError, yaml.YAMLError):
        return None
    licence = (metadata or {}).get("license")
    return licence if isinstance(licence, str) else None


def _header(options: TrainOptions) -> str:
    """The YAML block that the hub reads."""
    base = options.pretrained_model_name_or_path
    values: dict[str, object] = {"library_name": "diffusers", "tags": ["diffadapt", "diffusers-training"]}
    if _is_hub_name(base):
        values["base_model"] = base
    licence = base_licence(base)  # the adapter is bound to it
    if licence:
        values["license"] = licence
    prompt = getattr(options, "instance_prompt", None)
    if prompt is not None:
        values["instance_prompt"] = prompt
    return "---\n" + yaml.safe_dump(values, sort_keys=False).strip() + "\n---"


def _result_paragraphs(output: Path, base: str, record: Mapping[str, object]) -> list[str]:
    """Method, image grid and metrics."""
    paragraphs = [
        f"An adapter made with diffadapt: `{record['method']}`, {record['parameters']:,} trained parameters, "
        f"{record['steps']} steps in {record['seconds']} s."
    ]
    if is_embedded(base):
        paragraphs.append("DEMO: the base is a small one that is shipped for demonstration.")
    if (output / "grid.png").is_file():
        paragraphs.append("![before and after](grid.png)")
    if record["figures"]:
        lines = ["| metric | before | after |", "|---|---|---|"]
        for name, before, after in metric_rows(record["figures"]):
            lines.append(f"| {name} | {before} | {after} |")
        paragraphs.append("\n".join(lines))
    return paragraphs


def _use_paragraphs(base: str, sample_options: str) -> list[str]:
    """The base with its licence, and how to generate images with the adapter."""
    licence = base_licence(base) or "not named by a card at hand; look it up at the base"
    command = f"diffadapt sample --base {shlex.quote(base)} --adapter adapter.safetensors {sample_options}"
    return [
        f"Base: `{base}`, licence: {licence}. The adapter works on this base and is bound to its licence.",
        f"```bash\n{command}\n```",
        "```python\nimport diffadapt as da\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({_python_expression(base)})\n"
        'da.load(pipe, "adapter.safetensors")\n```',
    ]


def _origin_paragraphs(output: Path) -> list[str]:
    """The command and the options of the run."""
    config = (output / "config.yaml").read_text(encoding="utf-8").strip()
    return [
        f"Made by:\n\n```bash\n{this_command()}\n```",
        f"All options:\n\n```yaml\n{config}\n```",
    ]


def _python_expression(base: str) -> str:
    """The base as an argument of `from_pretrained`."""
    if is_embedded(base):
        return f'da.embedded("{base.partition(":")[2]}")'
    return repr(base)


def _is_hub_name(base: str) -> bool:
    # names on the hub are OWNER/NAME; the hub refuses a card whose `base_model` is a path
    return not is_embedded(base) and not Path(base).exists() and base.count("/") == 1
