"""A sample of damaged input against every command; ``pytest -m slow -k fuzz`` runs 2,000 cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proofs import fuzz
from tests.proofs.sandbox import Outcome, watched
from tests.proofs.targets import TARGETS
from tests.support.material import make_material

pytest.importorskip("zstandard")

QUICK = ("pack folder", "pack zip", "verify", "inspect", "features of files", "features of dump.tar.gz", "generate",
         "train on, gan", "experiment", "coverart")


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("some"), all_of_it=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("av", "essentia", "mutagen", "diffusers"):
        pytest.importorskip(library)
    return make_material(tmp_path_factory.mktemp("material"))


def failures(results: list[fuzz.Result]) -> str:
    return "\n".join(fuzz.told(result) for result in results if result.complaints)


def test_damaged_input_is_refused_in_a_line_or_passed_over(some: Path) -> None:
    targets = tuple(target for target in TARGETS if target.name in QUICK)
    assert len(targets) == len(QUICK)
    results = list(fuzz.run(range(24), some, targets))
    assert not failures(results), failures(results)
    assert len({result.damage.kind for result in results}) > 5


def test_the_judge_sees_what_a_command_must_not_do(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import os, sys\nopen('../outside', 'w').close()\nos.system('true')\n"
                                     "x = bytearray(300_000_000)\nprint('error: no')\nsys.exit(2)\n")
    (tmp_path / "worse.py").write_text("raise KeyError('lost')\n")
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(60)\n")
    env = {"PATH": "/usr/bin:/bin"}
    found = watched("bad", [], tmp_path, env, [tmp_path])
    assert any("outside" in stray for stray in found.strays) and any("ran" in stray for stray in found.strays)
    assert any("without a clear line" in complaint for complaint in fuzz.manners(found))
    assert "a traceback" in fuzz.manners(watched("worse", [], tmp_path, env, [tmp_path]))
    endless = watched("endless", [], tmp_path, env, [tmp_path], seconds=1.0)
    assert endless.status is None and any("no end" in complaint for complaint in fuzz.manners(endless))
    assert not fuzz.manners(Outcome(2, "error: --run x is not a run folder\n", 1.0, 0, []))


@pytest.mark.slow
def test_every_command_succeeds_on_sound_input(base: Path) -> None:
    results = list(fuzz.run(range(len(TARGETS)), base, harm=False))
    assert not failures(results), failures(results)


@pytest.mark.slow
def test_two_thousand_damaged_artefacts_against_every_command(base: Path) -> None:
    results = list(fuzz.run(range(2000), base))
    print(fuzz.summary(results))
    assert not failures(results), failures(results)
