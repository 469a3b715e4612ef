"""The house keeps its plan: who imports whom, how long a file is, and a clean linter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(ROOT) for folder in ("covergen", "shard_tools", "tests")
               for path in (ROOT / folder).rglob("*.py"))
SOURCES = [path for path in FILES if path.parts[0] != "tests"]
MODEL_LIBRARIES = {"torch", "torchvision", "diffusers"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def outside(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"__future__"}


def room(path: Path) -> str:
    """Where a file lives: ``covergen`` or ``shard_tools`` for commands, else e.g. ``covergen.nn``."""
    return ".".join(path.parts[:-1])


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    modules, here = imports(path), room(path)
    if here.startswith("shard_tools"):
        banned = {"covergen", "torch", "torchvision", "webdataset", "accelerate", "wandb"}
        assert not outside(modules) & (banned - {"torch"} if path.name == "clap.py" else banned)
    if here == "covergen.nn":
        assert outside(modules) <= {"torch"}
    if here == "covergen.models" and path.name != "__init__.py":
        assert outside(modules) - {"covergen"} <= MODEL_LIBRARIES
        assert all(name.startswith("covergen.nn") for name in modules if name.startswith("covergen"))
    if here in ("covergen.analyses", "covergen.evaluation"):
        assert all(name.startswith((here, "covergen.metrics", "covergen.nn", "covergen.runtime"))
                   for name in modules if name.startswith("covergen"))
    if here == "covergen.runtime":
        upwards = {f"covergen.{file.stem}" for file in (ROOT / "covergen").glob("*.py")} - {"covergen.__init__"}
        assert not any(name.startswith(tuple(upwards)) for name in modules)
    if here == "shard_tools.formats":
        assert all(name.startswith(("shard_tools.formats", "shard_tools.__version__"))
                   for name in modules if name.startswith("shard_tools"))


@pytest.mark.parametrize(("library", "rooms"), [
    ("wandb", {"covergen/runtime/tracking.py"}),
    ("accelerate", {"covergen/runtime/engine.py"}),
    ("webdataset", {"covergen/runtime/foreign.py"}),
    ("ray", {"shard_tools/formats/rays.py"}),
    ("fire", {"shard_tools/cli.py"}),
    ("mutagen", {"covergen/runtime/tags.py", "shard_tools/formats/music.py"}),
    ("essentia", {"shard_tools/extractors/musicextractor.py"}),
    ("transformers", {"shard_tools/extractors/clap.py"}),
    ("av", {"shard_tools/extractors/audio.py"}),
    ("httpx", {"shard_tools/formats/polite.py"}),
    ("tenacity", {"shard_tools/formats/polite.py"}),
    ("imagehash", {"shard_tools/formats/fingerprints.py"}),
    ("fsspec", {"shard_tools/formats/remote.py"}),
    ("aiohttp", {"shard_tools/formats/remote.py"}),
    ("diffusers", {"covergen/models/flow.py"}),
    ("torchmetrics", {"covergen/evaluation/quality.py"}),
])
def test_a_library_is_known_in_one_room_only(library: str, rooms: set[str]) -> None:
    assert {str(path) for path in SOURCES if library in outside(imports(path))} == rooms


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_is_longer_than_300_lines_and_each_says_what_it_is(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text)), f"{path} has no first docstring line"


def test_ruff_is_clean() -> None:
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
