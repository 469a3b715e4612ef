"""One thing in a folder goes wrong: files and chance in; a damaged file, or several, and what was done to them out."""

from __future__ import annotations

import os
import shutil
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.proofs.hostile_files import MAKERS, tar, tar_bomb
from tests.support.material import KINDS, compressor


class Damage(NamedTuple):
    """What was done, in words, its kind, and the paths that are not as they were."""

    kind: str
    words: str
    paths: tuple[Path, ...]


def flipped(rng: Random, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(rng: Random, data: bytes, other: bytes) -> bytes:
    """Its beginning: to anywhere, to a block of a tar, or to the end of a header."""
    head = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    ends = [rng.randrange(len(data)), rng.randrange(len(data)) // 512 * 512, 8 + head, len(data) - 1, 0, 8, 128, 512,
            max(0, len(data) - 1024), max(0, len(data) - 512)]
    return data[:rng.choice(ends)]


def zeroed(rng: Random, data: bytes, other: bytes) -> bytes:
    begin = rng.choice([0, rng.randrange(len(data)), rng.randrange(len(data)) // 512 * 512])
    end = min(len(data), begin + rng.choice([1, 512, 4096, len(data)]))
    return data[:begin] + bytes(end - begin) + data[end:]


def spliced(rng: Random, data: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return rng.choice([lambda: data[:at] + other[at:], lambda: data + other, lambda: other + data,
                       lambda: data[:at] + rng.randbytes(rng.choice([1, 512, 3000])) + data[at:],
                       lambda: data[:at] + data[at + rng.randrange(1, 600):]])()


BYTES = (flipped, flipped, flipped, cut, cut, zeroed, spliced)


def damage(rng: Random, files: Sequence[Path], marker: Path) -> Damage:
    """Damages one of ``files``, or two of one kind; something is always different afterwards."""
    path = rng.choice(sorted(files))
    alike = [other for other in sorted(files) if other != path and other.suffix == path.suffix
             and other.read_bytes() != path.read_bytes()]
    way = rng.random()
    if way < 0.08:
        return unlike_a_file(rng, path)
    if way < 0.13 and alike:
        other = rng.choice(alike)
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)
        return Damage("swapped", f"{path.name} and {other.name} changed places", (path, other))
    if way < 0.17 and alike:
        other = rng.choice(alike)
        shutil.copyfile(other, path)
        return Damage("replaced", f"{path.name} is a copy of {other.name}", (path,))
    data, makers = path.read_bytes(), MAKERS.get(path.suffix)
    if path.name.endswith(KINDS[1:]):
        return packed(rng, path, data)
    for _ in range(20):
        kind = rng.choice(makers if makers and rng.random() < 0.6 else BYTES)
        try:
            changed = kind(rng, data, marker) if makers and kind in makers else kind(
                rng, data, alike[0].read_bytes() if alike else data[::-1])
        except (ValueError, IndexError, struct.error):  # a file of another inside than its name says: bytes instead
            continue
        if changed != data:
            path.write_bytes(changed)
            return Damage(kind.__name__, f"{path.name}: {kind.__name__}", (path,))
    path.unlink()
    return Damage("missing", f"{path.name} is gone", (path,))


def packed(rng: Random, path: Path, data: bytes) -> Damage:
    """An archive that is compressed: bytes of it, or what is inside, or a bomb."""
    compress, way = compressor(path.name), rng.random()
    if way < 0.15:
        kind, changed = "tar_bomb", tar_bomb(rng, compress)
    elif way < 0.5:
        inside = path.with_name("dump.tar").read_bytes()
        kind, changed = "tar", compress(tar(rng, inside, path))
    else:
        made = rng.choice(BYTES)
        kind, changed = made.__name__, made(rng, data, data[::-1])
    path.write_bytes(changed + (b"" if changed != data else b"x"))
    return Damage(kind, f"{path.name}: {kind}", (path,))


def unlike_a_file(rng: Random, path: Path) -> Damage:
    """The name is there, and nothing to be read under it; or not what should be."""
    way = rng.choice(["gone", "empty", "folder", "fifo", "socket", "password file", "dangling", "loop", "zeros",
                      "sparse"])
    path.unlink()
    if way == "empty":
        path.touch()
    elif way == "folder":
        (path / "inside").mkdir(parents=True)
    elif way == "fifo":
        os.mkfifo(path)
    elif way == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may have 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path.name[:100])
        except OSError:
            path.touch()
        finally:
            os.chdir(here)
    elif way == "sparse":
        with open(path, "wb") as file:
            file.truncate(3 * 2**30)
    elif way != "gone":
        path.symlink_to({"password file": "/etc/passwd", "dangling": "/nowhere/at/all", "loop": path.name,
                         "zeros": "/dev/zero"}[way])
    return Damage(way, f"{path.name}: {way}", (path,))
