"""``python -m shard_tools.dedup --source DIR``: finds covers that a data set has twice; a table and a contact sheet.

Three kinds of duplicates: the same bytes, the same picture (dHash), and near ones (tiny images); pairs of the last two
are compared more closely before they count. Without ``--apply`` nothing in the data set changes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image
from tqdm import tqdm

from shard_tools import cli
from shard_tools.cli import Range, checked
from shard_tools.core.files import write_atomically
from shard_tools.core.parallel import available_workers
from shard_tools.core.quarantine import QUARANTINE, Drop, show_reasons, write_quarantine
from shard_tools.core.tables import table_bytes
from shard_tools.curation.clusters import WHY, File, Member, count_groups, find_clusters, merge_groups
from shard_tools.curation.fingerprints import DistinctCovers, fingerprint_files
from shard_tools.curation.removal import DONE, drop_files, finish
from shard_tools.dataset.contact_sheet import Row, Tile, draw_sheet
from shard_tools.dataset.groups import FILE as GROUPS
from shard_tools.dataset.groups import write_groups
from shard_tools.dataset.images import COVER_BYTES, MAX_PIXELS, read_cover
from shard_tools.dataset.layout import Listing, album_of, open_layout, read_name
from shard_tools.dataset.source import Folder, open_source, read_entry

COLUMNS = ("cluster", "genre", "stem", "path", "why", "distance", "keep")
TABLE, SHEET, CACHE = "clusters.csv", "clusters.png", ".fingerprints"
ROWS, ACROSS = 20, 8


@checked
def dedup(source: str, out: str | None = None, distance: Annotated[int, Range(0, 16)] = 4,
          apply: Literal["no", "group", "keep-one"] = "no", dataset: Literal["auto", "audio-cover", "cover"] = "auto",
          max_pixels: Annotated[int, Range(1, 178_000_000)] = MAX_PIXELS,
          workers: Annotated[int | None, Range(1, 1024)] = None) -> int:
    """Finds covers that show the same picture in different albums, and on request keeps them together or drops them.

    Writes OUT/clusters.csv (a line for each cover of each cluster), OUT/clusters.png (pictures of the largest clusters)
    and OUT/quarantine.jsonl (covers that can't be read). Tracks of one album share their cover by right: a
    cluster has covers of two albums at least (or of single files, where names tell no album).

    Args:
        source: folder or zip, in any layout that shard_tools.pack reads.
        out: folder of the report; none = SOURCE.dedup beside SOURCE.
        distance: bits of 64 in which the dHashes of the same picture may differ.
        apply: no; group (write SOURCE/groups.csv, so that pack and split take each cluster for one album); or keep-one
            (move all but one album of each cluster, covers and vectors, to SOURCE.dropped: the one with the largest
            picture stays, then with the most tracks, then the first by name).
        dataset: audio-cover, cover (covers without vectors), or auto: audio-cover where there is one.
        max_pixels: covers of more pixels are bad files.
        workers: processes; none = one a core, 12 at most.
    """
    started = time.monotonic()
    source_path = Path(source).resolve()
    root = Path(out).resolve() if out else source_path.with_name(f"{source_path.name}.dedup")
    dropped = source_path.with_name(f"{source_path.name}.dropped")
    if root == source_path or source_path in root.parents:
        raise ValueError(f"--out {root} lies in --source {source}: the report would become input; choose "
                         "another folder")
    opened = open_source(source_path)
    if apply != "no" and not isinstance(opened, Folder):
        raise ValueError(f"--apply {apply}: {source} is no folder; unpack it first, or ask for the report only")
    if apply == "keep-one" and finish(source_path, dropped):
        print(f"finished what an interrupted run had begun: {dropped / DONE} lists what was moved; its report is whole")
        return 0
    listing = open_layout(opened, dataset)
    files, covers, drops = _fingerprint(listing, source_path, root, max_pixels, workers or available_workers())
    write_quarantine(root, drops)
    if not files:
        raise ValueError(f"--source {source} holds no cover that can be read ({len(drops):,} bad files, named in "
                         f"{root / QUARANTINE})")
    clusters = find_clusters(files, covers, distance)
    write_atomically(root / TABLE, table_bytes(COLUMNS, [
        (number, file.genre, file.stem, file.path, why, distance, "yes" if keep else "no")
        for number, members in enumerate(clusters, 1) for file, why, distance, keep in members]))
    write_atomically(root / SHEET, _sheet(source_path, clusters, max_pixels))
    _report(root, files, covers, clusters, drops, time.monotonic() - started)
    if apply == "group":
        folder, groups = source_path / listing.top, merge_groups(listing.groups, files, clusters)
        if groups == listing.groups:
            print(f"{folder / GROUPS} says so already" if groups else "nothing to group")
        else:
            write_groups(folder, groups)
            print(f"{folder / GROUPS} puts {len(groups):,} covers into {len(set(groups.values())):,} groups; pack and "
                  "split keep each together")
    elif apply == "keep-one":
        if moved := [(entry.path, members[0].file.path) for members in clusters for member in members
                     if not member.keep for entry in (member.file.cover, member.file.audio) if entry]:
            drop_files(source_path, dropped, moved)
        print(f"moved {len(moved):,} files (covers and vectors) to {dropped}; nothing was deleted, {DONE} there says "
              "what stays in their stead" if moved else "nothing to drop")
    elif clusters:
        print("next: the same with --apply group (keep each cluster in one split) or --apply keep-one (drop all but "
              "one of each)")
    return 0


def _fingerprint(listing: Listing, source: Path, root: Path, max_pixels: int,
                 workers: int) -> tuple[list[File], DistinctCovers, list[Drop]]:
    """The samples whose covers can be decoded, their covers, and the files that can't be used."""
    files, drops = [], []
    for item in listing:
        if isinstance(item, Drop):
            drops.append(item)
        else:
            stem = read_name(item.cover.name)[0]
            files.append(File(item.genre, stem, item.cover, item.audio, album_of(stem) or f"{item.genre}/{stem}"))
    files.sort(key=lambda file: (file.group, file.path))  # an album's tracks together: often the same bytes
    covers, errors = fingerprint_files(source, [file.cover for file in files], workers, max_pixels, root / CACHE)
    drops += [Drop(files[i].path, "cover", error.reason, error.detail) for i, error in errors.items()]
    good = [i for i in range(len(files)) if i not in errors]
    return [files[i] for i in good], covers.select(good), drops


def _sheet(source: Path, clusters: Sequence[Sequence[Member]], max_pixels: int) -> bytes:
    """The largest clusters, a row each: one picture of each album, the one that stays first and framed."""
    shown = clusters[:ROWS]
    heading = (f"{source.name}: {len(clusters):,} clusters of covers that look the same"
               + (f", the largest {ROWS}" if len(clusters) > ROWS else "") + "; framed: what --apply keep-one keeps")
    rows = []
    for number, members in enumerate(tqdm(shown, desc="drawing", unit=" clusters"), 1):
        first = {member.file.group: member for member in reversed(members)}
        albums = [first[group] for group in dict.fromkeys(member.file.group for member in members)]
        more = f"; {len(albums) - ACROSS:,} more not shown" if len(albums) > ACROSS else ""
        of = f" of {len(albums):,} albums" if len(albums) < len(members) else ""
        title = f"{number}: {len(members):,} covers{of}{more}"
        rows.append(Row([_tile(source, member, max_pixels) for member in albums[:ACROSS]], title))
    return draw_sheet(rows, ACROSS, heading)


def _tile(source: Path, member: Member, max_pixels: int) -> Tile:
    image = Image.fromarray(read_cover(read_entry(source, member.file.cover, COVER_BYTES), max_pixels))
    link = {"exact": "same bytes", "same": f"same, {member.distance} bits", "near": f"near, L1 {member.distance}"}
    words = ("stays" if member.keep else link[member.why], member.file.genre, member.file.group.rpartition("/")[2])
    return Tile(image, words, member.keep)


def _report(root: Path, files: Sequence[File], covers: DistinctCovers, clusters: Sequence[Sequence[Member]],
            drops: Sequence[Drop], seconds: float) -> None:
    show_reasons(root, drops, "left out")
    kinds = Counter(member.why for members in clusters for member in members)
    print(f"{len(files):,} covers ({len(covers.fingerprints):,} different files) of "
          f"{len({file.group for file in files}):,} albums or single files, in {seconds:.1f} s")
    print(f"{len(clusters):,} clusters hold {sum(map(len, clusters)):,} covers of "
          f"{sum(map(count_groups, clusters)):,} of these: " + ", ".join(f"{why} {kinds[why]:,}" for why in WHY))
    print(f"{root / TABLE} lists them, {root / SHEET} shows the largest")


if __name__ == "__main__":
    cli.run(dedup)
