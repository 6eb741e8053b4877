"""Images to features: every image is decoded once and goes through every extractor once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from diffadapt.common.messages import indented_list
from diffadapt.evaluation.features.cache import FeatureCache, identity_of
from diffadapt.evaluation.features.extractors.base import Extractor
from diffadapt.evaluation.features.feature_file import SetFeatures
from diffadapt.evaluation.features.prompt_groups import concatenate_rows, coordinates, prompt_batches
from diffadapt.evaluation.sets.image_files import ImageInfo, LazyImage
from diffadapt.evaluation.sets.image_sets import ImageSet

READERS = 4  # threads that decode images
BATCHES_AHEAD = 3  # decoded before the networks need them
LayerRows = dict[str, Tensor]  # layer -> (N, D)
DecodedImage = tuple[Tensor, ImageInfo] | Exception


@dataclass(frozen=True)
class ExtractedFeatures:
    """The features of a set.

    Attributes:
        features: extractor name -> layer -> (N, D), rows in the order of the set. Of LPIPS, and only in sets
            that know their prompts: `coordinates`, for the distances of images of one prompt.
        infos: of each image, in the same order.
        skipped: unreadable images that were left out, "name: reason".
    """

    features: Mapping[str, Mapping[str, Tensor]]
    infos: tuple[ImageInfo, ...]
    skipped: tuple[str, ...] = ()


@dataclass
class _Batch:
    """The outcome of one batch.

    Attributes:
        positions: of the readable images, in the set.
        infos: of the readable images.
        features: extractor name -> layer -> rows of the readable images; empty when none were computed.
        problems: position and "name: reason" of each unreadable image.
    """

    positions: list[int] = field(default_factory=list)
    infos: list[ImageInfo] = field(default_factory=list)
    features: dict[str, LayerRows] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def extract(
    image_set: ImageSet,
    extractors: Sequence[Extractor],
    *,
    batch_size: int = 32,
    skip_bad: bool = False,
    cache: FeatureCache | None = None,
    title: str = "features",
) -> ExtractedFeatures:
    """Features of a set under all extractors, from the cache where it has them all.

    With several processes each batch is computed by one of them, and all get the merged result in the set's
    order. Features from the cache are returned by the first process only.

    Args:
        image_set: the images.
        extractors: networks, each of which sees every image once.
        batch_size: images per forward.
        skip_bad: leave unreadable images out (they are listed) instead of raising.
        cache: for references: where to look first, and where new features are stored.
        title: of the progress bar.

    Raises:
        ValueError: images cannot be read, all of which are listed.
        FloatingPointError: an extractor gave NaN or infinity.
    """
    # LPIPS compares images of one prompt; without prompts its features are not needed.
    used_extractors = [e for e in extractors if image_set.prompts or not e.is_perceptual]
    cached, cached_names = _from_cache(image_set, used_extractors, cache)
    uncached = [extractor for extractor in used_extractors if extractor.name not in cached_names]
    cached_features = {}  # in the first process; empty in the others
    infos: tuple[ImageInfo, ...] = ()
    for name, content in cached.items():
        cached_features[name] = content.layers
        infos = infos or content.infos  # the same images of every extractor
    if cached_names and not uncached:
        return ExtractedFeatures(cached_features, infos)

    batches = [*gather_object(_run_batches(image_set, uncached, batch_size, skip_bad, title))]
    _refuse_mixed_sizes(image_set.source, batches, uncached)
    merged = _merge_batches(batches, uncached)
    if merged.skipped and not skip_bad:
        raise ValueError(
            f"{len(merged.skipped)} of {len(image_set)} images of {image_set.source!r} cannot be read; "
            f"repair or remove them, or give --skip_bad:\n{indented_list(merged.skipped)}"
        )
    if not merged.infos:
        raise ValueError(f"no image of {image_set.source!r} can be read:\n{indented_list(merged.skipped)}")
    _refuse_nonfinite(image_set.source, merged)
    if cache is not None and not merged.skipped and PartialState().is_main_process:
        _store(cache, merged, uncached)
    PartialState().wait_for_everyone()  # nobody reads a file that is still being written
    return ExtractedFeatures({**merged.features, **cached_features}, merged.infos, merged.skipped)


def advance(bar: tqdm, num_images: int) -> None:
    """Moves the first process's progress bar by what all processes have done meanwhile."""
    bar.update(min(num_images * PartialState().num_processes, bar.total - bar.n))


