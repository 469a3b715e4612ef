"""Corrupt samples: the next one takes their place in batches, each is named once, and too many stop a run."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from covergen.data.batch import Batch
from covergen.data.corruption import CorruptionLog, CorruptSample
from covergen.data.stream import BatchStream, open_stream
from covergen.data.webdataset import WebDatasetStream
from shard_tools.dataset.vectors import vector_header
from shard_tools.shards.index import open_index
from tests.support.runs import TINY, log_of, train

BATCHES = 30  # of 12: more than an epoch of the small world
pytestmark = pytest.mark.filterwarnings("ignore:left out")


def harmed(shards: Path, copy: Path, harm: dict[int, Callable[[bytearray, np.void], None]]) -> Path:
    """A copy of shards, in which some rows of train were changed: their shard's bytes, and the row."""
    shutil.copytree(shards, copy)
    index = open_index(copy, "train")
    for number, change in harm.items():
        row = index.rows[number]
        path = index.shards[row["shard"]]
        data = bytearray(path.read_bytes())
        change(data, row)
        path.write_bytes(data)
    return copy


def no_picture(data: bytearray, row: np.void) -> None:
    data[int(row["cover_offset"]):int(row["cover_offset"]) + 40] = bytes(40)


def a_bit(data: bytearray, row: np.void) -> None:
    """In the picture's last bytes, where it still decodes."""
    data[int(row["cover_offset"]) + int(row["cover_bytes"]) - 9] ^= 1


def no_vector(data: bytearray, row: np.void) -> None:
    data[int(row["audio_offset"])] ^= 1


def whole(root: Path, **options) -> BatchStream:
    return open_stream(root, "train", **{"batch_size": 12, "max_corrupt": 0.5, **options})


