"""Schedules as pure functions of the images seen: learning rates, penalty weights, decays of averages."""

from __future__ import annotations

import math

RAMP = 0.05  # the half-life of an average is at most this share of the images seen


def half_cosine(images: int, first: float, last: float, over: int) -> float:
    """From ``first`` along half a cosine to ``last``, reached after ``over`` images; always ``first`` if that is 0.

    Source: Loshchilov and Hutter 2017, "SGDR", eq. 5, without restarts.
    """
    if not over:
        return first
    return last + (first - last) * (1 + math.cos(math.pi * min(1.0, images / over))) / 2


def learning_rate(images: int, peak: float, warmup: int, last: float, over: int) -> float:
    """A learning rate that rises linearly for ``warmup`` images, then falls by ``half_cosine`` to ``last`` times it."""
    if images < warmup:
        return peak * images / warmup
    return peak * half_cosine(images - warmup, 1.0, last, over)


def decay_of_average(images: int, step: int, half_life: float) -> float:
    """The decay of a moving average for a step of ``step`` images, with a half-life in images.

    The half-life is at most a twentieth of the images seen. Source: Karras et al. 2022, "Elucidating the Design Space
    of Diffusion-Based Generative Models", whose averages have half-lives in images.
    """
    return 0.5 ** (step / max(1e-9, min(half_life, RAMP * images)))
