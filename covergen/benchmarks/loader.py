"""Loading of batches against torchvision's ImageFolder in a DataLoader and against decoding alone."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import PILToTensor

from covergen.benchmarks import alternate, make_demo_shards, report
from covergen.data.dataset import ShardDataset
from covergen.data.decoding import decode
from covergen.data.loader import Loader
from covergen.data.memory_cache import cache_decoded
from covergen.data.stream import BatchStream
from covergen.distributed.environment import keep_memory, use_threads

EPOCHS = 4  # that are read each time: in one, beginning and end would count for much
CACHED_EPOCHS = 20  # of the cache, which is that much faster


def run(resolution: int = 128, batch_size: int = 32, rounds: int = 3, threads: tuple[int, ...] = (1, 2, 4),
        workers: int = 2, samples: int = 2000) -> int:
    """Times the loading of covers and vectors against torchvision's ImageFolder in a DataLoader, and decoding alone.

    Args:
        resolution: side of the covers in pixels.
        batch_size: covers in a batch.
        rounds: how often every contender is measured.
        threads: numbers of threads that decode, as 1,2,4.
        workers: processes of the DataLoader, and threads of covergen where only one number is measured.
        samples: covers and vectors in the data set made for it.
    """
    use_threads(0)
    keep_memory()  # as training does
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        shards = make_demo_shards(Path(folder), resolution, max(40, int(samples / 1.9)))
        raw = Path(folder) / "raw/audio-cover_dataset/cover/train"
        dataset = ShardDataset(shards, "train")
        batches = dataset.samples // batch_size
        jpegs = [bytearray(path.read_bytes()) for path in sorted(raw.glob("*/*.jpg"))]
        print(f"{len(jpegs):,} covers of {resolution} px, {sum(map(len, jpegs)) / len(jpegs) / 1000:.1f} kB each, "
              f"with vectors of {dataset.dimension}")

        def loader(count: int, cache: str = "none") -> Loader:
            stream = BatchStream(dataset, batch_size=batch_size)
            cache_decoded(stream, cache, resolution, torch.device("cpu"), print)
            made = Loader(stream, 0, device=torch.device("cpu"), resolution=resolution, threads=count)
            stack.callback(made.close)
            return made

        def decode_all(pool: ThreadPoolExecutor, decoder: Callable[[bytearray], Any]) -> float:
            began = time.perf_counter()
            portions = [jpegs[i:i + 64] for i in range(0, len(jpegs), 64)]
            list(pool.map(lambda some: len([decoder(jpeg) for jpeg in some]), EPOCHS * portions))
            return EPOCHS * len(jpegs) / (time.perf_counter() - began)

        def torchvision(jpeg: bytearray) -> torch.Tensor:
            return decode_jpeg(torch.frombuffer(jpeg, dtype=torch.uint8), ImageReadMode.RGB)

        def read_first() -> float:
            dataset.reader.checked[:] = False
            return rate(first, batches, batch_size)

        folders = ImageFolder(str(raw), transform=PILToTensor(), allow_empty=True)
        baseline = DataLoader(folders, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=workers,
                              persistent_workers=True)
        contenders = {"ImageFolder + DataLoader": lambda: rate(
            itertools.chain.from_iterable(itertools.repeat(baseline)), EPOCHS * batches, batch_size)}
        for count in threads:
            ours, pool = loader(count), stack.enter_context(ThreadPoolExecutor(count))
            contenders |= {
                f"covergen, {named(count)}": lambda ours=ours: rate(ours, EPOCHS * batches, batch_size),
                f"decoding alone, {named(count)}": lambda pool=pool: decode_all(pool, decode),
                f"torchvision's decoder, {named(count)}": lambda pool=pool: decode_all(pool, torchvision)}
        first, cached = loader(workers), loader(workers, "ram")
        rate(cached, 2 * batches, batch_size)  # fills it
        rates = alternate(contenders | {
            f"first reading, {named(workers)}": read_first,
            f"--decoded_cache ram, {named(workers)}": lambda: rate(cached, CACHED_EPOCHS * batches, batch_size),
        }, rounds)
    median = {name: statistics.median(values) for name, values in rates.items()}
    shares = {alone: {count: median[f"covergen, {named(count)}"] / median[f"{alone}, {named(count)}"]
                      for count in threads} for alone in ("decoding alone", "torchvision's decoder")}
    for alone, share in shares.items():
        print("covergen reaches " + ", ".join(f"{value:.0%} with {named(count)}" for count, value in share.items())
              + f" of the speed of {alone}")
    report("loader", rates, unit="samples/s", base="ImageFolder + DataLoader", faster_is="more",
           about={"resolution": resolution, "batch_size": batch_size, "workers": workers,
                  "share_of_decoding": shares["decoding alone"],
                  "share_of_torchvision": shares["torchvision's decoder"]})
    return 0


def named(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def rate(batches: Iterator, count: int, batch_size: int) -> float:
    """Samples a second over ``count`` batches, after a few that fill the queues."""
    warm = min(4, count // 2)
    sum(1 for _ in itertools.islice(batches, warm))
    began = time.perf_counter()
    read = sum(1 for _ in itertools.islice(batches, count - warm))
    return read * batch_size / (time.perf_counter() - began)
