"""Decoded samples in memory (--decoded_cache): the same batches, nothing read twice, and what if they don't fit."""

from __future__ import annotations

import itertools
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from covergen.data import memory_cache
from covergen.data.batch import Batch
from covergen.data.loader import Loader
from covergen.data.stream import open_stream
from covergen.distributed.environment import free_memory
from tests.covergen.data.test_corruption import harmed, no_picture, no_vector
from tests.support.runs import environment
from tests.support.waiting import LIMIT

CPU = torch.device("cpu")
BATCHES = 30  # of 12: two epochs of the small world and more


def batches(root: Path, cache: str, start: int = 0, resolution: int = 32, mismatch: bool = False, threads: int = 2,
            **options) -> list[Batch]:
    stream = open_stream(root, "train", batch_size=12, max_corrupt=0.5, **options)
    if mismatch:
        stream.mismatch()
    memory_cache.cache_decoded(stream, cache, resolution, CPU, print)
    loader = Loader(stream, start, device=CPU, resolution=resolution, threads=threads)
    try:
        return list(itertools.islice(loader, BATCHES - start))
    finally:
        loader.close()


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all((a is None and b is None) or torch.equal(a, b)
               for first, second in zip(one, other, strict=True) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [
    {}, {"mismatch": True, "resolution": 16}, {"order": "group", "resolution": 24},
    {"album_subset": "generator", "rank": 1, "ranks": 3, "mismatch": True},
    {"audio_scale": "raw", "seed": 5}], ids=str)
def test_batches_are_the_same_bit_for_bit(shards: Path, options: dict) -> None:
    plain = batches(shards, "none", **options)
    assert same(batches(shards, "ram", **options), plain)
    assert same(batches(shards, "device", start=17, **options), plain[17:])  # a run that goes on there


@pytest.mark.filterwarnings("ignore:left out")
def test_so_are_those_with_damaged_samples(shards: Path, tmp_path: Path) -> None:
    root = harmed(shards, tmp_path / "shards", {3: no_picture, 50: no_vector})
    for start in (0, 20):
        assert same(batches(root, "ram", start, mismatch=True), batches(root, "none", start, mismatch=True))


def test_no_sample_is_read_twice(shards: Path) -> None:
    stream, reads = open_stream(shards, "train", batch_size=12), []
    read = stream.dataset.store.read
    stream.dataset.store.read = lambda *where: reads.append(where) or read(*where)
    memory_cache.cache_decoded(stream, "ram", 32, CPU, print)
    loader = Loader(stream, 0, device=CPU, resolution=32, threads=1)
    for _ in itertools.islice(loader, 4 * BATCHES):
        pass
    loader.close()
    assert len(reads) == len(set(reads)) == stream.samples and stream.dataset.filled.all()


def test_a_batch_that_was_handed_out_stays_as_it_is(shards: Path) -> None:
    stream = open_stream(shards, "train", batch_size=12)
    memory_cache.cache_decoded(stream, "ram", 32, CPU, print)
    loader = Loader(stream, 0, device=CPU, resolution=32, threads=2)
    first = next(loader)
    copies = [part.clone() for part in first if part is not None]
    first.cover.add_(1)  # nor does what is done to it reach the cache
    for _ in itertools.islice(loader, BATCHES):
        pass
    first.cover.sub_(1)
    assert all(torch.equal(a, b) for a, b in zip(copies, [part for part in first if part is not None], strict=True))
    loader.close()
    stream.dataset.filled[:] = True
    assert torch.equal(stream.batch(0).cover, copies[0])


