"""Names of base models: a folder, a hub name, or `embedded:NAME` for one that is shipped with the package."""

import json
from pathlib import Path

EMBEDDED = "embedded:"
FAMILIES = {"StableDiffusionPipeline": "sd"}  # pipeline class in model_index.json -> family


def is_embedded(name: str) -> bool:
    return name.startswith(EMBEDDED)


def resolve(name: str) -> str:
    """What `from_pretrained` or a folder reader takes: an embedded name's real path, others unchanged."""
    if not is_embedded(name):
        return name
    from diffadapt.assets import embedded

    return str(embedded(name.removeprefix(EMBEDDED)))


def check_base(name: str) -> None:
    """Raises an error with the remedy when a local folder is not a base model of a known family."""
    folder = Path(resolve(name))
    index = folder / "model_index.json"
    if not folder.exists():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise FileNotFoundError(f"no base model at {name!r}; give a diffusers folder or a hub name")
        return  # a hub name
    if not index.is_file():
        raise ValueError(f"{name!r} has no model_index.json; give the folder of a whole diffusers pipeline")
    kind = json.loads(index.read_text()).get("_class_name")
    if kind not in FAMILIES:
        raise ValueError(f"{name!r} is a {kind}; the known kinds are {', '.join(FAMILIES)}")
