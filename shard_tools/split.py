"""``python -m shard_tools.split --source DIR --out DIR``: splits a data set into train, val and test, as links.

Nothing in one split gives away anything of another: groups stay whole, and groups with the same or nearly the same
cover stay together.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tqdm import tqdm

from shard_tools import cli
from shard_tools.cli import Range, checked
from shard_tools.core.errors import BadFileError
from shard_tools.core.files import GROUPS_BYTES, TEMPORARY, Way, place_bytes, place_link, write_atomically
from shard_tools.core.parallel import available_workers
from shard_tools.core.quarantine import QUARANTINE, Drop, show_reasons, write_quarantine
from shard_tools.curation.assignment import FILE, Assignment, Component, assign, read_splits, write_splits
from shard_tools.curation.fingerprints import DistinctCovers, fingerprint_files
from shard_tools.curation.grouping import TRACKS, SplitSample, connect_groups, name_of, read_artists
from shard_tools.curation.leakage import MAX_DISTANCE, find_leaks, near_duplicates, show_leaks
from shard_tools.dataset import groups, schema
from shard_tools.dataset.demo_truth import DEMO, TRUTH, find_truth, read_columns, read_truth
from shard_tools.dataset.images import COVER_BYTES
from shard_tools.dataset.layout import SPLITS, Listing, album_of, open_layout
from shard_tools.dataset.source import Zip, open_source, read_entry, read_sidecar

HOW = {"hard": "hard links: the files of --source under a second name", "copy": "copies of --source's files",
       "soft": "soft links to the files of --source, which must stay where it is"}


@checked
def split(source: str, out: str, ratios: Annotated[tuple[float, float, float], Range(0, 100)] = (80.0, 10.0, 10.0),
          seed: Annotated[int, Range(0, 2**63)] = 0, by: Literal["group", "artist"] = "group", link: Way = "hard",
          near: bool = True, distance: Annotated[int, Range(0, 16)] = MAX_DISTANCE,
          min_groups: Annotated[int, Range(1, 10**6)] = 10,
          dataset: Literal["auto", "audio-cover", "cover"] = "auto", previous: str | None = None,
          remember: bool = True, workers: Annotated[int | None, Range(1, 1024)] = None) -> int:
    """Splits the groups (albums) of every genre into train, val and test, whole groups only, and links their files.

    A group is what groups.csv says (of shard_tools.dedup), else the album that the file's name tells, else all tracks
    with the same cover, byte for byte. Groups with the same cover or near-duplicates stay together too. Which split a
    group goes to is remembered in splits.csv, in OUT and in SOURCE: when SOURCE has grown, the same command moves no
    old group, and new ones fill what is short. Ends with a leak check, as of shard_tools.verify --leaks.

    Args:
        source: folder or zip, in any layout that shard_tools.pack reads; splits that it has already are forgotten.
        out: new or empty folder, or one left by the same command.
        ratios: of train, val and test, in percent of the groups of each genre.
        seed: of the choice.
        by: group, or artist: all groups of an artist (tracks.csv tells) stay together too.
        link: hard links (second names of the same files), soft links, or copy; where the disk can't, the next of these.
        near: groups whose covers are near-duplicates stay together; without it they are leaks, if chance parts them.
        distance: bits of 64 in which the dHashes of near-duplicates may differ.
        min_groups: a genre with fewer groups is too small to split, and stays in train.
        dataset: audio-cover, cover (covers without vectors), or auto: audio-cover where there is one.
        previous: a splits.csv to continue; none = those of SOURCE and OUT, if their seed, ratios and --by are these.
        remember: write SOURCE/splits.csv (where SOURCE can be written to).
        workers: processes; none = one a core, 12 at most.

    Returns 1 when the leak check finds something, else 0.
    """
    if len(ratios) != len(SPLITS) or abs(sum(ratios) - 100) > 1e-6:
        raise ValueError(f"--ratios {','.join(f'{ratio:g}' for ratio in ratios)}: expected three numbers that add up "
                         "to 100, such as 80,10,10")
    ratios = tuple(ratio / 100 for ratio in ratios)
    source_path, root = Path(source).resolve(), Path(out).resolve()
    if root == source_path or source_path in root.parents or root in source_path.parents:
        raise ValueError(f"--out {out} and --source {source} lie in each other; choose another folder")
    listing = open_layout(open_source(source_path), dataset)
    samples, covers, drops = _read(listing, source_path, by, workers or available_workers())
    if not samples:
        raise ValueError(f"nothing to split: --source {source} holds no cover"
                         + (" with a vector; see --dataset cover" if listing.paired else ""))
    duplicates, collisions = near_duplicates(covers, distance)
    # What must be the same for an earlier split to be continued.
    rule = f"by {by}, seed {seed}, ratios {'/'.join(f'{100 * ratio:.6g}' for ratio in ratios)}"
    known = _known_splits([Path(previous)] if previous else [source_path / FILE, root / FILE], rule, bool(previous))
    moved = _rename_groups(known, samples, covers)
    bonds = (duplicates, collisions) if near else (duplicates[:0], collisions[:0])
    component_of, components = connect_groups(samples, *bonds, known)
    assignment = assign(components, ratios, seed, min_groups, known)
    splits = [assignment.splits[component] for component in component_of]
    way = _write(root, source_path, listing, samples, splits, drops, link)
    known |= {group: name for component, name in zip(components, assignment.splits, strict=True)
              for group in component.groups}
    if remember and not isinstance(listing.source, Zip) and os.access(source_path, os.W_OK):
        write_splits(source_path / FILE, known, rule)
    write_splits(root / FILE, known, rule)
    _report(root, samples, splits, components, assignment, listing.genres, drops)
    if moved := sorted({*moved, *assignment.reassigned}):
        print(f"warning: {len(moved):,} old group(s) moved, for something new binds them to groups of another split: "
              + ", ".join(moved[:3]))
    if empty := [name for name, ratio in zip(SPLITS, ratios, strict=True) if ratio and name not in splits]:
        print(f"warning: nothing is in {' and '.join(empty)}; with --min_groups 1 small genres are split too")
    print(f"{root}: {HOW[way]}")
    leaks = find_leaks(np.array([SPLITS.index(name) for name in splits]),
                       np.unique([sample.group for sample in samples], return_inverse=True)[1], covers, duplicates,
                       collisions)
    status = show_leaks(leaks, lambda i: "/".join((splits[i], *samples[i].name)))
    print(f"next: python -m shard_tools.pack --source {out} --out SHARDS")
    return status


def _read(listing: Listing, source: Path, by: str,
          workers: int) -> tuple[list[SplitSample], DistinctCovers, list[Drop]]:
    """The samples whose covers can be read, their covers, and the files left out."""
    candidates, drops, before = [], [], {}
    for item in listing:
        if isinstance(item, Drop):
            drops.append(item)
        elif (first := before.setdefault(name_of(item), item)) is not item:
            drops.append(Drop(item.cover.path, "join", "duplicate stem", f"{first.cover.path} came first"))
        else:
            candidates.append(item)
    if len({item.split for item in candidates}) > 1:
        print("--source is split already; that is forgotten, it is split anew")
    artists = read_artists(listing) if by == "artist" else {}
    covers, errors = fingerprint_files(source, [item.cover for item in candidates], workers)
    readable = np.flatnonzero(covers.index >= 0)  # one that can't be decoded is pack's to name
    drops += [Drop(candidates[i].cover.path, "cover", errors[i].reason, errors[i].detail)
              for i in np.flatnonzero(covers.index < 0).tolist()]
    candidates, covers = [candidates[i] for i in readable], covers.select(readable)
    albums: dict[int, str] = {}  # of a cover; tracks whose names tell no album belong to it
    for item, cover in zip(candidates, covers.index.tolist(), strict=True):
        if item.album:
            albums[cover] = min(item.album, albums.get(cover, item.album))
    return [SplitSample(item, cover, item.album or albums.get(cover, covers.group_name(cover)),
                        artists.get(name_of(item), ""))
            for item, cover in zip(candidates, covers.index.tolist(), strict=True)], covers, drops


def _known_splits(paths: Iterable[Path], rule: str, required: bool) -> dict[str, str]:
    """``{group: split}`` of earlier runs by the same rule; of two files the later one counts."""
    known: dict[str, str] = {}
    for path in paths:
        if not required and not path.is_file():
            continue
        splits, made = read_splits(path)
        if made == rule:
            known |= splits
        elif required:
            raise ValueError(f"--previous {path} was made {made or 'of nothing'}; this is to be {rule}")
        else:
            print(f"{path} was made {made}; this is to be {rule}, and does not go on from it")
    return known


def _rename_groups(known: dict[str, str], samples: Sequence[SplitSample], covers: DistinctCovers) -> list[str]:
    """Leaves what got another group since (by dedup, or tags) where it was; returns the old groups that can't stay."""
    moved = []
    for sample in samples:
        for before in (album_of(sample.name[1]), covers.group_name(sample.cover)):
            if before in known and known.setdefault(sample.group, known[before]) != known[before]:
                moved.append(before)
    return moved


