"""The plan of the house: who may import whom, where each library is used, and how many files a folder holds."""

from __future__ import annotations

import ast
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Each package from the bottom up: a folder may import from folders on lower levels, and from itself.
# "commands" are the files at the top of a package.
LEVELS = {
    "shard_tools": [{"core"}, {"dataset"}, {"shards"}, {"remote", "curation", "extractors", "music"}, {"commands"}],
    "covergen": [{"nn", "distributed"}, {"models", "data"}, {"runs"}, {"inference"}, {"training", "evaluation"},
                 {"analyses", "benchmarks", "experiments"}, {"commands"}],
}
TOPS = {"covergen", "shard_tools", "shard_tools.cli"}  # __version__, and the front door of every command
# Commands that others call as functions, from within functions: to make and pack the demo world, and workers that
# know a command's functions by its name.
CALLED = {"shard_tools.demo", "shard_tools.pack"}
LIBRARIES = {  # where each may be imported, and nowhere else
    "wandb": {"covergen/training/tracking.py"},
    "accelerate": {"covergen/training/engine.py"},
    "webdataset": {"covergen/data/webdataset.py"},
    "ray": {"shard_tools/core/parallel.py"},
    "fire": {"shard_tools/cli.py"},
    "mutagen": {"shard_tools/music/embed.py", "shard_tools/music/tags.py"},
    "essentia": {"shard_tools/extractors/essentia.py"},
    "transformers": {"shard_tools/extractors/clap.py"},
    "av": {"shard_tools/extractors/audio.py"},
    "httpx": {"shard_tools/music/coverart_client.py"},
    "tenacity": {"shard_tools/music/coverart_client.py"},
    "imagehash": {"shard_tools/curation/fingerprints.py"},
    "fsspec": {"shard_tools/remote/filesystem.py"},
    "aiohttp": {"shard_tools/remote/filesystem.py"},
    "diffusers": {"covergen/models/flow.py"},
    "torchmetrics": {"covergen/evaluation/metrics.py"},
}
MOST_FILES = 13


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


FILES = {dotted(path.relative_to(ROOT)): path.relative_to(ROOT)
         for top in LEVELS for path in sorted((ROOT / top).rglob("*.py"))}


def folder(path: Path) -> str:
    return path.parts[1] if len(path.parts) > 2 else "commands"


def level(path: Path) -> int:
    return next(number for number, names in enumerate(LEVELS[path.parts[0]]) if folder(path) in names)


@functools.cache
def imports(path: Path) -> tuple[tuple[str, str], ...]:
    """Every module that a file imports, anywhere in it: its top-level name, and the dotted name."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            inside = [f"{node.module}.{name}" for name in names]
            names = [name if name in FILES else node.module for name in inside]
        for name in names:
            yield name.partition(".")[0], name


def refused(path: Path) -> list[str]:
    """The imports of a file that the levels do not allow."""
    found = []
    for top, name in imports(path):
        if top not in LEVELS or name in TOPS:
            continue
        there = FILES[name]
        if top != path.parts[0]:
            wrong = path.parts[0] == "shard_tools"
        elif folder(there) == folder(path):
            wrong = folder(path) == "commands" and name not in CALLED | {dotted(path)}
        else:
            wrong = level(there) >= level(path)
        if wrong:
            found.append(f"{path} imports {name}")
    return found


@pytest.mark.parametrize("path", FILES.values(), ids=str)
def test_imports_go_one_way(path: Path) -> None:
    assert not refused(path)


def test_there_are_no_circles() -> None:
    arrows = {module: {name for top, name in imports(path) if name in FILES and name not in {*TOPS, module}}
              for module, path in FILES.items()}
    while ends := {module for module, others in arrows.items() if not others}:
        arrows = {module: others - ends for module, others in arrows.items() if module not in ends}
    assert not arrows


def test_every_library_is_used_in_its_own_place_only() -> None:
    found = defaultdict(set)
    for path in FILES.values():
        for top, _ in imports(path):
            if top in LIBRARIES:
                found[top].add(str(path))
    assert found == LIBRARIES


@pytest.mark.parametrize("path", FILES.values(), ids=str)
def test_lower_levels_know_few_libraries(path: Path) -> None:
    known = {top for top, _ in imports(path)} - set(sys.stdlib_module_names) - set(LEVELS)
    if path.parts[0] == "shard_tools":
        assert "torch" not in known or path.name == "clap.py"
        assert not known & {"torchvision", "webdataset", "accelerate", "wandb"}
    if path.parts[:2] == ("covergen", "nn"):
        assert known <= {"torch"}
    if path.parts[:2] == ("covergen", "models"):
        assert known <= {"torch", "torchvision", "diffusers"}
        others = {name for _, name in imports(path) if name.startswith("covergen.models.")}
        assert others <= {"covergen.models.base"}, "no model imports another"


@pytest.mark.parametrize("path", FILES.values(), ids=str)
def test_every_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))


def test_folders_stay_small() -> None:
    folders = defaultdict(list)
    for path in FILES.values():
        folders[path.parent].append(path.name)
    assert {str(where): len(names) for where, names in folders.items() if len(names) > MOST_FILES} == {}
    assert {where.name for where in folders} == {*LEVELS, *(name for levels in LEVELS.values() for names in levels
                                                            for name in names if name != "commands")}
