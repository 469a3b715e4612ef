"""A procedural world of a seed: albums with covers, audio vectors and the truth that links them.

Every album has a latent, of which its tracks' vectors and its cover's eight attributes are two noisy views. It depends
on (seed, noise, its number) alone, and its cover at two resolutions is the same picture.
"""

from __future__ import annotations

import colorsys
import io
import math
import uuid
from dataclasses import dataclass

import numpy as np
from PIL import Image

# By share, the commonest first: the k-th has a share of k^-0.7.
GENRES = ("rock", "pop", "electronic", "metal", "indie", "rap", "folk", "country", "jazz", "r&b", "punk", "world",
          "blues", "latin", "reggae", "new_age")
SHARES = np.arange(1, 17) ** -0.7 / (np.arange(1, 17) ** -0.7).sum()
LABELS = sorted(GENRES)

# What the eight attributes look like: the drawn value runs over its range as the standardised attribute goes from -inf
# to inf (through the normal CDF). Hue and angle keep off a full circle, so that near values are always near pictures.
RANGES = {
    "hue": (0.0, 0.8),  # circles
    "saturation": (0.3, 0.95),
    "brightness": (0.4, 1.0),  # of the stripes' crests
    "contrast": (0.12, 0.6),  # how far the stripes' troughs fall, as a share of the crests
    "stripe_frequency": (2.5, 7.0),  # cycles per side: the same picture, and resolvable, at any resolution
    "stripe_angle": (-70.0, 70.0),  # degrees, of the direction in which the stripes change
    "shape_size": (0.08, 0.16),  # radius, as a share of the side
    "shape_count": (1, 5),  # a whole number when drawn
}
ATTRIBUTES = tuple(RANGES)
SHAPES = ("disc", "ring", "square", "diamond")

LATENT, NUISANCE, BLOCK = 8, 20, 580
GENRE_SPREAD, TRACK_NOISE, ATTRIBUTE_NOISE, MORE_TRACKS = 0.8, 0.5, 0.4, 1.39
PRESENCE = ((True, False), (False, True), (True, True))  # which of the two blocks a track has...
PRESENCE_SHARES = (0.60, 0.15, 0.25)  # ...and how often
UNITS = (lambda u: u, np.exp, lambda u: u * np.abs(u), np.tanh)
UNIT_NAMES = ("identity", "exp", "signed_square", "tanh")
LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))


@dataclass(frozen=True)
class World:
    """What all albums of a seed share.

    Attributes:
        seed, noise: the noise of tracks and of attributes is multiplied by ``noise``.
        genre_means: ``[16, 8]`` in the order of ``GENRES``.
        rotation: ``[8, 8]``, orthogonal, from latents to attributes.
        attribute_mean, attribute_std: ``[8]``, of the rotated and noisy latent over all albums; they standardise it.
        weights: ``[28, 1160]`` from (track latent, nuisance) to the units' inputs.
        scale: ``[1160]``, the units' outputs are multiplied by it.
        unit: ``[1160]``, position in ``UNITS``.
        is_nuisance: ``[1160]``, True where a column knows nothing of the track latent.
    """

    seed: int
    noise: float
    genre_means: np.ndarray
    rotation: np.ndarray
    attribute_mean: np.ndarray
    attribute_std: np.ndarray
    weights: np.ndarray
    scale: np.ndarray
    unit: np.ndarray
    is_nuisance: np.ndarray


@dataclass(frozen=True)
class Album:
    """One album of ``T`` tracks.

    Attributes:
        genre: its name.
        latent: ``[8]``; track_latents: ``[T, 8]``; presence: ``[T, 2]`` bool.
        attributes: ``[8]`` standardised reals; drawn: ``[8]``, what the cover shows, in the units of ``RANGES``.
        shape: position in ``SHAPES``.
        vectors: ``[T, 1160]`` float32; stems: ``T`` file stems.
        rng: draws what of the cover does not depend on the audio.
    """

    genre: str
    latent: np.ndarray
    track_latents: np.ndarray
    presence: np.ndarray
    attributes: np.ndarray
    drawn: np.ndarray
    shape: int
    vectors: np.ndarray
    stems: list[str]
    rng: np.random.Generator


