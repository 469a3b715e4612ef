"""``python -m shard_tools.coverart --source JSON_DIR --out DIR --contact MAIL``: AcousticBrainz files in; front covers
from the Cover Art Archive out, as ``DIR/cover/<genre>/<stem>.jpg``.

What was fetched lies once in ``DIR/.coverart/`` (which packing, as all hidden folders, doesn't see), and the tracks of
a release are links to it. A picture there, and a line in ``answers.jsonl`` there, is never asked for again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from shard_tools import __version__
from shard_tools.core.errors import BadFileError
from shard_tools.core.files import place_link, write_atomically
from shard_tools.core.locks import lock_output
from shard_tools.core.parallel import available_workers, run_tasks
from shard_tools.core.quarantine import Drop, show_reasons, write_quarantine
from shard_tools.dataset.source import Entry, read_entry
from shard_tools.extractors.acousticbrainz import JSON_BYTES

ARCHIVE = "https://coverartarchive.org"
FOLDER, ANSWERS, SIZE = ".coverart", "answers.jsonl", "size"
GIVEN_UP = "given up"
CHUNK = 256
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CONTACT = re.compile(r"[!-~]+@[!-~]+\.[!-~]+|https?://[!-~]+")


class Chunk(NamedTuple):
    """Some of the files below a folder, by relative path."""

    source: Path
    names: list[str]


def coverart(source: str, out: str, contact: str, size: Literal["250", "500", "1200", "full"] = "500",
             rate: float = 1.0, connections: int = 4, attempts: int = 10, backoff: float = 1.0, retry: bool = False,
             dry_run: bool = False, base_url: str = ARCHIVE, workers: int | None = None) -> int:
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

    Raises:
        ValueError: no files, no contact, OUT holds covers of another size, or nobody answers at the base URL.
    """
    _check(contact, base_url, rate=(rate, 1e-4, 1e4), connections=(connections, 1, 64), attempts=(attempts, 1, 100),
           backoff=(backoff, 0, 60))
    source_path, root = Path(source).resolve(), Path(out).resolve()
    if not source_path.is_dir():
        raise ValueError(f"--source {source} is not a folder; expected one with AcousticBrainz JSON files")
    releases, drops = _read_releases(source_path, workers or available_workers())
    shelf = root / FOLDER
    answers = _read_answers(shelf)
    there = {mbid: found for mbid in releases if (found := _on_shelf(shelf, mbid))}
    wanted = [mbid for mbid in releases if mbid not in there
              and (mbid not in answers or (retry and answers[mbid][0] == GIVEN_UP))]
    tracks = sum(map(len, releases.values()))
    print(f"{tracks + len(drops):,} files: {tracks:,} of {len(releases):,} releases, {len(drops):,} name none; "
          f"{len(there):,} covers are there, {len(wanted):,} to ask for ({_hours(len(wanted) / rate)} or more)")
    if dry_run:
        return 0
    shelf.mkdir(parents=True, exist_ok=True)
    with lock_output(root):
        _check_size(shelf, size)
        for mbid, found in there.items():
            _link(root, found, releases[mbid])
        ending = "" if size == "full" else f"-{size}"
        agent = f"covergen/{__version__} ( {contact} )"
        client = _client(base_url=base_url, agent=agent, rate=rate, attempts=attempts, backoff=backoff)
        for mbid, found in _fetch(client, shelf, wanted, ending, connections, answers):
            _link(root, found, releases[mbid])
            there[mbid] = found
    return _finish(root, releases, there, answers, drops)


def _check(contact: str, base_url: str, **numbers: tuple[float, float, float]) -> None:
    for name, (value, low, high) in numbers.items():
        if not low <= value <= high:
            raise ValueError(f"--{name} {value}: expected {low:,} to {high:,}")
    if not _CONTACT.fullmatch(contact):
        raise ValueError(f"--contact {contact!r}: expected your mail address or web page, such as me@example.org; the "
                         "archive wants to know whom to write to")
    if not base_url.startswith(("https://", "http://")):
        raise ValueError(f"--base_url {base_url!r}: expected an address such as {ARCHIVE}")


def _client(**options: Any):
    try:
        from shard_tools.music.coverart_client import Client
    except ImportError as error:
        raise ValueError(f"fetching needs a package that is missing ({error}): pip install -e '.[coverart]'") from None
    return Client(**options)


def _read_releases(source: Path, workers: int) -> tuple[dict[str, list[str]], list[Drop]]:
    """``{release: its tracks, as paths without .json}``, and the files that name no release."""
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.json")
                   if not any(part.startswith(".") for part in path.relative_to(source).parts))
    if not names:
        raise ValueError(f"--source {source} holds no .json files; expected AcousticBrainz's, as <genre>/<stem>.json")
    chunks = [Chunk(source, names[i:i + CHUNK]) for i in range(0, len(names), CHUNK)]
    releases: dict[str, list[str]] = {}
    drops = []
    with tqdm(total=len(names), desc="reading", unit=" files") as bar:
        for found in run_tasks(read_chunk, chunks, min(workers, len(chunks))):
            for name, answer in found:
                if isinstance(answer, Drop):
                    drops.append(answer)
                else:
                    releases.setdefault(answer, []).append(name.removesuffix(".json"))
            bar.update(len(found))
    return releases, drops


