"""Training of the small networks that an evaluation needs, the same each time, and a cache of them on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from platformdirs import user_cache_path
from safetensors.torch import load as load_weights
from safetensors.torch import save as save_weights
from torch import Tensor, nn

from shard_tools.core.files import write_atomically
from shard_tools.core.locks import lock_folder
from shard_tools.shards.index import metadata_bytes

CACHE = "COVERGEN_READERS"  # environment: a folder for trained networks instead of the user's cache; none = no cache
VERSION = 1  # of the networks and of how they are trained: raise it whenever either changes
LOCK_PATIENCE = 3600.0  # seconds to wait for a process that trains the same
CHECKS = 15  # times that a network is judged on held-out data while it is trained
WARM_UP = 0.2  # share of the steps in which the learning rate rises


@contextlib.contextmanager
def repeatable(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of their own, and kernels that round the same each time; the caller's are as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with (torch.random.fork_rng(devices=devices),
          torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)):
        torch.manual_seed(seed)
        yield


def fit(network: nn.Module, loss: Callable[[], Tensor], score: Callable[[], float], *, steps: int, rate: float,
        decay: float, check_interrupt: Callable[[], Any]) -> float:
    """Trains a network and leaves it, in the mode of evaluation, with the weights of its best score, which it returns.

    AdamW under one cycle of learning rates (Smith and Topin 2018), ``rate`` at its highest; ``loss`` is that of the
    next batch, ``score`` on held-out data, higher is better.
    """
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=WARM_UP)
    best, weights = -torch.inf, None
    network.train()
    for step in range(1, steps + 1):
        check_interrupt()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            network.eval()
            with torch.no_grad():
                value = score()
            network.train()
            if weights is None or value > best:
                best, weights = value, {name: part.clone() for name, part in network.state_dict().items()}
    network.load_state_dict(weights)
    network.eval()
    return best


def hold_out(groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``[N]`` to train on, and those of an eighth of the albums to validate on; of one album all for both."""
    albums = np.random.default_rng(seed).permutation(np.unique(groups))
    held_out = np.isin(groups, albums[:-(-len(albums) // 8)])
    return (np.arange(len(groups)),) * 2 if held_out.all() else (np.flatnonzero(~held_out), np.flatnonzero(held_out))


def r2(estimates: Tensor, truth: Tensor, genres: Tensor | None = None) -> Tensor:
    """Coefficients of determination of estimates ``[N, A]``, float64 ``[A]``; 0 for what does not vary.

    In total, or with genres ``[N]`` within them: then their means are taken off both.
    """
    estimates, truth = estimates.double(), truth.double()
    centred = truth - truth.mean(0)
    if genres is not None:
        one_hot = nn.functional.one_hot(genres.unique(return_inverse=True)[1]).double()
        estimates, truth = (part - one_hot @ (one_hot.T @ part / one_hot.sum(0)[:, None])
                            for part in (estimates, truth))
        centred = truth
    variance = centred.square().sum(0)
    return torch.where(variance > 0, 1 - (estimates - truth).square().sum(0) / variance.clamp_min(1e-300), 0.0)


def cached_network(folder: str, name: str, made_of: dict[str, Any], empty: Callable[[dict[str, Any]], nn.Module],
                   train: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> tuple[nn.Module, dict[str, Any]]:
    """A trained network and its figures: from the cache, else trained now.

    The cache is ``readers`` in the user's cache folder, or what ``COVERGEN_READERS`` names. A network that was made of
    anything else than ``made_of`` is trained again; ``empty`` makes one for the weights, from the cached figures.
    """
    cache = os.environ.get(CACHE) or str(user_cache_path("covergen") / "readers")
    if cache == "none":
        return train()
    root, made_of = Path(cache) / folder, json.loads(json.dumps(made_of | {"version": VERSION}))
    weights, metadata = root / f"{name}.safetensors", root / f"{name}.json"
    with lock_folder(root, patience=LOCK_PATIENCE):  # who comes second finds what the first has trained
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):  # absent or damaged: train
            known, data = json.loads(metadata.read_bytes()), weights.read_bytes()
            if known["made_of"] == made_of and known.pop("sha256") == _digest(data, known):
                with torch.random.fork_rng(devices=[]):  # weights that are replaced take no one's random numbers
                    network = empty(known["figures"])
                network.load_state_dict(load_weights(data))
                return network.eval(), known["figures"]
        network, figures = train()
        data = save_weights({key: part.cpu().contiguous() for key, part in network.state_dict().items()})
        write_atomically(weights, data)
        known = {"made_of": made_of, "figures": figures}
        write_atomically(metadata, metadata_bytes(known | {"sha256": _digest(data, known)}))
    return network, figures


def _digest(weights: bytes, known: dict[str, Any]) -> str:
    return hashlib.sha256(weights + metadata_bytes(known)).hexdigest()
