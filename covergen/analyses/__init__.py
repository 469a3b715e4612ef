"""The pictures of ``covergen.analyze``, a file each.

Each has a ``draw`` whose options the command passes on; it raises ValueError for what can't be drawn, and a file is
written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def names_of(folders: Sequence[Path]) -> list[str]:
    """What to call runs: the last part of their folders, or the whole where two would have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
