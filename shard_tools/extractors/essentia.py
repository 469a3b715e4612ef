"""Extractor ``essentia``: the 582 numbers of Essentia's MusicExtractor, of audio or of its raw JSON.

Audio is brought to what the extractor was given for the JSON that we know, mono, 44.1 kHz, 16 bits, by PyAV: Essentia's
own FFmpeg of 2018 knows no Opus, and puts 13 ms of silence before Ogg Vorbis, which shifts all that silence changes.
Essentia is under the AGPL; it is an extra, imported when it is first needed.
"""

from __future__ import annotations

import json
import tempfile
import wave
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.core.extras import need
from shard_tools.dataset.schema import Schema
from shard_tools.extractors import Extractor, acousticbrainz
from shard_tools.extractors.acousticbrainz import STATISTICS, read
from shard_tools.extractors.audio import check_length, pieces

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


RATE = 44100
LONGEST = 3600  # seconds: MusicExtractor takes 0.55 s and 35 MB a minute of audio
_STATISTICS = ("lowlevelStats", "rhythmStats", "tonalStats")  # all else as Essentia has it


def essentia() -> Extractor:
    """``of_json`` needs no extra; ``of_audio`` and ``json_of_audio`` the extra ``audio``."""
    return Extractor(Schema("essentia", VERSION, NAMES), of_json=partial(read, names=NAMES, extractor=EXTRACTOR),
                     of_audio=of_audio, json_of_audio=json_of_audio)


def of_audio(path: Path, start: float = 0.0, seconds: float | None = None) -> np.ndarray:
    """The numbers of (a part of) an audio file, float32 ``[582]``."""
    return read(json_of_audio(path, start, seconds), NAMES, EXTRACTOR)


def json_of_audio(path: Path, start: float = 0.0, seconds: float | None = None) -> bytes:
    """What MusicExtractor says of (a part of) an audio file, as JSON of its own layout, numbers exact in float32.

    Beyond the errors of ``pieces``, BadFileError is ``too short``, ``too long`` or ``silent audio``.
    """
    need("audio", "essentia", "av")
    import essentia
    essentia.log.infoActive = essentia.log.warningActive = essentia.log.errorActive = False  # from its import on
    import essentia.standard
    with tempfile.TemporaryDirectory(prefix="covergen-") as folder:
        name = str(Path(folder) / "excerpt.wav")
        with wave.open(name, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            for piece in pieces(path, start, seconds, RATE):
                file.writeframes((piece * 32768).round().clip(-32768, 32767).astype("<i2").tobytes())
                if file.tell() > LONGEST * RATE:
                    raise BadFileError("too long", f"more than {LONGEST:,} s; take a part of it: --excerpt 30")
            check_length(file.tell() / RATE)
        try:
            stages = {stage: list(STATISTICS) for stage in _STATISTICS}
            pool, _ = essentia.standard.MusicExtractor(**stages)(name)
        except RuntimeError as error:
            text = str(error).removeprefix("In MusicExtractor.compute: ")
            raise BadFileError("silent audio" if "silent" in text else "damaged audio", text[:300]) from None
    tree: dict[str, Any] = {}  # nested by the dots in the names
    for name in pool.descriptorNames():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = _plain(pool[name])
    return json.dumps(tree, indent=1).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, (list, np.ndarray)):
        return [_plain(item) for item in value]
    return value if isinstance(value, str) else float(f"{value:.9g}")  # 9 digits tell all float32 apart
