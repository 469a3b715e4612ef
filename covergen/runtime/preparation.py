"""Before a run begins: its options, model and data in, what the run folder will know of them, or an error, out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from covergen.nn.layers import AudioEncoder
from covergen.nn.turn import Model
from covergen.runtime.config import Training
from covergen.runtime.data import Stream
from covergen.runtime.machine import processes
from shard_tools.formats.index import splits_in


def say(text: str) -> None:
    """A line for the person who watches, from the main process only, beside a progress bar."""
    if processes()[0] == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def facts_of(shards: str, stream: Stream, resolution: int) -> dict[str, Any]:
    """What a run must know of its data to be used without it: genres, audio statistics, resolution, which data."""
    facts = stream.facts
    return {"shards": str(shards), "identity": stream.identity, "samples": facts["samples"], "resolution": resolution,
            "genres": facts["genres"], "audio": facts["audio"]}


def check(model: Model, training: Training, shards: Path) -> None:
    """Raises ValueError for options that don't fit the model or the data, before anything is written."""
    hears = any(isinstance(part, AudioEncoder) for network in model.networks.values() for part in network.modules())
    if hears and training.audio_scale == "raw":
        raise ValueError("--audio_scale raw: the audio encoder of this model needs standardised audio, for raw numbers "
                         "reach 1e13; give --audio_scale standard")
    if training.eval_every and (model.sample is None or "val" not in splits_in(shards)):
        raise ValueError(f"--eval_every {training.eval_every} needs a model that makes covers, and shards with a val "
                         "split and an index")
    if training.judge and not training.eval_every:
        raise ValueError("--judge is for --eval_every N, which is 0")
