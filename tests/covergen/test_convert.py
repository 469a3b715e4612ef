"""A checkpoint of the thesis becomes a run with the same outputs, that trains on from where the thesis stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from covergen.convert import OPTIONS, convert, prepare, rows
from covergen.data.batch import Batch
from covergen.inference.trained_model import open_model
from covergen.runs import checkpoint, config
from shard_tools import cli
from tests.support import thesis
from tests.support.runs import log_of, train

CLOSE = {"rtol": 0.0, "atol": 1e-5}
QUIET = ["--tracker", "none", "--threads", "1"]
GANS = [name for name, (_, networks) in thesis.MODELS.items() if "model_g" in networks]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied after the test: pytest keeps its own, and a VAE with its run is 600 MB."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few covers of 128 px with vectors."""
    from shard_tools.demo import make
    from shard_tools.pack import pack
    out = tmp_path_factory.mktemp("large")
    make(out / "raw", resolution=128, albums=24)
    assert pack(str(out / "raw"), str(out / "shards"), workers=1) == 0
    return out / "shards"


def converted(model: str, folder: Path, **what: Any) -> tuple[dict[str, nn.Module], Path]:
    """The thesis's networks with random contents, and the run made of their checkpoint."""
    made, run = thesis.networks(model), folder / "runs" / model
    convert(str(thesis.save(model, folder, made, **what)), model, str(run))
    return made, run


def trainer_of(run: Path) -> dict[str, Any]:
    """The states of training and of its engine in one."""
    saved = torch.load(checkpoint.checkpoints(run)[-1] / "trainer.pt", weights_only=True)
    return saved["state"] | saved["engine"]


# -- the same networks ---


@pytest.mark.parametrize("model", GANS)
@torch.no_grad()
def test_a_converted_gan_gives_the_same_images_and_scores(model: str, folder: Path) -> None:
    made, path = converted(model, folder)
    run = open_model(path)
    noise = torch.Generator().manual_seed(1)
    latents = torch.randn(2, run.config.options.latent, generator=noise)
    audio = [torch.randn(2, 1160, generator=noise) * 2] if run.model.conditional else []
    expected = made["model_g"](latents, *audio)
    for opened in (run, open_model(path, averaged=False)):
        torch.testing.assert_close(opened.sample(latents, *(part.numpy() for part in audio)), expected, **CLOSE)
    judge = next(network for name, network in run.model.networks.items() if name != "generator")
    images = torch.rand(4, 3, 128, 128, generator=noise) * torch.linspace(0.1, 2, 4).view(4, 1, 1, 1) - 1
    scores = judge(images.to(run.device)).cpu()
    expected = made["model_d"](images.clone())
    torch.testing.assert_close(torch.sigmoid(scores) if model == "dcgan" else scores, expected, **CLOSE)
    assert expected.std() > 0.01  # the images are told apart at all
    assert (run.metadata["audio"] or {}).get("dimension") == (1160 if run.model.conditional else None)


