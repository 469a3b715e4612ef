"""Shows what a folder of shards holds, draws its covers or unpacks it: ``python -m shard_tools.inspect DIR``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from shard_tools import cli
from shard_tools.core.errors import BadFileError
from shard_tools.core.files import open_regular, write_atomically
from shard_tools.core.text import printable
from shard_tools.dataset.contact_sheet import Row, Tile, draw_sheet
from shard_tools.dataset.demo_truth import TRUTH
from shard_tools.dataset.images import read_cover
from shard_tools.dataset.layout import make_key, read_key
from shard_tools.remote.filesystem import is_remote
from shard_tools.remote.index_cache import resolve
from shard_tools.shards.index import Index, check_metadata, is_plain_name, open_index, row_problems, splits_in
from shard_tools.shards.tar import read_sample

COLUMNS, LINES = 8, 6


def inspect(shards: str, preview: str | None = None, unpack: str | None = None, split: str | None = None) -> int:
    """Shows what a folder of shards holds: samples, genres, sizes of groups (albums), audio, drops.

    Args:
        shards: the folder, or its URL (without preview and unpack).
        preview: also draw 48 covers with their genres into this PNG.
        unpack: also write every sample back as <split>/<genre>/<stem>.jpg and .npy below this new or empty folder.
        split: only this one; none = all (the preview shows the first).
    """
    if is_remote(shards) and (preview or unpack):
        raise ValueError(f"{shards}: --preview and --unpack read covers; copy the shards to this machine first")
    root = resolve(shards)
    if not (have := list(splits_in(root))):
        raise ValueError(f"{root} holds no <split>.index.json; expected a folder that shard_tools.pack has finished")
    indexes = [open_index(root, name) for name in ([split] if split else have)]
    for index in indexes:
        try:
            check_metadata(index.metadata, index.split)
        except ValueError as error:
            raise ValueError(f"{root}/{index.split}.index.json: {error}") from None
        if problems := row_problems(index):
            raise ValueError(f"{root}/{index.split}.index.npy: {problems[0]}; see shard_tools.verify")
    if preview and (Path(preview).is_dir() or not Path(preview).absolute().parent.is_dir()):
        raise ValueError(f"--preview {preview}: expected the name of a PNG file in a folder that exists")
    if unpack and Path(unpack).is_file():
        raise ValueError(f"--unpack {unpack}: expected a new or empty folder, found a file")
    print("\n".join(_tables(indexes)))
    if preview:
        draw_preview(indexes[0], Path(preview))
        print(f"\n{indexes[0].split} covers drawn in {preview}")
    if unpack:
        print(f"\n{unpack_shards(indexes, Path(unpack)):,} samples written below {unpack}")
    return 0


def _tables(indexes: list[Index]) -> Iterator[str]:
    metadata = indexes[0].metadata
    yield f"{'split':7} {'samples':>10} {'groups':>10} {'shards':>7} {'MB':>10}"
    for index in indexes:
        size = sum(shard["bytes"] for shard in index.metadata["shards"]) / 1e6
        yield (f"{index.split:7} {len(index.rows):10,} {index.metadata['groups']:10,} "
               f"{len(index.metadata['shards']):7,} {size:10,.1f}")
    audio = metadata["audio"]
    yield f"\ncovers  {metadata['resolution']} x {metadata['resolution']} JPEG"
    if audio is None:
        yield "audio   none"
    else:
        blocks = ", ".join(f"[{start}, {end}) present in {count:,}"
                           for (start, end), count in zip(audio["blocks"], audio["block_counts"], strict=True))
        yield f"audio   {audio['dimension']} numbers; blocks of {audio['statistics_of']}: {blocks}"
        if known := audio.get("features"):
            yield f"        of {known['features']} {known['version']}, hash {known['sha256'][:12]}"
        yield f"        std from {min(audio['std']):.3g} to {max(audio['std']):.3g}"
    if (indexes[0].root / TRUTH).is_file():
        yield f"truth   {TRUTH}: what the demo's covers show"
    width = max(5, *(len(printable(genre)) for genre in metadata["genres"]))
    yield f"\n{'genre':{width}} " + " ".join(f"{index.split:>10}" for index in indexes)
    for genre in metadata["genres"]:
        counts = " ".join(f"{index.metadata['genre_counts'].get(genre, 0):10,}" for index in indexes)
        yield f"{printable(genre):{width}} {counts}"
    for index in indexes:
        yield f"\nsamples a group ({index.split})"
        yield from _histogram(np.unique(index.rows["group"], return_counts=True)[1])
    if metadata["drops"]:
        yield "\ndropped"
        yield from (f"{count:10,}  {printable(reason)}" for reason, count in metadata["drops"].items())


def _histogram(sizes: np.ndarray) -> Iterator[str]:
    """Text bars: group sizes 1 to 8 each, then by doubling."""
    edges = [*range(1, 10)]
    while edges[-1] <= sizes.max():
        edges.append(edges[-1] * 2 - 1 if edges[-1] > 9 else 17)
    counts = np.histogram(sizes, edges)[0]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            label = str(low) if high == low + 1 else f"{low}-{high - 1}"
            yield f"{label:>9} {count:10,}  {'#' * max(1, round(50 * count / counts.max()))}"


def draw_preview(index: Index, path: Path) -> None:
    """Draws 8 x 6 covers with their genres below: of each genre the same number, its first in the order of the shards.
    """
    tiles = [Tile(Image.fromarray(read_cover(_read(index, row)[1])), [index.metadata["genres"][row["genre"]]])
             for row in index.rows[_every_genre(index.rows, COLUMNS * LINES)]]
    rows = [Row(tiles[start:start + COLUMNS]) for start in range(0, len(tiles), COLUMNS)]
    write_atomically(path, draw_sheet(rows, COLUMNS))


def _every_genre(rows: np.ndarray, count: int) -> list[int]:
    """Up to ``count`` rows of different albums: the first of every genre, then the second and so on; by genre."""
    firsts = np.sort(np.unique(rows["group"], return_index=True)[1])
    genres = rows["genre"][firsts]
    order = np.argsort(genres, kind="stable")
    rank = np.arange(len(order)) - np.searchsorted(genres[order], genres[order])  # of a row within its genre
    chosen = order[np.argsort(rank, kind="stable")[:count]]
    return firsts[np.sort(chosen)][np.argsort(genres[np.sort(chosen)], kind="stable")].tolist()


def unpack_shards(indexes: list[Index], out: Path) -> int:
    """Writes covers and vectors as they lie in the shards into an empty folder; returns the number of samples."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ValueError(f"--unpack {out} is not empty; choose a new folder")
    for index in indexes:
        for row in tqdm(index.rows, desc=index.split, unit=" samples"):
            key, cover, audio = _read(index, row)
            folder = out / index.split / index.metadata["genres"][row["genre"]]
            folder.mkdir(parents=True, exist_ok=True)
            for data, kind in ((cover, ".jpg"), (audio, ".npy")):
                if data:
                    with open(folder / (_file_stem(key) + kind), "xb") as file:  # x: nothing is ever replaced
                        file.write(data)
    return sum(len(index.rows) for index in indexes)


def _read(index: Index, row: np.void) -> tuple[str, bytes, bytes]:
    """As ``read_sample``; ValueError, with the name of the shard, where it does not hold what its index says."""
    path = index.shards[row["shard"]]
    try:
        with open_regular(path) as file:
            return read_sample(file, row)
    except (OSError, BadFileError) as error:
        what = error.detail if isinstance(error, BadFileError) else error.strerror
        raise ValueError(f"{path}: {what}; see shard_tools.verify --full") from None


def _file_stem(key: str) -> str:
    """The stem that the key was made of, or the key where that could not be a file's name, or would mean another."""
    stem = read_key(key)
    good = is_plain_name(stem) and not stem.startswith(".") and len(os.fsencode(stem)) <= 250
    return stem if good and "~" not in key and make_key(stem) == key else key


if __name__ == "__main__":
    cli.run(inspect)
