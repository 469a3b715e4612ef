"""What must not be torn apart: the samples of a data set and what their covers look like in; units of groups out."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shard_tools.core.files import GROUPS_BYTES
from shard_tools.core.text import fold
from shard_tools.curation.assignment import Unit
from shard_tools.dataset.layout import Candidate, Listing, read_name
from shard_tools.dataset.source import read_sidecar

TRACKS = "tracks.csv"
FAMILY = 5  # groups at most that stay together though their covers are different pictures
NO_ARTIST = {"", "various artists", "various", "va", "unknown", "unknown artist", "[unknown]"}


class SplitSample(NamedTuple):
    """One track: its files, its place among the distinct covers, its group, and its artist ("" = doesn't matter)."""

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
    """``{(genre, stem): artist}`` by tracks.csv, spelt alike; various and unknown artists are nobody.

    Raises:
        ValueError: there is no such file, or it doesn't tell.
    """
    data = read_sidecar(listing.source, listing.top, TRACKS, GROUPS_BYTES)
    if data is None:
        raise ValueError(f"--by artist needs a {TRACKS} that tells the artists, beside the data set in --source")
    rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=""))
    if not {"genre", "stem", "artist"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{TRACKS} of --source has the columns {', '.join(rows.fieldnames or ())}; expected genre, "
                         "stem and artist among them")
    artists = {(row["genre"], row["stem"]): fold(row["artist"] or "") for row in rows}
    return {name: artist for name, artist in artists.items() if artist not in NO_ARTIST}


def make_units(samples: Sequence[SplitSample], alike: np.ndarray, lookalikes: np.ndarray,
               known: Mapping[str, str]) -> tuple[list[int], list[Unit]]:
    """The unit of every sample, and the units: groups bound by a cover, by covers that look alike, or by an artist.

    Groups whose covers only seem alike to dHash are different ones. Where there are few of them they stay together all
    the same, which costs nothing; families of hundreds, such as plain black covers, don't, nor do old ones that are
    apart already.

    Args:
        samples: of a data set.
        alike: int64 ``[P, 2]``, places of distinct covers that look alike.
        lookalikes: int64 ``[P, 2]``, places of those that only seem to.
        known: ``{group: split}`` of an earlier run.
    """
    names = sorted({sample.group for sample in samples})
    numbers = {name: number for number, name in enumerate(names)}
    first: dict[Any, int] = {}  # the first group with a cover, or an artist
    shared = [(first.setdefault(key, numbers[sample.group]), numbers[sample.group]) for sample in samples
              for key in (sample.cover, sample.artist) if key != ""]
    group_of = np.array([first[place] for place in range(1 + max(sample.cover for sample in samples))])
    ties = np.concatenate([np.array(shared), group_of[alike]])
    tied = _joined(len(names), ties)
    families = _joined(len(names), np.concatenate([ties, group_of[lookalikes]]))
    sizes, splits = Counter(families), defaultdict(set)
    for name, family in zip(names, families, strict=True):
        splits[family] |= {known[name]} if name in known else set()
    together = {family for family, size in sizes.items() if size <= FAMILY and len(splits[family]) <= 1}
    unit_of = [(1, family) if family in together else (0, tie) for tie, family in zip(tied, families, strict=True)]
    places = {unit: place for place, unit in enumerate(sorted(set(unit_of)))}
    of_sample = [places[unit_of[numbers[sample.group]]] for sample in samples]
    genres: list[dict[str, set[str]]] = [defaultdict(set) for _ in places]
    for place, sample in zip(of_sample, samples, strict=True):
        genres[place][sample.candidate.genre].add(sample.group)
    return of_sample, [Unit(tuple(sorted(set().union(*found.values()))),
                            {genre: len(groups) for genre, groups in found.items()}) for found in genres]


def _joined(count: int, pairs: np.ndarray) -> list[int]:
    """For each number below ``count``, which of the pieces it is in that pairs int ``[P, 2]`` make of them."""
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (count, count))
    return connected_components(graph, directed=False)[1].tolist()
