"""An evaluation small enough for a pause in training: a run as it is now in, a few figures and a table of songs out."""

from __future__ import annotations

from typing import Any

from covergen.evaluation import denoising, judge, report, table
from covergen.evaluation.songs import choose, make_covers, read_songs
from covergen.runtime.data import IndexedShards
from covergen.runtime.ranks import Ranks
from covergen.runtime.run import Run

SONGS, NOISES, SHOWN = 128, 2, 16


class Glance:
    """The same songs of the validation split all through a run."""

    def __init__(self, shards: IndexedShards, resolution: int, arbiter: Run | None, seed: int) -> None:
        """Args: shards: with raw audio; resolution: of the run; arbiter: a judge, or None; seed: of the songs.

        Raises:
            ValueError: a judge of other shards.
        """
        if arbiter is not None:
            judge.same_audio(arbiter, shards)
        self.songs = read_songs(shards, choose(shards, SONGS, seed), resolution)
        self.genres, self.arbiter, self.seed = shards.facts["genres"], arbiter, seed

    def __call__(self, run: Run) -> tuple[dict[str, float], list[str], list[list[Any]]]:
        """Scalars ``eval/...``, and columns and rows of a table of songs."""
        alone = Ranks()
        heard = run.scale(self.songs.raw) if run.model.conditional else None
        covers = make_covers(run, heard, len(self.songs), NOISES, self.seed, alone, lambda made: None)
        figures: dict[str, table.Figure] = {}
        if self.arbiter is not None:
            seen = judge.see(self.arbiter, covers.flatten(0, 1)).unflatten(0, covers.shape[:2])
            figures |= table.dependence(seen.numpy(), judge.hear(self.arbiter, self.songs.raw).numpy(), self.songs,
                                        self.seed)
        if run.model.denoising_loss:
            figures |= denoising.gaps(run, self.songs, self.seed, alone)
        shown = report.song_table(self.arbiter, self.songs, covers, self.genres, SHOWN)
        return report.scalars({"run": figures}, "eval"), *shown
