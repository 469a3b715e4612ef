"""Extractors: what is heard of a file, the numbers that come of it, and that a run's metadata give them again."""

import itertools
import json
import os
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from shard_tools.core.errors import BadFileError
from shard_tools.dataset.layout import AUDIO_SUFFIXES
from shard_tools.extractors import EXTRACTORS, Extractor, acousticbrainz, audio, essentia, from_metadata, load
from shard_tools.extractors import essentia as musicextractor
from tests.support import music
from tests.support.paths import SHARED

real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not beside this checkout")


def document_of(names: tuple[str, ...], seed: int = 0) -> dict:
    """A raw file that has just these features, of all sizes, with strings among them."""
    random, document = np.random.default_rng(seed), {"tonal": {"chords_key": "A", "key_edma": {"scale": "minor"}}}
    for name in names:
        path, _, part = name.partition(":")
        *parents, last = path.split(".")
        place = document
        for parent in parents:
            place = place.setdefault(parent, {})
        shape = () if not part else (3, 3) if last in ("cov", "icov") else (5,)
        place[last] = (random.normal(size=shape) * 10 ** random.uniform(-24, 13)).tolist()
    return document


def walk(value) -> list[float]:
    """The rule in plain words, keys in alphabetical order."""
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in walk(value[key])]
    if isinstance(value, list):
        return [np.mean(value), np.std(value)]
    return [] if isinstance(value, str) else [value]


