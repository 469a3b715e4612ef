"""A regressor of a demo's attributes from audio: covers that follow the music can show no more than it predicts."""

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
from covergen.evaluation.fitting import fit, hold_out, r2, repeatable
from covergen.evaluation.songs import read_audio

SONGS = 60_000  # that are read of a split at most
BLOCK = 4096  # songs that go through a network together
STEPS, EPOCHS, BATCH, RATE, DECAY = 2000, 80, 128, 1e-3, 0.05
WIDTH, DROPOUT, INPUT_DROPOUT = 512, 0.5, 0.2
PENALTIES = (1e1, 1e2, 1e3, 1e4)  # of ridge regression


class AudioRegressor(nn.Module):
    """Audio as ``AudioNormalizer`` standardises it, float32 ``[B, S]``, to standardised attributes ``[B, A]``; of kind
    ``mlp`` or ``ridge``, which is linear."""

    def __init__(self, size: int, attributes: int, kind: str) -> None:
        super().__init__()
        self.kind = kind

        def layer(inputs: int) -> list[nn.Module]:
            return [nn.Linear(inputs, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Dropout(DROPOUT)]

        hidden = [*layer(size), *layer(WIDTH)] if kind == "mlp" else []
        self.layers = nn.Sequential(*hidden, nn.Linear(WIDTH if hidden else size, attributes))

    def forward(self, audio: Tensor) -> Tensor:
        return self.layers(audio)

    @torch.no_grad()
    def predict(self, audio: Tensor) -> Tensor:
        """The same of any number of songs, float32 ``[N, A]`` on the CPU; without dropout."""
        device = next(self.parameters()).device
        self.eval()
        return torch.cat([self(part.to(device)).float().cpu() for part in audio.split(BLOCK)])


class AudioDataset:
    """Songs of one split: audio ``[N, S]`` standardised, attributes ``[N, A]``, genres and albums ``[N]``."""

    def __init__(self, shards: ShardDataset, truth: Truth, seed: int) -> None:
        """Reads at most ``SONGS`` of the rows that the shards were opened for and that have a vector."""
        index = shards.index
        rows = shards.rows[index.rows["audio_bytes"][shards.rows] > 0]
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:SONGS])
        standard = ShardDataset(index.root, index.split, audio_scale="standard")
        self.audio = torch.from_numpy(read_audio(standard, rows))
        self.values = torch.from_numpy(truth.attributes(shards, rows))
        self.genres = torch.from_numpy(index.rows["genre"][rows].astype(np.int64))
        self.groups = index.rows["group"][rows]


def train_regressor(train: ShardDataset, held_out: ShardDataset | None, truth: Truth, *,
                    device: torch.device | str = "cpu", steps: int = STEPS, seed: int = 0,
                    check_interrupt: Callable[[], Any] = lambda: None) -> tuple[AudioRegressor, dict[str, Any]]:
    """The better of an MLP and ridge regression by R2 on held-out songs.

    An epoch has one random track of every album. Half of the tracks lose some of the blocks that they have, so that
    those with all of them teach for those with one. Validates on ``held_out``; None: on an eighth of the training
    albums. Takes ``steps`` steps and ``EPOCHS`` epochs at most.

    Returns the network, and figures: kind, validation (mean R2), and of the test split, where there is one, its songs
    and by attribute r2 and r2_within_genre, see ``fitting.r2``.
    """
    device = torch.device(device)
    songs = validation = AudioDataset(train, truth, seed)
    if held_out:
        validation = AudioDataset(held_out, truth, seed)
        training_rows, rows = np.arange(len(songs.audio)), np.arange(len(validation.audio))
    else:
        training_rows, rows = hold_out(songs.groups, seed)
    audio, values = validation.audio[rows].to(device), validation.values[rows].to(device)
    blocks = AudioNormalizer(train.metadata["audio"]).blocks

    def score(network: AudioRegressor) -> float:
        with torch.no_grad():
            return r2(network(audio), values).mean().item()

    with repeatable(seed, device):
        network, best = train_mlp(songs, training_rows, blocks, score, device, steps, check_interrupt)
        for linear in ridge_regressions(songs.audio[training_rows], songs.values[training_rows]):
            if (value := score(linear.to(device))) > best:
                network, best = linear, value
    figures: dict[str, Any] = {"kind": network.kind, "validation": best}
    if test := open_split(str(train.index.root), "test", needed=False):
        songs = AudioDataset(test, truth, seed)
        predicted = network.predict(songs.audio)
        figures |= {"songs": len(predicted), "r2": truth.by_name(r2(predicted, songs.values)),
                    "r2_within_genre": truth.by_name(r2(predicted, songs.values, songs.genres))}
    return network, figures


