"""Lists what a command left out: ``quarantine.jsonl``, its reasons on the screen, and the exit status."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from shard_tools.core.files import write_atomically

QUARANTINE = "quarantine.jsonl"


class Drop(NamedTuple):
    """One line of quarantine.jsonl."""

    path: str
    stage: str
    reason: str
    detail: str


def write_quarantine(root: Path, drops: Sequence[Drop]) -> str:
    """Writes the drops sorted by path; returns the SHA-256 of the file."""
    lines = drop_lines(sorted(drops))
    write_atomically(root / QUARANTINE, lines)
    return hashlib.sha256(lines).hexdigest()


def show_reasons(root: Path | str, drops: Sequence[Drop], word: str = "dropped", hint: str = "") -> None:
    """Prints how many drops have each reason, commonest first, a hint, and where they are named; nothing for none."""
    for reason, count in sorted(Counter(drop.reason for drop in drops).items(), key=lambda pair: (-pair[1], pair[0])):
        print(f"{word} {count:9,}  {reason}")
    for text in filter(None, (hint, f"each is named in {root}/{QUARANTINE}") if drops else ()):
        print(" " * len(word), text)


def verdict(lost: int, done: int, limit: float, what: str, end: str) -> int:
    """The exit status: 1, said why, when the share of what was lost is above a limit (``--max_failure_rate``);
    ``what``: both counts in words, a format of them; ``end``: what became of the rest."""
    rate = lost / max(1, lost + done)
    if rate <= limit:
        return 0
    print(f"{what.format(lost, done)} are {rate:.1%}, more than --max_failure_rate {limit:.1%}: exit status 1; {end}",
          file=sys.stderr)
    return 1


def drop_lines(drops: Iterable[Drop]) -> bytes:
    """Drops as JSON lines; names that are no UTF-8 keep their bytes as escapes."""
    return "".join(json.dumps(drop._asdict()) + "\n" for drop in drops).encode()
