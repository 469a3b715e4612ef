"""Duplicates among the covers of a data set: files and what they look like in; clusters, and a group for each, out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shard_tools.curation.fingerprints import hamming
from shard_tools.curation.similarity import CHAIN_LIMIT, differences, near_pairs, same_pictures
from shard_tools.dataset.source import Entry

WHY = ("exact", "same", "near")


class File(NamedTuple):
    """A sample: where it belongs, its cover and vector, and its unit: the album that its name tells, else itself."""

    genre: str
    stem: str
    cover: Entry
    audio: Entry | None
    unit: str

    @property
    def path(self) -> str:
        return self.cover.path


class Member(NamedTuple):
    """A file of a cluster. ``why`` and ``distance`` tell its closest link to another picture of the cluster: exact (the
    same bytes, 0), same (bits of the dHash), near (L1 of the thumbnails, levels). ``keep``: whether its unit stays."""

    file: File
    why: str
    distance: int
    keep: bool


def find_clusters(files: Sequence[File], looked: np.ndarray, distance: int) -> list[list[Member]]:
    """Clusters of covers of two units or more that show one picture, the largest first; what stays comes first in each.

    Args:
        files: sound covers.
        looked: ``fingerprints.LOOKED`` ``[len(files)]``.
        distance: bits of the dHash, 0 to 16.
    """
    units = np.unique([file.unit for file in files], return_inverse=True)[1]
    hashes, first, which = np.unique(looked["hash"], return_index=True, return_inverse=True)
    prints = looked["print"][first]
    same = same_pictures(prints, distance)[0]
    near, far = near_pairs(prints)
    new = ~np.isin(near @ [len(hashes), 1], same @ [len(hashes), 1])
    pairs = np.concatenate([same, near[new]])
    kinds = np.repeat([1, 2], [len(same), int(new.sum())])
    apart = np.concatenate([hamming(*prints["dhash"][same.T]), far[new].round().astype(np.int64)])
    labels = without_chains(prints["small"], pairs)
    whys, distances = _closest(labels, pairs, kinds, apart)
    owned = np.unique(np.stack([which, units], 1), axis=0)
    shared = np.bincount(owned[:, 0], minlength=len(hashes)) > 1
    whys[shared], distances[shared] = 0, 0

    label = labels[which]
    parts = np.unique(np.stack([label, units], 1), axis=0)
    places = np.flatnonzero((np.bincount(parts[:, 0]) > 1)[label])
    places = places[np.argsort(label[places], kind="stable")]
    found = []
    for group in np.split(places, np.flatnonzero(np.diff(label[places])) + 1) if len(places) else ():
        best = _best([files[i] for i in group], looked["print"]["pixels"][group])
        members = [Member(files[i], WHY[whys[p]], int(distances[p]), files[i].unit == best)
                   for i, p in zip(group, which[group], strict=True)]
        found.append(sorted(members, key=lambda member: (not member.keep, member.file.unit, member.file.path)))
    return sorted(found, key=lambda members: (-units_in(members), -len(members), members[0].file.path))


def units_in(members: Sequence[Member]) -> int:
    return len({member.file.unit for member in members})


def without_chains(small: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The number of each picture's cluster, int ``[N]``: connected components, cut where they are chains.

    The pictures of a cluster must resemble the one of most links; else two that have nothing in common would be one
    because of a row of others between them.

    Args:
        small: uint8 ``[N, 32, 32, 3]``.
        pairs: int64 ``[P, 2]`` that are one picture.
    """
    while True:
        graph = coo_array((np.ones(len(pairs), np.int8), pairs.T), (len(small), len(small)))
        labels = connected_components(graph, directed=False)[1]
        links = np.bincount(pairs.ravel(), minlength=len(small))
        order = np.lexsort((np.arange(len(small)), -links, labels))
        centres = order[np.unique(labels[order], return_index=True)[1]]
        linked = np.concatenate([pairs[centres[labels[pairs[:, side]]] == pairs[:, side], 1 - side] for side in (0, 1)])
        others = np.setdiff1d(np.flatnonzero(links), np.union1d(linked, centres))
        spokes = np.sort(np.stack([centres[labels[others]], others], 1), axis=1)
        stray = np.zeros(len(small), bool)
        stray[others[differences(small, spokes, CHAIN_LIMIT) >= CHAIN_LIMIT]] = True
        if not stray.any():
            return labels
        pairs = pairs[stray[pairs[:, 0]] == stray[pairs[:, 1]]]


def _closest(labels: np.ndarray, pairs: np.ndarray, kinds: np.ndarray,
             apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kind and distance of each picture's closest link within its cluster, int ``[N]`` each."""
    inside = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    ends = pairs[inside].T.ravel()
    kinds, apart = np.tile(kinds[inside], 2), np.tile(apart[inside], 2)
    order = np.lexsort((apart, kinds, ends))[::-1]
    kind, distance = np.zeros(len(labels), np.int64), np.zeros(len(labels), np.int64)
    kind[ends[order]], distance[ends[order]] = kinds[order], apart[order]  # the closest comes last, and stays
    return kind, distance


def _best(files: Sequence[File], pixels: np.ndarray) -> str:
    """The unit to keep: the one with the largest picture, then with the most tracks, then the first by name."""
    ranks: dict[str, tuple[int, int]] = {}
    for file, size in zip(files, pixels.tolist(), strict=True):
        largest, tracks = ranks.get(file.unit, (0, 0))
        ranks[file.unit] = max(largest, size), tracks + 1
    return min(ranks, key=lambda unit: (-ranks[unit][0], -ranks[unit][1], unit))


def merged_groups(known: dict[tuple[str, str], str], files: Sequence[File],
                  clusters: Sequence[Sequence[Member]]) -> dict[tuple[str, str], str]:
    """``groups.csv``, ``{(genre, stem): group}``, so that all of a cluster, and what hangs on it, bears one name.

    Units of a cluster become one group, and clusters that share a unit; so do groups that were known before. The name
    is the first of those known before, else of the units. Doing it again changes nothing.
    """
    places = {(file.genre, file.stem): 0 for file in files} | known
    bonds = [((file.genre, file.stem), file.unit) for file in files] + list(known.items())
    bonds += [(members[0].file.unit, member.file.unit) for members in clusters for member in members[1:]]
    number = {name: i for i, name in enumerate(dict.fromkeys(name for bond in bonds for name in bond))}
    ends = np.array([[number[one], number[other]] for one, other in bonds], np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), np.int8), ends.T), (len(number), len(number)))
    labels = connected_components(graph, directed=False)[1]
    names: dict[int, str] = {}
    for unit in sorted({member.file.unit for members in clusters for member in members}, reverse=True):
        names[labels[number[unit]]] = unit
    before = {labels[number[group]]: group for group in sorted(set(known.values()), reverse=True)}
    names = {label: before.get(label, name) for label, name in names.items()}
    grouped = {place: names[labels[number[place]]] for place in places if labels[number[place]] in names}
    return {**known, **grouped}
