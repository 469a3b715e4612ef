"""The latents of covers by genre: their t-SNE, and whether neighbours share their genre."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from covergen.analyses import names_of, plots
from covergen.data.batch import Batch
from covergen.evaluation import metrics
from covergen.inference.cover_inputs import DatasetCovers, find_split
from covergen.inference.trained_model import TrainedModel

SPLITS = ("test", "val", "train")
NEIGHBOURS = 10
COMPONENTS, PERPLEXITY = 50, 30  # of t-SNE
LEAST = 20  # the fewest covers that it is worth
MOST = 2**31  # bytes of latents


def draw(run: TrainedModel, path: Path, *, shards: str | None, split: str | None, n: int, genres: Sequence[str] | None,
         seed: int) -> str:
    """Writes the t-SNE plane of the latents of covers, one of each cover, coloured by genre.

    ``n``: at most so many covers, drawn at random; 0 for all.
    """
    name = names_of([run.folder])[0]
    sources = [DatasetCovers(run, *find_split(run, shards, one, SPLITS)) for one in (split or "").split(",")]
    chosen = [source.of_genres(genres, source.distinct()) for source in sources]
    total = sum(map(len, chosen))
    if n and n < total:
        keep = np.zeros(total, bool)
        keep[np.random.default_rng(seed).choice(total, n, replace=False)] = True
        parts = np.split(keep, np.cumsum([len(rows) for rows in chosen])[:-1])
        chosen = [rows[part] for rows, part in zip(chosen, parts, strict=True)]
    count = sum(map(len, chosen))
    if count < LEAST:
        raise ValueError(f"{count} covers are too few for a t-SNE; at least {LEAST} are needed (--n, --genres)")
    latents = encoded(run, (batch for source, rows in zip(sources, chosen, strict=True)
                            for batch in source.blocks(rows)), count)
    if not latents.isfinite().all():
        raise ValueError(f"{run.folder}: latents that are not finite; this run has diverged")
    genre, group = (torch.from_numpy(np.concatenate([source.rows[name][rows] for source, rows in
                                                     zip(sources, chosen, strict=True)]).astype(np.int64))
                    for name in ("genre", "group"))
    kinds, labels = genre.unique(return_inverse=True)
    names = [sources[0].genres[kind] for kind in kinds]
    separation = metrics.knn_separation(latents, labels, group, k=NEIGHBOURS, seed=seed)
    splits = " and ".join(source.split for source in sources)
    figures = (f"{NEIGHBOURS} nearest neighbours predict the genre of {separation.accuracy:.1%} (balanced over "
               f"{len(names)} genres, own album left out); chance is {separation.chance:.1%}, with permuted genres "
               f"{separation.permuted:.1%} +- {separation.spread:.1%}")
    plots.save(plots.scatter(plane(latents, seed), labels.numpy(), names, subtitle=figures.replace("+-", "±"),
                             title=f"Latents of {count:,} covers of {splits} in {name}", axes="t-SNE"), path)
    return f"{name}, {count:,} covers of {splits}, {latents.shape[1]} latent numbers: {figures}"


def encoded(run: TrainedModel, batches: Iterable[Batch], count: int) -> Tensor:
    """The latents ``[count, L]`` of covers in batches; ValueError where they would take more than ``MOST`` bytes."""
    latents, start = torch.empty(0), 0
    for batch in batches:
        part = run.encode(batch)
        if not start:
            if (fitting := MOST // (4 * part.shape[1])) < count:
                raise ValueError(f"latents of {part.shape[1]:,} numbers for {count:,} covers take too much memory; "
                                 f"--n {fitting} fits")
            latents = torch.empty(count, part.shape[1])
        latents[start:start + len(part)] = part
        start += len(part)
    return latents


def plane(latents: Tensor, seed: int) -> np.ndarray:
    """t-SNE ``[N, 2]`` of the first 50 principal components of latents ``[N, L]``.

    Source: Maaten and Hinton 2008, by interpolation (Linderman et al. 2019), initialised and with a learning rate as
    Kobak and Berens 2019 recommend, which are openTSNE's defaults.
    """
    import openTSNE
    from sklearn.decomposition import PCA
    values = latents.numpy()
    components = min(COMPONENTS, len(values) - 1, values.shape[1])
    values = PCA(components, random_state=seed).fit_transform(values)
    found = openTSNE.TSNE(perplexity=min(PERPLEXITY, (len(values) - 1) / 3), negative_gradient_method="fft",
                          n_jobs=torch.get_num_threads(), random_state=seed).fit(values)
    return np.asarray(found)
