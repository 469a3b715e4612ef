"""Trains a model: ``accelerate launch -m covergen.train --model wgan_gp [--shards DIR]``, on one process or many.

What a step computes is in the model's file, how it is computed on many processes in ``training.engine``, which covers
it reads in ``data.stream``, and what surrounds the loop in ``training.session``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from covergen.data.dataset import ShardDataset, open_split
from covergen.data.stream import SequentialBatches
from covergen.distributed.collectives import report_root_cause
from covergen.distributed.environment import keep_memory, processes, use_threads
from covergen.distributed.interrupts import StopSignal
from covergen.inference.trained_model import TrainedModel
from covergen.runs.config import Config, help_text, resolve
from covergen.training.engine import Engine
from covergen.training.sample_grids import EXAMPLES
from covergen.training.session import Report, Run, Schedule, open_run
from covergen.training.setup import build_model, open_training_data
from covergen.training.validation import Validation
from shard_tools import cli


def train(config: Config) -> int:
    """Trains until the last step, a signal or a time limit; returns the exit status."""
    training = config.training
    stop = StopSignal(training.minutes)
    threads = use_threads(training.threads)
    keep_memory()
    data = open_training_data(training)
    model = build_model(config, data)
    val = open_split(data.root, "val", needed=model.validation_phase is not None, audio_scale=training.audio_scale)
    engine = Engine(model, training)
    ranks = engine.ranks
    validation = None
    if val and model.validation_phase:
        batches = SequentialBatches(val, training.batch_size, ranks.rank, ranks.ranks)
        validation = Validation(model.validation_phase, engine, batches, data.resolution, training.seed)
    schedule = Schedule(training, engine.images_per_step, data.stream.epoch, validates=validation is not None)

    with open_run(config, data, model, engine, schedule) as run:
        state = run.checkpoints.load_latest(engine)
        early = state.early_stopping
        early.validation_pending &= validation is not None
        if run.finished(state):
            return 0
        run.announce(threads)
        loader = run.open_loader(state.step)
        examples = (val or data.stream).examples(EXAMPLES)
        evaluation = open_quick_evaluation(run) if training.eval_every and ranks.main else None
        report = run.closing(Report(run, loader, examples, state, evaluation))
        if validation and early.validation_pending and (row := validation.run(state, stop)):
            report.log(state.step, row)
            if early.best_step == state.step:
                run.checkpoints.save(state, engine, ["best"])

        for step in schedule.steps_after(state):
            due = schedule.due(step)
            engine.step(step, [next(loader) for _ in range(engine.batches_per_step)], measure=due.log)
            state.step = step
            report.step()
            if run.checkpoints.failure:
                stop.reason = stop.reason or "a checkpoint could not be written"
            stopping = ranks.any(bool(stop))
            if not (due.log or stopping):
                continue

            row = engine.collect_metrics() | report.speed(step)
            if due.networks or stopping:
                ranks.mean_buffers(engine.networks.values())
            if due.validate:
                row |= validation.run(state, stop, due.epoch)
            stopping |= early.validation_pending
            if due.grids or (stopping and stop.out_of_time):
                report.grids(step)
            if due.evaluate and not stopping:
                row |= report.evaluate(step)
            if not early.validation_pending:  # else the step is logged when the run goes on
                report.log(step, row)
            ends = early.should_stop(schedule.patience)
            kinds = ["best"] * (early.best_step == step) + ["step"] * (due.save or stopping or ends)
            if kinds:
                run.checkpoints.save(state, engine, kinds)
            if stopping or ends:
                break
            report.start_clock(step)
        run.finish(state, stop)
    return run.status


def open_quick_evaluation(run: Run) -> Callable[[TrainedModel], tuple[Any, ...]]:
    """What evaluates a run while it trains, on the same songs of the val split all through."""
    from covergen.evaluation.judge import open_judge
    from covergen.evaluation.pipeline import QuickEvaluation  # torchmetrics and others, which take seconds to load
    training, songs = run.config.training, ShardDataset(run.data.root, "val", audio_scale="raw")
    return QuickEvaluation(songs, run.data.resolution, open_judge(training.judge) if training.judge else None,
                           training.seed)


def main() -> int:
    """Reads the command line, and runs, explains or only prints the configuration."""
    words, flags = cli.read_words(cli.joined(sys.argv[1:], ["on_nan"]))
    if {"help", "h"} & set(flags):
        print(help_text(flags))
        return 0
    if words:
        raise ValueError(f"unexpected word {words[0]!r}; options are written --name value (see --help)")
    config = resolve({name: value for name, value in flags.items() if name != "dry_run"})
    if cli.coerce("dry_run", flags.get("dry_run", False), bool):
        print(config.text(), end="")
        return 0
    with report_root_cause(processes()[1]):
        return train(config)


if __name__ == "__main__":
    cli.guarded(main)
