"""Trains a model: ``accelerate launch -m covergen.train --model wgan_gp [--shards DIR]``, on one process or many.

The loop of a run from top to bottom. What a step computes is in the model's file, how it is computed on many processes
in ``runtime.engine``, which covers it sees in ``runtime.data``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from covergen import models
from covergen.nn.layers import AudioEncoder
from covergen.nn.turn import Model, Sizes
from covergen.runtime import checkpoint, config, data
from covergen.runtime.demo import demo_shards
from covergen.runtime.engine import Engine
from covergen.runtime.loader import Loader
from covergen.runtime.machine import keep_memory, peak_memory, processes, use_threads
from covergen.runtime.mirror import in_step
from covergen.runtime.order import seed_of
from covergen.runtime.preview import Preview
from covergen.runtime.run import Run, start_hearing
from covergen.runtime.stopping import Patience, Stop
from covergen.runtime.tracking import Tracker
from covergen.runtime.validation import validate
from shard_tools import cli
from shard_tools.formats.index import local_root, splits_in

EXAMPLES = 32  # covers of the validation split that grids show


def say(text: str) -> None:
    """A line for the person who watches, from the main process only, beside a progress bar."""
    if processes()[0] == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def facts_of(shards: str, stream: data.Stream, resolution: int) -> dict[str, Any]:
    """What a run must know of its data to be used without it: genres, audio statistics, resolution, which data."""
    facts = stream.facts
    return {"shards": str(shards), "identity": stream.identity, "samples": facts["samples"], "resolution": resolution,
            "genres": facts["genres"], "audio": facts["audio"]}


def check(model: Model, training: config.Training, shards: Path) -> None:
    """Raises ValueError for options that don't fit the model or the data, before anything is written."""
    hears = any(isinstance(part, AudioEncoder) for network in model.networks.values() for part in network.modules())
    if hears and training.audio_scale == "raw":
        raise ValueError("--audio_scale raw: the audio encoder of this model needs standardised audio, for raw numbers "
                         "reach 1e13; give --audio_scale standard")
    if training.eval_every and (model.sample is None or "val" not in splits_in(shards)):
        raise ValueError(f"--eval_every {training.eval_every} needs a model that makes covers, and shards with a val "
                         "split and an index")
    if training.judge and not training.eval_every:
        raise ValueError("--judge is for --eval_every N, which is 0")


def best_of(folder: Path, patience: Patience) -> str:
    """The best validation loss of a run, for people; a run that was converted may not have the weights of then."""
    where = folder / "checkpoints" / f"best_{patience.best_step:08d}"
    return (f"the best validation loss, {patience.best:.6g}, was at step {patience.best_step}"
            + (f": {where}" if where.is_dir() else ""))


