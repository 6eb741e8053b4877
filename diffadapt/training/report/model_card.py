"""The model card of a run: README.md with the picture, the figures, the command and the base's licence."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from diffadapt.common.atomic_files import write_atomically
from diffadapt.models.base_names import is_embedded, resolve
from diffadapt.training.options import TrainOptions
from diffadapt.training.report.summary import figure_rows
from diffadapt.training.start_command import this_command


def write_card(
    output: Path, options: TrainOptions, record: Mapping[str, object], *, title: str, draw: str
) -> None:
    """Writes output/README.md.

    Args:
        record: what run.json holds.
        draw: options of `diffadapt sample` that say what to draw.
    """
    text = "\n\n".join([_header(options), *_body(output, options, record, title=title, draw=draw)]) + "\n"
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
    base, prompt = options.pretrained_model_name_or_path, getattr(options, "instance_prompt", None)
    values: dict[str, object] = {"library_name": "diffusers", "tags": ["diffadapt", "diffusers-training"]}
    if _is_hub_name(base):
        values["base_model"] = base
    if licence := base_licence(base):
        values["license"] = licence
    if prompt is not None:
        values["instance_prompt"] = prompt
    return "---\n" + yaml.safe_dump(values, sort_keys=False).strip() + "\n---"


def _body(
    output: Path, options: TrainOptions, record: Mapping[str, object], *, title: str, draw: str
) -> list[str]:
    base, config = (
        options.pretrained_model_name_or_path,
        (output / "config.yaml").read_text(encoding="utf-8").strip(),
    )
    parts = [
        f"# {title}",
        f"An adapter made with diffadapt: `{record['method']}`, {record['parameters']:,} trained parameters, "
        f"{record['steps']} steps in {record['seconds']} s.",
    ]
    if is_embedded(base):
        parts.append("DEMO: the base is a small one that is shipped for demonstration.")
    if (output / "grid.png").is_file():
        parts.append("![before and after](grid.png)")
    if record["figures"]:
        rows = [f"| {name} | {before} | {after} |" for name, before, after in figure_rows(record["figures"])]
        parts.append("\n".join(["| figure | before | after |", "|---|---|---|", *rows]))
    licence = base_licence(base) or "not named by a card at hand; look it up at the base"
    parts += [
        f"Base: `{base}`, licence: {licence}. The adapter works on this base and is bound to its licence.",
        f"```bash\ndiffadapt sample --base {shlex.quote(base)} --adapter adapter.safetensors {draw}\n```",
        "```python\nimport diffadapt as da\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({_place(base)})\n"
        'da.load(pipe, "adapter.safetensors")\n```',
        f"Made by:\n\n```bash\n{this_command()}\n```",
        f"All options:\n\n```yaml\n{config}\n```",
    ]
    return parts


def _place(base: str) -> str:
    """The base as an expression of Python."""
    return f'da.embedded("{base.partition(":")[2]}")' if is_embedded(base) else repr(base)


def _is_hub_name(base: str) -> bool:
    return not is_embedded(base) and not Path(base).exists() and base.count("/") == 1
