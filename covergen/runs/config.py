"""What a run is: a frozen and checked ``Config``.

Flags override the file, the file overrides the preset (the model's, and the demo's where no shards are given), the
preset overrides the defaults.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from covergen import models
from covergen.models.base import option
from covergen.runs.sync import local_folder
from shard_tools import cli
from shard_tools.core.files import read_bounded
from shard_tools.remote.filesystem import check_url, is_remote


@dataclass(frozen=True)
class Training:
    """Options of every model. Those that are ``free`` may differ when a run is resumed, for they change where and how
    long it computes and what it reports, not what it computes."""

    shards: str | None = option(
        None, "folder or URL (s3://, gs://, https://, hf://) of shards; without it the toy demo world is made",
        free=True)
    shard_window: int | None = option(
        None, "shards whose samples are mixed, 0: all; default: all where they are 32 GB or less, else 64", ge=0)
    shard_cache_dir: str | None = option(
        None, "where a machine's copies of shards from URLs are; default: the user's cache folder", free=True)
    shard_cache_gb: float = option(50.0, "most GB that --shard_cache_dir may hold", gt=0, free=True)
    out: str = option(
        "runs", "where run folders live: a folder, or a URL (s3://, gs://) that checkpoints are uploaded to", free=True)
    name: str | None = option(
        None, "the run folder's name; default: the model's, with -demo on the demo world", free=True)
    steps: int = option(50_000, "training steps: one update of the last network of the model", gt=0, free=True)
    epochs: int = option(
        0, "stop after so many passes over the covers, if --steps does not end sooner; 0: no limit", ge=0, free=True)
    patience: int = option(
        0, "stop after so many epochs without a better validation loss (of models that have one: ae_resize, "
        "ae_transpose, vae, cond_vae); 0: never", ge=0, free=True)
    batch_size: int = option(64, "covers in a global batch, over all processes", gt=0)
    micro_batch: int = option(
        0, "most covers of a process's part of a batch that go through the networks at once: less memory for the same "
        "update; 0: all", ge=0, free=True)
    grad_accum: int = option(
        1, "global batches whose gradients one update averages: 4 is one batch of 4x the size", gt=0)
    resolution: int | None = option(None, "side of the covers in pixels; default: the shards', and never above it")
    order: Literal["sample", "group"] = option(
        "sample", "an epoch is every sample once (sample), or every album once with a random track of it (group)")
    album_subset: Literal["all", "generator", "judge"] = option(
        "all", "train on all albums, or leave a fixed quarter of them (by hash) to a judge that evaluates later "
        "(generator), or on that quarter only, as the judge (judge)")
    lr: float = option(1e-4, "learning rate of Adam", gt=0)
    lr_warmup: int = option(0, "images over which the learning rate rises from 0", ge=0)
    lr_images: int = option(0, "images over which it then falls along half a cosine to --lr_last of it; 0: never", ge=0)
    lr_last: float = option(0.1, "the share of --lr that is left in the end, with --lr_images", ge=0)
    betas: tuple[float, float] = option((0.0, 0.999), "Adam's betas, as 0.0,0.999")
    weight_decay: float = option(0.0, "Adam's weight decay (an L2 penalty)", ge=0)
    audio_scale: Literal["standard", "raw"] = option(
        "standard", "what conditional models get: standardised vectors with a presence bit for each source, or (raw, "
        "as in the thesis) the numbers as they are")
    condition: str | None = option(
        None, "a run of --model contrast (not a judge), whose audio encoder those of r3gan and flow start from")
    grad_clip: float = option(0.0, "largest gradient norm of a phase; 0 does not clip", ge=0)
    on_nan: str = option(
        "stop", "when a loss or gradient is not finite: stop, or skip N, which leaves out such updates and stops after "
        "more than N of them", free=True)
    seed: int = option(0, "of initial weights, order, noise and everything else", ge=0)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "autocast precision; default: that of accelerate launch; fp16 needs a GPU")
    compile: bool = option(
        False, "compile every phase with torch.compile: a minute or two at the start, then faster steps")
    cuda_graphs: bool = option(False, "compile, and replay each phase as a CUDA graph (mode reduce-overhead)")
    sync_bn: bool = option(False, "batch norm over the batches of all GPUs")
    ema: float = option(
        0.999, "decay per step of the averaged weights (shorter at the start); 0: none; autoencoders have none",
        ge=0, lt=1)
    ema_halflife: float = option(
        0.0, "half-life of the averaged weights in images, at most a twentieth of those seen, instead of a decay per "
        "step; 0: as --ema says", ge=0)
    log_every: int = option(10, "steps between lines of log.jsonl", gt=0, free=True)
    sample_every: int = option(100, "steps between sample grids; 0 draws none", ge=0, free=True)
    save_every: int = option(500, "steps between checkpoints", gt=0, free=True)
    eval_every: int = option(
        0, "steps between small evaluations on the val split (a flow's denoising gap, with --judge also dependence and "
        "retrieval); 0: none", ge=0, free=True)
    judge: str | None = option(None, "a run of --model contrast --album_subset judge, for --eval_every", free=True)
    keep: int = option(3, "newest checkpoints that stay", gt=0, free=True)
    minutes: float = option(0.0, "save and stop after so many minutes; 0 has no limit", ge=0, free=True)
    resume: str = option(
        "auto", "auto goes on from the run's newest checkpoint; never refuses a run that has one; else the path of a "
        "checkpoint (or run) to start from", free=True)
    tracker: Literal["wandb", "none"] = option("wandb", "wandb is offline unless an API key is configured", free=True)
    profile: int = option(
        0, "write a torch profiler trace of so many steps, after warm ones, and a table of the ten operations that "
        "cost most, to RUN/profile; 0: none", ge=0, free=True)
    project: str = option("covergen", "project on Weights & Biases", free=True)
    threads: int = option(0, "threads a process computes with; 0: its share of the machine's cores", ge=0, free=True)
    loader_threads: int = option(2, "threads a process decodes with", gt=0, free=True)
    decoded_cache: Literal["none", "ram", "device"] = option(
        "none", "keep decoded covers and vectors once they were read, if they fit into half of the free memory: ram, "
        "shared by the processes of a machine, or device, covers in each GPU's memory", free=True)
    max_corrupt: float = option(
        0.01, "stop when more than this share of the samples read is damaged; up to it, others are read instead "
        "(corrupt_samples.jsonl of the run lists them); 0: stop at the first", ge=0, lt=1, free=True)


SKIP = r"skip[ ,=:]\d{1,9}"  # of --on_nan
YAML_BYTES = 2**20  # most bytes of a configuration that are read
# The demo world on two CPU cores in a few minutes; the model's spec adds its own, the rest is the thesis's.
DEMO = {"save_every": 100, "minutes": 4.4}


@dataclass(frozen=True)
class Config:
    """A resolved run: the model's name, its options and the options of training."""

    model: str
    training: Training
    options: Any

    @property
    def folder(self) -> Path:
        """On this machine; of a URL what stands for it here."""
        return local_folder(f"{self.training.out.rstrip('/')}/{self.training.name}")

    def flat(self) -> dict[str, Any]:
        """All options by name, as plain YAML values."""
        values = {"model": self.model, **dataclasses.asdict(self.training), **dataclasses.asdict(self.options)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def text(self) -> str:
        """The configuration as YAML, one option a line."""
        return yaml.safe_dump(self.flat(), sort_keys=False)


def options_of(model: str) -> dict[str, cli.Option]:
    """Every option of training a model by name, with its preset's values as defaults."""
    spec = models.load(model)
    found = [cli.Option("model", Literal[tuple(models.MODELS)], "wgan_gp", "which model to train")]
    for kind in (Training, spec.options):
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            limits = {bound: f.metadata[bound] for bound in ("gt", "ge", "lt", "le") if bound in f.metadata}
            found.append(cli.Option(f.name, hints[f.name], spec.preset.get(f.name, f.default), f.metadata["help"],
                                    cli.Range(**limits) if limits else None))
    return {option.name: option for option in found}


def check_model(name: str) -> str:
    """The name itself if it is in the table of models; ValueError with the nearest one otherwise."""
    if name not in models.MODELS:
        raise ValueError(f"--model {name}: no such model, {cli.nearest(name, models.MODELS)}")
    return name


def read_yaml(path: Path, what: str = "") -> Any:
    """The values in a YAML file, whoever wrote it; ``what`` comes before its path in messages.

    ValueError for no file, no YAML, or aliases, whose ten lines can stand for more than memory holds.
    """
    try:
        text = read_bounded(path, YAML_BYTES).decode()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has aliases (*name); write what they stand for")
        return yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{what}{path} can't be read: {error.strerror}") from None
    except Exception as error:  # the boundary to YAML, which raises nearly anything for odd values
        raise ValueError(f"{what}{path} is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None


def resolve(flags: dict[str, Any]) -> Config:
    """The configuration from what was typed; ValueError for unknown names and for values of a wrong type or range."""
    given = dict(flags)
    if path := given.pop("config", None):
        found = read_yaml(Path(path), "--config ")
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise ValueError(f"--config {path}: expected lines 'option: value', found {type(found).__name__}")
        given = {**found, **given}
    model = check_model(str(given.pop("model", "wgan_gp")))
    spec, options = models.load(model), options_of(model)
    cli.check_names(given, options)
    demo = given.get("shards") is None
    values = {**spec.preset, **({**DEMO, **spec.demo} if demo else {}), **given}
    values = {name: cli.coerce(name, value, options[name].type) for name, value in values.items() if name in options}
    for name, value in values.items():
        cli.check_range(name, value, options[name].range)
    if values.get("on_nan", "stop") != "stop" and not re.fullmatch(SKIP, values["on_nan"]):
        raise ValueError(f"--on_nan {values['on_nan']}: expected stop, or skip with a number, such as --on_nan skip 10")
    for name in ("shards", "out", "condition", "judge"):
        if is_remote(values.get(name)):
            check_url(name, values[name])
    values["name"] = values.get("name") or (f"{model}-demo" if demo else model)
    if values["name"] in (".", "..") or Path(values["name"]).name != values["name"]:
        raise ValueError(f"--name {values['name']}: one folder name is expected; say where with --out")
    kinds = [{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}
             for kind in (Training, spec.options)]
    return Config(model, Training(**kinds[0]), spec.options(**kinds[1]))


def read_run(folder: Path) -> Config:
    """The configuration that a run folder was started with; options that it does not know yet have their defaults."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml (runs are in runs/<name>)")
    return resolve({"config": str(path)})


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What defines a run and is not the same in two flat configurations, one phrase each."""
    free = {f.name for f in dataclasses.fields(Training) if f.metadata.get("free")}
    return [f"--{key}: {saved.get(key)!r} in the run, {now.get(key)!r} now"
            for key in sorted((saved.keys() | now.keys()) - free) if saved.get(key) != now.get(key)]


def help_text(flags: dict[str, str]) -> str:
    """The help of the training command for the model that the flags name."""
    model = check_model(flags.get("model", "wgan_gp"))
    listed = "".join(f"  {name:14} {models.load(name).about}\n" for name in models.MODELS)
    extra = [cli.Option("config", str, None, "YAML file of options; flags override it"),
             cli.Option("dry_run", bool, False, "print the resolved configuration and stop")]
    return (f"usage: accelerate launch -m covergen.train --model {model} [options]\n\n"
            f"Trains a model on shards, or on the demo world where --shards is not given. Models:\n"
            f"{listed}\nThe defaults below are those of {model}.\n\n"
            f"{cli.describe([*options_of(model).values(), *extra])}")
