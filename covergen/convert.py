"""Makes a run of a checkpoint of the thesis: ``python -m covergen.convert --thesis FILE --model NAME --out RUN``.

The published files are pickles and not to be trusted: only tensors and plain values are read. Source of the names and
of what the files hold: J. Bustos 2020, "Towards album artwork generation based on audio".
"""

from __future__ import annotations

import math
import os
import pickle
import re
import shlex
import shutil
import warnings
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from covergen import models
from covergen.models.base import InputSpec, Model
from covergen.runs import checkpoint, config
from covergen.runs.folder import write_run
from covergen.runs.log import log_line, log_path
from covergen.runs.state import EarlyStopping, TrainState
from shard_tools import cli
from shard_tools.core.files import write_atomically
from shard_tools.dataset.demo_world import LABELS  # the demo world has the thesis's genres

RESOLUTION = 128
AUDIO = {"dimension": 1160, "blocks": [[0, 580], [580, 1160]], "mean": None, "std": None}  # not scaled
LAST_STEP = 99_999_999  # that the name of a checkpoint's folder can say
SHOWN = 4  # names of each kind of difference in an error
OPTIONS = {"dcgan": {"latent_mean": -1.0, "latent_std": 2.0}}  # where the thesis's code is not our default

# -- names: a module of the thesis -> ours; what follows (weight, running_mean, 0.bias, ...) is the same in both ---


def numbered(theirs: str, ours: str, count: int, first: int = 1, our_first: int = 0) -> dict[str, str]:
    """Names with numbers for ``{}``: the thesis's from ``first`` on, ours from ``our_first`` on."""
    return {theirs.format(first + n): ours.format(our_first + n) for n in range(count)}


def blocks(conv: str, norm: str, count: int) -> dict[str, str]:
    """The names in a list of convolution, norm and activation, again and again."""
    layers = {conv: 0, norm: 1}
    return {f"{layer}{n + 1}": f"blocks.{3 * n + layers[layer]}" for n in range(count) for layer in layers}


RESIZE = {
    **numbered("conv{}", "encoder.convs.{}", 4), **numbered("bn{}", "encoder.norms.{}", 3),
    **numbered("reconv{}.2", "decoder.convs.{}", 3), "reconv4": "decoder.convs.3",
    **numbered("bn{}", "decoder.norms.{}", 3, first=4)}
TRANSPOSE = {
    **numbered("conv{}", "convs.{}", 4), **numbered("bn{}", "norms.{}", 3),
    **numbered("tconv{}", "back.{}", 4), **numbered("bn{}", "back_norms.{}", 3, first=4)}
MAIN, VAE = {"main": "main"}, {**RESIZE, "f1": "mean", "f2": "log_variance", "d1": "project"}
LSGAN = {"lin": "project", "bn": "project_norm", **blocks("tconv", "bn", 4), "tconv5": "to_rgb"}
WGAN = {"lin": "project", "bn": "project_norm", **blocks("tconv", "bn", 6), "tconv7": "to_rgb"}
FILM = {  # the thesis's beta multiplies and its gamma adds
    "lin": "project", "bn": "norms.0", **numbered("tconv{}", "doublings.{}", 4),
    **numbered("bn{}", "norms.{}", 4, our_first=1), "tconv5": "to_rgb", "mlp": "audio",
    **numbered("a{}_beta", "films.{}.scale", 5), **numbered("a{}_gamma", "films.{}.shift", 5)}
BATCH_SCORE = {**blocks("conv", "bn", 5), "lin": "score"}
INSTANCE_SCORE = {**blocks("conv", "in", 5), "lin": "score"}

