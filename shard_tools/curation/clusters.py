"""Clusters of covers that show one picture in different groups, and one name of a group for each cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from shard_tools.curation.fingerprints import DistinctCovers
from shard_tools.curation.similarity import (
    CHAIN_LIMIT,
    differences,
    duplicates_by_hash,
    duplicates_by_tiny_image,
    hamming,
)
from shard_tools.dataset.source import Entry

WHY = ("exact", "same", "near")


class File(NamedTuple):
    """A sample: its genre, stem, cover and vector, and its group: the album that its name tells, else itself."""

    genre: str
    stem: str
    cover: Entry
    audio: Entry | None
    group: str

    @property
    def path(self) -> str:
        return self.cover.path


class Member(NamedTuple):
    """A file of a cluster, and its closest link to another picture of it."""

    file: File
    why: str  # ``exact`` (the same bytes), ``same`` (by dHash) or ``near`` (by tiny image)
    distance: int  # 0, bits of the dHash, or L1 of the tiny images in levels
    keep: bool  # whether its group stays


def find_clusters(files: Sequence[File], covers: DistinctCovers, distance: int) -> list[list[Member]]:
    """Clusters of covers of two groups or more that show one picture, the largest first, in each what stays.

    The covers are all decoded; their dHashes may differ in ``distance`` bits, 0 to 16.
    """
    which, fingerprints = covers
    groups = np.unique([file.group for file in files], return_inverse=True)[1]
    same = duplicates_by_hash(fingerprints, distance)[0]
    near, far = duplicates_by_tiny_image(fingerprints)
    new = ~np.isin(near @ [len(fingerprints), 1], same @ [len(fingerprints), 1])
    pairs = np.concatenate([same, near[new]])
    kinds = np.repeat([1, 2], [len(same), int(new.sum())])
    distances = np.concatenate([hamming(*fingerprints["dhash"][same.T]), far[new].round().astype(np.int64)])
    labels = connected_without_chains(fingerprints["thumbnail"], pairs)
    kinds, distances = _closest_links(labels, pairs, kinds, distances)
    owned = np.unique(np.stack([which, groups], 1), axis=0)
    shared = np.bincount(owned[:, 0], minlength=len(fingerprints)) > 1
    kinds[shared], distances[shared] = 0, 0

    label = labels[which]
    parts = np.unique(np.stack([label, groups], 1), axis=0)
    clustered = np.flatnonzero((np.bincount(parts[:, 0]) > 1)[label])
    clustered = clustered[np.argsort(label[clustered], kind="stable")]
    clusters = []
    for rows in np.split(clustered, np.flatnonzero(np.diff(label[clustered])) + 1) if len(clustered) else ():
        best = _best_group([files[i] for i in rows], fingerprints["pixels"][which[rows]])
        members = [Member(files[i], WHY[kinds[k]], int(distances[k]), files[i].group == best)
                   for i, k in zip(rows, which[rows], strict=True)]
        clusters.append(sorted(members, key=lambda member: (not member.keep, member.file.group, member.file.path)))
    return sorted(clusters, key=lambda members: (-count_groups(members), -len(members), members[0].file.path))


def count_groups(members: Sequence[Member]) -> int:
    return len({member.file.group for member in members})


def connected(count: int, pairs: np.ndarray) -> np.ndarray:
    """The connected component of each of ``count`` items, int ``[count]``, by pairs int ``[P, 2]``."""
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), (count, count))
    return connected_components(graph, directed=False)[1]


def connected_without_chains(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The cluster of each picture, int ``[N]``: connected components, cut where they are chains.

    The pictures of a cluster must resemble the one of most links; else two that have nothing in common would be one
    because of a row of others between them. Thumbnails are uint8 ``[N, 32, 32, 3]``, pairs int64 ``[P, 2]``.
    """
    count = len(thumbnails)
    while True:
        labels = connected(count, pairs)
        links = np.bincount(pairs.ravel(), minlength=count)
        order = np.lexsort((np.arange(count), -links, labels))
        centres = order[np.unique(labels[order], return_index=True)[1]]
        linked = np.concatenate([pairs[centres[labels[pairs[:, side]]] == pairs[:, side], 1 - side] for side in (0, 1)])
        others = np.setdiff1d(np.flatnonzero(links), np.union1d(linked, centres))
        spokes = np.sort(np.stack([centres[labels[others]], others], 1), axis=1)
        stray = np.zeros(count, bool)
        stray[others[differences(thumbnails, spokes, CHAIN_LIMIT) >= CHAIN_LIMIT]] = True
        if not stray.any():
            return labels
        pairs = pairs[stray[pairs[:, 0]] == stray[pairs[:, 1]]]


def _closest_links(labels: np.ndarray, pairs: np.ndarray, kinds: np.ndarray,
                   distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kind and distance of each picture's closest link within its cluster, int ``[N]`` each."""
    inside = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    ends = pairs[inside].T.ravel()
    kinds, distances = np.tile(kinds[inside], 2), np.tile(distances[inside], 2)
    order = np.lexsort((distances, kinds, ends))[::-1]
    kind, distance = np.zeros(len(labels), np.int64), np.zeros(len(labels), np.int64)
    kind[ends[order]], distance[ends[order]] = kinds[order], distances[order]  # the closest comes last, and stays
    return kind, distance


def _best_group(files: Sequence[File], pixels: np.ndarray) -> str:
    """The group to keep: the one with the largest picture, then with the most tracks, then the first by name."""
    ranks: dict[str, tuple[int, int]] = {}
    for file, size in zip(files, pixels.tolist(), strict=True):
        largest, tracks = ranks.get(file.group, (0, 0))
        ranks[file.group] = max(largest, size), tracks + 1
    return min(ranks, key=lambda group: (-ranks[group][0], -ranks[group][1], group))


def merge_groups(known: dict[tuple[str, str], str], files: Sequence[File],
                 clusters: Sequence[Sequence[Member]]) -> dict[tuple[str, str], str]:
    """``groups.csv``, ``{(genre, stem): group}``, in which each cluster, and what is bound to it, has one group.

    The groups of a cluster become one, and clusters that share a group; so do groups that were known before. The name
    is the first of those known before, else of the groups. Doing it again changes nothing.
    """
    samples = [(file.genre, file.stem) for file in files]
    bonds = [*zip(samples, (file.group for file in files), strict=True), *known.items()]
    bonds += [(members[0].file.group, member.file.group) for members in clusters for member in members[1:]]
    number = {name: i for i, name in enumerate(dict.fromkeys(name for bond in bonds for name in bond))}
    labels = connected(len(number), np.array([[number[one], number[other]] for one, other in bonds], np.int64))
    names: dict[int, str] = {}
    for group in sorted({member.file.group for members in clusters for member in members}, reverse=True):
        names[labels[number[group]]] = group
    before = {labels[number[group]]: group for group in sorted(set(known.values()), reverse=True)}
    names = {label: before.get(label, name) for label, name in names.items()}
    return known | {sample: names[labels[number[sample]]] for sample in dict.fromkeys([*samples, *known])
                    if labels[number[sample]] in names}
