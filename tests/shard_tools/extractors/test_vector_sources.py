"""Vectors of vectors by the command ``features``: a PCA of a data set, applied later, and sources that are joined."""

from pathlib import Path

import numpy as np
import pytest

from shard_tools import cli
from shard_tools.dataset.schema import read_schema
from shard_tools.extractors import load
from shard_tools.features import features
from shard_tools.pack import pack
from tests.shard_tools.test_features import brainz, put_json, quarantine, vectors
from tests.support import raw_data


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    """Split pairs of 30 causes in 60 columns, with what lies beside a data set."""
    source = raw_data.valid_pairs(tmp_path_factory.mktemp("pca") / "in", 120) / "audio-cover_dataset"
    for path in source.rglob("*.npy"):
        np.save(path, raw_data.vector(int.from_bytes(path.name.encode()[-9:-4], "little")))
    (source / "groups.csv").write_text("genre,stem,group\n")
    (source / "cover").rename(source.parent / "covers")
    (source / "cover").symlink_to(source.parent / "covers")
    return source


def test_a_pca_of_a_data_set_is_fitted_on_its_train_split_and_gives_a_data_set(data_set, tmp_path, capsys):
    out = tmp_path / "out"
    options = {"extractor": "pca", "workers": 1}
    assert features(str(out), str(data_set), components=9, **options) == 0
    found = {name.removeprefix("audio/"): vector for name, vector in vectors(out).items()}
    given = vectors(data_set / "audio")
    assert found.keys() == given.keys() and all(vector.shape == (9,) for vector in found.values())
    fitted = np.load(out / "audio/pca.npz", allow_pickle=False)
    train = np.array([vector for name, vector in given.items() if name.startswith("train")], np.float64)
    np.testing.assert_allclose(fitted["mean"], train.mean(0))
    np.testing.assert_allclose(fitted["scale"], train.std(0))
    assert fitted["count"] == len(train) == 60
    for name, vector in given.items():
        expected = fitted["components"] @ ((vector - fitted["mean"]) / fitted["scale"])
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
    covers = raw_data.hashes(data_set / "cover")
    assert raw_data.hashes(out / "cover") == covers and (out / "groups.csv").is_file()
    assert pack(str(out), str(tmp_path / "shards"), workers=1) == 0
    assert "no splits" not in capsys.readouterr().out

    applied = tmp_path / "applied"  # later, to other vectors, and to the same
    assert features(str(applied), str(data_set / "audio/val"), pca=str(out / "audio/pca.npz"), **options) == 0
    for name, vector in vectors(applied).items():
        np.testing.assert_array_equal(vector, found[f"val/{name}"])
    assert read_schema(applied).sha256 == read_schema(out / "audio").sha256
    before = raw_data.hashes(out)
    assert features(str(out), str(data_set), components=9, **options) == 0
    assert raw_data.hashes(out) == before
    with pytest.raises(ValueError, match="was fitted on other vectors or with other options"):
        features(str(out), str(data_set), components=8, **options)


def test_a_pca_is_only_for_the_vectors_that_it_was_fitted_for(data_set, tmp_path, capsys):
    source = put_json(tmp_path / "json", [f"{i}.json" for i in range(8)])
    assert brainz(source, tmp_path / "brainz") == 0
    options = {"extractor": "pca", "workers": 1}
    assert features(str(tmp_path / "out"), str(tmp_path / "brainz"), components=3, **options) == 0
    assert "no splits: the PCA is fitted on all vectors" in capsys.readouterr().out
    schema = read_schema(tmp_path / "out")
    assert schema.options["source"]["sha256"] == load("acousticbrainz").schema.sha256
    with pytest.raises(ValueError, match=r"is of vectors of acousticbrainz .* holds those of vectors 1 "):
        features(str(tmp_path / "no"), str(data_set), pca=str(tmp_path / "out/pca.npz"), **options)
    with pytest.raises(ValueError, match="needs --components, or with --pca"):
        features(str(tmp_path / "no2"), str(data_set), **options)
    (tmp_path / "valonly/val/a").mkdir(parents=True)
    np.save(tmp_path / "valonly/val/a/x.npy", np.ones(4, np.float32))
    with pytest.raises(ValueError, match="no train split to fit on"):
        features(str(tmp_path / "no3"), str(tmp_path / "valonly"), components=1, **options)


def test_sources_are_joined_by_their_paths_and_no_sample_is_without_one(tmp_path, monkeypatch):
    source = put_json(tmp_path / "json", [f"rock/{i}.json" for i in range(8)])
    assert brainz(source, tmp_path / "one") == 0
    random = np.random.default_rng(0)
    (tmp_path / "two/rock").mkdir(parents=True)
    for i in range(4, 12):
        np.save(tmp_path / f"two/rock/{i}.npy", random.normal(size=20))
    np.save(tmp_path / "two/rock/11.npy", np.zeros(20))
    np.save(tmp_path / "two/rock/10.npy", np.ones(21))
    monkeypatch.chdir(tmp_path)
    words = ["--extractor", "concat", "--source", "one", "two", "--out", "out", "--workers", "1"]
    with pytest.raises(SystemExit) as status:
        cli.run(features, words, several=("source",))
    assert status.value.code == 1
    assert quarantine(tmp_path / "out") == {"rock/10.npy": "wrong vector size", "rock/11.npy": "absent source"}
    found = vectors(tmp_path / "out")
    assert sorted(found) == sorted(f"rock/{i}.npy" for i in range(10))
    for i in range(10):
        vector = found[f"rock/{i}.npy"]
        np.testing.assert_array_equal(
            vector[:580], np.load(tmp_path / f"one/rock/{i}.npy") if i < 8 else np.zeros(580))
        np.testing.assert_array_equal(
            vector[580:], np.load(tmp_path / f"two/rock/{i}.npy").astype(np.float32) if i > 3 else np.zeros(20))
    assert [part["features"] for part in read_schema(tmp_path / "out").options["parts"]] == ["acousticbrainz",
                                                                                            "vectors"]
    with pytest.raises(ValueError, match="joins several folders"):
        features(str(tmp_path / "out2"), str(tmp_path / "one"), extractor="concat")


def test_a_run_on_components_hears_descriptors_through_the_same_pca(tmp_path: Path) -> None:
    from covergen.inference import audio_inputs as hearing
    from tests.shard_tools.extractors.test_acousticbrainz import as_bytes, low_level
    (tmp_path / "json").mkdir()
    for number in range(12):
        (tmp_path / f"json/{number}.json").write_bytes(as_bytes(low_level(number)))
    assert features(str(tmp_path / "raw"), str(tmp_path / "json"), "acousticbrainz", workers=1) == 0
    assert features(str(tmp_path / "few"), str(tmp_path / "raw"), "pca", components=5, workers=1) == 0
    metadata = {"dimension": 5, "blocks": [[0, 5]], "features": read_schema(tmp_path / "few").metadata()}
    heard = hearing.read_files(f"{tmp_path}/json/3.json", metadata, [f"{tmp_path}/few/pca.npz"])
    np.testing.assert_allclose(heard.raw[0], np.load(tmp_path / "few/3.npy"), rtol=1e-6)
    with pytest.raises(ValueError, match="give that file"):
        hearing.read_files(f"{tmp_path}/json/3.json", metadata)
