"""Parts of the analyses that need no run: curves from logs, walks through noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from covergen.analyses import curves, interpolate, plots
from covergen.models.base import normal_latents


def write_log(folder: Path, lines: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("\n".join(lines))
    return folder


def test_curves_pass_over_missing_values_and_a_damaged_end(tmp_path: Path) -> None:
    rows = [{"step": step, "images": 10 * step, "loss/a": None if step % 3 == 0 else 1 / step, "optim/lr": 1e-4,
             "optim/a_grad_norm": 1.0, **({"val/loss": step % 7} if step % 10 == 0 else {})}
            for step in range(1, 121)]
    run = write_log(tmp_path / "one" / "run", [*map(json.dumps, rows), '{"step": 121, "ima'])
    other = write_log(tmp_path / "two" / "run", ['{"step": 5, "loss/b": NaN, "val/loss": 3, "val/x": null}'])
    report = curves.draw([run], tmp_path / "x.png")
    assert report == "run: step 120 (1,200 images), loss/a 0.0084034, best val/loss 0 at step 70"
    report = curves.draw([run, other], tmp_path / "y.png")
    assert f"{other}: step 5, best val/loss 3 at step 5" in report  # names that are alike, and a log without images
    assert Image.open(tmp_path / "x.png").size[0] == Image.open(tmp_path / "y.png").size[0] >= 1000
    values = plots.smooth(np.array([1, np.nan, 3, 5, *[np.nan] * 5]))
    assert values[:3].tolist() == [2, 3, 3] and np.isnan(values[-1])


@pytest.mark.parametrize(("lines", "says"), [
    ([], "is empty"), (['{"step": 1, "speed/x": 2}'], "no loss"), (['{"st'], "is empty"), (["[1]"], "is empty")])
def test_a_log_that_says_nothing_is_refused(tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        curves.draw([write_log(tmp_path / "run", lines)], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"no log\.jsonl"):
        curves.draw([tmp_path], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_walks_stay_on_the_sphere_around_the_mean_of_the_noise() -> None:
    latents = normal_latents(2000, -1.0, 2.0)  # as DCGAN's
    middle = interpolate.centre(latents)
    assert torch.allclose(middle, torch.full((2000,), -1.0), atol=1e-4)
    start, end = latents(6, torch.Generator().manual_seed(0), None).split(3)
    walk = interpolate.between(start, end, middle, torch.linspace(0, 1, 5))
    assert walk.shape == (3, 5, 2000)
    assert torch.allclose(walk[:, 0], start, atol=1e-4) and torch.allclose(walk[:, -1], end, atol=1e-4)
    assert torch.allclose((walk - middle).norm(dim=-1), torch.tensor(2 * 2000**0.5), rtol=0.05)
    assert torch.allclose(interpolate.between(start, start, middle, torch.linspace(0, 1, 3))[:, 1], start, atol=1e-4)
