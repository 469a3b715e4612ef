"""What a run costs on 1 to 512 GPUs and what limits it there: a model and a price in, a table and a line of JSON out.

What can be counted is counted on the built model, what can be measured on this machine is measured by the same command
(``--measure true``), and everything else is an option that the output marks as assumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from covergen import models
from covergen.benchmarks import scaling
from covergen.benchmarks.counting import Step, count, random_batch, run_phases_once
from covergen.benchmarks.reduce import time_reduce
from covergen.data import indexed as data
from covergen.distributed.environment import use_threads
from covergen.models.base import InputSpec, Model
from covergen.runs import config
from shard_tools.shards.index import ROW, metadata_bytes

PAIRS = 100_000_000
GIGA = 1e9
# What is used where nothing is given or measured, and where it is from.
WITHOUT = {"decode": (6000.0, "assumed"), "disk": (1000.0, "assumed"), "sample": (14_000.0, "assumed")}


def run(model: str = "wgan_gp", resolution: int = 128, audio: int = 0, batch_per_gpu: int = 64,
        gpus: tuple[int, ...] = (1, 8, 64, 512), price: float = 2.5, images_per_second: float = 0.0,
        peak_tflops: float = 989.0, utilisation: float = 0.2, gpus_per_node: int = 8, intra_gbyte: float = 450.0,
        network_gbit: float = 3200.0, reached: float = 0.7, hop_us: float = 10.0, storage_gbit: float = 100.0,
        source_gbit: float = 100.0, cores_per_gpu: float = 12.0, decode_per_core: float = 0.0,
        disk_mbyte: float = 0.0, sample_bytes: float = 0.0, shards: str | None = None, save_every: int = 500,
        pack_per_core: float = 0.0, pack_row_bytes: float = 79.0, measure: bool = False) -> int:
    """Says what a run costs on several numbers of GPUs, and at how many of them which resource becomes the limit.

    Args:
        model: which one, with the options of its preset.
        resolution: side of the covers in pixels.
        audio: numbers in an audio vector; models that hear need some.
        batch_per_gpu: covers that one GPU sees at once; the global batch grows with the GPUs.
        gpus: the numbers of GPUs, as 1,8,64,512.
        price: dollars for one GPU and hour (assumed; offers of H100s lie between 2 and 4).
        images_per_second: that one GPU trains, as speed/images_per_second of a run says; 0: from the counted operations
            and the next two options.
        peak_tflops: of a GPU in bf16 (989: H100 and H200 SXM without sparsity, by NVIDIA's data sheet).
        utilisation: the share of it that training reaches (assumed).
        gpus_per_node: GPUs of a machine.
        intra_gbyte: GB/s of a GPU to others of its machine, one way (450: half of the data sheet's NVLink 900).
        network_gbit: Gbit/s of a machine to others (3200: 8 adapters of 400, as in DGX H100).
        reached: the share of these two that an all-reduce gets (assumed).
        hop_us: microseconds of one message between GPUs (assumed).
        storage_gbit: Gbit/s of a machine to where the shards are (assumed: one adapter of 100).
        source_gbit: Gbit/s of that place to all machines together (assumed: one file server); 0: no limit (S3).
        cores_per_gpu: CPU cores for each GPU (assumed).
        decode_per_core: samples that a core reads and decodes in a second; 0: measured, or assumed.
        disk_mbyte: MB/s at which checkpoints are written; 0: measured, or assumed.
        sample_bytes: of a sample in its shard; 0: of --shards, or measured on a demo world, or assumed.
        shards: folder of shards that the bytes are counted in and decoding is measured on.
        save_every: steps between checkpoints.
        pack_per_core: samples that a core packs in a second (see the benchmark of packing); 0: left out.
        pack_row_bytes: memory of packing for each sample, in bytes (stated, not measured here).
        measure: measure what this machine can: decoding, disk, steps on the CPU, an all-reduce over the loopback.
    """
    if not gpus or min(gpus) < 1 or min(batch_per_gpu, price, peak_tflops, utilisation, gpus_per_node, reached) <= 0:
        raise ValueError("--gpus, --batch_per_gpu, --price and all constants of the hardware must be above 0")
    use_threads(0)
    settings = config.resolve({"model": model, "shards": shards or "none"})
    try:
        built = models.load(model).build(settings.options, InputSpec(resolution, audio))
    except ValueError as error:
        raise ValueError(f"{error} (models that hear need --audio N here)") from None
    step = count(settings, built, resolution, audio)
    given = {"decode": decode_per_core, "disk": disk_mbyte, "sample": sample_bytes}
    with tempfile.TemporaryDirectory() as folder:
        constants, measured = find_constants(given, built, Path(folder), shards, resolution, audio, measure, step)
    speed = images_per_second or peak_tflops * 1e12 * utilisation * step.batches / step.operations
    machine = scaling.Machine(gpus_per_node, speed, reached * intra_gbyte * GIGA, reached * network_gbit / 8 * GIGA,
                              hop_us * 1e-6, storage_gbit / 8 * GIGA, source_gbit / 8 * GIGA, constants["decode"][0],
                              cores_per_gpu, constants["disk"][0] * 1e6, price)
    about = "given" if images_per_second else (f"assumed: {utilisation:.0%} of {peak_tflops:g} Tflop/s in bf16, by the "
                                               "operations counted")
    sample = constants["sample"][0]
    work = scaling.Work(step, batch_per_gpu, sample, save_every)
    rows = [scaling.cost(work, number, machine) for number in gpus]
    found = scaling.limits(work, machine)
    print(describe(model, resolution, step, machine, about, constants, reached, save_every))
    print(table(rows))
    print("".join(f"{name}: {'never the limit' if limit is None else f'the limit from {limit:,} GPUs on'}\n"
                  for name, limit in found.items()))
    print(packing(pack_per_core, pack_row_bytes))
    print(json.dumps({"bench": "cost", "model": model, "resolution": resolution, "batch_per_gpu": batch_per_gpu,
                      "step": dataclasses.asdict(step), "machine": dataclasses.asdict(machine),
                      "sources": {name: source for name, (_, source) in constants.items()}, "measured": measured,
                      "rows": [dataclasses.asdict(row) for row in rows], "limits": found}))
    return 0


def describe(model: str, resolution: int, step: Step, machine: scaling.Machine, about: str,
             constants: dict[str, tuple[float, str]], reached: float, save_every: int) -> str:
    """The counts and constants, each with where it is from."""
    turns = ", ".join(f"{name} {step.repeats[name]:g} x {size / 1e6:.1f} MB" for name, size in step.gradients.items())
    writing = step.checkpoint / machine.disk
    lines = [
        ("gradients of a step", turns, "counted"),
        ("operations", f"{step.operations / step.batches / GIGA:.1f} Gflop for each image read", "counted"),
        ("a checkpoint", f"{step.checkpoint / 1e6:.0f} MB: networks, averages, Adam", "counted"),
        ("writing it", f"{writing:.2f} s at {machine.disk / 1e6:.0f} MB/s, every {save_every} steps",
         constants["disk"][1]),
        ("speed of a GPU", f"{machine.images:,.0f} images/s", about),
        ("a sample", f"{constants['sample'][0]:,.0f} bytes", constants["sample"][1]),
        ("decoding", f"{machine.decode:,.0f} samples/s and core", constants["decode"][1]),
        ("cores", f"{machine.cores:g} for each GPU", "assumed"),
        ("inside a machine", f"{machine.inside / GIGA:.0f} GB/s one way, {machine.gpus} GPUs",
         f"assumed: {reached:.0%} of the data sheet"),
        ("between machines", f"{machine.network / GIGA:.0f} GB/s, {machine.hop * 1e6:g} us a hop",
         f"assumed: {reached:.0%} of the data sheet"),
        ("to the shards", f"{machine.storage / GIGA:.1f} GB/s a machine, "
         + (f"{machine.source / GIGA:.1f} GB/s for all" if machine.source else "no limit for all"), "assumed"),
        ("price", f"${machine.price:g} for a GPU and hour", "assumed")]
    return (f"{model} at {resolution} px\n"
            + "\n".join(f"  {name:22}{value:60}{source}" for name, value, source in lines) + "\n")


def table(rows: list[scaling.Cost]) -> str:
    """The table of a run, a line for each number of GPUs, in Markdown."""
    head = ["GPUs", "global batch", "step, ms", "of it all-reduce, ms", "hidden, ms", "images/s", "shards, GB/s",
            "decoding cores a GPU", "saving, % of time", "$ for 1,000 steps", "$ for 1M images", "limit"]
    lines = [head, ["---"] * len(head)]
    lines += [[f"{row.gpus:,}", f"{row.batch:,}", f"{1e3 * row.step:.2f}", f"{1e3 * row.exposed:.2f}",
               f"{1e3 * (row.reduce - row.exposed):.2f}", f"{row.images:,.0f}", f"{row.shards / GIGA:.2f}",
               f"{row.cores:.1f}", f"{100 * row.saving:.2f}", f"{row.dollars:,.2f}", f"{row.dollars_per_million:.3f}",
               row.limit] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def packing(per_core: float, row_bytes: float, per_shard: int = 1000) -> str:
    """What it takes to pack 100 million pairs."""
    shards = -(-PAIRS // per_shard)
    some = [{"bytes": 14_000_000, "name": f"train-{number:05d}-of-{shards:05d}.tar", "samples": per_shard,
             "sha256": "0" * 64} for number in range(1000)]
    listed = len(metadata_bytes({"shards": some})) / len(some) * shards
    hours = "core hours: give --pack_per_core as measured"
    if per_core:
        hours = f"{PAIRS / per_core / 3600:,.0f} core hours at {per_core:,.0f} samples/s and core (given)"
    return (f"packing {PAIRS:,} pairs: {shards:,} shards of {per_shard}, rows {PAIRS * ROW.itemsize / GIGA:.1f} GB "
            f"({ROW.itemsize} bytes each), JSON {listed / 1e6:.0f} MB,\n  memory {PAIRS * row_bytes / GIGA:.1f} GB at "
            f"{row_bytes:g} bytes a row (stated), {hours}\n")


def find_constants(given: dict[str, float], model: Model, folder: Path, shards: str | None, resolution: int, audio: int,
                   measure: bool, step: Step) -> tuple[dict[str, tuple[float, str]], dict[str, Any]]:
    """Name -> value and source of what may be given, measured here or assumed; and all that was measured."""
    constants = {name: (value, "given") if value else WITHOUT[name] for name, value in given.items()}
    measured: dict[str, Any] = {}
    stream = None
    if shards or measure:
        stream = data.ShardDataset(shards or demo(folder, resolution), "train", batch_size=1)
        size = sum(shard["bytes"] for shard in stream.metadata["shards"]) / stream.metadata["samples"]
        constants["sample"] = constants["sample"] if given["sample"] else (
            size, "counted in --shards" if shards else "counted in a demo world")
    if measure:
        measured = {"decode": time_decoding(stream), "disk": time_disk(folder),
                    "images_per_second_cpu": time_steps(model, resolution, audio, step)}
        bandwidth, latency = time_reduce(2, 25, 5)
        measured |= {"reduce_bytes_per_second": bandwidth, "reduce_latency_seconds": latency}
        here = f"measured here (torch {torch.__version__}, {os.cpu_count()} cores)"
        for name in ("decode", "disk"):
            if not given[name]:
                constants[name] = (measured[name], here)
        flops = measured["images_per_second_cpu"] * step.operations / step.batches
        print(f"measured here: {measured['decode']:,.0f} samples/s decoded by one thread, {measured['disk']:,.0f} MB/s "
              f"written and synced,\n  {measured['images_per_second_cpu']:.1f} images/s of steps in fp32, "
              f"{torch.get_num_threads()} threads ({flops / GIGA:.0f} Gflop/s), all-reduce of two processes over the "
              f"loopback {bandwidth / GIGA:.2f} GB/s\n")
    return constants, measured


def demo(folder: Path, resolution: int) -> Path:
    """A small packed demo world with covers of this side."""
    from shard_tools.demo import make
    from shard_tools.pack import pack
    make(folder / "raw", tier="toy", resolution=resolution, albums=60)
    with contextlib.redirect_stdout(None):
        pack(str(folder / "raw"), str(folder / "shards"))
    return folder / "shards"


def time_decoding(stream: data.ShardDataset, count: int = 400) -> float:
    """Samples that one thread reads and decodes in a second of its core's time; the median of five rounds."""
    rows = np.arange(count) % stream.metadata["samples"]
    seconds = []
    for _ in range(6):
        began = time.thread_time()  # of the core, so that it matters little what else the machine does
        for start in range(0, count, 50):
            stream.read(rows[start : start + 50])
        seconds.append(time.thread_time() - began)
    return count / statistics.median(seconds[1:])


def time_disk(folder: Path, mbyte: int = 200) -> float:
    """MB/s at which a file is written and synced where temporary files are; the median of three."""
    block, speeds = os.urandom(10**6), []
    for number in range(3):
        began = time.perf_counter()
        with open(folder / f"written-{number}", "wb") as file:
            for _ in range(mbyte):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speeds.append(mbyte / (time.perf_counter() - began))
    return statistics.median(speeds)


def time_steps(model: Model, resolution: int, audio: int, step: Step, images: int = 8) -> float:
    """Images that forwards and backwards of whole steps read in a second on this CPU, in fp32; the median of three."""
    batch, seconds = random_batch(resolution, audio, images, model.needs_mismatched_audio), []
    for _ in range(4):
        began = time.perf_counter()
        run_phases_once(model, batch)
        seconds.append(time.perf_counter() - began)
    return images * step.batches / statistics.median(seconds[1:])
