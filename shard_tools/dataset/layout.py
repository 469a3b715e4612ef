"""Recognises what folders and file names mean, and joins covers and vectors to candidates.

Layouts, each in a folder or a zip, bare or inside one folder more:
  1. the thesis: ``audio-cover_dataset/{cover,audio}/<split>/<genre>/`` and ``cover_dataset/<split>/<genre>/``
  2. ``cover/`` beside ``audio/``, each with ``<split>/<genre>/``
  3. ``<split>/<genre>/``, vectors (if any) beside the covers
  4. ``<genre>/``, or just files: split ``train``, genre ``unknown``
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

import numpy as np

from shard_tools.core.quarantine import Drop
from shard_tools.dataset.groups import find_groups
from shard_tools.dataset.source import Entry, Folder, Zip

AUDIO_SUFFIXES = (".mp3", ".flac", ".ogg", ".opus", ".wav", ".m4a")
SPLITS = ("train", "val", "test")
COVERS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
VECTORS = frozenset({"npy"})
ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test", "eval": "test"}
UNKNOWN = "unknown"
LAYOUTS = ("audio-cover_dataset/{cover,audio}/<split>/<genre>/, cover_dataset/<split>/<genre>/, "
           "{cover,audio}/<split>/<genre>/, <split>/<genre>/, <genre>/ or a folder of covers")
LONGEST_KEY = 96  # + ".jpg" = the 100 bytes of a tar header's name; the longest stem kind just fits

_KINDS = COVERS | VECTORS
_PLAIN_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_KEY}}}", re.ASCII)
_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_ALBUM = re.compile(rf"(?:TR\w{{16}}__)?{_UUID}-\d+__({_UUID})", re.IGNORECASE | re.ASCII)
_NAME = re.compile(r"(?s)(.+?)(?:\.\w+__\d+)*\.(\w+)", re.ASCII)


class Root(NamedTuple):
    """Where covers and vectors begin: the same folder when they lie side by side; ``audio`` None = there are none."""

    cover: str
    audio: str | None


class Candidate(NamedTuple):
    """One sample to be: where it belongs and the files it would be made of."""

    split: str
    genre: str
    key: str
    album: str
    cover: Entry
    audio: Entry | None


@dataclass
class Listing:
    """Iterates over the candidates and drops of a source, whose layout begins at ``top``, by split, genre and stem.

    ``groups``: of (genre, stem), what to take for the album instead of what the stem says.

    Attributes, known when the iteration has ended:
        genres: sorted names over all splits; a label is a position in it.
        ignored: number of files that are neither covers nor vectors.
        paired: whether there are vectors at all; if so, a cover without one is an orphan.
    """

    source: Folder | Zip
    top: str
    root: Root
    groups: dict[tuple[str, str], str]
    genres: list[str] = field(default_factory=list)
    ignored: int = 0
    paired: bool = False

    def __iter__(self) -> Iterator[Candidate | Drop]:
        covers = dict(_genre_folders(self.source, self.root.cover))
        vectors = dict(_genre_folders(self.source, self.root.audio)) if self.root.audio is not None else {}
        self.paired = any(self._has_vectors(folder) for folder in vectors.values())
        genres, self.ignored = set(), 0
        taken = {split: _KeySet() for split in SPLITS}
        for split, genre in sorted(set(covers) | set(vectors), key=lambda part: (SPLITS.index(part[0]), part[1])):
            wanted: dict[str, frozenset[str]] = {}
            for folders, kinds in ((covers, COVERS), (vectors, VECTORS)):
                if (folder := folders.get((split, genre))) is not None:
                    wanted[folder] = wanted.get(folder, frozenset()) | kinds
            found: dict[tuple[str, bool], Entry] = {}
            for folder, kinds in wanted.items():
                try:
                    folders, files = self.source.list(folder)
                except OSError as error:
                    yield Drop(folder, "list", "unreadable", error.strerror or str(error))
                    continue
                # A folder that bears a cover's name is taken for one, so that reading it says what is wrong.
                files += [Entry(f"{folder}/{name}".lstrip("/"), -1, 0) for name in folders
                          if read_name(name)[1] in kinds]
                for entry in sorted(files):
                    stem, kind = read_name(entry.name)
                    if kind not in kinds:
                        self.ignored += 1
                    elif (first := found.setdefault((stem, kind in VECTORS), entry)) is not entry:
                        yield Drop(entry.path, "join", "duplicate stem", f"{first.path} came first")
            if found:
                genres.add(genre)
            yield from self._join(split, genre, found, taken[split])
        self.genres = sorted(genres)

    def audio_folders(self) -> list[str]:
        """The folders that hold vectors, by split and genre."""
        folders = dict(_genre_folders(self.source, self.root.audio)) if self.root.audio is not None else {}
        return [folder for folder in folders.values() if self._has_vectors(folder)]

    def _join(self, split: str, genre: str, found: dict[tuple[str, bool], Entry],
              taken: _KeySet) -> Iterator[Candidate | Drop]:
        stems = sorted({stem for stem, _ in found})
        whole = [stem for stem in stems if (stem, False) in found and ((stem, True) in found or not self.paired)]
        keys = [make_key(stem) for stem in whole]
        for at in taken.find(keys):  # the same stem in another genre of this split
            keys[at] = make_key(whole[at], f"{genre}/{whole[at]}")
        taken.add(keys)
        key_of = dict(zip(whole, keys, strict=True))
        for stem in stems:
            cover, audio = found.get((stem, False)), found.get((stem, True))
            if stem in key_of:
                album = (self.groups.get((genre, stem)) if self.groups else "") or album_of(stem)
                yield Candidate(split, genre, key_of[stem], album, cover, audio)
            elif cover:
                yield Drop(cover.path, "join", "orphan cover", f"no vector with the stem {stem}")
            else:
                yield Drop(audio.path, "join", "orphan audio", f"no cover with the stem {stem}")

    def _has_vectors(self, folder: str) -> bool:
        try:
            return any(read_name(name)[1] in VECTORS for name in self.source.names(folder))
        except OSError:
            return False


def open_layout(source: Folder | Zip, dataset: str = "auto") -> Listing:
    """Recognises the layout of a source, for ``audio-cover``, ``cover`` (no vectors), or ``auto``: the first if any.

    ValueError for a layout that is not understood, or not of the data set that was asked for.
    """
    top, folders = "", []
    for _ in range(3):
        folders, files = source.list(top)
        root = _recognise(source, top, folders, files)
        if root or len(visible := [name for name in folders if not _hidden(name)]) != 1:
            break
        top = f"{top}/{visible[0]}" if top else visible[0]
    if not root:
        names = ", ".join([*(f"{name}/" for name in folders), *(entry.name for entry in files)][:8]) or "nothing"
        raise ValueError(f"--source has no layout that is understood: found {names}; expected {LAYOUTS}")
    if dataset == "cover":
        pure = _split_below(source, top, "cover_dataset")
        return Listing(source, top, Root(pure if pure is not None else root.cover, None), find_groups(source, top))
    if dataset == "audio-cover" and root.audio is None:
        raise ValueError("--dataset audio-cover, but --source holds covers only; use --dataset cover")
    return Listing(source, top, root, find_groups(source, top))


def _recognise(source: Folder | Zip, top: str, folders: list[str], files: list[Entry]) -> Root | None:
    pairs = _split_below(source, top, "audio-cover_dataset")
    if pairs is not None:
        if not {"cover", "audio"} <= (inside := set(source.list(pairs)[0])):
            raise ValueError(f"{pairs}/ must hold cover/ and audio/; found {', '.join(sorted(inside)) or 'nothing'}")
        return Root(f"{pairs}/cover", f"{pairs}/audio")
    pure = _split_below(source, top, "cover_dataset")
    if pure is not None:
        return Root(pure, None)
    if {"cover", "audio"} <= set(folders):
        return Root(f"{top}/cover".lstrip("/"), f"{top}/audio".lstrip("/"))
    if any(_split_name(name) for name in folders):
        return Root(top, top)
    below = [entry for name in folders if not _hidden(name) for entry in source.list(f"{top}/{name}".lstrip("/"))[1]]
    return Root(top, top) if any(read_name(e.name)[1] in COVERS for e in files + below) else None


def _split_below(source: Folder | Zip, top: str, name: str) -> str | None:
    return f"{top}/{name}".lstrip("/") if name in source.list(top)[0] else None


def _split_name(name: str) -> str | None:
    name = ALIASES.get(name.lower(), name.lower())
    return name if name in SPLITS else None


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _genre_folders(source: Folder | Zip, top: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Yields ((split, genre), folder) for every folder that may hold files of a genre."""
    folders = [name for name in source.list(top)[0] if not _hidden(name)]
    splits: dict[str, str] = {}
    for name in folders:
        if split := _split_name(name):
            if split in splits:
                raise ValueError(f"--source has two folders for {split}: {splits[split]}/ and {name}/; merge them")
            splits[split] = name
    for split, name in splits.items() or {"train": ""}.items():
        base = f"{top}/{name}".strip("/")
        yield (split, UNKNOWN), base  # files that lie in no genre folder
        for genre in source.list(base)[0]:
            if not _hidden(genre) and read_name(genre)[1] not in COVERS | VECTORS:
                path = f"{base}/{genre}".lstrip("/")
                if genre == UNKNOWN and any(read_name(e.name)[1] in COVERS for e in source.list(base)[1]):
                    raise ValueError(f"--source has files both in {path}/ and, without a genre, beside it; move them")
                yield (split, genre), path


