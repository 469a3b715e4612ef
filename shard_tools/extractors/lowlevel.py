"""Extractors ``acousticbrainz`` and ``acousticbrainz-559``: a low-level JSON file in, the thesis's numbers out."""

from __future__ import annotations

from functools import partial

from shard_tools.extractors import Extractor
from shard_tools.formats.acousticbrainz import NAMES, NAMES_559, read
from shard_tools.formats.schema import Schema

VERSION = 1


def acousticbrainz() -> Extractor:
    """All 580 numbers of a file of extractor "music 1.0"."""
    return Extractor(Schema("acousticbrainz", VERSION, NAMES), of_json=partial(read, names=NAMES))


def acousticbrainz_559() -> Extractor:
    """The 559 that the published script kept."""
    return Extractor(Schema("acousticbrainz-559", VERSION, NAMES_559), of_json=partial(read, names=NAMES_559))
