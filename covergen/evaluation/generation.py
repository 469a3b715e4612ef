"""Songs to evaluate with and covers for them: a run and shards in, a table of covers for each kind of listener out.

A column of the table is what somebody who makes covers knows: the run itself hears the song; the baselines beside it
hear another one, its genre's mean, nothing, or copy what the training covers have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from covergen.data.audio import AudioNormalizer
from covergen.data.batch import downscale
from covergen.data.dataset import ShardDataset
from covergen.data.sampling import rows_of_albums, seed_of
from covergen.distributed.collectives import Ranks
from covergen.evaluation.metrics import nearest
from covergen.inference.images import to_unit
from covergen.inference.trained_model import TrainedModel

AT_ONCE = 64  # covers that are made together
KNOWN = 20_000  # training tracks among which a nearest one is looked for, and of which means are taken
COLUMNS = {
    "run": "the run, for the song's audio",
    "real": "the songs' own covers: the ceiling",
    "shuffled": "the run's covers of other songs",
    "genre_mean": "the run, for the mean audio of the song's genre",
    "unconditional": "the run, for no audio, or where it needs one for that of any training track",
    "copy": "the training cover of the nearest training audio",
}


@dataclass(frozen=True)
class Songs:
    """One track of each of N albums.

    Attributes:
        rows: of the split's index, ``[N]``.
        raw: audio float32 ``[N, D]``, as it lies in shards; None where they have none.
        covers: uint8 ``[N, 3, R, R]`` at the run's resolution.
        genres: ``[N]``, positions in the sorted list, -1 for unknown; groups: ``[N]``, albums.
    """

    rows: np.ndarray
    raw: np.ndarray | None
    covers: Tensor
    genres: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def read_songs(shards: ShardDataset, rows: np.ndarray, resolution: int) -> Songs:
    """The songs of given rows."""
    parts = [shards.read(rows[start:start + 512]) for start in range(0, len(rows), 512)]
    covers = torch.cat([downscale(part.cover, resolution) for part in parts])
    raw = np.concatenate([part.audio.numpy() for part in parts]) if shards.normalizer else None
    return Songs(rows, raw, covers, shards.genres(rows), shards.index.rows["group"][rows])


def choose(shards: ShardDataset, count: int, seed: int, albums: str = "all") -> np.ndarray:
    """Rows ``[<= count]``: one track, drawn at random, of each of so many albums; always the same for a seed.

    Args: shards; count; seed; albums: of whom, see ``rows_of_albums``.
    """
    rows = rows_of_albums(shards.index.rows["group"], albums)
    if shards.dimension:
        rows = rows[shards.index.rows["audio_bytes"][rows] > 0]
    rows = np.random.default_rng(seed).permutation(rows)
    first = np.unique(shards.index.rows["group"][rows], return_index=True)[1]
    return rows[np.sort(first)][:count]


def mismatched_pairing(groups: np.ndarray, seed: int, genres: np.ndarray | None = None) -> np.ndarray:
    """For each of N songs another one ``[N]`` of another album, where given of the same genre (-1: there is none)."""
    draws, chosen = np.random.default_rng(seed), np.full(len(groups), -1)
    for song in range(len(groups)):
        fits = groups != groups[song]
        fits &= True if genres is None else genres == genres[song]
        if fits.any():
            chosen[song] = draws.choice(np.flatnonzero(fits))
    return chosen


def make_covers(run: TrainedModel, heard: np.ndarray | None, songs: int, noises: int, seed: int, ranks: Ranks,
                tick: Callable[[int], None]) -> Tensor:
    """Covers uint8 ``[songs, noises, 3, R, R]``; song i has the same noises whatever it hears and however many ranks.

    A run that was trained in bf16 samples in it.

    Args:
        run: that makes them.
        heard: scaled audio ``[songs, A]``; None for models without.
        songs, noises: how many.
        seed: of the noises.
        ranks: among whom the work is shared.
        tick: told how many covers this process has made; may raise to stop.
    """
    step = max(1, AT_ONCE // noises)

    def some(start: int) -> Tensor:
        chosen = range(start, min(start + step, songs))
        latents = torch.cat([run.model.latents(noises, torch.Generator().manual_seed(seed_of(seed, "song", song)), None)
                             for song in chosen])
        audio = None if heard is None else np.repeat(heard[chosen.start:chosen.stop], noises, axis=0)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.training.mixed_precision == "bf16"):
            images = to_unit(run.sample(latents, audio), run.model.pixel_min)
        tick(len(images))
        return images.mul(255).round().byte().unflatten(0, (len(chosen), noises))

    return torch.cat(ranks.share(range(0, songs, step), some))


def baselines(run: TrainedModel, songs: Songs, train: ShardDataset, seed: int) -> dict[str, Any]:
    """What the baselines need of the training split, of the albums that the run was trained on.

    Returns:
        genre_mean, any: scaled audio ``[N, A]`` (None without audio); copy: uint8 covers ``[N, 3, R, R]``.
    """
    rows = choose(train, KNOWN, seed, run.config.training.album_subset)
    draws = np.random.default_rng(seed)
    if songs.raw is None or not train.dimension:
        return {"genre_mean": None, "any": None,
                "copy": read_songs(train, draws.choice(rows, len(songs)), run.resolution).covers}
    raw = np.concatenate([train.read_audio(rows[start:start + 512]).numpy() for start in range(0, len(rows), 512)])
    standard = AudioNormalizer(train.metadata["audio"])  # whatever the run hears: distances of raw numbers say nothing
    scaled = run.normalizer(raw) if run.model.conditional else standard(raw)
    genres = train.index.rows["genre"][rows]
    means = {genre: scaled[members].mean(0) if (members := genres == genre).any() else scaled.mean(0)
             for genre in np.unique(songs.genres)}
    near = nearest(torch.from_numpy(standard(songs.raw)), torch.from_numpy(standard(raw)), 1)[1][:, 0].numpy()
    return {"genre_mean": np.stack([means[genre] for genre in songs.genres]).astype(np.float32),
            "copy": read_songs(train, rows[near], run.resolution).covers,
            "any": scaled[draws.integers(len(scaled), size=len(songs))]}
