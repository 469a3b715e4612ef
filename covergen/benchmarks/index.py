"""Opening an index of many rows: seconds and memory until the rows of the first batches are known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from shard_tools.shards.index import ROW, write_index

BLOCK = 500_000  # rows
COVER, VECTOR, TAR = 10_700, 4_768, 512  # bytes of a cover, of a vector and of a tar's header
TRACKS = 10  # of an album, about
BATCHES, BATCH = 100, 256

OPEN = """
import json, sys, time
from covergen.data.dataset import ShardDataset
from covergen.data.stream import BatchStream
def memory():
    lines = open("/proc/self/status").read().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
before, began = memory()["VmHWM"], time.perf_counter()
stream = BatchStream(ShardDataset(sys.argv[1], "train"), batch_size=int(sys.argv[4]), order=sys.argv[2])
opened = time.perf_counter()
for number in range(int(sys.argv[3])):
    stream.rows(10**6 + 97 * number)
print(json.dumps({"open_seconds": opened - began, "rows_seconds": time.perf_counter() - opened,
                  "peak_gib": memory()["VmHWM"], "before_gib": before}))
"""


def run(rows: int = 10_000_000, shard_samples: int = 1_000, orders: tuple[str, ...] = ("sample", "group")) -> int:
    """Measures, in a process of its own, how long an index takes to open and how much memory, in either order.

    Args:
        rows: samples in the index, which is made up and lies in a temporary folder.
        shard_samples: samples in a shard.
        orders: of which --order, sample and group.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_index(root, rows, shard_samples)
        size = (root / "train.index.npy").stat().st_size
        print(f"{rows:,} rows, {size / 1e6:,.0f} MB, {-(-rows // shard_samples):,} shards; rows of {BATCHES} batches "
              f"of {BATCH}\n{'order':8}{'open':>10}{'rows':>10}{'peak':>12}{'of that, the imports':>24}")
        measured = {order: json.loads(subprocess.run(
            [sys.executable, "-c", OPEN, str(root), order, str(BATCHES), str(BATCH)], check=True, capture_output=True,
            text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).stdout) for order in orders}
    for order, found in measured.items():
        print(f"{order:8}{found['open_seconds']:>8.2f} s{found['rows_seconds']:>8.2f} s{found['peak_gib']:>8.2f} GiB"
              f"{found['before_gib']:>20.2f} GiB")
    print(json.dumps({"bench": "index", "rows": rows, "bytes": size, **measured}))
    return 0


def make_index(root: Path, rows: int, shard_samples: int) -> None:
    """Writes a train index of so many rows block by block, and its shards as empty files."""
    total = -(-rows // shard_samples)
    shards = [{"name": f"train-{number:05d}-of-{total:05d}.tar",
               "samples": min(shard_samples, rows - number * shard_samples),
               "bytes": shard_samples * (COVER + VECTOR), "sha256": "0" * 64} for number in range(total)]
    for shard in shards:
        (root / shard["name"]).touch()
    genres = [f"genre {number:02d}" for number in range(14)]
    albums, draws = max(2, rows // TRACKS), np.random.default_rng(0)
    metadata = {"samples": rows, "groups": albums, "resolution": 128, "audio": None, "genres": genres,
                "genre_counts": dict.fromkeys(genres, rows // 14), "shards": shards, "splits": ["train"], "drops": {},
                "quarantine_sha256": ""}

    def rows_from(start: int) -> np.ndarray:
        numbers = np.arange(start, min(start + BLOCK, rows))
        block = np.zeros(len(numbers), ROW)
        block["shard"] = numbers // shard_samples
        block["cover_offset"] = TAR + numbers % shard_samples * (COVER + VECTOR + 2 * TAR)
        block["audio_offset"] = block["cover_offset"] + COVER + TAR
        block["cover_bytes"], block["audio_bytes"] = COVER, VECTOR
        block["genre"] = draws.integers(0, 14, len(numbers))
        block["group"] = draws.integers(0, albums, len(numbers)) * 2_654_435_761
        return block

    write_index(root, "train", metadata, rows, map(rows_from, range(0, rows, BLOCK)))
