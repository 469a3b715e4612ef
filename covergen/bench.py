"""Speed as ratios within one run: ``python -m covergen.bench step|loader`` in, a table and a line of JSON out.

``step`` times whole training steps of WGAN-GP against a plain loop written as the thesis's notebook has it; ``loader``
times the delivery of batches against torchvision's ImageFolder in a DataLoader and against decoding alone. The
contenders take turns for several rounds and the median counts, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from covergen.models import wgan_gp
from covergen.nn.turn import Model, Sizes
from covergen.runtime import data
from covergen.runtime.machine import keep_memory, use_threads
from shard_tools import cli


def main(what: Literal["step", "loader"], resolution: int = 128, batch_size: int = 32, width: int = 64,
         rounds: int = 3, threads: int = 0, loader_threads: int = 2, samples: int = 2000) -> int:
    """Measures the speed of training steps (step) or of data loading (loader) against plain code, in one run.

    Args:
        what: step or loader.
        resolution: side of the covers in pixels.
        batch_size: covers in a batch.
        width: of the networks (step).
        rounds: how often every contender takes its turn.
        threads: that compute (step); 0: the machine's cores.
        loader_threads: that decode (loader); the DataLoader has as many worker processes.
        samples: covers and vectors in the data set made for it (loader).
    """
    use_threads(threads)
    if what == "step":
        times = time_steps(resolution, batch_size, width, rounds)
        report("step", times, unit="s/step", base="notebook fp32", faster_is="less",
               about={"resolution": resolution, "batch_size": batch_size, "width": width})
    else:
        rates = time_loaders(resolution, batch_size, samples, rounds, loader_threads)
        share = statistics.median(rates["covergen (with vectors)"]) / statistics.median(rates["decoding alone"])
        print(f"covergen reaches {share:.0%} of the speed of decoding alone")
        report("loader", rates, unit="samples/s", base="ImageFolder + DataLoader", faster_is="more",
               about={"resolution": resolution, "batch_size": batch_size, "threads": loader_threads,
                      "share_of_decoding": share})
    return 0


def report(what: str, measured: dict[str, list[float]], unit: str, base: str, faster_is: str, about: dict) -> None:
    """Prints the medians with their ratios to the base, as a table and as one line of JSON."""
    median = {name: statistics.median(values) for name, values in measured.items()}
    ratio = {name: median[base] / value if faster_is == "less" else value / median[base]
             for name, value in median.items()}
    print(f"{'':32}{unit:>14}{'x ' + base:>32}   spread")
    for name, values in measured.items():
        print(f"{name:32}{median[name]:>14.3f}{ratio[name]:>32.2f}   {min(values):.3f} .. {max(values):.3f}")
    print(json.dumps({"bench": what, **about, "compute_threads": torch.get_num_threads(), "torch": torch.__version__,
                      "unit": unit, "median": median, f"ratio_to_{base}": ratio}))


def take_turns(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One unmeasured call of each, then ``rounds`` measured ones in alternation."""
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            value = run()
            if number:
                measured[name].append(value)
    return measured


# -- step ---


