"""What two sets share, and whether they were stored alike: what silently spoils every comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from diffadapt.common.messages import indented_list
from diffadapt.evaluation.sets.image_files import Facts

NEAR_BITS = 2  # of 64 bits of a difference hash, in images that look the same
MIN_BITS = 8  # a hash with fewer bits set, or unset, is of a nearly flat image and says nothing
LOSSY = {"JPEG", "WEBP", "MPO"}
ROWS = 1024  # hashes compared at a time
SHOWN = 5  # pairs named in a warning
Pairs = list[tuple[str, str]]  # names: generated, real


def same_images(first: Sequence[Facts], second: Sequence[Facts]) -> Pairs:
    """Pairs with the same pixels, whatever the file; of each image of the first set at most one."""
    where = {facts.pixels: facts.name for facts in second}
    return [(facts.name, where[facts.pixels]) for facts in first if facts.pixels in where]


def mirrored_images(first: Sequence[Facts], second: Sequence[Facts]) -> Pairs:
    """Pairs in which one is exactly the mirror image of the other (and not the same: no symmetric image)."""
    where = {facts.mirrored: facts for facts in second}
    found = ((facts, where[facts.pixels]) for facts in first if facts.pixels in where)
    return [(own.name, other.name) for own, other in found if own.pixels != other.pixels]


def lookalikes(first: Sequence[Facts], second: Sequence[Facts]) -> Pairs:
    """Pairs of different pixels whose difference hashes agree to NEAR_BITS, one of them mirrored or not."""
    own = _bits([facts.dhash for facts in first])
    found: dict[str, str] = {}
    for kind in ("dhash", "dhash_mirrored"):
        others = _bits([getattr(facts, kind) for facts in second])
        for start in range(0, len(own), ROWS):
            rows = own[start : start + ROWS]
            distances = rows.sum(1)[:, None] + others.sum(1)[None] - 2 * rows @ others.T
            for row, column in zip(*np.nonzero(distances <= NEAR_BITS), strict=True):
                a, b = first[start + row], second[column]
                if b.pixels != a.pixels != b.mirrored and MIN_BITS <= rows[row].sum() <= 64 - MIN_BITS:
                    found.setdefault(a.name, b.name)
    return list(found.items())


def check_sets(
    generated: Sequence[Facts], real: Sequence[Facts], *, label: str, allow_overlap: bool
) -> list[str]:
    """Warnings about a generated set and its reference.

    Raises: ValueError when all generated images stand in the reference, unless `allow_overlap`.
    """
    warnings = []
    same, mirrored = same_images(generated, real), mirrored_images(generated, real)
    if len({name for name, _ in [*same, *mirrored]}) == len(generated) and not allow_overlap:
        how = "" if same else ", mirrored"
        raise ValueError(
            f"all {len(generated)} images of {label!r} stand in the reference too{how}: the same folder "
            "twice? Name two different sets, or give --allow_overlap"
        )
    for pairs, what in (
        (same, "stand in the reference too"),
        (mirrored, "are mirror images of reference images"),
        (lookalikes(generated, real), "look like a reference image, mirrored or not (difference hash)"),
    ):
        if pairs:
            named = indented_list([f"{a} = {b}" for a, b in pairs], limit=SHOWN)
            warnings.append(f"{label}: {len(pairs)} of {len(generated)} images {what}:\n{named}")
    return [*warnings, *_stored_differently(generated, real, label)]


def check_repeats(facts: Sequence[Facts], *, label: str) -> list[str]:
    """A warning when a set holds the same image more than once."""
    counts = Counter(each.pixels for each in facts)
    extra = sum(count - 1 for count in counts.values())
    if not extra:
        return []
    return [f"{label}: {extra} of {len(facts)} images are repeats of others in the set; they count as often"]


def _stored_differently(generated: Sequence[Facts], real: Sequence[Facts], label: str) -> list[str]:
    """JPEG against PNG moves an FID by more than many methods do."""
    shares = [sum(f.format in LOSSY for f in facts) / len(facts) for facts in (generated, real)]
    if abs(shares[0] - shares[1]) < 0.01:
        return []
    return [
        f"{label}: {shares[0]:.0%} of the generated and {shares[1]:.0%} of the reference images are lossy "
        "files (JPEG, WebP): distances measure that too; store both sets alike"
    ]


def _bits(hashes: Sequence[int]) -> np.ndarray:
    """(N, 64) zeros and ones, float32."""
    values = np.array(hashes, dtype=np.uint64).reshape(-1, 1)
    return ((values >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).astype(np.float32)
