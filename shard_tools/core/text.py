"""Texts as they are compared, and as they are shown."""

from __future__ import annotations

import unicodedata


def fold(text: str) -> str:
    """A text as it is compared: without the differences of case, spaces and ways to write a letter."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def printable(text: str) -> str:
    """Text that any font and terminal can show: bytes that are no UTF-8, and control characters, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
