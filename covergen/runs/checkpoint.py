"""Checkpoints that are whole or absent: networks and the state of training, with a manifest of their files' hashes.

    runs/<name>/config.yaml  data.json  log.jsonl  grids/  wandb/
    runs/<name>/checkpoints/step_00000500/{<net>.safetensors, <net>_ema.safetensors, trainer.pt, manifest.json}
    runs/<name>/checkpoints/best_00000300/   the same, of the step with the lowest validation loss
    runs/<name>/checkpoints/corrupt_00000500/   one that did not fit its manifest when the run went on
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from covergen.runs.log import log_path
from covergen.runs.state import TrainState
from covergen.runs.sync import RunSync
from shard_tools.core.files import file_sha256, open_regular, read_bounded, sync

MANIFEST, TRAINER = "manifest.json", "trainer.pt"


class Checkpoints:
    """Loads and saves an ``Engine`` of ``covergen.training`` and a ``TrainState``; a thread writes, one at a time."""

    def __init__(self, folder: Path, keep: int, start: Path | None = None, sync: RunSync | None = None) -> None:
        """A run goes on from ``start`` (None: a new one), its newest ``keep`` checkpoints stay."""
        self.folder, self.keep, self.start, self.sync = folder, keep, start, sync
        self.blocked_seconds = 0.0  # that training has spent on copying and on waiting for an earlier checkpoint
        self.failure: OSError | None = None  # why the last checkpoint could not be written
        self._thread: threading.Thread | None = None

    def load_latest(self, engine: Any) -> TrainState:
        """Fills the engine from ``start``; ValueError for a file that is missing, damaged, or of other networks."""
        if self.start is None:
            return TrainState()
        load_networks(self.start, engine.networks)
        path = self.start / TRAINER
        try:
            with open_regular(path) as file:
                saved = torch.load(file, map_location="cpu", weights_only=True)
            engine.load_state_dict(saved["engine"])
            return TrainState.from_state_dict(saved["state"])
        except Exception as error:  # boundary: torch raises many kinds for damaged files
            raise ValueError(f"{path} can't be loaded: {type(error).__name__}: {error}") from None

    def save(self, state: TrainState, engine: Any, kinds: list[str]) -> None:
        """Compares the weights of all ranks (``Ranks.check_weights``), then rank 0 starts to write checkpoints.

        ``failure`` says, later, what can't be written; nothing more is written then.
        """
        engine.ranks.check_weights(engine.networks)
        if not engine.ranks.main:
            return
        began = time.perf_counter()
        self.wait()
        if not self.failure:
            if log_path(self.folder).is_file():  # a checkpoint must never know more than the log
                sync(log_path(self.folder))
            taken = snapshot(state, engine.networks, engine.state_dict())
            # Not a daemon: a process that ends in peace ends after its last checkpoint is on disk.
            self._thread = threading.Thread(target=self._write, args=(taken, kinds), name="checkpoint")
            self._thread.start()
        self.blocked_seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Waits until everything is on disk, or has failed."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits until all that the folder holds is uploaded, too, or could not be."""
        self.wait()
        if self.sync:
            self.sync.push()
            self.sync.wait()

    def _write(self, taken: Snapshot, kinds: list[str]) -> None:
        try:
            for kind in kinds:
                write(self.folder, taken, self.keep, kind)
            if self.sync:
                self.sync.push()
        except OSError as error:
            self.failure = error


class Snapshot(NamedTuple):
    """What a checkpoint holds, in the memory of the host and apart from what goes on being trained."""

    step: int
    networks: dict[str, dict[str, Tensor]]  # tensors by name, by the name of their file
    trainer: dict[str, Any]  # content of trainer.pt


def snapshot(state: TrainState, networks: dict[str, nn.Module], engine: dict[str, Any]) -> Snapshot:
    """Copies networks, by the names of their files, and the states of training and of the engine as they are now."""
    files = {name: network.state_dict() for name, network in networks.items()}
    return Snapshot(state.step, _copied(files), _copied({"state": state.state_dict(), "engine": engine}))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):  # safetensors refuses views and tensors that share memory
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


