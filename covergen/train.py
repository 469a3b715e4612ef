"""Trains a model: ``accelerate launch -m covergen.train --model wgan_gp [--shards DIR]``, on one process or many.

The loop of a run from top to bottom. What a step computes is in the model's file, how it is computed on many processes
in ``training.engine``, which covers it sees in ``data.stream``.
"""

from __future__ import annotations

import contextlib
import sys

import torch
from tqdm import tqdm

from covergen import models
from covergen.data.dataset import ShardDataset, open_split
from covergen.data.loader import Loader
from covergen.data.memory_cache import cache_decoded
from covergen.data.sampling import seed_of
from covergen.data.stream import SequentialBatches, open_stream
from covergen.distributed.collectives import report_root_cause
from covergen.distributed.environment import keep_memory, processes, use_threads
from covergen.distributed.interrupts import StopSignal
from covergen.inference.trained_model import TrainedModel
from covergen.models.base import InputSpec
from covergen.runs import checkpoint, config
from covergen.runs.checkpoint import AsyncCheckpointer
from covergen.runs.folder import describe_data, resolve_resume, write_run
from covergen.runs.sync import open_sync
from covergen.training.engine import Engine
from covergen.training.profiler import Profile
from covergen.training.sample_grids import SampleGrids
from covergen.training.session import Throughput
from covergen.training.setup import check, demo_shards, load_pretrained_audio_encoder, log_main
from covergen.training.tracking import Tracker
from covergen.training.validation import EarlyStopping, validate
from shard_tools import cli
from shard_tools.core.locks import lock_folder
from shard_tools.remote.index_cache import resolve

EXAMPLES = 32  # covers of the validation split that grids show


