"""What is written to URLs: packed shards and run folders, whole or absent, and gone on with after an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from covergen.inference.trained_model import open_model
from covergen.runs.sync import RunSync, fetched_run
from shard_tools.pack import pack
from shard_tools.remote.filesystem import Remote
from tests.support.raw_data import hashes, valid_pairs
from tests.support.runs import TINY, log_of, same_bits, train, weights

pytest.importorskip("fsspec")


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return valid_pairs(tmp_path / "raw", 40)


@pytest.fixture
def out(tmp_path: Path) -> str:
    return f"file://{tmp_path}/far"


def packed(raw: Path, out: str, **options: object) -> int:
    return pack(str(raw), out, samples_per_shard=7, workers=1, **options)


def counted(patch: pytest.MonkeyPatch, fails_at: int | None = None) -> list[str]:
    """The names of files that are uploaded, in order; the network is gone from one of them on."""
    names, put = [], Remote.put

    def counting(self: Remote, path: Path, name: str) -> None:
        if fails_at is not None and len(names) >= fails_at:
            raise OSError("the network is gone")
        names.append(name)
        put(self, path, name)
    patch.setattr(Remote, "put", counting)
    return names


def test_packing_to_a_url_writes_the_same_bytes_the_index_last(raw: Path, out: str, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    names = counted(monkeypatch)
    assert packed(raw, str(tmp_path / "near")) == packed(raw, out) == 0
    assert hashes(tmp_path / "far") == hashes(tmp_path / "near")
    assert names[-1] == "train.index.json" and names[-3:].count("train.index.npy") == 0
    said = capsys.readouterr().out
    assert f"--shards {out}" in said and f"uploaded {len(names)} files to {out}" in said
    assert not list((tmp_path / "cache").rglob("*.tar"))  # nothing stays here
    assert packed(raw, out) == 0 and f"{out} is already packed" in capsys.readouterr().out
    with pytest.raises(ValueError, match=rf"{out} was packed with --seed 0, not 1"):
        packed(raw, out, seed=1)
    assert hashes(tmp_path / "far") == hashes(tmp_path / "near")
    assert packed(raw, out, seed=1, overwrite=True) == packed(raw, str(tmp_path / "other"), seed=1) == 0
    assert hashes(tmp_path / "far") == hashes(tmp_path / "other")


@pytest.mark.parametrize("fails_at", [0, 3, 8, 13])
def test_an_interrupted_upload_goes_on_and_sends_nothing_twice(raw: Path, out: str, tmp_path: Path, fails_at: int,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"gone; .* the same command goes on .* to {out}"):
        first = counted(patch, fails_at)
        packed(raw, out)
    far = tmp_path / "far"
    assert not (far / "train.index.json").exists()
    names = counted(monkeypatch)
    assert packed(raw, out) == 0
    assert packed(raw, str(tmp_path / "near")) == 0 and hashes(far) == hashes(tmp_path / "near")
    assert not {name for name in first if name.endswith(".tar")} & set(names)


def test_a_shard_that_is_gone_or_cut_at_the_url_is_uploaded_again(raw: Path, out: str, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the network is gone"):
        counted(patch, 7)
        packed(raw, out)
    first, second, *_ = sorted((tmp_path / "far").glob("*.tar"))
    first.unlink()
    second.write_bytes(b"cut")
    names = counted(monkeypatch)
    assert packed(raw, out) == 0 and {first.name, second.name} <= set(names)
    assert packed(raw, str(tmp_path / "near")) == 0 and hashes(tmp_path / "far") == hashes(tmp_path / "near")
    second.write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"{out}/{second.name} is missing or damaged .*give --overwrite"):
        packed(raw, out)


def test_a_url_that_holds_something_else_is_refused(raw: Path, out: str, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "thesis.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is not empty \(found thesis\.pdf\)"):
        packed(raw, out)
    with pytest.raises(ValueError, match="web servers take no files"):
        packed(raw, "https://host/x")


def test_a_run_at_a_url_goes_on_on_another_machine_with_the_same_bits(shards: Path, out: str, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(machine: str, steps: int, *more: str) -> str:
        return train(tmp_path, *TINY, "--shards", str(shards), "--steps", str(steps), *more,
                     XDG_CACHE_HOME=str(tmp_path / machine)).stdout
    trained("one", 8, "--out", str(tmp_path / "near"))
    assert f"uploaded to {out}" in trained("one", 4, "--out", out, "--keep", "1")
    far = tmp_path / "far" / "wgan_gp"
    assert [path.name for path in (far / "checkpoints").iterdir()] == ["step_00000004"]
    assert (far / "checkpoints" / "step_00000004" / "whole.json").is_file()
    trained("two", 8, "--out", out, "--keep", "1")
    assert [path.parent.name for path in far.glob("checkpoints/*/trainer.pt")] == ["step_00000008"]
    assert same_bits(weights(far, 8), weights(tmp_path / "near" / "wgan_gp", 8))
    assert [row["step"] for row in log_of(far)] == [row["step"] for row in log_of(tmp_path / "near" / "wgan_gp")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
    assert open_model(f"{out}/wgan_gp").checkpoint.name == "step_00000008"


def checkpoint(folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "g.safetensors").write_bytes(b"weights" * step)
    (path / "trainer.pt").write_bytes(b"state" * step)


def test_a_checkpoint_at_a_url_is_whole_or_does_not_count(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch,
                                                           ) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    sync = RunSync(f"{out}/run", keep=2)
    sync.fetch()
    sync.folder.mkdir(parents=True, exist_ok=True)
    (sync.folder / "config.yaml").write_text("model: wgan_gp\n")
    for step in (1, 2, 3):
        checkpoint(sync.folder, step)
        sync.push()
        sync.wait()
    far = tmp_path / "far" / "run" / "checkpoints"
    assert sorted(path.name for path in far.iterdir() if any(path.iterdir())) == ["step_00000002", "step_00000003"]
    (far / "step_00000003" / "trainer.pt").write_bytes(b"stale" * 3)
    shutil.copytree(far / "step_00000002", far / "step_00000004")
    (far / "step_00000004" / "whole.json").unlink()  # an upload that broke off
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    monkeypatch.setattr("shard_tools.remote.filesystem.BACKOFF", 0.001)
    with pytest.warns(UserWarning, match="step_00000003 is passed over"):
        other = RunSync(f"{out}/run")
        other.fetch()
    assert [path.name for path in (other.folder / "checkpoints").iterdir()] == ["step_00000002"]
    hostile = json.dumps({"../../../x": [1, "0" * 64]})
    (far / "step_00000004" / "whole.json").write_text(hostile)
    with pytest.warns(UserWarning, match="is no name of a file"):
        other.fetch()


def test_a_network_that_is_away_stops_nothing(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    sync = RunSync(f"{out}/run")
    checkpoint(sync.folder, 1)
    with monkeypatch.context() as patch:
        counted(patch, 0)
        with pytest.warns(UserWarning, match="was not uploaded .*the network is gone"):
            sync.push()
            sync.wait()
    sync.push()
    sync.wait()
    assert (tmp_path / "far" / "run" / "checkpoints" / "step_00000001" / "whole.json").is_file()
    with pytest.raises(ValueError, match="is not a run folder"):
        fetched_run(f"{out}/none")
