"""Layers as one long vector: which entries of which group hold the change of which layer.

The weights of all chosen layers, each read row by row, stand one behind the other and are cut into groups
(SuperLoRA, arXiv 2403.11887, appendix A.5). A cut may fall anywhere, also in the middle of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from diffadapt.methods.site import Site

MOST_GROUPS = 65_536
MOST_CUTS = 256  # groups that one weight may lie in; its change is an expression of as many levels


@dataclass(frozen=True)
class Piece:
    """The entries `[offset, offset + length)` of a group; they belong to the site number `site`."""

    site: int
    offset: int
    length: int


@dataclass(frozen=True)
class Group:
    """A run of entries that are trained together.

    Attributes:
        size: number of entries; those after its last piece belong to no site.
        width: the widest `fan_in` of its sites, or of all sites where cuts fall anywhere.
        pieces: its pieces of sites, in order and without gaps.
    """

    size: int
    width: int
    pieces: tuple[Piece, ...]


def group_sites(sites: Sequence[Site], groups: str | int) -> tuple[Group, ...]:
    """Cuts the sites, in their order, into groups.

    Args:
        sites: all sites of the method.
        groups: `weight` (one per weight), `layer` (one for all weights of the same parent module) or a number
            of groups of equal size. Where that does not divide the entries, the size is rounded up and the
            last group ends early.

    Raises:
        ValueError: there are more groups than the entries can fill.
    """
    if isinstance(groups, int):
        return _equal_groups(sites, groups)
    members: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        parent = site.name.rpartition(".")[0]
        members.setdefault(site.name if groups == "weight" else parent, []).append(index)
    whole_groups = []
    for indices in members.values():
        whole_groups.append(_group_of_whole_sites(sites, indices))
    return tuple(whole_groups)


def smallest_root(value: int, order: int) -> int:
    """The smallest whole number whose power `order` is at least `value`, in whole numbers throughout."""
    low = 1
    high = 1 << (-(-value.bit_length() // order))  # high^order >= value
    while low < high:
        middle = (low + high) // 2
        if middle**order >= value:
            high = middle
        else:
            low = middle + 1
    return low


def ceil_share(size: int, ratio: float) -> int:
    """`ceil(ratio * size)` for the decimal number one reads: 0.1 is a tenth, not the nearest float."""
    exact = Fraction(str(ratio)) * size
    return -(-exact.numerator // exact.denominator)  # floor division of the negative rounds up


def _group_of_whole_sites(sites: Sequence[Site], indices: Sequence[int]) -> Group:
    pieces = []
    offset = 0
    width = 0
    for index in indices:
        site = sites[index]
        pieces.append(Piece(index, offset, site.numel))
        offset += site.numel
        width = max(width, site.fan_in)
    return Group(offset, width, tuple(pieces))


def _equal_groups(sites: Sequence[Site], count: int) -> tuple[Group, ...]:
    total = sum(site.numel for site in sites)
    size = _equal_group_size(sites, total, count)
    pieces: list[list[Piece]] = [[] for _ in range(count)]
    start = 0  # of the next piece, in the vector of all entries
    for index, site in enumerate(sites):
        end = start + site.numel
        while start < end:
            group, offset = divmod(start, size)
            length = min(end - start, size - offset)  # up to the end of the site or of the group
            pieces[group].append(Piece(index, offset, length))
            start += length
    width = max(site.fan_in for site in sites)
    groups = []
    for group_pieces in pieces:
        groups.append(Group(size, width, tuple(group_pieces)))
    return tuple(groups)


def _equal_group_size(sites: Sequence[Site], total: int, count: int) -> int:
    """The number of entries of each of `count` groups.

    Raises:
        ValueError: there are too many groups.
    """
    if count > MOST_GROUPS:
        raise ValueError(f"superlora: groups must be at most {MOST_GROUPS:,}, got {count}")
    size = -(-total // count)  # rounded up
    if (count - 1) * size >= total:  # the last group would begin behind the last entry
        most = -(-total // size)
        raise ValueError(
            f"superlora: groups={count} leaves some of the {total} entries' groups empty; "
            f"use at most {most} groups"
        )
    largest = max(sites, key=lambda site: site.numel)
    if largest.numel > MOST_CUTS * size:
        raise ValueError(
            f"superlora: groups={count} cuts the {largest.numel} entries of {largest.name} into more than "
            f"{MOST_CUTS} groups; use at most {total * MOST_CUTS // largest.numel} groups"
        )
    return size
