"""What a flow knows of its audio by its own loss: covers with right and with wrong audio in, paired gaps out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from covergen.evaluation import statistics
from covergen.evaluation.songs import Songs, others
from covergen.evaluation.table import Figure, kinds
from covergen.runtime.data import Batch
from covergen.runtime.order import seed_of
from covergen.runtime.ranks import Ranks
from covergen.runtime.run import Run

AT_ONCE = 64
DRAWS = 8  # times and noises at which each cover's loss is measured


def gaps(run: Run, songs: Songs, seed: int, ranks: Ranks, tick: Callable[[], None] = lambda: None) -> dict[str, Figure]:
    """By what share of itself the loss grows with another song's audio, overall and with one of the same genre.

    The same cover meets the same times and noises with both, so that nothing but the audio differs; p by sign flips.

    Args:
        run: whose model has a ``denoising_loss``.
        songs, seed: with any audio.
        ranks: among whom the work is shared; tick: called now and then, may raise to stop.
    """
    heard = run.scale(songs.raw)
    right, row = losses(run, songs, heard, seed, ranks, tick).numpy(), {}
    for name, genres in (("denoising_gap", None), ("denoising_gap_within", kinds(songs))):
        chosen = others(songs.groups, seed, genres)
        known = chosen >= 0
        if not known.any():
            continue
        wrong = losses(run, songs, heard[np.where(known, chosen, np.arange(len(songs)))], seed, ranks, tick).numpy()
        shares = ((wrong - right) / right.mean())[known]
        row[name] = Figure(*statistics.bootstrap_mean(shares, seed=seed), statistics.sign_flip_p(shares, seed=seed))
    return row


@torch.no_grad()
def losses(run: Run, songs: Songs, heard: np.ndarray, seed: int, ranks: Ranks, tick: Callable[[], None]) -> Tensor:
    """Denoising losses ``[N]`` of the songs' covers with scaled audio ``[N, A]``, means over ``DRAWS`` draws."""
    audio = torch.from_numpy(heard)

    def some(start: int) -> Tensor:
        tick()
        part = slice(start, start + AT_ONCE)
        batch = Batch(songs.covers[part].to(run.device), audio[part].to(run.device), None, None)
        total = torch.zeros(len(batch.cover), dtype=torch.float64)
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(seed_of(seed, "denoising", start, draw))
            noise = run.model.turns[0].draw(len(batch.cover), generator)
            noise = {name: value.to(run.device) for name, value in noise.items()}
            total += run.model.denoising_loss(run.networks, batch, noise).double().cpu()
        return total / DRAWS

    return torch.cat(ranks.share(range(0, len(songs), AT_ONCE), some))
