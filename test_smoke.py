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

import numpy
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
MOMENTS = "if step % 10", "new.replace"  # within an epoch, and after all else of it
FOLDERS = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
NOWHERE = "http://127.0.0.1:1"  # refuses every connection
os.environ |= {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)
sys.dont_write_bytecode = True
each_script = pytest.mark.parametrize("name", SCRIPTS)


# ---- Helpers ----
def change(path, old, new):
    """Replace what a pattern finds in a file."""
    text, count = re.subn(f"(?m){old}", lambda _: new, path.read_text("utf-8"))
    assert count, f"{old} is not in {path.name}"
    path.write_text(text, "utf-8")


def edit(path, **settings):
    """Replace the values of settings, each on the line that sets it."""
    for name, value in settings.items():
        change(path, rf"^{name} = .*?(?=  #|$)", f"{name} = {value!r}")


def insert(path, line, before):
    """Insert a line before the one that starts with `before`, indented like it."""
    (indent,) = re.findall(f"(?m)^( *){before}", path.read_text("utf-8"))
    change(path, f"^(?={indent}{before})", f"{indent}{line}\n")


def mnist(kind, count):
    """Return the first bytes of one of MNIST's archives: header and content."""
    header, size = (16, 784) if "images" in kind else (8, 1)
    with gzip.open(HERE / "data/MNIST/raw" / f"{kind}-ubyte.gz") as file:
        return bytearray(file.read(header)), bytearray(file.read(count * size))


def training_images(count):
    content = mnist("train-images-idx3", count)[1]
    return torch.frombuffer(content, dtype=torch.uint8).view(-1, 1, 28, 28).float()


def place(name, **settings):
    """Put a shrunk copy of a script into a new folder."""
    folder = Path(tempfile.mkdtemp(dir=FOLDERS.name))
    raw = folder / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for part, count in ("train", 120), ("t10k", 100):
        for kind in f"{part}-images-idx3", f"{part}-labels-idx1":
            header, content = mnist(kind, count)
            header[4:8] = count.to_bytes(4, "big")
            (raw / f"{kind}-ubyte").write_bytes(header + content)
    edit(Path(shutil.copy(HERE / "config.py", folder)), DEVICE="cpu")
    script = Path(shutil.copy(HERE / f"{name}.py", folder))
    small = {"EPOCHS": 4, "BATCH_SIZE": 24, "LOG_EVERY": 3, **SCRIPTS[name]}
    edit(script, **{**small, **settings})
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
    """Run the script in this process, which saves importing torch again. Return what
    sys.exit says, and the output."""
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
    """Return every file that a run left, with its content."""
    parts = [folder / part for part in ("checkpoints", "samples", "runs")]
    paths = [path for part in parts for path in part.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths}


def load(script):
    path = script.parent / "checkpoints" / f"{script.stem}.pt"
    return torch.load(path, weights_only=True)


def weights(script):
    """Return all that a run has learned."""
    return {k: v for k, v in load(script).items() if k in NETWORKS or "optimizer" in k}


def check_same(weights, expected):
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)  # bit for bit


