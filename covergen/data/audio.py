"""Normalises audio vectors, as they lie in shards or files, for networks."""

from __future__ import annotations

from typing import Any

import numpy as np

STANDARD_LIMIT = 5.0


class AudioNormalizer:
    """Raw vectors to the input of networks, of ``size`` numbers.

    ``standard``: standardised with the training split's statistics and clipped to +-5, absent blocks zero, one presence
    bit per block appended. ``raw``: as they are.
    """

    def __init__(self, metadata: dict[str, Any], kind: str = "standard") -> None:
        """Args: metadata: the ``audio`` part of an index: dimension, blocks, mean, std; kind: standard or raw."""
        self.dimension, self.raw = metadata["dimension"], kind == "raw"
        if self.raw:
            self.size = self.dimension
            return
        if metadata["mean"] is None or metadata["std"] is None:
            raise ValueError("--audio_scale standard: the mean and standard deviation of the audio are missing")
        self.blocks = metadata["blocks"]
        self.mean = np.asarray(metadata["mean"], np.float64)
        std = np.asarray(metadata["std"], np.float64)
        self.std = np.where(std > 0, std, 1.0)
        self.size = self.dimension + len(self.blocks)

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """float32 ``[B, D]`` -> float32 ``[B, size]``."""
        if self.raw:
            return raw
        out = np.empty((len(raw), self.size), np.float32)
        standard = raw - self.mean
        standard /= self.std
        out[:, :self.dimension] = np.clip(standard, -STANDARD_LIMIT, STANDARD_LIMIT, out=standard)
        for number, (start, stop) in enumerate(self.blocks, self.dimension):
            out[:, number] = present = raw[:, start:stop].any(axis=1)
            out[~present, start:stop] = 0.0
        return out
