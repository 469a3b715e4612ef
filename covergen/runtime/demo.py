"""The demo world where no shards are given: a tier in, the folder of its packed shards out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from platformdirs import user_cache_path

from covergen.runtime.folder import lock


def demo_shards(say: Callable[[str], None], tier: str = "toy") -> str:
    """The packed demo world of a tier in the user's cache folder, made there once.

    Every process calls this: the first one of a machine makes it, the others wait for it.
    """
    from shard_tools.demo import TIERS, VERSION, make
    from shard_tools.pack import pack
    root = user_cache_path("covergen") / f"demo-{tier}-{VERSION}"
    with lock(root, patience=3600):
        packed = (root / "shards" / "train.index.json").is_file()
        if not packed:
            say(f"No --shards given: making the {tier} demo world ({TIERS[tier]['resolution']} px, known audio -> "
                f"cover attributes) in {root}")
        if not packed or not (root / "shards" / "attributes.npz").is_file():  # packed before it came with the shards
            make(root / "folders", tier=tier)
            with contextlib.redirect_stdout(None):  # its report is about a command that nobody typed
                pack(str(root / "folders"), str(root / "shards"))
    return str(root / "shards")
