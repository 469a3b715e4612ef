"""Figures of images, points and curves by matplotlib, and their PNG and GIF files.

Sizes are in inches; a figure is 10 wide unless a table needs more, so that its smallest text is readable at 1000 px.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from PIL import Image
from torch import Tensor

from shard_tools.core.files import atomic_path

WIDTH, DPI = 10.0, 140
TITLE, TEXT, SMALL = 13, 10.5, 9.5  # points
LINE = 1.35 / 72  # inches of a line of text per point of its size
EDGE, GAP, BREAK, SMALLEST, LABEL = 0.12, 0.05, 0.3, 0.6, 1.6
SMOOTHED_FROM = 80  # points from which on a curve is also shown smoothed


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def animate(figures: Sequence[Figure], path: Path, milliseconds: int = 120) -> None:
    """Writes figures of one size as a GIF that goes there and back for ever, resting at both ends."""
    frames = []
    for figure in figures:
        figure.set_dpi(100)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB").quantize())
    there_and_back = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
    durations = [5 * milliseconds if number in (0, len(frames) - 1) else milliseconds for number in there_and_back]
    first, *rest = (frames[number] for number in there_and_back)
    with atomic_path(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def _figure(width: float, height: float, **more: object) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", **more)
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: names of genres and runs may hold its sign for formulas."""
    return text.replace("$", r"\$")


def _wrap(text: str, inches: float, size: float) -> list[str]:
    """Lines of a text that fit a width; letters are about 0.56 of their size wide, bold ones (titles) 0.65."""
    letters = max(4, int(inches * 72 / ((0.65 if size == TITLE else 0.56) * size)))
    return [line for part in text.split("\n") for line in textwrap.wrap(part, letters) or [""]]


class Line(NamedTuple):
    """One line of a table, with images ``[N, 3, R, R]`` in [0, 1] and a text below each of them or none."""

    label: str
    images: Tensor
    captions: Sequence[str] = ()


def table(lines: Sequence[Line], *, title: str, subtitle: str = "", columns: Sequence[str] = (),
          breaks: Sequence[int] = ()) -> Figure:
    """Images in lines, which may differ in their images' resolution and number, and columns.

    ``columns`` are headings, ``breaks`` the columns before which there is more space.
    """
    count = max(len(line.images) for line in lines)
    labels = [_wrap(line.label, LABEL, TEXT) for line in lines]
    left = EDGE + max(len(row) * 0.62 * TEXT / 72 for label in labels for row in label) + GAP
    between = BREAK * len(breaks) + EDGE
    side = max(SMALLEST, (WIDTH - left - between) / count - GAP)
    width = max(WIDTH, left + count * (side + GAP) + between)
    titles, subtitles = _wrap(title, width - 2 * EDGE, TITLE), _wrap(subtitle, width - 2 * EDGE, TEXT)
    subtitles = subtitles if subtitle else []
    heads = [_wrap(text, side, SMALL) for text in columns]
    captions = [[_wrap(text, side + GAP, SMALL) for text in line.captions] for line in lines]
    below = [LINE * SMALL * max(map(len, texts)) + 0.06 if texts else 0.0 for texts in captions]
    head = LINE * SMALL * max(map(len, heads)) + 0.04 if heads else 0.0
    top = EDGE + LINE * (TITLE * len(titles) + TEXT * len(subtitles)) + 0.1
    heights = [max(side, LINE * TEXT * len(label)) + space for label, space in zip(labels, below, strict=True)]
    figure = _figure(width, top + head + sum(heights) + GAP * len(lines) + EDGE)
    canvas = figure.add_axes((0, 0, 1, 1))  # its units are inches from the top left
    canvas.axis("off")

    def write(x: float, y: float, rows: list[str], size: float, **how: object) -> None:
        canvas.text(x, y, _plain("\n".join(rows)), fontsize=size, **how)

    write(EDGE, EDGE, titles, TITLE, va="top", weight="bold")
    write(EDGE, EDGE + LINE * TITLE * len(titles), subtitles, TEXT, va="top")
    lefts = [left + column * (side + GAP) + BREAK * sum(column >= before for before in breaks)
             for column in range(count)]
    for x, rows in zip(lefts, heads, strict=False):
        write(x + side / 2, top + head - 0.04, rows, SMALL, ha="center", va="bottom")
    y = top + head
    for line, label, texts, height in zip(lines, labels, captions, heights, strict=True):
        write(left - 0.08, y + side / 2, label, TEXT, ha="right", va="center", linespacing=1.2)
        for x, image in zip(lefts, line.images.clamp(0, 1), strict=False):
            canvas.imshow(image.permute(1, 2, 0).numpy(), extent=(x, x + side, y + side, y), interpolation="auto")
        for x, rows in zip(lefts, texts, strict=False):
            write(x + side / 2, y + side + 0.03, rows, SMALL, ha="center", va="top", linespacing=1.15)
        y += height + GAP
    canvas.set(xlim=(0, width), ylim=(figure.get_figheight(), 0), aspect="auto")
    return figure


