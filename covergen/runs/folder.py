"""The run folder: who may write in it, which data and configuration it is of, and where a run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from covergen.data.stream import Stream
from covergen.runs.checkpoint import check, checkpoints, latest_valid, quarantine, step_of
from covergen.runs.compatibility import check_fit
from covergen.runs.config import Config, differences, read_run
from shard_tools.core.files import read_bounded, write_atomically
from shard_tools.shards.index import is_audio, metadata_bytes

_SIDES = range(1, 8193)


def read_data(folder: Path) -> dict[str, Any]:
    """The metadata of a run's data: resolution, genres, audio (or None), shards, identity and samples.

    Raises:
        ValueError: missing, damaged, or not what training writes.
    """
    path = folder / "data.json"
    try:
        metadata = json.loads(read_bounded(path))
        if not isinstance(metadata, dict):
            raise ValueError("no mapping")
        for name, fine in (("resolution", lambda value: type(value) is int and value in _SIDES),
                           ("genres", lambda value: isinstance(value, list) and all(type(one) is str for one in value)),
                           ("audio", lambda value: is_audio(value, known=False)),
                           ("shards", lambda value: value is None or isinstance(value, str)),
                           ("identity", lambda value: value is None or isinstance(value, str)),
                           ("samples", lambda value: type(value) is int)):
            absent = {"audio": False, "samples": 0}.get(name)  # the others may be absent where they may be null
            if not fine(metadata.get(name, absent)):
                raise ValueError(f"its {name!r} is not what training writes")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({error}); without it the run can't be used") from None
    return {"shards": None, "identity": None, "samples": 0, **metadata}


def describe_data(shards: str, stream: Stream, resolution: int) -> dict[str, Any]:
    """What a run must know of its data to be used without it: genres, audio statistics, resolution, which data."""
    metadata = stream.metadata
    return {"shards": str(shards), "identity": stream.identity, "samples": metadata["samples"], "resolution": resolution,
            "genres": metadata["genres"], "audio": metadata["audio"]}


def resolve_resume(config: Config, tell: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that the configuration's ``resume`` means, or None for a fresh start.

    Of a run's own checkpoints those that are damaged are put aside, where an older one is sound; ``tell`` says so.

    Raises:
        ValueError: the run has checkpoints and ``never`` was asked for, or none that is sound; its saved configuration
            defines another run; or a path is no checkpoint or would fork this very run.
    """
    resume = config.training.resume
    own = _sound(config.folder, tell)
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
        inside = _sound(path, tell, keep=True)
        found = inside[-1] if inside else path
        if not (found / "trainer.pt").is_file():
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


def _sound(folder: Path, tell: Callable[[str], None], keep: bool = False) -> list[Path]:
    """The checkpoints of a run up to the newest sound one; later ones are put aside, or only named (``keep``).

    Raises:
        ValueError: there are checkpoints, and not one is sound.
    """
    found = checkpoints(folder)
    newest, problems = latest_valid(found)
    if found and newest is None:
        raise ValueError("\n  ".join([f"no checkpoint of {folder} is sound:", *problems])
                         + "\nput back a copy of one, or give the new run another --name")
    for problem, damaged in zip(problems, reversed(found), strict=False):
        aside = damaged if keep else quarantine(damaged)
        tell(f"warning: {problem}; going on from {newest}" + ("" if keep else f" (the damaged one is now {aside})"))
    return found[:len(found) - len(problems)]


def write_run(folder: Path, config: Config, data: dict[str, Any], resuming: bool) -> None:
    """Writes ``config.yaml`` and ``data.json``; a run that goes on must be on the data it began with.

    Raises:
        ValueError: the shards are not the run's.
    """
    path = folder / "data.json"
    if resuming and path.is_file():
        begun = read_data(folder)
        if begun["identity"] is None:  # converted from elsewhere, trained here for the first time
            check_fit(folder, begun, data["shards"], data, audio=begun["audio"] is not None, covers="same")
            write_atomically(path, metadata_bytes(data))
        elif begun["identity"] != data["identity"]:
            raise ValueError(f"{folder} was trained on other shards ({begun['samples']} samples, {begun['shards']}); "
                             f"now {data['samples']} samples, {data['shards']}; give the new run another --name")
    else:
        write_atomically(path, metadata_bytes(data))
    write_atomically(folder / "config.yaml", config.text().encode())
