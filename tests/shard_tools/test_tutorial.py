"""The README's way from a music library to covers in its files, and from descriptors to an evaluation, step by step."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shard_tools.dataset.schema import read_schema, write_schema
from shard_tools.features import features
from shard_tools.pack import pack
from shard_tools.shards.index import open_index
from tests.support import music
from tests.support.paths import SHARED
from tests.support.runs import run_command

pytest.importorskip("essentia")
pytest.importorskip("av")
pytest.importorskip("mutagen")
pytest.importorskip("imagehash")


def test_a_music_library_becomes_covers_in_its_files(tmp_path: Path) -> None:
    for number in range(6):
        music.song(tmp_path / f"Music/{number}/one.ogg", 3.2, seed=number, front=music.picture(number),
                   album=f"Album {number}", albumartist="Someone", title="One", genre="Rock")
    for words in ("shard_tools.collect --source Music --out music",
                  "shard_tools.dedup --source music --apply group",
                  "shard_tools.split --source music --out music_split",
                  "shard_tools.pack --source music_split --out music_shards --resolution 32",
                  "covergen.train --model r3gan --shards music_shards --batch_size 4 --steps 2 --width 8",
                  "covergen.generate --run runs/r3gan --audio Music/0/one.ogg --n 2 --embed --out covers/"):
        module, *flags = words.split()
        run_command(tmp_path, module, *flags)
    metadata = open_index(tmp_path / "music_shards", "train").metadata
    assert metadata["samples"] == 6 and metadata["audio"]["features"]["features"] == "essentia"
    told = json.loads(Image.open(tmp_path / "covers/0000_one_00.png").text["covergen"])
    assert len(told["audio"][0]["sha256"]) == 64 and (tmp_path / "covers/one.covergen.ogg").is_file()
    refused = run_command(tmp_path, "shard_tools.features", "--source", "Music", "--out", "music/audio", "--extractor",
                          "acousticbrainz", ok=False)
    assert refused.returncode


def test_vectors_of_two_extractors_are_not_packed_together(tmp_path: Path) -> None:
    from tests.shard_tools.extractors.test_acousticbrainz import as_bytes, low_level
    (tmp_path / "json").mkdir()
    for number in range(8):
        (tmp_path / f"json/{number}.json").write_bytes(as_bytes(low_level(number)))
    for split, extractor in (("train", "acousticbrainz"), ("val", "acousticbrainz-559")):
        assert features(str(tmp_path / f"data/audio/{split}/rock"), str(tmp_path / "json"), extractor, workers=1) == 0
        (tmp_path / f"data/cover/{split}/rock").mkdir(parents=True)
        for number in range(8):
            (tmp_path / f"data/cover/{split}/rock/{number}.jpg").write_bytes(music.picture(number, (32, 32)))
    with pytest.raises(ValueError, match=r"audio/train/rock/ has those of acousticbrainz 1 \(580 .* audio/val/rock/ "
                                         r"those of acousticbrainz-559 1 \(559 .*can't be trained on together"):
        pack(str(tmp_path / "data"), str(tmp_path / "shards"), workers=1)
    (tmp_path / "data/audio/val/rock/features.json").unlink()
    with pytest.raises(ValueError, match=r"audio/val/rock/ has no features.json"):
        pack(str(tmp_path / "data"), str(tmp_path / "shards"), workers=1)
    known = read_schema(tmp_path / "data/audio/train/rock")
    (tmp_path / "data/audio/train/rock/features.json").unlink()
    write_schema(tmp_path / "data/audio", known)
    with pytest.raises(ValueError, match=r"8 of 16 vectors are not what features.json says, .* have 559 numbers"):
        pack(str(tmp_path / "data"), str(tmp_path / "shards"), workers=1)


def test_groups_of_a_file_overrule_those_of_names_and_packing_sees_that_they_changed(tmp_path: Path) -> None:
    (tmp_path / "data/train/rock").mkdir(parents=True)
    for number in range(4):
        (tmp_path / f"data/train/rock/{number}.jpg").write_bytes(music.picture(number, (32, 32)))
    assert pack(str(tmp_path / "data"), str(tmp_path / "alone"), workers=1) == 0
    with open(tmp_path / "data/groups.csv", "w", newline="") as file:
        csv.writer(file).writerows([("genre", "stem", "group"), ("rock", "0", "a"), ("rock", "3", "a")])
    assert pack(str(tmp_path / "data"), str(tmp_path / "joined"), workers=1) == 0
    assert [open_index(tmp_path / name, "train").metadata["groups"] for name in ("alone", "joined")] == [4, 3]
    with pytest.raises(ValueError, match="--source is not what"):
        pack(str(tmp_path / "data"), str(tmp_path / "alone"), workers=1)
    (tmp_path / "data/groups.csv").write_text("genre,stem\nrock,0\n")
    with pytest.raises(ValueError, match=r"groups.csv of --source can't be read \(expected the columns"):
        pack(str(tmp_path / "data"), str(tmp_path / "other"), workers=1)


@pytest.mark.skipif(not (SHARED / "gamemusic.tar.xz").is_file(),
                    reason="needs ../shared/data")
@pytest.mark.slow
def test_real_descriptors_with_their_pictures_become_an_evaluation(tmp_path: Path) -> None:
    import tarfile
    with tarfile.open(SHARED / "gamemusic.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = "--steps 20 --width 32 --multiples 1,1 --attention 0 --batch_size 16 --tracker none --sample_every 0"
    for words in (f"shard_tools.features --pairs {next(tmp_path.rglob('pairs.csv'))} --out games",
                  "shard_tools.split --source games --out games_split --min_groups 1",
                  "shard_tools.pack --source games_split --out games_shards --resolution 32",
                  f"covergen.train --model flow --shards games_shards {run}",
                  "covergen.evaluate --run runs/flow --split train --num_songs 8 --samples_per_song 2 "
                  "--out table.json"):
        module, *flags = words.split()
        run_command(tmp_path, module, *flags, XDG_CACHE_HOME=str(tmp_path / "cache"))
    vectors = [np.load(path) for path in (tmp_path / "games").rglob("*.npy")]
    assert len(vectors) == 478 and {len(vector) for vector in vectors} == {582}
    assert json.loads((tmp_path / "table.json").read_text())["num_songs"] == 8