def checkpoints(folder: Path, kind: str = "step") -> list[Path]:
    """The complete checkpoints of a run, oldest first; kind: ``step``, or ``best`` for the best by validation."""
    return sorted((folder / "checkpoints").glob(f"{kind}_????????"))


def last_good(folder: Path) -> str:
    """A sentence about the newest checkpoint of a run."""
    found = checkpoints(folder)
    return f"The last good checkpoint is {found[-1]}" if found else "There is no checkpoint yet"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("_")[2])


def write(folder: Path, taken: Snapshot, keep: int, kind: str = "step") -> Path:
    """Writes a checkpoint under a temporary name, its manifest last, syncs and renames it; then removes older ones.

    The ``keep`` newest stay, of kind ``best`` only this one.
    """
    root = folder / "checkpoints"
    final, temporary = root / f"{kind}_{taken.step:08d}", root / f".tmp_{taken.step:08d}"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp_*"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    try:
        _fill(temporary, taken)
    except Exception as error:  # safetensors and torch have their own kinds for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise error if isinstance(error, OSError) else OSError(f"{final} can't be written: {error}") from error
    if final.exists():  # the same step saved again (a stop right after a save): same content
        shutil.rmtree(temporary)
        return final
    os.replace(temporary, final)
    sync(root)
    found = checkpoints(folder, kind)
    # The newest best is the one just saved, whatever a course that was killed had found later on.
    for old in found[:-keep] if kind == "step" else [path for path in found if path != final]:
        doomed = root / f".tmp_{old.name}"
        os.replace(old, doomed)  # a kill while removing must not leave half a checkpoint under a good name
        shutil.rmtree(doomed)
    return final


def _fill(temporary: Path, taken: Snapshot) -> None:
    for name, tensors in taken.networks.items():
        save_file(tensors, temporary / f"{name}.safetensors")
    torch.save(taken.trainer, temporary / TRAINER)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in temporary.iterdir()}
    (temporary / MANIFEST).write_text(json.dumps({"step": taken.step, "files": files}, indent=1) + "\n")
    for path in [*temporary.iterdir(), temporary]:
        sync(path)


def check(checkpoint: Path, training: bool = True) -> None:
    """Raises ValueError for a file that is not as the manifest says; without a manifest a checkpoint is taken as it is.

    Without ``training`` the networks alone, which is all that is left of a run that was passed on to make covers.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(read_bounded(path))
        files = {str(name): (int(one["bytes"]), str(one["sha256"])) for name, one in manifest["files"].items()}
        if manifest.get("step") != step_of(checkpoint):
            raise ValueError(f"it is of step {str(manifest.get('step'))[:20]}")
    except FileNotFoundError:
        return
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} can't be loaded: it lists no files") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be loaded: {getattr(error, 'strerror', '') or error}") from None
    for name, (size, sha256) in files.items():
        path = checkpoint / name
        if name == TRAINER and not training:
            continue
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{path} can't be loaded: it is missing")
        if path.stat().st_size != size or file_sha256(path) != sha256:
            raise ValueError(f"{path} can't be loaded: it does not have the size and SHA-256 of its manifest")


def latest_valid(found: list[Path], training: bool = True) -> tuple[Path | None, list[str]]:
    """The last of some checkpoints, oldest first, that fits its manifest (see ``check``), and why later ones don't."""
    problems: list[str] = []
    for path in reversed(found):
        try:
            check(path, training)
            return path, problems
        except ValueError as error:
            problems.append(str(error))
    return None, problems


def quarantine(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that nobody goes on from it and it can still be examined."""
    aside = checkpoint.with_name(f"corrupt_{step_of(checkpoint):08d}")
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(checkpoint, aside)
    return aside


def load_networks(checkpoint: Path, networks: dict[str, nn.Module]) -> None:
    """Fills networks, by the names of their files; ValueError for a damaged file or other names or shapes in it."""
    for name, network in networks.items():
        path = checkpoint / f"{name}.safetensors"
        try:
            open_regular(path).close()  # a FIFO would be waited for
            network.load_state_dict(load_file(path))
        except Exception as error:  # safetensors raises its own kinds for damaged files
            lines = str(error).splitlines()
            more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
            raise ValueError(f"{path} can't be loaded: {' '.join(line.strip() for line in lines[:2])}{more}") from None
