"""Every model: sizes, resolutions, phases that train only what is theirs, and no copied blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from covergen import models
from covergen.data.batch import Batch
from covergen.models.base import InputSpec, Model, normal_latents
from covergen.nn.layers import AudioTrunk
from covergen.nn.losses import bernoulli_and_kl, binary_cross_entropy, least_squares, psnr
from tests.support.runs import ROOT, log_of, train_script

AUDIO = 20
SMALL = {"flow": {"width": 32, "channel_mult": (1, 1), "blocks": 1, "patch_size": 4, "sampling_steps": 2},
         "r3gan": {"width": 4, "blocks": 1, "group_size": 0, "patch_size": 1}}
UNBOUNDED = {"flow", "r3gan"}  # their covers do not come out of a tanh or a sigmoid


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def small(name: str, resolution: int = 32, **options: Any) -> Model:
    spec = models.load(name)
    torch.manual_seed(0)
    return spec.build(spec.options(**{"width": 8, **SMALL.get(name, {}), **options}), InputSpec(resolution, AUDIO))


def batch_of(size: int, resolution: int = 32, mismatched: bool = False) -> Batch:
    source = torch.Generator().manual_seed(1)
    cover = torch.randint(0, 256, (size, 3, resolution, resolution), dtype=torch.uint8, generator=source)
    audio, wrong = torch.randn(2, size, AUDIO, generator=source)
    return Batch(cover, audio, torch.zeros(size), torch.arange(size), wrong if mismatched else None)


@pytest.mark.parametrize(("name", "sizes"), [
    ("ae_resize", [260_867]), ("ae_transpose", [260_867]), ("vae", [49_446_635]),
    ("dcgan", [3_642_368, 2_831_232]), ("lsgan", [12_204_099, 957_121]), ("wgan_gp", [4_353_091, 3_814_785]),
    ("cond_wgan_gp", [9_782_043, 3_814_785]), ("cond_lsgan", [17_351_451, 3_814_785]),
])
def test_parameters_are_the_thesis_s_at_128_px(name: str, sizes: list[int]) -> None:
    spec = models.load(name)
    with torch.device("meta"):
        networks = spec.build(spec.options(), InputSpec(128, 1160)).networks
    assert [count(network) for network in networks.values()] == sizes


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_trains_and_works_at_every_resolution(name: str, resolution: int) -> None:
    model = small(name, resolution)
    batch = batch_of(2, resolution, model.needs_mismatched_audio)
    for phase in model.phases:
        loss, scalars = phase(batch, phase.sample_noise(2, torch.Generator().manual_seed(0)))
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in phase.parameters())
        assert scalars and all(not value.requires_grad and value.ndim == 0 for value in scalars.values())
    for network in model.networks.values():
        network.eval()
    with torch.no_grad():
        if model.sample:
            images = model.sample(model.networks, model.latents(2, torch.Generator(), None), batch.audio)
            assert images.shape == batch.cover.shape and images.isfinite().all()
            assert name in UNBOUNDED or (images.min() >= model.pixel_min and images.max() <= 1)
        if model.reconstruct:
            images = model.reconstruct(model.networks, batch)
            assert images.shape == batch.cover.shape and images.min() >= 0 and images.max() <= 1
            assert model.encode(model.networks, batch).shape[0] == 2
        if model.embed_audio:
            assert model.embed_audio(model.networks, batch.audio).shape == model.encode(model.networks, batch).shape
    assert model.sample or model.reconstruct or model.embed_audio


@pytest.mark.parametrize("name", models.MODELS)
def test_a_phase_trains_its_own_network_only(name: str) -> None:
    model = small(name)
    batch = batch_of(4, mismatched=model.needs_mismatched_audio)
    own = [{id(parameter) for parameter in phase.parameters()} for phase in model.phases]
    assert not set.intersection(*own) if len(own) > 1 else own
    everything = [parameter for network in model.networks.values() for parameter in network.parameters()]
    assert set.union(*own) == {id(parameter) for parameter in everything}
    for phase, mine in zip(model.phases, own, strict=True):
        phase(batch, phase.sample_noise(4, torch.Generator().manual_seed(0)))[0].backward()
        assert all((parameter.grad is None) == (id(parameter) not in mine) for parameter in everything)
        phase.zero_grad()


@pytest.mark.parametrize("name", models.MODELS)
def test_bf16_keeps_losses_near_those_of_fp32(name: str) -> None:
    model = small(name)
    batch = batch_of(4, mismatched=model.needs_mismatched_audio)
    for phase in model.phases:
        noise = phase.sample_noise(4, torch.Generator().manual_seed(0))
        with torch.no_grad() if phase.name != "critic" else torch.enable_grad():
            exact = phase(batch, noise)[0].detach()
            with torch.autocast("cpu", torch.bfloat16):
                rough = phase(batch, noise)[0].detach()
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)


def test_raw_descriptors_of_any_size_do_not_break_a_conditional_model_in_bf16() -> None:
    model, batch = small("cond_lsgan"), batch_of(4)
    batch = batch._replace(audio=batch.audio * torch.logspace(-24, 13, AUDIO))
    with torch.autocast("cpu", torch.bfloat16):
        for phase in model.phases:
            assert phase(batch, phase.sample_noise(4, torch.Generator().manual_seed(0)))[0].isfinite()


@pytest.mark.parametrize("name", [name for name in models.MODELS if name.startswith("cond_") or name in UNBOUNDED])
def test_samples_of_a_conditional_model_depend_on_the_audio(name: str) -> None:
    model, batch = small(name), batch_of(4)
    for phase in model.phases:  # heads begin near nothing
        torch.optim.Adam(phase.parameters(), 0.01).step(
            lambda phase=phase: phase(batch, phase.sample_noise(4, torch.Generator().manual_seed(0)))[0].backward())
    for network in model.networks.values():
        network.eval()
    latents = model.latents(1, torch.Generator().manual_seed(0), None).repeat(4, 1)
    with torch.no_grad():
        images = model.sample(model.networks, latents, batch.audio)
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in models.MODELS if name.startswith("cond_") or name == "contrast"])
def test_a_model_that_can_not_do_without_audio_says_so(name: str) -> None:
    spec = models.load(name)
    with pytest.raises(ValueError, match="hold no audio vectors"):
        spec.build(spec.options(), InputSpec(32, 0))


def test_steps_of_size_in_the_audio_trunk_are_the_thesis_s() -> None:
    assert [layer.out_features for layer in AudioTrunk(1160, 512) if isinstance(layer, torch.nn.Linear)] == [
        944, 728, 512]
    with pytest.raises(ValueError, match="at least 2 covers in every process"):
        AudioTrunk(20, 10)(torch.zeros(1, 20))


def test_other_resolutions_are_refused() -> None:
    for name in models.MODELS:
        with pytest.raises(ValueError, match="resolution 48"):
            small(name, 48)


def test_the_discriminator_of_cond_lsgan_steps_every_second_time() -> None:
    model = small("cond_lsgan")
    assert [(phase.name, phase.interval) for phase in model.phases] == [("discriminator", 2), ("generator", 1)]
    assert all(phase.interval == 1 for phase in small("lsgan").phases)


def test_dcgan_can_draw_the_noise_of_the_thesis_s_code_and_lsgan_truncates_nearer() -> None:
    thesis = {"latent_mean": -1.0, "latent_std": 2.0}
    drawn = small("dcgan", **thesis).latents(4000, torch.Generator().manual_seed(0), None)
    assert abs(drawn.mean() + 1) < 0.02 and abs(drawn.std() - 2) < 0.02
    assert torch.equal(small("dcgan").latents(9, torch.Generator().manual_seed(0), None) * 2 - 1,
                       small("dcgan", **thesis).latents(9, torch.Generator().manual_seed(0), None))
    assert small("lsgan").truncation == 1.5 and small("wgan_gp").truncation == 2


def test_truncated_latents_stay_inside_their_bound() -> None:
    latents = normal_latents(10)(1000, torch.Generator().manual_seed(0), 1.5)
    assert latents.abs().max() <= 1.5 and latents.std() > 0.5


def test_losses_are_those_of_the_papers() -> None:
    scores = torch.tensor([0.2, -1.0, 3.0])
    torch.testing.assert_close(least_squares(scores, 0.9), 0.5 * ((scores - 0.9) ** 2).mean())
    expected = torch.nn.functional.binary_cross_entropy(scores.sigmoid(), torch.full((3,), 0.9))
    torch.testing.assert_close(binary_cross_entropy(scores, 0.9), expected)
    mean, log_variance = torch.randn(2, 5, 7).unbind(0)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0))
    images = torch.rand(5, 3, 4, 4)
    entropy, divergence = bernoulli_and_kl(torch.zeros(5, 3, 4, 4), images, mean, log_variance)
    torch.testing.assert_close(divergence, expected.sum(1).mean())
    torch.testing.assert_close(entropy, torch.tensor(3 * 4 * 4 * 0.6931472))
    torch.testing.assert_close(psnr(torch.tensor([0.01])), torch.tensor([20.0]))


def test_the_table_of_models_is_whole() -> None:
    for name in models.MODELS:
        spec = models.load(name)
        assert spec.about and spec.options() and spec.preset


def test_no_six_lines_stand_twice_between_model_files() -> None:
    blocks: dict[tuple[str, ...], Path] = {}
    for path in sorted((ROOT / "covergen/models").glob("*.py")):
        code = re.sub(r"^(from .*)?import (\([^)]*\)|.*)$", "", path.read_text(), flags=re.MULTILINE)
        lines = [line.strip() for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
        for block in {tuple(lines[start:start + 6]) for start in range(len(lines) - 5)}:
            assert blocks.setdefault(block, path) == path, "\n".join(block)


def test_a_new_model_is_one_file_and_one_line_and_trains_on_two_ranks(shards: Path, tmp_path: Path) -> None:
    flags = ["--model", "toy", "--shards", str(shards), "--steps", "5", "--batch_size", "8", "--tracker", "none",
             "--log_every", "1", "--brightness", "0.25", "--mixed_precision", "no"]
    toy = ROOT / "tests/support/toy_model.py"
    train_script(tmp_path, toy, *flags, "--name", "one")
    done = train_script(tmp_path, toy, *flags, ranks=2)
    assert "2 processes on" in done.stdout and "picture 3,072 parameters" in done.stdout
    assert len(log_of(tmp_path / "runs/toy")) == 5
    one, two = (load_file(tmp_path / "runs" / name / "checkpoints/step_00000005/picture.safetensors")["pixels"]
                for name in ("one", "toy"))
    assert 0.03 < (two - 0.25).abs().mean() < 0.06  # five steps of Adam at 0.01, mostly the same way
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    assert {path.name for path in (tmp_path / "runs/toy/grids").iterdir()} == {
        "step_00000005_noise.png", "step_00000005_truncated.png"}
