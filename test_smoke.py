"""Run the scripts as a user does, on 120 real images, and look at what they leave.

Each test works in a folder of its own that holds a copy of one script, config.py and a
cut of MNIST. Settings are changed as a user does it: by a new value on their line. What
all scripts share is the same text, as a test below proves, so much of it is tried on
vanilla_gan.py alone. No test reaches the network.
"""

import contextlib
import difflib
import gzip
import importlib
import io
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

HERE = Path(__file__).parent
# Each script with the settings that make it small
SCRIPTS = {
    "vanilla_gan": {},
    "bce_logits_gan": {"HIDDEN_DIM": 32},
    "conv_gan": {},
    "dcgan_wgan_gp": {"DATASET": "mnist", "FEATURES": 4, "CRITIC_STEPS": 2},
}
V, B, C, W = SCRIPTS
NETWORKS = "generator", "discriminator", "critic"
TRAIN_IMAGES, TEST_IMAGES = 120, 100
MOMENTS = "if step % 10", "new.replace"  # within an epoch, and after all else of it
GUARD = """
import socket, torch
def refuse(*_, **__):
    raise OSError("no network in tests")
socket.socket.connect = socket.getaddrinfo = refuse
torch.set_num_threads(1)
"""
each_script = pytest.mark.parametrize("name", SCRIPTS)


# ---- Helpers ----
def change(path, old, new):
    """Replace a piece of a file, wherever it stands."""
    text = path.read_text("utf-8")
    assert old in text, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new), "utf-8")


def edit(path, **settings):
    """Replace the values of settings, each on the one line that sets it."""
    for name, value in settings.items():
        text = path.read_text("utf-8")
        (line,) = re.findall(rf"^{name} = .*?(?=  #|$)", text, re.MULTILINE)
        path.write_text(text.replace(line, f"{name} = {value!r}", 1), "utf-8")


def insert(path, line, before):
    """Insert a line before the only one that starts with `before`, indented like it."""
    text = path.read_text("utf-8")
    (indent,) = re.findall(rf"^( *){re.escape(before)}", text, re.MULTILINE)
    change(path, f"\n{indent}{before}", f"\n{indent}{line}\n{indent}{before}")


def start(folder, *command, **environment):
    """Run a command in a folder and return the finished process."""
    environment = {**os.environ, **environment}
    options = {"text": True, "capture_output": True, "timeout": 120}
    return subprocess.run(command, cwd=folder, env=environment, check=False, **options)


def run(script, *flags):
    """Run `python script` from another folder and return the finished process."""
    command = sys.executable, "-B", *flags, str(script)
    return start(script.parents[1], *command, PYTHONPATH=str(script.parent / "guard"))


def run_here(script, terminal=False):
    """Run the script in this process, which saves importing torch again. Return what
    sys.exit says, and the output."""
    handler, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    message, output = None, io.StringIO()
    output.isatty = lambda: terminal
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr(socket.socket, "connect", None)  # put back afterwards
        patch.setattr(socket, "getaddrinfo", None)
        patch.syspath_prepend(script.parent)
        sys.modules.pop("config", None)
        try:
            runpy.run_path(str(script.parent / "guard/sitecustomize.py"))
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            message = stop.code
        finally:
            sys.modules.pop("config", None)
            torch.set_num_threads(threads)
            signal.signal(signal.SIGINT, handler)
    return message, output.getvalue()


def finish(script):
    """Run the script, which must come to its end. Return its output."""
    message, output = run_here(script)
    assert message is None, message
    return output


def refused(script):
    """Run the script, which must end with one line and leave no file harmed. Return
    that line."""
    before = snapshot(script.parent)
    message, _ = run_here(script)
    assert isinstance(message, str) and len(message.splitlines()) == 1, message
    assert snapshot(script.parent) == before
    return message


def same(a, b):
    """Tell whether two checkpoints are equal, bit for bit."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def load(script):
    path = script.parent / "checkpoints" / f"{script.stem}.pt"
    return torch.load(path, weights_only=True)


def weights(checkpoint):
    """Return all that a run has learned."""
    return {k: v for k, v in checkpoint.items() if k in NETWORKS or "optimizer" in k}


def curves(script):
    """Return TensorBoard's curves {tag: [(step, value)]}, and its pictures' steps."""
    path = str(script.parent / "runs" / script.stem)
    events = EventAccumulator(path, size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    scalars = {
        t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]
    }
    return scalars, {t: [e.step for e in events.Images(t)] for t in tags["images"]}


def tiles(path, columns=8):
    """Return the pictures of a grid: float (rows, columns, size, size), 0 to 255."""
    grid = pil_to_tensor(Image.open(path).convert("RGB"))[0, 2:, 2:].float()
    size = grid.shape[1] // columns
    return grid.unfold(0, size - 2, size).unfold(1, size - 2, size)


def mnist(kind, count):
    """Return the first bytes of one of MNIST's tracked archives: header and content."""
    header, size = (16, 784) if "images" in kind else (8, 1)
    with gzip.open(HERE / "data/MNIST/raw" / f"{kind}-ubyte.gz") as file:
        return bytearray(file.read(header)), bytearray(file.read(count * size))


