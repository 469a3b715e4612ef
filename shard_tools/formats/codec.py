"""Safe decoding of covers and vectors: bytes that anybody may have made in, checked pixels and numbers out.

Nothing here runs code from the data: images go through Pillow with limits on pixels and formats, ``.npy`` through a
parser of its header that refuses objects and claims that don't fit the file. Errors are ``BadFileError``.
"""

from __future__ import annotations

import ast
import io
import math
import struct
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from shard_tools.formats.jpeg import plain_size
from shard_tools.formats.source import BadFileError

COVER_BYTES = 64 * 2**20  # most bytes of a cover's file, and of a vector's, that are read at all
VECTOR_BYTES = 16 * 2**20
MAX_PIXELS = 36_000_000  # 6,000 x 6,000: 0.15 GB while it is decoded, 0.3 GB if it has transparent parts
QUALITY = 95
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_ORIENTATION, _SCAN = 0x0112, 0xDA
# What makes a picture of each EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


class CoverFacts(NamedTuple):
    """A decoded cover's size in pixels, upright, and whether it is a baseline RGB JPEG, whose bytes can stay."""

    width: int
    height: int
    plain: bool


def probe_cover(data: bytes, max_pixels: int = MAX_PIXELS) -> CoverFacts:
    """Tells a cover's size, and that it can be decoded: by its markers where those of a JPEG tell, else by decoding.

    Raises:
        BadFileError: not an image, truncated, damaged, or of too many pixels.
    """
    size = plain_size(data)
    if size and size[0] * size[1] <= max_pixels:
        return CoverFacts(*size, True)
    image, turn, plain = load(data, max_pixels)
    return CoverFacts(*(image.size[::-1] if turn in _SIDEWAYS else image.size), plain)


