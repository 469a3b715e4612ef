"""``python -m shard_tools.collect --source MUSIC_DIR --out DIR``: makes a data set to pack of a music library.

The tags of all files first, then the covers of the albums, then the vectors, which take hours and are cached file by
file. All but the vectors is made anew by every run, and so may change between two.
"""

from __future__ import annotations

import shlex
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from tqdm import tqdm

from shard_tools import cli, extractors
from shard_tools.cli import Range, checked
from shard_tools.core.errors import BadFileError
from shard_tools.core.extras import need
from shard_tools.core.locks import lock_output
from shard_tools.core.parallel import Distributor, Pool, available_workers
from shard_tools.core.quarantine import Drop, show_reasons, verdict, write_quarantine
from shard_tools.dataset.genres import read_map
from shard_tools.dataset.layout import AUDIO_SUFFIXES
from shard_tools.extractors.audio import SHORTEST, extract_excerpts
from shard_tools.music.albums import Track, make_tracks
from shard_tools.music.collection import CollectedTrack, begin, write_collection
from shard_tools.music.covers import CoverTask, cover_candidates, cover_source, make_cover
from shard_tools.music.excerpt_cache import ExtractTask, cache_path, extract_all, is_cached
from shard_tools.music.library import Library, walk
from shard_tools.music.tags import Tags, read_many

CHUNK = 32  # files whose tags are read in one task
COMPILATION = "compilation"


@checked
def collect(source: str, out: str, extractor: str = "essentia", model: str | None = None,
            excerpt: Annotated[float | None, Range(SHORTEST, 3600)] = 30.0,
            excerpts: Annotated[int, Range(1, 1000)] = 1, genre_map: str | None = None,
            no_compilations: bool = False, keep_coverless: bool = False,
            cover_side: Annotated[int, Range(16, 8192)] = 1024,
            max_pixels: Annotated[int, Range(1, 178_000_000)] = 64_000_000,
            max_failure_rate: Annotated[float, Range(0, 1)] = 0.05,
            workers: Annotated[int | None, Range(1, 1024)] = None, distributor: Distributor = "processes") -> int:
    """Turns a music library (mp3, flac, ogg, opus, m4a, wav) into covers and vectors; the library is only read.

    Writes {cover,audio}/<genre>/, tracks.csv, and quarantine.jsonl, which names every file left out and why. The same
    command again goes on where it stopped, and adds what the library has got since. Returns 1 when too many files
    were left out, else 0.

    Args:
        source: folder of music; links in it are followed.
        out: folder to write to; new, empty, or left by this command.
        extractor: what computes a vector of audio: essentia or clap.
        model: of clap, a name on the hub or a folder.
        excerpt: seconds of a track to take, from its middle; none = all of it (35 MB of memory a minute).
        excerpts: at most so many excerpts a track, evenly spread; each is a sample.
        genre_map: CSV file of lines tag,genre, which come before the built-in map.
        no_compilations: leave out compilations.
        keep_coverless: keep the vectors of tracks without a cover.
        cover_side: longest side of a cover in pixels; larger ones are made smaller.
        max_pixels: pictures of more pixels are not taken.
        max_failure_rate: share of files left out, compilations aside, above which the exit status is 1.
        workers: processes; none = one a core, 12 at most. Of ray: tasks at a time; none = the cluster's cores.
        distributor: processes of this machine, or ray: the machines of a Ray cluster, which all must see source and
            out under the same names.
    """
    started = time.monotonic()
    if model and extractor != "clap":
        raise ValueError(f"--model is an option of --extractor clap, not of {extractor}")
    if excerpts > 1 and excerpt is None:
        raise ValueError(f"--excerpts {excerpts} needs the length of one: --excerpt 30")
    need("audio", "mutagen", "av")
    loaded = extractors.load(extractor, **({"model": model} if model else {}))
    if loaded.of_audio is None:
        raise ValueError(f"--extractor {extractor} does not read audio files; essentia and clap do")
    part = {} if excerpt is None else {"seconds": float(excerpt), "count": excerpts}
    schema = replace(loaded.schema, excerpt=part)
    own = read_map(Path(genre_map)) if genre_map else {}
    source_path, root = Path(source).resolve(), Path(out).resolve()
    if not source_path.is_dir():
        raise ValueError(f"--source {source} is not a folder; expected one of music files")
    if root == source_path or source_path in root.parents:
        raise ValueError(f"--out {out} lies in --source {source}, which is never written to; choose another folder")
    root.mkdir(parents=True, exist_ok=True)
    with lock_output(root):
        work = begin(root, schema)
        pool = Pool(workers or available_workers(distributor), distributor, (source_path, work))
        library = walk(source_path, AUDIO_SUFFIXES)
        drops = list(library.drops)
        tracks = make_tracks(_read_all_tags(source_path, library, drops, pool))
        if no_compilations:
            tracks = _without_compilations(tracks, drops)
        caches = {entry.path: cache_path(work / "excerpts", entry, schema.sha256, part) for entry in library.songs}
        task = CoverTask(source_path, work / "covers", (), cover_side, max_pixels)
        collected = _with_covers(tracks, library, task, caches, drops, keep_coverless, pool)
        extract = partial(extract_excerpts, extractor, schema.options, excerpt, excerpts)
        new = [ExtractTask(source_path, track.track.path, extract, track.cache)
               for track in collected if not is_cached(track.cache)]
        bad = {}
        with tqdm(total=len(collected), initial=len(collected) - len(new), desc="audio", unit=" tracks",
                  smoothing=0.05) as bar:
            for todo, error in extract_all(new, pool):
                bar.update()
                if error:
                    bad[todo.path] = Drop(todo.path, "audio", error.reason, error.detail)
        drops += bad.values()
        collected = [track for track in collected if track.track.path not in bad]
        write_quarantine(root, drops)
        if not collected:
            show_reasons(root, drops, "left out")
            raise ValueError(f"--source {source}: of its {len(library.songs):,} audio files "
                             f"({', '.join(AUDIO_SUFFIXES)}) none can be collected")
        rows = write_collection(root, collected, own, schema)
        _report(root, library, collected, rows, drops, time.monotonic() - started)
        return verdict(sum(drop.reason != COMPILATION for drop in drops), len(collected),
                       max_failure_rate, "{:,} files left out to {:,} tracks", "all others are collected")