def stream(*key: int) -> np.random.Generator:
    """An independent random stream for a key of whole numbers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def make_world(seed: int, noise: float = 1.0) -> World:
    """The world of a seed."""
    rng = stream(seed, 0)
    means = GENRE_SPREAD * rng.standard_normal((len(GENRES), LATENT))
    rotation = np.linalg.qr(rng.standard_normal((LATENT, LATENT)))[0]
    rotated = means @ rotation.T
    centre = SHARES @ rotated
    variance = SHARES @ (rotated - centre) ** 2 + 1 + (noise * ATTRIBUTE_NOISE) ** 2

    # First block: scales over 16 decades, the 56% above 1e3 all nuisance, as in the real features, where one column
    # makes up nearly all of any distance and says nothing. Second block: an embedding, every scale 1.
    def block(scale: np.ndarray, nuisance: np.ndarray) -> tuple[np.ndarray, ...]:
        order = rng.permutation(BLOCK)
        return scale[order], nuisance[order]

    rank = np.arange(BLOCK)
    scales = np.logspace(-4, 12, BLOCK)
    quiet = rng.permutation(np.flatnonzero(scales <= 1e3))[: round(0.6 * BLOCK) - int((scales > 1e3).sum())]
    first = block(scales, (scales > 1e3) | np.isin(rank, quiet))
    second = block(np.ones(BLOCK), rank < round(0.6 * BLOCK))
    scale, is_nuisance = (np.concatenate(pair) for pair in zip(first, second, strict=True))

    def directions(rows: int) -> np.ndarray:
        raw = rng.standard_normal((rows, 2 * BLOCK))
        return raw / np.linalg.norm(raw, axis=0)

    # Inputs of variance about 1: four fifths of it the music's in the columns that know it.
    spread = math.sqrt(GENRE_SPREAD**2 + 1 + (noise * TRACK_NOISE) ** 2)
    weights = np.concatenate([
        directions(LATENT) * np.where(is_nuisance, 0, math.sqrt(0.8) / spread),
        directions(NUISANCE) * np.where(is_nuisance, 1, math.sqrt(0.2)),
    ])
    return World(seed, noise, means, rotation, centre, np.sqrt(variance), weights, scale,
                 rng.integers(len(UNITS), size=2 * BLOCK), is_nuisance)


def genres_of(seed: int, albums: int) -> np.ndarray:
    """``[albums]`` positions in ``GENRES``; more albums leave the earlier ones as they are."""
    return np.searchsorted(np.cumsum(SHARES)[:-1], stream(seed, 1).random(albums), side="right")


def make_album(world: World, number: int, genre: int) -> Album:
    """The album of a number and a genre (position in ``GENRES``), all but its painted cover."""
    rng = stream(world.seed, 2, number)
    latent = world.genre_means[genre] + rng.standard_normal(LATENT)
    rotated = world.rotation @ latent + world.noise * ATTRIBUTE_NOISE * rng.standard_normal(LATENT)
    attributes = (rotated - world.attribute_mean) / world.attribute_std
    tracks = 1 + int(rng.poisson(MORE_TRACKS))
    track_latents = latent + world.noise * TRACK_NOISE * rng.standard_normal((tracks, LATENT))
    presence = np.array(PRESENCE)[np.searchsorted(np.cumsum(PRESENCE_SHARES)[:-1], rng.random(tracks), side="right")]
    inputs = np.hstack([track_latents, rng.standard_normal((tracks, NUISANCE))]) @ world.weights
    outputs = np.empty_like(inputs)
    for kind, unit in enumerate(UNITS):
        columns = world.unit == kind
        outputs[:, columns] = unit(inputs[:, columns])
    vectors = (outputs * world.scale * np.repeat(presence, BLOCK, axis=1)).astype("<f4")
    # The thesis's three kinds of stem, by which blocks a track has.
    album, *ids = (uuid.UUID(bytes=rng.bytes(16), version=4) for _ in range(tracks + 1))
    codes = ("TR" + "".join(row) for row in LETTERS[rng.integers(len(LETTERS), size=(tracks, 16))])
    stems = ["__".join([code] * bool(second) + [f"{track}-0__{album}"] * bool(first))
             for (first, second), track, code in zip(presence, ids, codes, strict=True)]
    shape = (genre ^ int(rng.integers(len(SHAPES)))) % len(SHAPES)  # genre xor coin: neither alone determines it
    values = []
    for (name, (low, high)), value in zip(RANGES.items(), attributes, strict=True):
        share = 0.5 * (1 + math.erf(value / math.sqrt(2)))
        whole = name == "shape_count"
        values.append(min(low + math.floor(share * (high - low + 1)), high) if whole else low + share * (high - low))
    drawn = np.array(values)
    return Album(GENRES[genre], latent, track_latents, presence, attributes, drawn, shape, vectors, stems, rng)


def paint(album: Album, resolution: int) -> np.ndarray:
    """The cover, ``[resolution, resolution, 3]`` uint8. Once per album: its generator moves on.

    The picture uses only sums, products, floors and square roots of pixels, which round the same on every machine.
    """
    hue, saturation, brightness, contrast, frequency, angle, radius, count = album.drawn.tolist()
    phase, lean, fall, warmth, vivid, glow, side, width, shift, gap = album.rng.random(10).tolist()
    at = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    x, y = at[None, :], at[:, None]

    angle = math.radians(angle)
    cycle = x * np.float32(frequency * math.cos(angle)) + (y * np.float32(frequency * math.sin(angle)) + phase)
    cycle -= np.floor(cycle) + np.float32(0.5)
    wave = cycle * (4 - 8 * np.abs(cycle))  # a parabola's sine, -0.5..0.5
    lean *= 2 * math.pi
    slope = 0.5 + (x - 0.5) * (0.7 * math.cos(lean)) + (y - 0.5) * (0.7 * math.sin(lean))  # 0..1 across the picture
    light = (brightness * ((1 - 0.5 * contrast) + contrast * wave)) * (1 - (0.05 + 0.15 * fall) * slope)

    ground = np.array(colorsys.hsv_to_rgb(hue, saturation, 1), np.float32)
    luma = float(ground @ np.array([0.3, 0.59, 0.11])) * brightness * (1 - 0.5 * contrast)
    dark = luma < 0.42
    accent = np.array(colorsys.hsv_to_rgb((hue + 0.5 + 0.3 * (warmth - 0.5)) % 1, 0.35 + 0.6 * vivid,
                                          0.85 + 0.15 * glow if dark else 0.1 + 0.25 * glow), np.float32)

    top = side < 0.5
    centres = _centres(album.rng, int(count), radius, top)
    distance = _distance(x, y, centres, radius, SHAPES[album.shape])
    shade = max(1, round(0.02 * resolution))
    shadow = np.zeros_like(distance)
    shadow[shade:, shade:] = np.clip(0.5 - distance[:-shade, :-shade] / np.float32(0.05), 0, 1)
    light *= 1 - np.float32(0.4) * shadow
    picture = light[..., None] * ground
    picture += np.clip(0.5 - distance * resolution, 0, 1)[..., None] * (accent - picture)

    # The title: two words of a bar, in the band that the shapes leave free.
    length = 0.25 + 0.5 * width
    left, middle = 0.06 + (0.88 - length) * shift, 0.08 if top else 0.92
    words = np.abs(x - (left + length / 2)) - length / 2
    words = np.maximum(words, 0.02 - np.abs(x - (left + length * (0.25 + 0.5 * gap))))
    title = np.clip(0.5 - words * resolution, 0, 1) * np.clip(0.5 - (np.abs(y - middle) - 0.03) * resolution, 0, 1)
    picture += title[..., None].astype(np.float32) * (np.float32(0.96 if dark else 0.05) - picture)

    picture += np.float32(0.015) * album.rng.standard_normal((resolution, resolution, 1), dtype=np.float32)
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)


def _centres(rng: np.random.Generator, count: int, radius: float, title_on_top: bool) -> np.ndarray:
    """Centres ``[count, 2]`` of the shapes, pushed apart until none hides another, clear of the title's band."""
    low = np.array([radius + 0.03, radius + (0.15 if title_on_top else 0.03)])
    high = 1 - np.array([radius + 0.03, radius + (0.03 if title_on_top else 0.15)])
    apart = 2.2 * radius + 0.03
    for _ in range(20):  # crowded ones get stuck in a corner now and then: deal again
        centres = low + rng.random((count, 2)) * (high - low)
        for _ in range(40):
            between = centres[:, None] - centres
            far = np.sqrt((between**2).sum(-1)) + apart * np.eye(count) + 1e-9
            push = np.maximum(apart - far, 0)
            if push.max() < 0.01:
                return centres
            centres = np.clip(centres + 0.6 * (between * (push / far)[..., None]).sum(1), low, high)
    return centres


def _distance(x: np.ndarray, y: np.ndarray, centres: np.ndarray, radius: float, shape: str) -> np.ndarray:
    """``[R, R]`` signed distance to the nearest shape, negative inside; all four shapes have about the same area."""
    dx = np.abs(x - centres[:, 0, None, None].astype(np.float32))
    dy = np.abs(y - centres[:, 1, None, None].astype(np.float32))
    if shape == "square":
        return np.maximum(dx, dy).min(0) - np.float32(0.88 * radius)
    if shape == "diamond":
        return ((dx + dy).min(0) - np.float32(1.24 * radius)) * np.float32(math.sqrt(0.5))
    far = np.sqrt((dx * dx + dy * dy).min(0)) - np.float32(radius)
    return far if shape == "disc" else np.maximum(far, np.float32(-0.6 * radius) - far)


def encode(cover: np.ndarray) -> bytes:
    """A cover as JPEG, quality 95, no chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(cover).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
