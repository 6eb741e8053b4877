"""The output folder of a run: which one it may use, and what an earlier run left in it.

In the order of a run: the folder is chosen (`resolve_output_dir`), checked against data and models, tried by
writing (`check_writable`), and taken over (`initialize`).
"""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffadapt.data.class_images import count_images
from diffadapt.data.hub_tables import SAVED_DATASET_FILES
from diffadapt.formats.export import TARGETS
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
RUN_FILES = ("config.yaml", "log.jsonl")  # a folder with both is that of a run
RUN_ID_PREFIX = "# run "  # of config.yaml, before the id of the run that wrote it
EXPORTS = tuple(f"adapter{target.ending}" for target in TARGETS.values())
RESULTS = ("adapter.safetensors", *EXPORTS, "run.json", "README.md", "grid.png")
PROGRESS = ("config.yaml", "log.jsonl", "samples/before", "samples/after", "logs/diffadapt")
SUBFOLDERS = ("samples", "validation", "logs", "class_images")


# Choosing the folder


def resolve_output_dir(options: OptionsT) -> tuple[OptionsT, list[str]]:
    """Chooses an output folder that this run may use. Reads only.

    A script's default folder is numbered: where it holds a run, a new one goes into a folder beside it.
    `--resume_from_checkpoint latest` begins a new run where there is no checkpoint yet.

    Returns:
        The options with that folder, and lines to print about it.

    Raises:
        ValueError: the folder holds another run; the message has the commands that go on.
        FileNotFoundError: the checkpoint does not exist.
    """
    if not options.output_dir.strip():
        raise ValueError("--output_dir is empty; name a folder")
    if options.overwrite_output_dir and options.resume_from_checkpoint:
        raise ValueError(
            "--overwrite_output_dir begins a new run and --resume_from_checkpoint goes on with one; "
            "leave one of them out"
        )
    notices = []
    # numbered only where nobody chose the folder; a chosen one is refused below if it is in use
    if options.output_dir == type(options).__dataclass_fields__["output_dir"].default:
        folder = _numbered_folder(options)
        if folder != options.output_dir:
            notices.append(f"{options.output_dir} holds an earlier run; this one is in {folder}")
        options = dataclasses.replace(options, output_dir=folder)
    if options.resume_from_checkpoint == "latest" and not list_checkpoints(options.output_dir):
        notices.append(f"no checkpoint in {options.output_dir} yet: a new run begins")
        options = dataclasses.replace(options, resume_from_checkpoint=None)
    results = existing_results(options.output_dir)
    if options.resume_from_checkpoint:
        _check_resumed(options, find_checkpoint(options.resume_from_checkpoint, options.output_dir))
    elif results and not options.overwrite_output_dir:
        raise ValueError(_in_use_message(options.output_dir, results))
    return options, notices


def existing_results(folder: str | Path) -> list[str]:
    """Names of results and checkpoints in a folder, and of files of others that a run would replace."""
    folder = Path(folder)
    names = [name for name in RESULTS if (folder / name).exists()]
    names += [path.name for path in list_checkpoints(folder)]
    # In a folder of no run, files with such names belong to somebody else and would be replaced.
    if run_id_in(folder) is None:
        names += [name for name in PROGRESS if (folder / name).exists()]
        if (folder / "validation").is_dir():
            names.append("validation")
    return names


def run_id_in(folder: str | Path) -> str | None:
    """The id of the run that a folder belongs to; None where its config.yaml names none."""
    config = Path(folder) / "config.yaml"
    if not config.is_file():
        return None
    for line in config.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(RUN_ID_PREFIX):
            return line.removeprefix(RUN_ID_PREFIX)
    return None


def _numbered_folder(options: TrainOptions) -> str:
    """The default folder or the first of folder-2, folder-3, ... that is free; to resume, the last in use."""
    folders = [options.output_dir]
    while existing_results(folders[-1]):
        folders.append(f"{options.output_dir}-{len(folders) + 1}")
    if options.overwrite_output_dir:
        return options.output_dir
    if options.resume_from_checkpoint and len(folders) > 1:
        return folders[-2]  # the last one is free
    return folders[-1]


def _check_resumed(options: TrainOptions, checkpoint: Path) -> None:
    """Checks that the folder belongs to the run of the checkpoint, and has not gone on without its changes.

    Raises:
        ValueError: it does not, or has; the message has the remedy, another folder.
    """
    output = Path(options.output_dir)
    run_id = run_id_of(checkpoint)
    results = existing_results(output)
    if results and run_id is not None and run_id_in(output) != run_id:
        raise ValueError(
            f"{output} holds another run ({_shorten(results)}) than {checkpoint}; go on in another folder "
            "with --output_dir"
        )
    is_inside = checkpoint.resolve().parent == output.resolve()
    checkpoints = list_checkpoints(output, run_id=run_id)
    # with changed options the later checkpoints would be of another run than the one that goes on here
    if options.accept_changes and is_inside and checkpoints and checkpoints[-1].name != checkpoint.name:
        raise ValueError(
            f"--accept_changes from {checkpoint.name}, but {checkpoints[-1].name} was trained without the "
            "changes; go on in another folder with --output_dir"
        )


