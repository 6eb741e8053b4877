"""Images to features: every image is decoded once and goes through every extractor once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from diffadapt.data.images import listed
from diffadapt.evaluation.cache import FeatureCache, identity_of
from diffadapt.evaluation.extractors.base import Extractor
from diffadapt.evaluation.feature_file import SetFeatures
from diffadapt.evaluation.image_sets import ImageSet
from diffadapt.evaluation.pictures import Facts, Picture

READERS = 4  # threads that decode
AHEAD = 3  # batches decoded ahead of the networks
Loaded = tuple[Tensor, Facts] | Exception


@dataclass(frozen=True)
class Extracted:
    """A set's features: extractor name -> layer -> (N, D), rows and facts in the order of the set."""

    features: Mapping[str, Mapping[str, Tensor]]
    facts: tuple[Facts, ...]
    skipped: tuple[str, ...] = ()  # unreadable, "name: reason"


@dataclass
class _Batch:
    index: int
    facts: list[Facts] = field(default_factory=list)
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


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

    With several processes every batch is one process's, and all get the merged result, in the set's order.

    Args:
        skip_bad: leave unreadable images out (they are listed) instead of raising.
        cache: for references: looks there first, and keeps what was made.
    Raises: ValueError that lists all unreadable images; FloatingPointError for features that are not finite.
    """
    kept = _kept(images, extractors, cache)
    missing = [e for e in extractors if e.name not in kept]
    if not missing:
        return Extracted({name: c.layers for name, c in kept.items()}, next(iter(kept.values())).facts)
    made = _merged(_run(images.pictures, missing, batch_size, skip_bad, title), missing)
    if made.skipped and not skip_bad:
        raise ValueError(
            f"{len(made.skipped)} of {len(images)} images of {images.source!r} cannot be read; repair or "
            f"remove them, or give --skip_bad:\n{listed(made.skipped)}"
        )
    if not made.facts:
        raise ValueError(f"no image of {images.source!r} can be read:\n{listed(made.skipped)}")
    _refuse_broken(images.source, made)
    if cache is not None and not made.skipped and PartialState().is_main_process:
        for extractor in missing:
            cache.put(
                extractor, SetFeatures(identity_of(extractor), made.features[extractor.name], made.facts)
            )
    PartialState().wait_for_everyone()  # nobody looks for what is still being written
    return Extracted({**made.features, **{n: c.layers for n, c in kept.items()}}, made.facts, made.skipped)


def _kept(
    images: ImageSet, extractors: Sequence[Extractor], cache: FeatureCache | None
) -> dict[str, SetFeatures]:
    """What the cache has of a set; nothing when one of its files cannot be read."""
    if cache is None:
        return {}
    with ThreadPoolExecutor(READERS) as pool:
        try:
            digests = list(pool.map(lambda picture: picture.digest(), images.pictures))
        except (OSError, ValueError):
            return {}
    names = [picture.name for picture in images.pictures]
    found = {extractor.name: cache.get(extractor, digests, names) for extractor in extractors}
    return {name: content for name, content in found.items() if content is not None}


def _run(
    pictures: Sequence[Picture], extractors: Sequence[Extractor], size: int, skip_bad: bool, title: str
) -> list[_Batch]:
    """This process's batches. After the first bad image, unless skipped, the rest is only checked."""
    state = PartialState()
    starts = list(range(0, len(pictures), size))[state.process_index :: state.num_processes]
    done, failed = [], False
    with tqdm(desc=title, total=len(pictures), unit="image", disable=not state.is_main_process) as bar:
        for start, loaded in _decoded(pictures, starts, size):
            batch = _Batch(start // size)
            for picture, item in zip(pictures[start : start + size], loaded, strict=True):
                if isinstance(item, Exception):
                    batch.problems.append(f"{picture.name}: {item or type(item).__name__}")
            good = [item for item in loaded if not isinstance(item, Exception)]
            failed = failed or (bool(batch.problems) and not skip_bad)
            if good and not failed:
                batch.facts = [facts for _, facts in good]
                batch.layers = _forward([pixels for pixels, _ in good], extractors)
            done.append(batch)
            bar.update(len(loaded) * state.num_processes)
    return done


def _decoded(
    pictures: Sequence[Picture], starts: Sequence[int], size: int
) -> Iterator[tuple[int, list[Loaded]]]:
    """Batches of decoded images in order, read by threads a few batches ahead."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[tuple[int, list[Future]]] = deque()
        for start in starts:
            waiting.append((start, [pool.submit(_load, p) for p in pictures[start : start + size]]))
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


def _merged(mine: list[_Batch], extractors: Sequence[Extractor]) -> Extracted:
    """All processes' batches in the order of the set."""
    batches = sorted(gather_object(mine), key=lambda batch: batch.index)
    full = [batch for batch in batches if batch.facts]
    features = {
        e.name: {layer: torch.cat([b.layers[e.name][layer] for b in full]) for layer in e.layers}
        for e in extractors
        if full
    }
    facts = tuple(facts for batch in full for facts in batch.facts)
    return Extracted(features, facts, tuple(line for batch in batches for line in batch.problems))


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
