"""The decoders of covers: the same pixels from both, into the memory that is given, and errors for what is none."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from covergen.data import decoding
from covergen.data.decoding import BLOCK, JpegBatchDecoder


def jpeg(mode: str, side: int = 32, seed: int = 0, **options: object) -> bytearray:
    noise = np.random.default_rng(seed).integers(0, 255, (side // 8, side // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((side, side)).convert(mode).save(file, "JPEG", **options)
    return bytearray(file.getvalue())


@pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 60, "subsampling": 0}, {"progressive": True},
                                     {"mode": "L"}], ids=str)
def test_both_decoders_give_the_same_pixels(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    data = jpeg(**({"mode": "RGB"} | options))
    fast, into = decoding.decode(data), np.empty((32, 32, 3), np.uint8)
    assert decoding.decode(memoryview(data), into) is not None and (into == fast).all()
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    general = decoding.decode(data)
    assert general.shape == (32, 32, 3) and general.std() > 10 and (general == fast).all()
    into[:] = 0
    decoding.decode(data, into)
    assert (into == fast).all()


@pytest.mark.parametrize("fast", [True, False])
def test_other_sizes_and_damage_are_refused(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(decoding, "decode_jpeg", None)
    for side in (24, 40):
        with pytest.raises(ValueError, match=f"a cover of {side} x {side}, expected 32 x 32"):
            decoding.decode(jpeg("RGB", side), np.empty((32, 32, 3), np.uint8))
    for damaged in (bytearray(b"no picture"), jpeg("RGB")[:100]):
        with pytest.raises(RuntimeError):
            decoding.decode(damaged)


@pytest.mark.parametrize("count", [BLOCK - 1, BLOCK, 2 * BLOCK + 1])
def test_pictures_come_into_their_slots_in_any_layout(count: int) -> None:
    slots, data = np.random.default_rng(1).permutation(count + 2)[:count], [jpeg("RGB", seed=i) for i in range(count)]
    for batch in (torch.zeros(count + 2, 3, 32, 32, dtype=torch.uint8),
                  torch.zeros(count + 2, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)):
        decoder = JpegBatchDecoder(batch)
        for slot, one in zip(slots.tolist(), data, strict=True):
            decoder.decode(one, slot)
            if slot == slots[1]:  # what can't be decoded fills no slot
                with pytest.raises(RuntimeError):
                    decoder.decode(bytearray(b"no picture"), count)
        decoder.flush()
        for slot, one in zip(slots.tolist(), data, strict=True):
            assert (batch[slot].numpy() == decoding.decode(one).transpose(2, 0, 1)).all()
