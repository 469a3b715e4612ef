"""Covers to find duplicates among: a kind and a number in, a distinct picture out; a picture in, altered copies out.

``python tests/proofs/planted.py SEED COUNT EVERY`` measures how many planted copies are found among drawn covers.
The thresholds of ``curation/similarity.py`` were chosen on seeds 1 and 77.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # python tests/proofs/NAME.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import io
import string
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from shard_tools.core.files import hash64
from shard_tools.curation.clusters import File, find_clusters
from shard_tools.curation.fingerprints import FINGERPRINT_DTYPE, DistinctCovers, fingerprint
from shard_tools.dataset import demo_world as world
from shard_tools.dataset.source import Entry
from tests.support.paths import SHARED

REAL = SHARED / "gamemusic.tar.xz"
Alter = Callable[[Image.Image, np.random.Generator], Image.Image]
WORDS = [
    "night", "river", "golden", "black", "heart", "summer", "machine", "ghost", "silver", "blue", "electric", "garden",
    "moon", "paper", "fire", "king", "wolf", "ocean", "love", "city", "dream", "north", "wild", "glass", "stone",
    "young", "winter", "radio",
]


def rng_of(*key: int | str) -> np.random.Generator:
    return np.random.default_rng([part if isinstance(part, int) else sum(map(ord, part)) for part in key])


def colour(rng: np.random.Generator) -> tuple[int, int, int]:
    return tuple(int(value) for value in rng.integers(0, 256, 3))


def smooth(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32)


def gradient(rng: np.random.Generator, side: int) -> Image.Image:
    """From one colour to another, along a line or outwards."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    if rng.random() < 0.7:
        angle = rng.uniform(0, 2 * np.pi)
        share = (x * np.cos(angle) + y * np.sin(angle)) / 1.42 + 0.5
    else:
        share = np.hypot(x - rng.uniform(-0.4, 0.4), y - rng.uniform(-0.4, 0.4)).clip(0, 1)
    ends = rng.integers(0, 256, (2, 3))
    return Image.fromarray((ends[0] + share[..., None] * (ends[1] - ends[0])).astype(np.uint8))


def shapes(rng: np.random.Generator, side: int) -> Image.Image:
    """Some ellipses, boxes and lines on a plain ground."""
    image = Image.new("RGB", (side, side), colour(rng))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 9)):
        box = rng.integers(0, side, 4).reshape(2, 2)
        corners = [tuple(map(int, box.min(0))), tuple(map(int, box.max(0) + 4))]
        (draw.ellipse, draw.rectangle, draw.line)[rng.integers(3)](
            corners, fill=colour(rng), **({} if rng.random() < 0.6 else {"width": int(rng.integers(2, 8))}))
    return image


def texture(rng: np.random.Generator, side: int) -> Image.Image:
    """Noise of several grains in two colours."""
    grains = sum(smooth(rng, side, 2**power)[..., 0] / 2 ** (power * rng.uniform(0, 0.5)) for power in range(2, 7))
    share = (grains - grains.min()) / np.ptp(grains)
    if rng.random() < 0.3:
        share = np.round(share * 3) / 3
    ends = rng.integers(0, 256, (2, 3))
    return Image.fromarray((ends[0] + share[..., None] * (ends[1] - ends[0])).astype(np.uint8))


def text(rng: np.random.Generator, side: int, ground: tuple[int, int, int] | None = None) -> Image.Image:
    """A name and a title on black, or on a plain ground."""
    black = ground is None
    image = Image.new("RGB", (side, side), (0, 0, 0) if black else ground)
    draw = ImageDraw.Draw(image)
    ink = (255, 255, 255) if black and rng.random() < 0.7 else colour(rng)
    for _ in range(rng.integers(1, 4)):
        size = int(side * rng.uniform(0.08, 0.2))
        words = " ".join(rng.choice(WORDS, rng.integers(1, 3))).upper()
        at = (int(side * rng.uniform(0.02, 0.4)), int(side * rng.uniform(0.02, 0.8)))
        draw.text(at, words, ink, ImageFont.load_default(size))
    return image


def demo(rng: np.random.Generator, side: int) -> Image.Image:
    """A cover of the demo world."""
    made = _world()
    genre = int(rng.integers(len(world.GENRES)))
    return Image.fromarray(world.paint(world.make_album(made, int(rng.integers(2**40)), genre), side))


@cache
def _world() -> world.World:
    return world.make_world(0)


KINDS = {
    "demo32": lambda rng, side: demo(rng, 32),
    "demo64": lambda rng, side: demo(rng, 64),
    "smooth": lambda rng, side: Image.fromarray(smooth(rng, side, 4).astype(np.uint8)),
    "gradient": gradient,
    "shapes": shapes,
    "texture": texture,
    "black": text,
    "text": lambda rng, side: text(rng, side, colour(rng)),
}