def train(run: config.Config) -> int:
    """Trains until the last step, a signal or a time limit; returns the exit status.

    Raises:
        ValueError, OSError: wrong options or data, for people.
    """
    training, folder = run.training, run.folder
    stop = StopSignal(training.minutes)
    threads, source = use_threads(training.threads)
    keep_memory()
    shards = training.shards or demo_shards(log_main)
    root = resolve(shards, training.shard_cache_dir, training.shard_cache_gb)  # of a URL: where its index is kept
    rank, ranks, _ = processes()
    stream = open_stream(root, "train", audio_scale=training.audio_scale, album_subset=training.album_subset,
                         batch_size=training.batch_size, seed=training.seed, order=training.order,
                         window=training.shard_window, rank=rank, ranks=ranks, max_corrupt=training.max_corrupt)
    resolution = training.resolution or stream.resolution
    if resolution > stream.resolution:
        raise ValueError(f"--resolution {resolution} is above the {stream.resolution} px of {shards}; train at that or "
                         "less, or pack the covers again with a larger --resolution")
    torch.manual_seed(seed_of(training.seed, "weights"))
    sizes = InputSpec(resolution, stream.normalizer.size if stream.normalizer else 0)
    model = models.load(run.model).build(run.options, sizes)
    if model.needs_mismatched_audio:
        stream.mismatch()
    check(model, training, root)
    held_out = open_split(root, "val", needed=model.validation_phase is not None, audio_scale=training.audio_scale)
    validated = model.validation_phase if held_out else None
    validation_batches = SequentialBatches(held_out, training.batch_size, rank, ranks) if validated else None
    if training.condition and not checkpoint.checkpoints(folder):
        load_pretrained_audio_encoder(model, training.condition, stream.normalizer, training.album_subset)
    engine = Engine(model, training)
    main = engine.rank == 0

    images_per_step, epoch = engine.images_per_step, stream.epoch
    steps = min(training.steps, -(-training.epochs * epoch // images_per_step) or training.steps)
    stream.ends(steps * images_per_step)

    known = describe_data(shards, stream, resolution)
    held = contextlib.ExitStack()
    with engine.main_first():
        mirror = open_sync(training.out, training.name, training.keep, main)
        if main:
            held.enter_context(lock_folder(folder))
        start = resolve_resume(run, log_main)
        complete = start is not None and checkpoint.step_of(start) >= steps
        if main and not complete:
            write_run(folder, run, known, resuming=start is not None)
    if complete:
        step = checkpoint.step_of(start)
        more = f"--steps {2 * step}" if steps == training.steps else f"--epochs {2 * training.epochs}"
        log_main(f"the run is complete at step {step}; {more} would go on")
        engine.close()
        return 0
    begin, patience = 0, EarlyStopping(training.patience if validated else 0)
    if start:
        saved = checkpoint.load(start, model.networks, engine.ema_networks)
        begin = engine.restore(saved)
        patience.restore(saved.get("validation"))
    if patience.should_stop:
        log_main(f"the run stopped early at step {begin}: {patience.told(folder)}. "
            f"--patience {2 * training.patience} would go on")
        engine.close()
        return 0
    if model.validation_phase and not validated:
        log_main(f"note: {shards} has no val split: there is no validation loss and no early stopping")
    for notice in filter(None, (stream.notice, engine.share.notice)):
        log_main(f"note: {notice}")
    log_main(f"{run.model} at {resolution} px on {stream.samples:,} samples of {shards}\n"
        f"{ranks} process{'es' if ranks > 1 else ''} on {engine.device.type}, precision {engine.precision}, "
        f"{threads} thread{'s' if threads > 1 else ''} each ({source})\n"
        f"{model.sizes()} parameters\n"
        f"run folder {folder}" + (f", uploaded to {training.out}" if mirror else "")
        + (f", going on from {start}" if start else ""))
    stream.corruption.list_in(folder / "corrupt_samples.jsonl")
    tracker = Tracker(folder, run.flat(), begin) if main else None
    saver = AsyncCheckpointer(folder, training.keep, mirror) if main else None
    cache_decoded(stream, training.decoded_cache, resolution, engine.device, log_main)
    loader = Loader(stream, begin * engine.batches_per_step, device=engine.device, resolution=resolution,
                    threads=training.loader_threads, ahead=engine.batches_per_step,
                    stop=steps * engine.batches_per_step)
    preview = SampleGrids(model, (held_out or stream).examples(EXAMPLES), stream.metadata["genres"], resolution, engine)
    glance = None
    if training.eval_every and main:
        from covergen.evaluation.judge import open_judge
        from covergen.evaluation.pipeline import QuickEvaluation  # torchmetrics and others, which take seconds to load
        glance = QuickEvaluation(ShardDataset(root, "val", audio_scale="raw"), resolution,
                        open_judge(training.judge) if training.judge else None, training.seed)

    def live(networks: dict[str, torch.nn.Module]) -> TrainedModel:
        return TrainedModel(folder, run, known, model, networks, folder, engine.device, stream.normalizer)

    bar = tqdm(total=steps, initial=begin, unit="step", disable=not main, dynamic_ncols=True)

    def save(step: int, kinds: list[str]) -> None:
        engine.check_weights()
        if main:
            tracker.sync()  # a checkpoint must never know more than the log
            saver.save(step, model.networks, engine.ema_networks, engine.state(step) | {"validation": patience.state()},
                       kinds)

    meter, status = Throughput(engine, loader, saver, begin), 0
    profile = Profile(folder, training.profile if main else 0, engine.device, log_main)
    try:
        if patience.validation_pending and validated and (losses := validate(validated, engine, validation_batches, resolution, stop)):
            patience.validation_pending = False
            if main:
                tracker.log(begin, begin * images_per_step, {f"val/{name}": value for name, value in losses.items()})
            if patience.update(begin, losses["loss"]):
                save(begin, ["best"])
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
            profile.step()
            if main and saver.failure:
                stop.reason = stop.reason or "a checkpoint could not be written"
            stopping = engine.agree(bool(stop))
            bar.update()
            if not (logging or stopping):
                continue

            row = engine.collect_metrics()
            if costs := engine.compiling.new_stats():
                log_main(engine.compiling.text())
            row |= {**meter.row(step), **costs, "optim/lr": engine.learning_rate(step),
                    "data/corrupt": stream.corruption.total()}
            bar.set_postfix({"images/s": f"{row['speed/images_per_second']:.0f}"} | {
                name.removeprefix("loss/"): f"{value:.3g}" for name, value in row.items() if name.startswith("loss/")})
            if sampling or saving or validating or glancing or stopping:
                engine.mean_buffers()
            better = broken_off = False
            if validating:
                losses = validate(validated, engine, validation_batches, resolution, stop)
                patience.validation_pending = broken_off = losses is None
                stopping |= broken_off
                row |= {f"val/{name}": value for name, value in (losses or {}).items()}
                better = losses is not None and patience.update(step, losses["loss"], epoch_ends)
            if main and (sampling or (stopping and stop.out_of_time)):
                for grid in preview.grids():
                    tracker.grid(step, step * images_per_step, *grid)
            if main and glancing and not stopping:
                found, *songs = engine.infer(lambda networks: glance(live(networks)))
                row |= found
                tracker.table(step, step * images_per_step, *songs)
            if main and not broken_off:  # it is logged when the run goes on
                tracker.log(step, step * images_per_step, row)
            saved_as = [kind for kind, wanted in (("best", better), ("step", saving or stopping or patience.should_stop))
                        if wanted]
            if saved_as:
                save(step, saved_as)
            if patience.should_stop:
                log_main(f"stopped early at step {step}, after {patience.waited} epochs without a better validation loss")
                break
            if stopping and not last:
                log_main(f"stopped after step {step} ({stop.reason or 'another process was asked to'}); "
                    "the same command goes on from there")
                status = stop.status(timed=engine.total(torch.tensor(float(stop.out_of_time))).item() > 0)
                break
            meter.start(step)
        else:
            if main:
                saver.wait()
            log_main(f"done: {steps} steps; grids in {folder / 'grids'}, weights in {folder / 'checkpoints'}")
        if patience.best_step:
            log_main(patience.told(folder))
    except FloatingPointError as error:
        log_main(f"stopped: {error}. {checkpoint.last_good(folder)}. A smaller --lr, --grad_clip 1 or --mixed_precision no "
            "may help (as a run with another --name), or --on_nan skip 10 here.")
        status = 1
    except Exception as error:  # boundary: whatever it is, the other processes must hear of it
        engine.report_failure(error)
        raise
    finally:
        bar.close()
        loader.close()
        profile.close()
        if main:
            saver.wait()
            tracker.finish()
            saver.close()
    if main and saver.failure:
        log_main(f"stopped: {saver.failure}. {checkpoint.last_good(folder)}. Make room; the same command goes on from there")
        status = 1
    engine.close()
    held.close()
    return status


def main() -> int:
    """Reads the command line, and runs, explains or only prints the configuration."""
    words, flags = cli.read_words(cli.joined(sys.argv[1:], ["on_nan"]))
    if {"help", "h"} & set(flags):
        print(config.help_text(flags))
        return 0
    if words:
        raise ValueError(f"unexpected word {words[0]!r}; options are written --name value (see --help)")
    run = config.resolve({name: value for name, value in flags.items() if name != "dry_run"})
    if cli.coerce("dry_run", flags.get("dry_run", False), bool):
        print(run.text(), end="")
        return 0
    with report_root_cause(processes()[1]):
        return train(run)


if __name__ == "__main__":
    cli.guarded(main)
