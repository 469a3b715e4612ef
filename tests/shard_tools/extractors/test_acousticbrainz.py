"""AcousticBrainz files: 580 numbers by name, whatever the order of the keys; all else is refused and says why."""

import json
import pickle

import numpy as np
import pytest

from shard_tools.core.errors import BadFileError
from shard_tools.extractors import acousticbrainz
from shard_tools.extractors.acousticbrainz import NAMES, NAMES_559, SIZE, read
from tests.support.paths import SHARED

REAL = sorted((SHARED / "acousticbrainz").glob("*.json"))
MATRICES = ("gfcc.cov", "gfcc.icov", "mfcc.cov", "mfcc.icov")


def put(document: dict, path: str, value) -> dict:
    """Sets (or with ``...`` removes) what lies at keys joined by dots."""
    *parents, last = path.split(".")
    inside = document
    for key in parents:
        inside = inside.setdefault(key, {})
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    return document


def low_level(seed: int = 0) -> dict:
    """A file of the schema of AcousticBrainz, smaller lists apart: features of all sizes, strings, tags."""
    random = np.random.default_rng(seed)
    document = {"metadata": {"version": {"extractor": "music 1.0"}, "tags": {"title": ["Sōran Bushi", "{"]}}}
    for name in NAMES:
        path, _, part = name.partition(":")
        shape = () if not part else (4, 3) if path.endswith(MATRICES) else (5,)
        put(document, path, (random.normal(size=shape) * 10 ** random.uniform(-24, 13)).tolist())
    document["rhythm"]["beats_count"] = 241
    document["rhythm"]["beats_position"] = np.cumsum(random.uniform(0.3, 0.7, 241)).tolist()
    document["tonal"] |= {"chords_key": "B", "chords_scale": "major", "key_key": "D", "key_scale": "minor"}
    return document


def as_bytes(document: dict, **options) -> bytes:
    return json.dumps(document, sort_keys=True, **options).encode()


