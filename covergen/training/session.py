"""What surrounds the loop of training: when something is due, the opened run folder, and what a run reports."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from covergen.data.batch import Batch
from covergen.data.loader import Loader
from covergen.data.memory_cache import cache_decoded
from covergen.distributed.interrupts import StopSignal
from covergen.inference.trained_model import TrainedModel
from covergen.models.base import Model
from covergen.runs.checkpoint import Checkpoints, checkpoints, last_good, step_of
from covergen.runs.config import Config, Training
from covergen.runs.folder import resolve_resume, write_run
from covergen.runs.state import TrainState
from covergen.runs.sync import open_sync
from covergen.training.batch_split import BatchSplit
from covergen.training.engine import Engine
from covergen.training.profiler import Profile
from covergen.training.sample_grids import SampleGrids
from covergen.training.setup import TrainingData, log_main
from covergen.training.tracking import Tracker
from shard_tools.core.locks import lock_folder


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    grids: bool
    save: bool
    validate: bool
    evaluate: bool
    networks: bool  # any of those, which need the networks
    epoch: bool  # one ended with it
    log: bool  # any of those, or just a line of the log


class Schedule:
    """The plan of a run, a pure function of its options and its data: its last step, its patience, what is due."""

    def __init__(self, training: Training, images_per_step: int, epoch: int, validates: bool) -> None:
        """An epoch is of so many images (0: unknown); with ``validates`` there are validation losses."""
        self.training, self.images_per_step, self.epoch, self.validates = training, images_per_step, epoch, validates
        self.steps = min(training.steps, -(-training.epochs * epoch // images_per_step) or training.steps)
        self.patience = training.patience if validates else 0

    def steps_after(self, state: TrainState) -> range:
        """The steps that are left; none before a validation that is pending."""
        return range(state.step + 1, 1 if state.early_stopping.validation_pending else self.steps + 1)

    def due(self, step: int) -> Due:
        """What is due after a step."""
        def every(steps: int) -> bool:
            return bool(steps) and step % steps == 0

        last, images = step == self.steps, step * self.images_per_step
        epoch = bool(self.epoch) and images // self.epoch > (images - self.images_per_step) // self.epoch
        grids, save = last or every(self.training.sample_every), last or every(self.training.save_every)
        validate, evaluate = self.validates and (last or epoch), every(self.training.eval_every)
        networks = grids or save or validate or evaluate
        return Due(grids, save, validate, evaluate, networks, epoch, networks or every(self.training.log_every))


class Run:
    """A run folder that is being trained in; ``metadata`` is of its data, ``status`` the exit status so far."""

    def __init__(self, config: Config, data: TrainingData, model: Model, engine: Engine, schedule: Schedule) -> None:
        self.config, self.data, self.model, self.engine, self.schedule = config, data, model, engine, schedule
        self.folder, self.status = config.folder, 0
        known, main = data.stream.metadata, engine.ranks.main
        self.metadata = {"shards": str(data.shards), "identity": data.stream.identity, "samples": known["samples"],
                         "resolution": data.resolution, "genres": known["genres"], "audio": known["audio"]}
        self.resources = contextlib.ExitStack()
        out, name, keep = config.training.out, config.training.name, config.training.keep
        with engine.ranks.main_first():
            sync = open_sync(out, name, keep, main)
            if main:
                self.resources.enter_context(lock_folder(self.folder))
            start = resolve_resume(config, log_main)
            if main and not (start and step_of(start) >= schedule.steps):
                write_run(self.folder, config, self.metadata, resuming=start is not None)
        self.checkpoints = self.closing(Checkpoints(self.folder, keep, start, sync))

    def closing(self, opened: Any) -> Any:
        """What was opened, whose ``close`` is called when training ends, however it does."""
        return self.resources.enter_context(contextlib.closing(opened))

    def finished(self, state: TrainState) -> bool:
        """Whether there is nothing left to train, which is said then, with what would go on."""
        training, schedule, early = self.config.training, self.schedule, state.early_stopping
        if state.step >= schedule.steps and not early.validation_pending:
            more = (f"--steps {2 * state.step}" if schedule.steps == training.steps else
                    f"--epochs {2 * training.epochs}")
            log_main(f"the run is complete at step {state.step}; {more} would go on")
        elif early.should_stop(schedule.patience):
            log_main(f"the run stopped early at step {state.step}: {self._best(state)}. "
                     f"--patience {2 * schedule.patience} would go on")
        else:
            return False
        return True

    def announce(self, threads: tuple[int, str]) -> None:
        """Says what is trained, on what and where."""
        data, checkpoints, ranks = self.data, self.checkpoints, self.engine.ranks
        if self.model.validation_phase and not self.schedule.validates:
            log_main(f"note: {data.shards} has no val split: there is no validation loss and no early stopping")
        split = BatchSplit(self.config.training, ranks.rank, ranks.ranks, self.model.needs_whole_batch)
        for notice in filter(None, (data.stream.notice, split.notice)):
            log_main(f"note: {notice}")
        log_main(f"{self.config.model} at {data.resolution} px on {data.stream.samples:,} samples of {data.shards}\n"
                 f"{self.engine.describe()}, {threads[0]} thread{'s' if threads[0] > 1 else ''} each ({threads[1]})\n"
                 f"{self.model.sizes()} parameters\n"
                 f"run folder {self.folder}"
                 + (f", uploaded to {self.config.training.out}" if checkpoints.sync else "")
                 + (f", going on from {checkpoints.start}" if checkpoints.start else ""))

    def open_loader(self, step: int) -> Loader:
        """The batches of the run's steps after ``step``."""
        training, stream, engine = self.config.training, self.data.stream, self.engine
        count = engine.batches_per_step
        stream.corruption.list_in(self.folder / "corrupt_samples.jsonl")
        stream.ends(self.schedule.steps * engine.images_per_step)
        cache_decoded(stream, training.decoded_cache, self.data.resolution, engine.device, log_main)
        return self.closing(Loader(stream, step * count, device=engine.device, resolution=self.data.resolution,
                                   threads=training.loader_threads, ahead=count, stop=self.schedule.steps * count))

    def finish(self, state: TrainState, stop: StopSignal) -> None:
        """Says how training ended, and sets the exit status."""
        early = state.early_stopping
        if early.should_stop(self.schedule.patience):
            log_main(f"stopped early at step {state.step}, after {early.waited} epochs without a better validation "
                     "loss")
        elif state.step < self.schedule.steps or early.validation_pending:
            log_main(f"stopped after step {state.step} ({stop.reason or 'another process was asked to'}); "
                     "the same command goes on from there")
            out_of_time = torch.tensor(float(stop.out_of_time), device=self.engine.device)
            self.status = stop.status(timed=self.engine.ranks.sum(out_of_time).item() > 0)
        else:
            self.checkpoints.wait()
            log_main(f"done: {state.step} steps; grids in {self.folder / 'grids'}, weights in "
                     f"{self.folder / 'checkpoints'}")
        if early.best_step:
            log_main(self._best(state))

    def _best(self, state: TrainState) -> str:
        """The best validation loss, for people; a run that was converted may not have the weights of then."""
        early = state.early_stopping
        there = [path for path in checkpoints(self.folder, "best") if step_of(path) == early.best_step]
        return (f"the best validation loss, {early.best:.6g}, was at step {early.best_step}"
                + (f": {there[0]}" if there else ""))


