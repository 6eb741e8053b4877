"""Warnings about the images of one set: excluded files, odd sizes, and ambiguous conversions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from diffadapt.common.messages import indented_list
from diffadapt.evaluation.sets.image_files import ImageInfo
from diffadapt.evaluation.sets.image_sets import ImageSet

MAX_LISTED = 5  # names in a warning
MAX_ODD_SHARE = 0.1  # of a set; more images of other sizes are no accident


def excluded_images_warning(label: str, image_set: ImageSet) -> list[str]:
    """A warning about overviews and inputs that were left out of a folder of results."""
    if not image_set.excluded:
        return []
    names = indented_list(image_set.excluded, limit=MAX_LISTED)
    return [
        f"{label}: {len(image_set.excluded)} images are not scored, as their names say that they are an "
        f"overview or an input; rename them to score them:\n{names}"
    ]


def odd_sizes_warning(label: str, infos: Sequence[ImageInfo]) -> list[str]:
    """A warning about a few images of other sizes in a set of one size: grids, previews, inputs."""
    names_by_size: dict[tuple[int, int], list[str]] = defaultdict(list)
    for info in infos:
        names_by_size[info.width, info.height].append(info.name)
    if len(names_by_size) < 2:
        return []
    width, height = max(names_by_size, key=lambda size: len(names_by_size[size]))  # the usual size
    num_usual = len(names_by_size.pop((width, height)))
    odd_names: list[str] = []
    for names in names_by_size.values():
        odd_names += names
    if len(odd_names) > max(1, MAX_ODD_SHARE * len(infos)) or len(odd_names) >= num_usual:
        return []
    return [
        f"{label}: {len(odd_names)} of {len(infos)} images do not have {width}x{height} pixels like "
        f"the others; do they belong to the set?\n{indented_list(odd_names, limit=MAX_LISTED)}"
    ]


def conversions_warning(label: str, infos: Sequence[ImageInfo]) -> list[str]:
    """A warning about images whose pixels depend on how a program reads them."""
    counts: Counter[str] = Counter()
    for info in infos:
        counts.update(info.conversions)
    if not counts:
        return []
    conversions = ", ".join(f"{count} {conversion}" for conversion, count in counts.items())
    return [f"{label}: of {len(infos)} images {conversions}; other programs may read other pixels"]
