"""Which groups must stay in one split: connected components of groups by cover, near-duplicates and artist."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from shard_tools.core.files import GROUPS_BYTES
from shard_tools.core.text import fold
from shard_tools.curation.assignment import Component
from shard_tools.curation.clusters import connected
from shard_tools.dataset.layout import Candidate, Listing, read_name
from shard_tools.dataset.source import read_sidecar

TRACKS = "tracks.csv"
COLLISION_GROUPS = 5  # groups at most that stay together though their covers are different pictures
NO_ARTIST = {"", "various artists", "various", "va", "unknown", "unknown artist", "[unknown]"}


class SplitSample(NamedTuple):
    """One track: its files, the number of its distinct cover, its group, and its artist ("" = doesn't matter)."""

    candidate: Candidate
    cover: int
    group: str
    artist: str = ""

    @property
    def name(self) -> tuple[str, str]:
        return name_of(self.candidate)


def name_of(candidate: Candidate) -> tuple[str, str]:
    """(genre, stem), by which the tables beside a data set know it."""
    return candidate.genre, read_name(candidate.cover.name)[0]


def read_artists(listing: Listing) -> dict[tuple[str, str], str]:
    """``{(genre, stem): artist}`` by tracks.csv, in one spelling; without various and unknown artists."""
    data = read_sidecar(listing.source, listing.top, TRACKS, GROUPS_BYTES)
    if data is None:
        raise ValueError(f"--by artist needs a {TRACKS} with the artists, beside the data set in --source")
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=""))
    if not {"genre", "stem", "artist"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{TRACKS} of --source has the columns {', '.join(rows.fieldnames or ())}; expected genre, "
                         "stem and artist among them")
    artists = {(row["genre"], row["stem"]): fold(row["artist"] or "") for row in rows}
    return {name: artist for name, artist in artists.items() if artist not in NO_ARTIST}


def connect_groups(samples: Sequence[SplitSample], duplicates: np.ndarray, collisions: np.ndarray,
                   known: Mapping[str, str]) -> tuple[list[int], list[Component]]:
    """The component of every sample, and the components: groups bound by a cover, near-duplicates or an artist.

    Groups whose covers only collide in dHash are different ones. Where there are few of them they stay together all
    the same, which costs nothing; collisions of hundreds, such as plain black covers, don't, nor do old groups that
    are in two splits already.

    ``duplicates`` and ``collisions`` are int64 ``[P, 2]``, distinct covers that are near-duplicates, and that are not
    though their dHashes are close; ``known`` is ``{group: split}`` of an earlier run.
    """
    names = sorted({sample.group for sample in samples})
    numbers = {name: number for number, name in enumerate(names)}
    first: dict[Any, int] = {}  # the first group with a cover, or an artist
    shared = [(first.setdefault(key, numbers[sample.group]), numbers[sample.group]) for sample in samples
              for key in (sample.cover, sample.artist) if key != ""]
    group_of = np.array([first[cover] for cover in range(1 + max(sample.cover for sample in samples))])
    bonds = np.concatenate([np.array(shared), group_of[duplicates]])
    bound = connected(len(names), bonds).tolist()
    colliding = connected(len(names), np.concatenate([bonds, group_of[collisions]])).tolist()
    sizes, splits = Counter(colliding), defaultdict(set)
    for name, label in zip(names, colliding, strict=True):
        splits[label] |= {known[name]} if name in known else set()
    together = {label for label, size in sizes.items() if size <= COLLISION_GROUPS and len(splits[label]) <= 1}
    label_of = [(1, wide) if wide in together else (0, narrow) for narrow, wide in zip(bound, colliding, strict=True)]
    order = {label: number for number, label in enumerate(sorted(set(label_of)))}
    of_sample = [order[label_of[numbers[sample.group]]] for sample in samples]
    genres: list[dict[str, set[str]]] = [defaultdict(set) for _ in order]
    for number, sample in zip(of_sample, samples, strict=True):
        genres[number][sample.candidate.genre].add(sample.group)
    return of_sample, [Component(tuple(sorted(set().union(*found.values()))),
                                 {genre: len(groups) for genre, groups in found.items()}) for found in genres]
