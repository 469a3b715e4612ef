"""Covers from the archive: a real server that redirects, limits, cuts and dies; what is fetched, and how often."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from shard_tools.core.errors import BadFileError
from shard_tools.coverart import coverart
from shard_tools.dataset.layout import Candidate, open_layout
from shard_tools.dataset.source import open_source
from shard_tools.extractors.acousticbrainz import release_of
from shard_tools.music.coverart_client import Client
from tests.support import raw_data
from tests.support.archive import Archive
from tests.support.runs import environment
from tests.support.waiting import wait_for

pytest.importorskip("httpx")
pytest.importorskip("tenacity")
CONTACT = "tests@example.org"


@pytest.fixture
def archive(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    archive = Archive()
    yield archive
    archive.close()


def release(number: int) -> str:
    return str(uuid.UUID(int=number + 1))


def describe(source: Path, name: str, mbid: object) -> None:
    path = source / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": {"tags": {"musicbrainz_albumid": mbid}}}))


def library(source: Path, archive: Archive, releases: int, tracks: int = 2) -> None:
    """Tracks of releases in two genres, all of which the archive has."""
    for i in range(releases):
        archive.pictures[release(i)] = raw_data.jpeg(i)
        for track in range(tracks):
            describe(source, f"{('rock', 'r&b')[i % 2]}/track-{i}-{track}", [release(i)])


def fetch(source: Path, out: Path, archive: Archive, **options) -> int:
    options = {"rate": 500.0, "backoff": 0.01, "workers": 1, "contact": CONTACT, "base_url": archive.url} | options
    return coverart(str(source), str(out), **options)


def quarantined(out: Path) -> dict[str, str]:
    lines = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    return {line["path"]: line["reason"] for line in lines}


def test_a_release_is_asked_for_once_and_all_its_tracks_have_its_cover(archive, tmp_path):
    library(tmp_path / "json", archive, 6, tracks=3)
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 0
    for i in range(6):
        files = [tmp_path / "out" / "cover" / ("rock", "r&b")[i % 2] / f"track-{i}-{k}.jpg" for k in range(3)]
        assert {file.read_bytes() for file in files} == {archive.pictures[release(i)]}
        assert len({file.stat().st_ino for file in files}) == 1
    assert set(archive.counts("release").values()) == set(archive.counts("download").values()) == {1}
    assert all(path.endswith("/front-500") for _, path in archive.asked if path.startswith("/release/"))
    assert len(archive.agents) == 1 and CONTACT in archive.agents.pop()


@pytest.mark.parametrize("with_vectors", [True, False])
def test_packing_sees_the_covers_and_nothing_else(archive, tmp_path, with_vectors):
    library(tmp_path / "json", archive, 4)
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 0
    if with_vectors:
        for cover in (tmp_path / "out" / "cover").rglob("*.jpg"):
            vector = tmp_path / "out" / "audio" / cover.parent.name / f"{cover.stem}.npy"
            vector.parent.mkdir(parents=True, exist_ok=True)
            vector.write_bytes(raw_data.npy(raw_data.vector(0)))
    listing = open_layout(open_source(tmp_path / "out"))
    found = list(listing)
    assert len(found) == 8 and all(isinstance(item, Candidate) and bool(item.audio) == with_vectors for item in found)
    assert listing.genres == ["r&b", "rock"]


def test_what_goes_wrong_is_tried_again_and_what_is_not_there_is_not(archive, tmp_path):
    library(tmp_path / "json", archive, 8)
    archive.faults = {release(i): [fault] for i, fault in enumerate(("cut", "torn", "drop", "page", "502 0"))}
    archive.faults[release(5)] = ["cut", "503 0", "torn"]
    for i in (20, 21):
        describe(tmp_path / "json", f"rock/lost-{i}", [release(i)])
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 0
    assert len(list((tmp_path / "out" / "cover").rglob("*.jpg"))) == 16
    downloads = archive.counts("download")
    assert [downloads[release(i)] for i in range(8)] == [2, 2, 2, 2, 2, 4, 1, 1]
    assert archive.counts("release")[release(20)] == 1
    assert quarantined(tmp_path / "out") == {f"release/{release(i)}": "not found" for i in (20, 21)}
    before = len(archive.asked)
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 0
    assert len(archive.asked) == before


def test_what_stays_broken_is_given_up_and_listed_until_it_is_asked_for_again(archive, tmp_path, capsys):
    library(tmp_path / "json", archive, 3)
    archive.faults[release(1)] = ["torn"] * 4
    assert fetch(tmp_path / "json", tmp_path / "out", archive, attempts=4) == 1
    assert quarantined(tmp_path / "out") == {f"release/{release(1)}": "given up"}
    assert archive.counts("download")[release(1)] == 4
    assert not list((tmp_path / "out").rglob("*-1-*.jpg")) and "--retry" in capsys.readouterr().out
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 1
    assert archive.counts("download")[release(1)] == 4
    assert fetch(tmp_path / "json", tmp_path / "out", archive, retry=True) == 0
    assert quarantined(tmp_path / "out") == {} and len(list((tmp_path / "out").rglob("*-1-*.jpg"))) == 2


@pytest.mark.parametrize("connections", [1, 4])
def test_no_two_requests_are_nearer_than_the_rate_allows(archive, tmp_path, connections):
    library(tmp_path / "json", archive, 6)
    archive.faults = {release(0): ["cut"], release(1): ["drop"], release(2): ["torn"]}
    assert fetch(tmp_path / "json", tmp_path / "out", archive, rate=25.0, connections=connections) == 0
    times = sorted(when for when, _ in archive.asked)
    assert len(times) == 18
    assert min(later - sooner for sooner, later in itertools.pairwise(times)) >= 1 / 25


@pytest.mark.parametrize("wish", ["429 2", "503 date 2"])
def test_a_server_that_asks_to_wait_is_left_alone_by_all_connections(archive, tmp_path, wish):
    library(tmp_path / "json", archive, 8)
    archive.faults[release(3)] = [wish]
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 0
    times = sorted(when for when, _ in archive.asked)
    pauses = [later - sooner for sooner, later in itertools.pairwise(times) if later - sooner > 1]
    assert len(pauses) == 1 and pauses[0] >= (2 if wish.startswith("429") else 1)
    assert archive.counts("download")[release(3)] == 2


def test_a_server_that_asks_for_hours_ends_the_run(archive, tmp_path):
    library(tmp_path / "json", archive, 2)
    archive.faults[release(0)] = ["503 7200"]
    with pytest.raises(ValueError, match=r"left alone for 2\.0 hours"):
        fetch(tmp_path / "json", tmp_path / "out", archive, connections=1)


def test_a_server_that_dies_for_a_while_costs_nothing_but_time(archive, tmp_path, monkeypatch):
    library(tmp_path / "json", archive, 12)
    port = archive.server.server_address[1]
    states, refused, answer, backoff = [], [], archive.answer, Client._backoff

    def answer_six(request) -> None:
        archive.dead = archive.dead or len(archive.asked) >= 6
        answer(request)

    def counted(client, state) -> float:
        refused.append(state)
        return backoff(client, state)

    def outage() -> None:
        wait_for(lambda: archive.dead, "six requests")
        archive.close()
        wait_for(lambda: len(refused) >= 10, "ten requests in vain")
        again = Archive(port)
        again.pictures, again.asked = archive.pictures, archive.asked
        states.append(again)

    archive.answer = answer_six
    monkeypatch.setattr(Client, "_backoff", counted)
    worker = threading.Thread(target=outage)
    worker.start()
    assert fetch(tmp_path / "json", tmp_path / "out", archive, rate=100.0, backoff=0.05, attempts=12) == 0
    worker.join()
    archive.server = states[0].server
    assert len(list((tmp_path / "out" / "cover").rglob("*.jpg"))) == 24
    assert max(archive.counts("download").values()) <= 2


def test_a_server_that_stays_dead_ends_the_run_and_blames_no_release(archive, tmp_path):
    library(tmp_path / "json", archive, 3)
    dead = Archive()
    dead.close()
    with pytest.raises(ValueError, match=r"127\.0\.0\.1.*after 3 attempts"):
        fetch(tmp_path / "json", tmp_path / "out", dead, attempts=3)
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 0
    assert len(list((tmp_path / "out" / "cover").rglob("*.jpg"))) == 6


def test_killed_and_started_again_it_asks_for_nothing_twice(archive, tmp_path):
    library(tmp_path / "json", archive, 40)
    for i in range(50, 60):
        describe(tmp_path / "json", f"rock/a-lost-{i}", [release(i)])  # sorted before all that exists
    words = [sys.executable, "-m", "shard_tools.coverart", "--source", "json", "--out", "out", "--contact", CONTACT,
             "--base_url", archive.url, "--rate", "50", "--connections", "1", "--workers", "1"]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for(lambda: len(archive.asked) >= 40, "40 requests", by=[process], pause=0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 10 <= len(archive.asked) < 90
    under_way = archive.asked[-1][1].split("/")[2]
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 0
    twice = {mbid for kind in ("release", "download") for mbid, count in archive.counts(kind).items() if count > 1}
    assert twice <= {under_way}
    assert len(list((tmp_path / "out" / "cover").rglob("*.jpg"))) == 80 and len(quarantined(tmp_path / "out")) == 10
    clean = tmp_path / "clean"
    fetch(tmp_path / "json", clean, archive)
    assert raw_data.hashes(clean) == raw_data.hashes(tmp_path / "out")


def test_no_release_id_that_is_no_uuid_gets_into_a_path_or_a_request(archive, tmp_path):
    evil = ["../../../etc/passwd", "a" * 36, "", 5, None, [], {}, f"{release(1)}/../x", f"{release(1)}\n"]
    for i, value in enumerate(evil[:-1]):
        describe(tmp_path / "json", f"rock/{i}", [value])
    describe(tmp_path / "json", "rock/no-list", release(7).upper())
    archive.pictures[release(7)] = raw_data.jpeg(7)
    (tmp_path / "json" / "rock" / "no.json").write_text("{")
    (tmp_path / "json" / "rock" / "empty.json").write_text("{}")
    (tmp_path / "json" / "rock" / "deep.json").write_text("[" * 100_000)
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 0
    assert set(archive.counts("release")) == {release(7)}
    reasons = Counter(quarantined(tmp_path / "out").values())
    assert reasons == {"damaged release id": 8, "not JSON": 2, "no release id": 1}
    assert release_of(json.dumps({"metadata": {"tags": {"musicbrainz_albumid": [evil[-1]]}}}).encode()) == release(1)
    with pytest.raises(BadFileError, match="damaged release id"):
        release_of(json.dumps({"metadata": {"tags": {"musicbrainz_albumid": [evil[-2]]}}}).encode())


def test_pictures_are_known_by_their_bytes(archive, tmp_path, monkeypatch):
    library(tmp_path / "json", archive, 4, tracks=1)
    archive.pictures[release(0)] = raw_data.encoded(raw_data.picture(0), "PNG")
    archive.pictures[release(1)] = raw_data.encoded(raw_data.picture(1), "GIF")
    archive.pictures[release(2)] = raw_data.header_of_huge_png()
    archive.pictures[release(3)] = raw_data.encoded(Image.effect_noise((300, 300), 90), "PNG")
    monkeypatch.setattr("shard_tools.music.coverart_client.COVER_BYTES", 50_000)
    assert len(archive.pictures[release(3)]) > 50_000
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 0
    assert [path.name for path in (tmp_path / "out" / "cover").rglob("*.*")] == ["track-0-0.png"]
    assert quarantined(tmp_path / "out") == {
        f"release/{release(1)}": "not JPEG or PNG", f"release/{release(2)}": "too many pixels",
        f"release/{release(3)}": "too many bytes"}
    assert max(archive.counts("download").values()) == 1


def test_a_dry_run_asks_for_nothing_and_writes_nothing(archive, tmp_path, capsys):
    library(tmp_path / "json", archive, 5)
    assert fetch(tmp_path / "json", tmp_path / "out", archive, dry_run=True) == 0
    assert "10 of 5 releases" in capsys.readouterr().out
    assert not archive.asked and not (tmp_path / "out").exists()


def test_the_command_reads_many_files_on_several_processes(tmp_path):
    for i in range(600):  # three tasks, each known to its process by a module, not by the command's __main__
        describe(tmp_path / "json", f"rock/{i}", [release(i // 2)])
    words = [sys.executable, "-m", "shard_tools.coverart", "--source", "json", "--out", "out", "--contact", CONTACT,
             "--dry_run", "--workers", "2"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "600 files: 600 of 300 releases, 0 name none" in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"contact": "me"}, "--contact 'me'"), ({"contact": "a@b.c\r\nX: y"}, "--contact"), ({"rate": 0.0}, "--rate"),
    ({"base_url": "ftp://x"}, "--base_url")])
def test_impossible_options_are_refused(archive, tmp_path, options, message):
    library(tmp_path / "json", archive, 1)
    with pytest.raises(ValueError, match=message):
        fetch(tmp_path / "json", tmp_path / "out", archive, **options)


def test_sizes_are_not_mixed(archive, tmp_path):
    library(tmp_path / "json", archive, 1)
    assert fetch(tmp_path / "json", tmp_path / "out", archive) == 0
    with pytest.raises(ValueError, match="--size 500, not full"):
        fetch(tmp_path / "json", tmp_path / "out", archive, size="full")
    assert fetch(tmp_path / "json", tmp_path / "other", archive, size="full") == 0
    assert archive.asked[-2][1].endswith("/front")
