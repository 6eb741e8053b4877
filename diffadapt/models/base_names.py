"""Names of base models: a folder, a hub name, one checkpoint file, or `embedded:NAME` for a shipped one."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from diffadapt.models.single_file import is_single_file, pipeline_of_file

EMBEDDED = "embedded:"
# Libraries that components of a pipeline may come from; a folder of diffusers.pipelines is one, too.
LIBRARIES = ("diffusers", "transformers")


def is_embedded(name: str) -> bool:
    """Whether a name is that of a model or data set shipped with the package."""
    return name.startswith(EMBEDDED)


def resolve(name: str) -> str:
    """The path behind an embedded name, or one that begins with `~`; other names are unchanged."""
    if is_embedded(name):
        from diffadapt.assets import embedded

        return str(embedded(name.removeprefix(EMBEDDED)))
    if name.startswith("~"):
        return str(Path(name).expanduser())
    return name


def pipeline_class(name: str, *, revision: str | None = None) -> str:
    """The class of the pipeline of that name; of a hub name, only its index is fetched.

    Raises:
        FileNotFoundError, OSError, ValueError: there is no pipeline of that name; the message has the remedy.
    """
    path = resolve(name)
    if is_single_file(path):
        return pipeline_of_file(path)
    return str(pipeline_index(name, revision=revision)["_class_name"])


def pipeline_index(name: str, *, revision: str | None = None) -> dict[str, object]:
    """The content of a pipeline's model_index.json: component -> (library, class), and settings.

    Raises:
        FileNotFoundError, OSError, ValueError: there is no pipeline of that name; the message has the remedy.
    """
    path = resolve(name)
    folder = Path(path)
    if folder.exists():
        index = folder / "model_index.json"
    elif looks_local(path):
        raise FileNotFoundError(
            f"no base model at {name!r}; give a diffusers folder, a .safetensors checkpoint or a hub name"
        )
    else:
        index = _index_on_hub(name, revision)
    if not index.is_file():
        raise ValueError(f"{name!r} has no model_index.json; give the folder of a whole diffusers pipeline")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        str(content["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not the index of a diffusers pipeline ({error!r})") from None
    _check_libraries(content, index)
    return content


def _check_libraries(content: Mapping[str, object], index: Path) -> None:
    """Raises ValueError for a component that any other installed module would be imported for."""
    for component, value in content.items():
        library = value[0] if isinstance(value, list) and value else None
        if not isinstance(library, str) or library in LIBRARIES:  # a setting, or a component left out
            continue
        if not (library.isidentifier() and find_spec(f"diffusers.pipelines.{library}")):
            raise ValueError(
                f"{index}: {component!r} is of {library!r}; components of a base come from "
                f"{' or '.join(LIBRARIES)}"
            )


def looks_local(path: str) -> bool:
    """Whether a name can only be a path: hub names have at most one slash and start with a letter."""
    return path.startswith((".", "~", "/")) or Path(path).is_absolute() or path.count("/") > 1


def _index_on_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(name, "model_index.json", revision=revision))
    except (OSError, HFValidationError) as error:  # the hub's own errors are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"no folder {name!r} here, and the hub does not give a pipeline of that name ({reason}); "
            "check the name, the network, and for a gated model `hf auth login`"
        ) from None
