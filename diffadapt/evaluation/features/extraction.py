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
from diffadapt.evaluation.features.prompt_groups import batches_of, coordinates, stacked
from diffadapt.evaluation.sets.image_files import Facts, Picture
from diffadapt.evaluation.sets.image_sets import ImageSet

READERS = 4  # threads that decode
AHEAD = 3  # batches decoded ahead of the networks
Loaded = tuple[Tensor, Facts] | Exception


@dataclass(frozen=True)
class Extracted:
    """A set's features: extractor name -> layer -> (N, D), rows and facts in the order of the set.

    Of LPIPS, only in sets that know their prompts: `coordinates`, for the distances of images of one prompt.
    """

    features: Mapping[str, Mapping[str, Tensor]]
    facts: tuple[Facts, ...]
    skipped: tuple[str, ...] = ()  # unreadable, "name: reason"


@dataclass
class _Batch:
    """What came of one batch; `positions` in the set of its readable images, and of each problem."""

    positions: list[int] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def extract(
    images: ImageSet,
    extractors: Sequence[Extractor],
    *,
    batch_size: int = 32,
    skip_bad: bool = False,
    cache: FeatureCache | None = None,
    title: str = "features",
) -> Extracted:
    """Features of a set under all extractors, from the cache where one has them all.

    With several processes every batch is one process's, and all get the merged result, in the set's order;
    what the cache has, the first process alone gets.

    Args:
        skip_bad: leave unreadable images out (they are listed) instead of raising.
        cache: for references: looks there first, and keeps what was made.
    Raises: ValueError that lists all unreadable images; FloatingPointError for features that are not finite.
    """
    used = [e for e in extractors if e.perceptual is None or images.prompts]
    kept, known = _kept(images, used, cache)
    missing = [e for e in used if e.name not in known]
    if known and not missing:
        facts = next((content.facts for content in kept.values()), ())
        return Extracted({name: content.layers for name, content in kept.items()}, facts)
    batches = [*gather_object(_run(images, missing, batch_size, skip_bad, title))]
    _refuse_mixed_sizes(images.source, batches, missing)
    made = _merged(batches, missing)
    if made.skipped and not skip_bad:
        raise ValueError(
            f"{len(made.skipped)} of {len(images)} images of {images.source!r} cannot be read; repair or "
            f"remove them, or give --skip_bad:\n{indented_list(made.skipped)}"
        )
    if not made.facts:
        raise ValueError(f"no image of {images.source!r} can be read:\n{indented_list(made.skipped)}")
    _refuse_broken(images.source, made)
    if cache is not None and not made.skipped and PartialState().is_main_process:
        _keep(cache, made, missing)
    PartialState().wait_for_everyone()  # nobody looks for what is still being written
    return Extracted({**made.features, **{n: c.layers for n, c in kept.items()}}, made.facts, made.skipped)


def _keep(cache: FeatureCache, made: Extracted, extractors: Sequence[Extractor]) -> None:
    for e in extractors:
        if e.perceptual is None:
            cache.put(e, SetFeatures(identity_of(e), made.features[e.name], made.facts))


def _kept(
    images: ImageSet, extractors: Sequence[Extractor], cache: FeatureCache | None
) -> tuple[dict[str, SetFeatures], list[str]]:
    """What the cache has of a set, and the names of those extractors, which the first process tells all."""
    if cache is None:
        return {}, []
    kept = _found(images, extractors, cache) if PartialState().is_main_process else {}
    names = [list(kept)]
    broadcast_object_list(names)
    return kept, names[0]


def _found(images: ImageSet, extractors: Sequence[Extractor], cache: FeatureCache) -> dict[str, SetFeatures]:
    """Extractor name -> what the cache has; nothing when a file of the set cannot be read."""
    with ThreadPoolExecutor(READERS) as pool:
        try:
            digests = list(pool.map(lambda picture: picture.digest(), images.pictures))
        except (OSError, ValueError):
            return {}
    names = [picture.name for picture in images.pictures]
    found = {e.name: cache.get(e, digests, names) for e in extractors if e.perceptual is None}
    return {name: content for name, content in found.items() if content is not None}


