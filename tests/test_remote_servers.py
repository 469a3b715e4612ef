"""Training from a real S3 server and from nginx, through a network that fails: the same batches, little else."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import TINY, log_of, same_bits, train, weights
from servers import KEYS, Faults, nginx, proxy, s3, upload, watched

from shard_tools.pack import pack

BAD = {"failed": 0.05, "cut": 0.05, "latency": 0.2}
BATCHES = 2  # global batches in a step of TINY
WINDOW = 4


@pytest.fixture(scope="module")
def many(world: Path) -> Path:
    """The small demo world in many shards."""
    out = world.parent / "many"
    assert pack(str(world), str(out), samples_per_shard=10, workers=1) == 0
    return out


def epochs(shards: Path, count: int) -> list[str]:
    """Options that train for whole epochs of the shards."""
    from shard_tools.formats.index import open_index
    samples = len(open_index(shards, "train").rows)
    return ["--steps", str(count * samples // (4 * BATCHES)), "--shard_window", str(WINDOW), "--sample_every", "0"]


def bound_for(shards: Path, windows: float) -> float:
    """GB for so many windows of shards and the indexes."""
    size = max(path.stat().st_size for path in shards.glob("train-*.tar"))
    indexes = sum(path.stat().st_size for path in [*shards.glob("*.index.*"), *shards.glob("*.npz")])
    return (size * (windows * WINDOW + 2) + indexes + 4096) / 1e9


def check(tmp_path: Path, shards: Path, url: str, faults: Faults, count: int, **environment: str) -> None:
    flags = [*TINY, "--batch_size", "4", *epochs(shards, count)]
    train(tmp_path, *flags, "--shards", str(shards), "--name", "here")
    bound = bound_for(shards, 2)
    with watched(tmp_path / "cache") as sizes:
        import time; t=time.time()
        done = train(tmp_path, *flags, "--shards", url, "--name", "there", "--cache_dir", str(tmp_path / "cache"),
                     "--cache_gb", f"{bound:.6f}", **environment)
        print("took", time.time()-t); print(done.stdout)
    here, there = (tmp_path / "runs" / name for name in ("here", "there"))
    step = log_of(here)[-1]["step"]
    assert same_bits(weights(here, step), weights(there, step))
    assert max(sizes) <= bound * 1e9
    fetched = {path: times for path, times in faults.whole.items() if "/train-" in path}
    assert len(fetched) == len(list(shards.glob("train-*.tar")))
    print(faults.requests, faults.broken, fetched, [row.get("speed/data_wait_seconds") for row in log_of(there)])
    return fetched, done, there


@pytest.mark.parametrize("kind", ["s3", "nginx"])
def test_training(tmp_path, many, kind):
    faults = Faults(**BAD)
    if kind == "s3":
        with s3() as server, proxy(server, faults) as url:
            upload(server, many, "demo")
            check(tmp_path, many, "s3://covers/demo", faults, 2, AWS_ENDPOINT_URL=url, **KEYS)
    else:
        with nginx(many, tmp_path / "nginx") as server, proxy(server, faults) as url:
            check(tmp_path, many, url, faults, 2)