@contextlib.contextmanager
def open_run(config: Config, data: TrainingData, model: Model, engine: Engine, schedule: Schedule) -> Iterator[Run]:
    """Opens or makes the run folder for rank 0 to write in; other processes are told why this one fails.

    A loss that is not finite ends the block with a message and ``status`` 1. For errors see ``resolve_resume`` and
    ``write_run``.
    """
    run = Run(config, data, model, engine, schedule)
    try:
        with run.resources:
            yield run
    except FloatingPointError as error:
        log_main(f"stopped: {error}. {last_good(run.folder)}. A smaller --lr, --grad_clip 1 or --mixed_precision no "
                 "may help (as a run with another --name), or --on_nan skip 10 here.")
        run.status = 1
    except Exception as error:  # boundary: whatever it is, the other processes must know of it
        engine.ranks.report_failure(error)
        raise
    if run.checkpoints.failure:
        log_main(f"stopped: {run.checkpoints.failure}. {last_good(run.folder)}. Make room; the same command goes on "
                 "from there")
        run.status = 1
    engine.ranks.close()


class Report:
    """What a run shows while it trains: log, grids, evaluations, progress bar and profile; most of it on rank 0."""

    def __init__(self, run: Run, loader: Loader, examples: Batch, state: TrainState,
                 quick_evaluation: Callable[[TrainedModel], tuple[Any, ...]] | None) -> None:
        """``examples`` are for grids; ``quick_evaluation`` gives metrics, and columns and rows of a table of songs."""
        training, engine, main = run.config.training, run.engine, run.engine.ranks.main
        self.run, self.loader = run, loader
        self.sample_grids = SampleGrids(run.model, examples, run.metadata["genres"], run.data.resolution, engine.device,
                                        training.seed)
        self.quick_evaluation = quick_evaluation
        self.profile = Profile(run.folder, training.profile if main else 0, engine.device, log_main)
        logged = state.step - state.early_stopping.validation_pending  # without it the step has not been logged
        self.tracker = Tracker(run.folder, run.config.flat(), logged) if main else None
        self.bar = tqdm(total=run.schedule.steps, initial=state.step, unit="step", disable=not main, dynamic_ncols=True)
        self._saving = 0.0
        self.start_clock(state.step)

    def step(self) -> None:
        self.profile.step()
        self.bar.update()

    def start_clock(self, step: int) -> None:
        """Measures speed from here on."""
        self._since, self._clock = step, time.perf_counter()
        self._blocked, self._compiling = self.loader.blocked_seconds, self.run.engine.compiling.seconds

    def speed(self, step: int) -> dict[str, float]:
        """Metrics since the clock was started, by all ranks: speed without compiling, waiting, peak memory."""
        engine, saver, on_gpu = self.run.engine, self.run.checkpoints, self.run.engine.device.type == "cuda"
        seconds = time.perf_counter() - self._clock - (engine.compiling.seconds - self._compiling)
        row = {"speed/images_per_second": (step - self._since) * engine.images_per_step / seconds,
               "speed/data_wait_seconds": self.loader.blocked_seconds - self._blocked,
               "speed/memory_gib": (torch.cuda.max_memory_allocated(engine.device) / 2**30 if on_gpu else
                                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20),
               "speed/checkpoint_seconds": saver.blocked_seconds - self._saving}
        self._saving = saver.blocked_seconds
        if costs := engine.compiling.new_stats():
            log_main(engine.compiling.text())
        return {**row, **costs, "data/corrupt": self.run.data.stream.corruption.total()}

    def grids(self, step: int) -> None:
        """Draws the model's grids as it is now."""
        if self.tracker:
            with self.run.engine.eval_networks() as networks:
                for grid in self.sample_grids.draw(networks):
                    self.tracker.grid(step, step * self.run.engine.images_per_step, *grid)

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of a quick evaluation of the model as it is now, on rank 0."""
        if self.quick_evaluation is None:
            return {}
        run = self.run
        with run.engine.eval_networks() as networks:
            row, *songs = self.quick_evaluation(TrainedModel(
                run.folder, run.config, run.metadata, run.model, networks, None, run.engine.device,
                run.data.stream.normalizer))
        self.tracker.table(step, step * run.engine.images_per_step, *songs)
        return row

    def log(self, step: int, row: dict[str, float]) -> None:
        shown = {name.removeprefix("loss/"): f"{value:.3g}" for name, value in row.items() if name.startswith("loss/")}
        self.bar.set_postfix({"images/s": f"{row.get('speed/images_per_second', 0):.0f}", **shown})
        if self.tracker:
            self.tracker.log(step, step * self.run.engine.images_per_step, row)

    def close(self) -> None:
        self.bar.close()
        self.profile.close()
        if self.tracker:
            self.tracker.finish()
