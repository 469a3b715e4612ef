"""A reader of covers, which predicts a cover's genre and, of a demo, its attributes; trained on real covers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen.data.audio import AudioNormalizer
from covergen.data.batch import downscale
from covergen.data.dataset import ShardDataset, open_split
from covergen.evaluation.audio_regressor import AudioRegressor, train_regressor
from covergen.evaluation.demo_truth import Truth
from covergen.evaluation.fitting import VERSION, cached_network, fit, hold_out, r2, repeatable
from covergen.evaluation.metrics import balanced_accuracy
from covergen.evaluation.songs import cover_batches
from covergen.models.base import to_minus_one_one

SIDE = 64  # pixels: larger covers are averaged down to it
BLOCK = 256  # covers that go through the network together
COVERS, HELD_OUT = 20_000, 2_000  # at most, of the training or test split and of another
WIDTHS = (32, 64, 128, 192, 256)
STEPS, EPOCHS, BATCH, RATE, DECAY = 1500, 40, 64, 6e-3, 0.02
SHIFT, GRAIN = 1 / 16, 0.1  # how far training covers are shifted, as a share of the side, and the noise on them
MIRRORED = "stripe_angle"  # the attribute that changes its sign in a mirrored cover
ABSENT = -1e4  # score of a genre that no training cover has
GENRE_WEIGHT = 0.1  # of the genre's loss beside that of the attributes


@dataclass(frozen=True)
class CoverDataset:
    """Different covers: pixels uint8 ``[N, 3, S, S]``; genres ``[N]``, -1 for unknown; attributes ``[N, A]`` or None;
    albums ``[N]``."""

    pixels: Tensor
    genres: Tensor
    values: Tensor | None
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, rows: np.ndarray | Tensor) -> CoverDataset:
        values = None if self.values is None else self.values[rows]
        return CoverDataset(self.pixels[rows], self.genres[rows], values, self.groups[rows])


def read_covers(shards: ShardDataset, resolution: int, truth: Truth | None, count: int, seed: int) -> CoverDataset:
    """At most ``count`` covers, drawn at random, of the rows that the shards were opened for; ValueError where they are
    smaller than ``resolution``, or the truth does not know them."""
    if resolution > shards.resolution:
        raise ValueError(f"{shards.index.root} has covers of {shards.resolution} px, {resolution} px are needed")
    index = shards.index.rows
    rows = shards.rows[np.unique(index["cover_hash"][shards.rows], return_index=True)[1]]
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
    pixels = [downscale(part, min(resolution, SIDE)) for part in cover_batches(shards, rows, resolution)]
    values = None if truth is None else torch.from_numpy(truth.attributes(shards, rows))
    return CoverDataset(torch.cat(pixels), torch.from_numpy(shards.genres(rows)), values, index["group"][rows])


def augment(images: Tensor, values: Tensor | None, truth: Truth | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Training images ``[B, 3, S, S]`` shifted, mirrored and with noise, their attributes ``[B, A]``, and which are
    fit to learn genres from, bool ``[B]``."""
    count, side, device = len(images), images.shape[-1], images.device
    across, down = torch.rand(2, count) < 0.5
    plain = torch.ones(count, dtype=torch.bool)
    if truth is None:
        down = torch.zeros_like(down)
    else:
        column = truth.names.index(MIRRORED)
        values, plain = values.clone(), across == down  # both are half a turn, which changes no attribute
        offset = 2 * float(truth.mean[column] / truth.std[column])
        values[:, column] = torch.where(plain, values[:, column], -values[:, column] - offset)
    for mirrored, axis in ((across, 3), (down, 2)):
        images = torch.where(mirrored.to(device)[:, None, None, None], images.flip(axis), images)
    margin = max(1, round(SHIFT * side))
    left, top = torch.randint(2 * margin + 1, (2,)).tolist()
    images = F.pad(images, (margin,) * 4, mode="reflect")[:, :, top:top + side, left:left + side]
    images = images + GRAIN * torch.rand(count, 1, 1, 1).to(device) * torch.randn(images.shape).to(device)
    return images, values, plain