def training_images(count):
    content = mnist("train-images-idx3", count)[1]
    return torch.frombuffer(content, dtype=torch.uint8).view(-1, 1, 28, 28).float()


def snapshot(folder):
    """Return every file that a run left, with its content."""
    parts = [folder / part for part in ("checkpoints", "samples", "runs")]
    paths = [path for part in parts for path in part.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths}


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Return a function that puts a shrunk copy of a script into a new folder."""

    def place(name, **settings):
        folder = tmp_path_factory.mktemp(name)
        raw = folder / "data/MNIST/raw"
        raw.mkdir(parents=True)
        for part, count in ("train", TRAIN_IMAGES), ("t10k", TEST_IMAGES):
            for kind in f"{part}-images-idx3", f"{part}-labels-idx1":
                start, content = mnist(kind, count)
                start[4:8] = count.to_bytes(4, "big")
                (raw / f"{kind}-ubyte").write_bytes(start + content)
        edit(Path(shutil.copy(HERE / "config.py", folder)), DEVICE="cpu")
        script = Path(shutil.copy(HERE / f"{name}.py", folder))
        (folder / "guard").mkdir()
        (folder / "guard" / "sitecustomize.py").write_text(GUARD)
        small = {"EPOCHS": 4, "BATCH_SIZE": 24, "LOG_EVERY": 3, **SCRIPTS[name]}
        edit(script, **{**small, **settings})
        if name == C:  # a thousand pictures an epoch take it long
            change(script, "randn(1000", "randn(100")
        return script

    return place


@pytest.fixture(scope="session")
def trained(place):
    """Return a function that gives a script and its process, trained for 4 epochs,
    killed in the third at one of MOMENTS, run twice at once, or without data. They run
    in the background."""
    made = {(name, None): place(name) for name in SCRIPTS}
    for moment in MOMENTS:
        made[V, moment] = place(V)
        kill = "if epoch == 3: __import__('os').kill(__import__('os').getpid(), 9)"
        insert(made[V, moment], kill, moment)
    made[V, "once"] = made[V, "twice"] = twice = place(V)
    # Each waits until the other one has written its checkpoint as well.
    insert(
        twice, "open(SAMPLES / f'{epoch} {time.time_ns()}', 'w').close()", MOMENTS[1]
    )
    wait = "while len(list(SAMPLES.glob(f'{epoch} *'))) < 2: time.sleep(0.01)"
    insert(twice, wait, MOMENTS[1])
    made[V, "-O"] = place(V)
    shutil.rmtree(made[V, "-O"].parent / "data")
    with ThreadPoolExecutor(max(2, os.cpu_count())) as pool:
        runs = {
            key: pool.submit(run, script, *[flag for flag in key if flag == "-O"])
            for key, script in made.items()
        }
        yield lambda *key: (made[key], runs[key].result())


@pytest.fixture
def copy_of(trained, tmp_path):
    """Return a function that gives a trained script with its results, to be changed."""

    def copy_of(name):
        script = trained(name, None)[0]
        shutil.copytree(script.parent, tmp_path / name)
        return tmp_path / name / script.name

    return copy_of


# ---- A run and what it leaves ----
@each_script
def test_training_leaves_what_it_promises(name, trained):
    script, process = trained(name, None)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert "scratch" in lines[0] and len(lines) == 6 and "\r" not in process.stdout
    assert all(f"epoch {i}/4" in lines[i + 1] for i in range(1, 5))
    checkpoint = load(script)
    settings, parts = checkpoint["settings"], weights(checkpoint)
    assert checkpoint["epoch"] == 4 and settings["EPOCHS"] == 4 and "BETAS" in settings
    assert checkpoint["script"] == script.read_text("utf-8") and len(parts) == 4
    for part in set(parts) - set(NETWORKS):
        steps = 20 * (settings["CRITIC_STEPS"] if "critic" in part else 1)
        assert parts[part]["state"][0]["step"] == steps
    samples = sorted(path.name for path in (script.parent / "samples" / name).iterdir())
    assert samples == [f"epoch_000{i}.png" for i in range(5)] + ["real.png"]


@each_script
def test_tensorboard_shows_all_curves(name, trained):
    scalars, images = curves(trained(name, None)[0])
    tags = "loss/discriminator prob/real prob/fake quality/precision quality/recall"
    if name == W:
        tags = "loss/critic critic/wasserstein_distance critic/gradient_norm"
        tags += " critic/gradient_penalty"
    assert {*tags.split(), "loss/generator", "speed/images_per_second"} == {*scalars}
    for tag, points in scalars.items():
        once = tag.startswith(("quality", "speed"))  # an epoch. LOG_EVERY is 3.
        ends = [5, 10, 15, 20] if once else [3, 5, 8, 10, 13, 15, 18, 20]
        assert [step for step, _ in points] == ends, tag
        low, high = (0, 1) if tag.startswith(("prob", "quality")) else (-1e9, 1e9)
        assert all(low <= value <= high for _, value in points), tag
    assert images == {"images/real": [0], "images/fake": [0, 5, 10, 15, 20]}


@pytest.mark.parametrize("name", [V, W])
def test_both_networks_learn_and_the_noise_stays(name, trained, place):
    script = place(name, LEARNING_RATE=0.0, EPOCHS=3)
    finish(script)
    early, late = load(script), load(trained(name, None)[0])
    for key in set(early) & set(NETWORKS):
        still = [w for w in early[key] if torch.equal(early[key][w], late[key][w])]
        # The last bias of the critic cancels out between real images and fakes.
        assert still == (["11.bias"] if key == "critic" else []), key
    # Nothing learns, so each picture is most like itself. BatchNorm still settles.
    folder = script.parent / "samples" / name
    grids = [tiles(folder / f"epoch_000{i}.png").flatten(0, 1) for i in (2, 3)]
    likeness = torch.corrcoef(torch.cat(grids).flatten(1))[:64, 64:]
    assert torch.equal(likeness.argmax(dim=1), torch.arange(64))


@pytest.mark.parametrize("name", [V, W])
def test_data_are_shuffled_and_noise_is_new_in_each_step(name, place):
    script = place(name, EPOCHS=2)
    insert(script, "seen.append((real + 0, noise))", "history[step] =")
    insert(script, "seen = config.seen = []", "fixed_noise = ")
    insert(script, "torch.save(seen, CHECKPOINT)", "# ---- Test")
    finish(script)
    seen = torch.load(script.parent / "checkpoints" / f"{name}.pt")
    real, noise = (torch.cat(parts) for parts in zip(*seen))
    assert len(seen) == 10 and len(noise.unique(dim=0)) == 2 * TRAIN_IMAGES
    first, second = real.flatten(1).chunk(2)
    assert not torch.equal(first, second)
    if name == V:  # each image once an epoch
        assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == TRAIN_IMAGES


# ---- Resume ----
def check_same_as_never_stopped(script, straight):
    assert same(weights(load(script)), weights(load(straight)))
    (scalars, images), (expected, expected_images) = curves(script), curves(straight)
    del scalars["speed/images_per_second"], expected["speed/images_per_second"]
    assert scalars == expected and images == expected_images
    for path in (straight.parent / "samples" / straight.stem).iterdir():
        other = script.parent / "samples" / script.stem / path.name
        assert path.read_bytes() == other.read_bytes()


@each_script
def test_two_epochs_and_two_more_equal_four(name, trained, place):
    script = place(name, EPOCHS=2)
    finish(script)
    edit(script, EPOCHS=4)
    assert "after epoch 2 of" in finish(script)
    check_same_as_never_stopped(script, trained(name, None)[0])


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in_the_third_epoch_and_started_again(moment, trained):
    script, process = trained(V, moment)
    assert process.returncode != 0 and load(script)["epoch"] == 2
    shown = curves(script)[1]["images/fake"]  # each epoch is seen at once
    assert shown[-1] == (15 if moment == MOMENTS[1] else 10)
    shutil.copy(trained(V, None)[0], script)  # without the line that kills it
    time.sleep(1)  # TensorBoard puts runs in order by the second in which they began
    assert "has changed" in finish(script)
    check_same_as_never_stopped(script, trained(V, None)[0])


def test_ctrl_c_keeps_the_last_epoch_and_says_how_to_go_on(place):
    script = place(V)
    press = "if epoch == 2: signal.raise_signal(signal.SIGINT)"
    insert(script, press, "history[step] =")
    assert "again" in run_here(script)[0] and load(script)["epoch"] == 1


def test_a_terminal_sees_a_line_that_updates(place):
    message, output = run_here(place(V, EPOCHS=1), terminal=True)
    *updates, last = output.splitlines(keepends=True)[2:]
    assert message is None and updates and "recall" in last
    assert all("%" in line and "min left" in line for line in updates)
    assert len(last) > max(map(len, updates))  # covers them


def test_two_runs_at_once_both_end_well(trained):
    script, process = trained(V, "once")
    assert process.returncode == trained(V, "twice")[1].returncode == 0, process
    assert same(weights(load(script)), weights(load(trained(V, None)[0])))


def test_load_false_starts_over(copy_of):
    script = copy_of(V)
    first = load(script)
    edit(script.parent / "config.py", LOAD=False)
    assert "epoch 1/4" in finish(script)
    assert same(load(script), first)  # the same seed gives the same run
    scalars, images = curves(script)
    assert len(scalars["quality/recall"]) == 4 and len(images["images/real"]) == 1


def test_a_checkpoint_outlives_harmless_changes(copy_of):
    script = copy_of(V)
    checkpoint = load(script)
    for name in "gen_optimizer", "disc_optimizer":  # as another version of torch has it
        (group,) = checkpoint[name]["param_groups"]
        group["foreign_option"] = group.pop("foreach")
    del checkpoint["settings"]["TEST_SEED"]
    torch.save(checkpoint, script.parent / "checkpoints/other.pt")
    before = snapshot(script.parent)
    script = Path(shutil.copy(script, script.with_name("other.py")))
    edit(script, LOG_EVERY=2, EPOCHS=5)
    insert(script, "EXTRA = (torch.nn.ReLU, 0.2)  # a constant more", "LOG_EVERY")
    rates = "discriminator.parameters(), LEARNING_RATE, BETAS"
    change(script, rates, "discriminator.parameters(), 0.25, (0.25, 0.5)")
    output = finish(script)
    assert "after epoch 4" in output and "has changed" in output
    checkpoint = load(script)
    (group,) = checkpoint["disc_optimizer"]["param_groups"]
    assert group["lr"] == 0.25 and group["betas"] == (0.25, 0.5)  # as the line says
    assert checkpoint["settings"]["NAME"] == "other"
    finish(script)  # what was written can be loaded
    after = snapshot(script.parent)  # a copy keeps its results apart
    own = script.parent / "checkpoints/other.pt"
    assert all(after[path] == before[path] for path in before if path != own)
    assert (script.parent / "samples/other/epoch_0005.png").exists()


# ---- Test ----
@each_script
def test_one_flip_draws_pictures_and_changes_nothing(name, copy_of):
    script = copy_of(name)
    before = snapshot(script.parent)
    edit(script.parent / "config.py", TEST=True)
    finish(script)
    after = snapshot(script.parent)
    names = {path.name for path in set(after) - set(before)}
    assert names == {"test.png", "interpolation.png", "nearest.png", "epochs.gif"}
    assert all(after[path] == before[path] for path in before)
    edit(script.parent / "config.py", TRAIN=False)  # TEST alone draws the same
    finish(script)
    assert snapshot(script.parent) == after

    samples = script.parent / "samples" / name
    drawn, pairs = tiles(samples / "test.png"), tiles(samples / "nearest.png", 16)
    size, real = drawn.shape[-1], training_images(TRAIN_IMAGES)
    if size != 28:
        real = torch.nn.functional.interpolate(real, size=size, mode="bilinear")
    real = real[:, 0]
    assert torch.equal(pairs[:, 0::2], drawn)
    for sample, shown in zip(drawn.flatten(0, 1), pairs[:, 1::2].flatten(0, 1)):
        assert (real - shown).abs().amax(dim=(1, 2)).min() <= 1  # it is a real image,
        nearest = (real - sample).pow(2).sum(dim=(1, 2)).min()
        assert (shown - sample).pow(2).sum() <= 1.01 * nearest  # and none is nearer
    walks = tiles(samples / "interpolation.png", 10)
    assert (walks[:, 0] - drawn[0]).abs().max() <= 1
    assert (walks[:, 9] - drawn[1]).abs().max() <= 1
    first = tiles(samples / "real.png")[0, 0]
    assert (real - first).abs().amax(dim=(1, 2)).min() <= 1
    with Image.open(samples / "epochs.gif") as gif:
        assert gif.n_frames == 5  # untrained, and four epochs
        gif.seek(4)
        assert gif.info["duration"] >= 2000  # milliseconds: the last one stays

    edit(script, TEST_SEED=5)  # draws other samples from the same checkpoint
    finish(script)
    assert snapshot(script.parent)[samples / "test.png"] != after[samples / "test.png"]


# ---- Own pictures ----
def test_a_folder_of_pictures(place, monkeypatch):
    script = place(W, DATASET="own", EPOCHS=1, BATCH_SIZE=5)
    folder = script.parent / "own"
    (folder / "below").mkdir(parents=True)
    turned = Image.new("RGB", (300, 100), "lime")
    turned.paste("red", (100, 0, 150, 100))  # the middle square: red, and blue
    turned.paste("blue", (150, 0, 200, 100))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera lay on its side: left is up
    turned.save(folder / "a.jpg", exif=exif, quality=95)
    Image.new("RGBA", (90, 70)).save(folder / "below/b.png")
    Image.new("1", (7, 9)).save(folder / "c.bmp")
    Image.new("P", (64, 64)).save(folder / "d.gif")
    Image.new("L", (90, 70)).save(folder / "without_ending", "webp")
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:900])
    (folder / "notes.txt").write_text("no picture")
    monkeypatch.chdir(script.parent)
    message, output = run_here(script, terminal=True)
    assert message is None and "5 pictures\r" in output
    assert output.count("Left out own") == 2 and "cut" in output and "notes" in output
    images = runpy.run_path(str(script))["load_images"]()
    assert images.shape == (5, 3, 64, 64) and images.dtype == torch.uint8
    red, lime, blue = images[0].float().mean(dim=2)
    assert red[:30].min() > 190 and blue[34:].min() > 190 and lime.max() < 50
    assert images[1].min() == 255 and not images[2].any()  # transparent is white
    edit(script, BATCH_SIZE=6)
    shutil.rmtree(script.parent / "checkpoints")
    assert "BATCH_SIZE" in refused(script)  # too few pictures
    shutil.rmtree(folder)
    assert "DATASET" in refused(script)


# ---- Bad input ----
BAD = {
    V: "BATCH_SIZE=121 BATCH_SIZE=1.5 BATCH_SIZE=1 EPOCHS=0 EPOCHS=2.0 NOISE_DIM=0 "
    "LOG_EVERY=0 LEARNING_RATE='3e-4' LEARNING_RATE=-1.0 BETAS=(0.5,1.5) "
    "BETAS=(0,0.9) BETAS=0.5 NORMALIZE_STD=0",
    B: "HIDDEN_DIM=0",
    W: "FEATURES=0 CRITIC_STEPS=0 DATASET='cifar'",
    "config": "TRAIN=False SEED='x' DEVICE='gpu' DEVICE='cuda:99' "
    "CALLBACKS_PATH=inside SAMPLES_PATH=inside TENSORBOARD_PATH=inside",
}


@pytest.mark.parametrize("name, bad", [(n, b) for n in BAD for b in BAD[n].split()])
def test_what_cannot_work_is_refused_by_name(name, bad, place):
    script = place(V if name == "config" else name)
    setting, value = bad.split("=")
    value = eval(value, {"inside": str(script / "folder")})  # within a file
    edit(script.with_name(f"{name}.py"), **{setting: value})
    assert (script.name if "inside" in bad else setting) in refused(script)


def test_an_existing_folder_that_cannot_be_written_is_named(place, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # even for an administrator
    assert "checkpoints" in refused(place(V))


def test_missing_and_damaged_data_say_what_to_do(place, trained):
    script = place(V)
    raw = script.parent / "data/MNIST/raw"
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(
        images.read_bytes()[:5000]
    )  # as a kill while unpacking leaves it
    assert "MNIST/raw" in refused(script)
    shutil.rmtree(raw)
    raw.mkdir()
    archive = raw / "train-images-idx3-ubyte.gz"
    archive.write_bytes(b"damaged")
    assert "MNIST/raw" in refused(script) and archive.read_bytes() == b"damaged"
    process = trained(V, "-O")[1]
    assert process.returncode == 1 and len(process.stderr.splitlines()) == 1
    assert "no network in tests" in process.stderr  # the cause
    colours = refused(place(W, DATASET="cifar10"))
    assert "no network" in colours and "cifar-10-python.tar.gz" in colours


@pytest.mark.parametrize("right", ["nn.ReLU()", "mnist.data"])
def test_a_mistake_in_the_code_shows_its_own_line(right, place):
    script = place(V)
    wrong = {"nn.ReLU()": "nn.Relu()", "mnist.data": "mnist.dat"}[right]
    change(script, right, wrong)
    with pytest.raises(AttributeError) as caught:
        run_here(script)
    last = caught.traceback[-1]
    assert last.path == script and wrong in str(last.statement)


def test_changed_settings_and_networks_are_refused_by_name(copy_of):
    script = copy_of(V)
    text = script.read_text("utf-8")
    changed = {"LEARNING_RATE": 0.5, "NOISE_DIM": 7, "BETAS": (0.1, 0.9)}
    for setting, value in changed.items():
        edit(script, **{setting: value})
        message = refused(script)
        assert f"{setting} = {value}" in message and "LOAD = False" in message
        script.write_text(text, "utf-8")
    change(script, "512", "500")
    assert "size mismatch" in refused(script)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


DAMAGE = ["cut", "empty", "text", "evil", "foreign", "flipped"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_checkpoints_are_refused_and_kept(damage, copy_of, monkeypatch):
    script = copy_of(V)
    monkeypatch.chdir(script.parent)
    path = script.parent / "checkpoints/vanilla_gan.pt"
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = bytes(255 - byte for byte in good[middle : middle + 9])
    if damage == "evil":
        torch.save({**load(script), "epoch": Malicious()}, path)
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        bad = {"cut": good[:middle], "empty": b"", "text": b"no checkpoint"}
        bad["flipped"] = good[:middle] + flipped + good[middle + 9 :]
        path.write_bytes(bad[damage])
    assert path.name in refused(script) and not Path("executed").exists()


@pytest.mark.parametrize("name", [V, W])
def test_a_diverging_run_is_seen_and_not_saved(name, copy_of):
    script = copy_of(name)
    edit(script, EPOCHS=6)
    nan = "[weight.data.fill_(torch.nan) for weight in generator.parameters()]"
    insert(script, f"if epoch == 6: {nan}", "history[step] =")
    message, output = run_here(script)
    assert "LEARNING_RATE" in message and len(message.splitlines()) == 1
    assert load(script)["epoch"] == 5 and "epoch 6/6" in output
    assert max(step for step, _ in curves(script)[0]["loss/generator"]) == 30


# ---- The same text in all scripts ----
def shared_lines(name, update):
    """Return a script's lines outside settings, data, networks and losses, and, if so
    wanted, outside the two updates."""
    text = (HERE / f"{name}.py").read_text("utf-8")
    imports = text[text.index("import ") : text.index("# ---- Settings")]
    text = imports + text[text.index("# ---- Housekeeping") :]
    if not update:
        start, end = text.index("        for step in"), text.index("if step % 10")
        text = text[:start] + text[end:]
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", [B, C, W])
def test_shared_lines_are_identical(name):
    lines = shared_lines(name, name != W)
    changed = difflib.ndiff(shared_lines(V, name != W), lines)
    changed = [line for line in changed if line[0] in "+-"]
    own = r"for name in|answers =|# \(N, |NORMALIZE_STD|import pil_to|from PIL"
    if name == W:  # another network, no quality, and steps of its own
        own += "|[Cc]ritic|disc|NOISE_DIM|precision|recall|goal|tags|held_out"
        own += "|batches|load_images|real_pixels|images.:64|speed =|steps =|{means"
        own += "|first,"  # epochs.gif at half the size
    drifted = [line for line in changed if not re.search(own, line)]
    assert not drifted, "\n".join(drifted)
    assert len(lines) - len(changed) > (70 if name == W else 120)


def test_importing_only_defines_and_nothing_depends_on_assert(tmp_path):
    files = [*(f"{name}.py" for name in SCRIPTS), "config.py"]
    for file in files:
        text = Path(shutil.copy(HERE / file, tmp_path)).read_text("utf-8")
        assert not re.search(r"^ *assert ", text, re.MULTILINE)
    code = f"import {', '.join(SCRIPTS)}"
    process = start(tmp_path, sys.executable, "-B", "-c", code)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert {path.name for path in tmp_path.iterdir()} == set(files)


# ---- Values ----
@each_script
def test_to_pixels_undoes_normalize(name, monkeypatch):
    module = importlib.import_module(name)
    grey = torch.arange(256, dtype=torch.uint8)  # one image of each
    shape = (256, 3, 32, 32) if name == W else (256, 28, 28)
    images = grey.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    for mean, std in (0.5, 0.5), (0.1307, 0.3081):
        monkeypatch.setattr(module, "NORMALIZE_MEAN", mean, raising=False)
        monkeypatch.setattr(module, "NORMALIZE_STD", std, raising=False)
        pixels = module.to_pixels(module.normalize(images))
        assert torch.allclose(pixels, grey.view(-1, 1, 1, 1) / 255, atol=1e-6)
        assert pixels.shape[1:] == ((3, 64, 64) if name == W else (1, 28, 28))


def test_the_tracked_archives_are_all_of_mnist(tmp_path, monkeypatch):
    module = importlib.import_module(V)
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    for path in (HERE / "data/MNIST/raw").glob("*.gz"):
        shutil.copy(path, tmp_path / "MNIST/raw")
    monkeypatch.setattr(module.config, "DATA_PATH", tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert [len(module.load_images(train)) for train in (True, False)] == [60000, 10000]


def test_precision_and_recall_order_good_and_bad_pictures():
    module = importlib.import_module(V)
    torch.manual_seed(0)
    labels = torch.tensor(mnist("train-labels-idx1", 4000)[1])[1000:]
    held_out, real = (training_images(4000) / 255).split([1000, 3000])

    def scores(fake):
        return module.share_near(fake, held_out), module.share_near(held_out, fake)

    precision, recall = scores(real[:1000])
    assert precision > 0.9 and recall > 0.9
    assert scores(real[:250].repeat(4, 1, 1, 1))[1] < recall - 0.2  # few, repeated
    assert scores(real[labels != 4][:1000])[1] < recall - 0.01  # a digit missing
    assert scores(real[:1].repeat(1000, 1, 1, 1))[1] < 0.01  # collapse
    assert max(scores(torch.rand(1000, 1, 28, 28))) == 0  # noise
    precision, recall = scores(torch.nn.functional.avg_pool2d(real[:1000], 3, 1, 1))
    assert precision > 0.9 and recall < 0.3  # blurred: only recall sees it


@pytest.mark.parametrize("name", [V, B, C])
def test_losses_at_known_points_and_their_direction(name):
    module = importlib.import_module(name)
    logits = torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1).expand(3, 4, 1)
    no, undecided, yes = logits.sigmoid() if name == V else logits
    found = [module.get_disc_loss(undecided, undecided), module.get_gen_loss(undecided)]
    found += [module.get_disc_loss(yes, no), module.get_disc_loss(no, yes)]
    found += [module.get_gen_loss(yes), module.get_gen_loss(no)]
    expected = [0.6931, 0.6931, 0.0486, 3.0486, 0.0486, 3.0486]
    assert torch.stack(found).tolist() == pytest.approx(expected, abs=1e-4)


def test_logits_stay_exact_where_a_sigmoid_loses_the_gradient():
    vanilla, logits = importlib.import_module(V), importlib.import_module(B)
    sure = torch.full((4, 1), -200.0, requires_grad=True)
    vanilla.get_gen_loss(sure.sigmoid()).backward()
    assert vanilla.get_gen_loss(sure.sigmoid()) == 100 and not sure.grad.any()
    sure.grad = None
    logits.get_gen_loss(sure).backward()
    assert logits.get_gen_loss(sure) == 200 and (sure.grad == -0.25).all()  # mean of 4


def test_black_pixels_reach_the_weights_of_d():
    discriminator = importlib.import_module(B).Discriminator()
    discriminator(torch.zeros(2, 784)).sum().backward()
    assert discriminator[0][0].weight.grad.any()


def test_wasserstein_losses_and_gradient_penalty():
    module, seen = importlib.import_module(W), []
    high, low = torch.full((4, 1, 1, 1), 2.0), torch.full((4, 1, 1, 1), -1.0)
    assert module.get_critic_loss(high, low, 0.5) == -2.5  # real high: good for C
    assert module.get_gen_loss(high) == -2 and module.get_gen_loss(low) == 1

    critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 1))
    weight = critic[1].weight  # its length is the slope everywhere
    for length in 0.5, 1.0, 3.0, 0.0:
        weight.data *= length / weight.data.norm()
        penalty, slope = module.gradient_penalty(critic, *torch.rand(2, 5, 3, 8, 8))
        assert penalty.item() == pytest.approx(10 * (length - 1) ** 2, abs=1e-4)
        assert slope.item() == pytest.approx(length, abs=1e-4)
        penalty.backward()
        assert weight.grad.isfinite().all()  # of a slope of 0 too

    def critic(images):  # its gradient at x is x, so each image has a slope of its own
        seen.append(images.detach())
        return images.pow(2).sum(dim=(1, 2, 3)) / 2

    real = torch.ones(6, 3, 4, 4)
    penalty, slope = module.gradient_penalty(critic, real, -real)
    slopes = seen[0].flatten(1).norm(dim=1)
    assert penalty.item() == pytest.approx(10 * (slopes - 1).pow(2).mean().item(), 1e-4)
    assert slope.item() == pytest.approx(slopes.mean().item(), 1e-4)
    assert seen[0].abs().max() <= 1 and len(seen[0].flatten().unique()) == 6


def test_colour_images_of_cifar10(monkeypatch):
    module = importlib.import_module(W)
    data = numpy.arange(9 * 32 * 32 * 3, dtype="uint8").reshape(9, 32, 32, 3)
    fake = type("CIFAR10", (), {"data": data})
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **__: fake)
    images = module.load_images()
    assert images.shape == (9, 3, 32, 32) and images.is_contiguous()
    assert torch.equal(images[:, 1], torch.from_numpy(data)[..., 1])


@each_script
def test_networks_keep_to_their_shapes_and_ranges(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    generator = module.Generator()
    for weight in generator.parameters():
        weight.data *= 100  # drives it to its limits
    images = generator(torch.randn(8, module.NOISE_DIM, *[1, 1] * (name == W)))
    size = (3, 32, 32) if name == W else (28, 28)
    real = torch.tensor([0, 255], dtype=torch.uint8).view(2, *[1] * len(size))
    real = module.normalize(real.expand(2, *size))
    assert images.shape[1:] == real.shape[1:]
    assert images.min() >= real.min() and images.max() <= real.max()
    assert images.min() < real.min() + 0.01 and images.max() > real.max() - 0.01
    answers = (module.Critic if name == W else module.Discriminator)()(100 * images)
    assert answers.shape == ((8, 1, 1, 1) if name == W else (8, 1))
    assert (answers.min() >= 0 and answers.max() <= 1) == (name == V)


# ---- README ----
README = (HERE / "README.md").read_text("utf-8")


def blocks(language):
    return re.findall(
        rf"^ *```{language}\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL
    )


def test_the_readme_links_what_is_there():
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    headings = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    folder = HERE / ".github/images"
    pictures = {path.relative_to(HERE).as_posix() for path in folder.iterdir()}
    assert pictures == {link for link in links if link.startswith(".github/images/")}
    for link in set(links) - pictures:
        known = link.startswith("https://") or link[1:] in anchors
        assert known or (HERE / link).exists(), link


def test_the_readme_says_what_the_scripts_print_and_know(trained):
    (printed,) = [line for line in blocks("text") if line.startswith("epoch")]
    line = trained(V, None)[1].stdout.splitlines()[2] + "\n"
    assert re.sub(r"[\d.,]+", "0", printed) == re.sub(r"[\d.,]+", "0", line)
    known = "".join(path.read_text("utf-8") for path in HERE.glob("*.py"))
    settings = re.findall(r"`([A-Z_]{4,})\b", README)
    assert len(settings) > 20
    for name in {*settings} - {"NAME"}:
        assert re.search(rf"^{name} = ", known, re.MULTILINE), name


def test_the_commands_of_the_readme(copy_of):
    folder = copy_of(V).parent
    shutil.copy(HERE / f"{B}.py", folder)
    commands = [command for block in blocks("sh") for command in block.split(" && ")]
    assert {"python vanilla_gan.py\n", "python -m pytest\n"} < {*commands}
    for command in commands:
        if command.startswith("tensorboard"):
            words = "-m", "tensorboard.main", "--inspect", *command.split()[1:]
            assert "quality/recall" in start(folder, sys.executable, *words).stdout
        if command.startswith("diff") and shutil.which("diff"):  # Windows may have none
            assert "BCEWithLogitsLoss" in start(folder, *command.split()).stdout
    (code,) = [block for block in blocks("python") if "save_image" in block]
    process = start(folder, sys.executable, "-B", "-c", code)
    assert process.returncode == 0, process.stderr
    assert len(list(folder.glob("digit_*.png"))) == 10


def test_the_average_generator_of_the_exercise(place):
    script = place(B, EPOCHS=1)
    text, end = script.read_text("utf-8"), 0
    (block,) = blocks("diff")
    for line in block.splitlines(keepends=True):
        start = end if line[0] == "+" else text.index(line[1:], end)
        old = "" if line[0] == "+" else line[1:]
        new = "" if line[0] == "-" else line[1:]
        text = text[:start] + new + text[start + len(old) :]
        end = start + len(new)
    script.write_text(text, "utf-8")
    finish(script)
    assert any("averaged" in name for name in load(script))