def _write(root: Path, source: Path, listing: Listing, samples: Sequence[SplitSample], splits: Sequence[str],
           drops: list[Drop], link: Way) -> Way:
    """Puts every file into its split, unless it is there, and the tables of the data set beside; returns how."""
    files = {f"{part if listing.paired else ''}{name}/{sample.candidate.genre}/{entry.name}": entry
             for sample, name in zip(samples, splits, strict=True)
             for part, entry in (("cover/", sample.candidate.cover), ("audio/", sample.candidate.audio)) if entry}
    ours = {*files, FILE, groups.FILE, TRACKS, TRUTH, DEMO, QUARANTINE, f"audio/{schema.FILE}"}
    for folder, _, names in os.walk(root):
        for path in ((Path(folder) / name).relative_to(root) for name in names):
            if path.as_posix() not in ours and not (path.name[0] == "." and path.suffix == ".tmp"):
                raise ValueError(f"--out {root} holds {path}, which this split would not put there; choose another")
    for folder in sorted({path.rpartition("/")[0] for path in files}):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / TEMPORARY).unlink(missing_ok=True)
    ways: Counter[Way] = Counter()
    for path, entry in tqdm(files.items(), desc="placing", unit=" files"):
        if not isinstance(listing.source, Zip):
            ways[place_link(source / entry.path, root / path, link)] += 1
            continue
        ways["copy"] += 1
        try:
            place_bytes(read_entry(source, entry, COVER_BYTES), root / path)
        except BadFileError as error:
            drops.append(Drop(entry.path, "copy", error.reason, error.detail))
    _write_tables(root, source, listing, samples, splits)
    write_quarantine(root, drops)
    return ways.most_common(1)[0][0]


