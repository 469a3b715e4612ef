"""Covers of shards or of a folder of pictures, what autoencoders make of them, and the errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from covergen.analyses import names_of, plots
from covergen.inference.cover_inputs import DatasetCovers, FolderCovers, find_split
from covergen.inference.images import save_array
from covergen.inference.trained_model import TrainedModel
from covergen.nn.losses import psnr

COLUMNS = 8
SPLITS = ("val", "test", "train")


def draw(runs: Sequence[TrainedModel], path: Path, *, shards: str | None, split: str | None, n: int | None,
         images: str | None) -> str:
    """Writes the originals as one row and below it each run's reconstructions; or one run's as an array (x.npy).

    Of shards ``n`` is 8 by default; an array has the first n in the order of the index, or all (0). ``images`` are in
    the order of their names; an array has all of them by default.
    """
    origin, array = images, path.suffix.lower() == ".npy"
    if images:
        if conditional := next((run for run in runs if run.model.conditional), None):
            raise ValueError(f"{conditional.folder} is a {conditional.config.model}, which needs the audio of each "
                             "cover: use --shards instead of --images")
        limit = n or 0 if array else n or COLUMNS
        sources = [FolderCovers(run, images, limit) for run in runs]
        rows = range(len(sources[0]))
    else:
        root, split = find_split(runs[0], shards, split, SPLITS)
        sources = [DatasetCovers(run, root, split) for run in runs]
        origin = f"{split} of {root}"
        rows = sources[0].stratified(n or COLUMNS) if not array else range(
            len(sources[0]) if n == 0 else min(n or COLUMNS, len(sources[0])))
    names = names_of([run.folder for run in runs])
    if array:
        ratios, shape = [], (len(rows), 3, runs[0].resolution, runs[0].resolution)

        def reconstructions() -> Iterator[Tensor]:
            for batch in sources[0].blocks(rows):
                versions = runs[0].reconstruct(batch).clamp(0, 1)
                ratios.append(psnr(errors(batch.cover, versions)))
                yield versions
        save_array(path, shape, reconstructions())
        return (f"{names[0]}: {len(rows):,} covers ({origin}) reconstructed, mean PSNR "
                f"{torch.cat(ratios).mean().item():.2f} dB; float32 {list(shape)} in [0, 1]")
    batches = [source.read(rows) for source in sources]
    versions = [run.reconstruct(batch).clamp(0, 1) for run, batch in zip(runs, batches, strict=True)]
    mistakes = [errors(batch.cover, version) for batch, version in zip(batches, versions, strict=True)]
    means = [psnr(mistake).mean().item() for mistake in mistakes]
    finest = max(batches, key=lambda batch: batch.cover.shape[-1]).cover.float() / 255
    lines = []
    for start in range(0, len(rows), COLUMNS):
        part = slice(start, start + COLUMNS)
        lines.append(plots.Line("original", finest[part]))
        for name, version, mistake, mean in zip(names, versions, mistakes, means, strict=True):
            captions = [f"MSE {value:.4f}\n{psnr(value):.1f} dB" for value in mistake[part]]
            lines.append(plots.Line(f"{name}\nmean {mean:.1f} dB", version[part], captions))
    title = f"{len(rows)} covers and their reconstructions" + (f" by {len(runs)} runs" if len(runs) > 1 else "")
    plots.save(plots.table(lines, title=title, subtitle=f"covers: {origin}; below each: mean squared error of values "
                           "in [0, 1] and peak signal to noise ratio"), path)
    return "\n".join(f"{name}: mean PSNR {mean:.2f} dB, mean MSE {mistake.mean():.5f} over {len(rows)} covers"
                     for name, mean, mistake in zip(names, means, mistakes, strict=True))


def errors(covers: Tensor, versions: Tensor) -> Tensor:
    """Mean squared error ``[N]`` of versions ``[N, 3, R, R]`` in [0, 1] of uint8 covers."""
    return (covers.float() / 255 - versions).square().flatten(1).mean(1)
