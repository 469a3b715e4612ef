"""The table of models: name -> the file that holds it and its ``ModelSpec`` there, imported only when asked for."""

from __future__ import annotations

import importlib

from covergen.models.base import ModelSpec

MODELS = {
    "ae_resize": "covergen.models.autoencoder:RESIZE",
    "ae_transpose": "covergen.models.autoencoder:TRANSPOSE",
    "vae": "covergen.models.vae:VAE",
    "cond_vae": "covergen.models.vae:COND_VAE",
    "dcgan": "covergen.models.dcgan:DCGAN",
    "lsgan": "covergen.models.lsgan:LSGAN",
    "wgan_gp": "covergen.models.wgan_gp:WGAN_GP",
    "cond_lsgan": "covergen.models.lsgan:COND_LSGAN",
    "cond_wgan_gp": "covergen.models.wgan_gp:COND_WGAN_GP",
    "r3gan": "covergen.models.r3gan:R3GAN",
    "flow": "covergen.models.flow:FLOW",
    "contrast": "covergen.models.contrast:CONTRAST",
}


def load(name: str) -> ModelSpec:
    """The spec of a model in the table; KeyError for any other name."""
    module, _, attribute = MODELS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
