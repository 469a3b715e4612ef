"""Walks between latents, and of conditional models between audios, as rows of covers or as a moving picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from covergen.analyses import names_of, plots
from covergen.data.sampling import stratified_rows
from covergen.inference.cover_inputs import DatasetCovers, find_split
from covergen.inference.images import to_unit
from covergen.inference.trained_model import TrainedModel
from covergen.models.base import Latents

COLUMNS = 8
SPLITS = ("test", "val", "train")
CENTRE = 1e-6  # noise truncated to so few standard deviations lies at its mean


def draw(run: TrainedModel, path: Path, *, shards: str | None, split: str | None, n: int, frames: int, seed: int,
         truncation: float | None) -> str:
    """Writes ``n`` walks between latents at a fixed audio; the second half of a conditional model's between audios.

    x.png has a row of ``frames`` for each, x.gif all side by side, there and back.
    """
    name = names_of([run.folder])[0]
    samples = DatasetCovers(run, *find_split(run, shards, split, SPLITS)) if run.model.conditional else None
    at = torch.linspace(0, 1, frames)
    start, end = run.model.latents(2 * n, torch.Generator().manual_seed(seed), truncation).split(n)
    by_noise = n - n // 2 if samples else n
    noise = torch.cat([between(start[:by_noise], end[:by_noise], centre(run.model.latents), at),
                       start[by_noise:, None].expand(-1, frames, -1)])
    labels, audio = [f"noise {walk + 1}" for walk in range(n)], None
    if samples:
        first, last, labels = audio_ends(samples, by_noise, n, seed)
        audio = torch.lerp(first[:, None], last[:, None], at[:, None]).flatten(0, 1).numpy()
    images = to_unit(run.sample(noise.flatten(0, 1), audio), run.model.pixel_min).unflatten(0, (n, frames))
    title = f"Walks of {name}: spherical between latents" + (", straight between audios" if samples else "")
    apart = (images[:, 0] - images[:, -1]).square().flatten(1).mean(1)
    report = f"{name}: mean squared difference between the ends of walks: {apart[:by_noise].mean():.3g} by noise"
    if by_noise < n:
        report += f", {apart[by_noise:].mean():.3g} by audio"
    subtitle = report.partition(": ")[2]
    if path.suffix.lower() == ".gif":
        parts = [slice(first, first + COLUMNS) for first in range(0, n, COLUMNS)]
        plots.animate([plots.table([plots.Line("", images[part, step], labels[part]) for part in parts], title=title,
                                   subtitle=subtitle) for step in range(frames)], path)
    else:
        lines = [plots.Line(label, walk) for label, walk in zip(labels, images, strict=True)]
        plots.save(plots.table(lines, title=title, subtitle=subtitle, columns=[f"{step:.2f}" for step in at]), path)
    return report


def audio_ends(samples: DatasetCovers, by_noise: int, n: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """The audio of walks at both ends, ``[n, A]`` each, and their names; walks by noise have one track."""
    draws = np.random.default_rng(seed)
    rows = draws.permutation(samples.dataset.rows_with_audio())
    rows = draws.permutation(rows[stratified_rows(samples.rows["genre"][rows], 2 * n - by_noise)])
    first, last = np.split(np.resize(rows, 2 * n - by_noise), [n])
    last = np.concatenate([first[:by_noise], last])
    names = [[samples.genres[kind] for kind in samples.rows["genre"][end]] for end in (first, last)]
    labels = [f"noise\n({one})" if walk < by_noise else f"audio: {one}\nto {other}"
              for walk, (one, other) in enumerate(zip(*names, strict=True))]
    return samples.read(first).audio, samples.read(last).audio, labels


def centre(latents: Latents) -> Tensor:
    """The mean ``[L]`` of a model's latents, which need not be zero (DCGAN's are from N(-1, 2^2))."""
    return latents(1, torch.Generator().manual_seed(0), CENTRE)[0]


def between(start: Tensor, end: Tensor, middle: Tensor, at: Tensor) -> Tensor:
    """Spherical interpolation around ``middle`` ``[L]`` from ``start`` to ``end`` ``[N, L]`` at ``[F]``, ``[N, F, L]``.

    High-dimensional normal noise lies near a sphere; a straight line would leave it.

    Source: Shoemake 1985, "Animating rotation with quaternion curves"; White 2016, "Sampling Generative Networks".
    """
    middle, at = middle.double(), at.double()[:, None]
    start, end = start.double()[:, None] - middle, end.double()[:, None] - middle
    angle = torch.arccos(torch.cosine_similarity(start, end, dim=-1).clamp(-1, 1))[..., None]
    sine = angle.sin()
    straight = sine < 1e-6  # the same direction, or the opposite, to which no way is the shortest
    before = torch.where(straight, 1 - at, ((1 - at) * angle).sin() / sine.masked_fill(straight, 1.0))
    after = torch.where(straight, at, (at * angle).sin() / sine.masked_fill(straight, 1.0))
    return (before * start + after * end + middle).float()
