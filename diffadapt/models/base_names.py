"""Names of base models: a folder, a hub name, one checkpoint file, or `embedded:NAME` for a shipped one."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from diffadapt.models.single_file import is_single_file, pipeline_of_file

EMBEDDED = "embedded:"
LIBRARIES = ("diffusers", "transformers")  # of a pipeline's parts, with the folders of diffusers.pipelines


def is_embedded(name: str) -> bool:
    return name.startswith(EMBEDDED)


def resolve(name: str) -> str:
    """What `from_pretrained` or a folder reader takes: an embedded name's real path, others unchanged."""
    if not is_embedded(name):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    from diffadapt.assets import embedded

    return str(embedded(name.removeprefix(EMBEDDED)))


def pipeline_class(name: str, *, revision: str | None = None) -> str:
    """The class of the pipeline of that name; of a hub name, only its index is fetched.

    Raises: FileNotFoundError, OSError or ValueError with the remedy when there is no pipeline of that name.
    """
    place = resolve(name)
    if is_single_file(place):
        return pipeline_of_file(place)
    folder = Path(place)
    if not folder.exists() and looks_local(place):
        raise FileNotFoundError(
            f"no base model at {name!r}; give a diffusers folder, a .safetensors checkpoint or a hub name"
        )
    index = folder / "model_index.json" if folder.exists() else _index_on_hub(name, revision)
    if not index.is_file():
        raise ValueError(f"{name!r} has no model_index.json; give the folder of a whole diffusers pipeline")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        kind = str(content["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not the index of a diffusers pipeline ({error!r})") from None
    _refuse_other_libraries(content, index)
    return kind


def _refuse_other_libraries(content: Mapping[str, object], index: Path) -> None:
    """Raises ValueError for a part that any other installed module would be imported for."""
    for part, value in content.items():
        library = value[0] if isinstance(value, list) and value else None
        if not isinstance(library, str) or library in LIBRARIES:  # a setting, or a part left out
            continue
        if not (library.isidentifier() and find_spec(f"diffusers.pipelines.{library}")):
            raise ValueError(
                f"{index}: {part!r} is of {library!r}; parts of a base come from {' or '.join(LIBRARIES)}"
            )


def looks_local(place: str) -> bool:
    """Whether a name can only be a path: hub names have at most one slash and start with a letter."""
    return place.startswith((".", "~", "/")) or Path(place).is_absolute() or place.count("/") > 1


def _index_on_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(name, "model_index.json", revision=revision))
    except (OSError, HFValidationError) as error:  # its own errors are kinds of OSError
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"no folder {name!r} here, and the hub does not give a pipeline of that name ({reason}); "
            "check the name, the network, and for a gated model `hf auth login`"
        ) from None
