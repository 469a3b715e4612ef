"""Extractors that learnt something: CLAP with a tiny random model, PCA against scikit-learn's, and sources joined."""

import wave
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from shard_tools.core.errors import BadFileError
from shard_tools.dataset.schema import Schema
from shard_tools.extractors import EXTRACTORS, Extractor, audio, from_metadata, load, pca
from shard_tools.extractors.concat import of_schemas, of_size
from shard_tools.shards.statistics import detect_blocks


def save_model(folder: Path, seed: int, fused: bool = False) -> str:
    """A CLAP of 80,000 random weights, saved as a pretrained one is."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    ears = {"hidden_size": 64, "patch_embeds_hidden_size": 8, "depths": [1] * 4, "num_attention_heads": [1] * 4,
            "num_hidden_layers": 4, "projection_dim": 16, "enable_fusion": fused, "aff_block_r": 1}
    text = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "intermediate_size": 8, "max_position_embeddings": 8, "projection_dim": 16}
    config = transformers.ClapConfig(text_config=text, audio_config=ears, projection_dim=16)
    transformers.ClapModel(config).save_pretrained(folder)
    transformers.ClapFeatureExtractor(truncation="fusion" if fused else "rand_trunc").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    pytest.importorskip("av")
    return save_model(tmp_path_factory.mktemp("clap"), 0)


@pytest.fixture(scope="module")
def song(tmp_path_factory) -> Path:
    """26 s at 48 kHz that change every 10 s, 16 bits."""
    path = tmp_path_factory.mktemp("song") / "song.wav"
    time = np.arange(26 * 48000) / 48000
    samples = 0.4 * np.sin(2 * np.pi * np.where(time < 10, 220, np.where(time < 20, 3000, 9000)) * time)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 48000, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def test_clap_is_the_mean_direction_of_its_windows(model, song):
    import torch
    from transformers import ClapFeatureExtractor, ClapModel
    network, ears = ClapModel.from_pretrained(model).eval(), ClapFeatureExtractor.from_pretrained(model)
    whole = np.concatenate(list(audio.pieces(song, 0.0, None, 48000)))
    directions = []
    for start in (0, 10, 20):
        inputs = ears(whole[start * 48000:(start + 10) * 48000], sampling_rate=48000, return_tensors="pt")
        with torch.inference_mode():
            pooled = network.audio_model(input_features=inputs["input_features"].float()).pooler_output
            found = network.audio_projection(pooled)[0].numpy()
        directions.append(found / np.linalg.norm(found))
    mean = np.sum(directions, 0)
    extractor = load("clap", model=model)
    vector = extractor.of_audio(song, 0.0, None)
    assert vector.dtype == np.float32 and extractor.schema.names == tuple(f"clap.{i:03d}" for i in range(16))
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(extractor.of_audio(song, 10.0, 10.0), directions[1], atol=1e-5)
    np.testing.assert_allclose(extractor.of_audio(song, 10.0, 14.9), directions[1], atol=1e-5)  # 4.9 s are no window
    np.testing.assert_allclose(extractor.of_audio(song, 20.0, None), directions[2], atol=1e-5)
    with pytest.raises(BadFileError, match="too short"):
        extractor.of_audio(song, 24.0, None)


def test_clap_with_fusion_does_not_throw_dice(tmp_path, song):
    pytest.importorskip("av")
    extractor = load("clap", model=save_model(tmp_path / "fused", 1, fused=True))
    found = []
    for seed in range(2):
        np.random.seed(seed)
        found.append(extractor.of_audio(song, 0.0, None))
    np.testing.assert_array_equal(*found)


def test_clap_is_known_by_its_weights(model, tmp_path):
    schema = load("clap", model=model).schema
    assert schema.options["model"] == model and len(schema.options["weights_sha256"]) == 64
    assert from_metadata(schema.metadata()).schema == schema
    other = load("clap", model=save_model(tmp_path / "other", 1)).schema
    assert other.options["weights_sha256"] != schema.options["weights_sha256"] and other.sha256 != schema.sha256
    metadata = schema.metadata() | {"options": schema.options | {"model": str(tmp_path / "other")}}
    with pytest.raises(ValueError, match="not the model that the vectors were made with"):
        from_metadata(metadata)


def test_what_is_no_clap_is_refused(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    transformers.ClapTextConfig().save_pretrained(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    for name, said in (("text", "clap_text_model"), ("empty", "can't be used")):
        with pytest.raises(ValueError, match=said):
            load("clap", model=str(tmp_path / name))
    with pytest.raises(ValueError, match="needs --model"):
        load("clap")


def columns(count: int, seed: int = 0) -> np.ndarray:
    """Vectors ``[count, 40]`` float32 of 6 hidden causes, at the scales of real descriptors; one column is constant."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(count, 6)) @ np.random.default_rng(9).normal(size=(6, 40)) + 0.1 * random.normal(
        size=(count, 40))
    mixed[:, 7] = 3
    return ((mixed + 1) * 10.0 ** np.linspace(-24, 13, 40)).astype(np.float32)


