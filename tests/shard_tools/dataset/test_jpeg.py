"""What the markers of a JPEG tell: as much as decoding it would, and never a size that decoding would deny."""

from __future__ import annotations

import io
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from shard_tools.core.errors import BadFileError
from shard_tools.dataset.images import load, plain_size
from shard_tools.dataset.vectors import is_finite
from shard_tools.shards.tar import member_header
from tests.support import raw_data


def photo(seed: int, **options) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    return raw_data.encoded(Image.fromarray(noise), quality=75 + seed % 20, **options)


def decodes(data: bytes) -> bool:
    try:
        load(data, 10**6)
    except BadFileError:
        return False
    return True


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"subsampling": 0}, {"subsampling": 1},
                                     {"comment": b"by hand"}, {"restart_marker_blocks": 2}, {"dpi": (72, 72)}])
def test_plain_jpegs_are_sized_without_decoding(options):
    assert plain_size(photo(1, **options)) == (48, 48)


def test_what_only_decoding_can_tell_is_left_to_it():
    turned = Image.Exif()
    turned[0x0112] = 6
    for data in (photo(1, progressive=True), photo(1, exif=turned), raw_data.encoded(raw_data.picture(1, mode="L")),
                 raw_data.encoded(raw_data.picture(1, mode="CMYK")), raw_data.encoded(raw_data.picture(1), "PNG"), b"",
                 b"\xff\xd8\xff"):
        assert plain_size(data) is None


def test_no_damage_that_decoding_finds_is_missed_and_nothing_sound_is_refused():
    drawn, found = random.Random(0), {"cut": 0, "bits": 0, "noise": 0, "hole": 0}
    for seed in range(150):
        sound = photo(seed)
        assert plain_size(sound) == (48, 48)
        for name in found:
            data, at = bytearray(sound), drawn.randrange(2, len(sound) - 300)
            if name == "cut":
                del data[at:]
            elif name == "bits":  # anywhere, headers and tables too
                for _ in range(3):
                    data[drawn.randrange(2, 620)] ^= 1 << drawn.randrange(8)
            elif name == "noise":
                data[at:at + 256] = drawn.randbytes(256)
            else:
                del data[at:at + 256]
            size = plain_size(bytes(data))
            found[name] += size is None
            assert size is None or (decodes(bytes(data)) and size == load(bytes(data), 10**9)[0].size), (seed, name)
    assert found["cut"] == 150 and found["noise"] > 60 and found["bits"] > 20


@pytest.mark.parametrize(("name", "size"), [("a.jpg", 0), ("b" * 96 + ".npy", 8**11 - 1), ("x~0.jpg", 12_345)])
def test_headers_of_members_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert member_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)
    assert tarfile.open(fileobj=io.BytesIO(member_header("a", 0) + bytes(1024))).getnames() == ["a"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(value):
    for at in (0, 1, 7, 500, 1158, 1159):
        vector = np.full(1160, 3e38, np.float32)
        assert is_finite(vector)
        vector[at] = value
        assert not is_finite(vector)