def walk(value) -> list[float]:
    """The thesis's rule in plain words, knowing no names: sections and keys as they stand in the file."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in walk(inner)]
    if isinstance(value, list):
        return [np.mean(value), np.std(value)]
    return [] if isinstance(value, str) else [value]


def walk_file(data: bytes) -> np.ndarray:
    document = json.loads(data)
    numbers = [number for section in ("lowlevel", "rhythm", "tonal") for number in walk(document[section])]
    return np.array(numbers, np.float32)


def published(data: bytes) -> list[float]:
    """The thesis's walk of ``lowlevel`` with the published script's break, in the order of the file."""
    numbers = []
    for descriptor, value in json.loads(data)["lowlevel"].items():
        cut = descriptor in ("spectral_centroid", "spectral_rolloff", "spectral_spread")
        for statistic, inner in value.items() if isinstance(value, dict) else [("", value)]:
            if cut and statistic in ("dvar", "dvar2", "var"):
                break
            numbers += walk(inner)
    return numbers


def shuffled(value, random: np.random.Generator):
    if not isinstance(value, dict):
        return value
    return {key: shuffled(value[key], random) for key in random.permutation(list(value)).tolist()}


def refused(data: bytes) -> BadFileError:
    with pytest.raises(BadFileError) as caught:
        read(data)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    caught.value.detail.encode()  # it can be written to a report, whatever the file holds
    return caught.value


def refused_with(path: str, value) -> tuple[str, str]:
    error = refused(as_bytes(put(low_level(), path, value)))
    return error.reason, error.detail


def test_the_list_has_580_names_in_the_order_of_the_files():
    assert len(NAMES) == len(set(NAMES)) == SIZE == 580
    assert (NAMES[0], NAMES[-1]) == ("lowlevel.average_loudness", "tonal.tuning_nontempered_energy_ratio")
    paths = list(dict.fromkeys(name.partition(":")[0] for name in NAMES))
    assert len(paths) == 508 and paths == sorted(paths)
    assert [sum(name.startswith(f"{section}.") for name in NAMES) for section in ("lowlevel", "rhythm", "tonal")] == [
        446, 87, 47]
    assert NAMES.index("lowlevel.spectral_spread.var") == 427
    for mean in (name for name in NAMES if name.endswith(":mean")):
        assert NAMES[NAMES.index(mean) + 1] == mean.replace(":mean", ":std")


@pytest.mark.parametrize("seed", range(3))
def test_a_number_is_itself_and_a_list_its_mean_and_deviation_as_a_walk_of_the_file_gives_them(seed):
    data = as_bytes(low_level(seed))
    vector = read(data)
    assert vector.dtype == np.float32 and vector.shape == (SIZE,) and vector.flags.c_contiguous
    np.testing.assert_array_equal(vector, walk_file(data))
    cov = low_level(seed)["lowlevel"]["mfcc"]["cov"]
    at = NAMES.index("lowlevel.mfcc.cov:mean")
    np.testing.assert_allclose(vector[at:at + 2], [np.mean(cov), np.std(cov)], rtol=1e-6)


def test_key_order_does_not_matter():
    document, random = low_level(), np.random.default_rng(0)
    data = json.dumps(shuffled(document, random)).encode()
    assert (walk_file(data) != walk_file(as_bytes(document))).any()
    np.testing.assert_array_equal(read(data), read(as_bytes(document)))


def test_extra_keys_do_not_matter():
    document = low_level()
    expected = read(as_bytes(document))
    put(document, "lowlevel.melbands128.mean", [float("nan"), "x"])
    put(document, "tonal.key_edma", {"strength": 10**400})
    put(document, "highlevel", [[], None, "\ud800"])
    np.testing.assert_array_equal(read(b"\xef\xbb\xbf" + as_bytes(document, indent=1) + b"\n"), expected)


def test_large_and_small_values_survive():
    for value in (1.7197295468500e13, 17197295468500, -3.4e38, 1.3e-23, 10**38, 0, -1):
        vector = read(as_bytes(put(low_level(), "lowlevel.spectral_spread.var", value)))
        assert vector[427] == np.float32(value)


def test_559_is_what_a_break_at_the_first_variance_of_three_descriptors_leaves():
    left_out = [name for name in NAMES if name not in NAMES_559]
    assert tuple(name for name in NAMES if name not in left_out) == NAMES_559 and len(NAMES_559) == 559
    assert left_out == [f"lowlevel.{descriptor}.{statistic}"
                        for descriptor in ("spectral_centroid", "spectral_rolloff", "spectral_spread")
                        for statistic in ("dvar", "dvar2", "max", "mean", "median", "min", "var")]
    data = as_bytes(low_level())
    vector = read(data, NAMES_559)
    np.testing.assert_array_equal(vector, np.delete(read(data), [NAMES.index(name) for name in left_out]))
    np.testing.assert_array_equal(vector[:446 - 21], np.array(published(data), np.float32))


@pytest.mark.skipif(not REAL, reason="the real AcousticBrainz files are not beside this checkout")
def test_real_files_give_what_a_walk_in_their_own_order_gives():
    for path in REAL:
        data = path.read_bytes()
        np.testing.assert_array_equal(read(data), walk_file(data))
        np.testing.assert_array_equal(read(data, NAMES_559)[:425], np.array(published(data), np.float32))
        largest = NAMES[int(np.abs(read(data)).argmax())]
        assert largest == "lowlevel.spectral_spread.var" and largest not in NAMES_559


@pytest.mark.parametrize("data, reason", [
    (b"", "not JSON"), (b"\x89PNG\r\n", "not JSON"), (b"\xff\xfe{\0}\0", "not JSON"), (b"{lowlevel: 1}", "not JSON"),
    (b'{"a": "\xed\xa0\x80"}', "not JSON"), (b"{} {}", "not JSON"), (b"<html></html>", "not JSON"),
    (b'{"a": 01}', "not JSON"), (b'{"a": "\x00"}', "not JSON"),
    (b"{", "truncated JSON"), (b'{"a": {}', "truncated JSON"), (b'{"a": "S\xc5', "truncated JSON"),
    (b"[1]", "not a JSON object"), (b'"\\ud800"', "not a JSON object"), (b"NaN", "not a JSON object"),
    (b"null", "not a JSON object"), (b"1" * 10_000, "not a JSON object"),
    (b"[" * 200_000, "nested too deeply"), (b'{"a":' * 200_000, "nested too deeply"),
    (b" " * (acousticbrainz.JSON_BYTES + 1), "too many bytes"),
    (b"{}", "missing feature"), (b'{"lowlevel": [], "rhythm": 1, "tonal": null}', "missing feature"),
])
def test_what_is_no_such_file_is_refused_with_its_reason(data, reason):
    assert refused(data).reason == reason


def test_every_cut_of_a_file_is_named_truncated():
    data = as_bytes(low_level(), ensure_ascii=False)
    assert b"\xc5\x8d" in data
    for length in [*range(1, len(data), 997), data.index(b"\xc5\x8d") + 1, len(data) - 1]:
        assert refused(data[:length]).reason == "truncated JSON"


def test_missing_features_are_named_and_counted():
    document = put(low_level(), "rhythm.bpm", ...)
    assert refused(as_bytes(document)).detail == "rhythm.bpm; in all 1 of 508 features are missing"
    put(document, "lowlevel.hfc", ...)
    assert refused(as_bytes(document)).detail == "lowlevel.hfc.dmean; in all 10 of 508 features are missing"


def test_features_that_are_not_asked_for_may_be_missing():
    data = as_bytes(put(low_level(), "lowlevel.spectral_spread.var", ...))
    assert refused(data).reason == "missing feature"
    assert read(data, NAMES_559).shape == (559,)


@pytest.mark.parametrize("extractor, said", [
    ("music 2.0", "'music 2.0', a newer Essentia"), ("\ud800" * 99, r"\ud800"), (2, ""), ({}, ""),
])
def test_files_of_another_extractor_are_told_apart(extractor, said):
    document = put(low_level(), "metadata.version.extractor", extractor)
    assert read(as_bytes(document)).shape == (SIZE,)
    put(document, "rhythm.bpm_histogram_first_peak_bpm", 120.0)  # two of the changes of "music 2.0"
    put(document, "tonal.key_strength", ...)
    error = refused(as_bytes(document))
    assert error.reason == "missing feature" and "10 of 508" in error.detail and said in error.detail
    assert ("AcousticBrainz's is 'music 1.0'" in error.detail) == bool(said)


@pytest.mark.parametrize("value, said", [
    ("1.5", "a string"), ("\ud800", "a string"), (True, "a boolean"), (None, "null"), ([1.5], "a list"),
    ({"mean": 1.5}, "an object"),
])
def test_what_should_be_a_number_and_is_not_is_refused(value, said):
    assert refused_with("lowlevel.hfc.var", value) == (
        "wrong feature type", f"lowlevel.hfc.var is {said}; expected a number")


@pytest.mark.parametrize("value, said", [
    (1.5, "is a number"), ("x", "is a string"), ({"0": 1.5}, "is an object"), ([], "is an empty list"),
    ([[]], "is an empty list"), ([1, "2"], "holds a string"), ([1, False], "holds a boolean"),
    ([1, None], "holds null"), ([1, [2]], "holds a list"), ([[1], [2, 3]], "rows of different lengths"),
    ([[[1]]], "holds a list"), ([[1], [{}]], "holds an object"),
])
def test_what_should_be_a_list_of_numbers_and_is_not_is_refused(value, said):
    for path in ("rhythm.beats_position", "lowlevel.mfcc.icov"):
        reason, detail = refused_with(path, value)
        assert reason == "wrong feature type" and detail.startswith(path) and said in detail


@pytest.mark.parametrize("digits", [
    "NaN", "Infinity", "-Infinity", "1e39", "-1e308", "1e400", "1" * 400, "-" + "9" * 5000,
], ids=lambda digits: digits[:9])
@pytest.mark.parametrize("path, value", [
    ("rhythm.bpm", "%s"), ("tonal.thpcp", "[0, %s, 1]"), ("lowlevel.gfcc.cov", "[[%s, 1], [1, 1]]"),
])
@pytest.mark.filterwarnings("error")
def test_numbers_that_are_not_finite_as_float32_are_refused(path, value, digits):
    data = as_bytes(put(low_level(), path, "HERE")).replace(b'"HERE"', (value % digits).encode())
    error = refused(data)
    assert error.reason == "not finite" and error.detail.startswith(path)


def test_of_a_key_that_is_written_twice_the_last_counts():
    data = as_bytes(low_level())
    twice = data.replace(b'"bpm": ', b'"bpm": "old", "bpm": ')
    assert twice != data
    np.testing.assert_array_equal(read(twice), read(data))


@pytest.mark.filterwarnings("error")
def test_random_damage_never_escapes_the_boundary():
    random, whole = np.random.default_rng(0), np.frombuffer(as_bytes(low_level()), np.uint8)
    letters = np.frombuffer(b'0123456789eE+-.,:"{}[]\\ tfnN\xff\xc5', np.uint8)
    refusals = set()
    for _ in range(400):
        data = whole.copy()
        data[random.integers(0, len(data), 2)] = random.choice(letters, 2)
        try:
            assert np.isfinite(read(data.tobytes())).all()
        except BadFileError as error:
            refusals.add(error.reason)
    assert {"not JSON", "missing feature"} <= refusals
