"""Duplicates and format mismatches between two image sets, which silently spoil a comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from diffadapt.common.messages import indented_list
from diffadapt.evaluation.sets.image_files import ImageInfo

MAX_DISTANCE = 2  # differing bits, of 64, of the difference hashes of images that look the same
MIN_BITS = 8  # a hash with fewer bits set, or unset, is of a nearly flat image and says nothing
LOSSY_FORMATS = {"JPEG", "WEBP", "MPO"}
BLOCK = 1024  # hashes compared at a time
MAX_LISTED = 5  # pairs named in a warning
Pairs = list[tuple[str, str]]  # names: generated, real


def same_images(generated: Sequence[ImageInfo], real: Sequence[ImageInfo]) -> Pairs:
    """Pairs with the same pixels, whatever the file; at most one for each generated image."""
    real_by_pixels = {info.pixels: info for info in real}
    pairs = []
    for info in generated:
        if info.pixels in real_by_pixels:
            pairs.append((info.name, real_by_pixels[info.pixels].name))
    return pairs


def mirrored_images(generated: Sequence[ImageInfo], real: Sequence[ImageInfo]) -> Pairs:
    """Pairs of different pixels in which one image is exactly the mirror image of the other."""
    real_by_mirror_image = {info.mirrored: info for info in real}
    pairs = []
    for info in generated:
        match = real_by_mirror_image.get(info.pixels)
        if match is not None and match.pixels != info.pixels:  # not an image that is its own mirror image
            pairs.append((info.name, match.name))
    return pairs


def lookalikes(generated: Sequence[ImageInfo], real: Sequence[ImageInfo]) -> Pairs:
    """Pairs of different pixels whose difference hashes agree to MAX_DISTANCE, mirrored or not.

    At most one for each generated image.
    """
    generated_bits = _to_bits([info.dhash for info in generated])  # (N, 64)
    upright_bits = _to_bits([info.dhash for info in real])  # (M, 64)
    mirrored_bits = _to_bits([info.dhash_mirrored for info in real])  # (M, 64)
    matches: dict[str, str] = {}
    for real_bits in (upright_bits, mirrored_bits):
        for start in range(0, len(generated_bits), BLOCK):
            block = generated_bits[start : start + BLOCK]  # (B, 64)
            # |a - b| = |a| + |b| - 2 a . b for vectors of zeros and ones
            distances = block.sum(1)[:, None] + real_bits.sum(1)[None] - 2 * block @ real_bits.T  # (B, M)
            for row, column in zip(*np.nonzero(distances <= MAX_DISTANCE), strict=True):
                first = generated[start + row]
                second = real[column]
                is_other_image = first.pixels not in (second.pixels, second.mirrored)
                is_flat = not MIN_BITS <= block[row].sum() <= 64 - MIN_BITS
                if is_other_image and not is_flat:
                    matches.setdefault(first.name, second.name)
    return list(matches.items())


def check_sets(
    generated: Sequence[ImageInfo], real: Sequence[ImageInfo], *, label: str, allow_overlap: bool
) -> list[str]:
    """Compares a generated set with its reference.

    Args:
        generated: the images of the generated set.
        real: the images of the reference.
        label: of the generated set, for messages.
        allow_overlap: whether all generated images may be in the reference.

    Returns:
        Warnings about images in both sets and about different file formats.

    Raises:
        ValueError: all generated images are in the reference, and `allow_overlap` is not set.
    """
    same = same_images(generated, real)
    mirrored = mirrored_images(generated, real)
    shared_names = {name for name, _ in [*same, *mirrored]}  # of generated images
    if len(shared_names) == len(generated) and not allow_overlap:
        also_mirrored = "" if same else ", mirrored"
        raise ValueError(
            f"all {len(generated)} images of {label!r} are in the reference too{also_mirrored}: the same "
            "folder twice? Name two different sets, or give --allow_overlap"
        )
    findings = (
        (same, "are in the reference too"),
        (mirrored, "are mirror images of reference images"),
        (lookalikes(generated, real), "look like a reference image, mirrored or not (difference hash)"),
    )
    warnings = []
    for pairs, text in findings:
        if pairs:
            lines = [f"{first} = {second}" for first, second in pairs]
            examples = indented_list(lines, limit=MAX_LISTED)
            warnings.append(f"{label}: {len(pairs)} of {len(generated)} images {text}:\n{examples}")
    return warnings + _format_mismatch_warning(generated, real, label)


def check_repeats(infos: Sequence[ImageInfo], *, label: str) -> list[str]:
    """A warning when a set holds the same image more than once."""
    counts = Counter(info.pixels for info in infos)  # pixels -> images that have them
    num_repeats = len(infos) - len(counts)
    if not num_repeats:
        return []
    return [
        f"{label}: {num_repeats} of {len(infos)} images repeat other images of the set; each repeat counts"
    ]


def _format_mismatch_warning(
    generated: Sequence[ImageInfo], real: Sequence[ImageInfo], label: str
) -> list[str]:
    """A warning when the sets differ in their shares of lossy files.

    JPEG against PNG moves an FID by more than many methods do.
    """
    generated_share = _lossy_share(generated)
    real_share = _lossy_share(real)
    if abs(generated_share - real_share) < 0.01:  # one stray file in a hundred or more
        return []
    return [
        f"{label}: {generated_share:.0%} of the generated and {real_share:.0%} of the reference images are "
        "lossy files (JPEG, WebP): distances measure that too; store both sets alike"
    ]


def _lossy_share(infos: Sequence[ImageInfo]) -> float:
    return sum(info.format in LOSSY_FORMATS for info in infos) / len(infos)


def _to_bits(hashes: Sequence[int]) -> np.ndarray:
    """(N, 64) zeros and ones, float32."""
    values = np.array(hashes, dtype=np.uint64).reshape(-1, 1)
    bits = (values >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return bits.astype(np.float32)
