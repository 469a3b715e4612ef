"""An evaluation's table for people and machines: text, JSON, scalars, and a table of songs with their covers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from covergen.evaluation.generation import COLUMNS
from covergen.evaluation.judge import embed_audio, embed_covers
from covergen.evaluation.metrics import with_count
from covergen.evaluation.scores import METRICS
from covergen.evaluation.songs import Songs
from covergen.evaluation.statistics import Figure
from covergen.inference.images import grid
from covergen.inference.trained_model import TrainedModel

COUNTED = ("r@1", "r@5", "r@10", "median_rank", "fid", "kid", "precision", "recall", "density", "coverage", "copied")


def title(metric: str, songs: int) -> str:
    """A metric's name; of those that depend on it with the number of covers."""
    if metric in COUNTED:
        return f"{metric} of {songs}" if metric.startswith(("r@", "median")) else with_count(metric, songs)
    return metric


def chance(metric: str, songs: int, genres: int) -> float | None:
    """What guessing reaches, where that is known."""
    if metric.startswith("r@"):
        return int(metric[2:]) / songs
    return {"median_rank": (songs + 1) / 2, "genre_accuracy": 1 / max(1, genres), "dependence": 0.0,
            "within_genre": 0.0, "icc": 0.0, "attribute_score": 0.0, "attribute_within_genre": 0.0,
            "denoising_gap": 0.0, "denoising_gap_within": 0.0, "copied": 0.5}.get(metric)


def as_json(metadata: dict[str, Any], figures: dict[str, dict[str, Figure]]) -> dict[str, Any]:
    """Metadata and figures as plain values; what is not finite is null."""
    def plain(value: float) -> float | None:
        return float(value) if math.isfinite(value) else None

    songs, shown = metadata["num_songs"], [metric for metric in METRICS if metric in figures["run"]]
    table = {column: {title(metric, songs): {name: plain(part) for name, part in figure._asdict().items()
                                             if part is not None} for metric, figure in row.items()}
             for column, row in figures.items()}
    guesses = {title(metric, songs): chance(metric, songs, metadata["genres"]) for metric in shown}
    return {**metadata, "columns": {name: COLUMNS[name] for name in figures},
            "metrics": {title(metric, songs): METRICS[metric] for metric in shown},
            "chance": {name: guess for name, guess in guesses.items() if guess is not None}, "table": table}


def as_text(metadata: dict[str, Any], figures: dict[str, dict[str, Figure]]) -> str:
    """The table as lines: a metric a row, the run with its interval and p, the baselines beside it, chance last."""
    songs, baselines = metadata["num_songs"], list(figures)[1:]
    width = max(len(title(metric, songs)) for metric in METRICS) + 1
    lines = [f"{metadata['model']} {metadata['checkpoint']} of {metadata['run']}: {songs} songs of "
             f"{metadata['split']}, {metadata['samples_per_song']} covers each",
             f"{'':{width}}{'run':>9} {'[95% interval]':^21} {'p':>7}"
             + "".join(f"{name:>14}" for name in baselines) + f"{'chance':>9}"]
    for metric in METRICS:
        if metric not in figures["run"]:
            continue
        own = figures["run"][metric]
        interval = f"[{short(own.low)}, {short(own.high)}]" if own.low is not None else ""
        p = "" if own.p is None else (f"{own.p:.2g}" if own.p >= 1e-3 else f"{own.p:.0e}")
        line = f"{title(metric, songs):{width}}{short(own.value):>9} {interval:^21} {p:>7}"
        for name in baselines:
            line += f"{short(figures[name][metric].value) if metric in figures[name] else '-':>14}"
        guess = chance(metric, songs, metadata["genres"])
        lines.append((line + (f"{short(guess):>9}" if guess is not None else "")).rstrip())
    for name, attribute in metadata["attributes"].items():
        lines.append(f"  {name:18} " + ", ".join(f"{key} {short(value)}" for key, value in attribute.items()))
    return "\n".join(lines)


def short(value: float | None) -> str:
    """Three significant digits."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3g}"


def scalars(figures: dict[str, dict[str, Figure]], section: str) -> dict[str, float]:
    """The run's figures as curves for W&B: ``<section>/<metric>`` and ``<section>/<metric>_p``."""
    row = {f"{section}/{metric.replace('@', '')}": figure.value for metric, figure in figures["run"].items()}
    row |= {f"{section}/{metric}_p": figure.p for metric, figure in figures["run"].items() if figure.p is not None}
    return {name: value for name, value in row.items() if math.isfinite(value)}


def song_table(judge: TrainedModel | None, songs: Songs, covers: Tensor, genres: list[str], count: int
               ) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for W&B of the first songs: song, genre, real cover, its generated covers (of uint8
    ``[N, K, 3, R, R]``) side by side, judge's scores (NaN without a judge)."""
    columns = ["song", "genre", "real cover", "generated covers", "judge, real", "judge, generated"]
    count = min(count, len(songs))
    scores = np.full((count, 2), math.nan)
    if judge is not None:
        audio = embed_audio(judge, songs.raw[:count])
        real = embed_covers(judge, songs.covers[:count])
        made = embed_covers(judge, covers[:count].flatten(0, 1)).unflatten(0, (count, -1))
        scores = np.stack([(real * audio).sum(1), (made * audio[:, None]).sum(2).mean(1)], 1)
    return columns, [[f"album {int(songs.groups[row]):x}", genres[genre] if genre >= 0 else "unknown",
                      grid(songs.covers[row][None].float() / 255),
                      grid(covers[row].float() / 255, columns=covers.shape[1]), *scores[row].tolist()]
                     for row, genre in enumerate(songs.genres[:count].tolist())]