def _read_all_tags(source: Path, library: Library, drops: list[Drop], pool: Pool) -> dict[str, Tags]:
    """The tags of each file by its path; what can't be read is added to the drops."""
    paths = [entry.path for entry in library.songs]
    chunks = [paths[i:i + CHUNK] for i in range(0, len(paths), CHUNK)]
    found: dict[str, Tags] = {}
    with tqdm(total=len(paths), desc="tags", unit=" files", smoothing=0.05) as bar:
        read = pool.run(partial(read_many, source), chunks)
        for chunk, results in zip(chunks, read, strict=True):
            for path, result in zip(chunk, results, strict=True):
                if isinstance(result, BadFileError):
                    drops.append(Drop(path, "tags", result.reason, result.detail))
                else:
                    found[path] = result
            bar.update(len(chunk))
    return found


def _without_compilations(tracks: list[Track], drops: list[Drop]) -> list[Track]:
    """All but the albums that any of their tracks calls a compilation; of a mere folder, all but those tracks."""
    albums = {track.album for track in tracks if track.tags.compilation and track.album.by != "folder"}
    rest = []
    for track in tracks:
        if track.album in albums or track.tags.compilation:
            drops.append(Drop(track.path, "tags", COMPILATION, track.tags.album or "its tags say so"))
        else:
            rest.append(track)
    return rest


def _with_covers(tracks: list[Track], library: Library, task: CoverTask, caches: dict[str, Path], drops: list[Drop],
                 keep_coverless: bool, pool: Pool) -> list[CollectedTrack]:
    """Makes the covers; returns the tracks with theirs, and those without where they are wanted."""
    albums: dict[str, list[Track]] = defaultdict(list)
    for track in tracks:
        albums[track.album.id].append(track)
    entries = {entry.path: entry for entry in library.songs}
    tasks = {path: replace(task, candidates=found) for album in albums.values()
             for path, found in cover_candidates(album, entries, library).items()}
    once = list(dict.fromkeys(tasks.values()))
    made = pool.run(make_cover, once)
    covers = dict(zip(once, tqdm(made, total=len(once), desc="covers", unit=" covers", smoothing=0.05), strict=True))
    collected = []
    for track in tracks:
        task, cache = tasks[track.path], caches[track.path]
        chosen, problems = covers[task]
        if chosen >= 0:
            candidate = task.candidates[chosen]
            source = cover_source(track, candidate)
            collected.append(CollectedTrack(track, cache, task.path, source, candidate.entry.path))
        elif keep_coverless:
            collected.append(CollectedTrack(track, cache))
        else:
            drops.append(Drop(track.path, "cover", "no cover", problems or "no picture in its tags or beside it"))
    return collected


def _report(root: Path, library: Library, tracks: list[CollectedTrack], rows: list[list[str]], drops: list[Drop],
            seconds: float) -> None:
    albums = Counter(track_album.by for track_album in {track.track.album for track in tracks})
    kinds = {"release": "by MusicBrainz release", "tags": "by album artist and title", "folder": "by folder"}
    print(f"tracks  {len(tracks):9,} of {len(library.songs):,} audio files, {len(rows):,} samples")
    print(f"albums  {albums.total():9,}: " + ", ".join(f"{albums[kind]:,} {text}" for kind, text in kinds.items()))
    for genre, count in sorted(Counter(row[0] for row in rows).items(), key=lambda pair: (-pair[1], pair[0])):
        print(f"genre   {count:9,}  {genre}")
    show_reasons(root, drops, "left out")
    print(f"in {seconds:.1f} s")
    folder, split, shards = (shlex.quote(f"{root}{end}") for end in ("", "_split", "_shards"))
    print(f"next: python -m shard_tools.dedup --source {folder} --apply group\n"
          f"      python -m shard_tools.split --source {folder} --out {split}\n"
          f"      python -m shard_tools.pack --source {split} --out {shards} --resolution 64")


if __name__ == "__main__":
    cli.run(collect)
