"""Delivery of batches against torchvision's ImageFolder in a DataLoader and against decoding alone."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from covergen.benchmarks import alternate, report
from covergen.data import indexed as data
from covergen.data.decoding import decode
from covergen.data.loader import Loader
from covergen.distributed.environment import keep_memory, use_threads

PASSES = 4  # over the data in each turn: in one, beginning and end would count for much
MORE = 5  # times as many of the cache, which is that much faster


def run(resolution: int = 128, batch_size: int = 32, rounds: int = 3, threads: tuple[int, ...] = (1, 2, 4),
        workers: int = 2, samples: int = 2000) -> int:
    """Times the loading of covers and vectors against torchvision's ImageFolder in a DataLoader, and decoding alone.

    Args:
        resolution: side of the covers in pixels.
        batch_size: covers in a batch.
        rounds: how often every contender takes its turn.
        threads: numbers of threads that decode, as 1,2,4.
        workers: processes of the DataLoader, and threads of covergen where only one number is measured.
        samples: covers and vectors in the data set made for it.
    """
    use_threads(0)
    keep_memory()  # as training does
    rates = time_loaders(resolution, batch_size, samples, rounds, threads, workers)
    median = {name: statistics.median(values) for name, values in rates.items()}
    shares = {}
    for alone in ("decoding alone", "torchvision's decoder"):
        shares[alone] = {count: median[f"covergen, {of(count)}"] / median[f"{alone}, {of(count)}"] for count in threads}
        print("covergen reaches " + ", ".join(f"{share:.0%} with {of(count)}" for count, share in shares[alone].items())
              + f" of the speed of {alone}")
    report("loader", rates, unit="samples/s", base="ImageFolder + DataLoader", faster_is="more",
           about={"resolution": resolution, "batch_size": batch_size, "workers": workers,
                  "share_of_decoding": shares["decoding alone"],
                  "share_of_torchvision": shares["torchvision's decoder"]})
    return 0


def of(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def time_loaders(resolution: int, batch_size: int, samples: int, rounds: int, threads: tuple[int, ...],
                 workers: int) -> dict[str, list[float]]:
    """Samples a second of every contender, over one pass of a data set that is made for it."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import PILToTensor

    from shard_tools.demo import make
    from shard_tools.pack import pack
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        raw, shards = Path(folder) / "raw", Path(folder) / "shards"
        make(raw, tier="toy", resolution=resolution, albums=max(40, int(samples / 1.9)))
        with contextlib.redirect_stdout(None):
            pack(str(raw), str(shards))
        stream = data.ShardDataset(shards, "train", batch_size=batch_size)
        batches = stream.metadata["samples"] // batch_size
        jpegs = [bytearray(path.read_bytes())
                 for path in sorted(raw.glob("audio-cover_dataset/cover/train/*/*.jpg"))]
        print(f"{len(jpegs):,} covers of {resolution} px, {sum(map(len, jpegs)) / len(jpegs) / 1000:.1f} kB each, "
              f"with vectors of {stream.dimension}")
        portions = [jpegs[i:i + 64] for i in range(0, len(jpegs), 64)]

        def loader(count: int, cache: str = "none") -> Loader:
            made = Loader(stream, 0, device=torch.device("cpu"), resolution=resolution, threads=count, cache=cache)
            stack.callback(made.close)
            return made

        def decode_all(pool: ThreadPoolExecutor, decoder: Callable[[bytearray], Any]) -> float:
            began = time.perf_counter()
            for _ in pool.map(lambda some: [decoder(jpeg) for jpeg in some], PASSES * portions):
                pass
            return PASSES * len(jpegs) / (time.perf_counter() - began)

        def general(jpeg: bytearray) -> torch.Tensor:
            return decode_jpeg(torch.frombuffer(jpeg, dtype=torch.uint8), ImageReadMode.RGB)

        def read_first(batches_of: Loader) -> float:
            stream.reader.checked[:] = False
            return rate(batches_of, batches, batch_size)  # once over the data

        folders = ImageFolder(str(raw / "audio-cover_dataset/cover/train"), transform=PILToTensor(), allow_empty=True)
        baseline = DataLoader(folders, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=workers,
                              persistent_workers=True)
        contenders = {"ImageFolder + DataLoader": lambda: rate(again(baseline), PASSES * batches, batch_size)}
        for count in threads:
            mine, pool = loader(count), stack.enter_context(ThreadPoolExecutor(count))
            contenders |= {f"covergen, {of(count)}": lambda mine=mine: rate(mine, PASSES * batches, batch_size),
                           f"decoding alone, {of(count)}": lambda pool=pool: decode_all(pool, decode),
                           f"torchvision's decoder, {of(count)}": lambda pool=pool: decode_all(pool, general)}
        first, kept = loader(workers), loader(workers, "ram")
        for _ in itertools.islice(kept, 2 * batches):  # fills it
            pass
        return alternate(contenders | {
            f"first reading, {of(workers)}": lambda: read_first(first),
            f"--decoded_cache ram, {of(workers)}": lambda: rate(kept, MORE * PASSES * batches, batch_size)}, rounds)


def again(batches: Iterable) -> Iterator:
    """One pass after the other."""
    while True:
        yield from batches


def rate(batches: Iterator, count: int, batch_size: int) -> float:
    """Samples a second over ``count`` batches, after a few that fill the queues."""
    warm = min(4, count // 2)
    for _ in itertools.islice(batches, warm):
        pass
    began = time.perf_counter()
    seen = sum(1 for _ in itertools.islice(batches, count - warm))
    return seen * batch_size / (time.perf_counter() - began)
