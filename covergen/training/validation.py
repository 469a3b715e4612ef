"""How good a model is on covers it was not trained on: the validation split in, mean losses out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from covergen.data.loader import Loader
from covergen.data.sampling import seed_of
from covergen.data.stream import SequentialBatches
from covergen.distributed.interrupts import StopSignal
from covergen.models.base import Phase
from covergen.training.engine import Engine


@dataclass
class EarlyStopping:
    """What is remembered of the losses of past epochs.

    Attributes:
        limit: epochs without a better loss after which to stop; 0 never stops.
        best, best_step: the lowest loss and when it was.
        waited: epochs since then.
        due: a validation was broken off and is to be made before training goes on.
    """

    limit: int
    best: float = field(default=float("inf"))
    best_step: int = 0
    waited: int = 0
    validation_pending: bool = False

    def update(self, step: int, loss: float, epoch: bool = True) -> bool:
        """Takes in the loss at a step; True when it is the best so far. ``epoch``: an epoch ended here."""
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
            return True
        self.waited += epoch
        return False

    @property
    def should_stop(self) -> bool:
        """Whether to stop."""
        return 0 < self.limit <= self.waited

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited,
                **({"due": True} if self.validation_pending else {})}

    def told(self, folder: Path) -> str:
        """The best loss, for people; a run that was converted may not have the weights of then."""
        where = folder / "checkpoints" / f"best_{self.best_step:08d}"
        return (f"the best validation loss, {self.best:.6g}, was at step {self.best_step}"
                + (f": {where}" if where.is_dir() else ""))

    def restore(self, state: dict[str, Any] | None) -> None:
        """Takes over what ``state`` gave; None is of a run that was not validated."""
        if state:
            self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
            self.validation_pending = state.get("due", False)


def validate(phase: Phase, engine: Engine, batches: SequentialBatches, resolution: int, stop: StopSignal,
             ) -> dict[str, float] | None:
    """Means over a whole split of a phase's loss and scalars, alike on all ranks; None when it was stopped before.

    Args:
        phase: one of the model's; its noise is the same in every call and on any number of ranks.
        engine: that trains the model; running statistics are those of this moment.
        batches: of the split, this rank's.
        resolution: side of the covers that the model was built for.
        stop: whether to break off, of any rank.
    """
    loader = Loader(batches, 0, device=engine.device, resolution=resolution, threads=1)
    sums, generator = 0.0, torch.Generator(engine.device)
    try:
        for number in range(batches.batches):
            if engine.agree(bool(stop)):
                return None
            batch, offsets = next(loader), batches.offsets(number)
            weight = len(offsets)  # 0: the batch is one sample that does not count, but names what is measured
            generator.manual_seed(seed_of(engine.training.seed, "validation", number))
            chosen = (torch.from_numpy(offsets) if weight else torch.zeros(1, dtype=torch.int64)).to(engine.device)
            noise = {name: values[chosen] for name, values in phase.sample_noise(batches.batch_size, generator).items()}
            loss, scalars = engine.infer(lambda _, batch=batch, noise=noise: phase(batch, noise))
            names = ["loss", *scalars]
            sums = sums + weight * torch.stack([loss, *scalars.values()]).double()
    finally:
        loader.close()
    return dict(zip(names, (engine.total(sums) / batches.dataset.samples).tolist(), strict=True))
