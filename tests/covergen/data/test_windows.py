"""Windows of shards: complete epochs that keep shards together, for samples, albums and mismatched pairs."""

from __future__ import annotations

import numpy as np
import pytest

from covergen.data.sampling import GroupOrder, SampleOrder, WindowOrder, make_order, shards_mixed
from covergen.data.stream import open_stream

SIZES = [7, 5, 0, 9, 4, 6, 8, 3]  # samples of each shard
BOUNDS = np.cumsum([0, *SIZES])
FACTS = {"shards": [{"samples": size, "bytes": 100 * size} for size in SIZES]}


def shard_of(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(BOUNDS, rows, side="right") - 1


@pytest.mark.parametrize("window", [1, 3, 7])
def test_an_epoch_has_every_sample_once_and_every_shard_in_one_window(window: int) -> None:
    order, size = make_order(FACTS, int(BOUNDS[-1]), None, None, 4, window), int(BOUNDS[-1])
    assert isinstance(order, WindowOrder) and order.size == size
    for epoch in range(3):
        rows = order(np.arange(epoch * size, (epoch + 1) * size))
        assert sorted(rows.tolist()) == list(range(size))
        at, seen = epoch * size, []
        while at < (epoch + 1) * size:
            part = order.window(at)
            assert part.start == at and 1 <= len(part.shards) <= window
            assert set(shard_of(rows[part.start - epoch * size:part.stop - epoch * size])) == set(part.shards)
            seen, at = seen + part.shards, part.stop
        assert sorted(seen) == [0, 1, 3, 4, 5, 6, 7]  # never the empty one, never one twice


def test_epochs_seeds_and_places_differ_and_any_place_is_known_at_once() -> None:
    order, size = make_order(FACTS, int(BOUNDS[-1]), None, None, 4, 3), int(BOUNDS[-1])
    other = make_order(FACTS, int(BOUNDS[-1]), None, None, 5, 3)
    stream = order(np.arange(10 * size))
    assert (stream[:size] != stream[size:2 * size]).mean() > 0.8
    assert (stream[:size] != other(np.arange(size))).mean() > 0.8
    assert (np.diff(np.sort(stream[:order.window(0).stop])) >= 0).all() and (np.diff(stream[:20]) < 0).any()
    assert order(np.arange(7 * size + 5, 7 * size + 25)).tolist() == stream[7 * size + 5:7 * size + 25].tolist()


def test_some_of_the_rows_and_windows_of_all_shards() -> None:
    chosen = np.arange(1, BOUNDS[-1], 3)
    order = make_order(FACTS, len(chosen), chosen, None, 1, 2)
    assert sorted(order(np.arange(len(chosen))).tolist()) == list(range(len(chosen)))
    assert isinstance(make_order(FACTS, len(chosen), chosen, None, 1, 0), SampleOrder)
    assert isinstance(make_order(FACTS, len(chosen), chosen, None, 1, 8), SampleOrder)
    assert isinstance(make_order(FACTS, len(chosen), chosen, chosen // 4, 1, None), GroupOrder)


def test_how_many_are_mixed_depends_on_the_index_alone() -> None:
    large = {"shards": [{"bytes": 10**9}] * 100}
    assert shards_mixed(large, None) == 64 and shards_mixed(large, 0) == 0 and shards_mixed(large, 5) == 5
    assert shards_mixed({"shards": [{"bytes": 10**8}] * 100}, None) == 0 and shards_mixed(large, 100) == 0


def test_albums_are_seen_once_an_epoch_with_tracks_drawn_anew_in_windows_too() -> None:
    groups = np.random.default_rng(0).integers(0, 15, BOUNDS[-1])
    order = make_order(FACTS, int(BOUNDS[-1]), None, groups, 2, 2)
    tracks, albums = set(), len(set(groups.tolist()))
    for epoch in range(60):
        rows = order(np.arange(epoch * albums, (epoch + 1) * albums))
        assert sorted(groups[rows].tolist()) == sorted(set(groups.tolist()))
        first = order.window(epoch * albums)
        assert set(shard_of(rows[:first.stop - first.start])) == set(first.shards)
        tracks |= set(rows.tolist())
    assert len(tracks) == BOUNDS[-1]


def test_ranks_share_global_batches_and_partners_come_from_the_same_window(shards) -> None:
    whole = open_stream(shards, "train", batch_size=12, seed=1, window=2)
    parts = [open_stream(shards, "train", batch_size=12, seed=1, window=2, rank=rank, ranks=3) for rank in range(3)]
    assert np.concatenate([part.rows(9) for part in parts]).tolist() == whole.rows(9).tolist()
    whole.mismatch()
    assert isinstance(whole.order, WindowOrder)
    positions = np.arange(whole.epoch)
    rows = whole.dataset.index.rows[whole.dataset.rows[whole.order(positions)]]
    drawn = whole.mismatch_sampler(positions, rows["group"], rows["genre"])
    others = whole.dataset.index.rows[whole.rows_with_audio[drawn]]
    assert (others["group"] != rows["group"]).all()
    for _, window, here in whole.order.parts(positions):
        assert set(others["shard"][here]) <= set(whole.order.shards_of(0, window).tolist())
    assert whole.batch(3).mismatched.shape[0] == 12
