"""Pure torch: layers, losses and the contract of a turn."""

