"""What is damaged and who reads it: a table of artefacts and commands, and what must hold afterwards."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from safetensors.torch import load_file

from shard_tools.dataset.layout import make_key, read_name
from tests.proofs.damage import Damage
from tests.proofs.sandbox import Outcome
from tests.support.material import MODELS, PAIRED, STEPS, TRAIN


@dataclass(frozen=True)
class Case:
    """One case after its run: its folder (with ``in`` and ``out``), the sound material, what was damaged, what came."""

    folder: Path
    base: Path
    damage: Damage
    outcome: Outcome
    before: dict[str, tuple]
    after: dict[str, tuple]

    def touched(self, name: str) -> bool:
        """Whether a file of this name was damaged."""
        return any(path.name == name for path in self.damage.paths)


@dataclass(frozen=True)
class Target:
    """An artefact and a command that reads it.

    Attributes:
        given: where what of the material is put, by its place there; what begins with ``out`` may be written to.
        files: patterns of the files of which one is damaged.
        module, flags: the command; ``options``: ways to end it, of which chance takes one.
        check: what else must hold; the complaints.
        weight: of so many cases, by the sum of all.
    """

    name: str
    given: dict[str, str]
    files: tuple[str, ...]
    module: str
    flags: tuple[str, ...]
    options: tuple[tuple[str, ...], ...] = ((),)
    check: Callable[[Case], list[str]] = lambda case: []
    weight: int = 3


# -- what must hold: nothing valid is lost, nothing damaged passes where a checksum says so ---


def samples(folder: Path) -> dict[str, bytes]:
    """Every member of all shards of a folder, by its name."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            found |= {member.name: shard.extractfile(member).read() for member in shard}
    return found


sound_samples = lru_cache(maxsize=2)(samples)


