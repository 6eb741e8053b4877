"""Drawing into files with any number of processes, and the folder in which they meet."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffadapt.common.contact_sheet import to_pil_images
from diffadapt.evaluation.features.extraction import advance
from diffadapt.models.sampling import ImageRequest, SamplingConfig, generate


def draw_files(
    pipe: DiffusionPipeline,
    wanted: Sequence[ImageRequest],
    sampler: SamplingConfig,
    paths: Sequence[Path],
    bar: tqdm,
) -> None:
    """Draws every image into its file, each process whole batches of them; returns when all are drawn.

    A batch holds the same images whatever the number of processes: so do the files.
    """
    state, size = PartialState(), sampler.batch_size
    starts = range(size * state.process_index, len(wanted), size * state.num_processes)
    mine = [index for start in starts for index in range(start, min(start + size, len(wanted)))]
    done = iter(mine)
    for images in generate(pipe, [wanted[index] for index in mine], sampler):
        for picture in to_pil_images(images):
            picture.save(paths[next(done)])
        advance(bar, len(images))
    state.wait_for_everyone()


@contextmanager
def passing_folder() -> Iterator[Path]:
    """A folder for images that are not kept: the first process makes it, names it to all, and removes it.

    Raises: ValueError with several machines, which share no such folder.
    """
    state = PartialState()
    if state.num_processes > int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)):
        raise ValueError("processes of several machines need a folder that all see: give --keep_images DIR")
    own = tempfile.TemporaryDirectory(prefix="diffadapt-images-") if state.is_main_process else nullcontext()
    with own as name:
        named = [name]
        broadcast_object_list(named)
        yield Path(named[0])
