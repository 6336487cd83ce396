"""Run the scripts as a user does, but small, and in temporary folders."""

import itertools
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import Adam
from torch.testing import assert_close
from torchvision import datasets
from torchvision.utils import save_image

import bce_logits_gan as B
import config
import conv_gan as C
import dcgan_wgan_gp as W
import vanilla_gan as V

MNIST = datasets.MNIST(config.DATA_PATH, download=True)
each_script = pytest.mark.parametrize("script", [V, B, C, W], ids=lambda s: s.__name__)
torch.set_num_threads(2)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Return a function that gives a script small settings and a folder for results."""
    monkeypatch.setattr(datasets, "MNIST", lambda *_, **__: Mock(data=MNIST.data[:120]))
    clock = itertools.count(time.time())  # TensorBoard orders its files by the second
    monkeypatch.setattr(time, "time", lambda: next(clock))

    def change(script, folder="results", **settings):
        folder = tmp_path / folder
        values = {"LOAD": True, "SEED": 0, "DEVICE": "cpu", "TENSORBOARD_PATH": folder}
        values |= {"EPOCHS": 3, "BATCH_SIZE": 24, "PICTURES": 80, "LOG_EVERY": 1}
        values |= {"CHECKPOINT": folder / "new/a.pt", "SAMPLES": folder / "new/er"}
        if script is W:
            values.update(DATASET="mnist", CHANNELS=1, FEATURES=2, CRITIC_STEPS=2)
        for key, value in (values | settings).items():
            monkeypatch.setattr(config if hasattr(config, key) else script, key, value)
        return script

    return change


def files(folder):
    """Return the content of all files in a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def results(script):
    """Return the checkpoint, TensorBoard's points, and the steps of its pictures."""
    events = EventAccumulator(str(config.TENSORBOARD_PATH / script.NAME)).Reload()
    tags, images = events.Tags()["scalars"], events.Tags()["images"]
    points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    steps = {tag: [e.step for e in events.Images(tag)] for tag in images}
    return torch.load(script.CHECKPOINT, weights_only=True), points, steps


@each_script
def test_a_run_and_what_it_leaves(script, small, monkeypatch, capsys, tmp_path):
    compared = Mock(wraps=small(script).get_distance)
    monkeypatch.setattr(script, "get_distance", compared)
    script.train()
    saved, points, images = results(script)
    parts = "discriminator disc_optimizer"
    tags = "loss/discriminator prob/real prob/fake"
    if script is W:
        parts = "critic critic_optimizer"
        tags = (
            "loss/critic critic/estimate critic/gradient_norm critic/gradient_penalty"
        )
    assert saved.keys() == {*f"{parts} generator gen_optimizer epoch step".split()}
    assert points.keys() == {*f"{tags} loss/generator distance".split()}
    assert (saved["epoch"], saved["step"]) == (3, 15)
    assert images == {"images/real": [0, 5, 10, 15], "images/fake": [0, 5, 10, 15]}
    done, where, *_, last = capsys.readouterr().out.replace("\r", "\n").splitlines()
    assert "0 of 3" in done and "on cpu" in where and str(script.SAMPLES) in where
    for tag, values in points.items():
        steps = [0, 5, 10, 15] if tag == "distance" else [*range(1, 16)]
        assert [step for step, _ in values] == steps
        assert f"{tag} {values[-1][1]:.3f}" in last and "0.0 min left" in last
    fakes, reals = compared.call_args.args
    assert not torch.equal(reals, compared.call_args_list[0].args[1])  # random
    generator = script.Generator()
    generator.load_state_dict(saved["generator"])
    torch.manual_seed(0)
    assert_close(fakes, script.draw(generator, script.get_noise(80, "cpu")))
    pictures = files(script.SAMPLES)
    for name, expected in ("epoch_0003.png", fakes), ("real.png", reals):
        save_image(expected[:64], tmp_path / name)
        assert pictures[name] == (tmp_path / name).read_bytes()
    assert len(pictures) == 5 and "epoch_0000.png" in pictures