def train(run: config.Config) -> int:
    """Trains until the last step, a signal or a time limit; returns the exit status.

    Raises:
        ValueError, OSError: wrong options or data, for people.
    """
    training, folder = run.training, run.folder
    stop = Stop(training.minutes)
    threads, source = use_threads(training.threads)
    keep_memory()
    shards = training.shards or demo_shards(say)
    root = local_root(shards, training.cache_dir, training.cache_gb)  # of a URL: where its index is kept
    rank, ranks, _ = processes()
    cut = {"batch_size": training.batch_size, "seed": training.seed, "audio_scale": training.audio_scale, "rank": rank,
           "ranks": ranks, "window": training.shard_window}
    stream = data.open_stream(root, "train", order=training.order, albums=training.albums_for, **cut)
    resolution = training.resolution or stream.resolution
    if resolution > stream.resolution:
        raise ValueError(f"--resolution {resolution} is above the {stream.resolution} px of {shards}; train at that or "
                         "less, or pack the covers again with a larger --resolution")
    torch.manual_seed(seed_of(training.seed, "weights"))
    sizes = Sizes(resolution, stream.scale.size if stream.scale else 0)
    model = models.load(run.model).build(run.options, sizes)
    if model.mismatched:
        stream.mismatch()
    check(model, training, root)
    held_out = data.open_split(root, "val", needed=model.validated is not None, **cut)
    validated = model.validated if held_out else None
    if training.condition and not checkpoint.checkpoints(folder):
        start_hearing(model, training.condition, stream.scale, training.albums_for)
    engine = Engine(model, training)
    main = engine.rank == 0

    images_per_step = engine.images_per_step
    epoch = stream.epoch
    steps = min(training.steps, -(-training.epochs * epoch // images_per_step) or training.steps)
    stream.ends(steps * images_per_step)

    known = facts_of(shards, stream, resolution)
    with engine.main_first():
        mirror = in_step(training.out, training.name, training.keep, main)
        lock = checkpoint.lock(folder) if main else None
        start = checkpoint.start_from(run)
        complete = start is not None and checkpoint.step_of(start) >= steps
        if main and not complete:
            checkpoint.write_run(folder, run, known, resuming=start is not None)
    if complete:
        step = checkpoint.step_of(start)
        more = f"--steps {2 * step}" if steps == training.steps else f"--epochs {2 * training.epochs}"
        say(f"the run is complete at step {step}; {more} would go on")
        engine.close()
        return 0
    begin, patience = 0, Patience(training.patience if validated else 0)
    if start:
        saved = checkpoint.load(start, model.networks, engine.averaged)
        begin = engine.restore(saved)
        patience.restore(saved.get("validation"))
    if patience.over:
        say(f"the run stopped early at step {begin}: {best_of(folder, patience)}. "
            f"--patience {2 * training.patience} would go on")
        engine.close()
        return 0
    if model.validated and not validated:
        say(f"note: {shards} has no val split: there is no validation loss and no early stopping")
    if stream.notice:
        say(f"note: {stream.notice}")
    say(f"{run.model} at {resolution} px on {stream.samples:,} samples of {shards}\n"
        f"{ranks} process{'es' if ranks > 1 else ''} on {engine.device.type}, precision {engine.precision}, "
        f"{threads} thread{'s' if threads > 1 else ''} each ({source})\n"
        f"{model.sizes()} parameters\n"
        f"run folder {folder}" + (f", uploaded to {training.out}" if mirror else "")
        + (f", going on from {start}" if start else ""))
    tracker = Tracker(folder, run.flat(), begin) if main else None
    loader = Loader(stream, begin * engine.batches_per_step, device=engine.device, resolution=resolution,
                    threads=training.loader_threads, ahead=engine.batches_per_step,
                    stop=steps * engine.batches_per_step)
    preview = Preview(model, (held_out or stream).examples(EXAMPLES), stream.facts["genres"], resolution, engine)
    glance = None
    if training.eval_every and main:
        from covergen.evaluation.glance import Glance  # torchmetrics and others, which take seconds to load
        from covergen.evaluation.judge import open_judge
        glance = Glance(data.IndexedShards(root, "val", batch_size=1, audio_scale="raw"), resolution,
                        open_judge(training.judge) if training.judge else None, training.seed)

    def live(networks: dict[str, torch.nn.Module]) -> Run:
        return Run(folder, run, known, model, networks, folder, engine.device, stream.scale)

    bar = tqdm(total=steps, initial=begin, unit="step", disable=not main, dynamic_ncols=True)
    clock, waited, since, status = time.perf_counter(), 0.0, begin, 0
    try:
        for step in range(begin + 1, steps + 1):
            last = step == steps
            sampling = last or (training.sample_every and step % training.sample_every == 0)
            saving = last or step % training.save_every == 0
            epoch_ends = epoch and step * images_per_step // epoch > (step - 1) * images_per_step // epoch
            validating = validated and (last or epoch_ends)
            glancing = training.eval_every and step % training.eval_every == 0
            logging = sampling or saving or validating or glancing or step % training.log_every == 0
            batches = [next(loader) for _ in range(engine.batches_per_step)]
            engine.step(step, batches, measure=logging)
            stopping = engine.agree(bool(stop))
            bar.update()
            if not (logging or stopping):
                continue

            row = engine.close_window()
            seconds = time.perf_counter() - clock
            row |= {"speed/images_per_second": (step - since) * images_per_step / seconds,
                    "speed/data_wait_seconds": loader.waited - waited, "speed/memory_gib": peak_memory(engine.device),
                    "optim/lr": engine.learning_rate(step)}
            bar.set_postfix({"images/s": f"{row['speed/images_per_second']:.0f}"} | {
                name.removeprefix("loss/"): f"{value:.3g}" for name, value in row.items() if name.startswith("loss/")})
            if sampling or saving or validating or glancing or stopping:
                engine.mean_buffers()
            better = False
            if validating:
                losses = validate(validated, engine, held_out, resolution)
                row |= {f"val/{name}": value for name, value in losses.items()}
                better = patience.judge(step, losses["loss"], epoch_ends)
            if main and (sampling or (stopping and stop.out_of_time)):
                for grid in preview.grids():
                    tracker.grid(step, step * images_per_step, *grid)
            if main and glancing:
                found, *songs = engine.infer(lambda networks: glance(live(networks)))
                row |= found
                tracker.table(step, step * images_per_step, *songs)
            if main:
                tracker.log(step, step * images_per_step, row)
            saved_as = [kind for kind, wanted in (("best", better), ("step", saving or stopping or patience.over))
                        if wanted]
            if saved_as:
                engine.check_weights()
                if main:
                    tracker.sync()
                    state = engine.state(step) | {"validation": patience.state()}
                    for kind in saved_as:
                        checkpoint.save(folder, step, model.networks, engine.averaged, state, training.keep, kind)
                    if mirror:
                        mirror.push()
                engine.wait()
            if patience.over:
                say(f"stopped early at step {step}, after {patience.waited} epochs without a better validation loss")
                break
            if stopping and not last:
                say(f"stopped after step {step} ({stop.reason or 'another process was asked to'}); "
                    "the same command goes on from there")
                break
            clock, waited, since = time.perf_counter(), loader.waited, step
        else:
            say(f"done: {steps} steps; grids in {folder / 'grids'}, weights in {folder / 'checkpoints'}")
        if patience.best_step:
            say(best_of(folder, patience))
    except FloatingPointError as error:
        good = checkpoint.checkpoints(folder)
        say(f"stopped: {error}. {f'The last good checkpoint is {good[-1]}' if good else 'There is no checkpoint yet'}. "
            "A smaller --lr, --grad_clip 1 or --mixed_precision no may help (as a run with another --name).")
        status = 1
    finally:
        bar.close()
        loader.close()
        if tracker:
            tracker.finish()
        if mirror:
            mirror.push()
            mirror.wait()
    engine.close()
    if lock:
        lock.close()
    return status


def main() -> int:
    """Reads the command line, and runs, explains or only prints the configuration."""
    words, flags = cli.read_words(sys.argv[1:])
    if {"help", "h"} & set(flags):
        print(config.help_text(flags))
        return 0
    if words:
        raise ValueError(f"unexpected word {words[0]!r}; options are written --name value (see --help)")
    run = config.resolve({name: value for name, value in flags.items() if name != "dry_run"})
    if cli.coerce("dry_run", flags.get("dry_run", False), bool):
        print(run.text(), end="")
        return 0
    return train(run)


if __name__ == "__main__":
    cli.guarded(main)
