"""Makes demo data in the thesis's layout, with a known audio -> cover truth.

    OUT/audio-cover_dataset/{cover,audio}/{train,val,test}/<genre>/<stem>.{jpg,npy}   one pair a track
    OUT/cover_dataset/{train,val,test}/<genre>/<stem>.jpg                             one cover an album
    OUT/attributes.npz                                                                the truth
    OUT/demo.json                                                                     written last: the demo is whole

``attributes.npz`` holds, with one row a track (N tracks, albums in order, an album's tracks together):

    stems, split, genre    [N] str    file stem, split and genre folder
    album                  [N] int64  the album's number; rows of one album share a cover
    attributes             [N, 8] float32  the truth as standardised reals (mean 0, variance 1 over all albums)
    drawn                  [N, 8] float32  what the cover shows, in the units of world.RANGES; a monotone function of
                           ``attributes``, but for shape_count, which is whole; compare what a reader reads with this
    shape                  [N] str    kind of shape, genre xor a coin: independent of the audio
    album_latent, track_latent  [N, 8] float32  attributes = standardised(rotation @ album_latent + noise)
    presence               [N, 2] bool which of the vector's two blocks is there (the other is zeros)

and of the whole world: ``attribute_names`` [8] str, ``attribute_ranges`` [8, 2], ``rotation`` [8, 8], ``genre_names``
[16] str (sorted, as labels are) with ``genre_means`` [16, 8], and of the vector's columns ``column_unit`` [1160] str,
``column_scale`` [1160] and ``column_nuisance`` [1160] bool (True: the column knows nothing of the track latent).
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from shard_tools import cli
from shard_tools.core.files import read_bounded, write_atomically
from shard_tools.dataset import demo_world as worlds
from shard_tools.dataset.layout import SPLITS
from shard_tools.dataset.vectors import write_vector

VERSION = 1  # of the world: raise it whenever the same options give other bytes
Tier = Literal["toy", "std", "hard"]
TIERS = {
    "toy": {"resolution": 32, "albums": 4_000, "noise": 1.0},
    "std": {"resolution": 64, "albums": 20_000, "noise": 1.0},
    "hard": {"resolution": 64, "albums": 20_000, "noise": 2.0},
}
Resolution = Annotated[int | None, cli.Range(16, 256)]
Albums = Annotated[int | None, cli.Range(1, 10**7)]
Seed = Annotated[int, cli.Range(0, 2**63 - 1)]
DONE, BEGUN = "demo.json", ".demo.begun.json"


@cli.checked
def options_of(tier: Tier = "toy", resolution: Resolution = None, albums: Albums = None, seed: Seed = 0) -> dict:
    """What decides the bytes of a demo: the tier's options overruled by the given ones; ValueError for bad ones."""
    if tier not in TIERS:
        raise ValueError(f"--tier: {tier!r} is not a choice, {cli.nearest(str(tier), get_args(Tier))}")
    given = {"resolution": resolution, "albums": albums}
    return {**TIERS[tier], "seed": seed, "version": VERSION,
            **{name: value for name, value in given.items() if value is not None}}


