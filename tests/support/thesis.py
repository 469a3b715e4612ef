"""The thesis's own networks, with its names, and checkpoints in its format with random contents, for tests.

Written from the metadata of J. Bustos 2020, "Towards album artwork generation based on audio"; all for 128 px.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AUDIO = 1160


def add(network: nn.Module, **modules: nn.Module) -> None:
    for name, module in modules.items():
        network.add_module(name, module)


class Encoder(nn.Module):
    """What the autoencoders begin with: four convolutions and three norms."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, stride, 1), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, stride, 1), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 64, 3, stride, 1), nn.BatchNorm2d(64)
        self.conv4 = nn.Conv2d(64, 128, 3, 1, 1)


def grow(size: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.ReflectionPad2d(1), nn.Conv2d(size, out, 3))


class Resize(Encoder):
    """``ae_reconv``; ``norm_last`` is the order of the VAE."""

    def __init__(self, norm_last: bool = False) -> None:
        super().__init__(stride=2)
        self.norm_last = norm_last
        self.reconv1, self.bn4 = grow(128, 64), nn.BatchNorm2d(64)
        self.reconv2, self.bn5 = grow(64, 64), nn.BatchNorm2d(64)
        self.reconv3, self.bn6 = grow(64, 32), nn.BatchNorm2d(32)
        self.reconv4 = nn.Conv2d(32, 3, 3, 1, 1)

    def block(self, conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(F.leaky_relu(conv(x), 0.01)) if self.norm_last else F.leaky_relu(norm(conv(x)), 0.01)

    def encode(self, x: Tensor) -> Tensor:
        x = self.block(self.conv1, self.bn1, x)
        x = self.block(self.conv2, self.bn2, x)
        x = self.block(self.conv3, self.bn3, x)
        return F.leaky_relu(self.conv4(x), 0.01)

    def decode(self, x: Tensor) -> Tensor:
        x = self.block(self.reconv1, self.bn4, x)
        x = self.block(self.reconv2, self.bn5, x)
        x = self.block(self.reconv3, self.bn6, x)
        return torch.sigmoid(self.reconv4(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class Vae(Resize):
    """``vae``; it reconstructs from the means here."""

    def __init__(self) -> None:
        super().__init__(norm_last=True)
        self.f1, self.f2 = nn.Linear(128 * 16 * 16, 500), nn.Linear(128 * 16 * 16, 500)
        self.d1 = nn.Linear(500, 128 * 16 * 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.d1(self.f1(self.encode(x).view(-1, 128 * 16 * 16))).view(-1, 128, 16, 16))


class Transpose(Encoder):
    """``ae_tconv``."""

    def __init__(self) -> None:
        super().__init__(stride=1)
        self.tconv1, self.bn4 = nn.ConvTranspose2d(128, 64, 3, 1, 1), nn.BatchNorm2d(64)
        self.tconv2, self.bn5 = nn.ConvTranspose2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64)
        self.tconv3, self.bn6 = nn.ConvTranspose2d(64, 32, 3, 1, 1), nn.BatchNorm2d(32)
        self.tconv4 = nn.ConvTranspose2d(32, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, first = F.max_pool2d(self.conv1(x), 2, return_indices=True)
        x, second = F.max_pool2d(self.conv2(F.leaky_relu(self.bn1(x))), 2, return_indices=True)
        x, third = F.max_pool2d(self.conv3(F.leaky_relu(self.bn2(x))), 2, return_indices=True)
        x = F.leaky_relu(self.conv4(F.leaky_relu(self.bn3(x))))
        x = F.leaky_relu(self.bn4(F.max_unpool2d(self.tconv1(x), third, 2)))
        x = F.leaky_relu(self.bn5(F.max_unpool2d(self.tconv2(x), second, 2)))
        x = F.leaky_relu(self.bn6(F.max_unpool2d(self.tconv3(x), first, 2)))
        return torch.sigmoid(self.tconv4(x))


class DcganGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers, size = [], 100
        for out, stride, pad in ((512, 1, 0), (256, 2, 1), (128, 2, 1), (64, 2, 1), (64, 2, 1)):
            layers += [nn.ConvTranspose2d(size, out, 4, stride, pad, bias=False), nn.BatchNorm2d(out), nn.ReLU(True)]
            size = out
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.view(-1, 100, 1, 1))


class DcganDiscriminator(nn.Module):
    """It ends in a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True),
            nn.Conv2d(64, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64),
            nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2, True),
            nn.Conv2d(128, 256, 4, 2, 1, bias=False), nn.BatchNorm2d(256), nn.LeakyReLU(0.2, True),
            nn.Conv2d(256, 512, 4, 2, 1, bias=False), nn.BatchNorm2d(512), nn.LeakyReLU(0.2, True),
            nn.Conv2d(512, 1, 4, 1, 0, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).view(-1)


class Generator(nn.Module):
    """Of lsgan and wgan_gp: a linear layer, then transposed convolutions ``(width, kernel, stride)``."""

    def __init__(self, latent: int, first: int, layers: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.first, self.last = first, len(layers) + 1
        self.lin, self.bn = nn.Linear(latent, first * 4 * 4), nn.BatchNorm2d(first)
        size = first
        for n, (out, kernel, stride) in enumerate(layers, 1):
            add(self, **{f"tconv{n}": nn.ConvTranspose2d(size, out, kernel, stride, 1), f"bn{n}": nn.BatchNorm2d(out)})
            size = out
        add(self, **{f"tconv{self.last}": nn.ConvTranspose2d(size, 3, 4, 2, 1)})

    def forward(self, z: Tensor) -> Tensor:
        x = self.bn(self.lin(z).view(-1, self.first, 4, 4))
        for n in range(1, self.last):
            x = F.relu(getattr(self, f"bn{n}")(getattr(self, f"tconv{n}")(x)))
        return torch.tanh(getattr(self, f"tconv{self.last}")(x))


class Discriminator(nn.Module):
    """Of all GANs but dcgan; norm: ``bn`` or ``in``."""

    def __init__(self, widths: list[int], norm: str) -> None:
        super().__init__()
        self.norm, size = norm, 3
        for n, out in enumerate(widths, 1):
            layer = nn.BatchNorm2d(out) if norm == "bn" else nn.InstanceNorm2d(out, affine=True)
            add(self, **{f"conv{n}": nn.Conv2d(size, out, 4, 2, 1, bias=False), f"{norm}{n}": layer})
            size = out
        self.lin = nn.Linear(size * 4 * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for n in range(1, 6):
            x = F.leaky_relu(getattr(self, f"{self.norm}{n}")(getattr(self, f"conv{n}")(x)), 0.2)
        return self.lin(x.view(len(x), -1)).view(-1)


class ConditionalGenerator(nn.Module):
    """FiLM at every norm, where beta multiplies and gamma adds."""

    widths = (512, 256, 256, 128, 64)

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.lin, self.bn = nn.Linear(latent, 512 * 4 * 4), nn.BatchNorm2d(512, affine=False)
        for n in range(1, 5):
            add(self, **{f"tconv{n}": nn.ConvTranspose2d(self.widths[n - 1], self.widths[n], 4, 2, 1),
                         f"bn{n}": nn.BatchNorm2d(self.widths[n], affine=False)})
        self.tconv5 = nn.ConvTranspose2d(64, 3, 4, 2, 1)
        self.mlp = nn.Sequential(nn.Linear(AUDIO, 944), nn.BatchNorm1d(944), nn.LeakyReLU(0.2),
                                 nn.Linear(944, 728), nn.BatchNorm1d(728), nn.LeakyReLU(0.2),
                                 nn.Linear(728, 512), nn.BatchNorm1d(512))
        for kind in ("gamma", "beta"):
            for n, width in enumerate(self.widths, 1):
                half = (512 + width) // 2
                layers = [nn.Linear(512, half), nn.BatchNorm1d(half), nn.LeakyReLU(0.2), nn.Linear(half, width),
                          nn.BatchNorm1d(width)]
                add(self, **{f"a{n}_{kind}": nn.Sequential(*layers)})

    def forward(self, z: Tensor, audio: Tensor) -> Tensor:
        features, x = self.mlp(audio), self.lin(z).view(-1, 512, 4, 4)
        for n, norm in enumerate((self.bn, self.bn1, self.bn2, self.bn3, self.bn4), 1):
            x = getattr(self, f"tconv{n - 1}")(x) if n > 1 else x
            gamma, beta = (getattr(self, f"a{n}_{kind}")(features)[:, :, None, None] for kind in ("gamma", "beta"))
            x = F.relu(beta * norm(x) + gamma)
        return torch.tanh(self.tconv5(x))


LSGAN = [(256, 4, 2), (256, 4, 2), (128, 4, 2), (64, 4, 2)]
WGAN = [(256, 4, 2), (256, 3, 1), (256, 4, 2), (256, 3, 1), (128, 4, 2), (64, 4, 2)]
# model -> the name of its file and its networks, generators first, with the entries of their weights
MODELS: dict[str, tuple[str, dict[str, Callable[[], nn.Module]]]] = {
    "ae_resize": ("ae_reconv_19.pth", {"model_state_dict": Resize}),
    "ae_transpose": ("ae_tconv_19.pth", {"model_state_dict": Transpose}),
    "vae": ("vae.pth", {"model_state_dict": Vae}),
    "dcgan": ("dcgan_149_43050.pt", {"model_g": DcganGenerator, "model_d": DcganDiscriminator}),
    "lsgan": ("lsgan.pt", {"model_g": lambda: Generator(1024, 512, LSGAN),
                           "model_d": lambda: Discriminator([32, 64, 128, 128, 256], "bn")}),
    "wgan_gp": ("wgan_gp.pt", {"model_g": lambda: Generator(100, 256, WGAN),
                               "model_d": lambda: Discriminator([64, 128, 256, 256, 512], "in")}),
    "cond_lsgan": ("clsgan.pt", {"model_g": lambda: ConditionalGenerator(1024),
                                 "model_d": lambda: Discriminator([64, 128, 256, 256, 512], "bn")}),
    "cond_wgan_gp": ("cwgan_gp.pt", {"model_g": lambda: ConditionalGenerator(100),
                                     "model_d": lambda: Discriminator([64, 128, 256, 256, 512], "in")}),
}
ADAM = {"ae_resize": {"lr": 1e-3, "weight_decay": 1e-5}, "ae_transpose": {"lr": 1e-3, "weight_decay": 1e-5},
        "vae": {"lr": 1e-4}, "dcgan": {"lr": 2e-4, "betas": (0.5, 0.99)}, "lsgan": {"lr": 2e-4, "betas": (0.5, 0.999)},
        "wgan_gp": {"lr": 1e-4, "betas": (0.0, 0.999)}, "cond_lsgan": {"lr": 2e-4, "betas": (0.5, 0.999)},
        "cond_wgan_gp": {"lr": 5e-6, "betas": (0.5, 0.999)}}


def networks(model: str, seed: int = 0) -> dict[str, nn.Module]:
    """The networks of a model by entry, in evaluation mode; weights keep signals alive, norms are random throughout."""
    torch.manual_seed(seed)
    made = {entry: make().eval() for entry, make in MODELS[model][1].items()}
    with torch.no_grad():
        for module in (module for network in made.values() for module in network.modules()):
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, 0.2, "fan_in" if isinstance(module, nn.Conv2d) else "fan_out")
            if getattr(module, "affine", False):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.0, 0.3)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.3, 2.0)
                module.num_batches_tracked.fill_(int(torch.randint(1, 1000, ())))
    return made


def stepped(model: str, network: nn.Module, steps: int) -> torch.optim.Adam:
    """The thesis's optimizer after random gradients, so that every parameter's moments differ; weights stay."""
    parameters = list(network.parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, **ADAM[model])
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
    return optimizer


def contents(model: str, made: dict[str, nn.Module], steps: int = 0, costs: int = 4) -> dict[str, Any]:
    """What the thesis saved of networks: after ``steps`` steps of Adam (none: states never stepped), and losses."""
    adams = {}
    for entry, network in made.items():
        adams[entry] = stepped(model, network, steps).state_dict()
        for state in adams[entry]["state"].values():
            state["step"] = int(state["step"])  # as PyTorch 1.6 had it
    weights = {entry: network.state_dict() for entry, network in made.items()}
    if "model_state_dict" in made:
        return {"epoch": 19, **weights, "optimizer_state_dict": adams["model_state_dict"],
                "cost_list_train": [torch.tensor(1.0 / (n + 1)) for n in range(costs)],
                "cost_list_val": [torch.tensor([1.5 / (n + 1)]) for n in range(costs)]}
    return {**weights, "epoch": 1, "optimizer_d": adams["model_d"], "optimizer_g": adams["model_g"],
            "cost_d": [torch.tensor(0.5 + n, requires_grad=True) for n in range(costs)],
            "cost_g": [torch.tensor([1.0 + n]) for n in range(costs)], "iter": costs}


def save(model: str, folder: Path, made: dict[str, nn.Module] | None = None, *, steps: int = 0, costs: int = 4,
         legacy: bool = False, **entries: Any) -> Path:
    """Writes a checkpoint under the thesis's name and returns where; ``entries`` replace some, None leaves one out."""
    whole = contents(model, made or networks(model), steps, costs) | entries
    path = folder / MODELS[model][0]
    torch.save({name: value for name, value in whole.items() if value is not None}, path,
               _use_new_zipfile_serialization=not legacy)
    return path