# In epoch 1; in epoch 2: in D's update, while saving, in G's update, before renaming
PLACES = (V, Adam, "step", 7), (V, Adam, "step", 13), (B, torch, "save", 2)
PLACES += (C, Adam, "step", 14), (W, Path, "replace", 2)


@pytest.mark.parametrize("script, owner, name, count", PLACES)
def test_stopped_and_resumed_is_as_never_stopped(script, owner, name, count, small):
    function, calls = getattr(owner, name), itertools.count(1)

    def stop(*given, **options):
        if next(calls) < count:
            return function(*given, **options)
        if name == "save":
            given[1].write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt

    small(script, "never stopped", EPOCHS=2).train()
    (saved, *curves), pictures = results(script), files(script.SAMPLES)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, stop)
        small(script, EPOCHS=2).train()
    script.train()
    assert_close(results(script)[0], saved, rtol=0, atol=0)
    assert [*results(script)[1:]] == curves and files(script.SAMPLES) == pictures
    assert [*script.CHECKPOINT.parent.glob("*.*")] == [script.CHECKPOINT]


@each_script
def test_a_resumed_run_obeys_the_script(script, small):
    small(script, EPOCHS=1).train()
    settings = {"LEARNING_RATE": 1e-6, "BETAS": (0.5, 0.6), "BATCH_SIZE": 60}
    small(script, EPOCHS=2, **settings).train()
    saved, points, _ = results(script)
    assert [step for step, _ in points["loss/generator"]] == [*range(1, 8)]  # no gap
    for optimizer in [state for name, state in saved.items() if "optimizer" in name]:
        group = optimizer["param_groups"][0]
        assert group["lr"] == 1e-6 and group["betas"] == (0.5, 0.6)
        assert optimizer["state"][0]["step"] in (7, 14)


def test_load_false_starts_over_and_another_seed_is_another_run(small):
    runs = []
    for settings in {}, {"LOAD": False}, {"LOAD": False, "SEED": 1}:
        small(V, **settings).train()
        runs.append([*results(V)[1:], files(V.SAMPLES)])
    assert runs[0] == runs[1]
    assert not {*runs[0][2].values()} & {*runs[2][2].values()}


@each_script
def test_batches(script, small):
    few, many, others = (small(script).get_batches(n, "cpu") for n in (5, 100, 100))
    assert len(few) == 1 and not torch.equal(many[0], others[0])
    assert [len(indices) for indices in many] == [48 if script is W else 24] * 4
    if script is not W:  # each image at most once
        assert len(torch.cat(many).unique()) == 96 and sorted(few[0]) == [*range(5)]


@each_script
def test_shapes_and_ranges(script, small):
    grey = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 28, 28)
    real = small(script).normalize(grey.unsqueeze(1) if script is W else grey)
    assert_close(script.to_pixels(real)[:, 0, 9, 9], grey[:, 0, 0] / 255)
    generator, noise = script.Generator(), script.get_noise(8, "cpu")
    generator(noise)  # BatchNorm gathers averages
    assert_close(script.draw(generator, noise)[:1], script.draw(generator, noise[:1]))
    for weight in generator.parameters():
        weight.data *= 1000  # G's limits should be those of real images
    fake = generator(noise)
    assert fake.shape[1:] == real.shape[1:]
    assert_close(fake.aminmax(), real.aminmax(), atol=0.01, rtol=0)
    answers = (script.Critic if script is W else script.Discriminator)()(1000 * real)
    assert answers.shape == ((256, 1, 1, 1) if script is W else (256, 1))
    assert script is W or (answers.min() >= 0 and answers.max() <= 1) == (script is V)


def test_distance():
    torch.manual_seed(0)
    fakes, reals = (MNIST.data[torch.randperm(60000)[:2000]] / 255).split(1000)
    assert V.get_distance(reals.flip(0), reals) < 1e-6
    assert 0.015 < V.get_distance(fakes, reals) < 0.03
    digits = [MNIST.data[MNIST.targets == digit][:1000] / 255 for digit in range(10)]
    bad = fakes[:1].expand(1000, -1, -1), torch.rand(1000, 28, 28), fakes / 2, *digits
    assert min(V.get_distance(fakes, reals) for fakes in bad) > 0.07


