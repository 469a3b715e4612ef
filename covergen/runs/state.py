"""What a run remembers beside its networks and optimisers: how far it is, and how its validation went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EarlyStopping:
    """The validation losses of past epochs, as far as stopping depends on them."""

    best: float = float("inf")  # the lowest loss
    best_step: int = 0  # when it was; 0: there was none
    waited: int = 0  # epochs since then
    validation_pending: bool = False  # one was broken off and is to be made before training goes on

    def update(self, step: int, loss: float, epoch: bool = True) -> bool:
        """Takes in the loss at a step; True when it is the best so far. ``epoch``: an epoch ended here."""
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
            return True
        self.waited += epoch
        return False

    def should_stop(self, patience: int) -> bool:
        """Whether so many epochs went by without a better loss; a patience of 0 never ends."""
        return 0 < patience <= self.waited


@dataclass
class TrainState:
    """The state of a run that is neither the engine's nor an option: the last step it took, and early stopping."""

    step: int = 0
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> TrainState:
        return cls(int(state["step"]), EarlyStopping(**state["early_stopping"]))
