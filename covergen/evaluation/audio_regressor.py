"""What audio tells of a demo's covers at best: training songs and their truth in; a network that hears attributes out.

A generator that follows the music can show no more of the attributes than this network hears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen.data.audio import AudioNormalizer
from covergen.data.dataset import ShardDataset, open_split
from covergen.evaluation.demo_truth import Truth
from covergen.evaluation.fitting import fit, r2, repeatable, set_apart

SONGS = 60_000  # that are read of a split at most
AT_ONCE = 4096  # songs that are read or heard together
STEPS, EPOCHS, BATCH, RATE, DECAY = 2000, 80, 128, 1e-3, 0.05
WIDTH, DROPPED, DEAF = 512, 0.5, 0.2
PENALTIES = (1e1, 1e2, 1e3, 1e4)  # of ridge regression


class Predictor(nn.Module):
    """Audio as ``AudioNormalizer`` standardises it, float32 ``[B, S]``, to standardised attributes ``[B, A]``."""

    def __init__(self, size: int, attributes: int, kind: str) -> None:
        """Args: size: S; attributes: A; kind: ``mlp`` or ``ridge``, which is linear."""
        super().__init__()
        self.kind = kind

        def layer(wide: int) -> list[nn.Module]:
            return [nn.Linear(wide, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Dropout(DROPPED)]

        hidden = [*layer(size), *layer(WIDTH)] if kind == "mlp" else []
        self.layers = nn.Sequential(*hidden, nn.Linear(WIDTH if hidden else size, attributes))

    def forward(self, audio: Tensor) -> Tensor:
        return self.layers(audio)

    @torch.no_grad()
    def predict(self, audio: Tensor) -> Tensor:
        """The same on the CPU, float32 ``[N, A]``, of any number of songs in blocks; without dropout."""
        device = next(self.parameters()).device
        self.eval()
        return torch.cat([self(part.to(device)).float().cpu() for part in audio.split(AT_ONCE)])


class AudioDataset:
    """What is known of songs of one split: audio ``[N, S]`` standardised, attributes ``[N, A]``, genre and album."""

    def __init__(self, shards: ShardDataset, truth: Truth, seed: int) -> None:
        """Reads at most ``SONGS`` of the rows that the shards were opened for and that have a vector."""
        index = shards.index
        plain = ShardDataset(index.root, index.split, audio_scale="raw")
        rows = shards.rows[index.rows["audio_bytes"][shards.rows] > 0]
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:SONGS])
        scale = AudioNormalizer(shards.metadata["audio"])
        self.audio = torch.cat([torch.from_numpy(scale(plain.read_audio(rows[start:start + AT_ONCE]).numpy()))
                                for start in range(0, len(rows), AT_ONCE)])
        self.values = torch.from_numpy(known(truth, shards, rows))
        self.genres = torch.from_numpy(index.rows["genre"][rows].astype(np.int64))
        self.groups = index.rows["group"][rows]


def known(truth: Truth, shards: ShardDataset, rows: np.ndarray) -> np.ndarray:
    """The standardised attributes of rows, float32 ``[N, A]``; ValueError unless the truth knows all of them."""
    values, found = truth.of(shards, rows)
    if not found.all():
        raise ValueError(f"{shards.index.root}/attributes.npz knows {found.sum():,} of {len(found):,} samples of "
                         f"{shards.index.split}: it is another demo's; pack the demo again, or delete that file")
    return values


def train_predictor(train: ShardDataset, held_out: ShardDataset | None, truth: Truth, *,
                    device: torch.device | str = "cpu", steps: int = STEPS, seed: int = 0,
                    tick: Callable[[], Any] = lambda: None) -> tuple[Predictor, dict[str, Any]]:
    """The better of an MLP and ridge regression by R2 on held-out songs.

    An epoch has one random track of every album. Half of the tracks lose some of the blocks that they have, so that
    those with all of them teach for those with one.

    Args:
        train: training split of a demo.
        held_out: validation split; None: an eighth of the training albums.
        truth: of the demo.
        device: to train on.
        steps: at most; also ``EPOCHS`` epochs at most.
        seed: of everything random.
        tick: called before every step; may raise to stop.

    Returns:
        the network, and figures: kind, validation (mean R2), and of the test split, where there is one, its songs and
        by attribute r2 and r2_within_genre, see ``trained.r2``.
    """
    device = torch.device(device)
    songs = AudioDataset(train, truth, seed)
    judged, learnt = songs, np.arange(len(songs.audio))
    places = learnt
    if held_out:
        judged = AudioDataset(held_out, truth, seed)
        places = np.arange(len(judged.audio))
    else:
        learnt, places = set_apart(songs.groups, seed)
    audio, values = judged.audio[places].to(device), judged.values[places].to(device)
    blocks = AudioNormalizer(train.metadata["audio"]).blocks

    def score(network: Predictor) -> float:
        with torch.no_grad():
            return r2(network(audio), values).mean().item()

    with repeatable(seed, device):
        network, best = mlp(songs, learnt, blocks, score, device, steps, tick)
        for linear in ridges(songs.audio[learnt], songs.values[learnt]):
            if (value := score(linear.to(device))) > best:
                network, best = linear, value
    figures: dict[str, Any] = {"kind": network.kind, "validation": best}
    test = open_split(str(train.index.root), "test", needed=False)
    if test:
        songs = AudioDataset(test, truth, seed)
        read = network.predict(songs.audio)
        figures |= {"songs": len(read), "r2": named(truth, r2(read, songs.values)),
                    "r2_within_genre": named(truth, r2(read, songs.values, songs.genres))}
    return network, figures


def named(truth: Truth, values: Tensor) -> dict[str, float]:
    """One number an attribute ``[A]``, and their mean, by name."""
    return dict(zip(truth.names, values.tolist(), strict=True)) | {"mean": values.mean().item()}


def mlp(songs: AudioDataset, learnt: np.ndarray, blocks: list[list[int]], score: Callable[[Predictor], float],
        device: torch.device, steps: int, tick: Callable[[], Any]) -> tuple[Predictor, float]:
    """A trained MLP and its best score; learnt: places of the songs that may be learnt from."""
    order = torch.from_numpy(learnt[np.argsort(songs.groups[learnt], kind="stable")])
    counts = torch.from_numpy(np.unique(songs.groups[learnt], return_counts=True)[1])
    starts = counts.cumsum(0) - counts
    audio, values = songs.audio.to(device), songs.values.to(device)
    network = Predictor(audio.shape[1], values.shape[1], "mlp").to(device)
    batch = min(BATCH, len(counts))
    queue: list[Tensor] = []

    def loss() -> Tensor:
        if not queue:
            drawn = order[starts + (torch.rand(len(counts)) * counts).long()]  # a track of every album
            queue.extend(drawn[torch.randperm(len(drawn))].split(batch)[:len(drawn) // batch])
        rows = queue.pop()
        heard = drop_audio_blocks(audio[rows.to(device)], blocks)
        return F.mse_loss(network(F.dropout(heard, DEAF)), values[rows.to(device)])

    steps = max(10, min(steps, EPOCHS * (len(counts) // batch)))
    return network, fit(network, loss, lambda: score(network), steps=steps, rate=RATE, decay=DECAY, tick=tick)


def drop_audio_blocks(audio: Tensor, blocks: list[list[int]]) -> Tensor:
    """Audio ``[B, S]`` as if some of the blocks that a track has were absent, but never all of them."""
    size = len(blocks)
    there = audio[:, -size:] > 0
    kept = there & (torch.rand(len(audio), size) < 0.5).to(audio.device)
    kept = torch.where(kept.any(1, keepdim=True), kept, there).to(audio.dtype)
    widths = torch.tensor([stop - start for start, stop in blocks] + [1] * size, device=audio.device)
    return audio * torch.cat([kept, kept], 1).repeat_interleave(widths, 1)


def ridges(audio: Tensor, values: Tensor) -> Iterator[Predictor]:
    """Ridge regressions of values ``[N, A]`` on audio ``[N, S]``, with an intercept, one for each penalty."""
    centre, middle = audio.double().mean(0), values.double().mean(0)
    square = torch.zeros(audio.shape[1], audio.shape[1], dtype=torch.float64)
    cross = torch.zeros(audio.shape[1], values.shape[1], dtype=torch.float64)
    for heard, wanted in zip(audio.split(AT_ONCE), values.split(AT_ONCE), strict=True):
        heard = heard.double() - centre
        square += heard.T @ heard
        cross += heard.T @ (wanted.double() - middle)
    for penalty in PENALTIES:
        weight = torch.linalg.solve(square + penalty * torch.eye(len(square), dtype=torch.float64), cross)
        network = Predictor(audio.shape[1], values.shape[1], "ridge")
        with torch.no_grad():
            network.layers[0].weight.copy_(weight.T)
            network.layers[0].bias.copy_(middle - centre @ weight)
        yield network.eval()
