"""Album covers from the music itself: models, distributed training, sampling and evaluation."""

from __future__ import annotations

import os

# OpenMP threads that wait for each other spin on their cores for milliseconds. Where anything else wants those cores,
# the ones that are waited for don't get them: measured on 2 cores with one busy neighbour, training fell from 490 to 11
# images/s; with this shorter spin it has 150 to 290, and 470 alone. libgomp reads it once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
