"""covergen.train with a pause after every step, and with a note of which samples each process trained in it.

    NOTES=FOLDER python tests/proofs/loss_log.py --model ...

Every process appends to ``FOLDER/<its id>.jsonl``. The pauses (``PAUSE`` seconds, default 0) end when ``FOLDER/hurry``
exists.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from pathlib import Path

if __name__ == "__main__":  # python tests/proofs/NAME.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from covergen import train
from covergen.data.batch import Batch
from covergen.training.engine import Engine
from shard_tools import cli


def note_steps(folder: Path, pause: float) -> None:
    """From now on every step that this process takes is written down, with a checksum of each sample in it."""
    plain = Engine.step
    file = open(folder / f"{os.getpid()}.jsonl", "a")

    def step(self: Engine, number: int, batches: list[Batch], measure: bool = False) -> None:
        plain(self, number, batches, measure)
        samples = [[zlib.crc32(cover.contiguous().numpy()) for cover in batch.cover] for batch in batches]
        file.write(json.dumps({"step": number, "rank": self.ranks.rank, "ranks": self.ranks.ranks,
                               "process": os.getpid(), "time": time.time(), "samples": samples}) + "\n")
        file.flush()
        if not (folder / "hurry").exists():
            time.sleep(pause)

    Engine.step = step


if __name__ == "__main__":
    note_steps(Path(os.environ["NOTES"]), float(os.environ.get("PAUSE", 0)))
    cli.guarded(train.main)
