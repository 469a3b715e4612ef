"""Covers of a conditional model, genres by noise (the thesis's figure), and how much the audio matters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from covergen.analyses import names_of, plots
from covergen.evaluation import metrics
from covergen.inference.cover_inputs import DatasetCovers, find_split
from covergen.inference.images import to_unit
from covergen.inference.trained_model import TrainedModel

ROWS = 8
SPLITS = ("test", "val", "train")


def draw(run: TrainedModel, path: Path, *, shards: str | None, split: str | None, n: int, genres: Sequence[str] | None,
         seed: int, truncation: float | None) -> str:
    """Writes covers whose ``n`` columns share the noise and whose rows share the audio: one track of each genre.

    ``genres``: by default the first eight that there are.
    """
    name = names_of([run.folder])[0]
    samples = DatasetCovers(run, *find_split(run, shards, split, SPLITS))
    rows = samples.of_genres(genres, samples.dataset.rows_with_audio())
    kinds = samples.rows["genre"][rows]
    chosen = np.unique(kinds)[:None if genres else ROWS]
    if n < 2 or len(chosen) < 2:
        raise ValueError(f"a matrix needs two genres and --n 2 or more, found {len(chosen)} genres and --n {n}")
    draws = np.random.default_rng(seed)
    audio = samples.read([draws.choice(rows[kinds == kind]) for kind in chosen]).audio.numpy()
    noise = run.model.latents(n, torch.Generator().manual_seed(seed), truncation)
    made = run.sample(noise.repeat(len(chosen), 1), audio.repeat(n, axis=0))
    images = to_unit(made, run.model.pixel_min).unflatten(0, (len(chosen), n))
    finite = made.isfinite().flatten(1).all(1).unflatten(0, (len(chosen), n)).all(1)
    lost = f"{(~finite).sum()} rows are not finite (grey): their audio is too far from that of the training"
    figures = []
    if finite.sum() > 1:
        by_audio, by_noise = metrics.variation(images[finite])
        figures = [f"mean squared difference {by_audio:.2g} between rows (audio) at the same noise, "
                   f"{by_noise:.2g} between columns (noise) at the same audio; ratio "
                   f"{by_audio / max(by_noise, 1e-12):.3g}, 0 if the audio does not matter"]
    figures = "; ".join(figures + [lost] * (not finite.all()))
    lines = [plots.Line(samples.genres[kind], row) for kind, row in zip(chosen, images, strict=True)]
    plots.save(plots.table(lines, title=f"{name}: columns share the noise, rows a track of {samples.split}",
                           subtitle=figures, columns=[f"noise {column + 1}" for column in range(n)]), path)
    return f"{name}: {figures}"
