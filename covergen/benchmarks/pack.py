"""Speed of packing covers and vectors against ``tar -cf`` over the same files, and its memory."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from covergen.benchmarks import alternate, report
from shard_tools.dataset.vectors import vector_header

PICTURES = 300  # every cover is one of them with a few bits of its own
DIMENSION = 1160
INTERVAL = 0.05  # seconds between two readings of the memory


def run(samples: int = 20_000, resolution: int = 128, workers: tuple[int, ...] = (1, 2), rounds: int = 3,
        quality: int = 93, folder: str | None = None) -> int:
    """Times ``shard_tools.pack`` against ``tar -cf`` over the same files, all in the page cache, starts included.

    Packing also checks every file, hashes covers and shards, and sees its bytes to the disk; tar does none of that, so
    tar followed by sha256sum is measured too. Then the memory of packing all samples and a quarter of them.

    Args:
        samples: pairs of a cover and a vector of 1160 numbers, as files in the thesis's layout.
        resolution: side of the covers in pixels.
        workers: numbers of processes to pack with.
        rounds: how often every contender is measured.
        quality: of the covers' JPEG, 12 kB each at 128 px by default.
        folder: where to make the files and archives; none = the folder for temporary files.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        size = make_files(root / "raw", samples, resolution, quality)
        print(f"{samples:,} covers of {resolution} px, vectors of {DIMENSION}, {size / samples / 1000:.1f} kB a pair")
        contenders = {"tar -cf": lambda: tar(root, False), "tar -cf, sha256sum": lambda: tar(root, True)}
        for count in workers:
            contenders[f"pack --workers {count}"] = lambda count=count: pack(root / "raw", root / "out", count)[0]
        seconds = alternate(contenders, rounds)
        rates = {name: [2 * samples / value for value in values] for name, values in seconds.items()}
        memory = {}
        for part in (samples, samples // 4):
            make_files(root / f"part{part}", part, resolution, quality)
            memory[part] = pack(root / f"part{part}", root / "out", max(workers), watch=True)[1] / 1e6
            print(f"{part:9,} samples packed on {max(workers)} workers: {memory[part]:.0f} MB at most, all processes")
        best = min(seconds["tar -cf"])
        print(f"tar -cf: {size / best / 1e6:.0f} MB/s at best")
        report("pack", rates, unit="files/s", base="tar -cf", faster_is="more", about={
            "samples": samples, "resolution": resolution, "bytes": size, "cores": len(os.sched_getaffinity(0)),
            "megabytes": memory})
    return 0


def make_files(root: Path, samples: int, resolution: int, quality: int) -> int:
    """Writes valid covers, no two alike, and vectors of two blocks; returns their bytes."""
    pictures = [_cover(seed, resolution, quality) for seed in range(min(PICTURES, samples))]
    random, size, header = np.random.default_rng(0), 0, vector_header(DIMENSION)
    for number in range(samples):
        stem = f"TR{number:016d}__{number:08x}-0000-0000-0000-000000000000-0__{number:08x}-1000-0000-0000-000000000000"
        genre = f"{'val' if number % 10 == 9 else 'train'}/genre{number % 16:02d}"
        vector = random.normal(3, 1, DIMENSION).astype("<f4")
        vector[:DIMENSION // 2] *= number % 3 > 0
        files = {f"cover/{genre}/{stem}.jpg": _numbered(pictures[number % len(pictures)], number),
                 f"audio/{genre}/{stem}.npy": header + vector.tobytes()}
        for name, data in files.items():
            path = root / "audio-cover_dataset" / name
            if number < 160:
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            size += len(data)
    return size


def _cover(seed: int, resolution: int, quality: int) -> bytes:
    random = np.random.default_rng(seed)
    ground = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((resolution, resolution))
    grain = np.asarray(ground) + random.normal(0, 18, (resolution, resolution, 1))
    output = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(output, "JPEG", quality=quality)
    return output.getvalue()


def _numbered(cover: bytes, number: int) -> bytes:
    """A cover with the bits of a number in the last bits of some bytes of its scan, where that makes no marker."""
    data, start = bytearray(cover), cover.index(b"\xff\xda") + 14
    offsets = [at for at in range(start + 9, min(start + 200, len(data) - 3)) if max(data[at - 1:at + 2]) < 0xFE][:24]
    for bit, at in enumerate(offsets):
        data[at] = data[at] & 0xFE | number >> bit & 1
    return bytes(data)


def tar(root: Path, hashed: bool) -> float:
    """Seconds to archive all files, and to hash the archive."""
    archive = root / "out.tar"
    archive.unlink(missing_ok=True)
    began = time.perf_counter()
    subprocess.run(["tar", "-cf", archive, "-C", root / "raw", "."], check=True)
    if hashed:
        subprocess.run(["sha256sum", archive], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    archive.unlink()
    return seconds


def pack(source: Path, out: Path, workers: int, watch: bool = False) -> tuple[float, int]:
    """Seconds of packing, and, if watched, which slows it, the most bytes of memory that all its processes had."""
    shutil.rmtree(out, ignore_errors=True)
    began, most = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "shard_tools.pack", "--source", source, "--out", out,
                                "--workers", str(workers)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while watch and process.poll() is None:
        most = max(most, _memory(process.pid))
        time.sleep(INTERVAL)
    said = process.communicate()[0].decode()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise ValueError(f"packing failed: {said[-400:]}")
    metadata = json.loads((out / "train.index.json").read_bytes())
    assert metadata["drops"] == {} and metadata["audio"]["dimension"] == DIMENSION
    return seconds, most


def _memory(process: int) -> int:
    """Bytes that a process and those that it started have to themselves or share (their proportional share)."""
    total = 0
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            total += 1024 * int(line.split()[1]) if line.startswith("Pss:") else 0
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has ended
        return total
    return total + sum(_memory(int(child)) for child in children)
