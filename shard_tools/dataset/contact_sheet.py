"""Draws contact sheets: rows of pictures with a few words each, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from shard_tools.core.text import printable

TILE, GAP, LINE, MARGIN = 120, 10, 15, 16  # pixels
_PAPER, _INK, _FAINT, _CHOSEN = "#ffffff", "#111111", "#666666", "#0a7d32"


class Tile(NamedTuple):
    """A picture, the words below it, a line each, and whether it is framed and its first line coloured."""

    image: Image.Image
    words: Sequence[str]
    chosen: bool = False


class Row(NamedTuple):
    """Pictures, which must fit the sheet's width, below a line and a title where there is one."""

    tiles: Sequence[Tile]
    title: str = ""


def draw_sheet(rows: Sequence[Row], across: int, heading: str = "") -> bytes:
    """The PNG of some rows of at most ``across`` pictures."""
    words = max((len(tile.words) for row in rows for tile in row.tiles), default=0)
    heights = [2 * LINE * bool(row.title) + TILE + LINE * words + GAP for row in rows]
    top = MARGIN + 2 * LINE * bool(heading)
    sheet = Image.new("RGB", (2 * MARGIN + across * (TILE + GAP), top + sum(heights) + MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(11), ImageFont.load_default(14)
    draw.text((MARGIN, MARGIN), printable(heading), _INK, large)
    for row, height in zip(rows, heights, strict=True):
        upper = top
        if row.title:
            draw.line((MARGIN, top, sheet.width - MARGIN, top), "#cccccc")
            draw.text((MARGIN, top + 6), printable(row.title), _INK, large)
            upper += 2 * LINE
        for column, tile in enumerate(row.tiles):
            left = MARGIN + column * (TILE + GAP)
            image = ImageOps.contain(tile.image, (TILE, TILE))
            sheet.paste(image, (left + (TILE - image.width) // 2, upper + (TILE - image.height) // 2))
            if tile.chosen:
                draw.rectangle((left - 3, upper - 3, left + TILE + 2, upper + TILE + 2), outline=_CHOSEN, width=3)
            for line, text in enumerate(tile.words):
                colour = _FAINT if line else _CHOSEN if tile.chosen else _INK
                draw.text((left, upper + TILE + 3 + line * LINE), _fit(draw, printable(text), small), colour, small)
        top += height
    output = io.BytesIO()
    sheet.save(output, "PNG")
    return output.getvalue()


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text with its middle left out where it is wider than a tile."""
    keep, shown = len(text), text
    while draw.textlength(shown, font) > TILE and keep > 2:
        keep -= 1
        shown = f"{text[:(keep + 1) // 2]}...{text[len(text) - keep // 2:]}"
    return shown