# Where a file holds a network: its entries of weights, Adam and losses; our name of the losses; module names.
Part = namedtuple("Part", "weights adam costs logged names")
CODER = ("model_state_dict", "optimizer_state_dict", "cost_list_train")
G, D = (("model_g", "optimizer_g", "cost_g", "loss/generator"), ("model_d", "optimizer_d", "cost_d"))
# model -> network, named like the phase that trains it -> its part; the first network's Adam counts the steps
PUBLISHED = {
    "ae_resize": {"autoencoder": Part(*CODER, "loss/mse", RESIZE)},
    "ae_transpose": {"autoencoder": Part(*CODER, "loss/mse", TRANSPOSE)},
    "vae": {"vae": Part(*CODER, "loss/neg_elbo", VAE)},
    "dcgan": {"generator": Part(*G, MAIN), "discriminator": Part(*D, "loss/discriminator", MAIN)},
    "lsgan": {"generator": Part(*G, LSGAN), "discriminator": Part(*D, "loss/discriminator", BATCH_SCORE)},
    "wgan_gp": {"generator": Part(*G, WGAN), "critic": Part(*D, "loss/critic", INSTANCE_SCORE)},
    "cond_lsgan": {"generator": Part(*G, FILM), "discriminator": Part(*D, "loss/discriminator", BATCH_SCORE)},
    "cond_wgan_gp": {"generator": Part(*G, FILM), "critic": Part(*D, "loss/critic", INSTANCE_SCORE)},
}


def read(path: Path) -> dict[Any, Any]:
    """The dict of tensors and plain values in a file; ValueError where it needs more than them or is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"--thesis {path}: " + ("a folder, not a file" if path.is_dir() else "no such file"))
    try:
        with warnings.catch_warnings(action="ignore"):  # they are about formats, for programmers
            file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # boundary: torch raises many kinds for damaged files
        if wanted := re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None:
            raise ValueError(f"--thesis {path} wants {wanted[1]!r}, where the thesis needs tensors and plain values "
                             "only; the file is refused and nothing in it was run") from None
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"--thesis {path} is damaged or was not written by torch.save: {reason[:200]}") from None
    if isinstance(file, dict):
        return file
    raise ValueError(f"--thesis {path} holds a {type(file).__name__}, expected the dict that the thesis saved")


def prepare(model: str, **where: str) -> tuple[config.Config, Model]:
    """A run by the thesis's preset, on shards not known yet, and its model, without memory for the weights so far."""
    run = config.resolve({"model": model, "shards": "not known yet", **OPTIONS.get(model, {}), **where})
    with torch.device("meta"):
        built = models.load(model).build(run.options, InputSpec(RESOLUTION, AUDIO["dimension"]))
    return replace(run, training=replace(run.training, shards=None)), built


def names_of(network: nn.Module, modules: Mapping[str, str]) -> dict[str, str]:
    """The thesis's name -> ours, of every tensor in a network's state."""
    return {theirs + key.removeprefix(ours): key for key in network.state_dict()
            for theirs, ours in modules.items() if key.startswith(f"{ours}.")}


def find_mismatches(file: Mapping[Any, Any], run: config.Config, model: Model) -> list[str]:
    """Why a file is not one of a model, one line for each network and kind of difference; none if it is."""
    lines = []
    for name, part in PUBLISHED[run.model].items():
        found, state = file.get(part.weights), model.networks[name].state_dict()
        if not isinstance(found, dict):
            there = _describe(found) if part.weights in file else "no such entry"
            lines.append(f"{part.weights}: {there}, expected a dict of tensors")
            continue
        names = names_of(model.networks[name], part.names)
        differences = {  # very old files count no batches, and no network uses that
            "missing": [key for key in names if key not in found and not key.endswith(".num_batches_tracked")],
            "unexpected": [repr(key)[:80] for key in found if key not in names],
            "of another shape": [
                f"{key} (found {_describe(found[key])}, expected {_describe(state[ours])})"
                for key, ours in names.items() if key in found and not fits(found[key], state[ours])]}
        lines += [f"{part.weights}: {len(keys)} {kind}: {', '.join(keys[:SHOWN])}{', ...' if keys[SHOWN:] else ''}"
                  for kind, keys in differences.items() if keys]
    return lines


def fits(found: Any, wanted: Tensor) -> bool:
    """Whether it is a plain tensor with the shape of another, both of floats or of the same integers."""
    return (isinstance(found, Tensor) and (found.layout, found.device.type) == (torch.strided, "cpu")
            and found.shape == wanted.shape
            and (found.dtype == wanted.dtype or (found.is_floating_point() and wanted.is_floating_point())))