def _store(cache: FeatureCache, extracted: ExtractedFeatures, extractors: Sequence[Extractor]) -> None:
    for extractor in extractors:
        if not extractor.is_perceptual:  # coordinates within prompts mean nothing beside other images
            features = extracted.features[extractor.name]
            cache.put(extractor, SetFeatures(identity_of(extractor), features, extracted.infos))


def _from_cache(
    image_set: ImageSet, extractors: Sequence[Extractor], cache: FeatureCache | None
) -> tuple[dict[str, SetFeatures], list[str]]:
    """Features of a set in the cache, by extractor name, which the first process reads; and those names.

    Every process learns the names, as all must agree on what is left to compute.
    """
    if cache is None:
        return {}, []
    cached: dict[str, SetFeatures] = {}
    if PartialState().is_main_process:
        cached = _read_cache(image_set, extractors, cache)
    names = [list(cached)]
    broadcast_object_list(names)
    return cached, names[0]


def _read_cache(
    image_set: ImageSet, extractors: Sequence[Extractor], cache: FeatureCache
) -> dict[str, SetFeatures]:
    """Extractor name -> features in the cache; nothing when a file of the set cannot be read."""
    with ThreadPoolExecutor(READERS) as pool:
        try:
            digests = list(pool.map(lambda image: image.digest(), image_set.images))
        except (OSError, ValueError):
            return {}
    names = image_set.names
    cached: dict[str, SetFeatures] = {}
    for extractor in extractors:
        if not extractor.is_perceptual:
            content = cache.get(extractor, digests, names)
            if content is not None:
                cached[extractor.name] = content
    return cached


def _run_batches(
    image_set: ImageSet, extractors: Sequence[Extractor], batch_size: int, skip_bad: bool, title: str
) -> list[_Batch]:
    """Decodes and extracts this process's share of the batches.

    After the first bad image, unless bad images are skipped, the others are only decoded, so that the error
    can list all bad ones.
    """
    state = PartialState()
    needs_one_size = any(extractor.preset == "none" for extractor in extractors)
    has_perceptual = any(extractor.is_perceptual for extractor in extractors)
    prompts = image_set.prompts if has_perceptual else ()  # LPIPS needs whole prompts in a batch
    process_batches = prompt_batches(len(image_set), batch_size, prompts)[
        state.process_index :: state.num_processes
    ]
    finished: list[_Batch] = []
    sizes: set[torch.Size] = set()
    has_failed = False
    with tqdm(desc=title, total=len(image_set), unit="image", disable=not state.is_main_process) as bar:
        for positions, decoded in _decode_ahead(image_set.images, process_batches):
            batch = _Batch()
            pixels: list[Tensor] = []  # each (3, H, W)
            for position, item in zip(positions, decoded, strict=True):
                if isinstance(item, Exception):
                    name = image_set.images[position].name
                    batch.problems.append((position, f"{name}: {item or type(item).__name__}"))
                    continue
                image, info = item
                pixels.append(image)
                sizes.add(image.shape)
                batch.infos.append(info)
                batch.positions.append(position)
            if (batch.problems and not skip_bad) or (needs_one_size and len(sizes) > 1):
                has_failed = True
            if pixels and not has_failed:
                batch_prompts = [prompts[position] for position in batch.positions] if prompts else []
                batch.features = _extract_batch(pixels, extractors, batch_size, batch_prompts)
            finished.append(batch)
            advance(bar, len(decoded))
    return finished


