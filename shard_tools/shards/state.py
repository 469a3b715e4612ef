"""Makes packing safe to kill: what is finished in the out folder, and where unfinished work goes on.

``OUT/.pack`` holds the candidates, the shards that were written and what is known of them, and ``state.json``, which
says what they were made of: with it, the work is under way; without it, an index in OUT is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from array import array
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shard_tools import __version__
from shard_tools.core.files import read_bounded, sync, write_atomically
from shard_tools.core.locks import OUTPUT_LOCK
from shard_tools.core.quarantine import QUARANTINE, Drop
from shard_tools.dataset.demo_truth import TRUTH
from shard_tools.dataset.layout import SPLITS, Candidate, Listing
from shard_tools.shards.candidates import shuffle_key, to_line
from shard_tools.shards.index import SHARD_NAME, read_metadata, splits_in

FOLDER, PROGRESS = ".pack", "progress.json"
_WRITTEN = rf"{re.escape(QUARANTINE)}|{re.escape(TRUTH)}|[a-z]+\.index\.(?:json|npy)|{SHARD_NAME.pattern}"
_OURS = re.compile(rf"\.pack|{_WRITTEN}")
_OUR_TEMPORARY = re.compile(rf"\.(?:{_WRITTEN})\.(?:\d+\.)?tmp")


@dataclass
class PackState:
    """Packing under way.

    Attributes:
        folder: ``OUT/.pack``.
        counts: of the candidates of every split.
        drops: files that are part of no candidate.
        source_sha256: of the paths (below the layout's top) and sizes of all files and of groups.csv, alike for a
            folder and its zip.
        version: the same with the times or checksums of the files, which differ when the source changed.
    """

    folder: Path
    genres: list[str] = field(default_factory=list)
    ignored: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    drops: list[Drop] = field(default_factory=list)
    source_sha256: str = ""
    version: str = ""

    def load(self) -> dict[str, Any]:
        """What ``save`` last wrote: of samples what is ``expected``, whether all are ``written`` so, and the vectors'
        ``blocks``; empty at the beginning, or when it is damaged: then all is checked again."""
        with contextlib.suppress(OSError, ValueError):
            digest, _, progress = read_bounded(self.folder / PROGRESS).partition(b"\n")
            if digest == hashlib.sha256(progress).hexdigest().encode():
                return json.loads(progress)
        return {}

    def save(self, progress: dict[str, Any]) -> None:
        data = json.dumps(progress).encode()
        write_atomically(self.folder / PROGRESS, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)

    def forget(self) -> None:
        """Makes the next run begin again."""
        (self.folder / "state.json").unlink()

    def commit(self) -> None:
        """Removes the traces of the work; from its first step on the folder is finished."""
        sync(self.folder.parent)  # the names of the files, before the note that they are not yet all there goes
        self.forget()
        _sweep(self.folder.parent)


def finished(root: Path) -> list[dict[str, Any]]:
    """The metadata of all splits of a finished folder, empty when it is new or unfinished; ValueError if damaged."""
    splits = list(splits_in(root))
    if not splits or (root / FOLDER / "state.json").exists():
        return []
    metadata = [read_metadata(root / f"{split}.index.json") for split in splits]
    if splits != metadata[0].get("splits"):
        raise ValueError(f"{root} does not hold the splits it was packed with, but {', '.join(splits)}; choose another "
                         "--out, or give --overwrite")
    _sweep(root)
    return metadata


def check_same(out: Path | str, sizes: dict[str, int], metadata: list[dict[str, Any]], options: dict[str, Any],
               listing: Listing) -> None:
    """Raises ValueError unless finished shards (folder or URL, sizes of its files, metadata of all its splits) are
    those that this command would make, of options that shape bytes."""
    for name, value in options.items():
        if metadata[0]["options"].get(name) != value:
            raise ValueError(f"{out} was packed with --{name} {metadata[0]['options'].get(name)}, not {value}; "
                             "choose another --out, or give --overwrite")
    for shard in (shard for split in metadata for shard in split["shards"]):
        if sizes.get(shard["name"]) != shard["bytes"]:
            raise ValueError(f"{out}/{shard['name']} is missing or damaged (see shard_tools.verify); give --overwrite "
                             "to pack again")
    with open(os.devnull, "wb") as nowhere:
        if _spool(PackState(Path()), listing, nowhere).source_sha256 != metadata[0]["source_sha256"]:
            raise ValueError(f"--source is not what {out} was packed from (other names or sizes of files); "
                             "choose another --out, or give --overwrite")


def open_state(root: Path, listing: Listing, options: dict[str, Any], overwrite: bool) -> PackState:
    """Opens ``OUT/.pack`` of a locked folder: what an earlier run of the same command (options that shape bytes) left
    unfinished stays; what is finished goes only with ``overwrite``.

    ValueError where the folder holds files of others, or there are too many genres.
    """
    folder = root / FOLDER
    restart = overwrite and not (folder / "state.json").exists()
    before = sorted(entry.name for entry in root.iterdir() if entry.name != OUTPUT_LOCK)
    foreign = [name for name in before if not _OURS.fullmatch(name) and not _OUR_TEMPORARY.fullmatch(name)]
    if foreign or (before and not folder.exists() and not restart):
        raise ValueError(f"{root} is not empty (found {', '.join((foreign or before)[:3])}), and no unfinished packing "
                         "left it so; choose another --out")
    if restart:
        _clear(root)
    folder.mkdir(exist_ok=True)
    _sweep(root, keep_work=True)
    keys = array("Q")
    with open(folder / "candidates.tmp", "wb") as file:
        state = _spool(PackState(folder), listing, file, keys, options["seed"])
    if len(state.genres) > 32_767:
        raise ValueError(f"{len(state.genres):,} genre folders; at most 32,767 have labels")
    identity = json.dumps({"options": options, "version": __version__, "source": state.version}).encode()
    path, known = folder / "state.json", False
    with contextlib.suppress(OSError, ValueError):
        known = read_bounded(path, len(identity)) == identity
    if path.exists() and not known:
        print("unfinished work was for other options or another source: beginning again")
    if not known:
        _clear(root, but=folder / "candidates.tmp")
    os.replace(folder / "candidates.tmp", folder / "candidates.jsonl")
    pairs, start = np.frombuffer(keys, "<u8").reshape(-1, 2), 0
    with open(folder / "order.tmp", "wb") as file:  # where the candidates' lines begin, in the order of the samples
        np.lib.format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": (len(pairs),)})
        for count in state.counts.values():
            part = pairs[start:start + count]
            part[np.argsort(part[:, 0], kind="stable"), 1].tofile(file)
            start += count
    os.replace(folder / "order.tmp", folder / "order.npy")
    write_atomically(path, identity)
    return state


def _spool(state: PackState, listing: Listing, file: BinaryIO, keys: array | None = None, seed: int = 0) -> PackState:
    """Writes all candidates as lines, and fills in what is known of them; (shuffle key, offset of its line) of each are
    added to ``keys``, split by split."""
    names, versions = hashlib.sha256(), hashlib.sha256()
    at, cut = 0, len(listing.top)
    for item in listing:
        if isinstance(item, Candidate):
            line = to_line(item)
            state.counts[item.split] += 1
            if keys is not None:
                keys.append(shuffle_key(seed, item.split, item.key))
                keys.append(at)
            at += len(line)
            file.write(line)
            for entry in (item.cover, item.audio):
                if entry:  # as json.dumps would write it
                    names.update(f"[{quoted(entry.path[cut:].lstrip('/'))}, {entry.size}]".encode("ascii"))
            versions.update(line)
        else:
            state.drops.append(item)
            names.update(json.dumps([item.path[cut:].lstrip("/"), item.reason]).encode())
            versions.update(json.dumps(item).encode())
    if listing.groups:
        names.update(json.dumps(sorted(listing.groups.items())).encode())
    state.genres, state.ignored = listing.genres, listing.ignored
    state.source_sha256, state.version = names.hexdigest(), versions.hexdigest()
    return state


def _sweep(root: Path, keep_work: bool = False) -> None:
    """Removes temporary files that a killed run left, and its work folder."""
    for path in [*root.iterdir(), *(root / FOLDER).glob(".*.tmp")]:
        if path.parent != root or _OUR_TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
    if not keep_work:
        shutil.rmtree(root / FOLDER, ignore_errors=True)


def _clear(root: Path, but: Path | None = None) -> None:
    """Removes all that packing made; the state and the indexes first, so that what remains never counts as finished."""
    folder = root / FOLDER
    state = [*folder.glob("state.json"), *root.glob("*.index.json")]
    for path in [*state, *(path for path in root.iterdir() if _OURS.fullmatch(path.name)), *folder.glob("*")]:
        if path not in (but, folder):
            path.unlink(missing_ok=True)
