"""``python -m shard_tools.coverart --source JSON_DIR --out DIR --contact MAIL``: the front covers of the Cover
Art Archive for the releases that AcousticBrainz files name, as ``DIR/cover/<genre>/<stem>.jpg``.

What was fetched lies once in ``DIR/.coverart/`` (which packing, as all hidden folders, passes over), and the tracks of
a release are links to it. A picture there, and a line in ``answers.jsonl`` there, is never asked for again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tqdm import tqdm

from shard_tools import __version__, cli
from shard_tools.cli import Range, checked
from shard_tools.core.errors import BadFileError
from shard_tools.core.extras import need
from shard_tools.core.files import place_link, write_atomically
from shard_tools.core.locks import lock_output
from shard_tools.core.parallel import available_workers, run_tasks
from shard_tools.core.quarantine import Drop, show_reasons, write_quarantine
from shard_tools.extractors.acousticbrainz import read_releases

if TYPE_CHECKING:
    from shard_tools.music.coverart_client import Client

ARCHIVE = "https://coverartarchive.org"
FOLDER, ANSWERS, SIZE = ".coverart", "answers.jsonl", "size"
GIVEN_UP = "given up"
CHUNK = 256
_CONTACT = re.compile(r"[!-~]+@[!-~]+\.[!-~]+|https?://[!-~]+")


@checked
def coverart(source: str, out: str, contact: str, size: Literal["250", "500", "1200", "full"] = "500",
             rate: Annotated[float, Range(1e-4, 1e4)] = 1.0, connections: Annotated[int, Range(1, 64)] = 4,
             attempts: Annotated[int, Range(1, 100)] = 10, backoff: Annotated[float, Range(0, 60)] = 1.0,
             retry: bool = False, dry_run: bool = False, base_url: str = ARCHIVE,
             workers: Annotated[int | None, Range(1, 1024)] = None) -> int:
    """Fetches the front cover of every release that AcousticBrainz files name, once, however many tracks share it.

    With `shard_tools.features --source JSON_DIR --out DIR/audio` the result is a data set that pack and split read. The
    same command goes on where an interrupted one stopped, and asks for nothing twice: not for what it has, and not for
    what the archive has said it lacks. What could not be had is listed in DIR/quarantine.jsonl.

    Args:
        source: folder of low-level JSON files, <genre>/<stem>.json; their tag musicbrainz_albumid names the release.
        out: folder for the covers.
        contact: your mail address or web page, by which the archive can reach you; sent with every request.
        size: longest side of the covers in pixels; full = as they were uploaded, up to 64 MB each.
        rate: requests a second to any one host, at most; those that follow redirects, and repeated ones, count.
        connections: covers that load at the same time.
        attempts: for each cover, before it is given up.
        backoff: seconds before the second attempt, doubled for each further one.
        retry: ask again for what an earlier run gave up after that many attempts.
        dry_run: only count, ask for nothing.
        base_url: of the archive or a mirror of it.
        workers: processes that read the JSON files; none = one a core, 12 at most.

    Returns 1 when covers that may exist were given up, else 0.
    """
    if not _CONTACT.fullmatch(contact):
        raise ValueError(f"--contact {contact!r}: expected your mail address or web page, such as me@example.org; the "
                         "archive wants to know whom to write to")
    if not base_url.startswith(("https://", "http://")):
        raise ValueError(f"--base_url {base_url!r}: expected an address such as {ARCHIVE}")
    source_path, root = Path(source).resolve(), Path(out).resolve()
    if not source_path.is_dir():
        raise ValueError(f"--source {source} is not a folder; expected one with AcousticBrainz JSON files")
    releases, drops = _read_releases(source_path, workers or available_workers())
    folder = root / FOLDER
    answers = _read_answers(folder)
    pictures = {mbid: path for mbid in releases for suffix in (".jpg", ".png")
                if (path := folder / mbid[:2] / f"{mbid}{suffix}").is_file()}
    wanted = [mbid for mbid in releases if mbid not in pictures
              and (mbid not in answers or (retry and answers[mbid][0] == GIVEN_UP))]
    tracks, seconds = sum(map(len, releases.values())), len(wanted) / rate
    time = f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.0f} s"
    print(f"{tracks + len(drops):,} files: {tracks:,} of {len(releases):,} releases, {len(drops):,} name none; "
          f"{len(pictures):,} covers are there, {len(wanted):,} to ask for ({time} or more)")
    if dry_run:
        return 0
    need("coverart", "httpx", "tenacity")
    from shard_tools.music.coverart_client import Client

    folder.mkdir(parents=True, exist_ok=True)
    with lock_output(root):
        if (folder / SIZE).is_file() and (before := (folder / SIZE).read_text()) != size:
            raise ValueError(f"{root} holds covers of --size {before}, not {size}; choose another --out")
        write_atomically(folder / SIZE, size.encode())
        client = Client(base_url, f"covergen/{__version__} ( {contact} )", rate, attempts, backoff)
        ending = "" if size == "full" else f"-{size}"
        fetched = _fetch(client, folder, wanted, ending, connections, answers)
        for mbid, picture in chain(list(pictures.items()), fetched):
            pictures[mbid] = picture
            for track in releases[mbid]:
                target = root / "cover" / (track + picture.suffix)
                target.parent.mkdir(parents=True, exist_ok=True)
                place_link(picture, target, "hard")
    return _finish(root, releases, pictures, answers, drops)


def _read_releases(source: Path, workers: int) -> tuple[dict[str, list[str]], list[Drop]]:
    """``{release: its tracks, as paths without .json}``, and the files that name no release."""
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.json")
                   if not any(part.startswith(".") for part in path.relative_to(source).parts))
    if not names:
        raise ValueError(f"--source {source} holds no .json files; expected AcousticBrainz's, as <genre>/<stem>.json")
    chunks = [names[i:i + CHUNK] for i in range(0, len(names), CHUNK)]
    releases: dict[str, list[str]] = {}
    drops = []
    with tqdm(total=len(names), desc="reading", unit=" files") as bar:
        read = run_tasks(partial(read_releases, source), chunks, min(workers, len(chunks)))
        for name, answer in (pair for chunk in read for pair in chunk):
            if isinstance(answer, BadFileError):
                drops.append(Drop(name, "release", answer.reason, answer.detail))
            else:
                releases.setdefault(answer, []).append(name.removesuffix(".json"))
            bar.update()
    return releases, drops


def _fetch(client: Client, folder: Path, wanted: list[str], ending: str, connections: int,
           answers: dict[str, tuple[str, str]]) -> Iterator[tuple[str, Path]]:
    """Yields (release, file of its picture) as they come; what can't be had goes into ``answers`` and its file."""
    def fetch(mbid: str) -> Path | BadFileError:
        try:
            data, suffix = client.picture(f"release/{mbid}/front{ending}")
        except BadFileError as error:
            with open(folder / ANSWERS, "ab", buffering=0) as file:
                file.write((json.dumps([mbid, error.reason, error.detail]) + "\n").encode())
            return error
        path = folder / mbid[:2] / f"{mbid}{suffix}"
        write_atomically(path, data)  # here, not when its future is read: from now on it is not asked for again
        return path

    with ThreadPoolExecutor(connections) as pool, tqdm(total=len(wanted), desc="fetching", unit=" covers") as bar:
        try:
            futures = {pool.submit(fetch, mbid): mbid for mbid in wanted}
            for future in as_completed(futures):
                answer, mbid = future.result(), futures[future]
                if isinstance(answer, BadFileError):
                    answers[mbid] = (answer.reason, answer.detail)
                else:
                    yield mbid, answer
                bar.update()
        finally:
            client.stopped.set()
            pool.shutdown(cancel_futures=True)
            client.http.close()


