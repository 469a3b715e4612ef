"""Whether the samples of shards fit a run: covers of its size, and the audio that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_fit(run: Path, data: Mapping[str, Any], shards: object, metadata: Mapping[str, Any], *, audio: bool,
              covers: str = "larger") -> None:
    """Raises ValueError, which says what was found and expected, unless a run can be used on samples of shards.

    Args:
        run, data: folder of the run, and the metadata of its data (``read_data``).
        shards, metadata: folder of the shards, and the metadata of a split, or of the data of a run on them.
        audio: the run is conditioned on audio.
        covers: ``larger``: covers must not be smaller than the run's; ``same``: of its size; ``none``: any will do.
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
