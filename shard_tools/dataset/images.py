"""Decodes covers that anybody may have made, safely: by Pillow with limits on pixels and formats, or BadFileError."""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from shard_tools.core.errors import BadFileError

_SCAN_HEAD = b"\xff\xda\x00\x0c\x03"  # the head of a scan of three components
_ENDS = re.compile(rb"\xff[^\x00]")
_ENDS_RESTARTING = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_SAMPLINGS = frozenset({0x11, 0x12, 0x21, 0x22, 0x41})


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a plain JPEG that is whole; None = it is not, or only decoding can tell."""
    start = data.find(_SCAN_HEAD) + 14
    header = _read_header(data[:start]) if start > 13 else None
    if header is None:
        return None
    width, height, restarts = header
    end = (_ENDS_RESTARTING if restarts else _ENDS).search(data, start)
    return (width, height) if end and data[end.start() + 1] == 0xD9 else None


@lru_cache(maxsize=512)  # the covers of one encoder have one header
def _read_header(header: bytes) -> tuple[int, int, bool] | None:
    """(width, height, has restart markers) by all that comes before the scan; None = not plain, or not right."""
    if not header.startswith(b"\xff\xd8\xff"):
        return None
    at, quantisers, huffman, frame, restarts = 2, set(), set(), b"", False
    while at + 4 <= len(header) and header[at] == 0xFF:
        marker, end = header[at + 1], at + 2 + struct.unpack_from(">H", header, at + 2)[0]
        body = header[at + 4:end]
        if end > len(header) or end < at + 4:
            return None
        if marker == 0xDB and len(body) % 65 == 0 and all(number < 4 for number in body[::65]):
            quantisers.update(body[::65])
        elif marker == 0xC4 and (tables := _huffman_tables(body)):
            huffman.update(tables)
        elif marker == 0xC0 and not frame and len(body) == 15:
            frame = body
        elif marker == 0xDD and len(body) == 2:
            restarts = body != b"\0\0"
        elif marker == 0xDA:
            fits = end == len(header) and frame and _fit(frame, body, quantisers, huffman)
            return (*struct.unpack_from(">HH", frame, 1)[::-1], restarts) if fits else None
        elif not (marker == 0xFE or (marker == 0xE0 and len(body) >= 14 and body.startswith(b"JFIF\0"))  # a comment
                  or (marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14)
                  or (marker == 0xEE and len(body) >= 12 and body.startswith(b"Adobe"))):
            return None
        at = end
    return None


def _huffman_tables(body: bytes) -> list[int]:
    """The class and number of each table in a segment; none where one is not a prefix code."""
    found, at = [], 0
    while at + 17 <= len(body):
        counts = body[at + 1:at + 17]
        symbols = body[at + 17:at + 17 + sum(counts)]
        code = 0
        for length, count in enumerate(counts, 1):
            code += count
            if count and code > 1 << length:
                return []
            code <<= 1
        if (body[at] & 0xEC or len(symbols) != sum(counts) or not 0 < len(symbols) <= 256
                or (body[at] < 16 and max(symbols) > 15)):  # the size of a DC difference in bits
            return []
        found.append(body[at])
        at += 17 + len(symbols)
    return found if at == len(body) else []


def _fit(frame: bytes, scan: bytes, quantisers: set[int], huffman: set[int]) -> bool:
    """Whether a scan is the only one of a frame, and every table that they name is there."""
    bits, height, width, count = struct.unpack_from(">BHHB", frame)
    return (bits == 8 and count == 3 and height > 0 and width > 0 and scan[0] == 3 and scan[7:] == b"\0\x3f\0"
            and len(set(frame[6::3])) == 3 and scan[1:7:2] == frame[6::3]
            and frame[7] in _SAMPLINGS and frame[10] == frame[13] == 0x11 and quantisers.issuperset(frame[8::3])
            and all(table >> 4 in huffman and (table & 15) | 16 in huffman for table in scan[2:7:2]))


COVER_BYTES = 64 * 2**20  # most bytes of a cover's file, and of a vector's, that are read at all
MAX_PIXELS = 36_000_000  # 6,000 x 6,000: 0.15 GB while it is decoded, 0.3 GB if it has transparent parts
QUALITY = 95
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_ORIENTATION, _SCAN = 0x0112, 0xDA
# What makes a picture of each EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


class CoverInfo(NamedTuple):
    """A decoded cover's size in pixels, upright, and whether it is a baseline RGB JPEG, whose bytes can stay."""

    width: int
    height: int
    plain: bool


def probe_cover(data: bytes, max_pixels: int = MAX_PIXELS) -> CoverInfo:
    """Checks that a cover can be decoded and returns its size: by the markers of a plain JPEG, else by decoding it.

    BadFileError: not an image, truncated, damaged, or of too many pixels.
    """
    size = plain_size(data)
    if size and size[0] * size[1] <= max_pixels:
        return CoverInfo(*size, True)
    image, orientation, plain = load(data, max_pixels)
    return CoverInfo(*(image.size[::-1] if orientation in _SIDEWAYS else image.size), plain)


