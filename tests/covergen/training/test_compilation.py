"""Every phase compiles as one graph, no step waits for the device, and what compiling costs is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from covergen import models
from covergen.data.batch import Batch
from covergen.models.base import InputSpec, Model
from covergen.runs.config import Training
from covergen.training.compilation import Compiling, compile_phase, load_optimizer, optimizer_of
from covergen.training.profiler import Profile
from shard_tools import cli
from tests.support.runs import log_of, run_command

SMALL = {"flow": {"width": 32, "channel_mult": (1, 1), "patch_size": 4}, "r3gan": {"width": 4, "penalty_every": 2},
         "contrast": {"width": 8}}
EVERY_MODEL = [(name, {}) for name in models.MODELS] + [("cond_wgan_gp", {"projection_critic": True})]
AUDIO, COUNT = 20, 4


def built(name: str, options: dict) -> Model:
    if name == "flow":
        pytest.importorskip("diffusers")
    recipe = models.load(name)
    return recipe.build(recipe.options(**{"width": 4, **SMALL.get(name, {}), **options}), InputSpec(32, AUDIO))


def batch(model: Model) -> Batch:
    covers = torch.randint(0, 256, (COUNT, 3, 32, 32)).byte()
    audio = torch.randn(COUNT, AUDIO)
    mismatched = audio if model.needs_mismatched_audio else None
    return Batch(covers, audio, torch.zeros(COUNT).long(), torch.arange(COUNT), mismatched)


class NoWaiting(TorchDispatchMode):
    """Raises where an operation hands a value of a tensor to the host, which then waits for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
                        torch.ops.aten.nonzero.default, torch.ops.aten.equal.default):
            raise AssertionError(f"{function} makes the host wait for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "options"), EVERY_MODEL, ids=str)
def test_no_step_waits_for_the_device(name: str, options: dict) -> None:
    model = built(name, options)
    covers, noise = batch(model), torch.Generator()
    for step in (1, 2):
        for phase in model.phases:
            phase.begin(step, step * COUNT)
            drawn = phase.sample_noise(COUNT, noise)
            with NoWaiting():
                with torch.autocast("cpu", torch.bfloat16):
                    loss, scalars = phase(covers, drawn)
                loss.backward()
            assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in scalars.values())


def test_what_watches_for_waiting_sees_it() -> None:
    for waits in (lambda value: value.item(), float, bool):
        with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
            waits(torch.ones(1).sum())


@pytest.mark.parametrize(("name", "options"), EVERY_MODEL, ids=str)
def test_every_turn_compiles_as_one_graph(name: str, options: dict) -> None:
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    model = built(name, options)
    backward = name == "wgan_gp"  # also traced there: its critic is read and trained, and has a hook
    for phase in model.phases:
        phase.compile(dynamic=False, backend="aot_eager" if backward else "eager")
    noise = torch.Generator()
    for step in (1, 2):
        for phase in model.phases:
            phase.begin(step, step * COUNT)
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = phase(batch(model), phase.sample_noise(COUNT, noise))
            if backward:
                loss.backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == len(model.phases) + (name == "r3gan")  # and one without penalties


def test_cuda_graphs_are_refused_where_there_are_none() -> None:
    phases, cpu = built("dcgan", {}).phases, torch.device("cpu")
    with pytest.raises(ValueError, match="needs a CUDA GPU, and this process computes on cpu"):
        Compiling(phases, Training(cuda_graphs=True), cpu)
    with pytest.raises(ValueError, match="can't be accumulated"):
        Compiling(phases, Training(cuda_graphs=True, grad_accum=2), torch.device("cuda"))


def test_a_turn_for_cuda_graphs_hands_out_copies_and_keeps_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    marks, modes = [], []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr(torch, "compile", lambda call, **options: modes.append(options["mode"]) or call)
    model = built("dcgan", {})
    phase = model.phases[0]
    names = set(phase.state_dict())
    compile_phase(phase, cuda_graphs=True)
    phase(batch(model), phase.sample_noise(COUNT, torch.Generator()))[0].backward()
    assert (marks, modes) == ([1], ["reduce-overhead"]) and set(phase.state_dict()) == names


