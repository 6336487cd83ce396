"""Run the scripts as a user does, on 120 real images, and look at what they leave.

Each test has a folder of its own with a copy of one script, config.py and a cut of
MNIST. It changes settings as a user does: by a new value on their line. What all
scripts share is the same text, as a test below proves, so much of it is tried on
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
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text("utf-8")
# Each script with the settings that make it small
SCRIPTS = {
    "vanilla_gan": {},
    "bce_logits_gan": {"HIDDEN_DIM": 32},
    "conv_gan": {},
    "dcgan_wgan_gp": {"DATASET": "mnist", "FEATURES": 4, "CRITIC_STEPS": 2},
}
V, B, C, W = SCRIPTS
NETWORKS = "generator", "discriminator", "critic"
FOLDERS = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
NOWHERE = "http://127.0.0.1:1"  # refuses every connection
os.environ |= {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)
sys.dont_write_bytecode = True
each_script = pytest.mark.parametrize("name", SCRIPTS)


# ---- Helpers ----
def change(path, old, new):
    """Replace what a pattern finds in a file."""
    text, count = re.subn(f"(?m){old}", new, path.read_text("utf-8"))
    assert count, f"{old} is not in {path.name}"
    path.write_text(text, "utf-8")


def edit(path, **settings):
    """Replace the values of settings, each on the line that sets it."""
    for name, value in settings.items():
        change(path, rf"^{name} = .*?(?=  #|$)", f"{name} = {value!r}")


def insert(path, line, before):
    """Insert a line before the one that starts with `before`, indented like it."""
    change(path, f"^( *)(?={before})", rf"\1{line}\n\1")


def cut_mnist(folder, count):
    """Put the first images of MNIST's archives into a folder."""
    (folder / "MNIST/raw").mkdir(parents=True)
    for path in (HERE / "data/MNIST/raw").glob("*.gz"):
        header, size = (16, 784) if "images" in path.name else (8, 1)
        with gzip.open(path) as file:
            content = bytearray(file.read(header + count * size))
        content[4:8] = count.to_bytes(4, "big")
        (folder / "MNIST/raw" / path.stem).write_bytes(content)


def place(name, **settings):
    """Put a shrunk copy of a script into a new folder."""
    folder = Path(tempfile.mkdtemp(dir=FOLDERS.name))
    cut_mnist(folder / "data", 120)
    edit(Path(shutil.copy(HERE / "config.py", folder)), DEVICE="cpu")
    script = Path(shutil.copy(HERE / f"{name}.py", folder))
    edit(script, EPOCHS=4, BATCH_SIZE=24, LOG_EVERY=3)
    edit(script, **SCRIPTS[name] | settings)
    if name == C:  # a thousand pictures an epoch take it long
        change(script, r"randn\(1000", "randn(100")
    return script


def copy(script):
    """Copy a script with all its results into a new folder."""
    folder = Path(tempfile.mkdtemp(dir=FOLDERS.name))
    return shutil.copytree(script.parent, folder, dirs_exist_ok=True) / script.name


def start(folder, *command):
    """Run a command in a folder and return the finished process."""
    options = {"text": True, "capture_output": True, "timeout": 120}
    return subprocess.run(command, cwd=folder, check=False, **options)


def run(script, terminal=False):
    """Run the script in this process. Return what sys.exit says, and the output."""
    message, output = None, io.StringIO()
    output.isatty = lambda: terminal
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.delitem(sys.modules, "config", raising=False)
        patch.syspath_prepend(script.parent)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            message = stop.code
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return message, output.getvalue()


def finish(script):
    """Run the script, which must come to its end. Return its output."""
    message, output = run(script)
    assert message is None, message
    return output


def refused(script):
    """Return the one line with which the script must end, without harm to a file."""
    before = snapshot(script.parent)
    message, _ = run(script)
    assert isinstance(message, str) and len(message.splitlines()) == 1, message
    assert snapshot(script.parent) == before
    return message


def snapshot(folder):
    """Return every file but the scripts, with its content."""
    files = filter(Path.is_file, folder.rglob("*"))
    return {f.relative_to(folder): f.read_bytes() for f in files if f.suffix != ".py"}


