"""The order of samples: complete epochs however they are cut, and any place without the ones before it."""

from __future__ import annotations

import numpy as np
import pytest

from covergen.data.dataset import ShardDataset
from covergen.data.sampling import GroupOrder, SampleOrder, permute
from covergen.data.stream import SequentialBatches, open_stream


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 17, 1000, 4097])
def test_an_epoch_is_a_permutation(size: int) -> None:
    for epoch in (0, 1):
        assert sorted(permute(np.arange(size), size, 5, epoch)) == list(range(size))


def test_epochs_seeds_and_places_differ() -> None:
    first = permute(np.arange(1000), 1000, 0, 0)
    assert (first != np.arange(1000)).mean() > 0.9
    assert (first != permute(np.arange(1000), 1000, 0, 1)).mean() > 0.9
    assert (first != permute(np.arange(1000), 1000, 1, 0)).mean() > 0.9
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1


def test_a_place_far_away_needs_nothing_before_it() -> None:
    order = SampleOrder(100_000_000, seed=3)
    rows = order(np.arange(10**12, 10**12 + 5))
    assert len(set(rows.tolist())) == 5 and rows.max() < 100_000_000


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_together_sees_every_sample_once_an_epoch(shards, ranks: int) -> None:
    streams = [open_stream(shards, "train", batch_size=12, seed=1, rank=rank, ranks=ranks) for rank in range(ranks)]
    size, counts = streams[0].metadata["samples"], []
    assert len(streams[0].dataset.shards) == 3 and size % 12  # batches run over the ends of epochs
    epochs = 4
    for number in range(-(-epochs * size // 12)):
        counts.append(np.concatenate([stream.rows(number) for stream in streams]))
    seen = np.concatenate(counts)[: epochs * size].reshape(epochs, size)
    for epoch in seen:
        assert sorted(epoch.tolist()) == list(range(size))


def test_the_global_batch_does_not_depend_on_the_ranks(shards) -> None:
    whole = open_stream(shards, "train", batch_size=12)
    for ranks in (2, 3, 4, 6):
        parts = [open_stream(shards, "train", batch_size=12, rank=r, ranks=ranks).rows(400) for r in range(ranks)]
        assert np.concatenate(parts).tolist() == whole.rows(400).tolist()


def test_group_order_sees_each_album_once_with_tracks_drawn_anew() -> None:
    groups = np.repeat(np.arange(50) * 7, np.arange(50) % 4 + 1)
    order = GroupOrder(groups, seed=2)
    tracks = set()
    for epoch in range(40):
        rows = order(np.arange(epoch * 50, (epoch + 1) * 50))
        assert sorted(groups[rows].tolist()) == sorted(set(groups.tolist()))
        tracks |= set(rows.tolist())
    assert len(tracks) == len(groups)  # in time every track comes


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [6, 12, 36, 48])
def test_a_pass_has_every_sample_exactly_once_whatever_the_number_of_ranks(shards, ranks: int, batch_size: int) -> None:
    dataset, seen = ShardDataset(shards, "val"), []
    for rank in range(ranks):
        part = SequentialBatches(dataset, batch_size, rank, ranks)
        for number in range(part.batches):
            offsets, batch = part.offsets(number), part.batch(number)
            assert len(batch.cover) == max(1, len(offsets))  # one that does not count where there is no share
            rows = number * batch_size + offsets
            seen += rows.tolist()
            assert batch.group[: len(rows)].tolist() == dataset.index.rows["group"][rows].tolist()
    assert sorted(seen) == list(range(dataset.samples))