def wav(path: Path, samples: np.ndarray, rate: int = 44100) -> Path:
    """Samples ``[N]`` or ``[N, channels]`` as 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1 if samples.ndim == 1 else samples.shape[1], 2, rate, 0, "NONE", ""))
        file.writeframes((samples * 32768).round().clip(-32768, 32767).astype("<i2").tobytes())
    return path


def noise(seconds: float, rate: int = 44100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))


def heard(path: Path, start: float = 0.0, seconds: float | None = None, rate: int = 44100) -> np.ndarray:
    return np.concatenate(list(audio.pieces(path, start, seconds, rate)))


def reason_of(function, *given) -> str:
    with pytest.raises(BadFileError) as caught:
        function(*given)
    return caught.value.reason


@pytest.mark.parametrize(("name", "size", "sha256"), [
    ("acousticbrainz", 580, "0589e4e534a3"), ("acousticbrainz-559", 559, "8e0c37fbc077"),
    ("essentia", 582, "3a1edba63954"),
])
def test_a_list_of_names_changes_only_with_its_version(name, size, sha256):
    schema = load(name).schema
    assert (schema.features, schema.version, len(schema.names), schema.sha256[:12]) == (name, 1, size, sha256)
    assert from_metadata(schema.metadata()) is load(name)


@pytest.mark.parametrize(("name", "names"), [
    ("acousticbrainz", acousticbrainz.NAMES), ("acousticbrainz-559", acousticbrainz.NAMES_559),
    ("essentia", essentia.NAMES),
])
def test_raw_json_gives_what_a_walk_gives_whatever_the_order_of_its_keys(name, names):
    document = document_of(names)
    expected = np.array(walk({key: document[key] for key in ("lowlevel", "rhythm", "tonal")}), np.float32)
    assert expected.shape == (len(names),)
    for keys in (list(document), list(reversed(document))):
        vector = load(name).of_json(json.dumps({key: document[key] for key in keys}).encode())
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, expected, rtol=1e-6)


def test_a_file_of_another_extractor_says_so():
    document = document_of(acousticbrainz.NAMES) | {"metadata": {"version": {"extractor": "music 1.0"}}}
    with pytest.raises(BadFileError, match=r"42 of 500 .*'music 1.0', AcousticBrainz's.*today's Essentia's is"):
        load("essentia").of_json(json.dumps(document).encode())


@real
def test_real_files_give_what_a_walk_gives():
    for path in (SHARED / "acousticbrainz").glob("*.json"):
        document = json.loads(path.read_bytes())
        expected = walk({key: document[key] for key in ("lowlevel", "rhythm", "tonal")})
        np.testing.assert_allclose(load("acousticbrainz").of_json(path.read_bytes()), expected, rtol=1e-6)


@real
def test_a_real_clip_sounds_as_its_descriptors_say():
    pytest.importorskip("essentia")
    rows = (SHARED / "clips/clips.csv").read_text().splitlines()
    clip = next(row.split(",")[0] for row in rows if "Rockerronni" in row)
    vector = dict(zip(essentia.NAMES, load("essentia").of_audio(SHARED / "clips" / clip, 0.0, None), strict=True))
    assert vector["rhythm.bpm"] == pytest.approx(172.27, abs=0.5)
    assert vector["lowlevel.mfcc.mean:mean"] == pytest.approx(-27.44, abs=1)


@pytest.mark.parametrize("kind", AUDIO_SUFFIXES)
def test_every_kind_of_file_is_heard_at_its_length(tmp_path, kind):
    pytest.importorskip("av")
    path = tmp_path / f"song{kind}"
    path.write_bytes(music.encoded(kind, 3.6))
    assert audio.duration(path) == pytest.approx(3.6, abs=0.1)
    samples, expected = heard(path, rate=music.RATE), music.sound(3.6)
    assert samples.dtype == np.float32 and len(samples) == pytest.approx(3.6 * music.RATE, rel=0.03)
    one, other = (np.abs(np.fft.rfft(sound, 4 * music.RATE)) for sound in (samples, expected))
    assert np.corrcoef(one, other)[0, 1] > 0.9


def test_a_part_of_a_file_is_just_that_part_and_channels_are_averaged(tmp_path):
    pytest.importorskip("av")
    samples = np.stack([noise(9), noise(9, seed=1)], 1)
    path = wav(tmp_path / "a.wav", samples)
    whole = heard(path)
    np.testing.assert_allclose(whole, samples.mean(1), atol=2e-5)
    np.testing.assert_array_equal(heard(path, 2.5, 4.0), whole[int(2.5 * 44100):int(6.5 * 44100)])
    np.testing.assert_array_equal(heard(path, 8.0, 4.0), whole[8 * 44100:])
    assert not list(audio.pieces(path, 9.5, 4.0, 44100))


def test_the_length_of_a_file_whose_header_lacks_it_is_found_by_decoding(tmp_path):
    av = pytest.importorskip("av")

    class Pipe:
        def __init__(self):
            self.data = b""

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with av.open(pipe, "w", format="flac") as out:
        stream = out.add_stream("flac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray((noise(4)[None] * 32767).astype(np.int16), "s16", "mono")
        frame.sample_rate = 44100
        for part in (frame, None):  # the header goes out before the end is known
            out.mux(stream.encode(part))
    (tmp_path / "a.flac").write_bytes(pipe.data)
    with av.open(str(tmp_path / "a.flac")) as container:
        assert container.duration is None
    assert audio.duration(tmp_path / "a.flac") == pytest.approx(4)


def test_what_cannot_be_heard_says_why(tmp_path):
    av = pytest.importorskip("av")
    files = {"empty.mp3": b"", "text.ogg": b"not music at all\n" * 100, 
             "noise.mp3": np.random.default_rng(0).bytes(9999),
             "list.mp3": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.wav")
    for name in [*files, "pipe.wav", "absent.flac"]:
        assert reason_of(audio.duration, tmp_path / name) == "unreadable", name
    with av.open(str(tmp_path / "film.m4a"), "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            out.mux(packet)
    assert reason_of(audio.duration, tmp_path / "film.m4a") == "no audio"
    assert reason_of(audio.duration, wav(tmp_path / "short.wav", noise(2.9))) == "too short"
    assert audio.duration(wav(tmp_path / "long.wav", noise(3))) == 3


@pytest.mark.parametrize(("length", "excerpt", "excerpts", "expected"), [
    (100, 30, 1, [35]), (100, 30, 3, [10 / 6, 35, 100 - 30 - 10 / 6]), (100, 30, 9, [10 / 6, 35, 100 - 30 - 10 / 6]),
    (60, 30, 2, [0, 30]), (59, 30, 2, [14.5]),
])
def test_excerpts_are_spread_evenly_and_do_not_overlap(length, excerpt, excerpts, expected):
    found = audio.excerpt_spans(length, excerpt, excerpts)
    np.testing.assert_allclose([start for start, _ in found], expected, atol=1e-9)
    assert all(seconds == excerpt for _, seconds in found)
    assert all(one + excerpt <= two + 1e-9 for (one, _), (two, _) in itertools.pairwise(found))
    assert audio.excerpt_spans(20.0, 30.0, 5) == [(0.0, 20.0)]


def test_the_number_of_an_excerpt_goes_where_pack_looks_for_it():
    track, album = "e52a5405-eec0-4f2a-9f3c-0f800e1164e3", "478ff859-34eb-457e-b9d2-dc74b5a372e9"
    assert audio.numbered(f"{track}-0__{album}", 3) == f"{track}-3__{album}"
    assert audio.numbered(f"TRGGZMN12903CB9D8C__{track}-0__{album}", 1) == f"TRGGZMN12903CB9D8C__{track}-1__{album}"
    assert audio.numbered("07 - Song-2", 0) == "07 - Song-2-0"


def test_essentia_says_of_a_song_what_its_kept_json_says_and_says_it_again(tmp_path, capfd):
    pytest.importorskip("essentia")
    extractor, path = load("essentia"), tmp_path / "song.flac"
    path.write_bytes(music.encoded(".flac", 4.0))
    vector = extractor.of_audio(path, 0.0, None)
    assert vector.shape == (582,) and vector.dtype == np.float32
    raw = extractor.json_of_audio(path, 0.0, None)
    np.testing.assert_array_equal(extractor.of_json(raw), vector)
    assert extractor.json_of_audio(path, 0.0, None) == raw
    assert json.loads(raw)["metadata"]["version"]["extractor"] == "music 2.0"
    (tmp_path / "song.wav").write_bytes(music.encoded(".wav", 4.0))
    np.testing.assert_array_equal(extractor.of_audio(tmp_path / "song.wav", 0.0, None), vector)
    assert capfd.readouterr() == ("", "")


def test_essentia_hears_a_part_as_if_it_were_a_file(tmp_path):
    pytest.importorskip("essentia")
    samples = np.concatenate([noise(3), 0.2 * noise(3, seed=1), noise(2, seed=2)])
    one = load("essentia").of_audio(wav(tmp_path / "whole.wav", samples), 3.0, 3.0)
    other = load("essentia").of_audio(wav(tmp_path / "part.wav", samples[3 * 44100:6 * 44100]), 0.0, None)
    np.testing.assert_array_equal(one, other)


def test_essentia_refuses_what_is_silent_too_short_or_too_long(tmp_path, monkeypatch):
    pytest.importorskip("essentia")
    hear = load("essentia").of_audio
    assert reason_of(hear, wav(tmp_path / "a.wav", np.zeros(44100 * 4)), 0.0, None) == "silent audio"
    assert reason_of(hear, wav(tmp_path / "b.wav", noise(2)), 0.0, None) == "too short"
    assert reason_of(hear, wav(tmp_path / "c.wav", noise(5)), 3.0, 30.0) == "too short"
    monkeypatch.setattr(musicextractor, "LONGEST", 4)
    assert reason_of(hear, tmp_path / "c.wav", 0.0, None) == "too long"


def test_names_that_are_wrong_and_extras_that_are_missing_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no extractor 'esentia', did you mean 'essentia'"):
        load("esentia")
    with pytest.raises(ValueError, match="choose from: acousticbrainz"):
        load("xyz")
    monkeypatch.setitem(sys.modules, "essentia", None)
    with pytest.raises(ValueError, match=r"needs essentia.*pip install -e '\.\[audio\]'"):
        load("essentia").of_audio(tmp_path / "a.wav", 0.0, None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers.*pip install -e '\.\[clap\]"):
        load("clap", model="any")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"needs av.*pip install -e '\.\[audio\]'"):
        audio.duration(tmp_path / "a.wav")


def test_facts_of_vectors_that_would_come_out_otherwise_now_are_refused():
    metadata = load("essentia").schema.metadata()
    with pytest.raises(ValueError, match="'msd', which no extractor here makes"):
        from_metadata(metadata | {"features": "msd"})
    with pytest.raises(ValueError, match=r"essentia 2 .* here it would be essentia 1 "):
        from_metadata(metadata | {"version": 2, "sha256": "0" * 64})
    assert all(isinstance(load(name), Extractor) for name in EXTRACTORS if name not in ("clap", "pca"))
