"""Numbers of images: sets too small for a metric are refused or noted, unequal ones cut to one size."""

from __future__ import annotations


class TooFewImages(ValueError):
    """A set is below the metric's minimum."""


def check_size(metric: str, role: str, n: int, minimum: int, *, allow_small: bool) -> str | None:
    """The note that a score must carry; None when there are enough images.

    Args:
        metric: its key.
        role: of the set: generated, real or training.

    Raises:
        TooFewImages: there are fewer images, and `allow_small` is not set.
    """
    if n >= minimum:
        return None
    shortage = f"{n} {role} images, below the minimum of {minimum} for {metric}"
    if not allow_small:
        raise TooFewImages(
            f"{shortage}; add images, or score all the same with --allow_small, not comparable"
        )
    return f"{shortage}: not comparable"


def common_size(metric: str, n_generated: int, n_real: int, *, equalise: bool) -> tuple[int, int, str | None]:
    """Images to use of each set, for a metric whose value depends on their numbers, and a note on it.

    Args:
        equalise: cut both sets to the smaller one; False warns instead.

    Returns:
        Generated images, real images, note.
    """
    if n_generated == n_real:
        return n_generated, n_real, None
    if equalise:
        n = min(n_generated, n_real)
        return n, n, f"{n} images of each set, of {n_generated} generated and {n_real} real"
    warning = f"{metric} moves with the numbers of images: {n_generated} generated against {n_real} real"
    return n_generated, n_real, warning + "; compare only with scores of the same numbers"
