"""Covers that an evaluation compares: those of the run, and the baselines beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covergen.data.audio import AudioNormalizer
from covergen.data.dataset import ShardDataset
from covergen.data.sampling import seed_of
from covergen.distributed.collectives import Ranks
from covergen.evaluation.metrics import nearest
from covergen.evaluation.songs import Songs, choose_songs, cover_batches, read_audio
from covergen.inference.images import to_unit
from covergen.inference.trained_model import TrainedModel

BATCH = 64  # covers that are made together
TRACKS = 20_000  # training tracks at most, of which means are taken and the nearest is found
COLUMNS = {
    "run": "the run, for the song's audio",
    "real": "the songs' own covers: the ceiling",
    "shuffled": "the run's covers of other songs",
    "genre_mean": "the run, for the mean audio of the song's genre",
    "unconditional": "the run, for no audio, or where it needs one for that of any training track",
    "copy": "the training cover of the nearest training audio",
}


def make_covers(run: TrainedModel, audio: np.ndarray | None, songs: int, samples: int, seed: int, ranks: Ranks,
                progress: Callable[[int], None]) -> Tensor:
    """Covers uint8 ``[songs, samples, 3, R, R]``; song i has the same noise whatever its audio and however many ranks.

    A run that was trained in bf16 samples in it. Audio is scaled, ``[songs, A]``; None for models without. ``progress``
    is called with the number of covers that this process made last.
    """
    step = max(1, BATCH // samples)

    def make(start: int) -> Tensor:
        chosen = range(start, min(start + step, songs))
        generators = [torch.Generator().manual_seed(seed_of(seed, "song", song)) for song in chosen]
        latents = torch.cat([run.model.latents(samples, generator, None) for generator in generators])
        repeated = None if audio is None else np.repeat(audio[chosen.start:chosen.stop], samples, axis=0)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.training.mixed_precision == "bf16"):
            images = to_unit(run.sample(latents, repeated), run.model.pixel_min)
        progress(len(images))
        return images.mul(255).round().byte().unflatten(0, (len(chosen), samples))

    return torch.cat(ranks.share(range(0, songs, step), make))


def baselines(run: TrainedModel, songs: Songs, train: ShardDataset, seed: int) -> dict[str, Any]:
    """What the baselines need of the albums that the run was trained on: ``genre_mean`` and ``any``, scaled audio
    ``[N, A]`` (None without audio), and ``copy``, uint8 covers ``[N, 3, R, R]``."""
    rows = choose_songs(train, TRACKS, seed, run.config.training.album_subset)
    draws = np.random.default_rng(seed)
    if songs.raw is None or not train.dimension:
        copied = torch.cat(list(cover_batches(train, draws.choice(rows, len(songs)), run.resolution)))
        return {"genre_mean": None, "any": None, "copy": copied}
    raw = read_audio(train, rows)
    standard = AudioNormalizer(train.metadata["audio"])  # distances of raw numbers say nothing
    scaled = run.normalizer(raw) if run.model.conditional else standard(raw)
    genres = train.index.rows["genre"][rows]
    means = {genre: scaled[genres == genre if (genres == genre).any() else slice(None)].mean(0)
             for genre in np.unique(songs.genres)}
    near = nearest(torch.from_numpy(standard(songs.raw)), torch.from_numpy(standard(raw)), 1)[1][:, 0].numpy()
    return {"genre_mean": np.stack([means[genre] for genre in songs.genres]).astype(np.float32),
            "copy": torch.cat(list(cover_batches(train, rows[near], run.resolution))),
            "any": scaled[draws.integers(len(scaled), size=len(songs))]}
