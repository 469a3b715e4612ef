"""Delivery of batches against torchvision's ImageFolder in a DataLoader and against decoding alone."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from covergen.benchmarks import report, take_turns
from covergen.runtime import data
from covergen.runtime.loader import Loader
from covergen.runtime.machine import use_threads


def run(resolution: int = 128, batch_size: int = 32, rounds: int = 3, threads: int = 2, samples: int = 2000) -> int:
    """Times the loading of covers and vectors against torchvision's ImageFolder in a DataLoader, and decoding alone.

    Args:
        resolution: side of the covers in pixels.
        batch_size: covers in a batch.
        rounds: how often every contender takes its turn.
        threads: that decode; the DataLoader has as many worker processes.
        samples: covers and vectors in the data set made for it.
    """
    use_threads(0)
    rates = time_loaders(resolution, batch_size, samples, rounds, threads)
    share = statistics.median(rates["covergen (with vectors)"]) / statistics.median(rates["decoding alone"])
    print(f"covergen reaches {share:.0%} of the speed of decoding alone")
    report("loader", rates, unit="samples/s", base="ImageFolder + DataLoader", faster_is="more",
           about={"resolution": resolution, "batch_size": batch_size, "threads": threads, "share_of_decoding": share})
    return 0


def time_loaders(resolution: int, batch_size: int, samples: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Samples a second of every contender, over one pass of a data set that is made for it."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import PILToTensor

    from shard_tools.demo import make
    from shard_tools.pack import pack
    with tempfile.TemporaryDirectory() as folder:
        raw, shards = Path(folder) / "raw", Path(folder) / "shards"
        make(raw, tier="toy", resolution=resolution, albums=max(40, int(samples / 1.9)))
        with contextlib.redirect_stdout(None):
            pack(str(raw), str(shards))
        stream = data.IndexedShards(shards, "train", batch_size=batch_size)
        batches = stream.facts["samples"] // batch_size
        jpegs = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
                 for path in sorted(raw.glob("audio-cover_dataset/cover/train/*/*.jpg"))]
        print(f"{len(jpegs):,} covers of {resolution} px, {sum(map(len, jpegs)) / len(jpegs) / 1000:.1f} kB each, "
              f"with vectors of {stream.dimension}")
        loader = Loader(stream, 0, device=torch.device("cpu"), resolution=resolution, threads=threads)
        folders = ImageFolder(str(raw / "audio-cover_dataset/cover/train"), transform=PILToTensor(), allow_empty=True)
        baseline = DataLoader(folders, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=threads,
                              persistent_workers=True)
        pool = ThreadPoolExecutor(threads)

        def decode_all() -> float:
            began = time.perf_counter()
            portions = [jpegs[i:i + 64] for i in range(0, len(jpegs), 64)]
            for _ in pool.map(lambda some: [decode_jpeg(jpeg, mode=ImageReadMode.RGB) for jpeg in some], portions):
                pass
            return len(jpegs) / (time.perf_counter() - began)

        try:
            return take_turns({
                "ImageFolder + DataLoader": lambda: rate(iter(baseline), batches, batch_size),
                "covergen (with vectors)": lambda: rate(loader, batches, batch_size),
                "decoding alone": decode_all,
            }, rounds)
        finally:
            loader.close()
            pool.shutdown()


def rate(batches: Iterator, count: int, batch_size: int) -> float:
    """Samples a second over ``count`` batches, after a few that fill the queues."""
    warm = min(4, count // 2)
    for _ in itertools.islice(batches, warm):
        pass
    began = time.perf_counter()
    seen = sum(1 for _ in itertools.islice(batches, count - warm))
    return seen * batch_size / (time.perf_counter() - began)
