"""An evaluation's table for people and machines: figures in; text, JSON, scalars and a table of songs out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from covergen.evaluation import judge as judges
from covergen.evaluation.generation import COLUMNS, Songs
from covergen.evaluation.metrics import named
from covergen.evaluation.scores import METRICS, Figure
from covergen.inference import images as pictures
from covergen.inference.trained_model import TrainedModel

COUNTED = ("r@1", "r@5", "r@10", "median_rank", "fid", "kid", "precision", "recall", "density", "coverage", "copied")


def title(metric: str, songs: int) -> str:
    """A metric's name; of those that depend on it with the number of covers."""
    if metric in COUNTED:
        return f"{metric} of {songs}" if metric.startswith(("r@", "median")) else named(metric, songs)
    return metric


def chance(metric: str, songs: int, genres: int) -> float | None:
    """What guessing reaches, where that can be told."""
    if metric.startswith("r@"):
        return int(metric[2:]) / songs
    return {"median_rank": (songs + 1) / 2, "genre_accuracy": 1 / max(1, genres), "dependence": 0.0,
            "within_genre": 0.0, "icc": 0.0, "attribute_score": 0.0, "attribute_within_genre": 0.0,
            "denoising_gap": 0.0, "denoising_gap_within": 0.0, "copied": 0.5}.get(metric)


def as_json(metadata: dict[str, Any], figures: dict[str, dict[str, Figure]]) -> dict[str, Any]:
    """Facts and figures as plain values; what is not finite is null."""
    def plain(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else float(value)

    songs = metadata["songs"]
    table = {column: {title(metric, songs): {name: plain(part) for name, part in figure._asdict().items()
                                             if part is not None} for metric, figure in row.items()}
             for column, row in figures.items()}
    return {**metadata, "columns": {name: COLUMNS[name] for name in figures},
            "metrics": {title(metric, songs): METRICS[metric] for metric in METRICS if metric in figures["run"]},
            "chance": {title(metric, songs): found for metric in METRICS if metric in figures["run"]
                       and (found := chance(metric, songs, metadata.get("genres", 0))) is not None}, "table": table}


def as_text(metadata: dict[str, Any], figures: dict[str, dict[str, Figure]]) -> str:
    """The table as lines: a metric a row, the run with its interval and p, the baselines beside it, chance last."""
    songs, names = metadata["songs"], list(figures)
    wide = max(len(title(metric, songs)) for metric in METRICS) + 1
    head = f"{'':{wide}}{'run':>9} {'[95% interval]':^21} {'p':>7}" + "".join(f"{name:>14}" for name in names[1:])
    lines = [f"{metadata['model']} {metadata['checkpoint']} of {metadata['run']}: {songs} songs of {metadata['split']}, "
             f"{metadata['noises']} covers each", head + f"{'chance':>9}"]
    for metric in METRICS:
        if metric not in figures["run"]:
            continue
        own = figures["run"][metric]
        interval = f"[{short(own.low)}, {short(own.high)}]" if own.low is not None else ""
        p = "" if own.p is None else (f"{own.p:.2g}" if own.p >= 1e-3 else f"{own.p:.0e}")
        line = f"{title(metric, songs):{wide}}{short(own.value):>9} {interval:^21} {p:>7}"
        for name in names[1:]:
            line += f"{short(figures[name][metric].value) if metric in figures[name] else '-':>14}"
        guess = chance(metric, songs, metadata.get("genres", 0))
        lines.append((line + (f"{short(guess):>9}" if guess is not None else "")).rstrip())
    for name, attribute in (metadata.get("attributes") or {}).items():
        lines.append(f"  {name:18} " + ", ".join(f"{key} {short(value)}" for key, value in attribute.items()))
    return "\n".join(lines)


def short(value: float | None) -> str:
    """Three significant digits."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3g}"


def scalars(figures: dict[str, dict[str, Figure]], section: str) -> dict[str, float]:
    """The run's figures as curves for W&B: ``<section>/<metric>`` and ``<section>/<metric>_p``."""
    row = {}
    for metric, figure in figures["run"].items():
        row[f"{section}/{metric.replace('@', '')}"] = figure.value
        if figure.p is not None:
            row[f"{section}/{metric}_p"] = figure.p
    return {name: value for name, value in row.items() if math.isfinite(value)}


def song_table(judge: TrainedModel | None, songs: Songs, covers: Any, genres: list[str], count: int
               ) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for W&B: song, genre, real cover, its generated covers side by side, judge's scores.

    Args: judge; songs; covers: uint8 ``[N, K, 3, R, R]``; genres: names; count: of rows.
    """
    columns = ["song", "genre", "real cover", "generated covers", "judge, real", "judge, generated"]
    some = range(min(count, len(songs)))
    scores = np.full((len(songs), 2), math.nan)
    if judge is not None:
        heard = judges.embed_audio(judge, songs.raw[:len(some)])
        real = judges.embed_covers(judge, songs.covers[:len(some)])
        made = judges.embed_covers(judge, covers[:len(some)].flatten(0, 1)).unflatten(0, (len(some), -1))
        scores = np.stack([(real * heard).sum(1), (made * heard[:, None]).sum(2).mean(1)], 1)
    rows = []
    for place in some:
        kind = int(songs.genres[place])
        rows.append([f"album {int(songs.groups[place]):x}", genres[kind] if kind >= 0 else "unknown",
                     pictures.grid(songs.covers[place][None].float() / 255),
                     pictures.grid(covers[place].float() / 255, columns=covers.shape[1]), *scores[place].tolist()])
    return columns, rows
