"""Archives, pictures, tables and sound made to harm whoever reads them: sound bytes in; hostile bytes out.

As in ``hostile``; ``MAKERS`` has all of both by suffix.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.proofs import hostile
from tests.proofs.hostile import UPWARDS, Maker, pickled


def tar(rng: Random, data: bytes, marker: Path) -> bytes:
    """A tar with one more member, at any place, that leads out, links, or says something that is not so."""
    with tarfile.open(fileobj=io.BytesIO(data)) as old:
        members = [(member, old.extractfile(member).read()) for member in old.getmembers() if member.isreg()]
    info = tarfile.TarInfo(rng.choice(UPWARDS[:5]) + rng.choice(["", ".json", ".jpg", ".npy"]))
    content = members[0][1]
    info.size, how = len(content), rng.randrange(10)
    if how < 4:
        info.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
        info.linkname, info.size, content = rng.choice(["/etc/passwd", "../../../escaped", members[0][0].name]), 0, b""
        info.devmajor, info.devminor = 1, 5
    elif how == 4:
        info.name = members[rng.randrange(len(members))][0].name  # twice
    elif how == 5:
        info.type = tarfile.GNUTYPE_SPARSE
    extra = info.tobuf(tarfile.GNU_FORMAT, errors="replace")
    if how == 6:  # a PAX header that says another size
        said = {"size": rng.choice(["-1", "9" * 30, str(2**62), "1e3"])}
        extra = info._create_pax_generic_header(said, rng.choice([tarfile.XHDTYPE, tarfile.XGLTYPE]), "utf-8") + extra
    elif how == 7:  # a header for headers of any size
        big = tarfile.TarInfo("././@LongLink")
        big.type, big.size = rng.choice([tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE]), 2**33 - 1
        extra = big.tobuf(tarfile.GNU_FORMAT) + extra
    elif how == 8:  # a size in base 256: negative, or of many terabytes
        field = rng.choice([b"\xff" * 12, b"\x80" + b"\x7f" * 11])
        extra = extra[:124] + field + extra[136:]
        total = sum(extra[:148]) + sum(extra[156:512]) + 8 * 32
        extra = extra[:148] + b"%06o\0 " % total + extra[156:]
    at, output = rng.randrange(len(members) + 1), io.BytesIO()
    for number, (member, body) in enumerate([*members, (None, b"")]):
        if number == at:
            output.write(extra + content + bytes(-len(content) % 512))
        if member:
            output.write(member.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512))
    return output.getvalue() + bytes(1024)


def tar_bomb(rng: Random, compress: Callable[[bytes], bytes]) -> bytes:
    """A small archive of 1.5 GB of zeros, said to be one JSON file, or a header."""
    info = tarfile.TarInfo("dump/rock/bomb.json")
    info.size = 96 * 2**24
    info.type = rng.choice([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
    return compress(info.tobuf(tarfile.GNU_FORMAT)) + compress(bytes(2**24)) * 96


def zipped(rng: Random, data: bytes, marker: Path) -> bytes:
    """A zip whose directory, or a member, says what is not so, or leads out."""
    output, how = io.BytesIO(data), rng.randrange(12)
    if how < 7:
        name = rng.choice([*UPWARDS[:5], "audio-cover_dataset/cover/train/rock/../../../../escaped.jpg",
                           "audio-cover_dataset/cover/train/rock/extra.jpg",
                           "audio-cover_dataset/cover/train/rock/x.npy"])
        with zipfile.ZipFile(output, "a", zipfile.ZIP_DEFLATED) as archive:
            info = zipfile.ZipInfo(name.replace("\0", ""))
            info.external_attr = rng.choice([0o644, 0o120777, 0o020666]) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            size = rng.choice([0, 100, 2**20, 2**26, 2**26 + 1, 2**28])
            archive.writestr(info, bytes(size) if size else b"/etc/passwd")
        return output.getvalue()
    data = bytearray(data)
    entries = [at for at in range(len(data) - 46) if data[at:at + 4] == b"PK\1\2"]
    end = data.rfind(b"PK\5\6")
    at = rng.choice(entries)
    if how == 7:  # sizes and places of a member
        field = rng.choice([20, 24, 42])
        struct.pack_into("<L", data, at + field, rng.choice([0, 1, 2**31, 2**32 - 2, struct.unpack_from(
            "<L", data, rng.choice(entries) + field)[0]]))
    elif how == 8:
        struct.pack_into("<H", data, at + rng.choice([8, 10, 28, 30, 32]), rng.choice([0, 1, 9, 99, 65535]))
    elif how == 9:
        struct.pack_into(rng.choice(["<H", "<L"]), data, end + rng.choice([8, 10, 12, 16]),
                         rng.choice([0, 1, 65535]))
    else:  # 64 bits
        wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *(
            rng.choice([len(entries), 2**63, 2**64 - 1, 10**9]) for _ in range(2)), rng.choice([1, 2**64 - 1]),
            rng.choice([entries[0], 2**63, 2**64 - 1, 0]))
        where = rng.choice([end, 2**63, 2**64 - 1, 0])
        data[end:end] = wide + struct.pack("<4sLQL", b"PK\6\7", 0, where, 1)
    return bytes(data)


def picture(rng: Random, data: bytes, marker: Path) -> bytes:
    def png(*chunks: tuple[bytes, bytes]) -> bytes:
        return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(
            ">I", zlib.crc32(kind + body)) for kind, body in chunks)

    def header(width: int) -> tuple[bytes, bytes]:
        return b"IHDR", struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0)

    side, end = rng.choice([5000, 50_000, 2**31 - 1]), (b"IEND", b"")
    rows, pixels = zlib.compress(bytes(2**24)) * 4, (b"IDAT", zlib.compress(bytes(97 * 32)))
    frame = data.find(b"\xff\xc0")
    gif = b"GIF89a\x20\x00\x20\x00\x80\x00\x00" + bytes(6)
    return rng.choice([
        lambda: png(header(side), (b"IDAT", rows), end), lambda: png(header(side)),
        lambda: png(header(32), (b"iCCP", b"x\0\0" + rows), pixels, end),
        lambda: png(header(32), (b"zTXt", b"x\0\0" + rows), pixels, end),
        lambda: data[:frame + 5] + b"\xff\xff\xff\xff" + data[frame + 9:],
        lambda: gif + b"!\xf9\x04\0\0\0\0\0,\0\0\0\0\x20\0\x20\0\0\x02\x02\x44\x01\0" * 50_000 + b";",
        lambda: b"GIF89a" + b"\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x44\x01\0;",
        lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 2**31, 0, 0, 54, 40, 60_000, -60_000, 1, 24, 0, 0, 1, 1, 0, 0),
        lambda: b"RIFF" + struct.pack("<I", 2**31) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + b"\xff" * 6,
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n(" + str(marker).encode() + b") (w) file\n",
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        lambda: data[:2] + b"\xff\xe1\xff\xffExif\0\0II*\0\xff\xff\xff\xff" + data[2:],
        lambda: pickled(rng, data, marker),
    ])()


def table(rng: Random, data: bytes, marker: Path) -> bytes:
    lines = data.splitlines() or [b""]
    at = rng.randrange(len(lines))
    cells = lines[at].split(b",")
    cell = rng.choice([b"", b'"', b"\0", b"x" * 200_000, b"../../../escaped", b"/etc/passwd", b"\xff\xfe",
                       b"=cmd|'x'!A1",
                       b"file:///etc/passwd", b"1e999", b"-1", b"a\rb", b"|touch x"])
    cells[rng.randrange(len(cells))] = cell
    changed = [*lines[:at], b",".join(cells), *lines[at + 1:]]
    return rng.choice([
        lambda: b"\n".join(changed), lambda: b"\n".join(changed), lambda: b"\n".join(changed), lambda: data + data,
        lambda: lines[0], lambda: b"", lambda: b"\n".join(line + b",more" for line in lines), lambda: data[::-1],
        lambda: data.decode("utf-8", "replace").encode("utf-16"),
        lambda: data.replace(b"\n", b"\r"), lambda: b"\n" * 9999,
        lambda: b"\n".join(lines[1:]), lambda: data.replace(b",", b";"), lambda: data + b'"'])()


def sound(rng: Random, data: bytes, marker: Path) -> bytes:
    at = rng.randrange(min(64, len(data) - 8))
    return rng.choice([
        lambda: data[:at] + b"\xff\xff\xff\xff" + data[at + 4:], lambda: data[:at] + bytes(4) + data[at + 4:],
        lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        lambda: b"[playlist]\nFile1=http://127.0.0.1:9/x\n", lambda: b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + data,
        lambda: (b"RIFF\xff\xff\xff\xffWAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 60_000, 2**31, 2**31, 65535, 32)
                 + b"data\xff\xff\xff\xff" + bytes(4000)),
        lambda: gzip.compress(data), lambda: data[len(data) // 2:],
        lambda: b"fLaC\x84\xff\xff\xff" + data[4:], lambda: bytes(3_000_000)])()


MAKERS: dict[str, tuple[Maker, ...]] = {
    ".json": (hostile.json_leaf, hostile.json_leaf, hostile.json_text), ".jsonl": (hostile.jsonl_line,),
    ".yaml": (hostile.yaml_leaf, hostile.yaml_leaf, hostile.yaml_text), ".npy": (hostile.npy,),
    ".npz": (hostile.npz,), ".safetensors": (hostile.safetensors,), ".pt": (hostile.torch_file,),
    ".pth": (hostile.torch_file,),
    ".tar": (tar,), ".zip": (zipped,), ".jpg": (picture,), ".csv": (table,),
    ".mp3": (sound,), ".flac": (sound,), ".wav": (sound,), ".ogg": (sound,),
}