def time_steps(resolution: int, batch_size: int, width: int, rounds: int) -> dict[str, list[float]]:
    """Seconds for one whole step (five critic updates, one generator update) of every contender."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    options, sizes = wgan_gp.PlainOptions(width=width), Sizes(resolution)
    noise = torch.Generator(device).manual_seed(0)
    covers = torch.randint(0, 256, (batch_size, 3, resolution, resolution), generator=noise, device=device).byte()
    batch = data.Batch(covers, None, None, None)
    torch.manual_seed(0)
    start = {name: network.state_dict() for name, network in wgan_gp.build(options, sizes).networks.items()}
    contenders, losses = {}, {}

    def add(name: str, make: Callable[[Model], Callable[[], Tensor]]) -> None:
        model = wgan_gp.build(options, sizes)
        for network in model.networks:
            model.networks[network].load_state_dict(start[network])
            model.networks[network].to(device)
        step = make(model)

        def timed() -> float:
            keep_memory(not name.startswith("notebook"))  # a notebook has the allocator's defaults
            began = time.perf_counter()
            loss = float(step())  # waits for the device
            losses.setdefault(name, loss)
            return time.perf_counter() - began

        contenders[name] = timed

    add("notebook fp32", lambda model: notebook_loop(model, batch, options))
    add("covergen fp32", lambda model: turns_loop(model, batch, noise, contextlib.nullcontext))
    add("covergen bf16", lambda model: turns_loop(model, batch, noise,
                                                  lambda: torch.autocast(device.type, torch.bfloat16)))
    measured = take_turns(contenders, rounds)
    print("critic loss after the first step: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
    return measured


def turns_loop(model: Model, batch: data.Batch, noise: torch.Generator, precision: Callable) -> Callable[[], Tensor]:
    """The project's step: the turns as training takes them, without Accelerate's wrapping around them."""
    optimizers = [torch.optim.Adam(turn.parameters(), lr=1e-4, betas=(0.0, 0.999)) for turn in model.turns]

    def step() -> Tensor:
        noise.manual_seed(1)
        last = torch.zeros(())
        for turn, optimizer in zip(model.turns, optimizers, strict=True):
            for _ in range(turn.repeats):
                with precision():
                    loss, scalars = turn(batch, turn.draw(len(batch.cover), noise))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                last = scalars.get("critic", last)
        return last

    return step


def notebook_loop(model: Model, batch: data.Batch, options: wgan_gp.Options) -> Callable[[], Tensor]:
    """The same numbers as a plain notebook has them: instance norm layers, one backward per loss term, no autocast."""
    generator, critic = model.networks["generator"], model.networks["critic"]
    for i, layer in enumerate(critic.blocks):
        if isinstance(layer, nn.GroupNorm):
            norm = nn.InstanceNorm2d(layer.num_channels, affine=True).to(layer.weight.device)
            norm.load_state_dict(layer.state_dict())
            critic.blocks[i] = norm
    adam = {net: torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.0, 0.999)) for net in (generator, critic)}
    noise = torch.Generator(batch.cover.device)

    def step() -> Tensor:
        noise.manual_seed(1)
        count = len(batch.cover)

        def normal() -> Tensor:
            return torch.randn(count, options.latent, generator=noise, device=noise.device)

        for _ in range(options.critic_steps):
            critic.zero_grad()
            real = batch.cover.float() / 127.5 - 1
            real_loss = -critic(real).mean()
            real_loss.backward()
            fake = generator(normal())
            fake_loss = critic(fake.detach()).mean()
            fake_loss.backward()
            mix = torch.rand(count, 1, 1, 1, generator=noise, device=noise.device)
            between = (mix * real + (1 - mix) * fake.detach()).requires_grad_(True)
            scores = critic(between)
            slope = torch.autograd.grad(scores, between, torch.ones_like(scores), create_graph=True)[0]
            penalty = options.penalty * ((slope.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
            penalty.backward()
            adam[critic].step()
            loss = (real_loss + fake_loss + penalty).detach()
        generator.zero_grad()
        (-critic(generator(normal())).mean()).backward()
        adam[generator].step()
        return loss

    return step


# -- loader ---


def time_loaders(resolution: int, batch_size: int, samples: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Samples a second of every contender, over one pass of a data set that is made for it."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import PILToTensor

    from shard_tools.demo import make
    from shard_tools.pack import pack
    with tempfile.TemporaryDirectory() as folder:
        raw, shards = Path(folder) / "raw", Path(folder) / "shards"
        make(raw, tier="toy", resolution=resolution, albums=max(40, int(samples / 1.9)))
        with contextlib.redirect_stdout(None):
            pack(str(raw), str(shards))
        stream = data.IndexedShards(shards, "train", batch_size=batch_size)
        batches = stream.facts["samples"] // batch_size
        jpegs = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
                 for path in sorted(raw.glob("audio-cover_dataset/cover/train/*/*.jpg"))]
        print(f"{len(jpegs):,} covers of {resolution} px, {sum(map(len, jpegs)) / len(jpegs) / 1000:.1f} kB each, "
              f"with vectors of {stream.dimension}")
        loader = data.Loader(stream, 0, device=torch.device("cpu"), resolution=resolution, threads=threads)
        folders = ImageFolder(str(raw / "audio-cover_dataset/cover/train"), transform=PILToTensor(), allow_empty=True)
        baseline = DataLoader(folders, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=threads,
                              persistent_workers=True)
        pool = ThreadPoolExecutor(threads)

        def decode_all() -> float:
            began = time.perf_counter()
            portions = [jpegs[i:i + 64] for i in range(0, len(jpegs), 64)]
            for _ in pool.map(lambda some: [decode_jpeg(jpeg, mode=ImageReadMode.RGB) for jpeg in some], portions):
                pass
            return len(jpegs) / (time.perf_counter() - began)

        try:
            return take_turns({
                "ImageFolder + DataLoader": lambda: rate(iter(baseline), batches, batch_size),
                "covergen (with vectors)": lambda: rate(loader, batches, batch_size),
                "decoding alone": decode_all,
            }, rounds)
        finally:
            loader.close()
            pool.shutdown()


def rate(batches: Iterator, count: int, batch_size: int) -> float:
    """Samples a second over ``count`` batches, after a few that fill the queues."""
    warm = min(4, count // 2)
    for _ in itertools.islice(batches, warm):
        pass
    began = time.perf_counter()
    seen = sum(1 for _ in itertools.islice(batches, count - warm))
    return seen * batch_size / (time.perf_counter() - began)


if __name__ == "__main__":
    cli.run(main)
