"""How good a model is on covers it was not trained on: the validation split in, mean losses out."""

from __future__ import annotations

import numpy as np
import torch

from covergen.nn.turn import Turn
from covergen.runtime.data import Batch, IndexedShards
from covergen.runtime.engine import Engine
from covergen.runtime.loader import Loader
from covergen.runtime.order import seed_of
from covergen.runtime.stopping import Stop


class Pass:
    """One pass over a split in its own order: batch k is this rank's part of the k-th global batch, the last smaller.

    Together the ranks read every sample exactly once, whatever their number.
    """

    pure, notice = True, None

    def __init__(self, shards: IndexedShards) -> None:
        self.shards, self.count = shards, shards.facts["samples"]
        self.batches = -(-self.count // shards.batch_size)

    def places(self, number: int) -> np.ndarray:
        """This rank's places among the samples of a global batch; none when there are fewer samples than ranks."""
        size = min(self.shards.batch_size, max(0, self.count - number * self.shards.batch_size))
        return np.array_split(np.arange(size), self.shards.ranks)[self.shards.rank]

    def batch(self, number: int) -> Batch:
        """This rank's part of a global batch; a sample that is not its own where it has none."""
        rows = number * self.shards.batch_size + self.places(number)
        return self.shards.read(rows if len(rows) else np.zeros(1, np.int64))


def validate(turn: Turn, engine: Engine, shards: IndexedShards, resolution: int, stop: Stop) -> dict[str, float] | None:
    """Means over a whole split of a turn's loss and scalars, alike on all ranks; None when it was stopped before.

    Args:
        turn: one of the model's; its noise is the same in every call and on any number of ranks.
        engine: that trains the model; running statistics are those of this moment.
        shards: the split, cut for this rank.
        resolution: side of the covers that the model was built for.
        stop: whether to break off, of any rank.
    """
    each = Pass(shards)
    loader = Loader(each, 0, device=engine.device, resolution=resolution, threads=1)
    sums, generator = 0.0, torch.Generator(engine.device)
    try:
        for number in range(each.batches):
            if engine.agree(bool(stop)):
                return None
            batch, places = next(loader), each.places(number)
            weight = len(places)  # 0: the batch is one sample that does not count, but names what is measured
            generator.manual_seed(seed_of(engine.training.seed, "validation", number))
            chosen = torch.from_numpy(places if weight else np.zeros(1, np.int64)).to(engine.device)
            noise = {name: values[chosen] for name, values in turn.draw(shards.batch_size, generator).items()}
            loss, scalars = engine.infer(lambda _, batch=batch, noise=noise: turn(batch, noise))
            names = ["loss", *scalars]
            sums = sums + weight * torch.stack([loss, *scalars.values()]).double()
    finally:
        loader.close()
    return dict(zip(names, (engine.total(sums) / each.count).tolist(), strict=True))