def _describe(value: Any) -> str:
    return f"{list(value.shape)} {str(value.dtype)[6:]}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def number(value: Any) -> float | None:
    """A number, or a tensor of one, as a float; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and fits(value, value):
        value = value.detach().item()
    return float(value) if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**53) else None


def losses(file: Mapping[Any, Any], entry: str, notes: list[str]) -> list[float]:
    """The losses in an entry of a file; none, and a note, where it holds anything else."""
    found = file.get(entry)
    values = [number(value) for value in found] if isinstance(found, (list, tuple)) else [None]
    if None not in values:
        return values
    notes.append(f"{entry} is no list of numbers, so the log goes without it")
    return []


def rows(costs: Mapping[str, list[float]], every: Mapping[str, int], step: int, images: int) -> list[dict[str, Any]]:
    """The lines of a log that ends at ``step``, over which the losses are spread; what is not finite is null.

    ``every`` has n for losses that may have been noted in every n-th iteration only; ``images`` are those of a step.
    """
    longest = max(map(len, costs.values()))
    log = [{"step": at, "images": at * images} for at in (round((n + 1) * step / longest) for n in range(longest))]
    for name, values in costs.items():
        interval = every.get(name, 1)
        if len(values) not in (longest // interval, -(-longest // interval)):
            interval = 1
        for row, value in zip(log[::interval], values, strict=False):
            row[name] = value if math.isfinite(value) else None
    return log


def adam(found: Any, order: list[str], network: nn.Module) -> tuple[dict[int, dict[str, Tensor]], int]:
    """Adam's state by our order of a network's parameters, and how many steps it took, from the thesis's order, in
    which ``order`` gives our names; ValueError where it is not of use."""
    state = found.get("state") if isinstance(found, dict) else None
    if not isinstance(state, dict) or state.keys() != set(range(len(order))):
        raise ValueError("it never took a step" if state == {} else f"it has no state of {len(order)} parameters")
    taken, parameters = {}, dict(network.named_parameters())
    for index, name in enumerate(order):
        entry = state[index] if isinstance(state[index], dict) else {}
        step, moments = number(entry.get("step")), [entry.get(key) for key in ("exp_avg", "exp_avg_sq")]
        if not step or not 1 <= step <= LAST_STEP or not all(fits(moment, parameters[name]) for moment in moments):
            raise ValueError(f"its state of parameter {index} is not of {name} {_describe(parameters[name])}")
        mean, square = (moment.detach().float() for moment in moments)
        if not (mean.isfinite() & square.isfinite() & (square >= 0)).all():
            raise ValueError(f"its moments of parameter {index} are not Adam's")
        taken[name] = {"step": torch.tensor(step), "exp_avg": mean, "exp_avg_sq": square}
    return dict(enumerate(taken[name] for name in parameters)), int(max(one["step"] for one in taken.values()))


def import_weights(file: Mapping[Any, Any], run: config.Config, model: Model,
                   ) -> tuple[TrainState, dict[str, Any], list[dict[str, Any]], list[str]]:
    """Fills the networks from a file that fits; returns the states of training and of its engine, the log, and notes.
    ValueError for weights that are not finite and for more steps than a run can count."""
    training, optimizers, costs, notes = run.training, {}, {}, []
    taken = dict.fromkeys(PUBLISHED[run.model], 0)
    for name, part in PUBLISHED[run.model].items():
        network, found = model.networks[name], file[part.weights]
        names, state = names_of(network, part.names), network.state_dict()
        tensors = {key: found.get(key, torch.tensor(0)).detach().to(state[ours].dtype) for key, ours in names.items()}
        if bad := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{part.weights}: {len(bad)} tensors hold NaN or infinity: {', '.join(bad[:SHOWN])}")
        network.load_state_dict({names[key]: tensor for key, tensor in tensors.items()}, assign=True)
        costs[part.logged] = losses(file, part.costs, notes)
        parameters = dict(network.named_parameters())
        optimizers[name] = torch.optim.Adam(parameters.values(), lr=training.lr, betas=training.betas,
                                            weight_decay=training.weight_decay).state_dict()
        try:
            order = [names[key] for key in found if names[key] in parameters]
            optimizers[name]["state"], taken[name] = adam(file.get(part.adam), order, network)
        except ValueError as error:
            notes.append(f"Adam starts afresh for the {name}; of {part.adam}: {error}")
    validation = costs["val/loss"] = losses(file, "cost_list_val", notes) if model.validation_phase else []
    step = max(1, next(iter(taken.values())) or number(file.get("iter")) or 0, *map(len, costs.values()))
    if not step <= LAST_STEP:
        raise ValueError(f"it says that it took {step:g} steps; a run has {LAST_STEP:,} at most")
    step = int(step)
    log = rows(costs, {f"loss/{phase.name}": phase.interval for phase in model.phases}, step,
               training.batch_size * max(phase.repeats for phase in model.phases))
    early_stopping = EarlyStopping()
    for row, loss in zip(log, validation, strict=False):
        early_stopping.update(row["step"], loss)
    if validation and early_stopping.best_step < step:
        notes.append(f"the best validation loss was at step {early_stopping.best_step}; the file has the weights of "
                     f"{step}")
    engine = {"optimizers": optimizers, "scaler": None, "ema_updates": step if training.ema else 0, "skipped": 0}
    return TrainState(step, early_stopping), engine, log, notes


def write(folder: Path, run: config.Config, model: Model, state: TrainState, engine: dict[str, Any],
          log: list[dict[str, Any]]) -> None:
    """Writes a run folder, under another name first: all of it is there or nothing."""
    draft = folder.with_name(f".{folder.name}.converting")
    shutil.rmtree(draft, ignore_errors=True)  # of a conversion that was killed
    averages = {f"{name}_ema": model.networks[name] for name in model.ema_networks if run.training.ema}
    data = {"shards": None, "identity": None, "samples": 0, "resolution": RESOLUTION, "genres": LABELS,
            "audio": AUDIO if model.conditional else None}
    taken = checkpoint.snapshot(state, {**model.networks, **averages}, engine)
    try:
        for kind in ("step", "best") if state.early_stopping.best_step == state.step else ("step",):
            checkpoint.write(draft, taken, 1, kind)
        write_run(draft, run, data, resuming=False)
        write_atomically(log_path(draft), "".join(map(log_line, log)).encode())
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def convert(thesis: str, model: str, out: str) -> None:
    """Makes a run of a checkpoint that the thesis published: to generate from, to analyse, to evaluate, to train on.

    The log has the file's own losses: those of the thesis's VAE are sums over a batch (of 128 covers), ours are means
    per cover. So the first validation here will pass for better than any of the thesis's.

    Args:
        thesis: the file, such as lsgan.pt.
        model: ae_resize, ae_transpose, vae, dcgan, lsgan, wgan_gp, cond_lsgan or cond_wgan_gp.
        out: the run folder to make, such as runs/lsgan; new or empty.
    """
    folder = Path(out)
    if config.check_model(model) not in PUBLISHED:
        raise ValueError(f"--model {model}: the thesis published no checkpoint of it, only of {', '.join(PUBLISHED)}")
    if folder.is_symlink() or (any(folder.iterdir()) if folder.is_dir() else folder.exists()):
        raise ValueError(f"--out {out} is there already; give the new run another name")
    run, built = prepare(model, out=str(folder.parent), name=folder.name)
    file = read(Path(thesis))
    if lines := find_mismatches(file, run, built):
        lines += [f"--model {other} fits" for other in PUBLISHED if not find_mismatches(file, *prepare(other))]
        raise ValueError("\n  ".join([f"--thesis {thesis} is no checkpoint of {model}:", *lines]))
    try:
        state, engine, log, notes = import_weights(file, run, built)
    except ValueError as error:
        raise ValueError(f"--thesis {thesis}: {error}") from None
    write(folder, run, built, state, engine, log)
    path = shlex.quote(out)
    after = (f"analyze reconstruct --run {path} --shards DIR --out reconstructions.png" if not built.sample else
             f"generate --run {path} {'--from_shards DIR' if built.conditional else '--n 64'} --out covers.png")
    notes += [f"train on with --{name} {value:g}" for name, value in OPTIONS.get(model, {}).items()]
    print(f"{out}: {model} at step {state.step:,}; {built.sizes()} parameters; {len(log):,} lines of log.jsonl",
          *(f"note: {note}" for note in notes), f"next: python -m covergen.{after}", sep="\n")


if __name__ == "__main__":
    cli.run(convert)