def test_pca_of_standardised_columns_is_that_of_scikit_learn():
    vectors = columns(3000)
    fitted = pca.fit(lambda: iter([*vectors, np.zeros(40, np.float32)]), 6, standardise=True)
    wide = vectors.astype(np.float64)
    std = wide.std(0)
    std[7] = 1
    standard = (wide - wide.mean(0)) / std
    model = PCA(6).fit(standard)
    assert fitted["count"] == 3000 and fitted["explained"].sum() == pytest.approx(
        model.explained_variance_ratio_.sum(), rel=1e-3)
    found = np.array([pca.apply(fitted, vector) for vector in vectors])
    expected = model.transform(standard)
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found, expected * signs, atol=0.05 * expected.std())
    raw = pca.fit(lambda: iter(vectors), 6, standardise=False)
    assert np.abs(raw["components"][0]).argmax() == 39 and raw["explained"][0] > 0.99  # one column is all it sees


def test_pca_is_applied_later_with_the_same_numbers(tmp_path):
    vectors = columns(200)
    fitted = pca.fit(lambda: iter(vectors), 5, standardise=True)
    data = pca.pca_bytes(fitted, of_size(40), "work")
    assert data == pca.pca_bytes(pca.fit(lambda: iter(vectors), 5, standardise=True), of_size(40), "work")
    assert b"pickle" not in data
    (tmp_path / "pca.npz").write_bytes(data)
    extractor = load("pca", files=(str(tmp_path / "pca.npz"),))
    for vector in columns(20, seed=1):
        np.testing.assert_array_equal(extractor.of_vectors([vector]), pca.apply(fitted, vector))
    for vector, reason in ((vectors[0][:39], "wrong vector size"), (np.zeros(40), "absent source")):
        with pytest.raises(BadFileError, match=reason):
            extractor.of_vectors([vector])


@pytest.mark.parametrize("components", [41, 31])
def test_pca_of_more_components_than_numbers_or_vectors_is_refused(components):
    vectors = columns(30 if components == 31 else 300)
    with pytest.raises(ValueError, match=f"--components {components}: expected 1 to {components - 1}"):
        pca.fit(lambda: iter(vectors), components, standardise=True)


def test_files_that_are_no_pca_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, mean=np.array([object()]))
    for data in (path.read_bytes(), b"", b"PK\3\4 nothing", b"\x80\4."):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="can't be read"):
            load("pca", files=(str(path),), file_sha256="")
    with pytest.raises(ValueError, match="can't be read: No such file"):
        load("pca", files=(str(tmp_path / "absent.npz"),))


@pytest.fixture
def stand_in(monkeypatch) -> Schema:
    """An extractor that hears 40 numbers in no time: the start, and ones."""
    schema = Schema("stand_in", 1, tuple(map(str, range(40))))
    made = Extractor(schema, of_audio=lambda path, start, seconds: np.float32([start] + [1] * 39))
    monkeypatch.setitem(EXTRACTORS, "stand_in", f"{__name__}:STAND_IN")
    monkeypatch.setattr(f"{__name__}.STAND_IN", lambda: made, raising=False)
    return schema


def test_a_track_goes_through_the_pca_that_its_data_went_through(tmp_path, stand_in):
    fitted = pca.fit(lambda: iter(columns(50)), 4, standardise=True)
    (tmp_path / "pca.npz").write_bytes(pca.pca_bytes(fitted, stand_in, ""))
    metadata = load("pca", files=(str(tmp_path / "pca.npz"),)).schema.metadata()
    extractor = from_metadata(metadata, pca=[tmp_path / "pca.npz"])
    np.testing.assert_array_equal(extractor.of_audio(Path("x"), 2.0, None), pca.apply(
        fitted, np.float32([2] + [1] * 39)))
    with pytest.raises(ValueError, match="give that file"):
        from_metadata(metadata)
    (tmp_path / "other.npz").write_bytes(pca.pca_bytes(fitted, stand_in, "other"))
    with pytest.raises(ValueError, match=r"none of .*other.npz"):
        from_metadata(metadata, pca=[tmp_path / "other.npz"])


def test_sources_are_joined_with_zeros_that_pack_sees_as_absence():
    extractor = of_schemas((of_size(30), Schema("stand_in", 1, tuple("abcdefghijklmnopqrst"))))
    assert extractor.schema.names[0] == "0.vectors:vectors.0000" and extractor.schema.names[-1] == "1.stand_in:t"
    random = np.random.default_rng(0)
    vectors = [extractor.of_vectors([None if i % 3 == 1 else random.normal(size=30).astype(np.float32),
                                     None if i % 3 == 2 else random.normal(size=20).astype(np.float32)])
               for i in range(90)]
    assert all(vector.dtype == np.float32 and vector.shape == (50,) for vector in vectors)
    assert detect_blocks(np.array(vectors)) == ((0, 30), (30, 50))
    for given, reason in (([None, None], "absent source"), ([np.zeros(30), None], "absent source"),
                          ([np.ones(29), None], "wrong vector size")):
        with pytest.raises(BadFileError, match=reason):
            extractor.of_vectors(given)


def test_a_track_is_heard_by_the_sources_that_can_and_absent_from_the_others(stand_in):
    schema = of_schemas((of_size(30), stand_in)).schema
    extractor = from_metadata(schema.metadata())
    assert extractor.schema == schema and extractor.of_json is None
    np.testing.assert_array_equal(extractor.of_audio(Path("x"), 2.0, None), [0] * 30 + [2] + [1] * 39)
    with pytest.raises(ValueError, match="no extractor here makes"):
        from_metadata(of_schemas((Schema("msd", 1, ("a",)), stand_in)).schema.metadata())
