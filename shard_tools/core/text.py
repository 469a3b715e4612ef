"""Texts as they are compared."""

from __future__ import annotations

import unicodedata


def fold(text: str) -> str:
    """A text as it is compared: without the differences of case, spaces and ways to write a letter."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