def lost(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    gone = [name for name, data in expected.items() if found.get(name) != data]
    return [f"{len(gone)} sound ones are lost or changed, the first is {gone[0]}"] if gone else []


def all_packed(case: Case) -> list[str]:
    """Every pair that nobody touched is in a shard, as it would have been."""
    if case.outcome.status == 2:
        return []
    bad = {make_key(read_name(path.name)[0]) for path in case.damage.paths}
    return lost({name: data for name, data in sound_samples(case.base / "shards").items()
                 if name.partition(".")[0] not in bad}, samples(case.folder / "out/packed"))


def all_of_zip_packed(case: Case) -> list[str]:
    """The same of the pairs that the standard library still reads as they were."""
    if case.outcome.status == 2:
        return []
    whole = {}
    with zipfile.ZipFile(case.base / "zip/raw.zip") as sound:
        contents = {name: sound.read(name) for name in sound.namelist()}
        entries = {name: sound.getinfo(name) for name in contents}
    try:
        with zipfile.ZipFile(case.folder / "in/zip/raw.zip") as damaged:
            for name in set(damaged.namelist()) & set(contents):
                try:
                    said = [(info.CRC, info.file_size, info.compress_size, info.header_offset)
                            for info in (damaged.getinfo(name), entries[name])]
                    whole[name] = said[0] == said[1] and damaged.read(name) == contents[name]
                except Exception:  # whatever zipfile says against it
                    whole[name] = False
    except Exception:
        return []
    stems = [{make_key(read_name(name.rpartition("/")[2])[0]) for name in whole if whole[name] and f"/{part}/" in name}
             for part in ("cover", "audio")]
    return lost({name: data for name, data in sound_samples(case.base / "shards").items()
                 if name.partition(".")[0] in stems[0] & stems[1]}, samples(case.folder / "out/packed"))


def same_folder(theirs: str, ours: str, skip: Callable[[Case, Path], bool] = lambda case, path: False,
                pattern: str = "**/*") -> Callable[[Case], list[str]]:
    """Unless the command refused: every file of the material's folder is there with the same bytes."""
    def check(case: Case) -> list[str]:
        if case.outcome.status == 2:
            return []
        folder = case.folder / ours
        expected = {str(path.relative_to(case.base / theirs)): path.read_bytes()
                    for path in (case.base / theirs).glob(pattern) if path.is_file() and not skip(case, path)}
        return lost(expected, {name: (folder / name).read_bytes() for name in expected if (folder / name).is_file()})
    return check


def found_out(case: Case) -> list[str]:
    """A shard, an index or the list of what was left out is not what was written: verify says so."""
    known = any(path.suffix in (".tar", ".npy", ".json", ".jsonl") for path in case.damage.paths)
    if case.damage.kind == "json_leaf":  # a lie with an honest checksum may be one that nobody can tell
        return []
    return ["verify found nothing"] if known and case.outcome.status == 0 else []


def honestly_unpacked(case: Case) -> list[str]:
    """What inspect writes of undamaged indexes is what was packed."""
    if any(path.suffix != ".tar" for path in case.damage.paths):
        return []
    known = {path.name: path.read_bytes() for path in (case.base / "raw").rglob("*") if path.is_file()}
    return [f"{path.name} was never packed" for path in (case.folder / "out").rglob("*.npy")
            if known.get(path.name) != path.read_bytes()]


def read_again(case: Case) -> list[str]:
    """Every descriptor file that nobody touched has its vector."""
    if case.outcome.status == 2:
        return []
    names = [f"{number}.json" for number in range(6)]
    return [f"the vector of {name} is lost" for name in names if not case.touched(name)
            and not (case.folder / f"out/vectors/rock/{Path(name).stem}.npy").is_file()]


def nothing_lost_in_training(case: Case) -> list[str]:
    """A run that stopped has all its sound files still; one that ended has weights that load and says what it passed
    over, as far as a manifest tells it."""
    complaints, root = [], case.folder / "out/runs"
    damaged = {str(path) for path in case.damage.paths}
    if case.outcome.status != 0:
        gone = [path for path in case.before if path.startswith(str(root)) and "/checkpoints/" in path
                and path.endswith((".safetensors", ".pt")) and path not in damaged
                and case.after.get(path) != case.before[path]]
        return [f"stopped, and lost {gone[0]}"] if gone else []
    last = sorted(root.glob(f"*/checkpoints/step_{STEPS + 2:08d}"))
    if not last:
        return ["ended without its last checkpoint"]
    for path in last[0].glob("*.safetensors"):
        load_file(path)
    newest = [path for path in damaged if f"step_{STEPS:08d}/" in path]
    if newest and (last[0] / "manifest.json").exists() and "warning" not in case.outcome.said:
        complaints.append("a checkpoint that is not what its manifest says was taken without a warning")
    return complaints


# -- the table ---

RUN = ("config.yaml", "data.json", "checkpoints/step_00000004/*.safetensors")


def _in_run(name: str, place: str = "in", more: tuple[str, ...] = ()) -> tuple[str, ...]:
    return tuple(f"{place}/runs/{name}/{pattern}" for pattern in (*RUN, *more))


def _train(name: str, *more: str) -> tuple[str, ...]:
    return (*MODELS[name], *TRAIN, "--out", "out/runs", "--name", name, "--steps", str(STEPS + 2), *more)


ONE = ("--workers", "1")
SHARDS, SHARD_FILES = {"shards": "in/shards"}, ("in/shards/*",)
INDEX = ("in/shards/train*", "in/shards/val*")
RAW_FILES = ("in/raw/**/*.jpg", "in/raw/**/*.npy", "in/raw/**/*.npy", "in/raw/**/*.json", "in/raw/**/*.csv",
             "in/raw/**/*.csv", "in/raw/*.npz")
AUDIO = ("--run", "in/runs/heard", "--n", "2", "--threads", "1", "--out")
TARGETS = (
    Target("pack folder", {"raw": "in/raw"}, RAW_FILES, "shard_tools.pack",
           ("--source", "in/raw", "--out", "out/packed", "--samples_per_shard", "24", *ONE), check=all_packed,
           weight=16),
    Target("pack zip", {"zip": "in/zip"}, ("in/zip/raw.zip",), "shard_tools.pack",
           ("--source", "in/zip/raw.zip", "--out", "out/packed", "--samples_per_shard", "24", *ONE),
           check=all_of_zip_packed, weight=16),
    Target("pack again", {"raw": "in/raw", "half": "out/half"}, ("out/half/.pack/*", "out/half/*.tar"),
           "shard_tools.pack", ("--source", "in/raw", "--out", "out/half", "--samples_per_shard", "24", *ONE),
           check=same_folder("shards", "out/half"), weight=8),
    Target("pack over finished", {"raw": "in/raw", "shards": "out/shards"}, ("out/shards/*",), "shard_tools.pack",
           ("--source", "in/raw", "--out", "out/shards", "--samples_per_shard", "24", *ONE)),
    Target("verify", SHARDS, SHARD_FILES, "shard_tools.verify", ("in/shards", *ONE), ((), ("--full",), ("--leaks",)),
           found_out, 16),
    Target("inspect", SHARDS, SHARD_FILES, "shard_tools.inspect", ("in/shards",),
           ((), ("--unpack", "out/files"), ("--preview", "out/x.png")), honestly_unpacked, 12),
    Target("dedup", {"raw": "in/raw"}, RAW_FILES, "shard_tools.dedup", ("in/raw", "--out", "out/dedup", *ONE)),
    Target("split", {"raw": "in/raw"}, RAW_FILES, "shard_tools.split",
           ("in/raw", "--out", "out/split", "--link", "copy", "--remember", "false", *ONE), weight=6),
    Target("demo", {"raw": "out/raw"}, ("out/raw/demo.json",), "shard_tools.demo", ("out/raw", "--albums", "40"),
           weight=1),
    Target("features of files", {"json": "in/json"}, ("in/json/rock/*",), "shard_tools.features",
           ("--source", "in/json", "--extractor", "acousticbrainz", "--out", "out/vectors", *ONE), check=read_again,
           weight=8),
    *(Target(f"features of dump{kind}", {"dump": "in/dump"}, (f"in/dump/dump{kind}",), "shard_tools.features",
             ("--source", f"in/dump/dump{kind}", "--extractor", "acousticbrainz", "--out", "out/vectors", *ONE),
             weight=5) for kind in (".tar", ".tar.gz", ".tar.bz2", ".tar.zst")),
    Target("features of pairs", {"json": "in/json", PAIRED: f"in/{PAIRED}", "small": "in/small"},
           ("in/small/pairs.csv",), "shard_tools.features",
           ("--pairs", "in/small/pairs.csv", "--extractor", "acousticbrainz", "--out", "out/vectors", *ONE), weight=4),
    Target("features pca", {PAIRED: "in/set", "reduced/audio/pca.npz": "in/pca.npz"},
           ("in/set/audio/**/*.npy", "in/set/audio/features.json", "in/pca.npz"), "shard_tools.features",
           ("--source", "in/set", "--extractor", "pca", "--out", "out/vectors", *ONE),
           (("--components", "4"), ("--pca", "in/pca.npz")), weight=5),
    Target("features concat", {PAIRED: "in/set", "reduced/audio": "in/other"},
           ("in/set/audio/**/*.npy", "in/set/audio/features.json", "in/other/features.json"), "shard_tools.features",
           ("--source", "in/set", "in/other", "--extractor", "concat", "--out", "out/vectors", *ONE), weight=3),
    Target("collect", {"music": "in/music", "collected": "out/collected", "small": "in/small"},
           ("in/music/*/*", "in/music/*/*", "in/small/map.csv"), "shard_tools.collect",
           ("--source", "in/music", "--out", "out/collected", "--genre_map", "in/small/map.csv", *ONE),
           check=lambda case: collected(case), weight=8),
    Target("collect again", {"music": "in/music", "collected": "out/collected"},
           ("out/collected/.collect/**/*", "out/collected/*.csv", "out/collected/audio/features.json"),
           "shard_tools.collect", ("--source", "in/music", "--out", "out/collected", *ONE),
           check=same_folder("collected", "out/collected", pattern="[ac]*/**/*.[nj]p*"), weight=3),
    Target("coverart", {"json": "in/json"}, ("in/json/rock/*",), "shard_tools.coverart",
           ("--source", "in/json", "--out", "out/covers", "--contact", "a@example.org", "--dry_run", *ONE), weight=3),
    Target("train on shards", SHARDS, INDEX, "covergen.train", _train("gan", "--shards", "in/shards"), weight=10),
    Target("train and validate", SHARDS, ("in/shards/val*",), "covergen.train",
           _train("coder", "--shards", "in/shards"), weight=3),
    Target("train on pairs", SHARDS, ("in/shards/train*",), "covergen.train", _train("heard", "--shards", "in/shards"),
           weight=3),
    Target("train on foreign shards", {"foreign": "in/foreign"}, ("in/foreign/*",), "covergen.train",
           _train("gan", "--shards", "in/foreign"), weight=6),
    Target("train by a file", {**SHARDS, "small": "in/small"}, ("in/small/c.yaml",), "covergen.train",
           ("--config", "in/small/c.yaml", "--shards", "in/shards", "--out", "out/runs", "--tracker", "none", "--steps",
            "1", "--batch_size", "8", "--width", "4"), ((), ("--dry_run",)), weight=6),
    *(Target(f"train on, {name}", {"shards": "shards", f"runs/{name}": f"out/runs/{name}"},
             (*_in_run(name, "out"), *_in_run(name, "out", ("checkpoints/*/*",)), f"out/runs/{name}/log.jsonl"),
             "covergen.train", _train(name, "--shards", "shards"), check=nothing_lost_in_training, weight=weight)
      for name, weight in (("gan", 14), ("coder", 4))),
    Target("generate", {"runs/gan": "in/runs/gan", "small": "in/small"}, (*_in_run("gan"), "in/small/z.npy"),
           "covergen.generate", ("--run", "in/runs/gan", "--threads", "1", "--out"),
           (("out/x.png", "--n", "4"), ("out/x.npy", "--latents", "in/small/z.npy")), weight=12),
    Target("generate for audio", {"runs/heard": "in/runs/heard", "small": "in/small", **SHARDS},
           ("in/small/heard.npy", "in/runs/heard/data.json", "in/runs/heard/config.yaml", "in/shards/test*"),
           "covergen.generate", AUDIO, (("out/x.png", "--audio", "in/small/heard.npy"),
                                        ("out/x/", "--from_shards", "in/shards", "--rows", "3")), weight=8),
    *(Target(f"analyze {what}", {**SHARDS, f"runs/{name}": f"in/runs/{name}"},
             (*_in_run(name), "in/shards/*", *more), "covergen.analyze",
             (what, "--run", f"in/runs/{name}", "--out", "out/x.png", *flags))
      for what, name, flags, more in (
          ("reconstruct", "coder", ("--shards", "in/shards"), ()),
          ("latent", "coder", ("--shards", "in/shards", "--n", "20", "--split", "train"), ()),
          ("matrix", "heard", ("--shards", "in/shards", "--n", "2"), ()),
          ("interpolate", "heard", ("--shards", "in/shards", "--n", "2", "--frames", "2"), ()),
          ("neighbours", "gan", ("--shards", "in/shards", "--n", "2", "--compare", "4"), ()),
          ("curves", "gan", (), ("in/runs/gan/log.jsonl",) * 6))),
    Target("generate of flow", {"runs/flow": "in/runs/flow", "small": "in/small"}, _in_run("flow"), "covergen.generate",
           ("--run", "in/runs/flow", "--n", "1", "--threads", "1", "--out", "out/x.png", "--audio",
            "in/small/heard.npy"), weight=2),
    Target("evaluate", {**SHARDS, "runs/heard": "in/runs/heard", "runs/judge": "in/runs/judge",
                        "readers": "out/readers"},
           (*_in_run("judge"), *_in_run("heard"), "in/shards/*", "out/readers/*/*.*s*"), "covergen.evaluate",
           ("--run", "in/runs/heard", "--shards", "in/shards", "--judge", "in/runs/judge", "--num_songs", "8",
            "--samples_per_song", "2", "--split", "train", "--out", "out/e.json", "--threads", "1"), weight=4),
    Target("convert", {"thesis": "in/thesis"}, ("in/thesis/*",), "covergen.convert",
           ("--thesis", "in/thesis/ae_reconv_19.pth", "--model", "ae_resize", "--out", "out/run"), weight=8),
    Target("experiment", {"small": "in/small"}, ("in/small/plan.yaml",), "covergen.experiment",
           ("in/small/plan.yaml", "--dry_run", "--out", "out/experiment"), weight=6),
)


def collected(case: Case) -> list[str]:
    """Every song that nobody touched is in the table."""
    if case.outcome.status == 2:
        return []
    table = (case.folder / "out/collected/tracks.csv").read_text("utf-8", "surrogateescape")
    return [f"{path.name} is lost" for path in (case.base / "music").glob("*/*")
            if not case.touched(path.name) and path.name not in table]


