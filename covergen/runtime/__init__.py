"""What carries a run: configuration, data, the engine, checkpoints, averages and tracking."""
