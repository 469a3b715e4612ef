"""Extractors ``acousticbrainz`` and ``acousticbrainz-559``: the numbers of low-level JSON files, and their releases.

Which numbers, and in what order, is a list of names written here, so a file's own order and additions don't matter.
It is what the thesis's walk finds in the files of extractor "music 1.0": ``lowlevel``, ``rhythm``, ``tonal`` in the
order of the files (alphabetical); a number is itself, a list becomes its mean and its standard deviation, a matrix
(``cov``, ``icov``) is one list of all its elements, strings are dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.dataset.schema import Schema
from shard_tools.dataset.source import read_path
from shard_tools.extractors import Extractor

JSON_BYTES = 16 * 2**20  # most bytes of a file that are parsed; real ones have 0.1 MB, with hours of beats 1 MB
STATISTICS = ("dmean", "dmean2", "dvar", "dvar2", "max", "mean", "median", "min", "var")

# What a name has after its descriptor. ``.var`` is a key of the file; ``:mean`` and ``:std`` are ours, of a list.
_NUMBER = ("",)
_LIST = (":mean", ":std")
_NUMBERS = tuple(f".{key}" for key in STATISTICS)
_LISTS = tuple(f".{key}{part}" for key in STATISTICS for part in _LIST)
_CEPSTRUM = tuple(f".{key}{part}" for key in ("cov", "icov", "mean") for part in _LIST)
_DESCRIPTORS = {  # by what they hold and where they are
    _NUMBER: {
        "lowlevel": "average_loudness dynamic_complexity",
        "rhythm": "beats_count bpm danceability onset_rate",
        "tonal": ("chords_changes_rate chords_number_rate key_strength tuning_diatonic_strength "
                  "tuning_equal_tempered_deviation tuning_frequency tuning_nontempered_energy_ratio"),
    },
    _LISTS: {
        "lowlevel": "barkbands erbbands melbands spectral_contrast_coeffs spectral_contrast_valleys",
        "rhythm": "beats_loudness_band_ratio",
        "tonal": "hpcp",
    },
    _NUMBERS: {
        "lowlevel": ("barkbands_crest barkbands_flatness_db barkbands_kurtosis barkbands_skewness barkbands_spread "
                     "dissonance erbbands_crest erbbands_flatness_db erbbands_kurtosis erbbands_skewness "
                     "erbbands_spread hfc melbands_crest melbands_flatness_db melbands_kurtosis melbands_skewness "
                     "melbands_spread pitch_salience silence_rate_20dB silence_rate_30dB silence_rate_60dB "
                     "spectral_centroid spectral_complexity spectral_decrease spectral_energy "
                     "spectral_energyband_high spectral_energyband_low spectral_energyband_middle_high "
                     "spectral_energyband_middle_low spectral_entropy spectral_flux spectral_kurtosis spectral_rms "
                     "spectral_rolloff spectral_skewness spectral_spread spectral_strongpeak zerocrossingrate"),
        "rhythm": ("beats_loudness bpm_histogram_first_peak_bpm bpm_histogram_first_peak_spread "
                   "bpm_histogram_first_peak_weight bpm_histogram_second_peak_bpm bpm_histogram_second_peak_spread "
                   "bpm_histogram_second_peak_weight"),
        "tonal": "chords_strength hpcp_entropy",
    },
    _CEPSTRUM: {
        "lowlevel": "gfcc mfcc",
    },
    _LIST: {
        "rhythm": "beats_position",
        "tonal": "chords_histogram thpcp",
    },
}

NAMES: tuple[str, ...] = tuple(path + end for path, ends in sorted(
    (f"{section}.{name}", ends) for ends, sections in _DESCRIPTORS.items()
    for section, names in sections.items() for name in names.split()) for end in ends)
"""The 580 numbers: keys joined by dots, then ``:mean`` or ``:std`` where the file has a list
(``lowlevel.spectral_spread.var``, ``lowlevel.barkbands.var:std``, ``lowlevel.mfcc.cov:mean``)."""

SIZE = len(NAMES)

# The script published with the thesis leaves the loop over a descriptor's statistics ("break", where "continue" was
# meant) at the first of dvar, dvar2 and var of these three. In the order of the files that is dvar, so dmean and
# dmean2 stay and 7 of 9 go; in a file of another order it would have dropped others, which we don't imitate.
_CUT_SHORT = tuple(f"lowlevel.{name}." for name in ("spectral_centroid", "spectral_rolloff", "spectral_spread"))
NAMES_559: tuple[str, ...] = tuple(
    name for name in NAMES if not name.startswith(_CUT_SHORT) or name.endswith((".dmean", ".dmean2")))
"""What the published script wrote: ``NAMES`` without dvar, dvar2, max, mean, median, min and var of
spectral_centroid, spectral_rolloff and spectral_spread."""

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MISSING = object()
_MAKERS = {"music 1.0": "AcousticBrainz's", "music 2.0": "today's Essentia's"}
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", float: "a number",
          type(None): "null"}


def read(data: bytes, names: Sequence[str] = NAMES, extractor: str = "music 1.0") -> np.ndarray:
    """The numbers called ``names`` of an AcousticBrainz low-level JSON file, float32 ``[len(names)]``, ``[580]``.

    With the names of ``extractors.essentia``, of a file by today's Essentia; ``extractor`` is whose names they are.

    They are raw: each has the unit of its Essentia descriptor (Hz, dB, bpm, seconds, none), and their sizes differ as
    1e-24 from 1e13. Standard deviations are those of a population, as numpy's. Only what ``names`` asks for need be
    there; of a key that is written twice the last counts. Source: ``json_to_npy`` of the scripts of "Towards album
    artwork generation based on audio" (jbu5105 on GitHub).
    """
    document = _parse(data)
    features = {path: _find(document, path) for path in (name.partition(":")[0] for name in names)}
    missing = [path for path, value in features.items() if value is _MISSING]
    if missing:
        raise BadFileError("missing feature", f"{missing[0]}; in all {len(missing)} of {len(features)} features are "
                                              f"missing{_other_extractor(document, extractor)}")
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows becomes infinite, which is refused below
        vector = np.array([_number(features, name) for name in names], np.float64).astype(np.float32)
    if not np.isfinite(vector).all():
        column = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise BadFileError("not finite", f"{names[column]} is {vector[column]}, as float32")
    return vector


def _parse(data: bytes) -> dict[str, Any]:
    """The file's object, all its numbers as floats: integers of any length too, infinity if they are too large."""
    if len(data) > JSON_BYTES:
        raise BadFileError("too many bytes", f"{len(data):,} bytes, the limit is {JSON_BYTES:,}")
    try:
        text = data.decode("utf-8-sig").rstrip()
        document = json.loads(text, parse_int=float)
    except UnicodeDecodeError as error:
        reason = "truncated JSON" if error.reason == "unexpected end of data" else "not JSON"
        raise BadFileError(reason, f"not UTF-8 at byte {error.start:,}: {error.reason}") from None
    except json.JSONDecodeError as error:
        unclosed = error.pos >= len(text) or not text.endswith("}")
        is_cut = text.lstrip().startswith("{") and unclosed and error.msg != "Extra data"
        raise BadFileError("truncated JSON" if is_cut else "not JSON", str(error)) from None
    except RecursionError:
        raise BadFileError("nested too deeply", "objects or lists inside each other beyond Python's limit") from None
    if not isinstance(document, dict):
        raise BadFileError("not a JSON object", f"{_KINDS[type(document)]}; expected an object with lowlevel, ...")
    return document


