"""CSV tables whose names may be no UTF-8: their bytes become escapes of Python and come back as they were."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence


def table_bytes(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """The bytes of a CSV table."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode("utf-8", "surrogateescape")


def parse_table(data: bytes, columns: Sequence[str]) -> list[list[str]]:
    """The rows of a CSV table; ValueError unless it, and so each row, has exactly these columns."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")))
    except csv.Error as error:
        raise ValueError(str(error)) from None
    if rows[:1] != [list(columns)]:
        raise ValueError(f"expected the columns {', '.join(columns)}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise ValueError(f"line {number}: expected {len(columns)} values, found {len(row)}")
    return rows[1:]
