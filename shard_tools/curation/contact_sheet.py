"""A contact sheet: rows of pictures with a few words each in, one PNG that a person can look through out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

TILE, GAP, LINE, MARGIN = 120, 10, 15, 16  # pixels
_PAPER, _INK, _FAINT, _CHOSEN = "#ffffff", "#111111", "#666666", "#0a7d32"


class Tile(NamedTuple):
    """A picture, the words below it, a line each, and whether it is framed and its first line coloured."""

    image: Image.Image
    words: Sequence[str]
    chosen: bool


class Row(NamedTuple):
    """A title and its pictures, which must fit the sheet's width."""

    title: str
    tiles: Sequence[Tile]


def draw_sheet(heading: str, rows: Sequence[Row], across: int) -> bytes:
    """The PNG of some rows of at most ``across`` pictures, below a heading."""
    words = max((len(tile.words) for row in rows for tile in row.tiles), default=0)
    height = 2 * LINE + TILE + LINE * words + GAP
    sheet = Image.new("RGB", (2 * MARGIN + across * (TILE + GAP), 2 * MARGIN + 2 * LINE + height * len(rows)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(11), ImageFont.load_default(14)
    draw.text((MARGIN, MARGIN), _readable(heading), _INK, large)
    for number, row in enumerate(rows):
        top = MARGIN + 2 * LINE + number * height
        draw.line((MARGIN, top, sheet.width - MARGIN, top), "#cccccc")
        draw.text((MARGIN, top + 6), _readable(row.title), _INK, large)
        for place, tile in enumerate(row.tiles):
            left, upper = MARGIN + place * (TILE + GAP), top + 2 * LINE
            image = tile.image.copy()
            image.thumbnail((TILE, TILE))
            sheet.paste(image, (left + (TILE - image.width) // 2, upper + (TILE - image.height) // 2))
            if tile.chosen:
                draw.rectangle((left - 3, upper - 3, left + TILE + 2, upper + TILE + 2), outline=_CHOSEN, width=3)
            for line, text in enumerate(tile.words):
                colour = _FAINT if line else _CHOSEN if tile.chosen else _INK
                draw.text((left, upper + TILE + 3 + line * LINE), _fitting(draw, _readable(text), small), colour, small)
    output = io.BytesIO()
    sheet.save(output, "PNG")
    return output.getvalue()


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text with its middle left out where it is wider than a tile."""
    keep = len(text)
    shown = text
    while draw.textlength(shown, font) > TILE and keep > 2:
        keep -= 1
        shown = f"{text[:(keep + 1) // 2]}...{text[len(text) - keep // 2:]}"
    return shown


def _readable(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\n", " ")
