"""Whether a generator copies: the training covers nearest to generated ones, and how near they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from covergen.analyses import names_of, plots
from covergen.data.batch import downscale
from covergen.evaluation import metrics
from covergen.inference.cover_inputs import DatasetCovers, find_split
from covergen.inference.images import to_unit
from covergen.inference.trained_model import TrainedModel

SHOWN = 3  # nearest covers of each kind
NEAREST = 10  # whose mean distance is what the nearest is compared with
SIDE = 32  # pixels of the covers that are searched, at most


def draw(run: TrainedModel, path: Path, *, shards: str | None, split: str | None, n: int, compare: int, seed: int,
         truncation: float | None) -> str:
    """Writes generated covers with those of a split that are nearest by pixels and by 4 x 4 thumbnails.

    The share of generated covers that are nearer to a training cover than the median held-out cover is says whether
    the model copies (``metrics.share_nearer``). Blurred covers are near to everything, copies to one: so the share is
    also given for the distance over the mean of the ten nearest.

    Test, else val, is held out; a conditional model takes tracks of it. ``n`` generated covers are shown, ``compare``
    and as many held-out ones compared.

    Source: for the second, after Carlini et al. 2023, "Extracting Training Data from Diffusion Models".
    """
    name = names_of([run.folder])[0]
    root, split = find_split(run, shards, split, ("train",))
    base = DatasetCovers(run, root, split)
    held = DatasetCovers(run, *find_split(run, root, None, [other for other in ("test", "val") if other != split]))
    rows, draws = base.distinct(), np.random.default_rng(seed)
    if len(rows) <= NEAREST:
        raise ValueError(f"{split} of {root} has {len(rows)} covers; neighbours needs more than {NEAREST}")
    real = held.distinct()
    real = real if len(real) <= compare else np.sort(draws.choice(real, compare, replace=False))
    noise = run.model.latents(max(n, compare), torch.Generator().manual_seed(seed), truncation)
    audio, labels = None, [""] * n
    if run.model.conditional:
        tracks = np.resize(draws.permutation(held.dataset.rows_with_audio()), len(noise))
        audio = held.read(tracks).audio.numpy()
        labels = [held.genres[kind] for kind in held.rows["genre"][tracks[:n]]]
    made = to_unit(run.sample(noise, audio), run.model.pixel_min).mul(255).round().byte()
    pairs = ((base, rows), (held, real))
    parts = [[searched(batch.cover) for batch in source.blocks(some)] for source, some in pairs]
    ours, theirs = (torch.from_numpy(source.rows["group"][some].astype(np.int64)) for source, some in pairs)
    side = min(SIDE, run.resolution)
    images, captions, report = [made[:n, None]], [[""] for _ in range(n)], []
    for number, (kind, order, unit, digits) in enumerate(
            [("pixels", 2, 255 * (3 * side * side) ** 0.5, 3), ("thumbnails", 1, 1.0, 0)]):
        known, others = (torch.cat([part[number] for part in source]) for source in parts)
        near, found = metrics.nearest(searched(made)[number], known, NEAREST, order=order)
        far, _ = metrics.nearest(others, known, NEAREST, order=order, groups=(theirs, ours))
        near, far = near / unit, far / unit
        images.append(base.read(rows[found[:n, :SHOWN].flatten().numpy()]).cover.unflatten(0, (n, SHOWN)))
        for texts, distances in zip(captions, near[:, :SHOWN].tolist(), strict=False):
            texts += [f"{distance:.{digits}f}" for distance in distances]
        report.append(f"{kind}: {in_words(near[:compare], far, held.split)}")
    report = [f"share of {compare} generated covers that are nearer to a {split} cover than the median of "
              f"{len(real)} {held.split} covers is",
              "(50%: like real ones; 100%: copies, or by plain distance blur; in brackets: the medians)", *report]
    lines = [plots.Line(*line) for line in zip(labels, torch.cat(images, 1).float() / 255, captions, strict=True)]
    shrunk = f" at {side} px" if side < run.resolution else ""
    units = (f"Below each: pixels{shrunk}, root mean square difference of values in [0, 1]; thumbnails of 4 x 4, "
             "summed difference of levels")
    plots.save(plots.table(
        lines, title=f"Generated covers of {name} and the nearest of {len(rows):,} {split} covers",
        subtitle="\n".join([*report, units]), breaks=(1, 1 + SHOWN),
        columns=["generated", *(f"{rank} by {kind}" for kind in ("pixels", "thumbnails")
                                for rank in ("nearest", "2nd", "3rd"))]), path)
    return "\n".join([f"{name}: {report[0]}", *report[1:]])


def in_words(near: Tensor, far: Tensor, held_out: str) -> str:
    """The shares and, in brackets, medians, from distances ``[N, 10]`` of generated and held-out covers, ascending."""
    relative = [part[:, 0] / part.mean(1).clamp(min=1e-9) for part in (near, far)]
    words = (f"{metrics.share_nearer(one, other):.0%} ({one.median():.3g}, {held_out} {other.median():.3g})"
             for one, other in ((near[:, 0], far[:, 0]), relative))
    return f"; by distance relative to the mean of the {NEAREST} nearest ".join(words)


def searched(covers: Tensor) -> tuple[Tensor, Tensor]:
    """What uint8 covers ``[N, 3, R, R]`` are compared by: uint8 pixels ``[N, D]`` at 32 px or less; thumbnails."""
    return downscale(covers, min(SIDE, covers.shape[-1])).flatten(1), metrics.thumbnails(covers)
