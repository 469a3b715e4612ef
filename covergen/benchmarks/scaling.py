"""What a run costs on n GPUs, on paper: counts and constants in, seconds, dollars and the limiting resource out.

The batch of a GPU stays the same, so the global batch grows with the GPUs. All times are of one step, in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from covergen.benchmarks.counting import Step

BUCKET = 25 * 2**20  # DDP reduces gradients in pieces of so many bytes, while the backward goes on
BACKWARD = 2 / 3  # the share of a turn's time in which gradients become ready
MOST = 2**16  # GPUs up to which limits are looked for


@dataclass(frozen=True)
class Machine:
    """The constants of the hardware; bandwidths in bytes a second.

    Attributes:
        gpus: of one machine.
        images: that one GPU trains in a second.
        inside, network: bandwidth of a GPU to others of its machine, and of a machine to others, one way.
        hop: seconds of a message between two GPUs.
        storage: bandwidth of a machine to where the shards are.
        source: bandwidth of that place to all machines together, 0 for no limit.
        decode: samples that a core reads and decodes in a second.
        cores: for each GPU.
        disk: bandwidth for writing checkpoints.
        price: dollars for a GPU and hour.
    """

    gpus: int
    images: float
    inside: float
    network: float
    hop: float
    storage: float
    source: float
    decode: float
    cores: float
    disk: float
    price: float


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        step: of the model.
        batch: covers that one GPU sees at once.
        sample: bytes of a sample in its shard.
        save_every: steps between checkpoints.
    """

    step: Step
    batch: int
    sample: float
    save_every: int

    def images(self, gpus: int) -> int:
        """That one step reads on so many GPUs."""
        return gpus * self.batch * self.step.batches


@dataclass(frozen=True)
class Cost:
    """One row of the table.

    Attributes:
        gpus: how many there are.
        batch: covers in the global batch.
        compute, reduce: seconds of a step that the GPUs compute, and that gradients are on their way.
        exposed: the part of the latter that no backward hides.
        step: seconds of a step, as the slowest resource has it.
        images: of all GPUs in a second.
        shards: bytes of shards that all of them read in a second.
        cores: that decode them, for each GPU.
        saving: share of the time that a checkpoint takes to write, be it beside training or not.
        dollars, dollars_per_million: for 1,000 steps and for a million images.
        limit: the resource that is the slowest.
    """

    gpus: int
    batch: int
    compute: float
    reduce: float
    exposed: float
    step: float
    images: float
    shards: float
    cores: float
    saving: float
    dollars: float
    dollars_per_million: float
    limit: str


def all_reduce(size: float, gpus: int, machine: Machine) -> float:
    """Seconds to sum ``size`` bytes over all GPUs: a ring's 2 (n-1) / n x size / bandwidth, and a tree's hops."""
    if gpus == 1:
        return 0.0
    bandwidth = machine.inside if gpus <= machine.gpus else min(machine.inside, machine.network)
    return 2 * (gpus - 1) / gpus * size / bandwidth + 2 * math.ceil(math.log2(gpus)) * machine.hop


def reducing(work: Work, gpus: int, machine: Machine) -> tuple[float, float]:
    """Seconds of a step in which gradients are on their way, and the part of them that no backward hides."""
    step = work.step
    turns = sum(step.repeats.values())  # that take about as long as each other
    hidden = BACKWARD * step.batches * work.batch / machine.images / turns
    reduce = exposed = 0.0
    for name, size in step.gradients.items():
        seconds = [all_reduce(min(BUCKET, size - begun), gpus, machine) for begun in range(0, size, BUCKET)]
        reduce += step.repeats[name] * sum(seconds)
        # The last piece is ready when the backward is over.
        exposed += step.repeats[name] * (seconds[-1] + max(0.0, sum(seconds[:-1]) - hidden))
    return reduce, exposed


def rates(work: Work, gpus: int, machine: Machine) -> dict[str, float]:
    """Images a second that each resource alone would allow on so many GPUs."""
    images, machines = work.images(gpus), math.ceil(gpus / machine.gpus)
    reduce = reducing(work, gpus, machine)[0]
    return {"compute": gpus * machine.images,
            "all-reduce": images / reduce if reduce else math.inf,
            "decoding": gpus * machine.cores * machine.decode,
            "network of a machine to the shards": machines * machine.storage / work.sample,
            "source of the shards": machine.source / work.sample if machine.source else math.inf,
            "writing of checkpoints": images * work.save_every / (work.step.checkpoint / machine.disk)}


def cost(work: Work, gpus: int, machine: Machine) -> Cost:
    """Args:
        work: what is to be done.
        gpus: by how many.
        machine: the hardware.
    """
    compute = work.step.batches * work.batch / machine.images
    reduce, exposed = reducing(work, gpus, machine)
    allowed = rates(work, gpus, machine)
    slowest = min(allowed, key=allowed.__getitem__)
    step = max(compute + exposed, work.images(gpus) / allowed[slowest])
    images = work.images(gpus) / step
    hourly = gpus * machine.price / 3600
    return Cost(gpus, gpus * work.batch, compute, reduce, exposed, step, images, images * work.sample,
                images / gpus / machine.decode, work.step.checkpoint / machine.disk / (work.save_every * step),
                1000 * step * hourly, 1e6 / images * hourly, slowest)


def limits(work: Work, machine: Machine) -> dict[str, int | None]:
    """Resource -> the fewest GPUs (a power of two) at which it allows less than computing does; None: never."""
    found: dict[str, int | None] = {}
    gpus = 1
    while gpus <= MOST:
        allowed = rates(work, gpus, machine)
        for name, rate in allowed.items():
            if name != "compute" and found.setdefault(name, None) is None and rate < allowed["compute"]:
                found[name] = gpus
        gpus *= 2
    return found