def is_finished(out: str | Path, options: dict[str, Any]) -> bool:
    """Whether the folder holds this very demo, whole; False where it may be written, ValueError for anything else."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, expected a folder that is new or empty")
    names = {path.name for path in (out.iterdir() if out.exists() else ())} - {f".{DONE}.tmp", f".{BEGUN}.tmp"}
    if not names:
        return False
    marker = DONE if DONE in names else BEGUN
    if marker not in names:
        raise ValueError(f"--out: {out} already holds {sorted(names)[0]!r}, which is no demo; choose a new folder")
    try:
        metadata = json.loads(read_bounded(out / marker))
        found = dict(metadata["options"])
        if marker == DONE and not all(isinstance(metadata[name].get(split, 0), int)
                                      for name in ("albums", "tracks") for split in SPLITS):
            raise ValueError("its counts are no numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"--out: {out / marker} can't be read ({error}); choose a new folder") from None
    if found != options:
        other = ", ".join(f"{name} {found.get(name)} instead of {value}"
                          for name, value in options.items() if found.get(name) != value)
        raise ValueError(f"--out: {out} already holds a demo with {other}; choose a new folder or delete that one")
    return marker == DONE


def make(out: str | Path, tier: Tier = "toy", resolution: int | None = None, albums: int | None = None,
         seed: int = 0) -> None:
    """Makes the demo in a folder that is new, empty, or holds an interrupted try at the same; a whole one stays."""
    options = options_of(tier, resolution, albums, seed)
    out = Path(out)
    if is_finished(out, options):
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / BEGUN, json.dumps({"options": options}).encode())
    roots = [out / name for name in ("audio-cover_dataset/cover", "audio-cover_dataset/audio", "cover_dataset")]
    for folder in (root / split / genre for root in roots for split in SPLITS for genre in worlds.GENRES):
        folder.mkdir(parents=True, exist_ok=True)
    world = worlds.make_world(seed, options["noise"])
    genres = worlds.genres_of(seed, options["albums"])
    # 80/10/10 within each genre, by the albums before it, never by those after; early: small genres are in every split.
    seen, splits = Counter(), []
    for genre in genres.tolist():
        splits.append({1: "val", 2: "test"}.get(seen[genre] % 10, "train"))
        seen[genre] += 1
    rows: list[dict[str, Any]] = []
    for number in tqdm(range(options["albums"]), unit="cover", desc="demo", file=sys.stderr):
        album = worlds.make_album(world, number, int(genres[number]))
        cover = worlds.encode(worlds.paint(album, options["resolution"]))
        covers, vectors, alone = (f"{root}/{splits[number]}/{album.genre}" for root in roots)
        files = [(f"{alone}/{album.stems[0]}.jpg", cover)]
        for stem, vector in zip(album.stems, album.vectors, strict=True):
            files += [(f"{covers}/{stem}.jpg", cover), (f"{vectors}/{stem}.npy", write_vector(vector))]
        for path, data in files:
            with open(path, "wb", buffering=0) as file:
                file.write(data)
        rows.append({
            "stems": album.stems, "split": splits[number], "genre": album.genre, "album": number,
            "attributes": album.attributes, "drawn": album.drawn, "shape": worlds.SHAPES[album.shape],
            "album_latent": album.latent, "track_latent": album.track_latents, "presence": album.presence,
        })
    write_atomically(out / "attributes.npz", _truth(world, rows))
    tracks = Counter(row["split"] for row in rows for _ in row["stems"])
    metadata = {"options": options, "albums": Counter(splits), "tracks": tracks}
    write_atomically(out / DONE, (json.dumps(metadata, indent=1) + "\n").encode())
    (out / BEGUN).unlink()


def _truth(world: worlds.World, rows: list[dict[str, Any]]) -> bytes:
    """``attributes.npz``, from one row an album."""
    tracks = [len(row["stems"]) for row in rows]
    columns: dict[str, np.ndarray] = {"stems": np.array([stem for row in rows for stem in row["stems"]])}
    for name in ("split", "genre", "album", "attributes", "drawn", "shape", "album_latent"):
        columns[name] = np.repeat(np.array([row[name] for row in rows]), tracks, axis=0)
    for name in ("track_latent", "presence"):
        columns[name] = np.concatenate([row[name] for row in rows])
    order = [worlds.GENRES.index(genre) for genre in worlds.LABELS]
    columns |= {
        "attribute_names": np.array(worlds.ATTRIBUTES), "attribute_ranges": np.array(list(worlds.RANGES.values())),
        "rotation": world.rotation, "genre_names": np.array(worlds.LABELS), "genre_means": world.genre_means[order],
        "column_unit": np.array(worlds.UNIT_NAMES)[world.unit], "column_scale": world.scale,
        "column_nuisance": world.is_nuisance,
    }
    for name in ("attributes", "drawn", "album_latent", "track_latent"):
        columns[name] = columns[name].astype(np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **columns)
    return buffer.getvalue()


def main(out: str, tier: Tier = "toy", resolution: Resolution = None, albums: Albums = None, seed: Seed = 0) -> None:
    """Makes demo data: a procedural world whose covers follow their audio in eight known attributes.

    The same options give the same bytes. OUT gets the thesis's folders (audio-cover_dataset, cover_dataset) and
    attributes.npz, the truth per stem.

    Args:
        out: Folder for the demo; new, empty, or holding an interrupted try at the same demo.
        tier: toy is 4,000 albums at 32 px, std 20,000 at 64 px, hard is std with twice the noise.
        resolution: Side of the covers in pixels, 16 to 256, instead of the tier's.
        albums: Number of albums, instead of the tier's.
        seed: Another seed is another world.
    """
    was_there = is_finished(out, options_of(tier, resolution, albums, seed))
    began = time.perf_counter()
    make(out, tier, resolution, albums, seed)
    seconds = time.perf_counter() - began
    metadata = json.loads((Path(out) / DONE).read_bytes())
    total, tracks = (sum(metadata[name].get(split, 0) for split in SPLITS) for name in ("albums", "tracks"))
    print(f"{out}: this very demo was already there" if was_there else
          f"{out}: made {total / seconds:,.0f} covers/s with their tracks' files")
    print(f"{total:,} albums, {tracks:,} tracks: " + ", ".join(
        f"{split} {metadata['albums'].get(split, 0):,} / {metadata['tracks'].get(split, 0):,}" for split in SPLITS))
    print(f"next: python -m shard_tools.pack --source {out} --out SHARDS")


if __name__ == "__main__":
    cli.run(main)
