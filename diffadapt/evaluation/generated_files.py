"""Generates images into files with any number of processes, in a folder that all of them see."""

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


def generate_files(
    pipe: DiffusionPipeline,
    requests: Sequence[ImageRequest],
    sampling: SamplingConfig,
    paths: Sequence[Path],
    bar: tqdm,
) -> None:
    """Generates every image into its file, each process whole batches of them; returns when all are written.

    A batch holds the same images whatever the number of processes, so that the files are the same too.

    Args:
        pipe: the pipeline, with or without an adapter.
        requests: prompt and seed of each image.
        sampling: how they are sampled.
        paths: the file of each image.
        bar: progress bar of the first process, one step per image.
    """
    state = PartialState()
    batch_size = sampling.batch_size
    indices: list[int] = []  # of this process's images: every n-th batch of n processes
    for start in range(batch_size * state.process_index, len(requests), batch_size * state.num_processes):
        indices += range(start, min(start + batch_size, len(requests)))
    process_requests = [requests[index] for index in indices]
    remaining_indices = iter(indices)
    for images in generate(pipe, process_requests, sampling):
        for image in to_pil_images(images):
            image.save(paths[next(remaining_indices)])
        advance(bar, len(images))
    state.wait_for_everyone()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for images that are not kept: the first process makes it, shares its name, and removes it.

    Raises:
        ValueError: the processes run on several machines, which share no such folder.
    """
    state = PartialState()
    if state.num_processes > int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)):
        raise ValueError("processes of several machines need a folder that all see: give --keep_images DIR")
    if state.is_main_process:
        folder = tempfile.TemporaryDirectory(prefix="diffadapt-images-")
    else:
        folder = nullcontext()
    with folder as name:
        shared_name = [name]
        broadcast_object_list(shared_name)
        yield Path(shared_name[0])
