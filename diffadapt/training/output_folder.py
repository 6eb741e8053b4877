"""The output folder of a run: whose it is, whether it may be used, and what an older run wrote into it."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffadapt.data.class_images import count_images
from diffadapt.data.hub_tables import SAVED_DATASET_FILES
from diffadapt.formats.export import FORMATS
from diffadapt.models.base_names import is_embedded, resolve
from diffadapt.training.checkpoint.checkpoint_files import find_checkpoint, list_checkpoints, run_id_of
from diffadapt.training.options import OptionsT, TrainOptions
from diffadapt.training.parsing import write_config
from diffadapt.training.start_command import this_command

DATA_FOLDERS = (
    "instance_data_dir",
    "class_data_dir",
    "train_data_dir",
    "validation_data_dir",
    "held_out",
    "dataset_name",
)
MODEL_FOLDERS = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "extractor")
RUN_FILES = ("config.yaml", "log.jsonl")
RUN_ID_PREFIX = "# run "  # of config.yaml, before the id of the run that wrote it
EXPORTS = tuple(f"adapter{ending}" for ending in FORMATS.values())
RESULTS = ("adapter.safetensors", *EXPORTS, "run.json", "README.md", "grid.png")
PROGRESS = ("config.yaml", "log.jsonl", "samples/before", "samples/after", "logs/diffadapt")


def resolve_output_dir(options: OptionsT) -> tuple[OptionsT, list[str]]:
    """The options with an output folder that this run may use, and what a person is told about it.

    A script's default folder is numbered: where it holds a run, a new one goes into a folder beside it.
    `--resume_from_checkpoint latest` begins a new run where there is no checkpoint yet. Reads only.

    Raises: ValueError for a folder that holds another run, with the commands that go on; FileNotFoundError
        for a checkpoint that does not exist.
    """
    if not options.output_dir.strip():
        raise ValueError("--output_dir is empty; name a folder")
    if options.overwrite_output_dir and options.resume_from_checkpoint:
        raise ValueError(
            "--overwrite_output_dir begins a new run and --resume_from_checkpoint goes on with one; "
            "leave one of them out"
        )
    notices = []
    if options.output_dir == type(options).__dataclass_fields__["output_dir"].default:
        folder = _numbered(options)
        if folder != options.output_dir:
            notices.append(f"{options.output_dir} holds an earlier run; this one is in {folder}")
        options = dataclasses.replace(options, output_dir=folder)
    if options.resume_from_checkpoint == "latest" and not list_checkpoints(options.output_dir):
        notices.append(f"no checkpoint in {options.output_dir} yet: a new run begins")
        options = dataclasses.replace(options, resume_from_checkpoint=None)
    present = existing_results(options.output_dir)
    if options.resume_from_checkpoint:
        _check_resumed(options, find_checkpoint(options.resume_from_checkpoint, options.output_dir))
    elif present and not options.overwrite_output_dir:
        raise ValueError(_in_use(options.output_dir, present))
    return options, notices


def output_folders(options: TrainOptions) -> dict[str, str]:
    """Option -> folder that the run writes into."""
    folders = {"output_dir": options.output_dir}
    if options.cache_latents == "disk" and options.cache_dir is not None:
        folders["cache_dir"] = options.cache_dir
    if options.report_to != "none" and options.logging_dir is not None:
        folders["logging_dir"] = options.logging_dir
    class_images = getattr(options, "class_data_dir", None)
    if class_images is not None and count_images(class_images) < options.num_class_images:
        folders["class_data_dir"] = class_images
    return folders


def check_outside_data(options: TrainOptions) -> None:
    """Images that a run generates must never be found as training images by the next run.

    Folders that `datasets` saved hold tables, in which an image file is not looked for.

    Raises: ValueError for a folder that is written and is a folder of images, or lies in one; for images in
        the output folder of an earlier run, or where this run writes and removes files.
    """
    output = Path(options.output_dir).resolve()
    written = {name: Path(folder).resolve() for name, folder in output_folders(options).items()}
    for name in DATA_FOLDERS:
        value = getattr(options, name, None)
        if not value or is_embedded(value):
            continue
        folder = Path(resolve(value)).resolve()
        if not folder.is_dir() or any((folder / mark).exists() for mark in SAVED_DATASET_FILES):
            continue
        if all((folder / mark).exists() for mark in RUN_FILES):
            raise ValueError(
                f"--{name} {value!r} is the output folder of an earlier run, whose grid and samples would "
                "become training images; move your images into a folder that holds nothing else"
            )
        for option, place in written.items():
            if option != name and place.is_relative_to(folder):
                raise ValueError(
                    f"--{option} {getattr(options, option)!r} lies in --{name} {value!r}, where a later run "
                    "would take what this one writes for data; name a folder outside of it"
                )
        if _is_replaced(folder, output):
            raise ValueError(
                f"--{name} {value!r} is a folder that the run in {options.output_dir!r} replaces; name "
                "another --output_dir, or move the images"
            )


def check_outside_models(options: TrainOptions) -> None:
    """A run must not write into the models it is made of, nor remove one: its result needs them.

    Raises: ValueError for an output folder in the folder of a model, and for a model where a run writes.
    """
    output = Path(options.output_dir).resolve()
    for name in MODEL_FOLDERS:
        value = getattr(options, name)
        if not value or is_embedded(value) or not Path(value).is_dir():
            continue
        folder = Path(value).resolve()
        if output.is_relative_to(folder) or _is_replaced(folder, output):
            raise ValueError(
                f"--output_dir {options.output_dir!r} and --{name} {value!r} lie in one another, so the run "
                "would write into the model or remove it; name another --output_dir"
            )


def _is_replaced(folder: Path, output: Path) -> bool:
    """Whether a folder lies where a run writes its images and removes those of an older one."""
    if not folder.is_relative_to(output) or folder == output:
        return False
    inside = folder.relative_to(output)
    places = [Path(name) for name in (*RESULTS, *PROGRESS, "samples", "validation", "logs")]
    return inside.parts[0].startswith("checkpoint-") or any(inside.is_relative_to(place) for place in places)


def check_writable(folder: str, option: str) -> None:
    """Writes and removes a file in a folder, and what had to be made of its path.

    Raises: OSError naming the option, before any work is done for a run that could not keep it.
    """
    path = Path(folder)
    made = [place for place in (path, *path.parents) if not place.exists()]
    trial = path / f".trial-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"trial")
        trial.unlink()
    except OSError as error:
        raise OSError(f"--{option} {folder!r} cannot be written to ({error}); name another folder") from None
    finally:
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()


def check_subfolders(folder: str) -> None:
    """Raises: FileExistsError for a file where a run makes a folder, which would be noticed hours later."""
    output = Path(folder)
    places = [output / name for name in ("samples", "validation", "logs", "class_images")]
    for place in (*places, *output.glob("checkpoint-*")):
        if place.exists() and not place.is_dir():
            raise FileExistsError(
                f"{place} is a file where a run writes a folder; move it, or name another folder"
            )


def initialize(options: TrainOptions, run: str, *, is_resumed: bool) -> None:
    """Removes what an older run left in the output folder and writes config.yaml with the id of this run.

    Files that no run writes stay; class images stay too.
    """
    output = Path(options.output_dir)
    if not is_resumed:
        for path in list_checkpoints(output):
            shutil.rmtree(path)
        remove(output, [*RESULTS, *PROGRESS])
        for path in output.glob("validation/step-*"):
            shutil.rmtree(path)
    write_config(options, output, heading=f"{RUN_ID_PREFIX}{run}\n")


def remove(folder: Path, names: Sequence[str]) -> None:
    """Removes the files and folders of these names, where they exist."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def existing_results(folder: str | Path) -> list[str]:
    """Names of results and checkpoints in a folder, and of files of others that a run would replace."""
    folder = Path(folder)
    names = [name for name in RESULTS if (folder / name).exists()]
    names += [path.name for path in list_checkpoints(folder)]
    if run_id_in(folder) is None:
        names += [name for name in PROGRESS if (folder / name).exists()]
        names += ["validation"] if (folder / "validation").is_dir() else []
    return names