def test_vanilla_gan_learns():
    """0.12; 0.28 or more without BatchNorm, 0.40 or more with 0.9 in BETAS."""
    torch.manual_seed(0)
    networks, settings = (V.Generator(), V.Discriminator()), (V.LEARNING_RATE, V.BETAS)
    optimizers = [Adam(network.parameters(), *settings) for network in networks]
    for indices in V.get_batches(60000, "cpu")[:200]:
        V.train_step(V.normalize(MNIST.data[indices]), *networks, *optimizers)
    fakes = V.draw(networks[0], V.get_noise(1000, "cpu"))
    assert V.get_distance(fakes, MNIST.data[:1000] / 255) < 0.18


@pytest.mark.parametrize("s", [16.0, 17.0, -27.0, -30.0, -40.0])
def test_logits_keep_the_gradients_that_a_sigmoid_loses(s):
    kept = 0.5 if s > 0 else -1.0  # of D's loss, or of G's
    lost = {17.0: 0.0, -30.0: -0.0936, -40.0: 0.0}.get(s, kept)
    for script, expected in (V, lost), (B, kept), (C, kept):
        logit = torch.tensor([[s]], requires_grad=True)
        fake = logit.sigmoid() if script is V else logit
        disc_loss = script.get_disc_loss(fake.detach(), fake)
        (disc_loss if s > 0 else script.get_gen_loss(fake)).backward()
        assert logit.grad.item() == pytest.approx(expected, abs=1e-3)


def test_gradient_penalty_of_a_slope_of_0_is_finite():
    weight, images = torch.zeros((), requires_grad=True), torch.ones(6, 3, 4, 4)
    W.gradient_penalty(lambda x: weight * x.sum(), images, -images)[0].backward()
    assert weight.grad.isfinite()
    with pytest.raises(IndexError):  # flat images would share one alpha
        W.gradient_penalty(torch.sum, images.flatten(1), -images.flatten(1))


@each_script
def test_the_check_of_exercise_1_accepts_it(script):
    check = runpy.run_path(str(config.ROOT / ".github/exercises/check.py"))["check"]
    check(script.__file__)  # raises an error if it finds a mistake


def test_the_rest_is_the_same_text():
    rests = set()
    for script in V, B, C, W:
        rest = Path(script.__file__).read_text("utf-8").split("# ---- Training ----")[1]
        rest = re.sub(r"def load_folder(.|\n)*(?=@torch.no_grad\(\)\ndef)", "", rest)
        rests.add(re.sub("(?i)critic|discriminator|disc", "D", rest))
    assert len(rests) == 1


@each_script
def test_drawing_changes_nothing_else(script, small, tmp_path):
    small(script, EPOCHS=1).train()
    before, samples = files(tmp_path), []
    for seed in 0, 0, 1:
        small(script, EPOCHS=1, SEED=seed).train()  # has nothing to do
        script.test()
        after = files(tmp_path)
        samples.append(after.pop("results/new/er/test.png"))
        assert after == before and samples[0] not in before.values()
    assert samples[0] == samples[1] != samples[2]


def test_the_main_job_as_a_user_runs_it(tmp_path, monkeypatch, capsys):
    raw, script = tmp_path / "data/MNIST/raw", tmp_path / "vanilla_gan.py"
    raw.mkdir(parents=True)
    for path in (config.DATA_PATH / "MNIST/raw").glob("*-ubyte"):
        data, end = path.read_bytes(), 16 + 120 * 784 if "images" in path.name else 128
        (raw / path.name).write_bytes(data[:4] + (120).to_bytes(4, "big") + data[8:end])
    text = Path(V.__file__).read_text("utf-8")
    script.write_text(text.replace("\nEPOCHS = ", "\nEPOCHS = 2  #"), "utf-8")
    text = Path(config.__file__).read_text("utf-8") + "TEST, DEVICE = True, 'cpu'"
    (tmp_path / "config.py").write_text(text, "utf-8")
    subprocess.run([sys.executable, script], cwd=raw, check=True)
    first = files(tmp_path)
    settings = {"TRAIN": False, "TEST": True, "SEED": 1}
    settings["CALLBACKS_PATH"] = tmp_path / "checkpoints"
    settings["SAMPLES_PATH"] = tmp_path / "samples"
    for name, value in settings.items():
        monkeypatch.setattr(config, name, value)
    runpy.run_path(str(script), run_name="__main__")
    assert "epochs" not in capsys.readouterr().out  # train() was not called
    second = files(tmp_path)
    drawn = "samples/vanilla_gan/test.png"
    assert first.pop(drawn) != second.pop(drawn)
    assert first == second and "samples/vanilla_gan/epoch_0002.png" in first