def _find(value: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _other_extractor(document: dict[str, Any], wanted: str) -> str:
    """What to add for a person whose file is of another extractor than ``wanted``; "" if it is not."""
    extractor = _find(document, "metadata.version.extractor")
    if not isinstance(extractor, str) or extractor == wanted:
        return ""
    kind = ", AcousticBrainz's, whose features differ" if extractor == "music 1.0" else (
        ", a newer Essentia, whose features differ" if extractor.startswith("music ") else "")
    return f": the file is by extractor {extractor[:40]!a}{kind}; {_MAKERS[wanted]} is {wanted!r}"


def _number(features: dict[str, Any], name: str) -> float:
    path, _, part = name.partition(":")
    value = features[path]
    if not isinstance(value, list if part else float):
        raise BadFileError("wrong feature type", f"{path} is {_KINDS[type(value)]}; expected a "
                                                 f"{'list of numbers' if part else 'number'}")
    if not part:
        return value
    rows = value if value and all(isinstance(row, list) for row in value) else [value]
    if any(len(row) != len(rows[0]) for row in rows):
        raise BadFileError("wrong feature type", f"{path} is a matrix with rows of different lengths")
    if not rows[0]:
        raise BadFileError("wrong feature type", f"{path} is an empty list")
    wrong = next((number for row in rows for number in row if not isinstance(number, float)), 0.0)
    if not isinstance(wrong, float):
        raise BadFileError("wrong feature type", f"{path} holds {_KINDS[type(wrong)]}; expected numbers only")
    numbers = np.array(rows, np.float64)
    return float(numbers.mean() if part == "mean" else numbers.std())


VERSION = 1


def acousticbrainz() -> Extractor:
    """All 580 numbers of a file of extractor "music 1.0"."""
    return Extractor(Schema("acousticbrainz", VERSION, NAMES), of_json=partial(read, names=NAMES))


def acousticbrainz_559() -> Extractor:
    """The 559 that the published script kept."""
    return Extractor(Schema("acousticbrainz-559", VERSION, NAMES_559), of_json=partial(read, names=NAMES_559))


def read_releases(source: Path, names: list[str]) -> list[tuple[str, str | BadFileError]]:
    """The release that each file of a folder names, or why there is none."""
    found: list[tuple[str, str | BadFileError]] = []
    for name in names:
        try:
            found.append((name, release_of(read_path(source / name, JSON_BYTES))))
        except BadFileError as error:
            found.append((name, error))
    return found


def release_of(data: bytes) -> str:
    """The MusicBrainz release id in the bytes of a low-level JSON file, in lower case; never anything but a UUID."""
    try:
        value = json.loads(data)["metadata"]["tags"]["musicbrainz_albumid"]
        value = value[0] if isinstance(value, list) else value
    except (KeyError, IndexError, TypeError):
        raise BadFileError("no release id", "its tags have no musicbrainz_albumid") from None
    except (ValueError, RecursionError) as error:
        raise BadFileError("not JSON", str(error)) from None
    if not isinstance(value, str) or not _UUID.fullmatch(mbid := value.strip().lower()):
        raise BadFileError("damaged release id", f"{str(value)[:60]!a} is no UUID")
    return mbid
