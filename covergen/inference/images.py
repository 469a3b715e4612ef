"""Covers as pictures for people: single ones, and grids with labelled rows, as PNG files that are whole or absent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from shard_tools import __version__
from shard_tools.core.files import atomic_path

SHOWN_SIDE = 64  # pixels that a cover in a grid has at least
GAP = 2  # pixels between covers


def to_unit(images: Tensor, low: float) -> Tensor:
    """Images as a network gives them, from ``low`` to 1, as float32 in [0, 1] on the host; NaN becomes grey."""
    return ((images.float().cpu() - low) / (1 - low)).nan_to_num(nan=0.5).clamp(0, 1)


def plain(cover: Tensor, side: int | None = None) -> Image.Image:
    """One cover ``[3, R, R]`` in [0, 1] as a picture of its own size, or resized to ``side`` px with Lanczos."""
    picture = Image.fromarray(cover.float().cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy())
    return picture.resize((side, side), Image.Resampling.LANCZOS) if side else picture


def grid(covers: Tensor, columns: int = 8, labels: Sequence[str] = (), side: int | None = None) -> Image.Image:
    """Covers ``[N, 3, R, R]`` in [0, 1] as one picture with ``columns`` a row, and a label left of each row if given.

    With ``side`` each is resized to so many pixels with Lanczos; else those below 64 px are shown enlarged by a whole
    number, pixel by pixel.
    """
    shown_side = side or max(1, SHOWN_SIDE // covers.shape[-1]) * covers.shape[-1]
    cell, columns = shown_side + GAP, min(columns, len(covers))
    font = ImageFont.load_default(size=14)
    margin = 12 + int(max(font.getlength(label) for label in labels)) if labels else 0
    picture = Image.new("RGB", (margin + columns * cell + GAP, -(-len(covers) // columns) * cell + GAP))
    picture.paste("white", (0, 0, margin, picture.height))
    for number, cover in enumerate(covers):
        row, column = divmod(number, columns)
        shown = plain(cover, side).resize((shown_side, shown_side), Image.Resampling.NEAREST)
        picture.paste(shown, (margin + column * cell + GAP, row * cell + GAP))
    draw = ImageDraw.Draw(picture)
    for row, label in enumerate(labels):
        draw.text((margin - 6, GAP + cell * row + shown_side // 2), label, fill="black", font=font, anchor="rm")
    return picture


def save(path: Path, picture: Image.Image, about: dict[str, Any] | None = None) -> None:
    """Writes a PNG, whole or not at all, with ``about`` (values of JSON) as its text ``covergen`` if that is given."""
    text = PngInfo()
    if about is not None:
        text.add_text("Software", f"covergen {__version__}")
        text.add_text("covergen", json.dumps(about))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=text)


def save_array(path: Path, shape: tuple[int, ...], parts: Iterable[Tensor]) -> None:
    """Writes a float32 array, part by part so that only one is in memory, as a .npy, whole or not at all."""
    with atomic_path(path) as temporary:
        array, start = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape), 0
        for part in parts:
            array[start:start + len(part)] = part.numpy()
            start += len(part)
        array.flush()