class CoverReader(nn.Module):
    """Images ``[B, 3, R, R]`` with values -1..1 to genres' scores ``[B, G]`` and attributes ``[B, A]``, or None.

    Scores are fit for balanced accuracy: how common a genre is does not count. Those of genres that no training cover
    has are -10,000. Attributes are standardised, as ``Truth`` gives them.
    """

    def __init__(self, resolution: int, genres: int, attributes: int) -> None:
        super().__init__()
        self.side = min(resolution, SIDE)

        def block(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        a, b, c, d, e = WIDTHS
        self.trunk = nn.Sequential(
            *block(3, a, 5, 1 if self.side <= 32 else 2), *block(a, b, 3, 2), *block(b, c, 3, 1), *block(c, d, 3, 2),
            *block(d, e, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.genre = nn.Linear(e, genres)
        self.attributes = nn.Linear(e, attributes) if attributes else None
        self.register_buffer("known", torch.ones(genres, dtype=torch.bool))
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.heads(self.trunk_features(images))

    def trunk_features(self, images: Tensor) -> Tensor:
        """What both are predicted from, float32 ``[B, 256]``."""
        if images.shape[-1] != self.side:
            images = F.interpolate(images, size=(self.side, self.side), mode="area")
        kind = images.device.type  # bfloat16 saves time on GPUs that have it, and on CPUs with AMX
        fast = (torch.cuda.is_bf16_supported() if kind == "cuda"
                else kind == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)()))
        with torch.autocast(kind, torch.bfloat16, enabled=fast):
            return self.trunk(images.to(memory_format=torch.channels_last)).float()

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores and attributes from features ``[B, 256]``."""
        scores = self.genre(features).masked_fill(~self.known, ABSENT)
        return scores, self.attributes(features) if self.attributes else None

    @torch.no_grad()
    def features(self, covers: Tensor) -> Tensor:
        """Features float32 ``[N, 256]`` of any number of uint8 covers ``[N, 3, R, R]``, on the reader's device."""
        self.eval()
        return torch.cat([self.trunk_features(to_minus_one_one(part.to(self.known.device)))
                          for part in covers.split(BLOCK)])

    @torch.no_grad()
    def predict(self, covers: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What uint8 covers ``[N, 3, R, R]`` show, on the CPU: genres int64 ``[N]``, None unless there are two at
        least, and standardised attributes float32 ``[N, A]`` or None."""
        scores, values = self.heads(self.features(covers))
        return (scores.argmax(1).cpu() if self.known.sum() > 1 else None), None if values is None else values.cpu()


@dataclass(frozen=True)
class Probes:
    """The networks that evaluations of one folder of shards have in common, and their ``figures``; a regressor and the
    normalizer of its audio only of demo data with audio, a truth only of demo data."""

    reader: CoverReader
    regressor: AudioRegressor | None
    normalizer: AudioNormalizer | None
    truth: Truth | None
    figures: dict[str, dict[str, Any]]

    def predict(self, raw: np.ndarray | None) -> np.ndarray | None:
        """Attributes float32 ``[N, A]`` from audio ``[N, D]`` as it lies in shards; None without a regressor."""
        if self.regressor is None or raw is None:
            return None
        return self.regressor.predict(torch.from_numpy(self.normalizer(raw))).numpy()


def open_probes(train: ShardDataset, held_out: ShardDataset | None, resolution: int, truth: Truth | None, *,
                device: torch.device | str | None = None, steps: int | None = None, seed: int = 0,
                say: Callable[[str], Any] = print, check_interrupt: Callable[[], Any] = lambda: None) -> Probes:
    """The reader of these shards, and on demo data with audio the regressor: from the cache, else trained now.

    Takes what ``train_reader`` takes; a line is said before what takes minutes. ValueError if the truth is of another
    demo.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    attributes = len(truth.names) if truth else 0
    made_of = {"train": train.identity, "rows": crc32(train.rows.tobytes()), "seed": seed, "steps": steps,
               "held_out": held_out.identity if held_out else None, "truth": truth.digest if truth else None}
    options = {"device": device, "seed": seed, "check_interrupt": check_interrupt} | ({"steps": steps} if steps else {})

    def make_reader() -> tuple[CoverReader, dict[str, Any]]:
        say("training a reader of covers for these shards (a minute or two); the next evaluation finds it trained")
        return train_reader(train, held_out, resolution, truth, **options)

    def make_regressor() -> tuple[AudioRegressor, dict[str, Any]]:
        say("training a predictor of attributes from audio for these shards (half a minute), cached as well")
        return train_regressor(train, held_out, truth, **options)

    reader, learned = cached_network(
        f"{train.identity[:16]}-{resolution}-v{VERSION}", "reader", made_of,
        lambda _: CoverReader(resolution, len(train.metadata["genres"]), attributes), make_reader)
    regressor, normalizer, figures = None, None, {"reader": learned}
    if train.metadata["audio"] and truth:
        normalizer = AudioNormalizer(train.metadata["audio"])
        regressor, figures["predictor"] = cached_network(
            f"{train.identity[:16]}-audio-v{VERSION}", "predictor", made_of,
            lambda figures: AudioRegressor(normalizer.size, attributes, figures["kind"]), make_regressor)
    return Probes(reader.to(device), regressor and regressor.to(device), normalizer, truth, figures)


def train_reader(train: ShardDataset, held_out: ShardDataset | None, resolution: int, truth: Truth | None = None, *,
                 device: torch.device | str = "cpu", steps: int = STEPS, seed: int = 0,
                 check_interrupt: Callable[[], Any] = lambda: None) -> tuple[CoverReader, dict[str, Any]]:
    """A reader of covers, the best by its loss on held-out ones.

    Training covers are shifted a little and get some noise. Those of a demo are also mirrored both ways, which changes
    one attribute in a known way; genres are not learnt from such covers. Others are mirrored left to right. Validates
    on ``held_out``; None: on an eighth of the training albums. Takes ``steps`` steps and ``EPOCHS`` epochs at most.

    Returns the network, and figures: covers and genres that it learnt from, steps, and of the test split, where there
    is one, test_covers, genre_accuracy (balanced) with genre_chance, and by attribute r2.
    """
    device = torch.device(device)
    covers = read_covers(train, resolution, truth, COVERS, seed)
    if held_out:
        validation = read_covers(held_out, resolution, truth, HELD_OUT, seed)
    else:
        covers, validation = (covers.select(rows) for rows in hold_out(covers.groups, seed))
    counts = torch.bincount(covers.genres[covers.genres >= 0], minlength=len(train.metadata["genres"]))
    batch = min(BATCH, len(covers))
    steps = max(10, min(steps, EPOCHS * -(-len(covers) // batch)))
    with repeatable(seed, device):
        reader = CoverReader(resolution, len(counts), len(truth.names) if truth else 0).to(device)
        reader.known.copy_(counts > 0)
        shares = (counts / counts.sum().clamp_min(1)).clamp_min(1e-9).log().to(device)
        pixels = covers.pixels.to(device)
        queue: list[Tensor] = []

        def loss() -> Tensor:
            if not queue:
                queue.extend(torch.randperm(len(covers)).split(batch)[:len(covers) // batch])
            rows = queue.pop()
            values = None if covers.values is None else covers.values[rows]
            images, values, plain = augment(to_minus_one_one(pixels[rows.to(device)]), values, truth)
            return loss_of(reader, images, torch.where(plain, covers.genres[rows], -1), values, shares)

        def score() -> float:
            total = 0.0
            for rows in torch.arange(len(validation)).split(BLOCK):
                part = validation.select(rows)
                genres = torch.where(reader.known.cpu()[part.genres], part.genres, -1)
                images = to_minus_one_one(part.pixels.to(device))
                total += len(part) * loss_of(reader, images, genres, part.values, shares).item()
            return -(total / len(validation))

        if truth or (counts > 0).sum() > 1:  # else there is nothing to learn
            fit(reader, loss, score, steps=steps, rate=RATE, decay=DECAY, check_interrupt=check_interrupt)
    reader.eval()
    figures: dict[str, Any] = {"covers": len(covers), "genres": int((counts > 0).sum()), "steps": steps}
    if test := open_split(str(train.index.root), "test", needed=False):
        covers = read_covers(test, resolution, truth, COVERS, seed)
        genres, values = reader.predict(covers.pixels)
        figures["test_covers"] = len(covers)
        if genres is not None and (labelled := covers.genres >= 0).any():
            figures |= {"genre_accuracy": balanced_accuracy(covers.genres[labelled], genres[labelled]),
                        "genre_chance": 1 / len(covers.genres[labelled].unique())}
        if values is not None:
            figures["r2"] = truth.by_name(r2(values, covers.values))
    return reader, figures


def loss_of(reader: CoverReader, images: Tensor, genres: Tensor, values: Tensor | None, shares: Tensor) -> Tensor:
    """The loss on images ``[B, 3, S, S]`` of genres ``[B]``, -1 for unknown, and attributes ``[B, A]``, a scalar; with
    the logarithms of the genres' shares ``[G]``.

    Source: Menon et al. 2021, "Long-tail Learning via Logit Adjustment": scores learn what shares do not explain.
    """
    scores, estimates = reader(images)
    genres = genres.to(images.device)
    loss = F.cross_entropy(scores + shares, genres, ignore_index=-1, reduction="sum") / (genres >= 0).sum().clamp_min(1)
    return loss if values is None else GENRE_WEIGHT * loss + F.mse_loss(estimates, values.to(images.device))