def scatter(points: np.ndarray, labels: np.ndarray, names: Sequence[str], *, title: str, subtitle: str,
            axes: str) -> Figure:
    """Points ``[N, 2]`` coloured by label ``[N]``, with a legend of the names and how many points each has.

    Points are drawn in a random order, so that no label hides the others.
    """
    palette = "tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "turbo"
    colors = [colormaps[palette](number if palette != "turbo" else number / (len(names) - 1))
              for number in range(len(names))]
    figure = _figure(WIDTH, 8.0)
    plane = figure.add_axes((0.05, 0.055, 0.70, 0.83))
    order = np.random.default_rng(0).permutation(len(points))
    plane.scatter(*points[order].T, c=[colors[label] for label in labels[order]], s=float(np.clip(3e4 / len(points),
                  3, 40)), alpha=0.75, linewidths=0)
    plane.set(xticks=[], yticks=[])
    plane.set_xlabel(f"{axes} 1", fontsize=TEXT)
    plane.set_ylabel(f"{axes} 2", fontsize=TEXT)
    counts = np.bincount(labels, minlength=len(names))
    handles = [Line2D([], [], marker="o", linestyle="", color=color, markersize=7) for color in colors]
    figure.legend(handles, [_plain(f"{name} ({count:,})") for name, count in zip(names, counts, strict=True)],
                  loc="upper left", bbox_to_anchor=(0.755, 0.895), fontsize=TEXT, frameon=False, handletextpad=0.1)
    _head(figure, title, subtitle)
    return figure


def _head(figure: Figure, title: str, subtitle: str = "") -> None:
    width, height = figure.get_size_inches()
    titles = _wrap(title, width - 2 * EDGE, TITLE)
    x, y = EDGE / width, 1 - EDGE / height
    figure.text(x, y, _plain("\n".join(titles)), fontsize=TITLE, weight="bold", va="top")
    rows = _wrap(subtitle, width - 2 * EDGE, TEXT)
    figure.text(x, y - (LINE * TITLE * len(titles) + 0.03) / height, _plain("\n".join(rows)), fontsize=TEXT, va="top")


class Curve(NamedTuple):
    """Values over images seen, ``[N]`` each, of one run; NaN where a value is missing; noisy ones are smoothed."""

    run: str
    x: np.ndarray
    y: np.ndarray
    noisy: bool = True


def curves(panels: dict[str, Sequence[Curve]], runs: Sequence[str], *, title: str, across: str) -> Figure:
    """A panel for each name, the runs overlaid in the colours of one legend.

    Where there are many points the line is light and a smoothed one is drawn over it. Positive values over more than
    two decades have a logarithmic axis.
    """
    color = {run: colormaps["tab10"](number % 10) for number, run in enumerate(runs)}
    across_count = min(3, len(panels)) if len(panels) != 4 else 2
    down = -(-len(panels) // across_count)
    beside = max(1, min(len(runs), int(WIDTH / (0.6 + 0.62 * TEXT / 72 * max(map(len, runs))))))  # names in a line
    legend = EDGE + LINE * TITLE * len(_wrap(title, WIDTH - 2 * EDGE, TITLE)) + 0.05
    head = legend + LINE * TEXT * -(-len(runs) // beside) + 0.25
    figure = _figure(WIDTH, head + down * (WIDTH / across_count * 0.62 + 0.35), layout="constrained")
    height = figure.get_figheight()
    figure.get_layout_engine().set(rect=(0.005, 0.0, 0.99, 1 - head / height), wspace=0.03, hspace=0.04)
    grid = list(figure.subplots(down, across_count, squeeze=False).flat)
    furthest = max(curve.x.max() for found in panels.values() for curve in found)
    for panel, (name, found) in zip(grid, panels.items(), strict=False):
        for curve in found:
            many = curve.noisy and np.isfinite(curve.y).sum() >= SMOOTHED_FROM
            panel.plot(curve.x, curve.y, color=color[curve.run], alpha=0.25 if many else 1.0,
                       linewidth=0.8 if many else 1.6, marker="" if len(curve.x) > 40 else "o", markersize=3.5)
            if many:
                panel.plot(curve.x, smooth(curve.y), color=color[curve.run], linewidth=1.8)
        values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in found])
        if values.min() > 0 and values.max() > 100 * values.min():
            panel.set_yscale("log")
        else:
            panel.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
            panel.yaxis.get_offset_text().set_fontsize(SMALL)
        panel.set_title(_plain(name), fontsize=TEXT, weight="bold")
        panel.set_xlabel(across, fontsize=SMALL)
        panel.tick_params(labelsize=SMALL)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.set_xlim(0, 1.04 * furthest)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.25)
    for panel in grid[len(panels):]:
        panel.axis("off")
    handles = [Line2D([], [], color=color[run], linewidth=2.5) for run in runs]
    figure.legend(handles, [_plain(run) for run in runs], loc="upper left", ncols=beside, fontsize=TEXT,
                  frameon=False, bbox_to_anchor=(0.0, 1 - legend / height))
    _head(figure, title)
    return figure


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over a twentieth of the values ``[N]``, cut off at the ends; NaN is passed over."""
    half = max(2, len(values) // 40)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    centres = np.arange(len(values))
    low, high = np.maximum(centres - half, 0), np.minimum(centres + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])
