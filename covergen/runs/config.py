"""What a run is: flags, a YAML file and presets in, one frozen and checked ``Config`` out.

Flags override the file, the file overrides the preset (the model's, and the demo's where no shards are given), the
preset overrides the defaults. Nothing is read from anywhere else.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from covergen import models
from covergen.runs.sync import local_folder
from shard_tools import cli
from shard_tools.core.files import read_bounded
from shard_tools.remote.filesystem import check_url, is_remote


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Training:
    """Options of every model; ``None`` means: see the help of the option."""

    shards: str | None = _option(None, "folder of shards, or its URL (s3://, gs://, https://, hf://); without it the "
                                       "toy demo world is made, packed and trained on")
    shard_window: int | None = _option(
        None, "shards whose samples are mixed at a time, 0 for all; default: all where they are 32 GB or less, else 64")
    shard_cache_dir: str | None = _option(None, "where copies of shards from URLs are kept, for all processes of a machine; "
                                          "default: the user's cache folder")
    shard_cache_gb: float = _option(50.0, "most GB that --shard_cache_dir may hold")
    out: str = _option("runs", "where run folders live: a folder, or a URL (s3://, gs://) to which checkpoints are "
                               "uploaded")
    name: str | None = _option(None, "the run folder's name; default: the model's, with -demo on the demo world")
    steps: int = _option(50_000, "training steps: one update of the last network of the model")
    epochs: int = _option(0, "stop after so many passes over the covers, if --steps does not end sooner; 0: no limit")
    patience: int = _option(0, "stop after so many epochs without a better validation loss (of models that have one: "
                               "ae_resize, ae_transpose, vae, cond_vae); 0: never")
    batch_size: int = _option(64, "covers in a global batch, over all processes")
    micro_batch: int = _option(0, "most covers of a process's part of a global batch that go through the networks at "
                                  "once, in turn: less memory for the same update; 0: all")
    grad_accum: int = _option(1, "global batches whose gradients one update averages: 4 is one batch of 4x the size")
    resolution: int | None = _option(None, "side of the covers in pixels; default: the shards', and never above it")
    order: Literal["sample", "group"] = _option(
        "sample", "an epoch is every sample once (sample), or every album once with a random track of it (group)")
    album_subset: Literal["all", "generator", "judge"] = _option(
        "all", "train on all albums, or leave a fixed quarter of them (by hash) to a judge that evaluates later "
               "(generator), or on that quarter only, as the judge (judge)")
    lr: float = _option(1e-4, "learning rate of Adam")
    lr_warmup: int = _option(0, "images over which the learning rate rises from 0")
    lr_images: int = _option(0, "images over which it then falls along half a cosine to --lr_last of it; 0: never")
    lr_last: float = _option(0.1, "the share of --lr that is left in the end, with --lr_images")
    betas: tuple[float, float] = _option((0.0, 0.999), "Adam's betas, as 0.0,0.999")
    weight_decay: float = _option(0.0, "Adam's weight decay (an L2 penalty)")
    audio_scale: Literal["standard", "raw"] = _option(
        "standard", "what conditional models see: standardised vectors with a presence bit for each source, or (raw, "
                    "as in the thesis) the numbers as they are")
    condition: str | None = _option(
        None, "a run of --model contrast (not a judge), whose audio encoder those of r3gan and flow start from")
    grad_clip: float = _option(0.0, "largest gradient norm of a turn; 0 does not clip")
    on_nan: str = _option("stop", "when a loss or gradient is not finite: stop, or skip N, which leaves out such "
                                  "updates and stops after more than N of them")
    seed: int = _option(0, "of initial weights, order, noise and everything else")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = _option(
        None, "autocast precision; default: what accelerate launch was told; fp16 needs a GPU")
    compile: bool = _option(False, "compile every turn with torch.compile: a minute or two at the start, then faster "
                                   "steps, on CPUs too")
    cuda_graphs: bool = _option(False, "compile, and replay each turn as a CUDA graph (mode reduce-overhead)")
    sync_bn: bool = _option(False, "batch norm over the batches of all GPUs")
    ema: float = _option(0.999, "decay per step of the averaged weights (shorter at the start); 0 keeps none; "
                                "autoencoders have none")
    ema_halflife: float = _option(0.0, "half-life of the averaged weights in images, at most a twentieth of those "
                                       "seen, instead of a decay per step; 0: as --ema says")
    log_every: int = _option(10, "steps between lines of log.jsonl")
    sample_every: int = _option(100, "steps between sample grids; 0 draws none")
    save_every: int = _option(500, "steps between checkpoints")
    eval_every: int = _option(0, "steps between small evaluations on the val split (a flow's denoising gap, with "
                                 "--judge also dependence and retrieval); 0: none")
    judge: str | None = _option(None, "a run of --model contrast --album_subset judge, for --eval_every")
    keep: int = _option(3, "newest checkpoints that are kept")
    minutes: float = _option(0.0, "save and stop after so many minutes; 0 has no limit")
    resume: str = _option("auto", "auto goes on from the run's newest checkpoint; never refuses a run that has one; "
                                  "else the path of a checkpoint (or run) to start from")
    tracker: Literal["wandb", "none"] = _option("wandb", "wandb is offline unless an API key is configured")
    profile: int = _option(0, "write a torch profiler trace of so many steps, after warm ones, and a table of the ten "
                              "operations that cost most, to RUN/profile; 0: none")
    project: str = _option("covergen", "project on Weights & Biases")
    threads: int = _option(0, "threads a process computes with; 0: the cores shared by the processes of this machine")
    loader_threads: int = _option(2, "threads a process decodes with")
    decoded_cache: Literal["none", "ram", "device"] = _option(
        "none", "keep decoded covers and vectors once they were read, if they fit into half of the free memory: ram, "
                "shared by the processes of a machine, or device, covers in each GPU's memory")
    max_corrupt: float = _option(0.01, "stop when more than this share of the samples read is damaged; up to it, "
                                       "others take their places (corrupt_samples.jsonl of the run lists them); 0: stop at the "
                                       "first")

    @property
    def max_skipped_updates(self) -> int | None:
        """How many updates that are not finite ``on_nan`` leaves out; None: it stops at the first."""
        return None if self.on_nan == "stop" else int(re.fullmatch(SKIP, self.on_nan)[1])


SKIP = r"skip[ ,=:](\d{1,9})"

# May differ when a run is resumed: they change where and how long it runs and what it reports, not what it computes.
FREE = {"shards", "out", "name", "steps", "epochs", "patience", "log_every", "sample_every", "save_every", "eval_every",
        "judge", "keep", "minutes", "resume", "tracker", "project", "threads", "loader_threads", "micro_batch",
        "on_nan", "decoded_cache", "max_corrupt", "profile", "shard_cache_dir", "shard_cache_gb"}

POSITIVE = {"steps", "batch_size", "grad_accum", "lr", "log_every", "save_every", "keep", "loader_threads",
            "shard_cache_gb"}
NOT_NEGATIVE = {"epochs", "patience", "weight_decay", "grad_clip", "ema", "ema_halflife", "sample_every", "eval_every",
                "minutes", "threads", "seed", "lr_warmup", "lr_images", "lr_last", "micro_batch", "profile",
                "shard_window"}
SHARES = {"max_corrupt"}  # from 0 to below 1

YAML_BYTES = 2**20  # most bytes of a configuration that are read
# The demo world on two CPU cores in a few minutes; the model's recipe adds its own, the rest is the thesis's.
DEMO = {"sample_every": 100, "save_every": 100, "minutes": 4.4}


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


def options_of(model: str) -> list[cli.Option]:
    """Every option of training a model, with its preset's values as defaults."""
    recipe = models.load(model)
    found = [cli.Option("model", Literal[tuple(models.MODELS)], "wgan_gp", "which model to train")]
    for kind in (Training, recipe.options):
        hints = typing.get_type_hints(kind)
        found += [cli.Option(f.name, hints[f.name], recipe.preset.get(f.name, f.default), f.metadata["help"])
                  for f in dataclasses.fields(kind)]
    return found


