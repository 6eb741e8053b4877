"""The checkpoint folders of a run: listing them, finding one by name, and the run that wrote it."""

import json
from pathlib import Path


def list_checkpoints(folder: str | Path, *, run_id: str | None = None) -> list[Path]:
    """The complete checkpoints of a folder, the newest last.

    Args:
        run_id: only those of the run with this id.
    """
    complete = []
    for path in sorted(Path(folder).glob("checkpoint-*"), key=_step_of):
        # state.json comes with the rename that completes a checkpoint.
        if _step_of(path) >= 0 and (path / "state.json").is_file():
            complete.append(path)
    if run_id is None:
        return complete
    return [path for path in complete if run_id_of(path) == run_id]


def run_id_of(checkpoint: Path) -> str | None:
    """The id of the run that wrote a checkpoint; None where it cannot be read."""
    try:
        run_id = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):  # no file, no JSON, or another JSON
        return None
    return run_id if isinstance(run_id, str) else None


def find_checkpoint(name: str, folder: str | Path) -> Path:
    """The checkpoint called `name`: 'latest' of `folder`, or a path, or a name inside `folder`.

    Raises:
        FileNotFoundError: there is no such checkpoint; the message lists those there are.
        ValueError: the folder holds those of several runs, and 'latest' could mean either.
    """
    checkpoints = list_checkpoints(folder)
    names = ", ".join(path.name for path in checkpoints)
    if name == "latest" and checkpoints:
        run_ids = set(map(run_id_of, checkpoints)) - {None}
        if len(run_ids) > 1:
            raise ValueError(
                f"{str(folder)!r} holds checkpoints of {len(run_ids)} runs ({names}); name the one to go on "
                "from with --resume_from_checkpoint, and another --output_dir"
            )
        return checkpoints[-1]
    for path in (Path(name), Path(folder) / name):
        if name != "latest" and (path / "state.json").is_file():
            return path
    raise FileNotFoundError(f"no checkpoint {name!r}; in {str(folder)!r} there are: {names or 'none'}")


def _step_of(path: Path) -> int:
    """The number in `checkpoint-N`; -1 for another name."""
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1
