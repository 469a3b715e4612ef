"""Errors of data that is wrong, apart from errors of ours."""

from __future__ import annotations

import re


class BadFileError(ValueError):
    """A file that can't be used: a short stable ``reason`` to count by, and the ``detail`` of this one."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        # Messages of libraries may hold addresses ("<BytesIO object at 0x7f...>"), which differ from run to run.
        self.reason, self.detail = reason, re.sub(r"\b0x[0-9a-f]{6,}", "0x...", detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class SourceChangedError(ValueError):
    """The source is not what it was when it was listed: all that was learned of it is void."""
