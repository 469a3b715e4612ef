"""Optional packages, which extras of covergen install."""

from __future__ import annotations

import importlib.util


def need(extra: str, *modules: str) -> None:
    """Checks that the packages of an extra are installed.

    Raises:
        ValueError: one is not; says how to install it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"this needs {' and '.join(missing)}, not installed here: pip install -e '.[{extra}]'")
