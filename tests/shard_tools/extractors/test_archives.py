"""Dump archives: what is in them comes out as a stream, and what they try does not work."""

import gzip
import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from shard_tools.core.errors import BadFileError
from shard_tools.extractors.inputs import ARCHIVES, is_archive, read_archive, safe_name


def tar_of(files: list[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=form) as tar:
        for name, data in files:
            header = tarfile.TarInfo(name) if isinstance(name, str) else name
            if header.isreg():
                header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return output.getvalue()


def packed(data: bytes, kind: str) -> bytes:
    if kind in (".tar.gz", ".tgz"):
        return gzip.compress(data)
    if kind == ".tar.bz2":
        import bz2
        return bz2.compress(data)
    return pytest.importorskip("zstandard").compress(data) if kind == ".tar.zst" else data


def read(path: Path, limit: int = 10_000) -> dict[str, bytes | str]:
    return {name: data if isinstance(data, bytes) else data.reason
            for name, data, _ in read_archive(path, ".json", limit)}


FILES = {f"dump/lowlevel/{i:02x}/{i}.json": json.dumps({"i": i}).encode() * (i + 1) for i in range(40)}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_archive_gives_its_files_in_order(tmp_path, kind, form):
    long = {"d" * 90 + "/" + "n" * 60 + ".json": b"long"}
    path = tmp_path / f"Dump{kind}"
    path.write_bytes(packed(tar_of([*FILES.items(), *long.items()], form), kind))
    assert is_archive(path)
    assert list(read(path).items()) == [*FILES.items(), *long.items()]
    positions = [position for _, _, position in read_archive(path, ".json", 10_000)]
    assert positions == sorted(positions) and positions[-1] <= path.stat().st_size


def test_several_frames_after_each_other_are_one_archive(tmp_path):
    data = tar_of(list(FILES.items()))
    for kind in (".tar.gz", ".tar.bz2", ".tar.zst"):
        path = tmp_path / f"a{kind}"
        path.write_bytes(packed(data[:5000], kind) + packed(data[5000:], kind))
        assert read(path) == FILES


def test_only_regular_files_of_the_suffix_and_a_fair_size_come_out(tmp_path):
    odd = []
    for name, kind in (("link.json", tarfile.SYMTYPE), ("hard.json", tarfile.LNKTYPE), ("pipe.json", tarfile.FIFOTYPE),
                       ("device.json", tarfile.CHRTYPE), ("folder.json", tarfile.DIRTYPE)):
        header = tarfile.TarInfo(name)
        header.type, header.linkname = kind, "/etc/passwd"
        odd.append((header, b""))
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([*odd, ("._a.json", b"x"), ("notes.txt", b"x"), ("A.JSON", b"{}"), ("big.json", b" " * 101),
                             ("empty.json", b""), ("last.json", b"{}")]))
    assert read(path, 100) == {"A.JSON": b"{}", "big.json": "too many bytes", "empty.json": "empty file",
                               "last.json": b"{}"}


@pytest.mark.parametrize(("name", "expected"), [
    ("a/b.json", "a/b.json"), ("./a//b.json", "a/b.json"), ("a/./b.json", "a/b.json"), ("a/..b.json", "a/..b.json"),
    ("a\\..\\b.json", "a\\..\\b.json"), ("/etc/b.json", None), ("../b.json", None), ("a/../../b.json", None),
    ("a/..", None), ("a\0b.json", None),
])
def test_names_never_lead_out_of_the_folder(name, expected):
    if expected:
        assert safe_name(name) == expected
        return
    with pytest.raises(BadFileError, match="unsafe name"):
        safe_name(name)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_cut_anywhere_is_noticed_after_what_came_before_it(tmp_path, kind):
    data = packed(tar_of(list(FILES.items())), kind)
    path = tmp_path / f"a{kind}"
    boundary = [15 * 1024] if kind == ".tar" else []  # a tar that ends between two files looks finished to many
    for length in [*boundary, len(data) // 3, len(data) // 2]:
        path.write_bytes(data[:length])
        found = {}
        with pytest.raises(BadFileError, match=r"damaged archive.*beyond byte"):
            for name, content, _ in read_archive(path, ".json", 10_000):
                found[name] = content
        assert found.items() <= FILES.items() and (kind != ".tar" or found)


def test_damage_and_lies_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    whole = tar_of(list(FILES.items()), tarfile.USTAR_FORMAT)
    giant = tarfile.TarInfo("giant.bin")
    giant.size = 2**50
    long_name = tarfile.TarInfo("x")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2**30
    pax = tarfile.TarInfo("x")
    pax.type, pax.size = tarfile.XHDTYPE, 2**30
    sparse = tar_of([("a.json", b"{}")])
    header = tarfile.TarInfo("b.json")
    header.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "b.json"}
    for data in (b"", b"no tar at all" * 100, whole[:1024] + b"x" * 512 + whole[1536:], giant.tobuf(),
                 long_name.tobuf() + bytes(4096), pax.tobuf() + bytes(4096),
                 sparse[:1024] + tar_of([(header, b"9\n")])):
        path.write_bytes(data)
        with pytest.raises(BadFileError, match="damaged archive"):
            read(path)


def test_memory_does_not_grow_with_the_archive(tmp_path):
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        body = json.dumps({"x": " " * 200_000}).encode()
        blocks = -(-len(body) // 512) * 512
        for i in range(1000):
            header = tarfile.TarInfo(f"{i:04}.json" if i % 2 else f"{i:04}.bin")
            header.size = len(body)
            out.write(header.tobuf() + body.ljust(blocks, b"\0"))
        out.write(bytes(1024))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_archive(path, ".json", 2**20)) == 500
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()
