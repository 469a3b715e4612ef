"""Packs covers and vectors into shards with an index: ``python -m shard_tools.pack --source DIR_OR_ZIP --out DIR``.

One pass over the source, a shard a task: every file is read once, checked and packed, as if all were valid; where some
are not, the shards are repartitioned (``shards.tasks``). What is finished is stored in ``OUT/.pack`` until the end, so
that the same command goes on where a killed one stopped. Memory: some 50 bytes a sample, and the largest folder's list.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from shard_tools import __version__, cli
from shard_tools.cli import Range, checked
from shard_tools.core.errors import SourceChangedError
from shard_tools.core.locks import lock_output
from shard_tools.core.parallel import Distributor, Pool, available_workers
from shard_tools.core.quarantine import Drop, show_reasons, verdict, write_quarantine
from shard_tools.dataset.demo_truth import TRUTH, copy_truth
from shard_tools.dataset.images import MAX_PIXELS
from shard_tools.dataset.layout import open_layout
from shard_tools.dataset.schema import find_schema
from shard_tools.dataset.source import open_source
from shard_tools.remote.filesystem import is_remote
from shard_tools.remote.upload import Upload
from shard_tools.shards.index import write_index
from shard_tools.shards.packing import (
    PackOptions,
    assign_groups,
    audio_metadata,
    make_shards,
    split_metadata,
    split_rows,
)
from shard_tools.shards.state import check_same, finished, open_state


@checked
def pack(source: str, out: str, dataset: Literal["auto", "audio-cover", "cover"] = "auto",
         resolution: Annotated[int | None, Range(1, 8192)] = None,
         samples_per_shard: Annotated[int, Range(1, 10**6)] = 1000, seed: Annotated[int, Range(0, 2**63)] = 0,
         audio_blocks: tuple[int, ...] | None = None, max_failure_rate: Annotated[float, Range(0, 1)] = 0.05,
         max_pixels: Annotated[int, Range(1, 178_000_000)] = MAX_PIXELS,
         workers: Annotated[int | None, Range(1, 1024)] = None, distributor: Distributor = "processes",
         overwrite: bool = False) -> int:
    """Packs covers and audio vectors into WebDataset shards with an index; bad files go to OUT/quarantine.jsonl.

    The same command after an interruption goes on where it stopped. Returns 1 when too many files were bad, else 0.
    Of demo data its truth, attributes.npz, is copied too, also to shards that were packed before. What groups.csv (of
    shard_tools.dedup) and features.json (of shard_tools.features and collect) say of covers and vectors is heeded.

    Args:
        source: folder or zip (read in place): the thesis' data sets, <split>/<genre>/, <genre>/, or plain files.
        out: folder to write to; new, empty, or left by the same command. To a URL (s3://, gs://) shards are packed in
            the user's cache, whose disk must hold them all, then uploaded, the index last, and removed.
        dataset: audio-cover, cover (covers without vectors), or auto: audio-cover where there is one.
        resolution: side of the covers in pixels; none = as found, the commonest size of square ones.
        samples_per_shard: at most so many samples in a shard.
        seed: of the order of the samples.
        audio_blocks: sizes of the vector's blocks, such as 580,580; none = detected from runs of zeros.
        max_failure_rate: share of bad files above which the exit status is 1.
        max_pixels: covers of more pixels are bad files.
        workers: processes; none = one a core, 12 at most. Of ray: tasks at a time; none = the cluster's cores.
        distributor: processes of this machine, or ray: the machines of a Ray cluster, which all must reach source and
            out under the same names.
        overwrite: replace finished shards that were packed otherwise.

    Raises:
        ValueError: nothing to pack, or OUT holds something else.
    """
    started = time.monotonic()
    options = {"dataset": dataset, "resolution": resolution, "samples_per_shard": samples_per_shard, "seed": seed,
               "audio_blocks": list(audio_blocks) if audio_blocks else None, "max_pixels": max_pixels}
    upload = Upload(out, overwrite) if is_remote(out) else None
    source_path, root = Path(source).resolve(), upload.folder if upload else Path(out).resolve()
    if root == source_path or source_path in root.parents:
        raise ValueError(f"--out {out} lies in --source {source}: shards would become input; choose another folder")
    listing = open_layout(open_source(source_path), dataset)
    schema = find_schema(listing.source, listing.top, listing.audio_folders())
    root.mkdir(parents=True, exist_ok=True)
    with upload or nullcontext(), lock_output(root):
        published = upload.published() if upload else []
        if metadata := published or ([] if overwrite else finished(root)):
            sizes = upload.remote.sizes() if published else {path.name: path.stat().st_size for path in root.iterdir()}
            check_same(out if published else root, sizes, metadata, options, listing)
            added = not published and copy_truth(source_path, listing, root)
            print(f"{out if published else root} is already packed" + (f"; {TRUTH} was added" if added else ""))
            return _verdict(sum(metadata[0]["drops"].values()), sum(f["samples"] for f in metadata), max_failure_rate)
        state = open_state(root, listing, options, overwrite)
        if dataset == "audio-cover" and not listing.paired:
            raise ValueError("--dataset audio-cover, but --source holds no vectors; use --dataset cover")
        pack_options = PackOptions(
            source_path, root, resolution, samples_per_shard, audio_blocks, max_pixels, schema,
            Pool(workers or available_workers(distributor), distributor, (source_path, state.folder)))
        drops: list[Drop] = []
        try:
            packed = make_shards(state, pack_options, drops)
        except SourceChangedError:
            state.forget()
            raise
        except ValueError:  # nothing to pack: say why as fully as otherwise
            write_quarantine(root, drops)
            _report_drops(root, drops)
            raise
        basis = next(iter(packed.tasks))  # train, where there is one
        common = {
            "options": options, "version": __version__, "source_sha256": state.source_sha256,
            "splits": list(packed.tasks), "genres": state.genres, "resolution": packed.expected.resolution,
            "ignored_files": state.ignored, "drops": dict(sorted(Counter(drop.reason for drop in drops).items())),
            "quarantine_sha256": write_quarantine(root, drops),
            "audio": audio_metadata(packed, basis, schema),
        }
        copy_truth(source_path, listing, root)  # before the index: with that the folder is finished
        groups = assign_groups(packed.tasks)
        metadata = {split: common | split_metadata(shards, state.genres, groups[split])
                 for split, shards in packed.tasks.items()}
        for split, shards in packed.tasks.items():
            write_index(root, split, metadata[split], len(groups[split]), split_rows(shards, groups[split]))
        state.commit()
        _report(out if upload else root, metadata, groups, drops, (root / TRUTH).is_file(),
                time.monotonic() - started)
        return _verdict(len(drops), sum(map(len, groups.values())), max_failure_rate)


def _report(out: Path | str, metadata: dict[str, dict[str, Any]], groups: dict[str, np.ndarray], drops: list[Drop],
            truth: bool, seconds: float) -> None:
    for split, known in metadata.items():
        size = sum(shard["bytes"] for shard in known["shards"])
        print(f"{split:5} {known['samples']:9,} samples  {known['groups']:9,} groups  "
              f"{len(known['shards']):5,} shards  {size / 1e6:10,.1f} MB")
    resolution, audio = (next(iter(metadata.values()))[name] for name in ("resolution", "audio"))
    if audio:
        print(f"covers {resolution} x {resolution}; vectors of {audio['dimension']}, blocks "
              + ", ".join(f"[{start}, {end})" for start, end in audio["blocks"])
              + (f"; {audio['features']['features']}" if "features" in audio else ""))
        if audio["statistics_of"] != "train":
            print(f"warning: there is no train split; the audio statistics are those of {audio['statistics_of']}")
    if truth:
        print(f"truth  {TRUTH}: what the demo's covers show")
    per_group = np.unique(np.concatenate([np.unique(part) for part in groups.values()]), return_counts=True)[1]
    if leaks := int((per_group > 1).sum()):
        print(f"warning: {leaks:,} groups (albums) are in more than one split; scores on val and test will flatter")
    _report_drops(out, drops)
    count = sum(map(len, groups.values()))
    print(f"{count:,} samples in {seconds:.1f} s, {count / seconds:,.0f} a second")
    nearest = 2 ** (resolution.bit_length() - 1)  # models are built for powers of two
    smaller = "" if nearest == resolution else f" --resolution {nearest}"
    print(f"next: accelerate launch -m covergen.train --model wgan_gp --shards {out}{smaller}")


def _report_drops(out: Path | str, drops: list[Drop]) -> None:
    small = any(drop.reason == "wrong cover size" for drop in drops)
    show_reasons(out, drops, hint="--resolution N crops and resizes covers of every size to N x N" if small else "")


def _verdict(dropped: int, packed: int, max_failure_rate: float) -> int:
    return verdict(dropped, packed, max_failure_rate, "{:,} bad files to {:,} samples", "what was valid is packed")


if __name__ == "__main__":
    cli.run(pack)