def load(script):
    path = script.parent / "checkpoints" / f"{script.stem}.pt"
    return torch.load(path, weights_only=True)


def weights(script):
    """Return all that a run has learned."""
    return {k: v for k, v in load(script).items() if k in NETWORKS or "optimizer" in k}


def curves(script):
    """Return TensorBoard's curves {tag: [(step, value)]}, and its pictures' steps."""
    path = str(script.parent / "runs" / script.stem)
    events = EventAccumulator(path, size_guidance={"images": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    scalars = {tag: [(e.step, e.value) for e in scalars[tag]] for tag in scalars}
    assert "settings/text_summary" in events.Tags()["tensors"]
    images = events.Tags()["images"]
    return scalars, {tag: [e.step for e in events.Images(tag)] for tag in images}


def tiles(path, columns=8):
    """Return the pictures of a grid: float (rows, columns, size, size), 0 to 255."""
    grid = pil_to_tensor(Image.open(path).convert("RGB"))[0, 2:, 2:].float()
    size = grid.shape[1] // columns
    return grid.unfold(0, size - 2, size).unfold(1, size - 2, size)


def blocks(language):
    """Return the README's blocks of code in a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", README)


@pytest.fixture(scope="session")
def trained():
    """Return a function that gives a script and its process, run in the background:
    trained for 4 epochs, killed within or at the very end of the third, run twice at
    once, or without data."""
    made = {(name, None): place(name) for name in SCRIPTS}
    for name, moment in zip(SCRIPTS, ["if step % 10", "new.replace"] * 2):
        made[name, "killed"] = place(name, EPOCHS=3)
        insert(made[name, "killed"], "if epoch == 3: import os; os._exit(9)", moment)
    made[V, "first"] = made[V, "second"] = twice = place(V)
    # Each waits until the other one has written its checkpoint as well.
    insert(twice, "open(SAMPLES / f'{epoch} {time.time_ns()}', 'w')", "new.replace")
    wait = "while len(list(SAMPLES.glob(f'{epoch} *'))) < 2: time.sleep(0.01)"
    insert(twice, wait, "new.replace")
    made[V, "-O"] = place(V)
    shutil.rmtree(made[V, "-O"].parent / "data")
    with ThreadPoolExecutor(max(2, os.cpu_count())) as pool:
        runs = {}
        for key, script in made.items():
            flags = "-BO" if "-O" in key else "-B"
            runs[key] = pool.submit(start, HERE, sys.executable, flags, script)
        yield lambda name, how=None: (made[name, how], runs[name, how].result())


# ---- A run and what it leaves ----
@each_script
def test_training_prints_saves_and_shows(name, trained):
    script, process = trained(name)
    lines = process.stdout.splitlines()
    assert process.returncode == 0 and len(lines) == 6, process
    assert "scratch" in lines[0] and "\r" not in process.stdout
    assert str(script.parent / "samples" / name) in lines[1]
    assert all(f"epoch {i}/4" in lines[i + 1] for i in range(1, 5))

    checkpoint, parts = load(script), weights(script)
    assert checkpoint["epoch"] == 4 and "random_state" in checkpoint
    assert len(parts) == 4  # two networks and their optimizers
    for part in parts.keys() - NETWORKS:
        assert parts[part]["state"][0]["step"] == (40 if "critic" in part else 20)
    assert checkpoint["script"] == script.read_text("utf-8")
    head = checkpoint["script"].split("# ---- Data")[0]
    assert checkpoint["settings"].keys() == {*re.findall(r"(?m)^([A-Z_]+) = ", head)}
    samples = script.parent / "samples" / name
    files = sorted(path.name for path in samples.iterdir())
    assert files == [f"epoch_000{i}.png" for i in range(5)] + ["real.png"]
    untrained = tiles(samples / "epoch_0000.png")  # grey: its contrast is not stretched
    assert 40 < untrained.min() < untrained.max() < 215

    scalars, images = curves(script)
    tags = "loss/discriminator prob/real prob/fake quality/precision quality/recall"
    if name == W:
        tags = "loss/critic critic/wasserstein_distance critic/gradient_norm"
        tags += " critic/gradient_penalty"
    assert {*tags.split(), "loss/generator", "speed/images_per_second"} == {*scalars}
    for tag, points in scalars.items():
        each_epoch = tag.startswith(("quality", "speed"))
        # An epoch has 5 steps, and LOG_EVERY is 3.
        ends = [5, 10, 15, 20] if each_epoch else [3, 5, 8, 10, 13, 15, 18, 20]
        assert [step for step, _ in points] == ends, tag
        low, high = (0, 1) if tag.startswith(("prob", "quality")) else (-1e9, 1e9)
        assert all(low <= value <= high for _, value in points), tag
    assert images == {"images/real": [0], "images/fake": [0, 5, 10, 15, 20]}


CURVES = {
    V: {
        "loss/discriminator": "disc_loss",
        "loss/generator": "gen_loss",
        "prob/real": "real_output.mean()",
        "prob/fake": "fake_output.mean()",
    },
    W: {
        "loss/critic": "critic_loss",
        "loss/generator": "gen_loss",
        "critic/wasserstein_distance": "real_output.mean() - fake_output.mean()",
        "critic/gradient_norm": "slope",
        "critic/gradient_penalty": "penalty",
    },
}


@pytest.mark.parametrize("name", CURVES)
def test_what_changes_in_training_and_what_stays(name, trained, monkeypatch):
    script = place(name, LEARNING_RATE=0.0, EPOCHS=3, LOG_EVERY=1)
    monkeypatch.setattr(torch, "seen", [], raising=False)
    values = ", ".join(CURVES[name].values())
    insert(script, f"torch.seen.append((real, noise, {values}))", "if step % 10")
    finish(script)
    real, noise, *values = zip(*torch.seen)
    for tag, expected in zip(CURVES[name], values):
        found = [value for _, value in curves(script)[0][tag]]
        assert found == pytest.approx([value.item() for value in expected], abs=1e-5)
    early, late = weights(script), weights(trained(name)[0])
    for key in early.keys() & NETWORKS:
        still = [w for w in early[key] if torch.equal(early[key][w], late[key][w])]
        # The critic's last bias adds the same to all scores, so it has no gradient.
        assert still == (["11.bias"] if key == "critic" else []), key
    # Nothing learns and the noise is fixed, so both epochs draw the same 64 pictures.
    # BatchNorm still settles, so each is only most like itself.
    samples = script.parent / "samples" / name
    grids = [tiles(samples / f"epoch_000{i}.png").flatten(0, 1) for i in (2, 3)]
    likeness = torch.corrcoef(torch.cat(grids).flatten(1))[:64, 64:]
    assert torch.equal(likeness.argmax(dim=1), torch.arange(64))
    # The data are shuffled, and the noise is new in each step.
    first, second, third = torch.cat(real).flatten(1).chunk(3)
    assert not torch.equal(first, second)
    assert len(torch.cat(noise).unique(dim=0)) == 3 * 120
    if name == V:  # each image once an epoch
        assert len(first.unique(dim=0)) == len(third.unique(dim=0)) == 120


@each_script
def test_killed_and_started_again_is_as_never_stopped(name, trained):
    straight = trained(name)[0]
    script, process = trained(name, "killed")
    assert process.returncode == 9 and load(script)["epoch"] == 2
    shown = curves(script)[1]["images/fake"]  # each epoch is seen at once
    assert shown[-1] == (10 if name in (V, C) else 15)
    shutil.copy(straight, script)  # EPOCHS = 4, and no line that kills it
    time.sleep(1)  # TensorBoard puts runs in order by the second of their start
    output = finish(script)
    assert "after epoch 2 of" in output and "has changed" in output
    torch.testing.assert_close(weights(script), weights(straight), rtol=0, atol=0)
    (scalars, images), (expected, expected_images) = curves(script), curves(straight)
    del scalars["speed/images_per_second"], expected["speed/images_per_second"]
    assert scalars == expected and images == expected_images
    assert snapshot(script.parent / "samples") == snapshot(straight.parent / "samples")


def test_a_terminal_sees_a_line_that_updates_and_ctrl_c_keeps_the_last_epoch():
    script = place(V)
    insert(script, "if epoch == 2: signal.raise_signal(signal.SIGINT)", "if step % 10")
    message, output = run(script, terminal=True)
    assert "again" in message and load(script)["epoch"] == 1
    *updates, last = output.splitlines(keepends=True)[2:]
    assert updates and "recall" in last and len(last) > max(map(len, updates))
    assert all("%" in line and line.endswith("min left \r") for line in updates)


def test_two_runs_at_once_both_end_well(trained):
    script, process = trained(V, "first")
    assert process.returncode == trained(V, "second")[1].returncode == 0, process
    torch.testing.assert_close(weights(script), weights(trained(V)[0]), rtol=0, atol=0)


def test_load_false_starts_over_and_the_seed_decides(trained):
    script = copy(trained(V)[0])
    edit(script.parent / "config.py", LOAD=False)
    assert "epoch 1/4" in finish(script)
    torch.testing.assert_close(weights(script), weights(trained(V)[0]), rtol=0, atol=0)
    scalars, images = curves(script)
    assert len(scalars["quality/recall"]) == 4 and len(images["images/real"]) == 1
    edit(script.parent / "config.py", SEED=1)
    edit(script, EPOCHS=1)
    before = snapshot(script.parent)
    finish(script)
    after = snapshot(script.parent)
    changed = {path.stem for path, _ in before.items() ^ after.items()}
    assert changed >= {"epoch_0000", "epoch_0001", V}


def test_a_checkpoint_outlives_harmless_changes(trained):
    script = copy(trained(V)[0])
    checkpoint = load(script)
    for name in "gen_optimizer", "disc_optimizer":  # as another version of torch has it
        (group,) = checkpoint[name]["param_groups"]
        group["foreign_option"] = group.pop("foreach")
    del checkpoint["settings"]["TEST_SEED"]
    before = snapshot(script.parent)
    torch.save(checkpoint, script.parent / "checkpoints/other.pt")
    script = Path(shutil.copy(script, script.with_name("other.py")))
    edit(script, LOG_EVERY=2, EPOCHS=5)
    insert(script, "EXTRA = (torch.nn.ReLU, 0.2)  # a constant more", "LOG_EVERY")
    rates = r"(?<=discriminator.parameters\(\), )LEARNING_RATE, BETAS"
    change(script, rates, "0.25, (0.25, 0.5)")
    output = finish(script)
    assert "after epoch 4" in output and "has changed" in output
    (group,) = load(script)["disc_optimizer"]["param_groups"]
    assert group["lr"] == 0.25 and group["betas"] == (0.25, 0.5)  # as the line says
    assert "5 epochs are done" in finish(script)  # what was written can be loaded
    assert before.items() <= snapshot(script.parent).items()  # results are kept apart
    assert (script.parent / "samples/other/epoch_0005.png").exists()


@each_script
def test_one_flip_draws_pictures_and_changes_nothing(name, trained):
    script = copy(trained(name)[0])
    before = snapshot(script.parent)
    edit(script.parent / "config.py", TEST=True)
    assert "has changed" not in finish(script)
    after = snapshot(script.parent)
    names = {path.name for path, _ in before.items() ^ after.items()}
    assert names == {"test.png", "interpolation.png", "nearest.png", "epochs.gif"}
    edit(script.parent / "config.py", TRAIN=False)  # TEST alone draws the same
    finish(script)
    assert snapshot(script.parent) == after

    samples = script.parent / "samples" / name
    drawn, pairs = tiles(samples / "test.png"), tiles(samples / "nearest.png", 16)
    real = datasets.MNIST(script.parent / "data").data.unsqueeze(1).float()
    real = torch.nn.functional.interpolate(real, drawn.shape[-1], mode="bilinear")
    assert torch.equal(pairs[:, 0::2], drawn)
    for sample, shown in zip(drawn.flatten(0, 1), pairs[:, 1::2].flatten(0, 1)):
        assert (real - shown).abs().amax(dim=(1, 2, 3)).min() <= 1  # it is a real image
        nearest = (real - sample).pow(2).sum(dim=(1, 2, 3)).min()
        assert (shown - sample).pow(2).sum() <= 1.01 * nearest  # and none is nearer
    ends = tiles(samples / "interpolation.png", 10)[:, ::9].transpose(0, 1)
    assert (ends - drawn[:2]).abs().max() <= 1
    assert (real - tiles(samples / "real.png")[0, 0]).abs().amax((1, 2, 3)).min() <= 1
    with Image.open(samples / "epochs.gif") as gif:
        assert gif.n_frames == 5  # untrained, and four epochs
        gif.seek(4)
        assert gif.info["duration"] >= 2000  # milliseconds: the last one stays

    edit(script, TEST_SEED=5)  # draws other samples from the same checkpoint
    finish(script)
    assert not torch.equal(tiles(samples / "test.png"), drawn)


def test_a_folder_of_pictures(monkeypatch):
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
    message, output = run(script, terminal=True)
    assert message is None and "5 pictures\r" in output
    assert output.count("Skipped own") == 2 and "cut" in output and "notes" in output
    images = runpy.run_path(str(script))["load_images"]()
    assert images.shape == (5, 3, 64, 64) and images.dtype == torch.uint8
    red, lime, blue = images[0].float().mean(dim=2)
    assert red[:30].min() > 190 and blue[34:].min() > 190 and lime.max() < 50
    assert images[1].min() == 255 and not images[2].any()  # transparent is white
    monkeypatch.setenv("HOME", str(script.parent))
    edit(script, DATASET="~/own", BATCH_SIZE=6)
    assert "5 images: BATCH_SIZE" in refused(script)
    shutil.rmtree(folder)
    assert "DATASET" in refused(script)


# ---- What goes wrong ----
BAD = {
    V: "BATCH_SIZE=121 BATCH_SIZE=1.5 BATCH_SIZE=1 EPOCHS=0 EPOCHS=2.0 NOISE_DIM=0 "
    "LOG_EVERY=0 LEARNING_RATE='3e-4' LEARNING_RATE=-1.0 BETAS=(0.5,1.5) "
    "BETAS=(0,0.9) BETAS=0.5 NORMALIZE_STD=0 TEST_SEED='x' "
    "LEARNING_RATE=torch.ones(1).numpy()[0]",  # no checkpoint could be loaded
    B: "HIDDEN_DIM=0",
    W: "FEATURES=0 CRITIC_STEPS=0 DATASET='cifar'",
    "config": "TRAIN=False SEED='0' DEVICE='gpu' DEVICE='cuda:99' "
    "CALLBACKS_PATH=__file__ SAMPLES_PATH=__file__ TENSORBOARD_PATH=__file__",
}


@pytest.mark.parametrize("name, bad", [(n, b) for n in BAD for b in BAD[n].split()])
def test_what_cannot_work_is_refused_by_name(name, bad):
    script = place(V if name == "config" else name)
    setting, value = bad.split("=")
    change(script.with_name(f"{name}.py"), f"^{setting} = .*", f"{setting} = {value}")
    # config.py is a file, so no folder can be made there.
    named = "config.py" if "__file__" in bad else setting
    assert named in refused(script)


def test_folders_and_data_that_fail_are_named_with_what_to_do(trained, monkeypatch):
    script = place(V)
    images = script.parent / "data/MNIST/raw/train-images-idx3-ubyte"
    os.truncate(images, 5000)  # as a kill while unpacking leaves it
    assert "MNIST/raw" in refused(script)
    images.rename(f"{images}.gz")  # a damaged archive
    assert "MNIST/raw" in refused(script)
    process = trained(V, "-O")[1]
    assert process.returncode == 1 and len(process.stderr.splitlines()) == 1
    assert "refused" in process.stderr  # the cause
    colours = refused(place(W, DATASET="cifar10"))
    assert "refused" in colours and "cifar-10-python.tar.gz" in colours
    # No folder can be read as a file: an error even for an administrator
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: dir.read_bytes())
    assert "checkpoints" in refused(place(V))


@pytest.mark.parametrize("right", ["nn.ReLU", "mnist.data"])
def test_a_mistake_in_the_code_shows_its_own_line(right):
    script = place(V)
    change(script, right, right + "x")
    with pytest.raises(AttributeError) as caught:
        run(script)
    last = caught.traceback[-1]
    assert last.path == script and right + "x" in str(last.statement)


def test_checkpoints_that_are_bad_or_of_another_run_are_refused(trained):
    script = copy(trained(V)[0])
    change(script, "512", "500")
    assert "size mismatch" in refused(script)
    # The first setting that differs is named, so these are in the order of the last.
    for name, value in ("BETAS", (0.1, 0.9)), ("NOISE_DIM", 7), ("LEARNING_RATE", 0.5):
        edit(script, **{name: value})
        message = refused(script)
        assert f"{name} = {value}" in message and "LOAD = False" in message

    shutil.copy(trained(V)[0], script)
    path = script.parent / "checkpoints/vanilla_gan.pt"
    good, middle = path.read_bytes(), path.stat().st_size // 2
    altered = good[:middle] + b"altered" + good[middle + 7 :]
    touch = {"__reduce__": lambda _: (Path.touch, (script.parent / "executed",))}
    evil = {**load(script), "epoch": type("Malicious", (), touch)()}
    unfit, no_epoch = load(script), load(script)
    unfit["disc_optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    del no_epoch["epoch"]
    # What is no checkpoint at all is written as it is.
    for bad in good[:middle], b"", b"no zip", altered, evil, unfit, no_epoch:
        torch.save(bad, path)
        if isinstance(bad, bytes):
            path.write_bytes(bad)
        assert path.name in refused(script)


@pytest.mark.filterwarnings("error")  # no line but that of the script
@pytest.mark.parametrize("name", [V, W])
def test_a_diverging_run_is_seen_and_not_saved(name, trained):
    script = copy(trained(name)[0])
    edit(script, EPOCHS=6)
    insert(script, "if epoch == 6: generator[0].weight.data /= 0", "if step % 10")
    message, output = run(script)
    assert "LEARNING_RATE" in message and len(message.splitlines()) == 1
    assert load(script)["epoch"] == 5 and "epoch 6/6" in output
    assert max(step for step, _ in curves(script)[0]["loss/generator"]) == 30


# ---- The text of the scripts ----
@pytest.mark.parametrize("name", [B, C, W])
def test_shared_lines_are_identical(name):
    # Settings, data, networks and losses are not shared.
    apart = r"(?ms)\A.*?(?=^import )|^# ---- Settings.*?(?=^# ---- House)"
    apart += r"|  # \(N, [^\n]*"  # shapes
    own = r"for name in|answers =|NORMALIZE_STD|import pil_to|from PIL"
    if name == W:  # another network, no quality, and steps of its own
        apart += "|^ +for step in.*?(?=if step % 10)"
        own += "|[Cc]ritic|disc|NOISE_DIM|precision|recall|goal|tags|held_out"
        own += "|batches|load_images|real_pixels|images.:64|speed =|steps =|{means"
        own += "|first,"  # epochs.gif at half the size
    texts = [(HERE / f"{script}.py").read_text("utf-8") for script in (V, name)]
    first, second = (re.findall(r".*\S", re.sub(apart, "", text)) for text in texts)
    changed = [line for line in difflib.ndiff(first, second) if line[0] in "+-"]
    drifted = [line for line in changed if not re.search(own, line)]
    assert not drifted, "\n".join(drifted)
    # The patterns have not swallowed the files.
    assert len(second) - len(changed) > (70 if name == W else 120)


def test_importing_only_defines_and_nothing_depends_on_assert(tmp_path):
    files = [*(f"{name}.py" for name in SCRIPTS), "config.py"]
    for file in files:
        text = Path(shutil.copy(HERE / file, tmp_path)).read_text("utf-8")
        assert not re.search(r"(?m)^ *assert ", text)
    code = f"import config as c, {', '.join(SCRIPTS)}\n"
    code += "print(c.TRAIN, c.LOAD, c.TEST, c.SEED, c.DEVICE)"
    process = start(tmp_path, sys.executable, "-Bc", code)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "True True False 0 None\n"
    assert {path.name for path in tmp_path.iterdir()} == set(files)


# ---- Values ----
@each_script
def test_images_and_networks_keep_to_their_shapes_and_ranges(name, monkeypatch):
    module = importlib.import_module(name)
    size = (3, 32, 32) if name == W else (28, 28)
    grey = torch.arange(256, dtype=torch.uint8)  # one image of each
    for mean, std in (0.1307, 0.3081), (0.5, 0.5):  # the last one stays
        monkeypatch.setattr(module, "NORMALIZE_MEAN", mean, raising=False)
        monkeypatch.setattr(module, "NORMALIZE_STD", std, raising=False)
        real = module.normalize(grey.view(-1, *[1] * len(size)).expand(256, *size))
        pixels = module.to_pixels(real)
        assert torch.allclose(pixels, grey.view(-1, 1, 1, 1) / 255, atol=1e-6)
        assert pixels.shape[1:] == ((3, 64, 64) if name == W else (1, 28, 28))
    torch.manual_seed(0)
    generator = module.Generator()
    for weight in generator.parameters():
        weight.data *= 100  # drives it to its limits
    images = generator(torch.randn(8, module.NOISE_DIM, *[1, 1] * (name == W)))
    assert images.shape[1:] == real.shape[1:]
    assert real.min() <= images.min() < real.min() + 0.01
    assert real.max() >= images.max() > real.max() - 0.01
    answers = (module.Critic if name == W else module.Discriminator)()(100 * images)
    assert answers.shape == ((8, 1, 1, 1) if name == W else (8, 1))
    assert (answers.min() >= 0 and answers.max() <= 1) == (name == V)


def test_mnist_is_complete_and_cifar10_keeps_its_colours(tmp_path, monkeypatch):
    module = importlib.import_module(V)
    raw, unpacked = HERE / "data/MNIST/raw", shutil.ignore_patterns("*-ubyte")
    shutil.copytree(raw, tmp_path / "MNIST/raw", ignore=unpacked)
    monkeypatch.setattr(module.config, "DATA_PATH", tmp_path)
    assert [len(module.load_images(train)) for train in (True, False)] == [60000, 10000]
    data = torch.randint(256, (9, 32, 32, 3), dtype=torch.uint8)
    fake = type("CIFAR10", (), {"data": data.numpy()})
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **__: fake)
    images = importlib.import_module(W).load_images()
    assert images.shape == (9, 3, 32, 32) and images.is_contiguous()
    assert torch.equal(images[:, 1], data[..., 1])


def test_precision_and_recall_order_good_and_bad_pictures(tmp_path):
    module = importlib.import_module(V)
    torch.manual_seed(0)
    cut_mnist(tmp_path, 4000)
    mnist = datasets.MNIST(tmp_path)
    held_out, real = (mnist.data / 255).split([1000, 3000])

    def scores(fake):
        return module.share_near(fake, held_out), module.share_near(held_out, fake)

    precision, recall = scores(real[:1000])
    assert precision > 0.9 and recall > 0.9
    assert scores(real[:250].repeat(4, 1, 1))[1] < recall - 0.2  # few, repeated
    assert scores(real[mnist.targets[1000:] != 4][:1000])[1] < recall - 0.01  # no 4
    assert scores(real[:1].repeat(1000, 1, 1))[1] < 0.01  # collapse
    assert max(scores(torch.rand(1000, 28, 28))) == 0  # noise
    precision, recall = scores(torch.nn.functional.avg_pool2d(real[:1000], 3, 1, 1))
    assert precision > 0.9 and recall < 0.3  # blurred: only recall sees it


@pytest.mark.parametrize("name", [V, B, C])
def test_losses_at_known_points_and_their_direction(name):
    module = importlib.import_module(name)
    logits = torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1).expand(3, 4, 1)
    answers = logits.sigmoid() if name == V else logits  # no, undecided, yes
    found = [module.get_disc_loss(*pair) for pair in zip(answers, answers.flip(0))]
    found += [module.get_gen_loss(answer) for answer in answers]
    expected = 2 * [3.0486, 0.6931, 0.0486]
    assert torch.stack(found).tolist() == pytest.approx(expected, abs=1e-4)


def test_logits_and_black_pixels_keep_their_gradient():
    vanilla, logits = importlib.import_module(V), importlib.import_module(B)
    sure = torch.full((4, 1), -200.0, requires_grad=True)
    vanilla.get_gen_loss(sure.sigmoid()).backward()
    assert vanilla.get_gen_loss(sure.sigmoid()) == 100 and not sure.grad.any()
    logits.get_gen_loss(sure).backward()
    assert logits.get_gen_loss(sure) == 200 and (sure.grad == -0.25).all()  # mean of 4
    discriminator = logits.Discriminator()
    discriminator(torch.zeros(2, 784)).sum().backward()
    assert discriminator[0][0].weight.grad.any()


def test_wasserstein_losses_and_gradient_penalty():
    module, seen = importlib.import_module(W), []
    high, low = torch.full((4, 1, 1, 1), 2.0), torch.full((4, 1, 1, 1), -1.0)
    assert module.get_critic_loss(high, low, 0.5) == -2.5  # real high: good for C
    assert module.get_gen_loss(high) == -2 and module.get_gen_loss(low) == 1

    critic = torch.nn.Conv2d(3, 1, 8)  # the length of its weight is the slope
    for length in 0.5, 1.0, 3.0, 0.0:  # 0 comes last, as it cannot be scaled again
        critic.weight.data *= length / critic.weight.data.norm()
        penalty, slope = module.gradient_penalty(critic, *torch.rand(2, 5, 3, 8, 8))
        assert penalty.item() == pytest.approx(10 * (length - 1) ** 2, abs=1e-4)
        assert slope.item() == pytest.approx(length, abs=1e-4)
        penalty.backward()
        assert critic.weight.grad.isfinite().all()  # of a slope of 0 too

    def critic(images):  # its gradient at x is x, so each image has a slope of its own
        seen.append(images.detach())
        return images.pow(2).sum(dim=(1, 2, 3)) / 2

    real = torch.ones(6, 3, 4, 4)
    penalty, slope = module.gradient_penalty(critic, real, -real)
    slopes = seen[0].flatten(1).norm(dim=1)
    assert penalty.item() == pytest.approx(10 * (slopes - 1).pow(2).mean().item(), 1e-4)
    assert slope.item() == pytest.approx(slopes.mean().item(), 1e-4)
    assert seen[0].abs().max() <= 1 and len(seen[0].flatten().unique()) == 6


# ---- README ----
def test_the_readme_names_what_is_there(trained):
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    headings = re.findall(r"(?m)^#+ (.*)", README)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    pictures = {f".github/images/{n}" for n in os.listdir(HERE / ".github/images")}
    assert pictures == {link for link in links if link.startswith(".github/images/")}
    for link in set(links) - pictures:
        assert link[1:] in anchors or "https:" in link or (HERE / link).exists(), link
    known = "".join(path.read_text("utf-8") for path in HERE.glob("*.py"))
    for name in set(re.findall(r"`([A-Z_]{4,})\b", README)):
        assert re.search(rf"(?m)^{name} = ", known), name
    (printed,) = [line for line in blocks("text") if line.startswith("epoch")]
    line = trained(V)[1].stdout.splitlines()[2] + "\n"
    assert re.sub(r"[\d.,]+", "0", printed) == re.sub(r"[\d.,]+", "0", line)


def test_the_commands_of_the_readme(trained):
    folder = copy(trained(V)[0]).parent
    commands = [command for block in blocks("sh") for command in block.split(" && ")]
    assert {"python vanilla_gan.py\n", "python -m pytest\n"} < {*commands}
    for command in commands:
        if command.startswith("tensorboard"):
            words = "-m", "tensorboard.main", "--inspect", *command.split()[1:]
            assert "quality/recall" in start(folder, sys.executable, *words).stdout
        if command.startswith("diff") and shutil.which("diff"):  # Windows may have none
            assert "BCEWithLogitsLoss" in start(HERE, *command.split()).stdout
    (code,) = [block for block in blocks("python") if "save_image" in block]
    process = start(folder, sys.executable, "-Bc", code)
    assert process.returncode == 0 and len(list(folder.glob("digit_*"))) == 10, process


def test_the_average_generator_of_the_exercise():
    script = place(B, EPOCHS=1)
    (diff,) = blocks("diff")
    for sign, old, added in re.findall(r"(?m)^([ -])(.*\n)((?:\+.*\n)*)", diff):
        kept = old if sign == " " else ""
        change(script, re.escape(old), kept + re.sub(r"(?m)^\+", "", added))
    finish(script)
    assert "averaged" in load(script)
