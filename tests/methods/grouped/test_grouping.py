"""Groups of layers as runs of one long vector."""

import pytest

from diffadapt.methods.grouped.grouping import ceil_share, group_sites, smallest_root
from diffadapt.methods.site import Site

SITES = [
    Site("a.q", "linear", (4, 6)),
    Site("a.v", "linear", (3, 6)),
    Site("b.conv", "conv", (2, 5, 3, 3)),
    Site("b.to_out.0", "linear", (7, 2)),
]


def test_roots_are_the_smallest_side_that_holds_all_entries():
    for order in range(1, 6):
        for value in [*range(1, 300), 2**20 - 1, 2**20, 2**20 + 1, 3**20, 10**15, 10**15 + 1]:
            side = smallest_root(value, order)
            assert side**order >= value > (side - 1) ** order
    assert smallest_root(2**20, 5) == 16  # a root in floating point says 17


def test_shares_are_exact_decimals():
    assert ceil_share(565_248, 0.01) == 5_653
    assert ceil_share(100, 0.07) == 7  # 0.07 * 100 is 7.000000000000001 in floating point
    assert ceil_share(30, 0.1) == 3
    assert ceil_share(3, 1.0) == 3


@pytest.mark.parametrize("groups", ["weight", "layer", 1, 2, 3, 5, 7, 37, 146])
def test_groups_hold_every_entry_once_and_in_order(groups):
    plan = group_sites(SITES, groups)
    reached = [0] * len(SITES)
    for group in plan:
        offset = 0
        for piece in group.pieces:
            assert piece.offset == offset
            assert piece.length > 0
            offset += piece.length
            reached[piece.site] += piece.length
        assert offset <= group.size
        assert offset == group.size or group is plan[-1]
    assert reached == [site.numel for site in SITES]


def test_weight_wise_groups_are_as_wide_as_their_weight():
    assert [(group.size, group.width) for group in group_sites(SITES, "weight")] == [
        (24, 6),
        (18, 6),
        (90, 45),
        (14, 2),
    ]


def test_layer_wise_groups_join_the_weights_of_one_parent():
    plan = group_sites(SITES, "layer")
    assert [[piece.site for piece in group.pieces] for group in plan] == [[0, 1], [2], [3]]
    apart = [SITES[0], SITES[2], SITES[1]]
    assert [[piece.site for piece in group.pieces] for group in group_sites(apart, "layer")] == [[0, 2], [1]]


def test_numbered_groups_have_one_size_and_the_last_ends_early():
    plan = group_sites(SITES, 4)  # 146 entries
    assert {group.size for group in plan} == {37}
    assert [sum(piece.length for piece in group.pieces) for group in plan] == [37, 37, 37, 35]
    assert [piece.site for piece in plan[0].pieces] == [0, 1]
    assert {group.width for group in plan} == {45}


def test_groups_that_would_be_empty_are_an_error():
    with pytest.raises(ValueError, match="at most 73"):
        group_sites(SITES, 100)


def test_a_weight_is_not_cut_into_more_groups_than_an_expression_can_join():
    sites = [Site("a.q", "linear", (64, 64)), Site("a.v", "linear", (8, 8))]
    assert len(group_sites(sites, 260)) == 260
    with pytest.raises(ValueError, match=r"4096 entries of a\.q into more than 256 .*use at most 260 groups"):
        group_sites(sites, 298)