def test_where_they_do_not_fit_it_says_so_with_numbers_and_goes_on(shards: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(memory_cache, "free_memory", lambda: 1_000_000)
    assert same(batches(shards, "ram"), batches(shards, "none"))
    output = capsys.readouterr().out
    assert output == ("--decoded_cache ram: 0.0 GB of decoded covers and vectors, 0.0 GB are there for them (half "
                      "of what is free): going on without\n")
    monkeypatch.setattr(memory_cache, "bytes_of", lambda *_: (12_300_000_000, 0))
    monkeypatch.setattr(memory_cache, "free_memory", lambda: 10_200_000_000)
    memory_cache.cache_decoded(open_stream(shards, "train", batch_size=12), "ram", 32, CPU, print)
    assert "12.3 GB of decoded covers and vectors, 5.1 GB are there" in capsys.readouterr().out


@pytest.mark.parametrize("resolution", [32, 16])
def test_covers_that_are_stored_on_a_device_are_the_same(shards: Path, resolution: int) -> None:
    stream = open_stream(shards, "train", batch_size=12)
    memory = mmap.mmap(-1, memory_cache.bytes_of(stream.dataset, resolution)[1])  # there is no memory for covers
    stream.dataset = memory_cache.DecodedCache(stream.dataset, resolution, memory, CPU)  # the way of a GPU, on a CPU
    plain = batches(shards, "none", resolution=resolution)
    assert same([stream.batch(number) for number in range(BATCHES)], plain)
    assert stream.dataset.filled.all() and isinstance(stream.dataset.covers, torch.Tensor)


def test_covers_as_the_decoder_gives_them_are_the_same(shards: Path) -> None:
    stream = open_stream(shards, "train", batch_size=12)
    rows, slots = np.arange(12), np.arange(12)
    cover, raw = stream.dataset.reader.allocate_batch(12)
    turned = torch.zeros(12, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # as for a GPU
    for where in (cover, turned):
        assert not stream.dataset.reader.load(rows, slots, where, raw)
    assert torch.equal(cover, turned) and cover.stride() != turned.stride()


def test_foreign_shards_are_not_cached(tmp_path: Path, capsys) -> None:
    from tests.covergen.data.test_dataset import foreign_sample, write_foreign
    write_foreign(tmp_path / "a.tar", [foreign_sample(n) for n in range(12)])
    stream = open_stream(str(tmp_path), "train", batch_size=4)
    memory_cache.cache_decoded(stream, "ram", 32, CPU, print)
    assert "without an index can't be cached decoded: going on without" in capsys.readouterr().out


def test_free_memory_is_that_of_this_machine_or_less() -> None:
    metadata = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < free_memory() <= int(metadata["MemTotal"].split()[0]) * 1024


TWO = """
import itertools, sys, torch
from covergen.data.loader import Loader
from covergen.data.memory_cache import cache_decoded
from covergen.data.stream import open_stream
from covergen.distributed.environment import processes
rank, ranks, _ = processes()
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=ranks)
stream = open_stream(sys.argv[1], "train", batch_size=12, rank=rank, ranks=ranks)
cache_decoded(stream, "ram", 32, torch.device("cpu"), print)
loader = Loader(stream, 0, device=torch.device("cpu"), resolution=32, threads=1)
epoch = stream.samples // 12
for _ in itertools.islice(loader, epoch + 1):
    pass
torch.distributed.barrier()
loader.close()
assert stream.dataset.filled.all(), stream.dataset.filled.mean()  # half of it was read by the other
stream.dataset.reader.store = None
plain = open_stream(sys.argv[1], "train", batch_size=12, rank=rank, ranks=ranks)
for number in range(epoch, 3 * epoch):
    one, other = stream.batch(number), plain.batch(number)
    assert torch.equal(one.cover, other.cover) and torch.equal(one.audio, other.audio)
"""


def test_processes_of_a_machine_share_the_cache(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed")
    before = set(Path("/dev/shm").glob("*covergen*"))
    started = [subprocess.Popen(
        [sys.executable, "-c", TWO, str(shards), str(tmp_path / "store")], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        env=environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")) for rank in range(2)]
    outputs = [process.communicate(timeout=LIMIT)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert set(Path("/dev/shm").glob("*covergen*")) <= before


def test_positions_in_an_album_subset_are_found(shards: Path) -> None:
    stream = open_stream(shards, "train", batch_size=12, album_subset="judge")
    memory_cache.cache_decoded(stream, "ram", 32, CPU, print)
    stream.batch(0)
    filled, rows = stream.dataset.filled, stream.dataset.rows
    assert len(filled) == len(rows) < len(stream.dataset.index.rows)
    assert np.flatnonzero(filled).tolist() == sorted(set(np.searchsorted(rows, stream.rows(0))))
