"""Flow matching conditioned on audio, with classifier-free guidance.

Sources: Lipman et al. 2023, "Flow Matching for Generative Modeling"; Liu et al. 2023, "Flow Straight and Fast"
(straight paths); Esser et al. 2024, "Scaling Rectified Flow Transformers" (logit-normal times, section 3.1); Ho and
Salimans 2022, "Classifier-Free Diffusion Guidance". The network is ``UNet2DModel`` of the diffusers package (extra
``flow``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen.models.base import InputSpec, Model, ModelSpec, Phase, normal_latents, option, to_minus_one_one
from covergen.nn.layers import EMBEDDING, AudioEncoder, audio_noise, check_resolution, zero_gradient

NORM_GROUPS, HEAD_CHANNELS = 8, 32  # groups of every norm, and channels of an attention head
PLAIN_ATTENTION = 256  # positions up to which plain attention beats torch's fused one, by a seventh of a step on CPUs


@dataclass(frozen=True)
class Options:
    """Options of the model."""

    width: int = option(48, "channels at the largest side", gt=0)
    channel_mult: tuple[int, ...] = option(
        (1, 2, 2), "channels at the largest side and after each halving, as multiples of --width")
    blocks: int = option(1, "residual blocks at each side length", gt=0)
    attention_levels: int = option(1, "how many of the smallest side lengths have attention", ge=0)
    patch_size: int = option(2, "side of the pixel patches that the network treats as one position")
    condition_dropout: float = option(0.1, "share of covers that training takes without their audio, for guidance",
                                      ge=0, lt=1)
    embedding_noise: float = option(0.1, "standard deviation of the noise added to audio embeddings", ge=0)
    audio_dropout: float = option(0.1, "share of an audio vector's numbers set to 0 in training", ge=0, lt=1)
    guidance: float = option(1.5, "guidance scale of samples: 1 is the model itself, above 1 exaggerates what the "
                                  "audio asks for, 0 ignores it", ge=0)
    sampling_steps: int = option(10, "steps of Heun's method; each but the last evaluates the network twice", gt=0)


class Flow(nn.Module):
    """Predicts velocities ``[B, 3, R, R]`` from noisy images, times ``[B]`` and audio ``[B, A]``."""

    def __init__(self, options: Options, inputs: InputSpec) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
            from diffusers.models.attention_processor import Attention, AttnProcessor
        except ImportError as error:
            raise ValueError(f"--model flow needs the diffusers package ({error}): pip install -e .[flow]") from None
        widths = [options.width * multiple for multiple in options.channel_mult]
        side, channels = inputs.resolution // options.patch_size, 3 * options.patch_size**2
        plain = len(widths) - options.attention_levels
        self.unet = UNet2DModel(
            sample_size=side, in_channels=channels, out_channels=channels,
            block_out_channels=widths, layers_per_block=options.blocks,
            down_block_types=["DownBlock2D"] * plain + ["AttnDownBlock2D"] * options.attention_levels,
            up_block_types=["AttnUpBlock2D"] * options.attention_levels + ["UpBlock2D"] * plain,
            add_attention=options.attention_levels > 0, attention_head_dim=HEAD_CHANNELS, norm_num_groups=NORM_GROUPS,
            resnet_time_scale_shift="scale_shift", class_embed_type="identity" if inputs.audio else None)
        if (side >> plain) ** 2 <= PLAIN_ATTENTION:
            for module in self.unet.modules():
                if isinstance(module, Attention):
                    module.set_processor(AttnProcessor())
        for name, parameter in self.unet.named_parameters():
            if name.endswith("to_k.bias"):
                zero_gradient(parameter)  # it cancels in the softmax
        self.audio = AudioEncoder(inputs.audio) if inputs.audio else None
        if self.audio:
            self.head = nn.Linear(EMBEDDING, 4 * widths[0])
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.patch_size = options.patch_size

    def embed_audio(self, audio: Tensor | None, noise: dict[str, Tensor] | None = None) -> Tensor | None:
        """The condition ``[B, 4 * width]`` of audio; None for a model without audio."""
        return None if self.audio is None else self.head(self.audio(audio, noise))

    def forward(self, images: Tensor, times: Tensor, condition: Tensor | None) -> Tensor:
        """Velocities of images ``[B, 3, R, R]`` at times in [0, 1] (0: a cover, 1: noise), given ``embed_audio``'s
        condition; zeros in it stand for audio that was left out."""
        velocity = self.unet(F.pixel_unshuffle(images, self.patch_size), 1000 * times, class_labels=condition).sample
        return F.pixel_shuffle(velocity, self.patch_size).float()


class FlowMatchingPhase(Phase):
    """Trains the velocity eps - x0 at x_t = (1 - t) x0 + t eps."""

    name = "flow"

    def __init__(self, flow: Flow, options: Options, inputs: InputSpec) -> None:
        super().__init__()
        self.flow, self.options, self.inputs = flow, options, inputs

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        device, side, options = generator.device, self.inputs.resolution, self.options
        noise = {"eps": torch.randn(count, 3, side, side, generator=generator, device=device),
                 "times": torch.sigmoid(torch.randn(count, generator=generator, device=device))}
        if self.inputs.audio:
            noise |= audio_noise(count, self.inputs.audio, generator, options.embedding_noise, options.audio_dropout)
            uniform = torch.rand(count, 1, generator=generator, device=device)
            noise["condition_mask"] = (uniform >= options.condition_dropout).float()
        return noise

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        condition = None
        if self.inputs.audio:
            condition = self.flow.embed_audio(batch.audio, noise) * noise["condition_mask"]
        loss = velocity_errors(self.flow, to_minus_one_one(batch.cover), noise, condition).mean()
        return loss, {"flow": loss.detach()}


def velocity_errors(flow: Flow, covers: Tensor, noise: dict[str, Tensor], condition: Tensor | None) -> Tensor:
    """Mean squared errors ``[B]`` of the velocity at the times and with the noise given."""
    times, eps = noise["times"], noise["eps"]
    velocity = flow(torch.lerp(covers, eps, times[:, None, None, None]), times, condition)
    return (velocity - (eps - covers)).square().flatten(1).mean(1)


def heun(velocity: Any, images: Tensor, steps: int) -> Tensor:
    """Integrates dx/dt = velocity(x, t) from noise at t = 1 to covers at t = 0 in equal steps; the last is Euler's.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1.
    """
    for step in range(steps):
        time, next_time = 1 - step / steps, 1 - (step + 1) / steps
        slope = velocity(images, time)
        moved = images + (next_time - time) * slope
        if step < steps - 1:
            moved = images + (next_time - time) * (slope + velocity(moved, next_time)) / 2
        images = moved
    return images


def guided(flow: Flow, condition: Tensor | None, guidance: float) -> Any:
    """The velocity (of images and a time) that guidance mixes from those with and without the condition."""
    mixed = condition is not None and guidance not in (0.0, 1.0)
    if condition is not None and guidance == 0:
        condition = torch.zeros_like(condition)
    if mixed:
        condition = torch.cat([condition, torch.zeros_like(condition)])

    def velocity(images: Tensor, time: float) -> Tensor:
        inputs = images.repeat(2, 1, 1, 1) if mixed else images
        output = flow(inputs, inputs.new_full((len(inputs),), time), condition)
        if not mixed:
            return output
        conditional, unconditional = output.chunk(2)
        return torch.lerp(unconditional, conditional, guidance)
    return velocity


def build(options: Options, inputs: InputSpec) -> Model:
    """Conditional where there is audio, else unconditional."""
    check_resolution(inputs.resolution)
    widths, attention = [options.width * multiple for multiple in options.channel_mult], options.attention_levels
    if (not 0 <= attention <= len(widths) or any(width % NORM_GROUPS for width in widths)
            or options.patch_size not in (1, 2, 4)
            or any(width % HEAD_CHANNELS for width in widths[len(widths) - attention:])):
        raise ValueError(f"--width {options.width} --channel_mult {options.channel_mult} --attention_levels "
                         f"{attention} --patch_size {options.patch_size}: expected channels that {NORM_GROUPS} divides "
                         f"({HEAD_CHANNELS} where there is attention), attention at up to all {len(widths)} sides, and "
                         "a patch size of 1, 2 or 4")
    flow, side = Flow(options, inputs), inputs.resolution

    def sample(networks: dict[str, nn.Module], latents: Tensor, audio: Tensor | None) -> Tensor:
        condition = None if audio is None else networks["flow"].embed_audio(audio)
        velocity = guided(networks["flow"], condition, options.guidance)
        return heun(velocity, latents.view(-1, 3, side, side), options.sampling_steps)

    def denoising_loss(networks: dict[str, nn.Module], batch: Any, noise: dict[str, Tensor]) -> Tensor:
        network = networks["flow"]
        return velocity_errors(network, to_minus_one_one(batch.cover), noise, network.embed_audio(batch.audio))

    return Model({"flow": flow}, [FlowMatchingPhase(flow, options, inputs)], ema_networks=("flow",),
                 conditional=bool(inputs.audio), latents=normal_latents(3 * side * side), sample=sample,
                 truncation=None, denoising_loss=denoising_loss if inputs.audio else None)


FLOW = ModelSpec(
    "flow matching with classifier-free guidance (Lipman et al. 2023; Ho and Salimans 2022); needs the extra flow",
    Options, build,
    preset={"batch_size": 64, "lr": 1e-3, "betas": (0.9, 0.99), "order": "group", "album_subset": "generator",
            "steps": 100_000, "ema_halflife": 50_000.0, "lr_warmup": 10_000},
    demo={"mixed_precision": "bf16", "minutes": 20.0, "sample_every": 500, "save_every": 500})