def test_an_optimiser_goes_on_from_a_state_of_other_kernels() -> None:
    model = built("dcgan", {})
    phase, training, covers = model.phases[0], Training(), batch(model)
    plain = torch.optim.Adam(phase.parameters(), lr=training.lr, betas=training.betas)
    phase(covers, phase.sample_noise(COUNT, torch.Generator()))[0].backward()
    plain.step()
    fused = optimizer_of(phase, training, "bf16")
    load_optimizer(fused, plain.state_dict())
    assert fused.param_groups[0]["fused"] is True
    before = [parameter.detach().clone() for parameter in phase.parameters()]
    plain.step()
    after = [parameter.detach().clone() for parameter in phase.parameters()]
    for parameter, value in zip(phase.parameters(), before, strict=True):
        parameter.data.copy_(value)
    fused.step()
    for parameter, value in zip(phase.parameters(), after, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    assert optimizer_of(phase, training, "fp16").param_groups[0]["fused"] is None


def test_what_compiling_costs_is_counted_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda phase, **options: compile_module(phase, **options, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    model = built("vae", {})
    phase, noise = model.phases[0], torch.Generator()
    compiling = Compiling(model.phases, Training(compile=True), torch.device("cpu"))
    before = compiling.seconds
    phase(batch(model), phase.sample_noise(COUNT, noise))
    assert compiling.seconds > before
    costs = compiling.new_stats()
    assert costs["speed/graph_breaks"] == costs["speed/recompiles"] == 0 and costs["speed/compile_seconds"] > 0
    phase(batch(model), phase.sample_noise(COUNT, noise))
    assert not compiling.new_stats()
    phase.eval()
    phase(batch(model), phase.sample_noise(COUNT, noise))
    assert compiling.new_stats()["speed/recompiles"] == 1 and "0 graph breaks, 1 recompiles" in compiling.text()
    assert not Compiling(model.phases, Training(), torch.device("cpu")).new_stats()


@pytest.mark.slow
def test_a_compiled_run_tells_what_compiling_cost_and_leaves_it_out_of_its_speed(shards: Path, tmp_path: Path) -> None:
    done = run_command(tmp_path, "covergen.train", "--model", "ae_resize", "--shards", str(shards), "--width", "4",
                       "--batch_size", "8", "--steps", "8", "--epochs", "0", "--save_every", "8", "--log_every", "2",
                       "--sample_every", "0", "--tracker", "none", "--compile", "--name", "run", "--patience", "0",
                       OMP_NUM_THREADS="1")
    assert "compiled 1 phase in" in done.stdout
    rows = log_of(tmp_path / "runs/run")
    first = rows[0]
    assert first["speed/graph_breaks"] == 0 == first["speed/recompiles"] and first["speed/compile_seconds"] > 1
    assert "speed/compile_seconds" not in rows[1]  # nothing new
    # Its two steps took far longer than that, compiling included.
    assert 16 / first["speed/images_per_second"] < first["speed/compile_seconds"]


def test_a_profile_has_a_trace_and_the_ten_costliest_operations(shards: Path, tmp_path: Path) -> None:
    import gzip
    done = run_command(tmp_path, "covergen.train", "--model", "dcgan", "--shards", str(shards), "--width", "4",
                       "--critic_width", "4", "--batch_size", "8", "--steps", "9", "--sample_every", "0",
                       "--tracker", "none", "--profile", "2", "--name", "run", OMP_NUM_THREADS="1")
    folder = tmp_path / "runs/run/profile"
    table = (folder / "top10.txt").read_text()
    rows = table.splitlines()[1:]
    assert len(rows) == 10 and sum("aten::" in row for row in rows) >= 5 and table in done.stdout
    shares = [float(row.split()[1].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.5
    names = {event.get("name") for event in json.loads(gzip.open(folder / "trace.json.gz").read())["traceEvents"]}
    assert "aten::convolution_backward" in names


def test_a_profile_of_too_short_a_run_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    profile = Profile(tmp_path, 2, torch.device("cpu"), said.append)
    for _ in range(3):
        profile.step()
    profile.close()
    assert "there were only 3" in said[0] and not (tmp_path / "profile").exists()


def test_options_of_speed_are_checked() -> None:
    from covergen.runs import config
    with pytest.raises(ValueError, match="--profile -1: expected 0 or more"):
        config.resolve({"profile": "-1"})
    assert not config.differences({"profile": 1}, {"profile": 2}) and cli.coerce("compile", "True", bool) is True