def train_mlp(songs: AudioDataset, rows: np.ndarray, blocks: list[list[int]], score: Callable[[AudioRegressor], float],
              device: torch.device, steps: int, check_interrupt: Callable[[], Any]) -> tuple[AudioRegressor, float]:
    """An MLP that was trained on some rows of songs, and its best score."""
    order = torch.from_numpy(rows[np.argsort(songs.groups[rows], kind="stable")])
    counts = torch.from_numpy(np.unique(songs.groups[rows], return_counts=True)[1])
    starts = counts.cumsum(0) - counts
    audio, values = songs.audio.to(device), songs.values.to(device)
    network = AudioRegressor(audio.shape[1], values.shape[1], "mlp").to(device)
    batch = min(BATCH, len(counts))
    queue: list[Tensor] = []

    def loss() -> Tensor:
        if not queue:
            drawn = order[starts + (torch.rand(len(counts)) * counts).long()]  # a track of every album
            queue.extend(drawn[torch.randperm(len(drawn))].split(batch)[:len(drawn) // batch])
        rows = queue.pop().to(device)
        return F.mse_loss(network(F.dropout(drop_audio_blocks(audio[rows], blocks), INPUT_DROPOUT)), values[rows])

    steps = max(10, min(steps, EPOCHS * (len(counts) // batch)))
    return network, fit(network, loss, lambda: score(network), steps=steps, rate=RATE, decay=DECAY,
                        check_interrupt=check_interrupt)


def drop_audio_blocks(audio: Tensor, blocks: list[list[int]]) -> Tensor:
    """Audio ``[B, S]`` as if some of the blocks that a track has were absent, but never all of them."""
    size = len(blocks)
    present = audio[:, -size:] > 0
    mask = present & (torch.rand(len(audio), size) < 0.5).to(audio.device)
    mask = torch.where(mask.any(1, keepdim=True), mask, present).to(audio.dtype)
    widths = torch.tensor([stop - start for start, stop in blocks] + [1] * size, device=audio.device)
    return audio * torch.cat([mask, mask], 1).repeat_interleave(widths, 1)


def ridge_regressions(audio: Tensor, values: Tensor) -> Iterator[AudioRegressor]:
    """Ridge regressions of values ``[N, A]`` on audio ``[N, S]``, with an intercept, one for each penalty."""
    audio_mean, value_mean = audio.double().mean(0), values.double().mean(0)
    square = torch.zeros(audio.shape[1], audio.shape[1], dtype=torch.float64)
    cross = torch.zeros(audio.shape[1], values.shape[1], dtype=torch.float64)
    for x, y in zip(audio.split(BLOCK), values.split(BLOCK), strict=True):
        x = x.double() - audio_mean
        square += x.T @ x
        cross += x.T @ (y.double() - value_mean)
    for penalty in PENALTIES:
        weight = torch.linalg.solve(square + penalty * torch.eye(len(square), dtype=torch.float64), cross)
        network = AudioRegressor(audio.shape[1], values.shape[1], "ridge")
        with torch.no_grad():
            network.layers[0].weight.copy_(weight.T)
            network.layers[0].bias.copy_(value_mean - audio_mean @ weight)
        yield network.eval()
