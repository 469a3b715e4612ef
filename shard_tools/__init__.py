"""From folders, zips and music to WebDataset shards with an index, and back."""

from __future__ import annotations

__version__ = "0.1.0"