def curves(script):
    """Return TensorBoard's curves {tag: [(step, value)]}, and its pictures' steps."""
    path = str(script.parent / "runs" / script.stem)
    events = EventAccumulator(path, size_guidance={"images": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    scalars = {tag: [(e.step, e.value) for e in scalars[tag]] for tag in scalars}
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
    """Return a function that gives a script and its process: trained for 4 epochs,
    killed in the third at one of MOMENTS, run twice at once, or without data. They run
    in the background."""
    made = {(name, None): place(name) for name in SCRIPTS}
    for moment in MOMENTS:
        made[V, moment] = place(V)
        kill = "if epoch == 3: import os; os.kill(os.getpid(), 9)"
        insert(made[V, moment], kill, moment)
    made[V, "once"] = made[V, "twice"] = twice = place(V)
    # Each waits until the other one has written its checkpoint as well.
    insert(twice, "open(SAMPLES / f'{epoch} {time.time_ns()}', 'w')", MOMENTS[1])
    wait = "while len(list(SAMPLES.glob(f'{epoch} *'))) < 2: time.sleep(0.01)"
    insert(twice, wait, MOMENTS[1])
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
    assert all(f"epoch {i}/4" in lines[i + 1] for i in range(1, 5))

    checkpoint, parts = load(script), weights(script)
    settings = checkpoint["settings"]
    assert checkpoint["epoch"] == settings["EPOCHS"] == len(parts) == 4
    assert checkpoint["script"] == script.read_text("utf-8") and "BETAS" in settings
    for part in set(parts) - set(NETWORKS):
        steps = 20 * (settings["CRITIC_STEPS"] if "critic" in part else 1)
        assert parts[part]["state"][0]["step"] == steps
    samples = sorted(path.name for path in (script.parent / "samples" / name).iterdir())
    assert samples == [f"epoch_000{i}.png" for i in range(5)] + ["real.png"]

    scalars, images = curves(script)
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
def test_what_changes_in_training_and_what_stays(name, trained):
    script = place(name, LEARNING_RATE=0.0, EPOCHS=3)
    insert(script, "seen = []", "fixed_noise = ")
    insert(script, "seen.append((real, noise))", r"history\[step\] =")
    insert(script, "torch.save(seen, SAMPLES / 'seen')", "# ---- Test")
    finish(script)
    early, late = weights(script), weights(trained(name)[0])
    for key in set(early) & set(NETWORKS):
        still = [w for w in early[key] if torch.equal(early[key][w], late[key][w])]
        # The last bias of the critic cancels out between real images and fakes.
        assert still == (["11.bias"] if key == "critic" else []), key
    # Nothing learns, so each picture is most like itself. BatchNorm still settles.
    samples = script.parent / "samples" / name
    grids = [tiles(samples / f"epoch_000{i}.png").flatten(0, 1) for i in (2, 3)]
    likeness = torch.corrcoef(torch.cat(grids).flatten(1))[:64, 64:]
    assert torch.equal(likeness.argmax(dim=1), torch.arange(64))
    # The data are shuffled, and the noise is new in each step.
    real, noise = (torch.cat(part) for part in zip(*torch.load(samples / "seen")))
    first, second, third = real.flatten(1).chunk(3)
    assert len(noise.unique(dim=0)) == 3 * 120 and not torch.equal(first, second)
    if name == V:  # each image once an epoch
        assert len(first.unique(dim=0)) == len(third.unique(dim=0)) == 120


@pytest.mark.parametrize(
    "name, moment", [(name, None) for name in SCRIPTS] + [(V, m) for m in MOMENTS]
)
def test_stopped_or_killed_and_started_again_is_as_never_stopped(name, moment, trained):
    straight = trained(name)[0]
    if moment:
        script, process = trained(name, moment)
        assert process.returncode != 0 and load(script)["epoch"] == 2
        shown = curves(script)[1]["images/fake"]  # each epoch is seen at once
        assert shown[-1] == (15 if moment == MOMENTS[1] else 10)
        shutil.copy(straight, script)  # without the line that kills it
        time.sleep(1)  # TensorBoard puts runs in order by the second of their start
    else:
        script = place(name, EPOCHS=2)
        finish(script)
        edit(script, EPOCHS=4)
    output = finish(script)
    assert "after epoch 2 of" in output and "has changed" in output
    check_same(weights(script), weights(straight))
    (scalars, images), (expected, expected_images) = curves(script), curves(straight)
    del scalars["speed/images_per_second"], expected["speed/images_per_second"]
    assert scalars == expected and images == expected_images
    for path in (straight.parent / "samples" / name).iterdir():
        other = script.parent / "samples" / name / path.name
        assert path.read_bytes() == other.read_bytes()


def test_a_terminal_sees_a_line_that_updates_and_ctrl_c_keeps_the_last_epoch():
    script = place(V)
    press = "if epoch == 2: signal.raise_signal(signal.SIGINT)"
    insert(script, press, r"history\[step\] =")
    message, output = run(script, terminal=True)
    assert "again" in message and load(script)["epoch"] == 1
    *updates, last = output.splitlines(keepends=True)[2:]
    assert updates and "recall" in last and len(last) > max(map(len, updates))
    assert all("%" in line and line.endswith("min left \r") for line in updates)


def test_two_runs_at_once_both_end_well(trained):
    script, process = trained(V, "once")
    assert process.returncode == trained(V, "twice")[1].returncode == 0, process
    check_same(weights(script), weights(trained(V)[0]))


def test_load_false_starts_over(trained):
    script = copy(trained(V)[0])
    first = weights(script)
    edit(script.parent / "config.py", LOAD=False)
    assert "epoch 1/4" in finish(script)
    check_same(weights(script), first)  # the same seed gives the same run
    scalars, images = curves(script)
    assert len(scalars["quality/recall"]) == 4 and len(images["images/real"]) == 1


def test_a_checkpoint_outlives_harmless_changes(trained):
    script = copy(trained(V)[0])
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
    rates = r"(?<=discriminator.parameters\(\), )LEARNING_RATE, BETAS"
    change(script, rates, "0.25, (0.25, 0.5)")
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


@each_script
def test_one_flip_draws_pictures_and_changes_nothing(name, trained):
    script = copy(trained(name)[0])
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
    size, real = drawn.shape[-1], training_images(120)
    if size != 28:
        real = torch.nn.functional.interpolate(real, size=size, mode="bilinear")
    assert torch.equal(pairs[:, 0::2], drawn)
    for sample, shown in zip(drawn.flatten(0, 1), pairs[:, 1::2].flatten(0, 1)):
        assert (real - shown).abs().amax(dim=(1, 2, 3)).min() <= 1  # it is a real image
        nearest = (real - sample).pow(2).sum(dim=(1, 2, 3)).min()
        assert (shown - sample).pow(2).sum() <= 1.01 * nearest  # and none is nearer
    walks = tiles(samples / "interpolation.png", 10)[:, ::9]
    assert (walks[:, 0] - drawn[0]).abs().max() <= 1
    assert (walks[:, 1] - drawn[1]).abs().max() <= 1
    first = tiles(samples / "real.png")[0, 0]
    assert (real - first).abs().amax(dim=(1, 2, 3)).min() <= 1
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


# ---- What goes wrong ----
BAD = {
    V: "BATCH_SIZE=121 BATCH_SIZE=1.5 BATCH_SIZE=1 EPOCHS=0 EPOCHS=2.0 NOISE_DIM=0 "
    "LOG_EVERY=0 LEARNING_RATE='3e-4' LEARNING_RATE=-1.0 BETAS=(0.5,1.5) "
    "BETAS=(0,0.9) BETAS=0.5 NORMALIZE_STD=0",
    B: "HIDDEN_DIM=0",
    W: "FEATURES=0 CRITIC_STEPS=0 DATASET='cifar'",
    "config": "TRAIN=False SEED='x' DEVICE='gpu' DEVICE='cuda:99' "
    "CALLBACKS_PATH=__file__ SAMPLES_PATH=__file__ TENSORBOARD_PATH=__file__",
}


@pytest.mark.parametrize("name, bad", [(n, b) for n in BAD for b in BAD[n].split()])
def test_what_cannot_work_is_refused_by_name(name, bad):
    script = place(V if name == "config" else name)
    setting, value = bad.split("=")
    change(script.with_name(f"{name}.py"), f"^{setting} = .*", f"{setting} = {value}")
    named = "config.py" if "__file__" in bad else setting  # no folder can be a file
    assert named in refused(script)


def test_folders_and_data_that_fail_are_named_with_what_to_do(trained, monkeypatch):
    script = place(V)
    raw = script.parent / "data/MNIST/raw"
    images = raw / "train-images-idx3-ubyte"
    content = images.read_bytes()
    images.write_bytes(content[:5000])  # as a kill while unpacking leaves it
    assert "MNIST/raw" in refused(script)
    images.unlink()
    archive = raw / "train-images-idx3-ubyte.gz"
    archive.write_bytes(b"damaged")
    assert "MNIST/raw" in refused(script) and archive.read_bytes() == b"damaged"
    process = trained(V, "-O")[1]
    assert process.returncode == 1 and len(process.stderr.splitlines()) == 1
    assert "refused" in process.stderr  # the cause
    colours = refused(place(W, DATASET="cifar10"))
    assert "refused" in colours and "cifar-10-python.tar.gz" in colours

    def refuse(dir):  # even to an administrator
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert "checkpoints" in refused(place(V))


@pytest.mark.parametrize("right", ["nn.ReLU", "mnist.data"])
def test_a_mistake_in_the_code_shows_its_own_line(right):
    script = place(V)
    change(script, right, right + "x")
    with pytest.raises(AttributeError) as caught:
        run(script)
    last = caught.traceback[-1]
    assert last.path == script and right + "x" in str(last.statement)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_checkpoints_that_are_bad_or_of_another_run_are_refused(trained, monkeypatch):
    script = copy(trained(V)[0])
    text = script.read_text("utf-8")
    changed = {"LEARNING_RATE": 0.5, "NOISE_DIM": 7, "BETAS": (0.1, 0.9)}
    for setting, value in changed.items():
        edit(script, **{setting: value})
        message = refused(script)
        assert f"{setting} = {value}" in message and "LOAD = False" in message
        script.write_text(text, "utf-8")
    change(script, "512", "500")
    assert "size mismatch" in refused(script)
    script.write_text(text, "utf-8")

    monkeypatch.chdir(script.parent)
    path = script.parent / "checkpoints/vanilla_gan.pt"
    good, middle = path.read_bytes(), path.stat().st_size // 2
    flipped = bytes(255 - byte for byte in good[middle : middle + 9])
    flipped = good[:middle] + flipped + good[middle + 9 :]
    evil, foreign = {**load(script), "epoch": Malicious()}, {"w": torch.zeros(3)}
    for bad in good[:middle], b"", b"no checkpoint", flipped, evil, foreign:
        torch.save(bad, path)
        if isinstance(bad, bytes):
            path.write_bytes(bad)
        assert path.name in refused(script) and not Path("executed").exists()


@pytest.mark.parametrize("name", [V, W])
def test_a_diverging_run_is_seen_and_not_saved(name, trained):
    script = copy(trained(name)[0])
    edit(script, EPOCHS=6)
    nan = "[weight.data.fill_(torch.nan) for weight in generator.parameters()]"
    insert(script, f"if epoch == 6: {nan}", r"history\[step\] =")
    message, output = run(script)
    assert "LEARNING_RATE" in message and len(message.splitlines()) == 1
    assert load(script)["epoch"] == 5 and "epoch 6/6" in output
    assert max(step for step, _ in curves(script)[0]["loss/generator"]) == 30


# ---- The text of the scripts ----
def shared_lines(name, update):
    """Return a script's lines outside settings, data, networks and losses, and, if so
    wanted, outside the two updates."""
    text = (HERE / f"{name}.py").read_text("utf-8")
    own = r"(?ms)\A.*?(?=^import )|^# ---- Settings.*?(?=^# ---- House)"
    if not update:
        own += "|^ +for step in.*?(?=if step % 10)"
    text = re.sub(own, "", text)
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
        assert not re.search(r"(?m)^ *assert ", text)
    process = start(tmp_path, sys.executable, "-Bc", f"import {', '.join(SCRIPTS)}")
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert {path.name for path in tmp_path.iterdir()} == set(files)


# ---- Values ----
@each_script
def test_images_and_networks_keep_to_their_shapes_and_ranges(name, monkeypatch):
    module = importlib.import_module(name)
    size = (3, 32, 32) if name == W else (28, 28)
    grey = torch.arange(256, dtype=torch.uint8)  # one image of each
    for mean, std in (0.1307, 0.3081), (0.5, 0.5):
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
    data = numpy.arange(9 * 32 * 32 * 3, dtype="uint8").reshape(9, 32, 32, 3)
    fake = type("CIFAR10", (), {"data": data})
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **__: fake)
    images = importlib.import_module(W).load_images()
    assert images.shape == (9, 3, 32, 32) and images.is_contiguous()
    assert torch.equal(images[:, 1], torch.from_numpy(data)[..., 1])


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


# ---- README ----
def test_the_readme_names_what_is_there(trained):
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    headings = re.findall(r"(?m)^#+ (.*)", README)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    folder = HERE / ".github/images"
    pictures = {path.relative_to(HERE).as_posix() for path in folder.iterdir()}
    assert pictures == {link for link in links if link.startswith(".github/images/")}
    for link in set(links) - pictures:
        known = link.startswith("https://") or link[1:] in anchors
        assert known or (HERE / link).exists(), link
    known = "".join(path.read_text("utf-8") for path in HERE.glob("*.py"))
    for name in set(re.findall(r"`([A-Z_]{4,})\b", README)) - {"NAME"}:
        assert re.search(rf"(?m)^{name} = ", known), name
    (printed,) = [line for line in blocks("text") if line.startswith("epoch")]
    line = trained(V)[1].stdout.splitlines()[2] + "\n"
    assert re.sub(r"[\d.,]+", "0", printed) == re.sub(r"[\d.,]+", "0", line)


def test_the_commands_of_the_readme(trained):
    folder = copy(trained(V)[0]).parent
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
    process = start(folder, sys.executable, "-Bc", code)
    assert process.returncode == 0 and len(list(folder.glob("digit_*"))) == 10, process


def test_the_average_generator_of_the_exercise():
    script = place(B, EPOCHS=1)
    text, end = script.read_text("utf-8"), 0
    for line in blocks("diff")[0].splitlines(keepends=True):
        start = end if line[0] == "+" else text.index(line[1:], end)
        old = "" if line[0] == "+" else line[1:]
        new = "" if line[0] == "-" else line[1:]
        text = text[:start] + new + text[start + len(old) :]
        end = start + len(new)
    script.write_text(text, "utf-8")
    finish(script)
    assert any("averaged" in name for name in load(script))