def test_bad_checkpoints_harm_no_file(small, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        small(V, EPOCHS=1).test()
    V.train()
    path, good = V.CHECKPOINT, results(V)[0]
    touch = {"__reduce__": lambda _: (Path.touch, (tmp_path / "executed",))}
    bad_parts = {"epoch": type("Malicious", (), touch)()}, {"generator": {}}
    for bad in (
        b"",
        path.read_bytes()[:20_000],
        {"epoch": 1},
        *(good | part for part in bad_parts),
    ):
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        before = files(tmp_path)
        with pytest.raises(Exception):  # noqa: B017 (of five kinds)
            V.train()
        assert str(path) in capsys.readouterr().out.splitlines()[-1]
        assert files(tmp_path) == before


@pytest.mark.parametrize("script", [B, W])
def test_a_diverged_run_ends_and_saves_nothing(script, small):
    with pytest.raises(SystemExit, match="LEARNING_RATE"):
        small(script, LEARNING_RATE=1e30).train()
    assert not script.CHECKPOINT.exists()


def test_cifar10_and_the_name_of_another_data_set(tmp_path, monkeypatch):
    text, copy = Path(W.__file__).read_text("utf-8"), tmp_path / "copy.py"
    copy.write_text(text.replace('"cifar10"', '"own/ships"', 1), "utf-8")
    assert runpy.run_path(str(copy))["NAME"] == "copy_ships"
    data = torch.randint(256, (9, 32, 32, 3), dtype=torch.uint8)
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **__: Mock(data=data.numpy()))
    assert torch.equal(W.load_images(), data.movedim(3, 1))


def test_a_folder_of_pictures(small, tmp_path):
    folder = tmp_path / "own [1]"
    load_images = small(W, DATASET=str(folder), CHANNELS=3).load_images
    with pytest.raises(SystemExit, match=r"\.jpg"):
        load_images()
    for path in folder / ".hidden", folder / "below/deep":
        path.mkdir(parents=True)
    turned = Image.new("RGB", (1200, 400), "lime")
    turned.paste("red", (400, 0, 600, 400))  # the middle square: red, and blue
    turned.paste("blue", (600, 0, 800, 400))
    turned.getexif()[0x0112] = 6  # the camera lay on its side: left is up
    turned.save(folder / "a.JPG", exif=turned.getexif(), quality=95)
    Image.new("RGBA", (90, 70)).save(folder / "below/b.png")
    for path in "c.bmp", ".hidden/d.png", "._e.png", "below/deep/f.png":
        Image.new("L", (8, 8)).save(folder / path)
    images = load_images()
    assert torch.equal(images, images[:4].repeat(1250, 1, 1, 1))
    red, lime, blue = images[0].view(3, 64, 64).float().mean(dim=2)
    assert red[:30].min() > 190 and blue[34:].min() > 190 and lime.max() < 50
    assert images[1].min() == 255 and not images[2:4].any()  # transparent is white
    Image.new("I;16", (9, 9)).save(folder / "0.png")
    (folder / "x.JPG").write_bytes((folder / "a.JPG").read_bytes()[:2000])
    for name, reason in ("0.png", ValueError), ("x.JPG", OSError):
        with pytest.raises(reason) as error:
            load_images()
        assert error.value.__notes__[0].endswith(name)
        (folder / name).unlink()
