"""``data.json`` of a run folder in; what a run knows of its data, checked, out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shard_tools.formats.facts import is_audio
from shard_tools.formats.index import read_bounded

_SIDES = range(1, 8193)


def read_data(folder: Path) -> dict[str, Any]:
    """The facts of a run's data: resolution, genres, audio (or None), shards, identity and samples.

    Raises:
        ValueError: missing, damaged, or not what training writes.
    """
    path = folder / "data.json"
    try:
        facts = json.loads(read_bounded(path))
        if not isinstance(facts, dict):
            raise ValueError("no mapping")
        for name, fine in (("resolution", lambda value: type(value) is int and value in _SIDES),
                           ("genres", lambda value: isinstance(value, list) and all(type(one) is str for one in value)),
                           ("audio", lambda value: is_audio(value, known=False)),
                           ("shards", lambda value: value is None or isinstance(value, str)),
                           ("identity", lambda value: value is None or isinstance(value, str)),
                           ("samples", lambda value: type(value) is int)):
            absent = {"audio": False, "samples": 0}.get(name)  # the others may be absent where they may be null
            if not fine(facts.get(name, absent)):
                raise ValueError(f"its {name!r} is not what training writes")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} can't be read ({error}); without it the run can't be used") from None
    return {"shards": None, "identity": None, "samples": 0, **facts}