@pytest.mark.parametrize("model", ["ae_resize", "ae_transpose", "vae"])
@torch.no_grad()
def test_a_converted_autoencoder_gives_the_same_reconstructions(model: str, folder: Path) -> None:
    made, path = converted(model, folder)
    covers = torch.randint(0, 256, (2, 3, 128, 128), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    found = open_model(path).reconstruct(Batch(covers, None, None, None))
    torch.testing.assert_close(found, made["model_state_dict"](covers / 255), **CLOSE)
    assert found.std() > 1e-3


def test_counters_of_batches_are_kept_and_may_be_absent(folder: Path) -> None:
    made, run = converted("ae_resize", folder)
    network = open_model(run).networks["autoencoder"]
    assert network.encoder.norms[0].num_batches_tracked == made["model_state_dict"].bn1.num_batches_tracked > 0
    old = {key: value for key, value in made["model_state_dict"].state_dict().items() if "num_batches" not in key}
    path = thesis.save("ae_resize", folder, made, legacy=True, model_state_dict=old)
    convert(str(path), "ae_resize", str(folder / "old"))
    again = open_model(folder / "old").networks["autoencoder"]
    assert torch.equal(again.decoder.convs[0].weight, network.decoder.convs[0].weight)


def test_half_precision_becomes_single(folder: Path) -> None:
    half = thesis.networks("ae_transpose")["model_state_dict"].half().state_dict()
    convert(str(thesis.save("ae_transpose", folder, model_state_dict=half)), "ae_transpose", str(folder / "run"))
    back = open_model(folder / "run").networks["autoencoder"].back[0].weight
    assert back.dtype == torch.float32 and torch.equal(back.cpu(), half["tconv1.weight"].float())


# -- what is refused ---


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made",)


def refused(path: Path, model: str, run: Path) -> str:
    """The error of a conversion that leaves nothing behind."""
    def all_files() -> dict[Path, bytes]:
        return {file: file.read_bytes() if file.is_file() else b"" for file in run.parent.rglob("*")}
    before = all_files()
    with pytest.raises((ValueError, OSError)) as error:
        convert(str(path), model, str(run))
    assert all_files() == before
    return str(error.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_something_is_refused(folder: Path, legacy: bool, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    path = thesis.save("ae_resize", folder, epoch=Payload(), legacy=legacy)
    assert "posix.mkdir" in refused(path, "ae_resize", folder / "run") and not Path("made").exists()
    torch.load(path, weights_only=False)
    assert Path("made").exists()  # it would have


def test_damaged_files_are_told_in_a_line(folder: Path) -> None:
    path = thesis.save("ae_resize", folder)
    for content in (path.read_bytes()[:500_000], b"", b"not a checkpoint"):
        path.write_bytes(content)
        message = refused(path, "ae_resize", folder / "run")
        assert "damaged" in message and "\n" not in message
    assert "no such file" in refused(folder / "absent.pt", "lsgan", folder / "run")
    assert "a folder" in refused(folder, "lsgan", folder / "run")
    torch.save([1, 2], path)
    assert "holds a list" in refused(path, "ae_resize", folder / "run")
    made = thesis.networks("ae_resize")
    made["model_state_dict"].bn2.running_var[3] = float("nan")
    path = thesis.save("ae_resize", folder, made)
    assert "1 tensors hold NaN or infinity: bn2.running_var" in refused(path, "ae_resize", folder / "run")


def test_models_that_were_not_published_are_told(folder: Path, capsys) -> None:
    assert "published no checkpoint" in refused(folder / "f.pt", "cond_vae", folder / "run")
    assert "did you mean 'lsgan'" in refused(folder / "f.pt", "lsgam", folder / "run")
    with pytest.raises(SystemExit, match="2"):
        cli.run(convert, ["--thesis", str(folder / "f.pt"), "--model", "vae", "--out", str(folder / "run")])
    assert "error: --thesis" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "said"), [("ae_resize", "ae_transpose"), ("ae_resize", "vae"), ("wgan_gp", "dcgan"),
                                             ("wgan_gp", "cond_wgan_gp"), ("wgan_gp", "vae"), ("ae_resize", "lsgan")])
def test_a_file_of_another_model_is_recognised(model: str, said: str, folder: Path) -> None:
    message = refused(thesis.save(model, folder), said, folder / "run")
    assert message.endswith(f"--model {model} fits") and message.count(" fits") == 1
    assert ("no such entry, expected a dict of tensors" in message) == (("gan" in model) != ("gan" in said))


def test_all_differences_are_told_at_once(folder: Path) -> None:
    of_generator, of_discriminator = (network.state_dict() for network in thesis.networks("dcgan").values())
    for key in ("main.0.weight", "main.1.bias", "main.1.weight", "main.3.weight", "main.4.bias", "main.4.weight"):
        del of_generator[key]
    of_generator |= {"spare": torch.zeros(2), "main.7.weight": torch.zeros(3)}
    of_discriminator |= {"main.2.weight": "text"}
    path = thesis.save("dcgan", folder, model_g=of_generator, model_d=of_discriminator)
    assert refused(path, "dcgan", folder / "run").split("\n  ")[1:] == [
        "model_g: 6 missing: main.0.weight, main.1.weight, main.1.bias, main.3.weight, ...",
        "model_g: 1 unexpected: 'spare'",
        "model_g: 1 of another shape: main.7.weight (found [3] float32, expected [128] float32)",
        "model_d: 1 of another shape: main.2.weight (found a str, expected [64, 64, 4, 4] float32)"]
    path = thesis.save("dcgan", folder, model_d=[])
    assert refused(path, "dcgan", folder / "run").endswith("\n  model_d: a list, expected a dict of tensors")


def test_a_folder_in_use_is_left_alone(folder: Path) -> None:
    path = thesis.save("ae_resize", folder)
    (folder / "run").mkdir()
    convert(str(path), "ae_resize", str(folder / "run"))  # an empty one will do
    for taken in (folder / "run", path):
        assert "is there already" in refused(path, "ae_resize", taken)


def test_a_failed_conversion_leaves_nothing(folder: Path, monkeypatch) -> None:
    path = thesis.save("ae_resize", folder)
    for culprit in ("torch.save", "covergen.convert.write_atomically"):
        with monkeypatch.context() as patch:
            patch.setattr(culprit, lambda *_: os.mkdir("/no/such/folder"))
            assert "/no/such/folder" in refused(path, "ae_resize", folder / "run")


# -- training that goes on ---


@pytest.mark.parametrize(("model", "entry"), [("cond_wgan_gp", "g"), ("ae_resize", "state_dict")])
def test_the_next_step_of_adam_is_the_one_the_thesis_would_take(model: str, entry: str, folder: Path) -> None:
    made = thesis.networks(model)
    theirs, optimizer = made[f"model_{entry}"], thesis.stepped(model, made[f"model_{entry}"], 3)
    path = thesis.save(model, folder, made, **{f"optimizer_{entry}": optimizer.state_dict()})
    convert(str(path), model, str(folder / "run"))
    run = open_model(folder / "run", which="last", averaged=False)
    phase = run.model.phases[-1]
    ours = torch.optim.Adam(phase.parameters(), lr=1.0)  # which its state overrules
    ours.load_state_dict(trainer_of(run.folder)["optimizers"][phase.name])
    pairs = [(mine, next(p for p in theirs.parameters() if p.shape == mine.shape and torch.equal(p, mine)))
             for mine in phase.parameters()]  # no two tensors are alike
    for mine, other in pairs:
        mine.grad = other.grad = torch.randn_like(mine)
    ours.step()
    optimizer.step()
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=0.0, atol=1e-7)
    assert all(state["step"] == 4 for state in ours.state.values())