def read_name(name: str) -> tuple[str, str]:
    """(stem, kind) of a file name: ``a.jpg__0.jpg`` is stem ``a``, kind ``jpg``; hidden files have no kind."""
    stem, _, kind = name.rpartition(".")
    if stem and "." not in stem and kind in _KINDS:  # as nearly all are
        return stem, kind
    match = None if name.startswith(".") else _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def album_of(stem: str) -> str:
    """The album key of a stem, in lower case, or "" where the stem holds none."""
    match = _ALBUM.fullmatch(stem)
    return match[1].lower() if match else ""


def make_key(stem: str, unlike: str = "") -> str:
    """A stem as the key of a sample: ASCII without dots, at most 96 characters, reversible by ``read_key`` if short.

    The hash of ``unlike``, when given, is added, so that the key differs from that of an equal stem.
    """
    if not unlike and _PLAIN_KEY.fullmatch(stem):
        return stem
    key = quote(stem, safe="", errors="surrogateescape").replace(".", "%2E").replace("~", "%7E")
    if unlike or len(key) > LONGEST_KEY:
        digest = hashlib.blake2b((unlike or stem).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        key = re.sub(r"%[0-9A-F]?$", "", key[:LONGEST_KEY - 17]) + "~" + digest
    return key


def read_key(key: str) -> str:
    """The stem that ``make_key`` made a key of (its beginning, where the key had to be shortened)."""
    return unquote_to_bytes(key.partition("~")[0]).decode("utf-8", "surrogateescape")


class _KeySet:
    """The keys of a split, as hashes of 8 bytes in a few sorted arrays: a set of them would be ten times as large."""

    def __init__(self):
        self.parts: list[np.ndarray] = []

    def find(self, keys: list[str]) -> list[int]:
        """Which of these keys are taken."""
        hashes, known = _short_hashes(keys), np.zeros(len(keys), bool)
        for part in self.parts:
            known |= part[np.searchsorted(part, hashes).clip(max=len(part) - 1)] == hashes
        return np.flatnonzero(known).tolist()

    def add(self, keys: list[str]) -> None:
        assert not self.find(keys)
        self.parts += [np.sort(_short_hashes(keys))] if keys else []
        while len(self.parts) > 1 and len(self.parts[-2]) < 2 * len(self.parts[-1]):
            self.parts[-2:] = [np.sort(np.concatenate(self.parts[-2:]))]


def _short_hashes(keys: list[str]) -> np.ndarray:
    return np.frombuffer(b"".join([hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys]), "<u8")
