"""How many images a metric needs, and what happens with fewer or with unequal sets."""

from __future__ import annotations


class TooFewImages(ValueError):
    """A set is below the metric's minimum."""


def check_size(metric: str, role: str, n: int, minimum: int, *, allow_small: bool) -> str | None:
    """None when there are enough images; else the stamp that the score must carry.

    Raises: TooFewImages unless `allow_small`.
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
    """Images to take of each set by a metric whose value moves with their numbers, and the note on it."""
    if n_generated == n_real:
        return n_generated, n_real, None
    if equalise:
        n = min(n_generated, n_real)
        return n, n, f"{n} images of each set, of {n_generated} generated and {n_real} real"
    warning = f"{metric} moves with the numbers of images: {n_generated} generated against {n_real} real"
    return n_generated, n_real, warning + "; compare only with scores of the same numbers"
