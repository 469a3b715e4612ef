"""Training from a real S3 server and from nginx, through a network that fails: the same weights, each shard once.

The quick proofs train two epochs in windows of shards through a cache of two windows; the slow ones longer, and watch
that training no longer waits once the shards are here.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from covergen.data.stream import open_stream
from shard_tools.pack import pack
from shard_tools.remote.filesystem import Remote
from shard_tools.remote.index_cache import resolve
from shard_tools.shards.index import open_index
from tests.support.raw_data import valid_pairs
from tests.support.runs import TINY, log_of, same_bits, train, weights
from tests.support.servers import KEYS, Faults, nginx, proxy, s3, upload, watched

pytest.importorskip("aiohttp")
FLAGS = [*TINY, "--batch_size", "4", "--sample_every", "0", "--save_every", "1000"]
READ = 8  # covers in a step: two batches
WINDOW = 4


def bad() -> Faults:
    """The network of these tests."""
    return Faults(failed=0.05, cut=0.05, latency=0.2)


def two_epochs(shards: Path) -> list[str]:
    return ["--steps", str(2 * len(open_index(shards, "train").rows) // READ), "--shard_window", str(WINDOW)]


@pytest.fixture(scope="module")
def here(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the shards on this machine's disk."""
    folder = tmp_path_factory.mktemp("here")
    train(folder, *FLAGS, *two_epochs(many), "--shards", str(many))
    return folder / "runs" / "wgan_gp"


@contextlib.contextmanager
def served(kind: str, shards: Path, work: Path, faults: Faults) -> Iterator[tuple[str, dict[str, str]]]:
    """Shards on a server behind a bad network: their URL, and the environment that it needs."""
    if kind == "s3":
        with s3() as server, proxy(server, faults) as url:
            upload(server, shards, "demo")
            yield "s3://covers/demo", {"AWS_ENDPOINT_URL": url, **KEYS}
    else:
        with nginx(shards, work / "nginx") as server, proxy(server, faults) as url:
            yield url, {}


def bound_for(shards: Path, windows: int) -> float:
    """GB for so many windows of shards, and the indexes."""
    largest = max(path.stat().st_size for path in shards.glob("train-*.tar"))
    indexes = sum(path.stat().st_size for path in [*shards.glob("*.index.*"), *shards.glob("*.npz")])
    return (largest * (windows * WINDOW + 2) + indexes + 4096) / 1e9


def of_training(faults: Faults) -> Counter:
    return Counter({path.rpartition("/")[2]: times for path, times in faults.whole.items() if "/train-" in path})


@pytest.mark.parametrize(("kind", "ranks"), [
    ("s3", 1), pytest.param("nginx", 1, marks=pytest.mark.slow), pytest.param("nginx", 2, marks=pytest.mark.slow)])
def test_training_through_a_bad_network_gives_the_weights_of_local_shards(kind: str, ranks: int, many: Path, here: Path,
                                                                          tmp_path: Path) -> None:
    faults, bound = bad(), bound_for(many, 2)
    with served(kind, many, tmp_path, faults) as (url, environment), watched(tmp_path / "cache") as sizes:
        said = train(tmp_path, *FLAGS, *two_epochs(many), "--shards", url, "--shard_cache_dir", str(tmp_path / "cache"),
                     "--shard_cache_gb", f"{bound:.6f}", ranks=ranks, **environment).stdout
    there = tmp_path / "runs" / "wgan_gp"
    step = log_of(here)[-1]["step"]
    if ranks == 1:
        assert same_bits(weights(here, step), weights(there, step))
    assert max(sizes) <= bound * 1e9
    fetched = of_training(faults)
    assert set(fetched) == {path.name for path in many.glob("train-*.tar")}
    assert max(fetched.values()) <= 2  # epochs: once in each, or not again where the cache still had it
    assert faults.broken
    texts = [path for path in there.rglob("*") if path.suffix in (".yaml", ".json", ".jsonl")]
    written = [path.read_text(errors="replace") for path in texts]
    assert not any("hidden-words" in text for text in [said, *written])


@pytest.mark.parametrize("kind", [pytest.param("s3", marks=pytest.mark.slow), "nginx"])
def test_once_warm_nothing_is_waited_for_and_nothing_fetched(kind: str, many: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    faults = bad()
    with served(kind, many, tmp_path, faults) as (url, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        stream = open_stream(resolve(url, tmp_path / "cache"), "train", batch_size=4, seed=1)
        batches, requests = stream.epoch // 4, []
        for epoch in range(3):
            for number in range(epoch * batches, (epoch + 1) * batches):
                stream.batch(number)
            requests.append(faults.requests)
    assert requests[1:] == [requests[0]] * 2  # there is nothing but a request to wait for
    assert of_training(faults) == Counter(path.name for path in many.glob("train-*.tar"))


def test_s3_says_what_is_wrong_with_keys_and_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in KEYS:
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(PermissionError, match=r"s3://covers/x/.*: access denied .*AWS_"):
            Remote("s3://covers/x").read("train.index.json")
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(FileNotFoundError, match="no shards with an index there"):
            resolve("s3://covers/x", tmp_path / "cache")
        with pytest.raises(FileNotFoundError, match="no shards with an index there"):
            resolve("s3://nobodys/x", tmp_path / "cache")


def test_packing_to_s3_gives_the_bytes_of_packing_to_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    faults = Faults(failed=0.05, latency=0.01)
    with s3() as server, proxy(server, faults) as url:
        for name, value in {"AWS_ENDPOINT_URL": url, **KEYS}.items():
            monkeypatch.setenv(name, value)
        raw, remote = str(valid_pairs(tmp_path / "raw", 24)), Remote("s3://covers/packed")
        for out in (remote.url, str(tmp_path / "near")):
            assert pack(raw, out, samples_per_shard=6, workers=1) == 0
        assert {name: remote.read(name) for name in remote.sizes()} == {
            path.name: path.read_bytes() for path in (tmp_path / "near").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "nginx"])
def test_a_longer_training_waits_for_nothing_once_warm(kind: str, tmp_path: Path) -> None:
    from shard_tools.demo import make
    make(tmp_path / "raw", tier="toy", albums=1500)
    shards, faults = tmp_path / "shards", bad()
    assert pack(str(tmp_path / "raw"), str(shards), samples_per_shard=50, workers=1) == 0
    steps = str(3 * len(open_index(shards, "train").rows) // 128)
    flags = [*TINY, "--steps", steps, "--batch_size", "64", "--log_every", "10", "--width", "24", "--sample_every", "0",
             "--save_every", "1000", "--shard_window", "8"]
    train(tmp_path, *flags, "--shards", str(shards), "--name", "near")
    with served(kind, shards, tmp_path, faults) as (url, environment), watched(tmp_path / "cache") as sizes:
        bound = bound_for(shards, 7)  # windows of 8: the last, this and the next one, and 4
        train(tmp_path, *flags, "--shards", url, "--name", "far", "--shard_cache_dir", str(tmp_path / "cache"),
              "--shard_cache_gb", f"{bound:.6f}", **environment)
    near, far = tmp_path / "runs" / "near", tmp_path / "runs" / "far"
    step = log_of(near)[-1]["step"]
    assert same_bits(weights(near, step), weights(far, step))
    assert max(sizes) <= bound * 1e9 and max(of_training(faults).values()) <= 3
    waited, before = (sum(row["speed/data_wait_seconds"] for row in log_of(run)[2:]) for run in (far, near))
    assert waited < before + 0.01 * sum(10 * 128 / row["speed/images_per_second"] for row in log_of(far)[2:])
