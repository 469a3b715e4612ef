"""Trains a model: ``accelerate launch -m covergen.train --model wgan_gp [--shards DIR]``, on one process or many.

The loop of a run from top to bottom. What a step computes is in the model's file, how it is computed on many processes
in ``runtime.engine``, which covers it sees in ``runtime.data``.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from covergen import models
from covergen.runtime import checkpoint, config, data
from covergen.runtime.engine import Engine, seed_of
from covergen.runtime.machine import keep_memory, peak_memory, processes, use_threads
from covergen.runtime.stopping import Stop
from covergen.runtime.tracking import Tracker
from shard_tools import cli

GRID = 64  # covers in a sample grid


def say(text: str) -> None:
    """A line for the person who watches, from the main process only, beside a progress bar."""
    if processes()[0] == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def demo_shards() -> str:
    """The packed toy demo world in the user's cache folder, made there once.

    Every process calls this: the first one of a machine makes it, the others wait for it.
    """
    from platformdirs import user_cache_path

    from shard_tools.demo import VERSION, make
    from shard_tools.pack import pack
    root = user_cache_path("covergen") / f"demo-toy-{VERSION}"
    with checkpoint.lock(root, patience=600):
        if not (root / "shards" / "train.index.json").is_file():
            say(f"No --shards given: making the toy demo world (32 px, known audio -> cover attributes) in {root}")
            make(root / "folders", tier="toy")
            with contextlib.redirect_stdout(None):  # its report is about a command that nobody typed
                pack(str(root / "folders"), str(root / "shards"))
    return str(root / "shards")


def facts_of(run: config.Config, shards: str, stream: data.Stream, resolution: int) -> dict[str, Any]:
    """What a run must know of its data to be used without it: genres, audio statistics, resolution, whose they are."""
    facts = stream.facts
    return {"shards": str(shards), "identity": stream.identity, "samples": facts["samples"], "resolution": resolution,
            "genres": facts["genres"], "audio": facts["audio"]}


def train(run: config.Config) -> int:
    """Trains until the last step, a signal or a time limit; returns the exit status.

    Raises:
        ValueError, OSError: wrong options or data, for people.
    """
    training, folder = run.training, run.folder
    stop = Stop(training.minutes)
    threads, source = use_threads(training.threads)
    keep_memory()
    shards = training.shards or demo_shards()
    rank, ranks, _ = processes()
    stream = data.open_stream(shards, "train", batch_size=training.batch_size, seed=training.seed,
                              order=training.order, rank=rank, ranks=ranks)
    resolution = training.resolution or stream.resolution
    if resolution > stream.resolution:
        raise ValueError(f"--resolution {resolution} is above the {stream.resolution} px of {shards}; train at that or "
                         "less, or pack the covers again with a larger --resolution")
    torch.manual_seed(seed_of(training.seed, "weights"))
    model = models.load(run.model).build(run.options, resolution)
    engine = Engine(model, training)
    main = engine.rank == 0

    with engine.main_first():
        lock = checkpoint.lock(folder) if main else None
        start = checkpoint.start_from(run)
        complete = start is not None and checkpoint.step_of(start) >= training.steps
        if main and not complete:
            checkpoint.write_run(folder, run, facts_of(run, shards, stream, resolution), resuming=start is not None)
    if complete:
        step = checkpoint.step_of(start)
        say(f"the run is complete at step {step}; --steps {2 * step} would go on")
        engine.close()
        return 0
    begin = engine.restore(checkpoint.load(start, model.networks, engine.averaged)) if start else 0
    if stream.notice:
        say(f"note: {stream.notice}")
    say(f"{run.model} at {resolution} px on {stream.facts['samples']:,} samples of {shards}\n"
        f"{ranks} process{'es' if ranks > 1 else ''} on {engine.device.type}, precision {engine.precision}, "
        f"{threads} thread{'s' if threads > 1 else ''} each ({source})\n"
        f"run folder {folder}" + (f", going on from {start}" if start else ""))
    tracker = Tracker(folder, run.flat(), begin) if main else None
    loader = data.Loader(stream, begin * engine.batches_per_step, device=engine.device, resolution=resolution,
                         threads=training.loader_threads, ahead=engine.batches_per_step)
    noise = torch.Generator().manual_seed(seed_of(training.seed, "grid"))
    grids = {"noise": model.latents(GRID, noise, None), "truncated": model.latents(GRID, noise, model.truncation)}
    bar = tqdm(total=training.steps, initial=begin, unit="step", disable=not main, dynamic_ncols=True)
    images_per_step = engine.batches_per_step * training.batch_size
    clock, waited, since, status = time.perf_counter(), 0.0, begin, 0
    try:
        for step in range(begin + 1, training.steps + 1):
            sampling = step == training.steps or (training.sample_every and step % training.sample_every == 0)
            saving = step == training.steps or step % training.save_every == 0
            logging = sampling or saving or step % training.log_every == 0
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
                    "optim/lr": training.lr}
            bar.set_postfix({"images/s": f"{row['speed/images_per_second']:.0f}"} | {
                name.removeprefix("loss/"): f"{value:.3g}" for name, value in row.items() if name.startswith("loss/")})
            if sampling or saving or stopping:
                engine.mean_buffers()
            if main and (sampling or (stopping and stop.out_of_time)):
                for name, latents in grids.items():
                    tracker.grid(step, step * images_per_step, name, engine.sample(latents))
            if main:
                tracker.log(step, step * images_per_step, row)
            if saving or stopping:
                engine.check_weights()
                if main:
                    tracker.sync()
                    checkpoint.save(folder, step, model.networks, engine.averaged, engine.state(step), training.keep)
                engine.wait()
            if stopping and step < training.steps:
                say(f"stopped after step {step} ({stop.reason or 'another process was asked to'}); "
                    "the same command goes on from there")
                break
            clock, waited, since = time.perf_counter(), loader.waited, step
        else:
            say(f"done: {training.steps} steps; grids in {folder / 'grids'}, weights in {folder / 'checkpoints'}")
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
