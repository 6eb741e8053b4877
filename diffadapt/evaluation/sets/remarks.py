"""What a reader must know of a set's images: which were left out, and which other programs read otherwise."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from diffadapt.common.messages import indented_list
from diffadapt.evaluation.sets.image_files import Facts
from diffadapt.evaluation.sets.image_sets import ImageSet

SHOWN = 5  # names in a warning
FEW = 0.1  # share of a set up to which images of other sizes are taken for strangers in it


def left_out(label: str, images: ImageSet) -> list[str]:
    """A warning about overviews and inputs that were taken out of a folder of results."""
    if not images.no_samples:
        return []
    return [
        f"{label}: {len(images.no_samples)} images are not scored, as their names say that they are an "
        f"overview or an input; rename them to score them:\n{indented_list(images.no_samples, limit=SHOWN)}"
    ]


def strangers(label: str, facts: Sequence[Facts]) -> list[str]:
    """A warning about a few images of other sizes in a set of one size: grids, previews, inputs."""
    by_size: dict[tuple[int, int], list[str]] = defaultdict(list)
    for each in facts:
        by_size[each.width, each.height].append(each.name)
    if len(by_size) < 2:
        return []
    usual = max(by_size, key=lambda size: len(by_size[size]))
    others = [name for size, names in by_size.items() if size != usual for name in names]
    if len(others) > max(1, FEW * len(facts)) or len(others) >= len(by_size[usual]):
        return []
    return [
        f"{label}: {len(others)} of {len(facts)} images are not of {usual[0]}x{usual[1]} pixels as the "
        f"others; do they belong to the set?\n{indented_list(others, limit=SHOWN)}"
    ]


def converted(label: str, facts: Sequence[Facts]) -> list[str]:
    """A warning about images whose pixels depend on how a program reads them."""
    counts = Counter(conversion for each in facts for conversion in each.conversions)
    if not counts:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return [f"{label}: of {len(facts)} images {kinds}; other programs may read other pixels"]