def test_an_optimizer_of_no_use_starts_afresh(folder: Path, capsys) -> None:
    short = thesis.contents("dcgan", thesis.networks("dcgan"), steps=1)["optimizer_g"]
    del short["state"][3]
    run = converted("dcgan", folder, optimizer_g=short, optimizer_d=None)[1]
    said = "note: Adam starts afresh for the {}; of {}: it has no state of {} parameters\n".format
    assert said("generator", "optimizer_g", 16) + said("discriminator", "optimizer_d", 14) in capsys.readouterr().out
    assert [state["state"] for state in trainer_of(run)["optimizers"].values()] == [{}, {}]


def test_steps_and_log_are_those_of_the_file(folder: Path, capsys) -> None:
    path = converted("dcgan", folder, steps=9, costs=4, cost_d=[torch.tensor(float("nan")), 2.0, 3.0])[1]
    assert [checkpoint.step_of(point) for point in checkpoint.checkpoints(path)] == [9]
    assert trainer_of(path)["step"] == trainer_of(path)["ema_updates"] == 9
    assert trainer_of(path)["scaler"] is None and trainer_of(path)["early_stopping"]["best_step"] == 0
    assert log_of(path) == [
        {"step": 2, "images": 256, "loss/generator": 1.0, "loss/discriminator": None},
        {"step": 4, "images": 512, "loss/generator": 2.0, "loss/discriminator": 2.0},
        {"step": 7, "images": 896, "loss/generator": 3.0, "loss/discriminator": 3.0},
        {"step": 9, "images": 1152, "loss/generator": 4.0}]
    said = capsys.readouterr().out
    assert "generator 3,642,368, discriminator 2,831,232 parameters; 4 lines" in said
    assert f"python -m covergen.generate --run {path} --n 64" in said
    log = log_of(converted("wgan_gp", folder, costs=3, iter=7)[1])
    assert [(row["step"], row["images"]) for row in log] == [(2, 640), (5, 1600), (7, 2240)] and "loss/critic" in log[0]
    path = thesis.save("dcgan", folder, iter=10**9, cost_g="text")
    assert "1e+09 steps; a run has" in refused(path, "dcgan", folder / "run")


