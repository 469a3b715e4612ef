"""The table of models: name -> the file that holds it, imported only when asked for.

Such a file offers ``Options`` (a frozen dataclass: what can be set about the model), ``PRESET`` (its values for options
of training, as the source of the model used them) and ``build(options, resolution) -> Model``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

MODELS = {
    "wgan_gp": "covergen.models.wgan_gp",
}


def load(name: str) -> ModuleType:
    """The module of a model in the table; KeyError for any other name."""
    return importlib.import_module(MODELS[name])
