"""Optional packages, which extras of covergen install."""

from __future__ import annotations

import importlib.util


def need(extra: str, *modules: str) -> None:
    """Raises ValueError, which says how to install it, where a package of an extra is not installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"this needs {' and '.join(missing)}, not installed here: pip install -e '.[{extra}]'")
