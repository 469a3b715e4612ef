"""The run folder on disk: who owns it, its configuration, and checkpoints that are whole or absent.

    runs/<name>/config.yaml  data.json  log.jsonl  grids/  wandb/
    runs/<name>/checkpoints/step_00000500/{<net>.safetensors, <net>_ema.safetensors, trainer.pt}
    runs/<name>/checkpoints/best_00000300/   the same, of the step with the lowest validation loss
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from covergen.runtime.config import Config, differences, read_run
from covergen.runtime.ema import with_averages
from covergen.runtime.facts import read_data
from shard_tools.formats.index import facts_bytes, write_atomically

LOCK_PATIENCE = 60.0


def lock(folder: Path, patience: float = LOCK_PATIENCE) -> IO[str]:
    """Makes this process the only writer of a folder until it closes the file returned or ends, however it ends.

    Waits up to ``patience`` seconds, for a predecessor may still be saving.

    Raises:
        ValueError: another process keeps writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    began, waiting = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if not waiting:
                file.seek(0)
                print(f"waiting for process {file.read().strip() or '?'}, which writes in {folder}", flush=True)
                waiting = True
            if time.monotonic() - began > patience:
                file.seek(0)
                raise ValueError(f"{folder} is in use by process {file.read().strip() or '?'}; stop that one, "
                                 "or give this run another --name") from None
            time.sleep(0.5)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def checkpoints(folder: Path, kind: str = "step") -> list[Path]:
    """The complete checkpoints of a run, oldest first; kind: ``step``, or ``best`` for the best by validation."""
    return sorted((folder / "checkpoints").glob(f"{kind}_????????"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("_")[2])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, step: int, networks: dict[str, nn.Module], averaged: dict[str, nn.Module],
         trainer: dict[str, Any], keep: int, kind: str = "step") -> Path:
    """Writes a checkpoint under a temporary name, syncs and renames it; only then removes older ones.

    The ``keep`` newest stay, of kind ``best`` only this one.
    """
    root = folder / "checkpoints"
    final, temporary = root / f"{kind}_{step:08d}", root / f".tmp_{step:08d}"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp_*"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    for name, network in with_averages(networks, averaged).items():
        # Clones, because safetensors refuses views and tensors that share memory.
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
        save_file(tensors, temporary / f"{name}.safetensors")
    torch.save(trainer, temporary / "trainer.pt")
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    if final.exists():  # the same step saved again (a stop right after a save): same content
        shutil.rmtree(temporary)
        return final
    os.replace(temporary, final)
    _sync(root)
    found = checkpoints(folder, kind)
    # The newest best is the one just saved, whatever a course that was killed had found later on.
    for old in found[:-keep] if kind == "step" else [path for path in found if path != final]:
        doomed = root / f".tmp_{old.name}"
        os.replace(old, doomed)  # a kill while removing must not leave half a checkpoint under a good name
        shutil.rmtree(doomed)
    return final


def load_networks(checkpoint: Path, networks: dict[str, nn.Module]) -> None:
    """Fills networks, by the names of their files, from a checkpoint.

    Raises:
        ValueError: a file is missing or damaged, or its names or shapes are not the network's.
    """
    for name, network in networks.items():
        path = checkpoint / f"{name}.safetensors"
        try:
            if path.exists() and not path.is_file():  # a FIFO would be waited for
                raise ValueError("not a file")
            network.load_state_dict(load_file(path))
        except Exception as error:  # safetensors raises its own kinds for damaged files
            lines = str(error).splitlines()
            more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
            raise ValueError(f"{path} can't be loaded: {' '.join(line.strip() for line in lines[:2])}{more}") from None


def load(checkpoint: Path, networks: dict[str, nn.Module], averaged: dict[str, nn.Module]) -> dict[str, Any]:
    """Fills the networks and averages from a checkpoint and returns its ``trainer.pt``; ValueError as above."""
    load_networks(checkpoint, with_averages(networks, averaged))
    try:
        if (checkpoint / "trainer.pt").exists() and not (checkpoint / "trainer.pt").is_file():
            raise ValueError("not a file")
        return torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{checkpoint / 'trainer.pt'} can't be loaded: {error}") from None


def start_from(config: Config) -> Path | None:
    """The checkpoint that the configuration's ``resume`` means, or None for a fresh start.

    Raises:
        ValueError: the run has checkpoints and ``never`` was asked for, its saved configuration defines another run, or
            a path is no checkpoint or would fork this very run.
    """
    own, resume = checkpoints(config.folder), config.training.resume
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by the launcher, with the same command
    if resume == "auto" or (resume == "never" and restarted):
        found = own[-1] if own else None
    elif resume == "never":
        if own:
            raise ValueError(f"{config.folder} already holds step {step_of(own[-1])}; --resume auto goes on from it, "
                             "another --name starts afresh")
        found = None
    else:
        path = Path(resume)
        inside = checkpoints(path)
        found = inside[-1] if inside else path
        if not (found / "trainer.pt").is_file():
            raise ValueError(f"--resume {resume}: expected auto, never, or the path of a checkpoint or run folder")
        if found.resolve().parent != (config.folder / "checkpoints").resolve():
            found = own[-1] if own else found  # the same command again: the run has begun
        elif own and found.name != own[-1].name:
            raise ValueError(f"--resume {resume}: {config.folder} already went on to step {step_of(own[-1])}; "
                             "give the new course another --name")
    if own and (changed := differences(read_run(config.folder).flat(), config.flat())):
        raise ValueError(f"{config.folder} was started with other options:\n  " + "\n  ".join(changed)
                         + "\nset them back, or give the new run another --name")
    return found


def _dimension(facts: dict[str, Any]) -> int | None:
    return facts["audio"]["dimension"] if facts["audio"] else None


def write_run(folder: Path, config: Config, data: dict[str, Any], resuming: bool) -> None:
    """Writes ``config.yaml`` and ``data.json``; a run that goes on must be on the data it began with.

    Raises:
        ValueError: the shards are not the run's.
    """
    path = folder / "data.json"
    if resuming and path.is_file():
        begun = read_data(folder)
        if begun["identity"] is None:  # converted from elsewhere, trained here for the first time
            for what, old, new in ((f"{folder} makes covers of", begun["resolution"], data["resolution"]),
                                   (f"{folder} hears vectors of", *map(_dimension, (begun, data)))):
                if old not in (None, new):
                    raise ValueError(f"{what} {old}, these shards have {new}; train it on shards like its own")
            write_atomically(path, facts_bytes(data))
        elif begun["identity"] != data["identity"]:
            raise ValueError(f"{folder} was trained on other shards ({begun['samples']} samples, {begun['shards']}); "
                             f"now {data['samples']} samples, {data['shards']}; give the new run another --name")
    else:
        write_atomically(path, facts_bytes(data))
    write_atomically(folder / "config.yaml", config.text().encode())
