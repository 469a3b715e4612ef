"""Who reads covers: shards in; a network that tells a cover's genre and, of a demo, its attributes out.

It is trained on real covers of the training split and kept, so that covers of any run are read by the same eyes.
"""

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
from covergen.evaluation.audio_regressor import Predictor, known, named, train_predictor
from covergen.evaluation.demo_truth import Truth
from covergen.evaluation.fitting import VERSION, cached_network, fit, r2, repeatable, set_apart
from covergen.evaluation.metrics import balanced_accuracy
from covergen.models.base import to_minus_one_one

SIDE = 64  # pixels: larger covers are averaged down to it
AT_ONCE = 256  # covers that are read together
SHIFT, GRAIN = 1 / 16, 0.1  # how far training covers are shifted, as a share of the side, and the noise on them
MIRRORED = "stripe_angle"  # the attribute that changes its sign in a mirrored cover


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

    def part(self, places: np.ndarray) -> CoverDataset:
        """Those at some places."""
        values = None if self.values is None else self.values[places]
        return CoverDataset(self.pixels[places], self.genres[places], values, self.groups[places])


def read_covers(shards: ShardDataset, resolution: int, truth: Truth | None, count: int, seed: int) -> CoverDataset:
    """At most ``count`` covers, drawn at random, of the rows that the shards were opened for.

    Raises:
        ValueError: the shards' covers are smaller than ``resolution``, or the truth does not know them.
    """
    if resolution > shards.resolution:
        raise ValueError(f"{shards.index.root} has covers of {shards.resolution} px, {resolution} px are needed")
    index = shards.index.rows
    rows = shards.rows[np.unique(index["cover_hash"][shards.rows], return_index=True)[1]]
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:count])
    side = min(resolution, SIDE)
    pixels = [downscale(downscale(shards.read(rows[start:start + AT_ONCE]).cover, resolution), side)
              for start in range(0, len(rows), AT_ONCE)]
    values = None if truth is None else torch.from_numpy(known(truth, shards, rows))
    return CoverDataset(torch.cat(pixels), torch.from_numpy(shards.genres(rows)), values, index["group"][rows])