def cover(seed: int, number: int) -> Image.Image:
    """The cover of a number; its kind goes round."""
    kind = list(KINDS)[number % len(KINDS)]
    rng = rng_of(seed, number)
    return KINDS[kind](rng, int(rng.choice([128, 160, 256])))


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    output = io.BytesIO()
    image.save(output, "JPEG", quality=quality)
    return output.getvalue()


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Three hundredths off the width and off the height, anyhow shared between the sides."""
    width, height = image.size
    cut = np.array([width, height]) * 0.03
    left, top = rng.random(2) * cut
    box = (left, top, left + width - cut[0], top + height - cut[1])
    return image.resize(image.size, Image.Resampling.BICUBIC, box)


def _trim(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Three hundredths off each side."""
    x, y = (max(1, round(0.03 * size)) for size in image.size)
    return image.crop((x, y, image.width - x, image.height - y))


def _logo(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A badge of an eighth of the side in a corner."""
    image = image.copy()
    size, gap = image.width // 8, image.width // 32
    left = gap if rng.random() < 0.5 else image.width - gap - size
    top = gap if rng.random() < 0.5 else image.height - gap - size
    draw = ImageDraw.Draw(image)
    draw.ellipse((left, top, left + size, top + size), fill=colour(rng), outline=colour(rng))
    draw.text((left + size // 4, top + size // 4), rng.choice(list(string.ascii_uppercase)), colour(rng),
              ImageFont.load_default(max(4, size // 2)))
    return image


def _scaled(share: float) -> Alter:
    return lambda image, rng: image.resize((round(image.width * share), round(image.height * share)),
                                           Image.Resampling.LANCZOS)


def _brighter(levels: int) -> Alter:
    return lambda image, rng: image.point(lambda value: min(255, max(0, value + levels)))


PLANTS = {
    "q40": lambda image, rng: image,
    "smaller": _scaled(0.9),
    "larger": _scaled(1.1),
    "crop": _crop,
    "trim": _trim,
    "brighter": _brighter(10),
    "darker": _brighter(-10),
    "brighter_share": lambda image, rng: ImageEnhance.Brightness(image).enhance(1.1),
    "darker_share": lambda image, rng: ImageEnhance.Brightness(image).enhance(0.9),
    "logo": _logo,
}


def plant(name: str, image: Image.Image, rng: np.random.Generator) -> bytes:
    """An altered copy of a cover, as another program would have stored it."""
    return jpeg(PLANTS[name](image, rng), 40 if name == "q40" else 88)


def fingerprints_of(data: list[bytes]) -> np.ndarray:
    """``FINGERPRINT_DTYPE`` of covers."""
    return np.array([(True, True, hash64(cover), *fingerprint(cover)) for cover in data], FINGERPRINT_DTYPE)


def clusters_of(data: list[bytes]) -> np.ndarray:
    """The number of each cover's cluster, -1 where it is in none; each cover is an album of its own."""
    files = [File("pop", str(i), Entry(f"pop/{i}.jpg", 1, 0), None, f"pop/{i}") for i in range(len(data))]
    numbers, fingerprints = np.full(len(data), -1), fingerprints_of(data)
    _, first, index = np.unique(fingerprints["hash"], return_index=True, return_inverse=True)
    for number, members in enumerate(find_clusters(files, DistinctCovers(index, fingerprints[first]), 4)):
        numbers[[int(member.file.stem) for member in members]] = number
    return numbers


def measure(seed: int, count: int, every: int, pictures: list[Image.Image] | None = None,
            ) -> tuple[dict[str, float], float]:
    """What is found of copies planted among distinct covers: {plant: share found}, share of covers joined wrongly.

    Args:
        seed: of the drawn covers and of the plants.
        count: number of distinct covers.
        every: one cover of so many (of each kind) is planted, once in each way.
        pictures: take these for covers instead of drawing them.
    """
    data, whose, how = [], [], []
    for i in range(count):
        image = pictures[i] if pictures else cover(seed, i)
        data.append(jpeg(image))
        whose.append(i)
        how.append("")
        if (i // len(KINDS)) % every == 0:
            for number, name in enumerate(PLANTS):
                data.append(plant(name, image, rng_of(seed, i, number)))
                whose.append(i)
                how.append(name)
    numbers, whose, how = clusters_of(data), np.array(whose), np.array(how)
    first = numbers[np.searchsorted(whose, whose)]
    found = (numbers == first) & (numbers >= 0)
    owners = np.unique(np.stack([numbers, whose], 1)[numbers >= 0], axis=0)
    mixed = np.flatnonzero(np.bincount(owners[:, 0], minlength=1) > 1)
    wrong = len(np.unique(owners[np.isin(owners[:, 0], mixed), 1]))
    return {name: float(found[how == name].mean()) for name in PLANTS}, wrong / count


if __name__ == "__main__":
    import sys

    shares, wrong = measure(*map(int, sys.argv[1:4]))
    print(", ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    print(f"found {np.mean(list(shares.values())):.4f}; covers joined wrongly {wrong:.4f}")