def run_id_in(folder: str | Path) -> str | None:
    """The id of the run that a folder belongs to; None where its config.yaml names none."""
    config = Path(folder) / "config.yaml"
    if not config.is_file():
        return None
    lines = config.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.removeprefix(RUN_ID_PREFIX) for line in lines if line.startswith(RUN_ID_PREFIX)), None)


def _numbered(options: TrainOptions) -> str:
    """The default folder or the first of folder-2, folder-3, ... that is free; to resume, the last in use."""
    candidates, number = [options.output_dir], 2
    while existing_results(candidates[-1]):
        candidates.append(f"{options.output_dir}-{number}")
        number += 1
    if options.overwrite_output_dir:
        return options.output_dir
    if options.resume_from_checkpoint and len(candidates) > 1:
        return candidates[-2]
    return candidates[-1]


def _check_resumed(options: TrainOptions, checkpoint: Path) -> None:
    """Raises: ValueError when the folder belongs to another run, or has gone on without the changes."""
    output, run = Path(options.output_dir), run_id_of(checkpoint)
    owner = run_id_in(output)
    present = existing_results(output)
    if present and run is not None and owner != run:
        raise ValueError(
            f"{output} holds another run ({_listed(present)}) than {checkpoint}; go on in another folder "
            "with --output_dir"
        )
    newest = list_checkpoints(output, run_id=run)[-1:]
    inside = checkpoint.resolve().parent == output.resolve()
    if options.accept_changes and inside and newest and newest[0].name != checkpoint.name:
        raise ValueError(
            f"--accept_changes from {checkpoint.name}, but {newest[0].name} was trained without the changes; "
            "go on in another folder with --output_dir"
        )


def _in_use(folder: str, present: Sequence[str]) -> str:
    number = 2
    while existing_results(f"{folder}-{number}"):
        number += 1
    return (
        f"{folder} holds a run already ({_listed(present)}).\n"
        f"  a new run beside it:  {this_command('--output_dir', f'{folder}-{number}')}\n"
        f"  to go on with it:     {this_command('--resume_from_checkpoint', 'latest')}\n"
        f"  to replace it:        {this_command('--overwrite_output_dir')}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