def _in_use_message(folder: str, results: Sequence[str]) -> str:
    number = 2
    while existing_results(f"{folder}-{number}"):
        number += 1
    return (
        f"{folder} holds a run already ({_shorten(results)}).\n"
        f"  a new run beside it:  {this_command('--output_dir', f'{folder}-{number}')}\n"
        f"  to go on with it:     {this_command('--resume_from_checkpoint', 'latest')}\n"
        f"  to replace it:        {this_command('--overwrite_output_dir')}"
    )


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


# Checks against the folders of data and models


def output_folders(options: TrainOptions) -> dict[str, str]:
    """The folders that the run writes into: option -> folder."""
    folders = {"output_dir": options.output_dir}
    if options.cache_latents == "disk" and options.cache_dir is not None:
        folders["cache_dir"] = options.cache_dir
    if options.report_to != "none" and options.logging_dir is not None:
        folders["logging_dir"] = options.logging_dir
    class_folder = getattr(options, "class_data_dir", None)
    # written only where class images are missing
    if class_folder is not None and count_images(class_folder) < options.num_class_images:
        folders["class_data_dir"] = class_folder
    return folders


def check_outside_data(options: TrainOptions) -> None:
    """Checks that images which a run generates cannot become training images of the next run.

    Folders that `datasets` saved hold tables, in which an image file is not looked for.

    Raises:
        ValueError: a folder that is written is a folder of images, or lies in one; or images lie in the
            output folder of an earlier run, or where this run writes and removes files.
    """
    output = Path(options.output_dir).resolve()
    for name in DATA_FOLDERS:
        value = getattr(options, name, None)
        if not value or is_embedded(value):
            continue
        folder = Path(resolve(value)).resolve()
        is_saved_dataset = any((folder / file).exists() for file in SAVED_DATASET_FILES)
        if not folder.is_dir() or is_saved_dataset:
            continue
        if all((folder / file).exists() for file in RUN_FILES):
            raise ValueError(
                f"--{name} {value!r} is the output folder of an earlier run, whose grid and samples would "
                "become training images; move your images into a folder that holds nothing else"
            )
        for option, written in output_folders(options).items():
            if option != name and Path(written).resolve().is_relative_to(folder):
                raise ValueError(
                    f"--{option} {written!r} lies in --{name} {value!r}, where a later run would take what "
                    "this one writes for data; name a folder outside of it"
                )
        if _is_replaced(folder, output):
            raise ValueError(
                f"--{name} {value!r} is a folder that the run in {options.output_dir!r} replaces; name "
                "another --output_dir, or move the images"
            )


def check_outside_models(options: TrainOptions) -> None:
    """Checks that a run neither writes into the models it uses nor removes one: its result needs them.

    Raises:
        ValueError: the output folder lies in the folder of a model, or a model lies where a run writes.
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
    if inside.parts[0].startswith("checkpoint-"):
        return True
    return any(inside.is_relative_to(name) for name in (*RESULTS, *PROGRESS, "samples", "validation", "logs"))


# Trying it, before any work is done for a run that could not keep its result


def check_writable(folder: str, option: str) -> None:
    """Writes and removes a file in a folder, and what had to be made of its path.

    Raises:
        OSError: it cannot be written to; the message names the option.
    """
    path = Path(folder)
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]  # the innermost first
    trial = path / f".trial-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"trial")
        trial.unlink()
    except OSError as error:
        raise OSError(f"--{option} {folder!r} cannot be written to ({error}); name another folder") from None
    finally:
        # The path itself is made when the run starts, not by a check.
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def check_subfolders(folder: str) -> None:
    """Checks that no file stands where a run makes a folder, which would be noticed hours later.

    Raises:
        FileExistsError: there is one; the message names it.
    """
    output = Path(folder)
    paths = [output / name for name in SUBFOLDERS]
    paths += output.glob("checkpoint-*")
    for path in paths:
        if path.exists() and not path.is_dir():
            raise FileExistsError(
                f"{path} is a file where a run writes a folder; move it, or name another folder"
            )


# Taking it over


def initialize(options: TrainOptions, run_id: str, *, is_resumed: bool) -> None:
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
    write_config(options, output, heading=f"{RUN_ID_PREFIX}{run_id}\n")


def remove(folder: Path, names: Sequence[str]) -> None:
    """Removes the files and folders of these names, where they exist."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():  # of a link, the link itself and not what it leads to
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
