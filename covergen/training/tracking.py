"""What a run says: scalars and sample grids in, ``log.jsonl``, PNG files and a Weights & Biases run out.

The log file and the grids are the record; W&B is a view of them that may fail without harm. Only rank 0 tracks.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from covergen.inference import images as pictures
from covergen.runs.log import cut_log
from shard_tools.core.files import write_atomically


class Tracker:
    """The record of one run."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        """Opens the record at ``step``, the step a resumed run goes on from (0 for a new one)."""
        self.folder = folder
        self.sent = cut_log(folder / "log.jsonl", step)  # W&B had these steps before; its steps must never go back
        self.log_file = open(folder / "log.jsonl", "a")
        self.wandb = _open_wandb(folder, config) if config["tracker"] == "wandb" else None

    def log(self, step: int, images: int, row: dict[str, float]) -> None:
        """One line of the log: ``step``, ``images`` seen by then, and the row's ``section/name`` scalars.

        A gradient norm that overflowed in fp16 is null, since JSON has no infinity.
        """
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.log_file.write(json.dumps({"step": step, "images": images, **row}) + "\n")
        self.log_file.flush()
        self._send({"images": images, **row}, step)

    def sync(self) -> None:
        """Makes sure that the log is on disk: a checkpoint must never know more than the log."""
        os.fsync(self.log_file.fileno())

    def grid(self, step: int, images: int, name: str, covers: Tensor, labels: Sequence[str] = ()) -> None:
        """Saves covers ``[N, 3, R, R]`` in [0, 1] as ``grids/step_<step>_<name>.png`` and shows them on W&B.

        ``labels``: what each row of eight shows; on the picture and, once each, in its caption.
        """
        picture = pictures.grid(covers, labels=labels)
        pictures.save(self.folder / "grids" / f"step_{step:08d}_{name}.png", picture)
        if self.wandb:
            import wandb
            caption = ", rows: ".join([f"step {step}", *filter(None, [", ".join(dict.fromkeys(labels))])])
            self._send({"images": images, f"samples/{name}": wandb.Image(picture, caption=caption)}, step)

    def table(self, step: int, images: int, columns: list[str], rows: list[list[Any]]) -> None:
        """Shows a table of songs, whose pictures are Pillow's, on W&B."""
        if step > self.sent:
            self._guard(lambda run: run.log({"images": images, "eval/songs": table_of(columns, rows)}, step=step))

    def finish(self) -> None:
        """Closes the log and the W&B run."""
        self.log_file.close()
        self._guard(lambda run: run.finish())

    def _send(self, row: dict[str, Any], step: int) -> None:
        if step > self.sent:
            self._guard(lambda run: run.log(row, step=step))

    def _guard(self, call: Any) -> None:
        if self.wandb is None:
            return
        try:
            call(self.wandb)
        except Exception as error:  # boundary: whatever W&B raises must not stop training
            warnings.warn(f"W&B failed ({type(error).__name__}: {error}); going on without it", stacklevel=2)
            self.wandb = None


def show(folder: Path, config: dict[str, Any], name: str, path: Path) -> None:
    """Shows a picture or GIF on the W&B run of a run folder, as ``analysis/<name>``; a failure is a warning."""
    def row() -> dict[str, Any]:
        import wandb
        media = wandb.Video(str(path), format="gif") if path.suffix == ".gif" else wandb.Image(str(path))
        return {f"analysis/{name}": media}
    _log_afterwards(folder, config, row)


def show_table(folder: Path, config: dict[str, Any], step: int, scalars: dict[str, float], columns: list[str],
               rows: list[list[Any]]) -> None:
    """Shows scalars of a checkpoint and a table (its pictures are Pillow's) on the W&B run of a run folder.

    They lie at the images that the run had seen by that step. A failure is a warning.
    """
    _log_afterwards(folder, config, lambda: {"images": _images_at(folder, step), **scalars,
                                             "test/songs": table_of(columns, rows)})


def _log_afterwards(folder: Path, config: dict[str, Any], row: Callable[[], dict[str, Any]]) -> None:
    run = _open_wandb(folder, config)
    if run is None:
        return
    try:
        run.log(row())
        run.finish()
    except Exception as error:  # boundary: what is shown is on disk already
        warnings.warn(f"W&B failed ({type(error).__name__}: {error})", stacklevel=3)


def _images_at(folder: Path, step: int) -> int:
    """Images seen by a step, as the log has it."""
    lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").is_file() else []
    return max((row["images"] for row in map(json.loads, lines) if row["step"] <= step), default=0)


def table_of(columns: list[str], rows: list[list[Any]]) -> Any:
    """A table for W&B whose pictures are Pillow's."""
    import wandb
    from PIL import Image
    return wandb.Table(columns=columns, data=[[wandb.Image(cell) if isinstance(cell, Image.Image) else cell
                                               for cell in row] for row in rows])


def _run_id(folder: Path) -> str:
    path = folder / "wandb" / "run_id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, secrets.token_hex(4).encode())
    return path.read_text()


def _open_wandb(folder: Path, config: dict[str, Any]) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(wandb) else "offline")
        try:
            run = _start(wandb, folder, config, mode)
        except Exception as error:  # boundary: no network, a refused key
            if mode != "online":
                raise
            warnings.warn(f"W&B can't be reached ({type(error).__name__}: {error}); going on offline", stacklevel=2)
            mode = "offline"
            wandb.teardown()  # its service holds the run's id
            run = _start(wandb, folder, config, mode)
    except Exception as error:  # boundary: no disk for it, a broken installation
        warnings.warn(f"W&B can't be used ({type(error).__name__}: {error}); going on without it", stacklevel=2)
        return None
    if mode == "online":
        print(f"W&B: {run.url}", flush=True)
    elif mode == "offline":
        print(f"W&B: offline, run {run.id}; to send it: wandb sync {folder}/wandb/offline-run-*", flush=True)
    return run


def _start(wandb: Any, folder: Path, config: dict[str, Any], mode: str) -> Any:
    settings = {"init_timeout": 60}
    if "finish_timeout" in wandb.Settings.model_fields:  # of newer versions: a run must end without a network too
        settings["finish_timeout"] = 60
    run = wandb.init(project=config["project"], name=config["name"], id=_run_id(folder), dir=str(folder), config=config,
                     mode=mode, resume="allow", settings=wandb.Settings(**settings))
    run.define_metric("images")
    for section in ("loss", "val", "samples", "speed", "optim", "eval", "test"):
        run.define_metric(f"{section}/*", step_metric="images")
    return run


def _has_key(wandb: Any) -> bool:
    return bool(os.environ.get("WANDB_API_KEY") or wandb.setup().settings.api_key or _netrc_has(wandb))


def _netrc_has(wandb: Any) -> bool:
    import netrc
    from urllib.parse import urlsplit
    host = urlsplit(wandb.setup().settings.base_url).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