def _write_tables(root: Path, source: Path, listing: Listing, samples: Sequence[SplitSample],
                  splits: Sequence[str]) -> None:
    """Copies groups, tracks, the vectors' schema, and the truth of a demo with the new splits."""
    for name in (groups.FILE, TRACKS):
        data = read_sidecar(listing.source, listing.top, name, GROUPS_BYTES)
        if data is not None:
            write_atomically(root / name, data)
    found = schema.find_schema(listing.source, listing.top, listing.audio_folders())
    if found and listing.paired:
        schema.write_schema(root / "audio", found)
    entry = find_truth(listing)
    if entry:
        columns = read_columns(read_truth(source, entry), entry.path)
        moved = {sample.name: name for sample, name in zip(samples, splits, strict=True)}
        rows = zip(columns["genre"].tolist(), columns["stems"].tolist(), columns["split"].tolist(), strict=True)
        columns["split"] = np.array([moved.get((genre, stem), before) for genre, stem, before in rows])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **columns)
        write_atomically(root / TRUTH, buffer.getvalue())
        write_atomically(root / DEMO, read_sidecar(listing.source, entry.path.rpartition("/")[0], DEMO, 2**20) or b"")


def _report(root: Path, samples: Sequence[SplitSample], splits: Sequence[str], components: Sequence[Component],
            assignment: Assignment, genres: Sequence[str], drops: Sequence[Drop]) -> None:
    in_groups: Counter[tuple[str, str]] = Counter()
    for component, name in zip(components, assignment.splits, strict=True):
        in_groups.update({(genre, name): count for genre, count in component.genres.items()})
    in_samples = Counter((sample.candidate.genre, name) for sample, name in zip(samples, splits, strict=True))
    width = max(5, *map(len, genres))
    print(f"{'genre':{width}} {'groups':>8} {'samples':>9}   % of the groups, (of the samples) in {', '.join(SPLITS)}")
    for genre in genres:
        totals = [sum(counts[genre, name] for name in SPLITS) for counts in (in_groups, in_samples)]
        many, few = (max(total, 1) for total in totals)
        cells = (f"{100 * in_groups[genre, name] / many:6.2f} ({100 * in_samples[genre, name] / few:6.2f})"
                 for name in SPLITS)
        print(f"{genre:{width}} {totals[0]:8,} {totals[1]:9,}   {'  '.join(cells)}"
              + ("  too small, stays in train" if genre in assignment.small else ""))
    total = Counter(splits)
    print(", ".join(f"{name} {total[name]:,}" for name in SPLITS) + f" of {len(samples):,} samples")
    largest = max(components, key=lambda component: len(component.groups))
    if bound := sum(len(component.groups) for component in components if len(component.groups) > 1):
        print(f"{bound:,} groups are bound to others; the most in one piece are {len(largest.groups):,}, with "
              f"{largest.groups[0]}")
    show_reasons(root, drops, "left out")


if __name__ == "__main__":
    cli.run(split)
