"""The record of a run: its log, sample grids as PNG files, and a Weights & Biases run, which may fail without harm."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from covergen.inference import images as pictures
from covergen.runs.config import read_run
from covergen.runs.log import cut_log, log_line, log_path, read_log
from shard_tools.core.files import write_atomically

TIMEOUT = 60  # seconds that W&B may take to begin and to finish
SECTIONS = ("loss", "val", "samples", "speed", "optim", "eval", "test")  # of names of metrics, "section/name"


class Tracker:
    """The record of one run, from a step on."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        """Opens the record at the step that a run goes on from; ``config``: all options."""
        self.folder = folder
        self.sent = cut_log(log_path(folder), step)  # W&B had these steps before; its steps must never go back
        self.log_file = open(log_path(folder), "a")
        self.wandb = _open_wandb(folder, config) if config["tracker"] == "wandb" else None

    def log(self, step: int, images: int, row: dict[str, float]) -> None:
        """One line of the log: ``step``, ``images`` seen by then, and the row's ``section/name`` scalars."""
        self.log_file.write(log_line({"step": step, "images": images, **row}))
        self.log_file.flush()
        self._send(step, lambda: {"images": images, **row})

    def grid(self, step: int, images: int, name: str, covers: Tensor, labels: Sequence[str] = ()) -> None:
        """Saves covers ``[N, 3, R, R]`` in [0, 1] as ``grids/step_<step>_<name>.png`` and shows them on W&B.

        ``labels``: what each row of eight shows; on the picture and, once each, in its caption.
        """
        picture = pictures.grid(covers, labels=labels)
        pictures.save(self.folder / "grids" / f"step_{step:08d}_{name}.png", picture)

        def row() -> dict[str, Any]:
            import wandb
            caption = ", rows: ".join([f"step {step}", *filter(None, [", ".join(dict.fromkeys(labels))])])
            return {"images": images, f"samples/{name}": wandb.Image(picture, caption=caption)}
        self._send(step, row)

    def table(self, step: int, images: int, columns: list[str], rows: list[list[Any]]) -> None:
        """Shows a table of songs, whose pictures are Pillow's, on W&B."""
        self._send(step, lambda: {"images": images, "eval/songs": _table(columns, rows)})

    def finish(self) -> None:
        """Closes the log and the W&B run."""
        self.log_file.close()
        self._guard(lambda run: run.finish())

    def _send(self, step: int, row: Callable[[], dict[str, Any]]) -> None:
        if step > self.sent:
            self._guard(lambda run: run.log(row(), step=step))

    def _guard(self, call: Callable[[Any], Any]) -> None:
        if self.wandb is None:
            return
        try:
            call(self.wandb)
        except Exception as error:  # boundary: whatever W&B raises must not stop training
            warnings.warn(f"W&B failed ({type(error).__name__}: {error}); going on without it", stacklevel=2)
            self.wandb = None


def show(folder: Path, name: str, path: Path) -> None:
    """Shows a picture or GIF on the W&B run of a run folder, as ``analysis/<name>``; a failure is a warning."""
    def row() -> dict[str, Any]:
        import wandb
        media = wandb.Video(str(path), format="gif") if path.suffix == ".gif" else wandb.Image(str(path))
        return {f"analysis/{name}": media}
    _log_afterwards(folder, row)


def show_table(folder: Path, step: int, scalars: dict[str, float], columns: list[str], rows: list[list[Any]]) -> None:
    """The same for scalars and a table (its pictures are Pillow's) of a step, at the images seen by then."""
    def row() -> dict[str, Any]:
        logged = read_log(folder) if log_path(folder).is_file() else []
        images = max((one["images"] for one in logged if one["step"] <= step), default=0)
        return {"images": images, **scalars, "test/songs": _table(columns, rows)}
    _log_afterwards(folder, row)


def _log_afterwards(folder: Path, row: Callable[[], dict[str, Any]]) -> None:
    run = _open_wandb(folder, read_run(folder).flat())
    if run is None:
        return
    try:
        run.log(row())
        run.finish()
    except Exception as error:  # boundary: what is shown is on disk already
        warnings.warn(f"W&B failed ({type(error).__name__}: {error})", stacklevel=3)


def _table(columns: list[str], rows: list[list[Any]]) -> Any:
    import wandb
    from PIL import Image
    return wandb.Table(columns=columns, data=[[wandb.Image(cell) if isinstance(cell, Image.Image) else cell
                                               for cell in row] for row in rows])


def _open_wandb(folder: Path, config: dict[str, Any]) -> Any:
    """The W&B run of a run folder: online where an API key is configured (which is never asked for), else offline."""
    os.environ.setdefault("WANDB_SILENT", "true")
    mode = os.environ.get("WANDB_MODE")
    try:
        import wandb
        try:
            mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
            run = _start(folder, config, mode)
        except Exception as error:  # boundary: no network, a refused key
            if mode in ("offline", "disabled"):
                raise
            warnings.warn(f"W&B can't be reached ({type(error).__name__}: {error}); going on offline", stacklevel=2)
            wandb.teardown()  # its service holds the run's id
            run = _start(folder, config, mode := "offline")
    except Exception as error:  # boundary: no disk for it, a broken installation
        warnings.warn(f"W&B can't be used ({type(error).__name__}: {error}); going on without it", stacklevel=2)
        return None
    if mode == "online":
        print(f"W&B: {run.url}", flush=True)
    elif mode == "offline":
        print(f"W&B: offline, run {run.id}; to send it: wandb sync {folder}/wandb/offline-run-*", flush=True)
    return run


def _start(folder: Path, config: dict[str, Any], mode: str) -> Any:
    import wandb
    run_id = folder / "wandb" / "run_id"
    if not run_id.is_file():
        run_id.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(run_id, secrets.token_hex(4).encode())
    run = wandb.init(project=config["project"], name=config["name"], id=run_id.read_text(), dir=str(folder),
                     config=config, mode=mode, resume="allow",
                     settings=wandb.Settings(init_timeout=TIMEOUT, finish_timeout=TIMEOUT))
    run.define_metric("images")
    for section in SECTIONS:
        run.define_metric(f"{section}/*", step_metric="images")
    return run