def _decode_ahead(
    images: Sequence[LazyImage], batches: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[DecodedImage]]]:
    """Batches of decoded images in order; threads decode a few batches ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        pending: deque[tuple[Sequence[int], list[Future]]] = deque()
        for positions in batches:
            futures = [pool.submit(_decode, images[position]) for position in positions]
            pending.append((positions, futures))
            if len(pending) > BATCHES_AHEAD:
                yield _results_of(*pending.popleft())
        for positions, futures in pending:
            yield _results_of(positions, futures)


def _results_of(
    positions: Sequence[int], futures: Sequence[Future]
) -> tuple[Sequence[int], list[DecodedImage]]:
    """Positions and decoded images of a batch, when its threads are done."""
    return positions, [future.result() for future in futures]


def _decode(image: LazyImage) -> DecodedImage:
    try:
        return image.load()
    except Exception as error:  # damaged files make Pillow raise almost anything; it is reported, not dropped
        return error


def _extract_batch(
    images: Sequence[Tensor], extractors: Sequence[Extractor], batch_size: int, prompts: Sequence[str]
) -> dict[str, LayerRows]:
    """Extractor name -> layer -> rows of a batch.

    A batch that holds all images of its prompts may be larger than `batch_size`; it is split for the
    networks.
    """
    chunks = []
    for start in range(0, len(images), batch_size):
        chunks.append(_forward(images[start : start + batch_size], extractors))
    features: dict[str, LayerRows] = {}
    for extractor in extractors:
        rows: LayerRows = {}
        for layer in extractor.layers:
            rows[layer] = torch.cat([chunk[extractor.name][layer] for chunk in chunks])  # (B, D)
        if extractor.is_perceptual:
            layer = extractor.perceptual_layer
            rows = {layer: coordinates(rows[layer], prompts)}
        features[extractor.name] = rows
    return features


def _forward(images: Sequence[Tensor], extractors: Sequence[Extractor]) -> dict[str, LayerRows]:
    """One forward of each extractor on images (3, H, W) of any sizes, resized in groups of one size."""
    rows_by_shape: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        rows_by_shape.setdefault(image.shape, []).append(row)
    features = {}
    for extractor in extractors:
        prepared: list[Tensor] = [torch.empty(0)] * len(images)  # all are replaced below
        for rows in rows_by_shape.values():
            pixels = extractor.prepare(torch.stack([images[row] for row in rows]))  # (R, 3, side, side)
            for row, image in zip(rows, pixels, strict=True):
                prepared[row] = image
        features[extractor.name] = extractor.forward(torch.stack(prepared))
    return features


def _refuse_mixed_sizes(source: str, batches: Sequence[_Batch], extractors: Sequence[Extractor]) -> None:
    """Refuses images of several sizes when an extractor takes them without a resize."""
    without_resize = [extractor.name for extractor in extractors if extractor.preset == "none"]
    examples: dict[tuple[int, int], str] = {}  # size -> an image that has it
    for batch in batches:
        for info in batch.infos:
            examples[info.width, info.height] = info.name
    if without_resize and len(examples) > 1:
        described = []
        for (width, height), name in examples.items():
            described.append(f"{width}x{height} ({name})")
        sizes = ", ".join(described)
        raise ValueError(
            f"--resize none needs images of one size for {', '.join(without_resize)}; {source!r} has "
            f"{sizes}; give another resize, such as clean"
        )


def _merge_batches(batches: list[_Batch], extractors: Sequence[Extractor]) -> ExtractedFeatures:
    """All processes' batches in the order of the set."""
    problems: list[tuple[int, str]] = []
    complete: list[_Batch] = []  # those with features; a batch of unreadable images has none
    for batch in batches:
        problems += batch.problems
        if batch.features or not extractors:
            complete.append(batch)
    complete.sort(key=lambda batch: batch.positions)
    positions: list[int] = []
    infos: list[ImageInfo] = []
    for batch in complete:
        positions += batch.positions
        infos += batch.infos
    # Batches of whole prompts hold positions from all over the set.
    order = sorted(range(len(positions)), key=positions.__getitem__)
    is_sorted = positions == sorted(positions)
    features: dict[str, LayerRows] = {}
    if complete:
        for extractor in extractors:
            features[extractor.name] = {}
            for layer in extractor.layers:
                parts = [batch.features[extractor.name][layer] for batch in complete]
                rows = concatenate_rows(parts)  # (N, D)
                features[extractor.name][layer] = rows if is_sorted else rows[order]  # spares a copy
    sorted_infos = tuple(infos[row] for row in order)
    skipped = tuple(line for _, line in sorted(problems))
    return ExtractedFeatures(features, sorted_infos, skipped)


def _refuse_nonfinite(source: str, extracted: ExtractedFeatures) -> None:
    """Refuses features that no metric could use, and names the first image that has them."""
    for name, layers in extracted.features.items():
        for layer, rows in layers.items():
            bad_rows = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
            if bad_rows:
                first_name = extracted.infos[bad_rows[0]].name
                raise FloatingPointError(
                    f"{name} gave NaN or infinity in layer {layer!r} for {len(bad_rows)} of {len(rows)} "
                    f"images of {source!r}, first {first_name}; check its weights"
                )
