"""What the markers of a JPEG say: its bytes in; the size of a plain one that is whole out, without decoding it.

Plain: one baseline frame of 8 bits and three components, and nothing that could turn or recolour it. Its tables are
checked as strictly as libjpeg checks them, and no marker but its end may follow its scan. That finds what decoding
would find: libjpeg takes any other bits for a picture, and Pillow is silent about its warnings. All other files are
``None`` here, to be decoded.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache

_SCAN = b"\xff\xda\x00\x0c\x03"  # the head of a scan of three components
_ENDS = re.compile(rb"\xff[^\x00]")
_ENDS_RESTARTING = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_SAMPLINGS = frozenset({0x11, 0x12, 0x21, 0x22, 0x41})
_PASSED_OVER = (0xE0, 0xE2, 0xEE, 0xFE)  # JFIF, a colour profile, Adobe, a comment


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a plain JPEG that is whole; None = it is not, or only decoding can tell."""
    start = data.find(_SCAN) + 14
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
        elif marker not in _PASSED_OVER or not _is_harmless(marker, body):
            return None
        at = end
    return None


def _is_harmless(marker: int, body: bytes) -> bool:
    return (marker == 0xFE or (marker == 0xE0 and len(body) >= 14 and body.startswith(b"JFIF\0"))
            or (marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14)
            or (marker == 0xEE and len(body) >= 12 and body.startswith(b"Adobe")))


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
        if body[at] & 0xEC or len(symbols) != sum(counts) or not 0 < len(symbols) <= 256:
            return []
        if body[at] < 16 and max(symbols) > 15:  # the size of a DC difference in bits
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
