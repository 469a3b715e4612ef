"""``python -m shard_tools.features --source AUDIO_OR_JSON --out DIR``: computes a vector of each track.

Vectors keep the folders of their tracks; ``features.json`` beside them says what each number means. Nothing is done
twice: the same command, run again, computes what is not there yet.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

from tqdm import tqdm

from shard_tools import cli
from shard_tools.cli import Range, checked
from shard_tools.core.files import place_link
from shard_tools.core.locks import OUTPUT_LOCK, lock_output
from shard_tools.core.parallel import Distributor, available_workers, run_tasks
from shard_tools.core.quarantine import Drop, show_reasons, verdict, write_quarantine
from shard_tools.dataset.layout import AUDIO_SUFFIXES
from shard_tools.dataset.schema import FILE, Schema, read_schema, write_schema
from shard_tools.extractors import inputs, load
from shard_tools.extractors import vector_sources as vectors
from shard_tools.extractors.audio import SHORTEST
from shard_tools.extractors.compute import FOLDER, Input, Options, compute

_OF_VECTORS = ("pca", "concat")


class Plan(NamedTuple):
    """What is to be computed: the schema, options and inputs, and the length of the source in inputs or bytes."""

    schema: Schema
    options: Options
    inputs: Iterable[Input]
    total: int
    in_bytes: bool = False


@checked
def features(out: str, source: str | None = None, extractor: str = "essentia", pairs: str | None = None,
             model: str | None = None, components: Annotated[int | None, Range(1, 10**5)] = None,
             pca: str | None = None, standardise: bool = True,
             excerpt: Annotated[float | None, Range(SHORTEST, 3600)] = None,
             excerpts: Annotated[int, Range(1, 1000)] = 1, keep_json: bool = False,
             max_failure_rate: Annotated[float, Range(0, 1)] = 0.05,
             workers: Annotated[int | None, Range(1, 1024)] = None, distributor: Distributor = "processes") -> int:
    """Computes vectors of tracks, or of vectors; bad files go to OUT/quarantine.jsonl.

    Returns 1 when too many files were bad, or an archive is damaged, else 0.

    Args:
        out: folder to write to; new, empty, or left by the same command.
        source: an audio or JSON file, a folder of them, or a .tar, .tar.gz, .tar.bz2 or .tar.zst of JSON; of pca a
            folder of vectors or a data set, of concat several, separated by spaces.
        extractor: acousticbrainz, acousticbrainz-559, essentia, clap, pca or concat.
        pairs: instead of source, a CSV with the columns audio, cover and perhaps genre or label; OUT becomes a data
            set, with the covers linked.
        model: of clap, a name on the hub or a folder.
        components: of pca, how many numbers are to be left.
        pca: of pca, a file to apply; none = one is fitted, on the train split where there are splits.
        standardise: of pca, bring all columns to one scale first.
        excerpt: seconds of a track to take, from its middle; none = all of it (35 MB of memory a minute).
        excerpts: at most so many excerpts a track, evenly spread; each gets a vector, its number in the stem.
        keep_json: of essentia, write the raw JSON beside the vectors.
        max_failure_rate: share of bad files above which the exit status is 1.
        workers: processes; none = one a core, 12 at most. Of ray: tasks at a time; none = the cluster's cores.
        distributor: processes of this machine, or ray: the machines of a Ray cluster, which all must see source and
            out under the same names.
    """
    for name, given, owner in (("model", model, "clap"), ("components", components, "pca"), ("pca", pca, "pca"),
                               ("standardise", not standardise, "pca"), ("keep_json", keep_json, "essentia")):
        if given and extractor != owner:
            raise ValueError(f"--{name} is an option of --extractor {owner}, not of {extractor}")
    if (source is None) == (pairs is None):
        raise ValueError("give either --source or --pairs")
    if excerpts > 1 and excerpt is None:
        raise ValueError(f"--excerpts {excerpts} needs the length of one: --excerpt 30")
    started, root = time.monotonic(), Path(out).resolve()
    for folder in [] if source is None else source.split(",") if extractor == "concat" else [source]:
        if not Path(folder).exists():
            raise ValueError(f"--source {folder} does not exist")
        if Path(folder).is_dir() and (root == Path(folder).resolve() or Path(folder).resolve() in root.parents):
            raise ValueError(f"--out {out} lies in --source {folder}: what is written would be read; choose another")
    with _unfinished(root):
        if extractor in _OF_VECTORS:
            if pairs or excerpt:
                raise ValueError(f"--extractor {extractor} reads vectors: --source, without --pairs or --excerpt")
            found = vectors.open_sources(source.split(",") if extractor == "concat" else [source])
            plan = _plan_vectors(root, found, extractor, components, pca, standardise)
        else:
            plan = _plan_tracks(root, source, pairs, extractor, {} if model is None else {"model": model},
                                {} if excerpt is None else {"seconds": float(excerpt), "count": excerpts}, keep_json)
        write_schema(plan.options.vectors, plan.schema)
        there = read_schema(plan.options.vectors)
        if there.excerpt != plan.schema.excerpt:
            raise ValueError(f"{plan.options.vectors} holds vectors of {there.excerpt or 'whole tracks'}, not of "
                             f"{plan.schema.excerpt or 'whole tracks'}; choose another --out")
        written, existing, drops = _run(plan, root / "cover", workers or available_workers(distributor), distributor)
        if extractor in _OF_VECTORS:
            vectors.link_rest(found, root)
        write_quarantine(root, drops)
    seconds = time.monotonic() - started
    print(f"{written + existing:,} vectors of {plan.schema}"
          + (f", {existing:,} of them from before" if existing else "")
          + f"; {written:,} in {seconds:.1f} s, {written / seconds:,.1f} a second")
    if pairs:
        print(f"next: python -m shard_tools.split --source {root} --out {root}_split")
    show_reasons(root, drops)
    if cut := next((drop for drop in drops if drop.reason == "damaged archive"), None):
        print(f"{cut.path}: {cut.detail}: exit status 1", file=sys.stderr)
        return 1
    return verdict(len(drops), written + existing, max_failure_rate, "{:,} bad files to {:,} vectors",
                   "the vectors of the good ones are there")


@contextlib.contextmanager
def _unfinished(root: Path) -> Iterator[None]:
    """Opens the out folder and that of unfinished work in it; an interruption leaves both, for the next time."""
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_output(root))
        names = sorted(path.name for path in root.iterdir() if path.name != OUTPUT_LOCK)
        if names and FOLDER not in names and not (root / FILE).is_file() and not (root / "audio" / FILE).is_file():
            raise ValueError(f"{root} is not empty (found {', '.join(names[:3])}), and this command did not leave it "
                             "so; choose another --out")
        (root / FOLDER).mkdir(exist_ok=True)
        try:
            yield
        except ValueError:
            shutil.rmtree(root / FOLDER)
            stack.close()
            with contextlib.suppress(OSError):
                root.rmdir()  # where it is empty
            raise
        shutil.rmtree(root / FOLDER)


def _plan_tracks(root: Path, source: str | None, pairs: str | None, name: str, options: dict[str, str],
                 excerpt: dict[str, float], keep_json: bool) -> Plan:
    make = partial(load, name, **options)
    extractor = make()
    suffixes = (*(AUDIO_SUFFIXES if extractor.of_audio else ()), *([".json"] if extractor.of_json else ()))
    plan = Plan(replace(extractor.schema, excerpt=excerpt),
                Options(make, root, root / "audio" if pairs else root, excerpt.get("seconds"), excerpt.get("count", 1),
                        keep_json), (), 0)
    path = Path(pairs or source)
    if pairs:
        found = list(inputs.table_inputs(path, suffixes))
        return plan._replace(inputs=found, total=len(found))
    if path.is_dir():
        total = sum(1 for _ in inputs.walk(path, suffixes))
        if not total:
            raise ValueError(f"--source {source} holds nothing that {name} reads: {', '.join(suffixes)}")
        return plan._replace(inputs=inputs.folder_inputs(path, suffixes), total=total)
    if not path.is_file():  # a FIFO would be waited for
        raise ValueError(f"--source {source} is neither a file nor a folder")
    if extractor.of_json and inputs.is_archive(path):
        return plan._replace(inputs=inputs.archive_inputs(path), total=path.stat().st_size, in_bytes=True)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"--source {source} is nothing that {name} reads: {', '.join(suffixes)}"
                         + (", .tar, .tar.gz, .tar.bz2, .tar.zst" if extractor.of_json else ""))
    return plan._replace(inputs=[Input(path.stem, path.name, (path,))], total=1)


def _plan_vectors(root: Path, found: vectors.Sources, name: str, components: int | None, file: str | None,
                  standardise: bool) -> Plan:
    folder = root / "audio" if found.data_set else root
    if name == "concat":
        if len(found.roots) < 2:
            raise ValueError("--extractor concat joins several folders: --source FOLDER FOLDER ...")
        schema, make = vectors.concatenation(found)
    else:
        if (components is None) == (file is None):
            raise ValueError("--extractor pca needs --components, or with --pca a file that is fitted already")
        schema, make = vectors.reduction(found, root, folder, components, file, standardise)
    return Plan(schema, Options(make, root, folder), found.inputs, len(found.inputs))


def _run(plan: Plan, covers: Path, workers: int, distributor: Distributor) -> tuple[int, int, list[Drop]]:
    """Does what is planned; returns how many vectors were written, how many there already, and the bad files."""
    written, existing, drops = 0, 0, []
    workers = workers if plan.in_bytes else min(workers, plan.total)
    with tqdm(total=plan.total, desc=plan.schema.features, smoothing=0.05, unit="B" if plan.in_bytes else " tracks",
              unit_scale=plan.in_bytes) as bar:
        for new, old, links, bad, position in run_tasks(partial(compute, plan.options), inputs.make_tasks(plan.inputs),
                                                        workers, distributor, [plan.options.out / FOLDER]):
            written, existing = written + new, existing + old
            drops += bad
            for cover, name in links:
                (covers / name).parent.mkdir(parents=True, exist_ok=True)
                place_link(cover, covers / name, "hard")
            bar.update(position - bar.n)
        bar.update(plan.total - bar.n)
    return written, existing, drops


if __name__ == "__main__":
    cli.run(features, several=("source",))