def read_cover(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A cover as uint8 ``[H, W, 3]`` (RGB, upright, transparent parts over white).

    Raises:
        BadFileError: as ``probe_cover``.
    """
    image, turn, _ = load(data, max_pixels)
    return np.array(upright(to_rgb(image), turn))


def fit_cover(data: bytes, resolution: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """A cover as a baseline RGB JPEG of ``resolution`` squared: the same bytes when it is one already, otherwise
    cropped to its centre, resized (Lanczos) and encoded with quality 95 and full colour resolution.

    Raises:
        BadFileError: as ``probe_cover``.
    """
    image, turn, plain = load(data, max_pixels, resolution)
    size = (resolution, resolution)
    if plain and image.size == size:
        return data
    if image.mode not in ("RGB", "RGBA", "L", "LA", "CMYK") or "transparency" in image.info:  # can't be resized
        image = image.convert("RGBA") if image.has_transparency_data else to_rgb(image)
    image = to_square(image, resolution)
    output = io.BytesIO()
    upright(to_rgb(image), turn).save(output, "JPEG", quality=QUALITY, subsampling=0)
    return output.getvalue()


def to_square(image: Image.Image, side: int) -> Image.Image:
    """An image cropped to its centre and resized (Lanczos) to ``side`` squared; itself if it has that size."""
    if image.size == (side, side):
        return image
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize((side, side), Image.Resampling.LANCZOS, (left, top, left + short, top + short))


def upright(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(_TURNS[turn]) if turn in _TURNS else image


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
            turn = image.getexif().get(_ORIENTATION, 1)
            plain = image.format == "JPEG" and image.mode == "RGB" and turn not in _TURNS and _is_baseline(data)
            to_rgb(image.crop((0, 0, 1, 1)))  # what can't be converted fails here, where that is caught
            return image, turn, plain
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


def _is_baseline(data: bytes) -> bool:
    """Whether a JPEG has one baseline frame of 8 bits and 3 components."""
    frames = [(marker, body) for marker, body, _ in _jpeg_segments(data) if _is_frame(marker)]
    return len(frames) == 1 and frames[0][0] == 0xC0 and (frames[0][1][0], frames[0][1][5]) == (8, 3)


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


def read_vector(data: bytes) -> np.ndarray:
    """The vector of a ``.npy`` file as float32 ``[D]`` (``[1, D]`` and ``[D, 1]`` are vectors too).

    Raises:
        BadFileError: not a .npy file, objects inside, not real numbers, not one axis, cut short, not finite in float32.
    """
    dtype, shape, start = _npy_header(data)
    if dtype.hasobject:
        raise BadFileError("pickled vector", "the .npy holds Python objects, which are never loaded")
    if dtype.kind not in "fiu" or dtype.shape:
        raise BadFileError("wrong vector type", f"{dtype}; expected real numbers")
    long = [size for size in shape if size != 1]
    if not shape or len(shape) > 2 or len(long) > 1 or 0 in long:
        raise BadFileError("wrong vector shape", f"{list(shape)}; expected [D], [1, D] or [D, 1]")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        reason = "truncated vector" if len(data) - start < expected else "damaged vector"
        raise BadFileError(reason, f"{len(data) - start:,} bytes of numbers; its header says {expected:,}")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused below
        vector = np.frombuffer(data, dtype, offset=start).astype("<f4")
    if not np.isfinite(vector).all():
        column = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise BadFileError("not finite", f"{vector[column]} in column {column}, as float32")
    return vector


def _npy_header(data: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """(dtype, shape, where the numbers start) without reading any number."""
    if data[:6] != b"\x93NUMPY":
        if data[:1] == b"\x80":
            raise BadFileError("pickled vector", "a bare pickle, which is never loaded")
        raise BadFileError("not a .npy file", f"it starts with {data[:8]!r}")
    try:
        size, start = (struct.unpack_from("<H", data, 8)[0], 10) if data[6] == 1 else (
            struct.unpack_from("<I", data, 8)[0], 12)
        if size > 10_000:  # numpy's own bound: literal_eval of more can exhaust the stack
            raise ValueError(f"a header of {size:,} bytes")
        if start + size > len(data):
            raise BadFileError("truncated vector", "cut inside its header")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in odd headers
            header: dict[str, Any] = ast.literal_eval(data[start:start + size].decode("utf-8"))
        shape = header["shape"]
        if not (isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)):
            raise ValueError(f"shape {shape!r}")
        return np.lib.format.descr_to_dtype(header["descr"]), shape, start + size
    except BadFileError:
        raise
    except Exception as error:  # the boundary to a header that may hold any literal
        raise BadFileError("damaged vector", f"its header can't be read ({type(error).__name__})") from None


def vector_start(data: bytes) -> tuple[int, int]:
    """(where the numbers start, how many there are) by the header of a ``.npy`` of float32, little endian; else (0, 0).
    """
    return _float_header(data[:10 + data[8]]) if len(data) > 10 and data[6] == 1 and data[9] == 0 else (0, 0)


@lru_cache(maxsize=64)  # the vectors of one data set have one header
def _float_header(header: bytes) -> tuple[int, int]:
    try:
        dtype, shape, start = _npy_header(header)
    except BadFileError:
        return 0, 0
    plain = dtype.str == "<f4" and 1 <= len(shape) <= 2 and math.prod(shape) == max(shape) > 0
    return (start, max(shape)) if plain else (0, 0)


@np.errstate(invalid="ignore")
def is_finite(vector: np.ndarray) -> bool:
    """Whether all of float32 ``[D]`` is finite: infinity and nan times 0 are nan, and BLAS multiplies fastest."""
    return np.dot(vector, _zeros(len(vector))) == 0


@lru_cache(maxsize=8)
def _zeros(dimension: int) -> np.ndarray:
    return np.zeros(dimension, np.float32)


@lru_cache(maxsize=8)
def vector_header(dimension: int) -> bytes:
    """The header of every vector that we write: .npy version 1.0, ``<f4``, ``(D,)``, padded to 64 bytes."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({dimension},), }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def write_vector(vector: np.ndarray) -> bytes:
    """A float32 vector ``[D]`` as the bytes of a ``.npy`` file, the same with every numpy version."""
    assert vector.ndim == 1
    return vector_header(len(vector)) + vector.astype("<f4").tobytes()


def parse_vector(data: bytes | bytearray, dimension: int, start: int = 0) -> np.ndarray:
    """A vector that ``write_vector`` wrote, from byte ``start`` of data to its end, float32 ``[D]``: without a copy.

    Raises:
        BadFileError: any other bytes.
    """
    header = vector_header(dimension)
    if len(data) - start != len(header) + 4 * dimension or not data.startswith(header, start):
        raise BadFileError("damaged vector", f"not the canonical .npy of {dimension} float32 numbers")
    return np.frombuffer(data, "<f4", offset=start + len(header))
