"""Safe decoding: what is accepted, what is refused and why; nothing is executed or allocated on a file's word."""

import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from shard_tools.core.errors import BadFileError
from shard_tools.dataset import images as codec
from shard_tools.dataset.vectors import parse_vector, read_vector, write_vector
from tests.support import raw_data


def refused(function, data: bytes, **options) -> str:
    with pytest.raises(BadFileError) as caught:
        function(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("data, plain", [
    (raw_data.jpeg(1), True), (raw_data.jpeg(1, progressive=True), False), (raw_data.jpeg(1, subsampling=2), True),
    (raw_data.encoded(raw_data.picture(1, mode="L")), False),
    (raw_data.encoded(raw_data.picture(1, mode="CMYK")), False),
    (raw_data.encoded(raw_data.picture(1), "PNG"), False), (raw_data.jpeg(1, keep_rgb=True), True),
])
def test_only_baseline_rgb_jpeg_stays_as_it_is(data, plain):
    assert codec.probe_cover(data) == (32, 32, plain)
    assert (codec.fit_cover(data, 32) == data) == plain
    fitted = codec.fit_cover(data, 16)
    assert codec.probe_cover(fitted) == (16, 16, True)


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = raw_data.encoded(raw_data.picture(1, (40, 20)), quality=95, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert codec.probe_cover(data) == (*expected.size, orientation in (0, 1, 9))
    np.testing.assert_array_equal(codec.read_cover(data), np.asarray(expected))
    fitted = codec.read_cover(codec.fit_cover(data, 20)).astype(int)
    middle = np.asarray(ImageOps.fit(expected, (20, 20), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(fitted - middle).mean() < 3


def test_transparent_parts_become_white_and_deep_grey_keeps_its_tones():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (codec.read_cover(raw_data.encoded(clear, "PNG")) == 255).all()
    palette = clear.convert("P")
    palette.info["transparency"] = 0
    assert codec.read_cover(raw_data.encoded(palette, "PNG")).shape == (8, 8, 3)
    deep = Image.fromarray(np.full((8, 8), 0x8080, np.uint16))
    assert (codec.read_cover(raw_data.encoded(deep, "PNG")) == 0x80).all()


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = raw_data.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert codec.read_cover(data)[0, 0].tolist() == [255, 0, 0]


def test_crop_is_of_the_centre():
    image = Image.new("RGB", (90, 30), "red")
    image.paste((0, 0, 255), (30, 0, 60, 30))
    pixels = codec.read_cover(codec.fit_cover(raw_data.encoded(image, "PNG"), 30))
    assert (pixels[..., 2] > 240).all() and (pixels[..., 0] < 15).all()


@pytest.mark.parametrize("cut", [4, 30, 200, 400, 700, -40, -2])
def test_every_cut_of_a_jpeg_is_named_truncated(cut):
    assert refused(codec.probe_cover, raw_data.jpeg(1)[:cut]) == "truncated image"


def test_images_of_too_many_pixels_are_refused_before_decoding():
    assert refused(codec.probe_cover, raw_data.header_of_huge_png()) == "too many pixels"
    jpeg = raw_data.jpeg(1)
    at = jpeg.index(b"\xff\xc0")
    huge = jpeg[:at + 5] + struct.pack(">HH", 20_000, 20_000) + jpeg[at + 9:]
    assert refused(codec.probe_cover, huge) == "too many pixels"
    assert refused(codec.probe_cover, huge[:at + 12]) == "too many pixels"
    assert refused(codec.probe_cover, jpeg, max_pixels=1023) == "too many pixels"


def test_random_damage_never_escapes_the_boundary():
    random = np.random.default_rng(0)
    files = [raw_data.encoded(raw_data.picture(1), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP")]
    vector = raw_data.npy(raw_data.vector(1))
    for i in range(1500):
        data = np.frombuffer(files[i % 5], np.uint8).copy()
        data[random.integers(0, min(len(data), 700), 3)] = random.integers(0, 256, 3)
        header = np.frombuffer(vector, np.uint8).copy()
        header[random.integers(0, 128, 3)] = random.integers(0, 256, 3)
        for function, bytes_ in ((codec.fit_cover, data.tobytes()), (read_vector, header.tobytes())):
            try:
                function(bytes_, 16) if function is codec.fit_cover else function(bytes_)
            except BadFileError as error:
                assert pickle.loads(pickle.dumps(error)).reason == error.reason


@pytest.mark.parametrize("values", [
    np.arange(5.0), np.arange(5, dtype=np.int16), np.arange(5, dtype=">f8"), np.arange(5.0)[None],
    np.arange(5.0)[:, None],
    np.asfortranarray(np.arange(5, dtype=np.float16)[None]), np.arange(5, dtype=np.uint64),
])
def test_real_vectors_of_any_type_become_float32(values):
    vector = read_vector(raw_data.npy(values))
    assert vector.dtype == np.float32 and vector.tolist() == [0, 1, 2, 3, 4]


def test_later_npy_versions_are_read():
    data = raw_data.npy(np.arange(3, dtype="<f4"))
    for version in (2, 3):
        later = data[:6] + bytes([version, 0]) + struct.pack("<I", len(data) - 12 - 10) + data[10:-12] + data[-12:]
        assert read_vector(later).tolist() == [0, 1, 2]


@pytest.mark.parametrize("data, reason", [
    (raw_data.npy(np.array([1.0, 1e39])), "not finite"), (raw_data.npy(np.array([np.nan])), "not finite"),
    (raw_data.npy(np.array([1j])), "wrong vector type"), (raw_data.npy(np.array([True])), "wrong vector type"),
    (raw_data.npy(np.zeros(2, [("a", "<f4")])), "wrong vector type"), (raw_data.npy(np.zeros(0)), "wrong vector shape"),
    (raw_data.npy(np.zeros((2, 2))), "wrong vector shape"), (raw_data.npy(np.float32(1)), "wrong vector shape"),
    (raw_data.npy(np.zeros(3)) + b"x", "damaged vector"), (raw_data.npy(np.zeros(3))[:-1], "truncated vector"),
    (raw_data.npy(np.zeros(3))[:40], "truncated vector"), (b"PK\3\4", "not a .npy file"),
    (b"\x93NUMPY", "damaged vector"),
    (raw_data.npy(np.array([{}], object)), "pickled vector"), (pickle.dumps([1.0]), "pickled vector"),
    (raw_data.npy(np.zeros(3)).replace(b"(3,)", b"(3_)"), "damaged vector"),
    (raw_data.npy(np.zeros(30)).replace(b"(30,), } ", b"(9**9,), }"), "damaged vector"),
    (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9999) + b"(" * 9999, "damaged vector"),
    (b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30) + b"{", "damaged vector"),
])
def test_everything_else_is_refused_with_its_reason(data, reason):
    assert refused(read_vector, data) == reason


def test_details_hold_no_addresses_so_that_quarantine_is_the_same_in_every_run():
    assert BadFileError("x", "<_io.BytesIO object at 0x7f5d1c0a3b50>").detail == "<_io.BytesIO object at 0x...>"


def test_a_claim_of_a_terabyte_allocates_nothing():
    data = raw_data.npy(np.zeros(3)).replace(b"(3,), }          ", b"(300000000000,), }")
    assert refused(read_vector, data) == "truncated vector"


def test_our_own_vectors_are_parsed_by_one_comparison():
    vector = raw_data.vector(1)
    data = write_vector(vector)
    np.testing.assert_array_equal(parse_vector(data, 60), vector)
    np.testing.assert_array_equal(read_vector(data), vector)
    for other in (data[:-1], data + b"x", raw_data.npy(vector.astype(">f4")), raw_data.npy(vector[None])):
        with pytest.raises(BadFileError):
            parse_vector(other, 60)
