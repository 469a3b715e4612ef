"""Streams WebDataset tars of others, which have no index of ours, as the same kind of batches in a random order.

Members ``jpg`` (or jpeg, png, webp), optionally ``npy`` and optionally ``json`` or ``cls`` with a genre. Shards are
drawn with replacement and samples shuffled in a buffer: epochs are approximate, and a resumed run sees other samples
than an undisturbed one would have. Members are decoded by our own safe codec, never by webdataset's (which unpickles).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from webdataset.tariterators import group_by_keys

from covergen.data.audio import AudioNormalizer
from covergen.data.batch import Batch
from covergen.data.corruption import JUDGED_AFTER, CorruptionLog, CorruptSample
from covergen.data.decoding import decode
from covergen.data.sampling import rank_slice
from shard_tools.core.files import hash64
from shard_tools.dataset import images as codec
from shard_tools.dataset.vectors import read_vector
from shard_tools.shards import statistics as blocks

HEAD = 2_000  # samples read at the start for resolution, genres and the statistics of the audio
BUFFER = 2_000  # samples shuffled among each other
META = re.compile(r"__[^/]*__($|/)")  # files that webdataset reserves for itself
COVERS = ("jpg", "jpeg", "png", "webp")


class WebDatasetStream:
    """A folder of tars, each rank streaming its own random shards."""

    pure, epoch, dataset = False, 0, None

    def __init__(self, root: str | Path, split: str, *, batch_size: int, seed: int = 0, order: str = "sample",
                 audio_scale: str = "standard", album_subset: str = "all", rank: int = 0, ranks: int = 1,
                 max_corrupt: float = 1.0) -> None:
        """Args: as of ``open_stream``; shards are those whose name starts with the split, or all when none does."""
        tars = sorted(map(str, Path(root).glob("*.tar")))
        self.urls = [tar for tar in tars if Path(tar).name.startswith(split)] or tars
        if not self.urls:
            raise FileNotFoundError(f"{root} holds no shards (*.tar); make them with shard_tools.pack")
        if order != "sample":
            raise ValueError("--order group needs shards with an index; pack the covers with shard_tools.pack, or give "
                             "--order sample")
        if album_subset != "all":
            raise ValueError(f"--album_subset {album_subset} needs shards with an index; pack the covers with "
                             "shard_tools.pack, or give --album_subset all")
        self.part, self.rank, self.seed = max(1, len(rank_slice(batch_size, rank, ranks))), rank, seed
        self.next, self.stream, self.normalizer = None, None, None
        self.corruption, self.failures = CorruptionLog(max_corrupt, JUDGED_AFTER), []
        stat = [(Path(url).name, Path(url).stat().st_size) for url in self.urls]
        self.identity = hashlib.sha256(repr(stat).encode()).hexdigest()
        head = self._take(self._samples(webdataset.SimpleShardList(self.urls)), HEAD)
        if not head:
            raise FileNotFoundError(f"{Path(self.urls[0]).parent}: no sample with a cover ({', '.join(COVERS)})")
        sides = [min(codec.read_cover(sample["cover"]).shape[:2]) for sample in head[:100]]
        self.resolution = 2 ** (min(sides).bit_length() - 1)
        self.genres = sorted({sample["genre"] for sample in head} - {None})
        vectors = [sample["audio"] for sample in head if sample["audio"] is not None]
        audio = None
        if len(vectors) == len(head) and len({len(vector) for vector in vectors}) == 1:
            stacked = np.stack(vectors)
            found = blocks.detect_blocks(stacked)
            mean, std = blocks.Moments.of(stacked, found).mean_and_std()
            audio = {"dimension": stacked.shape[1], "blocks": [list(block) for block in found],
                     "mean": mean.tolist(), "std": std.tolist()}
            self.normalizer = AudioNormalizer(audio, audio_scale)
        self.metadata, self.samples = {"samples": len(head), "genres": self.genres, "audio": audio}, len(head)
        self.notice = (f"{len(self.urls)} shards without an index: epochs are approximate and a resumed run sees other "
                       f"samples; resolution, genres and audio statistics are those of the first {len(head):,}. "
                       "shard_tools.pack makes shards with an index")

    def batch(self, number: int) -> Batch:
        """The next batch of this rank; any other number starts a new random stream."""
        if number != self.next:
            seed = hashlib.blake2b(repr((self.seed, self.rank, number)).encode(), digest_size=4).digest()
            seed = int.from_bytes(seed, "little")
            shards = webdataset.ResampledShards(self.urls, seed=seed, deterministic=True)
            self.stream = self._samples(shards, webdataset.shuffle(BUFFER, rng=random.Random(seed)))
        self.next = number + 1
        samples = self._take(self.stream, self.part)
        decoded = [decode(bytearray(codec.fit_cover(s["cover"], self.resolution))) for s in samples]
        covers = torch.from_numpy(np.stack(decoded).transpose(0, 3, 1, 2).copy())
        audio = torch.from_numpy(self.normalizer(np.stack([s["audio"] for s in samples]))) if self.normalizer else None
        numbers = {genre: number for number, genre in enumerate(self.genres)}
        return Batch(covers, audio, torch.tensor([numbers.get(s["genre"], -1) for s in samples]),
                     torch.tensor([s["group"] for s in samples]))

    def mismatch(self) -> None:
        """Raises ValueError: audio of another album can't be found in a stream that has no index."""
        raise ValueError("mismatched pairs need shards with an index; pack the covers with shard_tools.pack, or train "
                         "without them (of r3gan: --mismatch_weight 0)")

    def ends(self, position: int) -> None:
        """Nothing to do."""

    def examples(self, count: int) -> Batch:
        """At most ``count`` samples from the beginning of the stream."""
        return Batch(*(None if part is None else part[:count] for part in self.batch(0)))

    def _samples(self, shards: Any, *stages: Any) -> Iterator[dict[str, Any]]:
        """Raw samples of shards; corrupt or incomplete ones are counted, named and left out."""
        stages = (lambda found: group_by_keys(self._members(found), handler=self._skip), *stages)
        for raw in webdataset.DataPipeline(shards, *stages):
            try:
                cover = next((raw[kind] for kind in COVERS if kind in raw), None)
                if cover is None:
                    raise ValueError("no cover")
                codec.probe_cover(cover)
                audio = read_vector(raw["npy"]) if "npy" in raw else None
                if self.normalizer and (audio is None or len(audio) != self.normalizer.dimension):
                    raise ValueError(f"an audio vector of {self.normalizer.dimension} numbers is missing")
                yield {"cover": cover, "audio": audio, "genre": genre_of(raw), "group": hash64(cover) >> 1}
            except ValueError as error:
                self._skip(error, str(raw.get("__url__")), str(raw.get("__key__")))

    def _members(self, shards: Any) -> Iterator[dict[str, Any]]:
        """Files of tars in webdataset's form, whose own reader would follow a size that is a lie for ever."""
        for shard in shards:
            path = Path(shard["url"])
            try:
                if not path.is_file():  # a FIFO would be waited for
                    raise ValueError("not a file")
                end = path.stat().st_size
                with tarfile.open(path, "r:") as tar:
                    while (member := tar.next()) is not None:
                        tar.members.clear()  # tarfile would keep every header
                        if member.issparse() or member.size < 0 or member.offset_data + member.size > end:
                            raise tarfile.ReadError(f"it can't be read beyond byte {member.offset:,}")
                        if member.isreg() and member.size <= codec.COVER_BYTES and not META.match(member.name):
                            data = tar.extractfile(member).read()
                            yield {"fname": member.name, "data": data, "__url__": str(path)}
                yield {}  # the end of a shard, whose samples don't go on in the next
            except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
                self._skip(error, str(path))

    def _skip(self, error: Exception, url: str = "a shard", key: str | None = None) -> bool:
        self.failures.append(CorruptSample(url, None, str(error), key))
        if len(self.failures) >= JUDGED_AFTER:  # of an endless stream
            raise RuntimeError(f"{JUDGED_AFTER:,} samples in a row are damaged, the last: {self.failures[-1]}")
        return True

    def _take(self, samples: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """The next samples; ValueError when too many were left out on the way."""
        try:
            found = list(itertools.islice(samples, count))
        except RuntimeError as error:
            raise ValueError(f"{error}; pack the covers again with shard_tools.pack") from None
        failures, self.failures = self.failures, []
        self.corruption.seen(len(found) + len(failures), failures)
        return found


def genre_of(raw: dict[str, Any]) -> str | None:
    """The genre in a sample's ``json`` ({"genre": ...} or {"label": ...}) or ``cls``, as text; None without one."""
    try:
        if "cls" in raw:
            return raw["cls"].decode().strip()
        metadata = json.loads(raw["json"]) if "json" in raw else {}
        found = metadata.get("genre", metadata.get("label"))
        return None if found is None else str(found)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"unreadable genre: {error}") from None