def check_model(name: str) -> str:
    """The name itself if it is in the table of models; ValueError with the nearest one otherwise."""
    if name not in models.MODELS:
        raise ValueError(f"--model {name}: no such model, {cli.nearest(name, models.MODELS)}")
    return name


def read_file(path: str) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        ValueError: not a mapping of option names to values.
    """
    found = read_yaml(Path(path), "--config ")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"--config {path}: expected lines 'option: value', found {type(found).__name__}")
    return found


def read_yaml(path: Path, what: str = "") -> Any:
    """The values in a YAML file, whoever wrote it; ``what`` comes before its path in messages.

    Raises:
        ValueError: no file, not YAML, or with aliases, whose ten lines can stand for more than memory holds.
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


def check_range(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    """Raises ValueError for a number outside the limits of its option (see ``covergen.models.base.option``)."""
    if value is None:
        return
    if (name in POSITIVE or "gt" in limits) and not value > 0:
        raise ValueError(f"--{name} {value}: must be above 0")
    if (name in SHARES or "lt" in limits) and not 0 <= value < 1:
        raise ValueError(f"--{name} {value}: a share, from 0 to below 1")
    if (name in NOT_NEGATIVE or "ge" in limits) and not value >= 0:
        raise ValueError(f"--{name} {value}: must be 0 or more")


def resolve(flags: dict[str, Any]) -> Config:
    """The configuration from what was typed: flags over ``config`` file over presets over defaults.

    Raises:
        ValueError: an unknown name (with the nearest), a value of the wrong type or out of range.
    """
    flags = dict(flags)
    path = flags.pop("config", None)
    given = {**(read_file(path) if path else {}), **flags}
    model = check_model(str(given.pop("model", "wgan_gp")))
    recipe = models.load(model)
    options = {option.name: option for option in options_of(model)}
    cli.check_names(given, options)
    demo = given.get("shards") is None
    values = {**recipe.preset, **({**DEMO, **recipe.demo} if demo else {}), **given}
    values = {name: cli.coerce(name, value, options[name].type) for name, value in values.items() if name in options}
    limits = {f.name: f.metadata for f in dataclasses.fields(recipe.options)}
    for name, value in values.items():
        check_range(name, value, limits.get(name, {}))
    if not 0 <= values.get("ema", 0) < 1:
        raise ValueError(f"--ema {values['ema']}: a decay per step, from 0 (none) to below 1")
    if values.get("on_nan", "stop") != "stop" and not re.fullmatch(SKIP, values["on_nan"]):
        raise ValueError(f"--on_nan {values['on_nan']}: expected stop, or skip with a number, such as --on_nan skip 10")
    for name in ("shards", "out", "condition", "judge"):
        if is_remote(values.get(name)):
            check_url(name, values[name])
    values["name"] = values.get("name") or (f"{model}-demo" if demo else model)
    if values["name"] in (".", "..") or Path(values["name"]).name != values["name"]:
        raise ValueError(f"--name {values['name']}: one folder name is expected; say where with --out")
    kinds = [{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}
             for kind in (Training, recipe.options)]
    return Config(model, Training(**kinds[0]), recipe.options(**kinds[1]))


def read_run(folder: Path) -> Config:
    """The configuration that a run folder was started with; options that it does not know yet have their defaults.

    Raises:
        ValueError: not a run folder, or its configuration is not one that this version reads.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml (runs are in runs/<name>)")
    return resolve({"config": str(path)})


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What defines a run and is not the same in two flat configurations, one phrase each."""
    return [f"--{key}: {saved.get(key)!r} in the run, {now.get(key)!r} now"
            for key in sorted(saved.keys() | now.keys()) if key not in FREE and saved.get(key) != now.get(key)]


def help_text(flags: dict[str, str]) -> str:
    """The help of the training command for the model that the flags name."""
    model = check_model(flags.get("model", "wgan_gp"))
    listed = "".join(f"  {name:14} {models.load(name).about}\n" for name in models.MODELS)
    extra = [cli.Option("config", str, None, "YAML file of options; flags override it"),
             cli.Option("dry_run", bool, False, "print the resolved configuration and stop")]
    return (f"usage: accelerate launch -m covergen.train --model {model} [options]\n\n"
            f"Trains a model on shards, or on the demo world where --shards is not given. Models:\n"
            f"{listed}\nThe defaults below are those of {model}.\n\n"
            f"{cli.describe([*options_of(model), *extra])}")
