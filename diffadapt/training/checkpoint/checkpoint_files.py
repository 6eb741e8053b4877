"""The checkpoints of a folder: which there are, which run wrote them, and which one a name means."""

import json
from pathlib import Path


def list_checkpoints(folder: str | Path, *, run: str | None = None) -> list[Path]:
    """The complete checkpoints of a folder, the newest last.

    Args:
        run: only those of the run with this id.
    """
    present = sorted(Path(folder).glob("checkpoint-*"), key=_number)
    complete = [path for path in present if _number(path) >= 0 and (path / "state.json").is_file()]
    if run is None:
        return complete
    return [path for path in complete if run_id_of(path) == run]


def run_id_of(checkpoint: Path) -> str | None:
    """The id of the run that wrote a checkpoint; None where it cannot be read."""
    try:
        content = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return content["run"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None


def find_checkpoint(name: str, folder: str | Path) -> Path:
    """The checkpoint called `name`: 'latest' of `folder`, or a path, or a name inside `folder`.

    Raises: FileNotFoundError that lists the checkpoints there are; ValueError when the folder holds those of
        several runs and 'latest' could mean either.
    """
    present = list_checkpoints(folder)
    if name == "latest" and present:
        runs = {run_id_of(path) for path in present} - {None}
        if len(runs) > 1:
            listed = ", ".join(path.name for path in present)
            raise ValueError(
                f"{str(folder)!r} holds checkpoints of {len(runs)} runs ({listed}); name the one to go on "
                "from with --resume_from_checkpoint, and another --output_dir"
            )
        return present[-1]
    for path in (Path(name), Path(folder) / name):
        if name != "latest" and (path / "state.json").is_file():
            return path
    listed = ", ".join(path.name for path in present) or "none"
    raise FileNotFoundError(f"no checkpoint {name!r}; in {str(folder)!r} there are: {listed}")


def _number(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1
