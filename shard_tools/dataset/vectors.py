"""Audio vectors as .npy files."""

from __future__ import annotations

import ast
import math
import struct
import warnings
from functools import lru_cache
from typing import Any

import numpy as np

from shard_tools.core.errors import BadFileError

VECTOR_BYTES = 16 * 2**20


def read_vector(data: bytes) -> np.ndarray:
    """The vector of a ``.npy`` file as float32 ``[D]`` (``[1, D]`` and ``[D, 1]`` are vectors too).

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


def canonical(data: bytes) -> tuple[bytes, np.ndarray]:
    """A ``.npy`` file as the bytes that we write, and its numbers; BadFileError as ``read_vector``."""
    start, dimension = _float_header(data[:10 + data[8]]) if len(data) > 10 and data[6] == 1 and not data[9] else (0, 0)
    if start and len(data) == start + 4 * dimension:  # float32 already: the numbers stay where they are
        vector = np.frombuffer(data, "<f4", offset=start)
        if is_finite(vector):
            header = vector_header(dimension)
            return (data if data.startswith(header) else header + data[start:]), vector
    vector = read_vector(data)
    return write_vector(vector), vector


@lru_cache(maxsize=64)  # the vectors of one data set have one header
def _float_header(header: bytes) -> tuple[int, int]:
    """(where the numbers start, how many there are) of a vector of float32, little endian; else (0, 0)."""
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
    """A vector that ``write_vector`` wrote, from byte ``start`` of data to its end, float32 ``[D]``: without a copy;
    BadFileError for any other bytes."""
    header = vector_header(dimension)
    if len(data) - start != len(header) + 4 * dimension or not data.startswith(header, start):
        raise BadFileError("damaged vector", f"not the canonical .npy of {dimension} float32 numbers")
    return np.frombuffer(data, "<f4", offset=start + len(header))
