"""What a run costs on 1 to 512 GPUs, and which resource limits it there, on paper: the README has the formulas."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from covergen import models
from covergen.benchmarks import make_demo_shards, median_seconds
from covergen.data.batch import Batch
from covergen.data.dataset import ShardDataset
from covergen.distributed.environment import use_threads
from covergen.models.base import InputSpec, Model
from covergen.runs import config
from shard_tools.cli import Range, checked
from shard_tools.core.files import write_atomically

GIGA = 1e9
Count, Positive = Annotated[int, Range(1)], Annotated[float, Range(gt=0)]
BUCKET, BACKWARD = 25 * 2**20, 2 / 3  # bytes of DDP's buckets; share of a phase's time in which they become ready
REACHED, HOP = 0.7, 1e-5  # assumed: share of a bandwidth that an all-reduce gets, and seconds of a message
ASSUMED = {"decode": 6000.0, "disk": 1000.0, "sample": 14_000.0}  # where nothing is given or measured

# What is counted of a step: by phase how often it is taken (below 1: not in every step) and the bytes of its gradients;
# operations for one image of a batch; global batches that it reads; bytes of a checkpoint.
Step = namedtuple("Step", "repeats gradients operations batches checkpoint")
# Covers that a GPU sees at once, steps between checkpoints, GPUs of a machine, images that one trains a second; bytes a
# second, one way, inside a machine, from one to others, from one to the shards, from the shards to all; cores of a GPU,
# samples that one decodes a second, bytes a second to the disk, bytes of a sample, dollars for a GPU and hour.
Setup = namedtuple("Setup", "batch save_every gpus images inside network storage source cores decode disk sample price")


@checked
def run(model: str = "wgan_gp", resolution: int = 128, audio: int = 0, batch_per_gpu: Count = 64,
        gpus: Annotated[tuple[int, ...], Range(1)] = (1, 8, 64, 512), price: Positive = 2.5,
        images_per_second: float = 0.0, tflops: Positive = 197.8, gpus_per_node: Count = 8,
        intra_gbyte: Positive = 450.0, network_gbit: Positive = 3200.0, storage_gbit: Positive = 100.0,
        source_gbit: Annotated[float, Range(0)] = 100.0, cores_per_gpu: Positive = 12.0, decode_per_core: float = 0.0,
        disk_mbyte: float = 0.0, save_every: Count = 500, measure: bool = False) -> int:
    """Says what a run costs on several numbers of GPUs, and from how many of them on which resource is the limit.

    Args:
        model: which one, with the options of its preset.
        resolution: side of the covers in pixels.
        audio: numbers in an audio vector, for conditional models.
        batch_per_gpu: covers that one GPU sees at once.
        gpus: the numbers of GPUs, as 1,8,64,512.
        price: dollars for one GPU and hour (assumed; offers of H100s lie between 2 and 4).
        images_per_second: that one GPU trains, as speed/images_per_second of a run says; 0: from --tflops.
        tflops: that one GPU reaches (assumed: 20% of the 989 in bf16 of an H100's data sheet).
        gpus_per_node: GPUs of a machine.
        intra_gbyte: GB/s of a GPU to others of its machine, one way (450: half of the data sheet's NVLink 900).
        network_gbit: Gbit/s of a machine to others (3200: 8 adapters of 400, as in DGX H100).
        storage_gbit: Gbit/s of a machine to where the shards are (assumed: one adapter of 100).
        source_gbit: Gbit/s of that place to all machines together (assumed: one file server); 0: no limit (S3).
        cores_per_gpu: CPU cores for each GPU (assumed).
        decode_per_core: samples that a core reads and decodes in a second; 0: measured, or assumed.
        disk_mbyte: MB/s at which checkpoints are written; 0: measured, or assumed.
        save_every: steps between checkpoints.
        measure: measure decoding and the disk on this machine, with a demo world.
    """
    use_threads(0)
    settings = config.resolve({"model": model, "shards": "none"})
    try:
        built = models.load(model).build(settings.options, InputSpec(resolution, audio))
    except ValueError as error:
        raise ValueError(f"{error} (conditional models need --audio N here)") from None
    step = count(settings, built, resolution, audio)
    known = {"assumed": ASSUMED, f"measured here, {os.cpu_count()} cores": measured(resolution) if measure else {},
             "given": {"decode": decode_per_core, "disk": disk_mbyte}}
    constants = {name: (value, source) for source, values in known.items() for name, value in values.items() if value}
    decode, disk, sample = (constants[name][0] for name in ("decode", "disk", "sample"))
    setup = Setup(batch_per_gpu, save_every, gpus_per_node,
                  images_per_second or tflops * 1e12 * step.batches / step.operations, REACHED * intra_gbyte * GIGA,
                  REACHED * network_gbit / 8 * GIGA, storage_gbit / 8 * GIGA, source_gbit / 8 * GIGA or math.inf,
                  cores_per_gpu, decode, disk * 1e6, sample, price)
    rows, limited = [cost(step, setup, number)[0] for number in gpus], limits(step, setup)
    print(f"{model} at {resolution} px: {step.operations / step.batches / GIGA:.1f} Gflop an image, checkpoints of "
          f"{step.checkpoint / 1e6:.0f} MB, gradients", ", ".join(
              f"{name} {step.repeats[name]:g} x {size / 1e6:.1f} MB" for name, size in step.gradients.items()))
    print(f"{setup.images:,.0f} images/s a GPU;", "; ".join(
        f"{name} {value:,.0f} ({source})" for name, (value, source) in constants.items()), end="\n\n")
    for line in (rows[0], ["---"] * len(rows[0]), *map(dict.values, rows)):
        print("|", " | ".join(value if isinstance(value, str) else f"{value:,.{3 * isinstance(value, float)}f}"
                              for value in line), "|")
    print("", *(f"{name}: {f'the limit from {number:,} GPUs on' if number else 'never the limit'}"
                for name, number in limited.items()), sep="\n")
    print(json.dumps({"bench": "cost", "model": model, "resolution": resolution, "step": step._asdict(), "rows": rows,
                      "setup": setup._asdict(), "constants": constants, "limits": limited}))
    return 0


class Operations(TorchDispatchMode):
    """Sums the operations of products and convolutions. (``FlopCounterMode`` itself hooks into modules, which gradients
    inside a forward do not allow.)"""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if operations := flop_registry.get(function._overloadpacket):
            self.total += operations(*args, **(kwargs or {}), out_val=result)
        return result


def count(run: config.Config, model: Model, resolution: int, audio: int, images: int = 2) -> Step:
    """Counts one step of a model on the CPU, with a batch of so many random images."""
    noise, albums, operations = torch.Generator().manual_seed(0), torch.arange(images), 0.0
    vectors = torch.randn(images, audio) if audio else None
    batch = Batch(torch.randint(256, (images, 3, resolution, resolution), dtype=torch.uint8), vectors,
                  torch.zeros_like(albums), albums, vectors.flip(0) if model.needs_mismatched_audio else None)
    period = getattr(run.options, "penalty_every", 1)  # a penalty in some of the steps makes only those longer
    repeats = {phase.name: phase.repeats / phase.interval for phase in model.phases}
    gradients = {phase.name: sum(p.nbytes for p in phase.parameters() if p.requires_grad) for phase in model.phases}
    for phase in model.phases:
        with Operations() as counted:
            for number in range(1, period + 1):
                phase.begin(number * phase.interval, images)
                phase(batch, phase.sample_noise(images, noise))[0].backward()
        operations += repeats[phase.name] * counted.total / period / images
    saved = [*model.networks.values(), *(model.networks[name] for name in model.ema_networks if run.training.ema)]
    states = sum(value.nbytes for network in saved for value in network.state_dict().values())
    return Step(repeats, gradients, operations * run.training.grad_accum,
                run.training.grad_accum * max(p.repeats for p in model.phases), states + 2 * sum(gradients.values()))


def all_reduce(size: float, gpus: int, setup: Setup) -> float:
    """Seconds to sum ``size`` bytes over all GPUs."""
    bandwidth = setup.inside if gpus <= setup.gpus else min(setup.inside, setup.network)
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.ceil(math.log2(gpus)) * HOP


def cost(step: Step, setup: Setup, gpus: int) -> tuple[dict[str, Any], dict[str, float]]:
    """A row of the table for so many GPUs, and the images a second that each resource alone would allow."""
    images, reduce, exposed = gpus * setup.batch * step.batches, 0.0, 0.0
    compute = step.batches * setup.batch / setup.images
    for name, size in step.gradients.items():
        seconds = [all_reduce(min(BUCKET, size - start), gpus, setup) for start in range(0, size, BUCKET)]
        reduce += step.repeats[name] * sum(seconds)
        hidden = BACKWARD * compute / sum(step.repeats.values())
        exposed += step.repeats[name] * (seconds[-1] + max(0.0, sum(seconds[:-1]) - hidden))
    rates = {"compute": gpus * setup.images,
             "all-reduce": images / reduce if reduce else math.inf,
             "decoding": gpus * setup.cores * setup.decode,
             "network of a machine to the shards": math.ceil(gpus / setup.gpus) * setup.storage / setup.sample,
             "source of the shards": setup.source / setup.sample,
             "writing of checkpoints": images * setup.save_every * setup.disk / step.checkpoint}
    slowest = min(rates, key=rates.__getitem__)
    seconds = max(compute + exposed, images / rates[slowest])
    dollars = gpus * setup.price * seconds / 3600
    return {"GPUs": gpus, "global batch": gpus * setup.batch, "step, ms": 1e3 * seconds,
            "of it all-reduce, ms": 1e3 * exposed, "hidden, ms": 1e3 * (reduce - exposed),
            "images/s": round(images / seconds), "shards, GB/s": images / seconds * setup.sample / GIGA,
            "decoding cores a GPU": images / seconds / gpus / setup.decode,
            "saving, % of time": 100 * step.checkpoint / setup.disk / (setup.save_every * seconds),
            "$ for 1,000 steps": 1000 * dollars, "$ for 1M images": 1e6 / images * dollars, "limit": slowest}, rates


def limits(step: Step, setup: Setup) -> dict[str, int | None]:
    """Resource -> the fewest GPUs (a power of two, up to 65,536) at which it is slower than computing; None: never."""
    rates = {gpus: cost(step, setup, gpus)[1] for gpus in (2**power for power in range(17))}
    return {name: next((gpus for gpus, found in rates.items() if found[name] < found["compute"]), None)
            for name in rates[1] if name != "compute"}


def measured(resolution: int) -> dict[str, float]:
    """Samples that a core reads and decodes a second, MB/s that are written and synced, and bytes of a sample."""
    with tempfile.TemporaryDirectory() as folder:
        data = ShardDataset(make_demo_shards(Path(folder), resolution, 60), "train")
        rows, block = np.arange(400) % data.samples, os.urandom(10**8)
        # The core's own time: so it matters little what else the machine does.
        decoding = median_seconds(lambda: [data.read(part) for part in np.split(rows, 8)], time.thread_time)
        writing = median_seconds(lambda: write_atomically(Path(folder) / "written", block))
        return {"decode": len(rows) / decoding, "disk": 100 / writing,
                "sample": sum(shard["bytes"] for shard in data.metadata["shards"]) / data.metadata["samples"]}