def read_cover(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A cover as uint8 ``[H, W, 3]`` (RGB, upright, transparent parts over white); BadFileError as ``probe_cover``."""
    image, orientation, _ = load(data, max_pixels)
    return np.array(upright(to_rgb(image), orientation))


def fit_cover(data: bytes, resolution: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """A cover as a baseline RGB JPEG of ``resolution`` squared: the same bytes when it is one already, otherwise
    cropped to its centre, resized (Lanczos) and encoded with quality 95 and full colour resolution."""
    image, orientation, plain = load(data, max_pixels, resolution)
    if plain and image.size == (resolution, resolution):
        return data
    if image.mode not in ("RGB", "RGBA", "L", "LA", "CMYK") or "transparency" in image.info:  # can't be resized
        image = image.convert("RGBA") if image.has_transparency_data else to_rgb(image)
    image = to_square(image, resolution)
    output = io.BytesIO()
    upright(to_rgb(image), orientation).save(output, "JPEG", quality=QUALITY, subsampling=0)
    return output.getvalue()


def to_square(image: Image.Image, side: int) -> Image.Image:
    """An image cropped to its centre and resized (Lanczos) to ``side`` squared; itself if it has that size."""
    if image.size == (side, side):
        return image
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + short, top + short))


def upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: 16 bits scaled to 8, transparent parts over white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        deep = np.nan_to_num(np.asarray(image).astype(np.float32))
        return Image.fromarray((deep / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def load(data: bytes, max_pixels: int, near: int | None = None) -> tuple[Image.Image, int, bool]:
    """The first frame of an image, its EXIF orientation, and whether its bytes can stay as they are.

    With ``near``, a JPEG much larger than that is decoded at a half, quarter or eighth of its size (its format allows
    it), which saves the memory of the full one.
    """
    width, height = claimed_size(data)
    if width * height > max_pixels:
        raise BadFileError("too many pixels", f"{width} x {height}, the limit is {max_pixels:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes and odd metadata: the limit here is ours
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise BadFileError("too many pixels", f"{image.width} x {image.height}, the limit is {max_pixels:,}")
            if near and image.format == "JPEG":
                image.draft(None, (2 * near, 2 * near))
            image.load()
            if _is_cut(data):
                raise BadFileError("truncated image", "no end-of-image marker: decoders make up its last rows")
            orientation = image.getexif().get(_ORIENTATION, 1)
            plain = image.format == "JPEG" and image.mode == "RGB" and orientation not in _UPRIGHT
            if plain:  # one baseline frame of 8 bits and 3 components
                frames = [(marker, body) for marker, body, _ in _jpeg_segments(data) if _is_frame(marker)]
                plain = len(frames) == 1 and frames[0][0] == 0xC0 and (frames[0][1][0], frames[0][1][5]) == (8, 3)
            to_rgb(image.crop((0, 0, 1, 1)))  # what can't be converted fails here, where that is caught
            return image, orientation, plain
    except BadFileError:
        raise
    except Image.DecompressionBombError as error:
        raise BadFileError("too many pixels", str(error)) from None
    except Exception as error:  # the boundary to Pillow, which raises nearly anything on damaged files
        if _is_cut(data) or "truncated" in str(error):
            raise BadFileError("truncated image", "it ends before its end marker") from None
        if isinstance(error, UnidentifiedImageError):
            raise BadFileError("not an image", f"not {', '.join(FORMATS)}; it starts with {data[:8]!r}") from None
        raise BadFileError("damaged image", str(error) or type(error).__name__) from None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yields (marker, body, end) of the segments of a JPEG up to its first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in (0x01, *range(0xD0, 0xD9)):  # markers without a body
            at += 2
        else:
            end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
            yield marker, data[at + 4:end], end
            if marker == _SCAN:
                return
            at = end


def _is_frame(marker: int) -> bool:
    return 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)


def _is_cut(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end marker (other formats tell their length, which decoding checks)."""
    if data.startswith(_PNG):
        return b"IEND" not in data
    if not data.startswith(_JPEG):
        return False
    scan = next((end for marker, _, end in _jpeg_segments(data) if marker == _SCAN), None)
    return scan is None or data.find(b"\xff\xd9", scan) < 0


def claimed_size(data: bytes) -> tuple[int, int]:
    """(width, height) by the header of a JPEG or PNG, however damaged the rest is; (0, 0) = unknown."""
    if data.startswith(_PNG) and len(data) >= 24:
        return struct.unpack_from(">II", data, 16)
    if data.startswith(_JPEG):
        for marker, body, _ in _jpeg_segments(data):
            if _is_frame(marker) and len(body) >= 5:
                return struct.unpack_from(">HH", body, 1)[::-1]
    return 0, 0
