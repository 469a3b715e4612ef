"""What the fuzzing damages: a folder in; sound artefacts of every kind, as small as they can be, made in it once."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from shard_tools import pack as packing
from shard_tools.collect import collect
from shard_tools.dataset.schema import Schema, write_schema
from shard_tools.demo import make
from shard_tools.extractors.acousticbrainz import NAMES
from shard_tools.features import features
from shard_tools.pack import pack
from tests.shard_tools.extractors.test_extractors import document_of
from tests.support import music, runs, thesis

TRAIN = ["--batch_size", "8", "--tracker", "none", "--sample_every", "0", "--save_every", "2", "--log_every", "1",
         "--threads", "1", "--loader_threads", "1"]
MODELS = {
    "gan": ["--model", "wgan_gp", "--width", "4", "--critic_steps", "1", "--latent", "8"],
    "coder": ["--model", "ae_resize"],
    "heard": ["--model", "r3gan", *runs.CONDITIONAL["r3gan"]],
    "flow": ["--model", "flow", *runs.CONDITIONAL["flow"]],
    "judge": ["--model", "contrast", "--width", "8", "--album_subset", "judge"],
}
RESUMED = ("gan", "coder")
STEPS, LATENT, VECTOR = 4, 8, 40
PAIRED = "raw/audio-cover_dataset"
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
         "PYTHONDONTWRITEBYTECODE": "1"}
KINDS = (".tar", ".tar.gz", ".tar.bz2", ".tar.zst")


def compressor(name: str) -> Callable[[bytes], bytes]:
    """What makes a .tar a .tar.gz, .tar.bz2 or .tar.zst; frames of any of them may follow one another in a file."""
    if name.endswith(".zst"):
        import zstandard
        return zstandard.ZstdCompressor().compress
    if name.endswith(".gz"):
        return lambda data: gzip.compress(data, 1, mtime=0)
    return bz2.compress if name.endswith(".bz2") else bytes


def make_material(base: Path, all_of_it: bool = True) -> Path:
    """Makes everything, or a third of it, below ``base``; returns it. 15 seconds, or 4."""
    _data_set(base)
    assert pack(str(base / "raw"), str(base / "shards"), samples_per_shard=24, workers=1) == 0
    _descriptors(base)
    names = tuple(MODELS) if all_of_it else ("gan",)
    for name in names:
        runs.train(base, *MODELS[name], *TRAIN, "--shards", "shards", "--steps", str(STEPS), "--name", name, **ALONE)
        if name not in RESUMED:  # no more to copy for every case than it reads
            shutil.rmtree(base / f"runs/{name}/checkpoints/step_00000002")
            (base / f"runs/{name}/checkpoints/step_{STEPS:08d}/trainer.pt").unlink()
    _small(base)
    if all_of_it:
        _half_packed(base / "raw", base / "half")
        _foreign(base / "shards", base / "foreign")
        for number, kind in enumerate((".mp3", ".flac", ".wav", ".ogg")):
            music.song(base / f"music/album{number}/song{kind}", seed=number, front=music.picture(number),
                       albumartist=f"Band {number}", album=f"Album {number}", title=f"Song {number}", genre="Rock")
        assert collect(str(base / "music"), str(base / "collected"), workers=1) == 0
        assert features(str(base / "reduced"), str(base / PAIRED), "pca", components=4, workers=1) == 0
        (base / "thesis").mkdir()
        thesis.save("ae_resize", base / "thesis", steps=1)
        runs.run_command(base, "covergen.evaluate", "--run", "runs/heard", "--shards", "shards", "--judge",
                         "runs/judge", "--num_songs", "8", "--samples_per_song", "2", "--split", "train", "--out",
                         "small.json", "--threads", "1", COVERGEN_READERS=str(base / "readers"), **ALONE)
    return base


def _data_set(base: Path) -> None:
    """The thesis's layout as a folder and as a zip, with all that may lie beside the files."""
    make(base / "raw", tier="toy", albums=40)
    shutil.rmtree(base / "raw/cover_dataset")
    for path in (base / "raw").rglob("*.npy"):  # shorter vectors, so that what hears them is small
        np.save(path, np.load(path)[np.r_[0:VECTOR // 2, 580:580 + VECTOR // 2]])
    write_schema(base / PAIRED / "audio", Schema("made-up", 1, tuple(f"n{number}" for number in range(VECTOR))))
    places = [(path.parent.name, path.stem) for path in sorted((base / PAIRED / "cover").rglob("*.jpg"))[:6]]
    lines = ["genre,stem,group", *(f"{genre},{stem},g{number // 2}" for number, (genre, stem) in enumerate(places))]
    (base / PAIRED / "groups.csv").write_text("\n".join(lines) + "\n")
    (base / "zip").mkdir()
    with zipfile.ZipFile(base / "zip/raw.zip", "w") as archive:
        for number, path in enumerate(sorted(path for path in (base / "raw").rglob("*") if path.is_file())):
            archive.write(path, path.relative_to(base / "raw"), (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2])


def _small(base: Path) -> None:
    """Single files: noise, a vector, a configuration, a plan and tables."""
    (base / "small").mkdir()
    np.save(base / "small/z.npy", np.zeros((2, LATENT), np.float32))
    shutil.copy(next((base / PAIRED).rglob("*.npy")), base / "small/heard.npy")
    (base / "small/c.yaml").write_text((base / "runs/gan/config.yaml").read_text())
    (base / "small/plan.yaml").write_text(yaml.safe_dump(_plan()))
    (base / "small/map.csv").write_text("Rock,metal\nPop,pop\n")
    (base / "small/pairs.csv").write_text("audio,cover,genre\n" + "".join(
        f"../json/rock/{number}.json,../{path.relative_to(base)},rock\n"
        for number, path in enumerate(sorted((base / PAIRED / "cover").rglob("*.jpg"))[:4])))


def _half_packed(source: Path, out: Path) -> None:
    """What a pack that was killed before its last files leaves."""
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    write, packing.write_index = packing.write_index, killed
    try:
        pack(str(source), str(out), samples_per_shard=24, workers=1)
    except KeyboardInterrupt:
        pass
    finally:
        packing.write_index = write
    assert (out / ".pack/state.json").is_file()


def _foreign(shards: Path, out: Path) -> None:
    out.mkdir()
    for path in sorted(shards.glob("train-*.tar"))[:2]:
        shutil.copy(path, out / path.name.replace("-of-", "_"))


def _descriptors(base: Path) -> None:
    """Six low-level files, with the releases that they are of, as a folder and in archives of every kind."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(6):
            name, album = f"rock/{number}.json", f"00000000-0000-4000-8000-{number:012d}"
            document = document_of(NAMES, number)
            document["metadata"] = {"tags": {"musicbrainz_albumid": [album]}, "version": {"extractor": "music 1.0"}}
            data = json.dumps(document).encode()
            (base / "json" / name).parent.mkdir(parents=True, exist_ok=True)
            (base / "json" / name).write_bytes(data)
            member = tarfile.TarInfo(f"dump/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (base / "dump").mkdir()
    for kind in KINDS:
        (base / f"dump/dump{kind}").write_bytes(compressor(kind)(buffer.getvalue()))


def _plan() -> dict:
    """An experiment of one row."""
    return {"about": "nothing", "shown": ["fid"],
            "tiers": {"toy": {"demo": "toy", "minutes": 1, "judge_minutes": 1, "train": {"steps": 2},
                              "evaluate": {"num_songs": 8, "samples_per_song": 2}}},
            "judge": {"train": {"model": "contrast", "album_subset": "judge", "width": 8}},
            "rows": [{"name": "gan", "title": "a GAN, guidance {guidance:g}", "train": {"model": "wgan_gp", "width": 4},
                      "toy": {"batch_size": 4}, "evaluations": [{"guidance": 1}]}],
            "thresholds": {"toy": {"gan": {"fid": {"at_most": 1.0}}}}}
