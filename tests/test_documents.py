"""The documents fit the code: links and their headings exist, and so does every command and option that they name."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest

from covergen import bench, models
from covergen.runs.config import options_of
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md",
         *sorted(path for top in ("covergen", "shard_tools", "launch") for path in (ROOT / top).rglob("README.md"))]
COMMANDS = {f"{path.parent.name}.{path.stem}": path for top in ("covergen", "shard_tools")
            for path in sorted((ROOT / top).glob("*.py")) if path.name != "cli.py" and "__main__" in path.read_text()}
# Options of accelerate launch, torchrun and ray, and of the proofs in tests/proofs.
OTHERS = {"config_file", "num_processes", "num_machines", "multi_gpu", "dynamo_backend", "max_restarts", "machine_rank",
          "main_process_ip", "nproc_per_node", "rdzv_backend", "head", "address", "test_only", "kills", "ranks",
          "cases", "only", "help"}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@functools.cache
def options(command: str) -> frozenset[str]:
    """The names of a command's options."""
    if command == "covergen.train":
        return frozenset({"config", "dry_run"}.union(*map(options_of, models.MODELS)))
    if command == "covergen.bench":
        return frozenset().union(*(inspect.signature(bench.load(what).run).parameters for what in bench.BENCHMARKS))
    module = importlib.import_module(command)
    entry = COMMANDS[command].read_text().partition("if __name__")[2]
    name = re.search(r"cli\.run\((\w+)", entry)[1]
    function = getattr(module, name, None) or getattr(module, command.rpartition(".")[2])
    return frozenset(inspect.signature(function).parameters)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES[:1] + PAGES[2:], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_options_and_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"-m ((?:covergen|shard_tools)\.\w+)", text):
        assert name in COMMANDS or name.endswith(".NAME"), f"{page}: {name}"
    known = OTHERS.union(*map(options, COMMANDS))
    for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
        assert name.replace("-", "_") in known, f"{page}: --{name}"
    for name in re.findall(r"(?<![\w/])(?:tests|covergen|shard_tools|launch)/[\w/.]+", text):
        assert (ROOT / name.rstrip(".")).exists(), f"{page}: {name}"


def test_every_command_and_every_option_of_it_is_named() -> None:
    pages = {page: page.read_text() for page in PAGES}
    everything = "\n".join(pages.values())
    for command in COMMANDS:
        assert f"-m {command}" in everything, command
        missing = [name for name in options(command) if not re.search(rf"--{name}\b", everything)
                   and name not in {"what", "shards", "run", "source", "out", "name", "thesis", "workers"}]
        assert not missing, f"{command}: {missing}"


def test_the_first_page_is_short_and_names_the_places_that_a_newcomer_looks_for() -> None:
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 160
    for words in ("## Your own data", "## On 8 GPUs", "## Resuming", "## Covers for a song", "#how-to-add-a-model"):
        assert words in text
