"""The run folder: which data and configuration it is of, and where a run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from covergen.runs.checkpoint import TRAINER, check, checkpoints, latest_valid, quarantine, step_of
from covergen.runs.config import Config, differences, read_run
from shard_tools.core.files import read_bounded, write_atomically
from shard_tools.shards.index import is_audio, metadata_bytes

LARGEST = 8192  # pixels
# What a run knows of its data: field -> value where it is absent, and the test of a value.
FIELDS: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "resolution": (None, lambda value: type(value) is int and 0 < value <= LARGEST),
    "genres": (None, lambda value: isinstance(value, list) and all(type(one) is str for one in value)),
    "audio": (False, lambda value: is_audio(value, known=False)),
    "shards": (None, lambda value: value is None or isinstance(value, str)),
    "identity": (None, lambda value: value is None or isinstance(value, str)),
    "samples": (0, lambda value: type(value) is int),
}


def read_data(folder: Path) -> dict[str, Any]:
    """The metadata of a run's data (``FIELDS``); ValueError for what is not as training writes it."""
    path = folder / "data.json"
    try:
        metadata = json.loads(read_bounded(path))
        if not isinstance(metadata, dict):
            raise ValueError("no mapping")
        metadata = {name: absent for name, (absent, _) in FIELDS.items()} | metadata
        for name, (_, valid) in FIELDS.items():
            if not valid(metadata[name]):
                raise ValueError(f"its {name!r} is not what training writes")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({error}); without it the run can't be used") from None
    return metadata


def check_fit(run: Path, data: Mapping[str, Any], shards: object, metadata: Mapping[str, Any], *, audio: bool,
              covers: str = "larger") -> None:
    """Raises ValueError, which says what was found and expected, unless a run can be used on samples of shards.

    ``data`` is the metadata of the run's data, ``metadata`` that of a split or of the data of a run on the shards;
    ``audio``: the run is conditioned on it; covers must be ``larger`` (not smaller), the ``same``, or any (``none``).
    """
    ours, theirs = data["resolution"], metadata["resolution"]
    if (covers == "larger" and theirs < ours) or (covers == "same" and theirs != ours):
        raise ValueError(f"{shards} has covers of {theirs} px; {run} needs {ours} px")
    if not audio:
        return
    ours, theirs = data["audio"], metadata["audio"]
    if theirs is None or theirs["dimension"] != ours["dimension"]:
        has = f"vectors of {theirs['dimension']} numbers" if theirs else "no audio"
        raise ValueError(f"{shards} has {has}; {run} was trained on {ours['dimension']} numbers")
    ours, theirs = ours.get("features"), theirs.get("features")
    if ours and theirs and ours["sha256"] != theirs["sha256"]:
        raise ValueError(f"{shards} has vectors of {theirs['features']} {theirs['version']} with other options or "
                         f"another order of descriptors; {run} was trained on {ours['features']} {ours['version']}")


def resolve_resume(config: Config, log: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that the configuration's ``resume`` means, or None for a fresh start.

    Of a run's own checkpoints those that are damaged are put aside if an older one is valid; ``log`` gets the warning.
    ValueError where none is valid, the saved configuration defines another run, or a path would fork this very run.
    """
    resume = config.training.resume
    own = _valid_checkpoints(config.folder, log)
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
        inside = _valid_checkpoints(path, log, rename=False)
        found = inside[-1] if inside else path
        if not (found / TRAINER).is_file():
            raise ValueError(f"--resume {resume}: expected auto, never, or the path of a checkpoint or run folder")
        if found.resolve().parent != (config.folder / "checkpoints").resolve():
            found = own[-1] if own else found  # the same command again: the run has begun
        elif own and found.name != own[-1].name:
            raise ValueError(f"--resume {resume}: {config.folder} already went on to step {step_of(own[-1])}; "
                             "give the new course another --name")
        check(found)
    if own and (changed := differences(read_run(config.folder).flat(), config.flat())):
        raise ValueError(f"{config.folder} was started with other options:\n  " + "\n  ".join(changed)
                         + "\nset them back, or give the new run another --name")
    return found


def _valid_checkpoints(folder: Path, log: Callable[[str], None], rename: bool = True) -> list[Path]:
    """The checkpoints of a run up to the newest valid one; later ones are renamed, or only named."""
    found = checkpoints(folder)
    newest, problems = latest_valid(found)
    if found and newest is None:
        raise ValueError("\n  ".join([f"no checkpoint of {folder} is valid:", *problems])
                         + "\nput back a copy of one, or give the new run another --name")
    for problem, damaged in zip(problems, reversed(found), strict=False):
        renamed = f" (the damaged one is now {quarantine(damaged)})" if rename else ""
        log(f"warning: {problem}; going on from {newest}{renamed}")
    return found[:len(found) - len(problems)]


def write_run(folder: Path, config: Config, data: dict[str, Any], resuming: bool) -> None:
    """Writes ``config.yaml`` and ``data.json``; ValueError for a run that goes on with other data than it began on."""
    if resuming and (folder / "data.json").is_file():
        begun = read_data(folder)
        if begun["identity"] is None:  # converted from the thesis, trained here for the first time
            check_fit(folder, begun, data["shards"], data, audio=begun["audio"] is not None, covers="same")
        elif begun["identity"] != data["identity"]:
            raise ValueError(f"{folder} was trained on other shards ({begun['samples']} samples, {begun['shards']}); "
                             f"now {data['samples']} samples, {data['shards']}; give the new run another --name")
    write_atomically(folder / "data.json", metadata_bytes(data))
    write_atomically(folder / "config.yaml", config.text().encode())
