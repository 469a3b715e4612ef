"""Essentia's features: what today's MusicExtractor ("music 2.0") calls its numbers, by difference to AcousticBrainz's.

The walk is that of ``acousticbrainz.read``. The list is what it finds in the files of Essentia 2.1 beta 6 (the wheels
of PyPI) with the nine ``STATISTICS``: the same 500 features in each of the 478 files that it was written by.
"""

from __future__ import annotations

from shard_tools.formats import acousticbrainz
from shard_tools.formats.acousticbrainz import STATISTICS

VERSION = 1  # of the list; another list is another version
EXTRACTOR = "music 2.0"

_GONE = ("rhythm.bpm_histogram_", "tonal.key_strength")  # the first come back as one number each, all but one of them
_NUMBERS = (
    "lowlevel.loudness_ebu128.integrated",
    "lowlevel.loudness_ebu128.loudness_range",
    *(f"lowlevel.loudness_ebu128.momentary.{key}" for key in STATISTICS),
    *(f"lowlevel.loudness_ebu128.short_term.{key}" for key in STATISTICS),
    "rhythm.bpm_histogram_first_peak_bpm",
    "rhythm.bpm_histogram_first_peak_weight",
    "rhythm.bpm_histogram_second_peak_bpm",
    "rhythm.bpm_histogram_second_peak_spread",
    "rhythm.bpm_histogram_second_peak_weight",
    *(f"tonal.hpcp_crest.{key}" for key in STATISTICS),
    "tonal.key_edma.strength",
    "tonal.key_krumhansl.strength",
    "tonal.key_temperley.strength",
)
_LISTS = (*(f"lowlevel.melbands128.{key}" for key in STATISTICS), "rhythm.bpm_histogram")

NAMES: tuple[str, ...] = tuple(sorted([
    *(name for name in acousticbrainz.NAMES if not name.startswith(_GONE)),
    *_NUMBERS,
    *(path + part for path in _LISTS for part in (":mean", ":std")),
], key=lambda name: name.partition(":")))
"""The 582 numbers, spelt as those of ``acousticbrainz.NAMES``, of which 525 are here too."""
