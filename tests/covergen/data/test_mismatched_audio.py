"""Whose albums are trained on, and audio that does not belong to a cover."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from covergen.data import dataset as data
from covergen.data.loader import Loader
from covergen.data.sampling import MismatchedAudioSampler, rows_of_albums
from covergen.data.stream import BatchStream, open_stream
from tests.covergen.data.test_dataset import foreign_sample, write_foreign


def albums_seen(shards: Path, whose: str, order: str) -> set[int]:
    """The albums of one epoch's batches."""
    stream = open_stream(shards, "train", batch_size=12, order=order, album_subset=whose)
    batches = -(-stream.epoch // 12)
    return {int(group) for number in range(batches) for group in stream.batch(number).group}


@pytest.mark.parametrize("order", ["sample", "group"])
def test_a_judge_s_albums_are_in_none_of_a_generator_s_batches(shards: Path, order: str) -> None:
    judge, generator, everyone = (albums_seen(shards, whose, order) for whose in ("judge", "generator", "all"))
    assert judge and not judge & generator and judge | generator == everyone
    parts = [open_stream(shards, "train", batch_size=12, order=order, album_subset=whose).epoch
             for whose in ("judge", "generator", "all")]
    assert parts[0] + parts[1] == parts[2]


def test_a_fixed_quarter_of_albums_is_a_judge_s() -> None:
    groups = np.random.default_rng(0).integers(0, 2**62, 20_000).repeat(3)
    judge, generator, everyone = (rows_of_albums(groups, whose) for whose in ("judge", "generator", "all"))
    assert abs(len(judge) / len(groups) - 0.25) < 0.01 and len(everyone) == len(groups)
    assert sorted([*judge, *generator]) == everyone.tolist()
    assert not set(groups[judge]) & set(groups[generator])
    shuffled = groups[::-1]  # by the album alone, wherever its rows are
    assert set(shuffled[rows_of_albums(shuffled, "judge")]) == set(groups[judge])


def test_no_album_of_the_wanted_kind_is_said_to_be(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "rows_of_albums", lambda groups, subset: np.zeros(0, np.int64))
    with pytest.raises(ValueError, match=r"--album_subset judge: none of the train albums of .* is among them"):
        open_stream(shards, "train", batch_size=2, album_subset="judge")


def test_foreign_shards_know_no_albums(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.tar", [foreign_sample(number) for number in range(8)])
    with pytest.raises(ValueError, match=r"--album_subset generator needs shards with an index; .*--album_subset all"):
        open_stream(str(tmp_path), "train", batch_size=4, album_subset="generator")
    with pytest.raises(ValueError, match="--order group needs shards with an index"):
        open_stream(str(tmp_path), "train", batch_size=4, order="group", album_subset="generator")
    stream = open_stream(str(tmp_path), "train", batch_size=4)
    assert stream.batch(0).mismatched is None
    with pytest.raises(ValueError, match=r"mismatched pairs need shards with an index; .*--mismatch_weight 0"):
        stream.mismatch()


def mismatching(shards: Path, **options: object) -> BatchStream:
    stream = open_stream(shards, "train", **{"batch_size": 12, "order": "group", "album_subset": "generator",
                                              **options})
    stream.mismatch()
    return stream


def test_mismatched_audio_is_of_another_album_half_of_it_of_the_same_genre(shards: Path) -> None:
    stream = mismatching(shards)
    rows, audible = stream.dataset.index.rows, stream.dataset.index.rows["audio_bytes"].nonzero()[0]
    vectors = stream.dataset.read_audio(audible)
    by_vector = {vector.numpy().tobytes(): rows[row] for vector, row in zip(vectors, audible, strict=True)}
    judged = set(rows["group"][rows_of_albums(rows["group"], "judge")])
    ours = rows[stream.rows_with_audio]
    large = [genre for genre in np.unique(ours["genre"]) if len(set(ours["group"][ours["genre"] == genre])) > 3]
    same, position = [], 0
    for number in range(40):
        batch = stream.batch(number)
        partners = [by_vector[vector.numpy().tobytes()] for vector in batch.mismatched]
        for group, genre, partner in zip(batch.group.tolist(), batch.genre.tolist(), partners, strict=True):
            assert partner["group"] != group and partner["group"] not in judged
            assert partner["genre"] == genre or position % 2 or genre not in large
            same += [partner["genre"] == genre] * (genre in large)
            position += 1
    assert len(large) > 2 and 0.5 < np.mean(same) < 0.75
    drawn = stream.mismatch_sampler(np.arange(99), np.zeros(99, int), np.zeros(99, int))
    assert len(set(drawn.tolist())) > 30


@pytest.mark.parametrize("ranks", [2, 3])
def test_mismatched_audio_does_not_depend_on_the_ranks(shards: Path, ranks: int) -> None:
    whole = mismatching(shards).batch(7)
    parts = [mismatching(shards, rank=rank, ranks=ranks).batch(7) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.mismatched for part in parts]), whole.mismatched)
    assert torch.equal(torch.cat([part.group for part in parts]), whole.group)
    assert not torch.equal(mismatching(shards, seed=1).batch(7).mismatched, whole.mismatched)


def test_batches_hold_it_only_when_asked_and_the_loader_passes_it_on(shards: Path) -> None:
    assert open_stream(shards, "train", batch_size=12).batch(0).mismatched is None
    stream = mismatching(shards)
    loader = Loader(stream, 3, device=torch.device("cpu"), resolution=16, threads=2)
    batch = next(loader)
    loader.close()
    assert torch.equal(batch.mismatched, stream.batch(3).mismatched) and batch.mismatched.shape == batch.audio.shape
    rows = stream.rows_with_audio[:5]
    assert torch.equal(stream.dataset.read_audio(rows), stream.dataset.read(rows).audio)


def test_partners_are_found_where_one_album_is_nearly_everything() -> None:
    groups, genres = np.zeros(5000, np.int64), np.zeros(5000, np.int64)
    groups[1234] = 1
    partners = MismatchedAudioSampler(groups, genres, seed=0)
    assert (partners(np.arange(8), np.zeros(8, int), np.zeros(8, int)) == 1234).all()
    assert 1234 not in partners(np.arange(8), np.ones(8, int), np.zeros(8, int))


def test_a_genre_of_one_album_or_unknown_has_partners_of_others() -> None:
    partners = MismatchedAudioSampler(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]), seed=0)
    alone = partners(np.arange(50), np.zeros(50, int), np.zeros(50, int))
    assert set(alone) == {2, 3}
    assert set(partners(np.arange(50), np.full(50, 9), np.full(50, 7))) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="need tracks of two albums or more"):
        MismatchedAudioSampler(np.array([3, 3]), np.array([0, 1]), seed=0)
    with pytest.raises(ValueError, match="need tracks of two albums or more"):
        MismatchedAudioSampler(np.array([]), np.array([]), seed=0)
