"""How good a model is on covers that it was not trained on: mean losses over the validation split."""

from __future__ import annotations

import torch

from covergen.data.loader import Loader
from covergen.data.sampling import seed_of
from covergen.data.stream import SequentialBatches
from covergen.distributed.interrupts import StopSignal
from covergen.models.base import Phase
from covergen.runs.state import TrainState
from covergen.training.engine import Engine


class Validation:
    """Validates a model with the loss of one of its phases, and keeps early stopping up to date."""

    def __init__(self, phase: Phase, engine: Engine, batches: SequentialBatches, resolution: int, seed: int) -> None:
        """The phase's noise is the same in every call and on any number of ranks; batches are this rank's part."""
        self.phase, self.engine, self.batches, self.resolution, self.seed = phase, engine, batches, resolution, seed

    def run(self, state: TrainState, stop: StopSignal, epoch: bool = True) -> dict[str, float]:
        """Metrics ``val/...`` to log; empty if a stop of any rank broke it off, which sets ``validation_pending``."""
        losses = validate(self.phase, self.engine, self.batches, self.resolution, self.seed, stop)
        state.early_stopping.validation_pending = losses is None
        if losses is None:
            return {}
        state.early_stopping.update(state.step, losses["loss"], epoch)
        return {f"val/{name}": value for name, value in losses.items()}


def validate(phase: Phase, engine: Engine, batches: SequentialBatches, resolution: int, seed: int, stop: StopSignal,
             ) -> dict[str, float] | None:
    """Means over a whole split of a phase's loss and scalars, alike on all ranks; None when it was stopped before."""
    loader = Loader(batches, 0, device=engine.device, resolution=resolution, threads=1)
    sums, generator = 0.0, torch.Generator(engine.device)
    try:
        with engine.eval_networks():
            for number in range(batches.batches):
                if engine.ranks.any(bool(stop)):
                    return None
                batch, offsets = next(loader), batches.offsets(number)
                weight = len(offsets)  # 0: the batch is one sample that does not count, but names what is measured
                generator.manual_seed(seed_of(seed, "validation", number))
                own = (torch.from_numpy(offsets) if weight else torch.zeros(1, dtype=torch.int64)).to(engine.device)
                noise = phase.sample_noise(batches.batch_size, generator)
                loss, scalars = phase(batch, {name: values[own] for name, values in noise.items()})
                names = ["loss", *scalars]
                sums = sums + weight * torch.stack([loss, *scalars.values()]).double()
    finally:
        loader.close()
    return dict(zip(names, (engine.ranks.sum(sums) / batches.dataset.samples).tolist(), strict=True))
