"""Aspect-ratio buckets: one size per group, every picture equally often, alike for any split of a group."""

from collections import Counter

import pytest

from diffadapt.data.buckets import BucketOrder, Buckets, bucket_sizes

MEMBERS = ([0, 3, 4, 7, 8], [1, 2], [5, 6, 9, 10, 11, 12])


def order(group=4, seed=0):
    return BucketOrder(MEMBERS, group, seed)


def bucket(index):
    return next(b for b, members in enumerate(MEMBERS) if index in members)


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_a_group_holds_one_bucket_and_all_pictures_are_used_equally_often(group):
    draws = order(group).sample_indices(range(120 * group))
    for start in range(0, len(draws), group):
        assert len({bucket(d.index) for d in draws[start : start + group]}) == 1
    uses = Counter(d.index for d in draws)
    assert set(uses) == set(range(13))
    assert max(uses.values()) - min(uses.values()) <= 1 + group  # less than a group per bucket is left over


def test_in_groups_of_one_every_epoch_uses_every_picture_once():
    draws = order(group=1).sample_indices(range(13 * 3))
    epochs = [[d.index for d in draws[e : e + 13]] for e in (0, 13, 26)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_rest_of_an_epoch_opens_the_next():
    draws = order(group=4).sample_indices(range(4 * 13))  # 13 groups are 4 epochs of 13 pictures
    assert Counter(bucket(d.index) for d in draws) == {0: 20, 1: 8, 2: 24}
    assert set(Counter(d.index for d in draws).values()) == {4}


def test_draws_follow_from_position_and_seed_alone_and_never_repeat_their_key():
    whole = order().sample_indices(range(80))
    fresh = order()
    assert fresh.sample_indices(range(60, 80)) == whole[60:]
    assert fresh.sample_indices(range(10, 14)) == whole[10:14]
    assert order(seed=1).sample_indices(range(80)) != whole
    assert len({(d.role, d.epoch, d.sample) for d in whole}) == 80


def test_two_processes_and_two_microsteps_draw_what_one_process_draws():
    whole = order(group=4).sample_indices(range(40))
    for step in range(10):
        parts = [
            order(group=4).sample_indices(range(4 * step + 2 * rank, 4 * step + 2 * rank + 2))
            for rank in (0, 1)
        ]
        assert [d for part in parts for d in part] == whole[4 * step : 4 * step + 4]


def test_automatic_sizes_are_multiples_with_no_more_pixels_than_the_square():
    sizes = bucket_sizes("auto", resolution=512, step=64)
    assert (512, 512) in sizes
    assert (768, 320) in sizes
    assert all(h % 64 == w % 64 == 0 and h * w <= 512**2 and (w, h) in sizes for h, w in sizes)
    assert Buckets(sizes, 4).nearest((3000, 2000)) == (384, 640)
    assert Buckets(sizes, 4).nearest((700, 700)) == (512, 512)
    assert Buckets(sizes, 4).nearest((100, 3000)) == (1024, 256)


def test_sizes_can_be_listed_and_wrong_ones_are_named():
    assert bucket_sizes("64,32; 32,64", resolution=512, step=32) == ((64, 32), (32, 64))
    with pytest.raises(ValueError, match="40,64 is impossible; this base needs multiples of 32"):
        bucket_sizes("64,64;40,64", resolution=512, step=32)
    for text in ("64", "a,b", "", "64x64"):
        with pytest.raises(ValueError, match="takes auto or"):
            bucket_sizes(text, resolution=512, step=32)