def read_chunk(chunk: Chunk) -> list[tuple[str, str | Drop]]:
    """The release that each file names, or why there is none."""
    found: list[tuple[str, str | Drop]] = []
    for name in chunk.names:
        try:
            found.append((name, release_of(read_entry(chunk.source, Entry(name, -1, 0), JSON_BYTES))))
        except BadFileError as error:
            found.append((name, Drop(name, "release", error.reason, error.detail)))
    return found


def release_of(data: bytes) -> str:
    """The MusicBrainz release id in the bytes of a low-level JSON file, in lower case.

    Raises:
        BadFileError: ``not JSON``, ``no release id``, or ``damaged release id``: never anything that is no UUID.
    """
    try:
        value = json.loads(data)["metadata"]["tags"]["musicbrainz_albumid"]
        value = value[0] if isinstance(value, list) else value
    except (KeyError, IndexError, TypeError):
        raise BadFileError("no release id", "its tags have no musicbrainz_albumid") from None
    except (ValueError, RecursionError) as error:
        raise BadFileError("not JSON", str(error)) from None
    if not isinstance(value, str) or not _UUID.fullmatch(mbid := value.strip().lower()):
        raise BadFileError("damaged release id", f"{str(value)[:60]!a} is no UUID")
    return mbid


def _fetch(client: Any, shelf: Path, wanted: list[str], ending: str, connections: int,
           answers: dict[str, tuple[str, str]]) -> Iterator[tuple[str, Path]]:
    """Yields (release, its picture on the shelf) as they come; what can't be had goes into ``answers`` and its file."""
    def ask(mbid: str) -> Path | BadFileError:
        try:
            data, suffix = client.picture(f"release/{mbid}/front{ending}")
        except BadFileError as error:
            line = json.dumps([mbid, error.reason, error.detail]) + "\n"
            with open(shelf / ANSWERS, "ab", buffering=0) as file:
                file.write(line.encode())
            return error
        path = _shelf_path(shelf, mbid, suffix)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, data)  # here, not when it is its turn: from now on it is not asked for again
        return path

    with ThreadPoolExecutor(connections) as pool, tqdm(total=len(wanted), desc="fetching", unit=" covers") as bar:
        try:
            futures = {pool.submit(ask, mbid): mbid for mbid in wanted}
            for future in as_completed(futures):
                answer, mbid = future.result(), futures[future]
                if isinstance(answer, BadFileError):
                    answers[mbid] = (answer.reason, answer.detail)
                else:
                    yield mbid, answer
                bar.update()
        finally:
            client.stop()
            pool.shutdown(cancel_futures=True)
            client.close()


def _shelf_path(shelf: Path, mbid: str, suffix: str) -> Path:
    return shelf / mbid[:2] / (mbid + suffix)


def _on_shelf(shelf: Path, mbid: str) -> Path | None:
    return next((path for suffix in (".jpg", ".png") if (path := _shelf_path(shelf, mbid, suffix)).is_file()), None)


def _read_answers(shelf: Path) -> dict[str, tuple[str, str]]:
    """``{release: (reason, detail)}`` of what the archive was asked for in vain; the last answer counts."""
    answers = {}
    for line in (shelf / ANSWERS).read_bytes().splitlines() if (shelf / ANSWERS).is_file() else ():
        try:
            mbid, reason, detail = json.loads(line)
        except ValueError:  # the machine went down while it was written: it is asked for again
            continue
        answers[mbid] = (reason, detail)
    return answers


def _check_size(shelf: Path, size: str) -> None:
    path = shelf / SIZE
    if path.is_file() and path.read_text() != size:
        raise ValueError(f"{shelf.parent} holds covers of --size {path.read_text()}, not {size}; choose another --out")
    write_atomically(path, size.encode())


def _link(root: Path, picture: Path, tracks: list[str]) -> None:
    """Gives the tracks of a release its picture."""
    for track in tracks:
        target = root / "cover" / (track + picture.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        place_link(picture, target, "hard")


def _finish(root: Path, releases: dict[str, list[str]], there: dict[str, Path], answers: dict[str, tuple[str, str]],
            drops: list[Drop]) -> int:
    """Writes what is missing, and tells how it went."""
    missing = {mbid: answers[mbid] for mbid in sorted(releases) if mbid not in there}
    lines = [json.dumps([mbid, *answer]) + "\n" for mbid, answer in sorted(answers.items()) if mbid not in there]
    write_atomically(root / FOLDER / ANSWERS, "".join(lines).encode())
    drops = drops + [Drop(f"release/{mbid}", "archive", reason, f"{detail}; {len(releases[mbid])} track(s), the first "
                          f"{releases[mbid][0]}") for mbid, (reason, detail) in missing.items()]
    write_quarantine(root, drops)
    tracks = sum(len(releases[mbid]) for mbid in there)
    print(f"{len(there):,} covers for {tracks:,} tracks in {root / 'cover'}")
    show_reasons(root, drops, "without")
    given_up = sum(reason == GIVEN_UP for reason, _ in missing.values())
    if given_up:
        print(f"        --retry asks again for the {given_up:,} that were given up")
    return 1 if given_up else 0


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds:,.0f} s"


if __name__ == "__main__":
    from shard_tools import cli

    cli.run(coverart)
