"""Flow matching with the audio in the objective and classifier-free guidance.

Sources: Lipman et al. 2023, "Flow Matching for Generative Modeling"; Liu et al. 2023, "Flow Straight and Fast"
(straight paths); Esser et al. 2024, "Scaling Rectified Flow Transformers" (logit-normal times, section 3.1); Ho and
Salimans 2022, "Classifier-Free Diffusion Guidance". The network is ``UNet2DModel`` of the diffusers package (extra
``flow``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covergen.models.base import InputSpec, Model, ModelSpec, Phase, normal_latents, to_minus_one_one
from covergen.nn.layers import EMBEDDING, AudioEncoder, audio_noise, check_resolution, zero_gradient

GROUPS, HEAD = 8, 32  # of the network's norms, and channels of an attention head
FEW = 256  # places up to which plain attention is faster than torch's fused one, by a seventh of a step on CPUs


@dataclass(frozen=True)
class Options:
    """What can be set about the model."""

    width: int = field(default=48, metadata={"help": "channels at the largest side"})
    multiples: tuple[int, ...] = field(default=(1, 2, 2), metadata={
        "help": "channels at the largest side and after each halving, as times --width"})
    blocks: int = field(default=1, metadata={"help": "residual blocks at each side length"})
    attention: int = field(default=1, metadata={"help": "how many of the smallest side lengths have attention"})
    stem: int = field(default=2, metadata={"help": "side of the patches that the network sees as one place"})
    condition_dropout: float = field(default=0.1, metadata={"help": "share of the audio that training leaves out, for guidance"})
    embedding_noise: float = field(default=0.1, metadata={"help": "standard deviation of the noise on audio embeddings"})
    audio_dropout: float = field(default=0.1, metadata={"help": "share of an audio vector's numbers set to 0"})
    guidance: float = field(default=1.5, metadata={
        "help": "of samples: 1 is the model itself, above 1 exaggerates what the audio asks for, 0 ignores it"})
    sampling_steps: int = field(default=10, metadata={"help": "steps of Heun's method, two evaluations each but one"})


class Flow(nn.Module):
    """Noisy images ``[B, 3, R, R]``, times ``[B]`` and audio ``[B, A]`` -> velocities ``[B, 3, R, R]``."""

    def __init__(self, options: Options, sizes: InputSpec) -> None:
        super().__init__()
        try:
            from diffusers import UNet2DModel
            from diffusers.models.attention_processor import Attention, AttnProcessor
        except ImportError as error:
            raise ValueError(f"--model flow needs the diffusers package ({error}): pip install -e .[flow]") from None
        widths = [options.width * multiple for multiple in options.multiples]
        plain = len(widths) - options.attention
        channels = 3 * options.stem**2
        self.unet = UNet2DModel(
            sample_size=sizes.resolution // options.stem, in_channels=channels, out_channels=channels,
            block_out_channels=widths, layers_per_block=options.blocks,
            down_block_types=["DownBlock2D"] * plain + ["AttnDownBlock2D"] * options.attention,
            up_block_types=["AttnUpBlock2D"] * options.attention + ["UpBlock2D"] * plain,
            add_attention=options.attention > 0, attention_head_dim=HEAD, norm_num_groups=GROUPS,
            resnet_time_scale_shift="scale_shift", class_embed_type="identity" if sizes.audio else None)
        if (sizes.resolution // options.stem >> plain) ** 2 <= FEW:
            for module in self.unet.modules():
                if isinstance(module, Attention):
                    module.set_processor(AttnProcessor())
        for name, parameter in self.unet.named_parameters():
            if name.endswith("to_k.bias"):
                zero_gradient(parameter)  # it cancels in the softmax
        self.audio = AudioEncoder(sizes.audio) if sizes.audio else None
        if self.audio:
            self.head = nn.Linear(EMBEDDING, 4 * widths[0])
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.stem = options.stem

    def embed_audio(self, audio: Tensor | None, noise: dict[str, Tensor] | None = None) -> Tensor | None:
        """The condition ``[B, 4 * width]`` of audio; of condition_dropout audio it is zeros."""
        return None if self.audio is None else self.head(self.audio(audio, noise))

    def forward(self, images: Tensor, times: Tensor, condition: Tensor | None) -> Tensor:
        """Args: images; times: in [0, 1], 0 is a cover and 1 is noise; condition: as of ``embed_audio``, None: no audio."""
        velocity = self.unet(F.pixel_unshuffle(images, self.stem), 1000 * times, class_labels=condition).sample
        return F.pixel_shuffle(velocity, self.stem).float()


class FlowMatchingPhase(Phase):
    """Trains the velocity eps - x0 at x_t = (1 - t) x0 + t eps."""

    name = "flow"

    def __init__(self, flow: Flow, options: Options, sizes: InputSpec) -> None:
        super().__init__()
        self.flow, self.options, self.sizes = flow, options, sizes

    def sample_noise(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        device, side = generator.device, self.sizes.resolution
        drawn = {"eps": torch.randn(count, 3, side, side, generator=generator, device=device),
                 "times": torch.sigmoid(torch.randn(count, generator=generator, device=device))}
        if self.sizes.audio:
            drawn |= audio_noise(count, self.sizes.audio, generator, self.options.embedding_noise,
                                 self.options.audio_dropout)
            drawn["heard"] = (torch.rand(count, 1, generator=generator, device=device) >= self.options.condition_dropout).float()
        return drawn

    def forward(self, batch: Any, noise: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        condition = None
        if self.sizes.audio:
            condition = self.flow.embed_audio(batch.audio, noise) * noise["heard"]
        loss = errors(self.flow, to_minus_one_one(batch.cover), noise, condition).mean()
        return loss, {"flow": loss.detach()}


def errors(flow: Flow, covers: Tensor, noise: dict[str, Tensor], condition: Tensor | None) -> Tensor:
    """Mean squared errors ``[B]`` of the velocity at the times and noises given."""
    times, eps = noise["times"], noise["eps"]
    velocity = flow(torch.lerp(covers, eps, times[:, None, None, None]), times, condition)
    return (velocity - (eps - covers)).square().flatten(1).mean(1)


def heun(velocity: Any, images: Tensor, steps: int) -> Tensor:
    """Integrates dx/dt = velocity(x, t) from noise at t = 1 to covers at t = 0 in equal steps; the last is Euler's.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1.
    """
    for step in range(steps):
        now, then = 1 - step / steps, 1 - (step + 1) / steps
        slope = velocity(images, now)
        ahead = images + (then - now) * slope
        if step < steps - 1:
            ahead = images + (then - now) * (slope + velocity(ahead, then)) / 2
        images = ahead
    return images


def build(options: Options, sizes: InputSpec) -> Model:
    """With audio where there is some, else without."""
    check_resolution(sizes.resolution)
    widths, heard = [options.width * multiple for multiple in options.multiples], options.attention
    if (not 0 <= heard <= len(widths) or any(width % GROUPS for width in widths) or options.stem not in (1, 2, 4)
            or any(width % HEAD for width in widths[len(widths) - heard:])):
        raise ValueError(f"--width {options.width} --multiples {options.multiples} --attention {heard} --stem "
                         f"{options.stem}: expected channels that {GROUPS} divides ({HEAD} where there is attention), "
                         f"attention at up to all {len(widths)} sides, and a stem of 1, 2 or 4")
    flow, side = Flow(options, sizes), sizes.resolution

    def sample(networks: dict[str, nn.Module], latents: Tensor, audio: Tensor | None) -> Tensor:
        network, count = networks["flow"], len(latents)
        condition = None if audio is None else network.embed_audio(audio)
        mixes = condition is not None and options.guidance not in (0.0, 1.0)
        if condition is not None and options.guidance == 0:
            condition = torch.zeros_like(condition)
        if mixes:
            condition = torch.cat([condition, torch.zeros_like(condition)])

        def velocity(images: Tensor, time: float) -> Tensor:
            inputs = images.repeat(2, 1, 1, 1) if mixes else images
            found = network(inputs, inputs.new_full((len(inputs),), time), condition)
            if not mixes:
                return found
            with_audio, without = found.split(count)
            return torch.lerp(without, with_audio, options.guidance)

        return heun(velocity, latents.view(count, 3, side, side), options.sampling_steps)

    def denoising_loss(networks: dict[str, nn.Module], batch: Any, noise: dict[str, Tensor]) -> Tensor:
        network = networks["flow"]
        return errors(network, to_minus_one_one(batch.cover), noise, network.embed_audio(batch.audio))

    return Model({"flow": flow}, [FlowMatchingPhase(flow, options, sizes)], ema_networks=("flow",), conditional=bool(sizes.audio),
                 latents=normal_latents(3 * side * side), sample=sample,
                 truncation=None,
                 denoising_loss=denoising_loss if sizes.audio else None)


FLOW = ModelSpec(
    "flow matching with classifier-free guidance (Lipman et al. 2023; Ho and Salimans 2022); needs the extra flow",
    Options, build,
    preset={"batch_size": 64, "lr": 1e-3, "betas": (0.9, 0.99), "order": "group", "album_subset": "generator",
            "steps": 100_000, "ema_halflife": 50_000.0, "lr_warmup": 10_000},
    demo={"mixed_precision": "bf16", "minutes": 20.0, "sample_every": 500, "save_every": 500})
