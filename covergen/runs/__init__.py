"""The only door to a run folder: configuration, metadata, checkpoints, log and uploads."""
