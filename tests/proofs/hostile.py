"""Files made to harm whoever reads them: sound bytes, chance and a marker in; hostile bytes of the same kind out.

Each function takes (rng, data, marker): ``marker`` is the path of a file that comes into being if anything in the
bytes is run.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml

from shard_tools.shards.index import _digest, metadata_bytes

Maker = Callable[[Random, bytes, Path], bytes]
VALUES: tuple[Any, ...] = (None, "", "x", "../../x", [], {}, -1, 0, 2**31, 2**63, -2**63 - 1, 1e308, 10**30, True, [[]],
                           "y" * 100_000, {"a": {"b": 1}}, 0.5, float("nan"), float("inf"), "\0", "\ud800", [None] * 3)
UPWARDS = ("../../escaped", "/tmp/covergen-escaped", "a/../../../escaped", "..", "./../escaped.jpg", "a\0b",
           "..\\..\\escaped", "\x1b[2Jcleared", "x" * 300)


class Bomb:
    """Unpickling it leaves the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.marker,)


def pickled(rng: Random, data: bytes, marker: Path) -> bytes:
    """A bare pickle, of any protocol, that would run something."""
    return pickle.dumps({"state": Bomb(marker), "step": 1}, protocol=rng.randrange(6))


# -- trees of values: JSON, YAML, what torch saves ---


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a tree."""
    found: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            found += [(part, key) for key in part]
            stack += part.values()
        elif isinstance(part, list):
            found += [(part, number) for number in range(len(part))][:50]
            stack += part[:50]
    return found


def leaf_changed(rng: Random, tree: Any) -> Any:
    """A tree one place of which has another value, or is gone, or has company."""
    where = places(tree)
    if not where:
        return rng.choice(VALUES)
    top = [place for place in where if place[0] is tree]
    part, key = rng.choice(rng.choice([where, top or where]))
    how = rng.randrange(6)
    if how == 0:
        del part[key]
    elif how == 1 and isinstance(part, dict):
        part[rng.choice(["extra", "", "../x", "\0"])] = part[key]
    elif how == 2 and isinstance(part[key], (int, float)):
        part[key] = type(part[key])(-part[key] if part[key] else 7)
    else:
        part[key] = rng.choice(VALUES)
    return tree


def json_leaf(rng: Random, data: bytes, marker: Path) -> bytes:
    tree = leaf_changed(rng, json.loads(data))
    if isinstance(tree, dict) and "self_sha256" in tree and rng.random() < 0.7:  # an honest checksum of a lie
        tree["self_sha256"] = _digest(tree)
        return metadata_bytes(tree)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def json_text(rng: Random, data: bytes, marker: Path) -> bytes:
    text = data.decode("utf-8", "replace")
    return rng.choice([
        lambda: b"[" * 200_000, lambda: b'{"a":' * 100_000, lambda: b"1" * 100_000, lambda: b"null", lambda: b"[]",
        lambda: b"{}", lambda: b'"' + b"x" * 10**6 + b'"', lambda: b"NaN", lambda: text.encode("utf-16"),
        lambda: b"\xff\xfe" + data, lambda: text.replace(":", ": " + "9" * 5000 + ", \"q\":", 1).encode(),
        lambda: data.rstrip()[:-1] + b', "samples": 1}', lambda: data + data, lambda: data.replace(b"0", b"1e999", 1),
    ])()


def jsonl_line(rng: Random, data: bytes, marker: Path) -> bytes:
    lines = data.splitlines() or [b"{}"]
    at = rng.randrange(len(lines))
    try:
        lines[at] = (rng.choice([json_leaf, json_text]))(rng, lines[at], marker)
    except ValueError:
        lines[at] = b"}"
    return b"\n".join(lines) + b"\n" * rng.randrange(2)


def yaml_leaf(rng: Random, data: bytes, marker: Path) -> bytes:
    try:
        return yaml.safe_dump(leaf_changed(rng, yaml.safe_load(data)), allow_unicode=True).encode("utf-8", "replace")
    except (yaml.YAMLError, ValueError):
        return b"a: [1"


def yaml_text(rng: Random, data: bytes, marker: Path) -> bytes:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    run = [f"!!python/object/apply:os.mkdir [{marker}]", f"!!python/object/new:os.mkdir [{marker}]",
           "!!python/name:os.mkdir ''", f"!!python/object/apply:subprocess.check_call [[mkdir, {marker}]]"]
    key = data.split(b":", 1)[0]
    return rng.choice([
        lambda: laughs.encode() + data, lambda: data + laughs.encode() + b"name: *a11\n",
        lambda: key + b": " + rng.choice(run).encode() + b"\n" + data, lambda: rng.choice(run).encode(),
        lambda: b"[" * 20_000, lambda: data + b"\n\0", lambda: data.decode("utf-8", "replace").encode("utf-16"),
        lambda: b"\x80\x81" + data, lambda: data.replace(b": ", b":\t", 3), lambda: b"- a\n- b\n", lambda: b"",
        lambda: data + b"unknown_option: 1\n", lambda: b"<<: *nothing\n" + data, lambda: data + data,
        lambda: data + b"steps: " + b"9" * 5000 + b"\n", lambda: data + b"lr: .nan\n",
        lambda: b"? [a, b]\n: 1\n" + data,
        lambda: data + b"name: ../../escaped\n", lambda: data + b"out: 2001-01-01\n", lambda: b"&a [*a]",
        lambda: b"x: " + b"{a: " * 5000])()


# -- numbers ---


def npy(rng: Random, data: bytes, marker: Path) -> bytes:
    def header(text: str) -> bytes:
        body = text.encode() + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body

    said = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}".format
    return rng.choice([
        lambda: header(said("'|O'", "(40,)")) + pickle.dumps(Bomb(marker)), lambda: pickled(rng, data, marker),
        lambda: header(said("'<f4'", "(9999999999,)")) + bytes(160),
        lambda: header(said("'<f4'", "(-40,)")) + bytes(160), lambda: header(said("'<f4'", "(" + "9" * 50 + ",)")),
        lambda: header(said("'<f4'", "(2, 20)")) + bytes(160), lambda: header(said("'<U9999999'", "(40,)")),
        lambda: header(said("[('a', '<f4', (1000000,))]", "(40,)")) + bytes(160),
        lambda: header("(" * 5000), lambda: header(f"__import__('os').mkdir('{marker}')"),
        lambda: b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + data[10:],
        lambda: data[:8] + b"\xff\xff" + data[10:],
        lambda: data[:128] + np.full(40, rng.choice([np.nan, np.inf, 3e38]), "<f4").tobytes(),
        lambda: header(said("'<M8[s]'", "(40,)")) + bytes(320), lambda: header(said("'|V4'", "(40,)")) + bytes(160),
        lambda: header("{" + "'a':" * 3000), lambda: header(said("'<f4'", "(True,)")) + bytes(4)])()


@cache
def _inflating() -> bytes:
    """1.6 GB of zeros as an array, deflated."""
    output = io.BytesIO()
    with (zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
          new.open("drawn.npy", "w", force_zip64=True) as file):
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (100 * 2**22,)})
        for _ in range(100):
            file.write(bytes(2**24))
    return output.getvalue()


def npz(rng: Random, data: bytes, marker: Path) -> bytes:
    if rng.random() < 0.1:
        return _inflating()
    output = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            part = old.read(name)
            if name == chosen and rng.random() < 0.2:
                name = rng.choice(UPWARDS[:5])
            elif name == chosen:
                part = npy(rng, part, marker)
            new.writestr(name, part)
    return output.getvalue()


def safetensors(rng: Random, data: bytes, marker: Path) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.choice(names), rng.choice(names)

    def whole(text: bytes | None = None, length: int | None = None) -> bytes:
        text = json.dumps(header).encode() if text is None else text
        return struct.pack("<Q", len(text) if length is None else length) + text + body

    def claim(**metadata: Any) -> bytes:
        header[one] |= metadata
        return whole()

    def renamed() -> bytes:
        header[rng.choice(["../../x", "", "extra"])] = header.pop(one)
        return whole()

    begin, end = header[one]["data_offsets"]
    return rng.choice([
        lambda: whole(length=2**63), lambda: whole(length=2**27), lambda: whole(length=2**64 - 1), lambda: whole(b""),
        lambda: claim(data_offsets=header[other]["data_offsets"]), lambda: claim(data_offsets=[begin, 2**60]),
        lambda: claim(data_offsets=[end, begin]), lambda: claim(data_offsets=[-1, end]),
        lambda: claim(shape=[2**31, 2**31, 2**31]), lambda: claim(shape=[-1]), lambda: claim(shape=[]),
        lambda: claim(dtype=rng.choice(["F64", "I8", "BOOL", "F8_E4M3", "OBJECT", "U64", "BF16"])),
        renamed, lambda: whole(b"[" * 100_000), lambda: whole(json.dumps(leaf_changed(rng, header)).encode()),
        lambda: pickled(rng, data, marker), lambda: data[:8 + size] + b"\xff" * len(body),
        lambda: data[:8 + size + begin] + b"\xff" * (end - begin) + data[8 + size + end:]])()


def torch_file(rng: Random, data: bytes, marker: Path) -> bytes:
    """A file of torch.save with another value in it, or that would run something."""
    output, how = io.BytesIO(), rng.randrange(5)
    if how == 0:
        return pickled(rng, data, marker)
    tree = torch.load(io.BytesIO(data), weights_only=True)
    if how == 1:
        where, key = rng.choice(places(tree))
        where[key] = Bomb(marker)
    elif how == 2:  # a tensor of many numbers that the file does not hold
        where, key = rng.choice(places(tree))
        where[key] = torch.zeros(1).expand(2**20, 2**12)
    else:
        tree = leaf_changed(rng, tree)
    torch.save(tree, output, _use_new_zipfile_serialization=rng.random() < 0.7)
    return output.getvalue()