def _run(
    images: ImageSet, extractors: Sequence[Extractor], size: int, skip_bad: bool, title: str
) -> list[_Batch]:
    """This process's batches. After the first bad image, unless skipped, the rest is only checked."""
    state, done, failed = PartialState(), [], False
    needs_one_size = any(e.preset == "none" for e in extractors)
    sizes: set[torch.Size] = set()
    groups = images.prompts if any(e.perceptual for e in extractors) else ()
    mine = batches_of(len(images), size, groups)[state.process_index :: state.num_processes]
    with tqdm(desc=title, total=len(images), unit="image", disable=not state.is_main_process) as bar:
        for positions, loaded in _decoded(images.pictures, mine):
            batch, pixels = _Batch(), []
            for position, item in zip(positions, loaded, strict=True):
                if isinstance(item, Exception):
                    line = f"{images.pictures[position].name}: {item or type(item).__name__}"
                    batch.problems.append((position, line))
                    continue
                pixels.append(item[0])
                batch.facts.append(item[1])
                batch.positions.append(position)
            sizes |= {image.shape for image in pixels}
            failed = failed or (bool(batch.problems) and not skip_bad) or (needs_one_size and len(sizes) > 1)
            if pixels and not failed:
                batch.layers = _layers(
                    pixels, extractors, size, [groups[p] for p in batch.positions if groups]
                )
            done.append(batch)
            advance(bar, len(loaded))
    return done


def _layers(
    images: Sequence[Tensor], extractors: Sequence[Extractor], size: int, groups: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Extractor name -> layer -> rows of a batch, at most `size` images in one forward."""
    parts = [_forward(images[start : start + size], extractors) for start in range(0, len(images), size)]
    found = {
        e.name: {layer: torch.cat([part[e.name][layer] for part in parts]) for layer in e.layers}
        for e in extractors
    }
    for e in extractors:
        if e.perceptual is not None:
            found[e.name] = {e.perceptual: coordinates(found[e.name][e.perceptual], groups)}
    return found


def advance(bar: tqdm, images: int) -> None:
    """Moves the first process's bar by what all processes did meanwhile."""
    bar.update(min(images * PartialState().num_processes, bar.total - bar.n))


def _decoded(
    pictures: Sequence[Picture], batches: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[Loaded]]]:
    """Batches of decoded images in order, read by threads a few batches ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[tuple[Sequence[int], list[Future]]] = deque()
        for positions in batches:
            waiting.append((positions, [pool.submit(_load, pictures[place]) for place in positions]))
            if len(waiting) > AHEAD:
                first, futures = waiting.popleft()
                yield first, [future.result() for future in futures]
        for first, futures in waiting:
            yield first, [future.result() for future in futures]


def _load(picture: Picture) -> Loaded:
    try:
        return picture.load()
    except Exception as error:  # damaged files make Pillow raise almost anything; it is reported, not dropped
        return error


def _forward(images: Sequence[Tensor], extractors: Sequence[Extractor]) -> dict[str, dict[str, Tensor]]:
    """One forward of each extractor on a batch of (3, H, W) images of any sizes."""
    found = {}
    for extractor in extractors:
        prepared: list[Tensor] = [torch.empty(0)] * len(images)
        for shape in {image.shape for image in images}:
            rows = [row for row, image in enumerate(images) if image.shape == shape]
            pixels = extractor.prepare(torch.stack([images[row] for row in rows]))
            for row, image in zip(rows, pixels, strict=True):
                prepared[row] = image
        found[extractor.name] = extractor.forward(torch.stack(prepared))
    return found


def _refuse_mixed_sizes(source: str, batches: Sequence[_Batch], extractors: Sequence[Extractor]) -> None:
    """Raises: ValueError for images of several sizes that no resize makes equal."""
    unsized = [extractor.name for extractor in extractors if extractor.preset == "none"]
    examples = {(facts.width, facts.height): facts.name for batch in batches for facts in batch.facts}
    if unsized and len(examples) > 1:
        sizes = ", ".join(f"{width}x{height} ({name})" for (width, height), name in examples.items())
        raise ValueError(
            f"--resize none needs images of one size for {', '.join(unsized)}; {source!r} has {sizes}; "
            "give another resize, such as clean"
        )


def _merged(batches: list[_Batch], extractors: Sequence[Extractor]) -> Extracted:
    """All processes' batches in the order of the set."""
    skipped = tuple(line for _, line in sorted(problem for batch in batches for problem in batch.problems))
    full = sorted((b for b in batches if b.layers or not extractors), key=lambda batch: batch.positions)
    places = [position for batch in full for position in batch.positions]
    order = sorted(range(len(places)), key=places.__getitem__)
    is_sorted = places == sorted(places)
    features = {}
    for e in extractors if full else ():
        rows = {layer: stacked([batch.layers[e.name][layer] for batch in full]) for layer in e.layers}
        features[e.name] = rows if is_sorted else {layer: own[order] for layer, own in rows.items()}
    facts = [facts for batch in full for facts in batch.facts]
    return Extracted(features, tuple(facts[place] for place in order), skipped)


def _refuse_broken(source: str, made: Extracted) -> None:
    for name, layers in made.features.items():
        for layer, rows in layers.items():
            broken = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
            if broken:
                first = made.facts[broken[0]].name
                raise FloatingPointError(
                    f"{name} gave NaN or infinity in layer {layer!r} for {len(broken)} of {len(rows)} images "
                    f"of {source!r}, first {first}; check its weights"
                )