def _read_answers(folder: Path) -> dict[str, tuple[str, str]]:
    """``{release: (reason, detail)}`` of what the archive was asked for in vain; the last answer counts."""
    answers = {}
    for line in (folder / ANSWERS).read_bytes().splitlines() if (folder / ANSWERS).is_file() else ():
        try:
            mbid, reason, detail = json.loads(line)
        except ValueError:  # the machine went down while it was written: it is asked for again
            continue
        answers[mbid] = (reason, detail)
    return answers


def _finish(root: Path, releases: dict[str, list[str]], pictures: dict[str, Path], answers: dict[str, tuple[str, str]],
            drops: list[Drop]) -> int:
    """Writes what is missing, and reports; returns the exit status."""
    lines = [json.dumps([mbid, *answer]) + "\n" for mbid, answer in sorted(answers.items()) if mbid not in pictures]
    write_atomically(root / FOLDER / ANSWERS, "".join(lines).encode())
    missing = {mbid: answers[mbid] for mbid in sorted(releases) if mbid not in pictures}
    drops = drops + [Drop(f"release/{mbid}", "archive", reason, f"{detail}; {len(releases[mbid])} track(s), the first "
                          f"{releases[mbid][0]}") for mbid, (reason, detail) in missing.items()]
    write_quarantine(root, drops)
    tracks = sum(len(releases[mbid]) for mbid in pictures)
    print(f"{len(pictures):,} covers for {tracks:,} tracks in {root / 'cover'}")
    given_up = sum(reason == GIVEN_UP for reason, _ in missing.values())
    hint = f"--retry asks again for the {given_up:,} that were given up" if given_up else ""
    show_reasons(root, drops, "without", hint)
    return 1 if given_up else 0


if __name__ == "__main__":
    cli.run(coverart)