def test_losses_of_every_second_iteration_lie_where_they_were() -> None:
    found = rows({"loss/generator": [1.0] * 5, "loss/discriminator": [2.0] * 3}, {"loss/discriminator": 2}, 5, 10)
    assert [row["step"] for row in found if "loss/discriminator" in row] == [1, 3, 5]
    steps = [row["step"] for row in rows({"a": [0.0] * 700}, {}, 1001, 1)]
    assert len(set(steps)) == 700 and steps == sorted(steps) and steps[-1] == 1001


def test_the_best_epoch_is_remembered(folder: Path, capsys) -> None:
    run = converted("ae_resize", folder, steps=8, cost_list_val=[0.4, 0.2, float("nan"), 0.3])[1]
    assert trainer_of(run)["early_stopping"] == {"best": 0.2, "best_step": 4, "waited": 2,
                                                 "validation_pending": False}
    assert not checkpoint.checkpoints(run, "best") and "validation loss was at step 4" in capsys.readouterr().out
    assert log_of(run)[2] == {"step": 6, "images": 192, "loss/mse": pytest.approx(1 / 3), "val/loss": None}
    run = converted("ae_transpose", folder, steps=8)[1]
    assert checkpoint.step_of(checkpoint.checkpoints(run, "best")[0]) == 8  # the last epoch was the best


@pytest.mark.parametrize("model", list(thesis.MODELS))
def test_the_run_is_configured_as_the_thesis_trained(model: str, tmp_path: Path) -> None:
    run, built = prepare(model, out="runs", name="mine")
    (tmp_path / "config.yaml").write_text(run.text())
    assert config.read_run(tmp_path) == run and run.training.shards is None
    typed = config.resolve({"model": model, "shards": "DIR", "out": "runs", "name": "mine", **OPTIONS.get(model, {})})
    assert config.differences(run.flat(), typed.flat()) == []
    optimizer = {"betas": (0.9, 0.999), "weight_decay": 0, **thesis.ADAM[model]}
    assert optimizer == {key: getattr(run.training, key) for key in optimizer}
    assert run.training.audio_scale == ("raw" if built.conditional else "standard")


def test_an_autoencoder_trains_on(shards: Path, folder: Path) -> None:
    run = converted("ae_resize", folder, steps=3)[1]
    said = train(folder, "--model", "ae_resize", "--shards", str(shards), "--steps", "6", *QUIET).stdout
    assert "going on from runs/ae_resize/checkpoints/step_00000004" in said
    assert [row["step"] for row in log_of(run)][:4] == [1, 2, 3, 4] and log_of(run)[-1]["step"] == 6
    assert trainer_of(run)["optimizers"]["autoencoder"]["state"][0]["step"] == 5
    assert json.loads((run / "data.json").read_text())["identity"]


def test_a_conditional_gan_trains_on(shards: Path, folder: Path) -> None:
    run = converted("cond_lsgan", folder, steps=1, costs=1)[1]
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("batch_size: 64", "batch_size: 4"))  # a batch of 64 takes a minute
    flags = ["--model", "cond_lsgan", "--shards", str(shards), "--steps", "3", "--batch_size", "4", *QUIET]
    assert "going on from" in train(folder, *flags).stdout
    optimizers = trainer_of(run)["optimizers"]
    assert [optimizers[name]["state"][0]["step"] for name in ("generator", "discriminator")] == [3, 2]
    metadata = json.loads((run / "data.json").read_text())
    assert metadata["identity"] and len(metadata["audio"]["mean"]) == 1160
    assert open_model(run).sample(torch.zeros(2, 1024), torch.ones(2, 1160).numpy()).isfinite().all()
