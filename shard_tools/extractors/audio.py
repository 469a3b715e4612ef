"""Decodes audio files for the extractors: their length, which excerpts to take, and mono samples piece by piece.

Decoding is FFmpeg's, in the PyAV package. Only demuxers of music files are allowed, and no network: what calls itself
a song may be a playlist that points anywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.core.extras import need
from shard_tools.extractors import load

SHORTEST = 3  # seconds

_DEMUXERS = "mp3,flac,ogg,wav,w64,mov,aac"
_MUSICBRAINZ = re.compile(r"((?:TR\w{16}__)?[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}-)\d+(__[0-9a-f-]{36})",
                          re.IGNORECASE | re.ASCII)


def duration(path: Path) -> float:
    """The length of an audio file in seconds, by its header; where that does not tell, by decoding it all.

    BadFileError is ``unreadable``, ``no audio`` or ``too short`` (less than ``SHORTEST``).
    """
    with _opened(path) as (container, stream):
        if stream.duration:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration:
            seconds = container.duration / 1e6
        else:
            seconds = sum(frame.samples for frame in _frames(container, stream)) / stream.codec_context.sample_rate
    check_length(seconds)
    return seconds


def check_length(seconds: float) -> None:
    """Raises BadFileError ``too short`` where there is too little to say anything of."""
    if seconds < SHORTEST:
        raise BadFileError("too short", f"{seconds:.2f} s; at least {SHORTEST:g} s are needed")


def excerpt_spans(duration: float, excerpt: float, excerpts: int) -> list[tuple[float, float]]:
    """(start, length) in seconds of the excerpts: the middles of equal shares of a track, which don't overlap.

    As many as fit, ``excerpts`` at most; of a track that is shorter than ``excerpt`` one, all of it.
    """
    if duration <= excerpt:
        return [(0.0, duration)]
    count = min(excerpts, int(duration / excerpt))
    share = duration / count
    return [(i * share + (share - excerpt) / 2, excerpt) for i in range(count)]


def extract_excerpts(extractor: str, options: dict[str, Any], excerpt: float | None, excerpts: int,
                     path: Path) -> tuple[float, list[tuple[int, float, float, np.ndarray]]]:
    """The length of a track in seconds, and number, start, length and vector of its excerpts that can be used.

    Excerpts of ``excerpt`` seconds (None = all of the track), ``excerpts`` at most; BadFileError if none can be used.
    """
    of_audio = load(extractor, **options).of_audio
    seconds, found, problems = duration(path), [], []
    if excerpt is None:
        return seconds, [(0, 0.0, seconds, of_audio(path, 0.0, None))]
    for number, (start, length) in enumerate(excerpt_spans(seconds, excerpt, excerpts)):
        try:
            found.append((number, start, length, of_audio(path, start, length)))
        except BadFileError as error:  # silence, or damage, in this excerpt
            problems.append(error)
    if not found:
        raise problems[0]
    return seconds, found


def numbered(stem: str, number: int) -> str:
    """The stem of an excerpt: its number takes the place of that in a MusicBrainz stem (``<track>-0__<album>``), and
    is put behind any other (``song-0``)."""
    match = _MUSICBRAINZ.fullmatch(stem)
    return f"{match[1]}{number}{match[2]}" if match else f"{stem}-{number}"


def pieces(path: Path, start: float, seconds: float | None, rate: int) -> Iterator[np.ndarray]:
    """Yields a part of a file as mono float32 ``[N]``, nominally in [-1, 1], at ``rate`` samples a second.

    Channels are averaged. What is before ``start`` is decoded and thrown away: seeking is not exact in every format.
    Damaged packets are left out, as players do. BadFileError is ``unreadable``, ``no audio`` or ``damaged audio``.
    """
    skip, left = round(start * rate), None if seconds is None else round(seconds * rate)
    for piece in _decoded(path, rate):
        if skip >= len(piece):
            skip -= len(piece)
            continue
        piece = piece[skip:] if left is None else piece[skip:skip + left]
        skip = 0
        yield piece
        if left is not None:
            left -= len(piece)
            if not left:
                return


def _decoded(path: Path, rate: int) -> Iterator[np.ndarray]:
    with _opened(path) as (container, stream):
        import av
        # Planar floats in the channels of the file, mixed here: FFmpeg's own mix is louder for floats than for 16 bits.
        resampler = av.AudioResampler("fltp", None, rate)
        begun = False
        for frame in _frames(container, stream):
            begun = True
            for part in resampler.resample(frame):
                yield part.to_ndarray().mean(0)
        for part in resampler.resample(None) if begun else ():
            yield part.to_ndarray().mean(0)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    import av
    for packet in container.demux(stream):
        with contextlib.suppress(av.error.InvalidDataError):
            yield from packet.decode()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container of a file and its audio stream; whatever FFmpeg says against it inside becomes ``BadFileError``."""
    need("audio", "av")
    import av
    path, stage = Path(path).resolve(), "unreadable"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for ever
            raise BadFileError("unreadable", "not a regular file")
        with av.open(str(path), options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}) as container:
            if not container.streams.audio:
                raise BadFileError("no audio", f"a {container.format.name} file without a stream of audio")
            stage = "damaged audio"
            yield container, container.streams.audio[0]
    except BadFileError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        # Errors of FFmpeg name the file with its folders, which differ from machine to machine.
        raise BadFileError(stage, getattr(error, "strerror", None) or str(error)) from None
