"""Extractor ``clap``: the embedding of an audio file by LAION's CLAP, transformers' ``ClapModel`` on the CPU.

CLAP takes windows of 10 s, mono, 48 kHz. It was trained on directions: its loss compares embeddings of length 1 by
their cosine, and their length before that means nothing. So every window counts with length 1, and the mean of the
windows is brought back to length 1: it is the direction whose cosines to all windows sum highest, and can stand where
the embedding of a text could. Source: Wu et al. 2023, "Large-scale contrastive language-audio pretraining".
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.core.errors import BadFileError
from shard_tools.core.extras import need
from shard_tools.dataset.schema import Schema
from shard_tools.extractors import Extractor
from shard_tools.extractors.audio import check_length, pieces

VERSION = 1


def clap(model: str = "", weights_sha256: str = "") -> Extractor:
    """The extractor of one pretrained model, a name on the hub or a folder of ``save_pretrained``.

    ValueError if its weights have another hash than ``weights_sha256`` ("" = any).
    """
    need("clap", "torch", "transformers", "av")
    if not model:
        raise ValueError("the extractor clap needs --model: a name on the hub (laion/larger_clap_music) or a folder")
    if Path(model).is_dir():
        model = str(Path(model).resolve())
    network, preprocessor = _pretrained(model)
    found = _sha256(network)
    if weights_sha256 not in ("", found):
        raise ValueError(f"the weights of {model} have SHA-256 {found[:12]}..., expected {weights_sha256[:12]}...: "
                         "it is not the model that the vectors were made with")
    names = tuple(f"clap.{i:03d}" for i in range(network.config.projection_dim))
    return Extractor(Schema("clap", VERSION, names, {"model": model, "weights_sha256": found}),
                     of_audio=partial(_of_audio, network, preprocessor))


def _pretrained(model: str) -> tuple[Any, Any]:
    """The network, in evaluation, and the preprocessor of its input."""
    from transformers import AutoConfig, ClapFeatureExtractor, ClapModel
    from transformers.utils import logging
    if multiprocessing.parent_process():  # one bar for the download, not one a worker
        logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(model)
        if config.model_type != "clap":
            raise ValueError(f"it is a model of type {config.model_type!r}")
        network, metadata = ClapModel.from_pretrained(model, output_loading_info=True)
        if missing := [name for name in metadata["missing_keys"] if name.startswith("audio_")]:
            raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
        preprocessor = ClapFeatureExtractor.from_pretrained(model)
    except Exception as error:  # the boundary to transformers and to files that anybody may have made
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--model {model} can't be used ({reason:.300}); expected the name of a CLAP model on the hub "
                         "or a folder with its weights, config.json and preprocessor_config.json") from None
    return network.float().eval().requires_grad_(False), preprocessor


def _sha256(network: Any) -> str:
    """Of the weights that embed audio, by name: the same whatever files they lie in."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if name.startswith("audio_"):
            digest.update(f"{name} {list(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _of_audio(network: Any, preprocessor: Any, path: Path, start: float = 0.0,
              seconds: float | None = None) -> np.ndarray:
    import torch
    total = torch.zeros(network.config.projection_dim)
    with torch.inference_mode():
        rate = preprocessor.sampling_rate
        for window in _windows(path, start, seconds, rate, preprocessor.nb_max_samples):
            features = preprocessor(window, sampling_rate=rate, return_tensors="pt")["input_features"].float()
            # "longer than 10 s" is never true here; the feature extractor says so of one window at random.
            found = network.get_audio_features(features, is_longer=torch.zeros(1, 1, dtype=torch.bool))
            found = getattr(found, "pooler_output", found)  # transformers 4 gives the embedding itself
            total += torch.nn.functional.normalize(found[0], dim=-1)
        vector = torch.nn.functional.normalize(total, dim=-1).numpy()
    if not np.isfinite(vector).all():
        raise BadFileError("not finite", "the model gives no numbers for it")
    return vector


def _windows(path: Path, start: float, seconds: float | None, rate: int, size: int) -> Iterator[np.ndarray]:
    """Yields windows of ``size`` samples; the last, shorter one only where it is half of that, or the only one."""
    waiting, count, first = [], 0, True
    for piece in pieces(path, start, seconds, rate):
        waiting.append(piece)
        count += len(piece)
        while count >= size:
            whole = np.concatenate(waiting)
            yield whole[:size]
            waiting, count, first = [whole[size:]], count - size, False
    if first:
        check_length(count / rate)
    if first or 2 * count >= size:
        yield np.concatenate(waiting)
