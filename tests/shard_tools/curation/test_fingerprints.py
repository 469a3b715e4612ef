"""Prints of pictures, pairs of close hashes, and the closer look that tells copies from similarity."""

from __future__ import annotations

import io
import time

import imagehash
import numpy as np
import pytest
from PIL import Image

from shard_tools.curation import clusters, fingerprints, similarity
from shard_tools.curation.fingerprints import (
    FINGERPRINT_DTYPE,
    FingerprintTask,
    dhash,
    fingerprint,
    fingerprint_files,
    fingerprint_task,
)
from shard_tools.curation.similarity import close_pairs, hamming
from shard_tools.dataset.source import Entry
from tests.proofs import planted
from tests.support import raw_data


def bit_count(hashes: np.ndarray) -> np.ndarray:
    return np.unpackbits(hashes.view(np.uint8).reshape(*hashes.shape, 8), axis=-1).sum(-1)


def crowded(count: int, seed: int) -> np.ndarray:
    """Hashes of which many are equal or close."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, max(1, count // 3), dtype=np.uint64)[rng.integers(0, max(1, count // 3), count)]
    for _ in range(6):
        flips = np.left_shift(np.uint64(1), rng.integers(0, 64, count).astype(np.uint64))
        hashes ^= np.where(rng.random(count) < 0.5, flips, np.uint64(0))
    return hashes


@pytest.mark.parametrize("count", [0, 1, 2, 30, 400])
@pytest.mark.parametrize("distance", [0, 1, 4, 9, 20])
def test_close_pairs_are_those_of_comparing_all_with_all(count: int, distance: int) -> None:
    hashes = crowded(count, count + distance)
    expected = np.argwhere(np.triu(bit_count(hashes[:, None] ^ hashes[None]) <= distance, 1))
    found = close_pairs(hashes, distance)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected.reshape(-1, 2))
    assert (hamming(hashes[found[:, 0]], hashes[found[:, 1]]) <= distance).all()


def test_close_pairs_of_100_000_hashes_take_seconds() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[50_000:50_100] = hashes[:100] ^ np.uint64(0b1011)
    start = time.process_time()
    found = close_pairs(hashes, 4)
    assert time.process_time() - start < 5
    assert {(i, 50_000 + i) for i in range(100)} <= set(map(tuple, found.tolist()))


def test_dhash_is_that_of_imagehash() -> None:
    for number in range(8):
        image = planted.cover(0, number)
        assert f"{dhash(image):016x}" == str(imagehash.dhash(image, 8))


@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_decoding_a_part_of_a_large_jpeg_hardly_changes_its_fingerprint(number: int) -> None:
    image = planted.cover(0, number).resize((900, 900), Image.Resampling.BICUBIC)
    bits, pixels, small = fingerprint(planted.jpeg(image, 95))
    whole = io.BytesIO()
    image.save(whole, "PNG")
    same_bits, same_pixels, same_small = fingerprint(whole.getvalue())
    assert bin(bits ^ same_bits).count("1") <= 4
    assert pixels == same_pixels == 810_000
    assert np.abs(small.astype(int) - same_small).mean() < 4


def test_a_fingerprint_is_of_the_upright_picture() -> None:
    image = raw_data.picture(3, (200, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = raw_data.encoded(image.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95)
    bits, pixels, small = fingerprint(turned)
    upright = fingerprint(raw_data.encoded(image, quality=95))
    assert bin(bits ^ upright[0]).count("1") <= 2 and pixels == 20_000
    assert np.abs(small.astype(int) - upright[2]).mean() < 3


def test_bad_files_are_named_and_do_not_stop_the_others_and_are_decoded_once(tmp_path, monkeypatch) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    cache.mkdir()
    files = {"a.jpg": raw_data.jpeg(1), "b.jpg": raw_data.jpeg(2)[:300], "c.jpg": raw_data.jpeg(1), "d.jpg": b"",
             "e.png": raw_data.header_of_huge_png()}
    for name, data in files.items():
        (source / name).write_bytes(data)
    entries = tuple(Entry(name, -1, 0) for name in files)
    task = FingerprintTask(source, entries, 10**6, cache)
    rows, errors = fingerprint_task(task)
    assert rows.dtype == FINGERPRINT_DTYPE and rows["decoded"].tolist() == [True, False, True, False, False]
    assert rows["readable"].tolist() == [True, True, True, False, True] and rows[0] == rows[2]
    reasons = {1: "truncated image", 3: "empty file", 4: "too many pixels"}
    assert {i: error.reason for i, error in errors.items()} == reasons
    again, errors = fingerprint_task(task)
    assert np.array_equal(again, rows) and {i: error.reason for i, error in errors.items()} == reasons
    (cache / "old.npy").write_bytes(b"of files that have changed since")
    covers, errors = fingerprint_files(source, entries, 1, 10**6, cache)
    assert covers.index[0] == covers.index[2] and covers.index[3] == -1 and list(errors) == [1, 3, 4]
    assert len(covers.fingerprints) == 3 and list(cache.iterdir()) == [task.cache_path]
    monkeypatch.setattr(fingerprints, "fingerprint", lambda *_: pytest.fail("decoded a second time"))
    with pytest.raises(pytest.fail.Exception):
        fingerprint_task(task._replace(covers=entries[:1]))  # another task: not in the cache
    task.cache_path.write_bytes(task.cache_path.read_bytes()[:100])  # cut short
    with pytest.raises(pytest.fail.Exception):
        fingerprint_task(task)


def fingerprints_of(pictures: list[Image.Image]) -> np.ndarray:
    return planted.fingerprints_of([planted.jpeg(picture, 92) for picture in pictures])


def all_pairs(count: int) -> np.ndarray:
    return np.argwhere(np.triu(np.ones((count, count), bool), 1))


SIMPLE = {
    "flat colours": lambda rng: Image.new("RGB", (128, 128), planted.colour(rng)),
    "greys": lambda rng: Image.new("RGB", (128, 128), (int(rng.integers(0, 32)) * 8,) * 3),
    "gradients": lambda rng: planted.gradient(rng, 128),
    "text on black": lambda rng: planted.text(rng, 128),
    "demo covers of 32 pixels": lambda rng: planted.demo(rng, 32),
    "demo covers of 64 pixels": lambda rng: planted.demo(rng, 64),
    "smooth noise": lambda rng: Image.fromarray(planted.smooth(rng, 128, 4).astype(np.uint8)),
}


@pytest.mark.parametrize("kind", SIMPLE)
def test_simple_pictures_that_differ_are_not_taken_for_one(kind: str) -> None:
    rng = planted.rng_of(11, kind)
    made = {SIMPLE[kind](rng).tobytes(): None for _ in range(60)}  # greys repeat
    side = 32 if "32" in kind else 64 if "64" in kind else 128
    rows = fingerprints_of([Image.frombytes("RGB", (side, side), data) for data in made])
    assert (similarity.differences(rows["thumbnail"], all_pairs(len(rows))) >= similarity.SAME_LIMIT).all()


@pytest.mark.parametrize("kind", list(SIMPLE)[2:])
def test_simple_pictures_are_found_again_when_they_were_altered(kind: str) -> None:
    rng, found = planted.rng_of(12, kind), []
    for number in range(12):
        picture = SIMPLE[kind](rng)
        for name in planted.PLANTS:
            altered = planted.plant(name, picture, planted.rng_of(number, name))
            rows = planted.fingerprints_of([planted.jpeg(picture), altered])
            found.append(similarity.differences(rows["thumbnail"], np.array([[0, 1]]))[0] < similarity.SAME_LIMIT)
    assert np.mean(found) > 0.93


def test_dhash_alone_would_join_them() -> None:
    rng = planted.rng_of(13)
    pictures = [planted.gradient(rng, 128) for _ in range(200)]
    same, collisions = similarity.duplicates_by_hash(fingerprints_of(pictures), 4)
    assert len(collisions) > 100 and len(same) <= 1


def test_near_pairs_are_found_where_dhash_fails() -> None:
    pictures = [planted.cover(14, number) for number in range(80)]
    altered = [planted.PLANTS["trim"](picture, planted.rng_of(14, i)) for i, picture in enumerate(pictures)]
    rows = fingerprints_of(pictures + altered)
    near, far = similarity.duplicates_by_tiny_image(rows)
    by_hash = similarity.duplicates_by_hash(rows, 4)[0]
    found, known = ({i for i, j in pairs.tolist() if j == i + 80} for pairs in (near, by_hash))
    assert len(found - known) > 15 and len(found | known) > 74
    assert far.shape == (len(near),) and (near[:, 0] < near[:, 1]).all()


def test_a_chain_of_pictures_is_cut() -> None:
    """Each link is as near as copies are, the ends have nothing in common."""
    one, other = (planted.smooth(planted.rng_of(15, seed), 32, 4) for seed in (1, 2))
    steps = np.linspace(0, 1, 40)[:, None, None, None]
    small = (one * (1 - steps) + other * steps).astype(np.uint8)
    pairs = all_pairs(40)
    pairs = pairs[similarity.differences(small, pairs) < similarity.SAME_LIMIT]
    links = set(map(tuple, pairs.tolist()))
    assert all((i, i + 1) in links for i in range(39)) and (0, 39) not in links
    labels = clusters.connected_without_chains(small, pairs)
    assert len(set(labels.tolist())) > 2
    for label in set(labels.tolist()):
        members = np.flatnonzero(labels == label)
        assert np.ptp(members) == len(members) - 1  # neighbours, still
        assert similarity.differences(small, members[[[0, -1]]], 9)[0] < 4 * similarity.SAME_LIMIT
    copies = np.repeat(small[:1], 30, 0)
    assert len(set(clusters.connected_without_chains(copies, all_pairs(30)).tolist())) == 1