def changed(images: Tensor, values: Tensor | None, truth: Truth | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Training images ``[B, 3, S, S]`` shifted, mirrored and with noise, their attributes ``[B, A]``, and which are
    fit to learn genres from, bool ``[B]``."""
    count, side, device = len(images), images.shape[-1], images.device
    across, down = torch.rand(2, count) < 0.5
    plain = torch.ones(count, dtype=torch.bool)
    if truth is None:
        down = torch.zeros_like(down)
    elif MIRRORED in truth.names:
        place = truth.names.index(MIRRORED)
        values, plain = values.clone(), across == down  # both are half a turn, which changes no attribute
        offset = 2 * float(truth.mean[place] / truth.std[place])
        values[:, place] = torch.where(plain, values[:, place], -values[:, place] - offset)
    else:
        across, down = torch.zeros_like(across), torch.zeros_like(down)
    for which, axis in ((across, 3), (down, 2)):
        images = torch.where(which.to(device)[:, None, None, None], images.flip(axis), images)
    room = max(1, round(SHIFT * side))
    left, top = torch.randint(2 * room + 1, (2,)).tolist()
    images = F.pad(images, (room,) * 4, mode="reflect")[:, :, top:top + side, left:left + side]
    images = images + GRAIN * torch.rand(count, 1, 1, 1).to(device) * torch.randn(images.shape).to(device)
    return images, values, plain


WIDTHS = (32, 64, 128, 192, 256)
COVERS, HELD_OUT = 20_000, 2_000  # at most, of the training or test split and of another
STEPS, EPOCHS, BATCH, RATE, DECAY = 1500, 40, 64, 6e-3, 0.02
OUT = -1e4  # score of a genre that no training cover has
GENRE_WEIGHT = 0.1  # of the genre's loss beside that of the attributes


class Reader(nn.Module):
    """Images ``[B, 3, R, R]`` with values -1..1 to genres' scores ``[B, G]`` and attributes ``[B, A]``, or None.

    Scores are fit for balanced accuracy: how common a genre is does not count. Those of genres that no training cover
    has are -10,000. Attributes are standardised, as ``Truth`` gives them.
    """

    def __init__(self, resolution: int, genres: int, attributes: int) -> None:
        """Args: resolution: R; genres: G; attributes: A, 0 where there are none."""
        super().__init__()
        self.side = min(resolution, SIDE)

        def block(wide: int, out: int, size: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(wide, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

        a, b, c, d, e = WIDTHS
        self.trunk = nn.Sequential(
            *block(3, a, 5, 1 if self.side <= 32 else 2), *block(a, b, 3, 2), *block(b, c, 3, 1), *block(c, d, 3, 2),
            *block(d, e, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.genre = nn.Linear(e, genres)
        self.attributes = nn.Linear(e, attributes) if attributes else None
        self.register_buffer("known", torch.ones(genres, dtype=torch.bool))
        self.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """What both are read from, float32 ``[B, 256]``."""
        if images.shape[-1] != self.side:
            images = F.interpolate(images, size=(self.side, self.side), mode="area")
        with torch.autocast(images.device.type, torch.bfloat16, enabled=is_fast(images.device)):
            return self.trunk(images.to(memory_format=torch.channels_last)).float()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.tell(self.features(images))

    def tell(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same from features ``[B, 256]``."""
        scores = self.genre(features).masked_fill(~self.known, OUT)
        return scores, self.attributes(features) if self.attributes else None

    @torch.no_grad()
    def see(self, covers: Tensor) -> Tensor:
        """Features float32 ``[N, 256]`` of uint8 covers ``[N, 3, R, R]``, in blocks; on the reader's device."""
        self.eval()
        return torch.cat([self.features(to_minus_one_one(part.to(self.known.device))) for part in covers.split(AT_ONCE)])

    @torch.no_grad()
    def read(self, covers: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What uint8 covers ``[N, 3, R, R]`` show, on the CPU: genres int64 ``[N]``, None unless there are two to tell
        apart, and standardised attributes float32 ``[N, A]`` or None."""
        scores, values = self.tell(self.see(covers))
        return (scores.argmax(1).cpu() if self.known.sum() > 1 else None), None if values is None else values.cpu()


def is_fast(device: torch.device) -> bool:
    """Whether bfloat16 saves time: on GPUs that have it, and on CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@dataclass(frozen=True)
class Readings:
    """What an evaluation asks about covers and songs of one folder of shards.

    Attributes:
        reader: of covers.
        predictor: of attributes from audio; None but on demo data with audio.
        scale: of that audio.
        truth: of the demo, or None.
        figures: of ``reader`` and ``predictor``, see ``train_reader`` and ``train_predictor``.
    """

    reader: Reader
    predictor: Predictor | None
    scale: AudioNormalizer | None
    truth: Truth | None
    figures: dict[str, dict[str, Any]]

    def read(self, covers: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """See ``Reader.read``."""
        return self.reader.read(covers)

    def features(self, covers: Tensor) -> Tensor:
        """float32 ``[N, 256]`` of uint8 covers ``[N, 3, R, R]``, on the CPU."""
        return self.reader.see(covers).cpu()

    def predict(self, raw: np.ndarray | None) -> np.ndarray | None:
        """Attributes float32 ``[N, A]`` from audio ``[N, D]`` as it lies in shards; None where none can be told."""
        if self.predictor is None or raw is None:
            return None
        return self.predictor.predict(torch.from_numpy(self.scale(raw))).numpy()

    def truth_of(self, shards: ShardDataset, rows: np.ndarray) -> np.ndarray | None:
        """The true attributes of rows, float32 ``[N, A]``, standardised; None but on demo data."""
        return None if self.truth is None else known(self.truth, shards, rows)


def open_reader(train: ShardDataset, held_out: ShardDataset | None, resolution: int, truth: Truth | None, *,
                device: torch.device | str | None = None, steps: int | None = None, seed: int = 0,
                say: Callable[[str], Any] = print, tick: Callable[[], Any] = lambda: None) -> Readings:
    """The reader of these shards, and on demo data with audio the predictor: as they were kept, else trained now.

    They are kept in the user's cache folder, see ``trained.kept``.

    Args:
        train, held_out, resolution, truth, seed, tick: see ``train_reader``.
        steps: of each network at most; default: as many as make them good.
        device: default: the GPU, if there is one.
        say: told what takes minutes.

    Raises:
        ValueError: the truth is of another demo.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    audio, genres = train.metadata["audio"], len(train.metadata["genres"])
    made_of = {"train": train.identity, "rows": crc32(train.rows.tobytes()), "seed": seed, "steps": steps,
               "held_out": held_out.identity if held_out else None, "truth": truth.digest if truth else None}
    options = {"device": device, "seed": seed, "tick": tick} | ({"steps": steps} if steps else {})

    def reader() -> tuple[Reader, dict[str, Any]]:
        say("training a reader of covers for these shards (a minute or two); the next evaluation finds it trained")
        return train_reader(train, held_out, resolution, truth, **options)

    def predictor() -> tuple[Predictor, dict[str, Any]]:
        say("training a predictor of attributes from audio for these shards (half a minute), kept as well")
        return train_predictor(train, held_out, truth, **options)

    found: dict[str, Any] = {}
    found["reader"] = cached_network(f"{train.identity[:16]}-{resolution}-v{VERSION}", "reader", made_of,
                           lambda _: Reader(resolution, genres, len(truth.names) if truth else 0), reader)
    scale = AudioNormalizer(audio) if audio and truth else None
    if scale:
        found["predictor"] = cached_network(f"{train.identity[:16]}-audio-v{VERSION}", "predictor", made_of,
                                  lambda figures: Predictor(scale.size, len(truth.names), figures["kind"]), predictor)
    networks = {name: network.to(device) for name, (network, _) in found.items()}
    return Readings(networks["reader"], networks.get("predictor"), scale, truth,
                    {name: figures for name, (_, figures) in found.items()})


def train_reader(train: ShardDataset, held_out: ShardDataset | None, resolution: int, truth: Truth | None = None, *,
                 device: torch.device | str = "cpu", steps: int = STEPS, seed: int = 0,
                 tick: Callable[[], Any] = lambda: None) -> tuple[Reader, dict[str, Any]]:
    """A reader of covers, the best by its loss on held-out ones.

    Training covers are shifted a little and get some noise. Those of a demo are also mirrored both ways, which changes
    one attribute in a known way; genres are not learnt from such covers. Others are mirrored left to right.

    Args:
        train: training split.
        held_out: validation split; None: an eighth of the training albums.
        resolution: of the covers that will be read, the shards' or below.
        truth: of a demo.
        device: to train on.
        steps: at most; also ``EPOCHS`` epochs at most.
        seed: of everything random.
        tick: called before every step; may raise to stop.

    Returns:
        the network, and figures: covers and genres that it learnt from, steps, and of the test split, where there is
        one, test_covers, genre_accuracy (balanced) with genre_chance, and by attribute r2.
    """
    device = torch.device(device)
    learnt = read_covers(train, resolution, truth, COVERS, seed)
    if held_out:
        judged = read_covers(held_out, resolution, truth, HELD_OUT, seed)
    else:
        learnt, judged = (learnt.part(places) for places in set_apart(learnt.groups, seed))
    counts = torch.bincount(learnt.genres[learnt.genres >= 0], minlength=len(train.metadata["genres"]))
    batch = min(BATCH, len(learnt))
    steps = max(10, min(steps, EPOCHS * -(-len(learnt) // batch)))
    with repeatable(seed, device):
        reader = Reader(resolution, len(counts), len(truth.names) if truth else 0).to(device)
        reader.known.copy_(counts > 0)
        shares = (counts / counts.sum().clamp_min(1)).clamp_min(1e-9).log().to(device)
        pixels = learnt.pixels.to(device)
        queue: list[Tensor] = []

        def loss() -> Tensor:
            if not queue:
                queue.extend(torch.randperm(len(learnt)).split(batch)[:len(learnt) // batch])
            rows = queue.pop()
            values = None if learnt.values is None else learnt.values[rows]
            images, values, plain = changed(to_minus_one_one(pixels[rows.to(device)]), values, truth)
            genres = torch.where(plain, learnt.genres[rows], -1)
            return loss_of(reader, images, genres.to(device), None if values is None else values.to(device), shares)

        if truth or (counts > 0).sum() > 1:  # else there is nothing to learn
            fit(reader, loss, lambda: -mean_loss(reader, judged, shares), steps=steps, rate=RATE, decay=DECAY,
                tick=tick)
    reader.eval()
    figures = {"covers": len(learnt), "genres": int((counts > 0).sum()), "steps": steps}
    if test := open_split(str(train.index.root), "test", needed=False):
        figures |= figures_of(reader, read_covers(test, resolution, truth, COVERS, seed), truth)
    return reader, figures


def loss_of(reader: Reader, images: Tensor, genres: Tensor, values: Tensor | None, shares: Tensor) -> Tensor:
    """The loss on images ``[B, 3, S, S]`` of genres ``[B]``, -1 for unknown, and attributes ``[B, A]``, a scalar.

    Args: shares: logarithms of the genres' shares, ``[G]``.

    Source: Menon et al. 2021, "Long-tail Learning via Logit Adjustment": scores learn what shares do not tell.
    """
    scores, read = reader(images)
    loss = F.cross_entropy(scores + shares, genres, ignore_index=-1, reduction="sum") / (genres >= 0).sum().clamp_min(1)
    return loss if read is None else GENRE_WEIGHT * loss + F.mse_loss(read, values)


def mean_loss(reader: Reader, covers: CoverDataset, shares: Tensor) -> float:
    """The mean loss over covers; genres that the reader does not know count as unknown."""
    device, total = shares.device, 0.0
    genres = torch.where(reader.known.cpu()[covers.genres], covers.genres, -1)
    for places in torch.arange(len(covers)).split(AT_ONCE):
        values = None if covers.values is None else covers.values[places].to(device)
        images = to_minus_one_one(covers.pixels[places].to(device))
        total += len(places) * loss_of(reader, images, genres[places].to(device), values, shares).item()
    return total / len(covers)


def figures_of(reader: Reader, covers: CoverDataset, truth: Truth | None) -> dict[str, Any]:
    """How well covers are read, see ``train_reader``."""
    genres, values = reader.read(covers.pixels)
    figures: dict[str, Any] = {"test_covers": len(covers)}
    if genres is not None and (told := covers.genres >= 0).any():
        figures |= {"genre_accuracy": balanced_accuracy(covers.genres[told], genres[told]),
                    "genre_chance": 1 / len(covers.genres[told].unique())}
    if values is not None:
        figures["r2"] = named(truth, r2(values, covers.values))
    return figures