def same(one: Batch, other: Batch) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def three(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with three damaged samples: rows 3, 50 and 77."""
    return harmed(shards, tmp_path_factory.mktemp("harmed") / "shards", {3: no_picture, 50: a_bit, 77: no_vector})


def test_the_next_takes_the_place_of_a_corrupt_sample_and_all_else_stays(shards: Path, three: Path) -> None:
    sound, stream = whole(shards), whole(three)
    replaced = 0
    for number in range(BATCHES):
        rows, batch, before = sound.rows(number), stream.batch(number), sound.batch(number)
        bad = np.isin(rows, [3, 50, 77])
        replaced += int(bad.sum())
        expected = sound.dataset.read(rows + bad)
        assert same(batch, expected) and not (batch.audio[bad] == before.audio[bad]).all(1).any()
    assert replaced >= 3 and stream.corruption.total() == 3 and stream.corruption.failed >= replaced


def test_what_takes_its_place_depends_on_neither_ranks_nor_what_was_read_before(three: Path) -> None:
    stream = whole(three)
    stream.mismatch()
    batches = [stream.batch(number) for number in range(BATCHES)]
    parts = [whole(three, rank=rank, ranks=3) for rank in range(3)]
    for part in parts:
        part.mismatch()
    for number in reversed(range(BATCHES)):  # a process that begins at the end
        pieces = [part.batch(number) for part in parts]
        assert same(Batch(*(torch.cat(piece) for piece in zip(*pieces, strict=True))), batches[number])


def test_a_flipped_bit_that_still_decodes_is_found_by_the_checksum(three: Path) -> None:
    stream = whole(three)
    with pytest.raises(ValueError, match=r"damaged sample at byte \d+ \(.+\): its checksum does not fit"):
        stream.dataset.read(np.array([50]))
    assert len(stream.dataset.read(np.array([49, 51])).cover) == 2


def test_numbers_that_are_not_finite_are_damage_even_with_a_right_checksum(shards: Path, tmp_path: Path) -> None:
    def endless(data: bytearray, row: np.void) -> None:
        at = int(row["audio_offset"]) + len(vector_header(1160))
        data[at:at + 4] = np.float32(np.nan).tobytes()
    stream = whole(harmed(shards, tmp_path / "shards", {7: endless}))
    stream.dataset.reader.checked[7] = True  # as if the checksum, too, were of these bytes
    with pytest.raises(ValueError, match="its vector is not finite"):
        stream.dataset.read(np.array([7]))
    with pytest.raises(ValueError, match="its vector is not finite"):
        stream.dataset.read_audio(np.array([7]))


def test_the_first_follows_the_last_and_corrupt_ones_in_a_row_are_skipped(shards: Path, tmp_path: Path) -> None:
    last = len(open_index(shards, "train").rows) - 1
    stream = whole(harmed(shards, tmp_path / "shards", {last: a_bit, 0: a_bit, 1: no_vector}), max_corrupt=0.999)
    batch = stream.dataset.read(np.array([last, 5]), stream.corruption)
    assert same(batch, stream.dataset.read(np.array([2, 5]))) and stream.corruption.total() == 3


def test_audio_for_wrong_pairs_comes_from_another_album_where_its_first_choice_is_damaged(three: Path) -> None:
    stream = whole(three)
    rows = stream.dataset.index.rows
    with_audio = stream.dataset.rows_with_audio()
    following = with_audio[with_audio > 77]
    for album in (rows["group"][following[0]], 0):
        audio = stream.dataset.read_audio(np.array([77, 5]), stream.corruption, not_of=np.array([album, 0]))
        expected = next(row for row in following if rows["group"][row] != album)
        assert torch.equal(audio, stream.dataset.read_audio(np.array([expected, 5])))


def test_a_shard_that_is_lost_while_training_stops_it_and_is_named(shards: Path, tmp_path: Path) -> None:
    for lose in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:700])):
        root = harmed(shards, tmp_path / lose.__name__, {})
        stream = whole(root, max_corrupt=0.01)
        lose(stream.dataset.shards[1])
        with pytest.raises(ValueError, match=r"above --max_corrupt 0\.01.*train-00001-of-00003\.tar.*verify --full"):
            for number in range(BATCHES):
                stream.batch(number)


def test_no_sound_sample_at_all_is_no_endless_search(shards: Path, tmp_path: Path) -> None:
    stream = whole(harmed(shards, tmp_path / "shards", {}), max_corrupt=0.999)
    for shard in stream.dataset.shards:
        shard.write_bytes(b"")
    with pytest.raises(ValueError, match=r"of 1.* samples read are damaged|in a row are damaged"):
        stream.batch(0)


def test_without_a_limit_the_first_stops(three: Path) -> None:
    with pytest.raises(ValueError, match=r"above --max_corrupt 0"):
        for number in range(BATCHES):
            whole(three, max_corrupt=0).batch(number)


def test_a_network_that_fails_is_not_damage(shards: Path) -> None:
    stream = whole(shards)

    def fail(*where: int) -> bytearray:
        raise ConnectionError("no route")
    stream.dataset.store.read = fail
    with pytest.raises(ConnectionError, match="no route"):
        stream.batch(0)


def test_each_damaged_sample_is_named_once_by_all_processes_together(three: Path, tmp_path: Path) -> None:
    file = tmp_path / "corrupt_samples.jsonl"
    file.write_text('{"shard": "cut')  # by a crash
    file.write_text("")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # a resumed run
            for rank in range(2):
                stream = whole(three, rank=rank, ranks=2)
                stream.corruption.list_in(file)
                for number in range(BATCHES):
                    stream.batch(number)
        told = [str(warning.message) for warning in caught]
    assert len(told) == len(set(told)) == 3
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = open_index(three, "train").rows[[3, 50, 77]]
    assert sorted(line["offset"] for line in lines) == sorted(rows["cover_offset"].tolist())
    assert {line["reason"] for line in lines} == {"its checksum does not fit"} and all(line["key"] for line in lines)
    assert stream.corruption.total() == 3


def test_after_ten_they_are_only_counted() -> None:
    damage = CorruptionLog(1.0, 1000)
    with pytest.warns(UserWarning) as caught:
        damage.seen(100, [CorruptSample("a.tar", offset, "broken") for offset in range(40)])
    assert len(caught) == 11 and "more than 10 damaged samples" in str(caught[-1].message)


def test_few_reads_are_not_judged_by_a_share() -> None:
    damage = CorruptionLog(0.01, 5000)
    damage.seen(100, [CorruptSample("a.tar", 0, "broken"), CorruptSample("a.tar", 9, "broken")])
    damage.seen(899)
    with pytest.raises(ValueError, match="2 of 150 samples"):
        CorruptionLog(0.01, 150).seen(150, [CorruptSample("a.tar", 0, "broken"), CorruptSample("a.tar", 9, "broken")])
    with pytest.raises(ValueError, match="11 of 1,000 samples read are damaged"):
        damage.seen(1, [CorruptSample("a.tar", offset, "broken") for offset in range(9)])


def test_foreign_shards_stop_at_too_many_too(tmp_path: Path) -> None:
    from tests.covergen.data.test_dataset import foreign_sample, write_foreign
    bad = [{**foreign_sample(number), "jpg": b"no picture"} for number in range(2)]
    write_foreign(tmp_path / "a.tar", [*bad, *(foreign_sample(number) for number in range(2, 12))])
    stream = open_stream(str(tmp_path), "train", batch_size=100, max_corrupt=0.05)
    assert isinstance(stream, WebDatasetStream) and stream.corruption.total() == 2
    with pytest.raises(ValueError, match=r"above --max_corrupt 0\.05; the last: .*a\.tar: damaged sample \(0001\)"):
        for number in range(20):
            stream.batch(number)
    lenient = open_stream(str(tmp_path), "train", batch_size=4, max_corrupt=0.99)
    write_foreign(tmp_path / "a.tar", bad)  # all that is left
    with pytest.raises(ValueError, match=r"1,000 samples in a row are damaged, the last: .*pack the covers again"):
        lenient.batch(99)


def test_a_run_goes_on_over_damage_and_lists_it_or_stops(three: Path, tmp_path: Path) -> None:
    run = ["--shards", str(three), "--steps", "12", "--name", "run", "--resolution", "32", *TINY]
    done = train(tmp_path, *run, "--max_corrupt", "0.1", "--decoded_cache", "ram")
    assert done.stdout.count("the next sample takes its place") == 3
    assert len((tmp_path / "runs/run/corrupt_samples.jsonl").read_text().splitlines()) == 3
    assert log_of(tmp_path / "runs/run")[-1]["data/corrupt"] == 3
    done = train(tmp_path, *run, "--max_corrupt", "0", "--out", "other", ok=False)
    assert done.returncode == 2 and "error: 1 of" in done.stdout and "shard_tools.verify --full" in done.stdout
