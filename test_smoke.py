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

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms.functional import pil_to_tensor

HERE = Path(__file__).parent
# Each script with the settings that make it small
SCRIPTS = {
    "vanilla_gan": {},
    "bce_logits_gan": {"HIDDEN_DIM": 32},
    "conv_gan": {},
    "dcgan_wgan_gp": {"DATASET": "mnist", "FEATURES": 4, "CRITIC_STEPS": 2},
}
MNIST_SCRIPTS = ["vanilla_gan", "bce_logits_gan", "conv_gan"]
TRAIN_IMAGES, TEST_IMAGES = 120, 100
NETWORKS = "generator", "discriminator", "critic"
# Within an epoch, and after all else of an epoch
MOMENTS = ["if step % 10", "new.replace"]
GUARD = """
import socket, torch
def refuse(*_, **__):
    raise OSError("no network in tests")
socket.socket.connect = socket.getaddrinfo = refuse
torch.set_num_threads(1)
"""
each_script = pytest.mark.parametrize("name", SCRIPTS)


# ---- Helpers ----
def change(path, old, new, count=1):
    """Replace a piece of a file that must be there so often."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == count, (
        f"{old!r} is {text.count(old)} times in {path.name}"
    )
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit(path, **settings):
    """Replace the values of settings, each on the one line that sets it."""
    for name, value in settings.items():
        text = path.read_text(encoding="utf-8")
        (line,) = re.findall(rf"^{name} = .*?(?=  #|$)", text, flags=re.MULTILINE)
        path.write_text(text.replace(f"{line}", f"{name} = {value!r}", 1), "utf-8")


def insert(path, line, before):
    """Insert a line before the one that starts with `before`, indented like it."""
    text = path.read_text(encoding="utf-8")
    (indent,) = re.findall(rf"^( *){re.escape(before)}", text, flags=re.MULTILINE)
    change(path, f"\n{indent}{before}", f"\n{indent}{line}\n{indent}{before}")


def run(script, *flags):
    """Run `python script` from another folder and return the finished process."""
    environment = {**os.environ, "PYTHONPATH": str(script.parent / "guard")}
    return subprocess.run(
        [sys.executable, "-B", *flags, str(script)],
        cwd=script.parent.parent,
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_here(script, terminal=False):
    """Run the script in this process, which saves importing torch again. Return what
    sys.exit says, and the output."""
    handler, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    output = Terminal() if terminal else io.StringIO()
    message = None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr(socket.socket, "connect", None)  # put back afterwards
        patch.setattr(socket, "getaddrinfo", None)
        patch.syspath_prepend(script.parent)
        sys.modules.pop("config", None)
        try:
            runpy.run_path(str(script.parent / "guard" / "sitecustomize.py"))
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            message = stop.code
    sys.modules.pop("config", None)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
    return message, output.getvalue()


def refused(script):
    """Run the script, which must end with one line. Return that line."""
    message, _ = run_here(script)
    assert isinstance(message, str) and len(message.splitlines()) == 1, message
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
    """Return TensorBoard's curves {tag: [(step, value), ...]}, and its pictures' steps."""
    path = str(script.parent / "runs" / script.stem)
    events = EventAccumulator(path, size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    scalars = {
        t: [(e.step, e.value) for e in events.Scalars(t)] for t in tags["scalars"]
    }
    return scalars, {t: [e.step for e in events.Images(t)] for t in tags["images"]}


def picture(path):
    """Return a grid's red channel without its first border: float (height, width)."""
    return pil_to_tensor(Image.open(path).convert("RGB"))[0, 2:, 2:].float()


def tiles(path, columns=8):
    """Return the pictures of a grid: float (rows, columns, size, size), 0 to 255."""
    grid = picture(path)
    size = grid.shape[1] // columns
    return grid.unfold(0, size - 2, size).unfold(1, size - 2, size)


def mnist_images(raw, size):
    """Return the small training set: float (N, size, size), 0 to 255."""
    content = bytearray((raw / "train-images-idx3-ubyte").read_bytes()[16:])
    images = torch.frombuffer(content, dtype=torch.uint8).view(-1, 1, 28, 28).float()
    if size != 28:
        images = torch.nn.functional.interpolate(images, size=size, mode="bilinear")
    return images[:, 0]


def snapshot(folder):
    """Return every file that a run left, with its content."""
    parts = [folder / part for part in ("checkpoints", "samples", "runs")]
    paths = [path for part in parts for path in part.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths}


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """Cut the first images out of the tracked archives, in MNIST's own format."""
    raw = tmp_path_factory.mktemp("mnist")
    for name, count in ("train", TRAIN_IMAGES), ("t10k", TEST_IMAGES):
        for kind, header, size in ("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1):
            path = HERE / "data" / "MNIST" / "raw" / f"{name}-{kind}-ubyte.gz"
            with gzip.open(path) as file:
                start, content = bytearray(file.read(header)), file.read(count * size)
            start[4:8] = count.to_bytes(4, "big")
            (raw / path.stem).write_bytes(start + content)
    return raw


@pytest.fixture(scope="session")
def place(small_mnist, tmp_path_factory):
    """Return a function that puts a shrunk copy of a script into a new folder."""

    def place(name, **settings):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(small_mnist, folder / "data" / "MNIST" / "raw")
        edit(Path(shutil.copy(HERE / "config.py", folder)), DEVICE="cpu")
        script = Path(shutil.copy(HERE / f"{name}.py", folder))
        (folder / "guard").mkdir()
        (folder / "guard" / "sitecustomize.py").write_text(GUARD)
        small = {"EPOCHS": 4, "BATCH_SIZE": 24, "LOG_EVERY": 3, **SCRIPTS[name]}
        edit(script, **{**small, **settings})
        return script

    return place


@pytest.fixture(scope="session")
def trained(place):
    """Return a function that gives a script and its process, trained for 4 epochs or
    killed in the third, at one of MOMENTS. They run in the background."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = {}
        for name in SCRIPTS:
            made[name, None] = place(name)
        for moment in MOMENTS:
            made["vanilla_gan", moment] = place("vanilla_gan")
            kill = "__import__('os').kill(__import__('os').getpid(), 9)"
            insert(made["vanilla_gan", moment], f"if epoch == 3: {kill}", moment)
        made = {key: (script, pool.submit(run, script)) for key, script in made.items()}
        yield lambda name, moment=None: (
            made[name, moment][0],
            made[name, moment][1].result(),
        )


@pytest.fixture
def copy_of(trained, tmp_path):
    """Return a function that gives a trained script with its results, to be changed."""

    def copy_of(name):
        script = trained(name)[0]
        shutil.copytree(script.parent, tmp_path / name)
        return tmp_path / name / script.name

    return copy_of


# ---- A run and what it leaves ----
@each_script
def test_training_leaves_what_it_promises(name, trained):
    script, process = trained(name)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert "scratch" in lines[0] and len(lines) == 6 and "\r" not in process.stdout
    assert all(f"epoch {i}/4" in lines[i + 1] for i in range(1, 5))
    checkpoint = load(script)
    settings = checkpoint["settings"]
    assert checkpoint["epoch"] == 4 and settings["EPOCHS"] == 4 and "BETAS" in settings
    assert checkpoint["script"] == script.read_text(encoding="utf-8")
    parts = weights(checkpoint)
    assert len(parts) == 4
    steps = 4 * (TRAIN_IMAGES // settings["BATCH_SIZE"])
    for part, state in parts.items():
        if "optimizer" in part:
            own = settings["CRITIC_STEPS"] if "critic" in part else 1
            assert state["state"][0]["step"] == steps * own
    samples = sorted(path.name for path in (script.parent / "samples" / name).iterdir())
    assert samples == [f"epoch_000{i}.png" for i in range(5)] + ["real.png"]


@each_script
def test_tensorboard_shows_all_curves(name, trained):
    script = trained(name)[0]
    scalars, images = curves(script)
    expected = {"loss/generator", "speed/images_per_second"}
    if "wgan" in name:
        own = "wasserstein_distance", "gradient_norm", "gradient_penalty"
        expected |= {"loss/critic", *(f"critic/{tag}" for tag in own)}
    else:
        expected |= {"loss/discriminator", "prob/real", "prob/fake"}
        expected |= {"quality/precision", "quality/recall"}
    assert set(scalars) == expected
    for tag, points in scalars.items():
        ends = [5, 10, 15, 20]
        if not tag.startswith(("quality", "speed")):  # LOG_EVERY is 3
            ends = [3, 5, 8, 10, 13, 15, 18, 20]
        assert [step for step, _ in points] == ends, tag
        low, high = (0, 1) if tag.startswith(("prob", "quality")) else (-1e9, 1e9)
        assert all(low <= value <= high for _, value in points), tag
    assert images == {"images/real": [0], "images/fake": [0, 5, 10, 15, 20]}


@pytest.mark.parametrize("name", ["vanilla_gan", "dcgan_wgan_gp"])
def test_both_networks_learn_and_the_noise_stays(name, trained, place):
    script = place(name, LEARNING_RATE=0.0, EPOCHS=3)
    assert run_here(script)[0] is None
    early, late = load(script), load(trained(name)[0])
    for key in set(early) & set(NETWORKS):
        still = [w for w in early[key] if torch.equal(early[key][w], late[key][w])]
        # The last bias of the critic cancels out between real images and fakes.
        assert still == (["11.bias"] if key == "critic" else []), key
    # Nothing learns, so each picture is most like itself. BatchNorm still settles.
    folder = script.parent / "samples" / name
    grids = [tiles(folder / f"epoch_000{i}.png").flatten(0, 1) for i in (2, 3)]
    likeness = torch.corrcoef(torch.cat(grids).flatten(1))[:64, 64:]
    assert torch.equal(likeness.argmax(dim=1), torch.arange(64))


# ---- Resume ----
def check_same_as_never_stopped(script, straight):
    assert same(weights(load(script)), weights(load(straight)))
    scalars, images = curves(script)
    expected, expected_images = curves(straight)
    del scalars["speed/images_per_second"], expected["speed/images_per_second"]
    assert scalars == expected and images == expected_images
    for path in (straight.parent / "samples" / straight.stem).iterdir():
        other = script.parent / "samples" / script.stem / path.name
        assert path.read_bytes() == other.read_bytes()


@each_script
def test_two_epochs_and_two_more_equal_four(name, trained, place):
    script = place(name, EPOCHS=2)
    assert run_here(script)[0] is None
    edit(script, EPOCHS=4)
    message, output = run_here(script)
    assert message is None and "after epoch 2 of" in output
    check_same_as_never_stopped(script, trained(name)[0])


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in_the_third_epoch_and_started_again(moment, trained):
    script, process = trained("vanilla_gan", moment)
    assert process.returncode != 0 and load(script)["epoch"] == 2
    shutil.copy(trained("vanilla_gan")[0], script)  # without the line that kills it
    time.sleep(1)  # TensorBoard puts runs in order by the second in which they began
    assert "has changed" in run_here(script)[1]
    check_same_as_never_stopped(script, trained("vanilla_gan")[0])


def test_ctrl_c_keeps_the_last_epoch_and_says_how_to_go_on(place):
    script = place("vanilla_gan")
    insert(
        script, "if epoch == 2: signal.raise_signal(signal.SIGINT)", "history[step] ="
    )
    assert "again" in refused(script) and load(script)["epoch"] == 1


def test_a_terminal_sees_a_line_that_updates(place):
    message, output = run_here(place("vanilla_gan", EPOCHS=1), terminal=True)
    assert message is None
    *updates, last = output.splitlines(keepends=True)[2:]
    assert updates and all("%" in line and "min left" in line for line in updates)
    assert "recall" in last and len(last) > max(map(len, updates))  # covers them


def test_two_runs_at_once_both_end_well(place, trained):
    script = place("vanilla_gan")
    with ThreadPoolExecutor(2) as pool:
        processes = list(pool.map(run, [script, script]))
    assert [process.returncode for process in processes] == [0, 0], processes
    assert same(weights(load(script)), weights(load(trained("vanilla_gan")[0])))


# ---- Test ----
@each_script
def test_one_flip_draws_pictures_and_changes_nothing(name, copy_of, small_mnist):
    script = copy_of(name)
    before = snapshot(script.parent)
    edit(script.parent / "config.py", TEST=True)
    assert run_here(script)[0] is None
    after = snapshot(script.parent)
    names = {path.name for path in set(after) - set(before)}
    assert names == {"test.png", "interpolation.png", "nearest.png", "epochs.gif"}
    assert all(after[path] == before[path] for path in before)
    edit(script.parent / "config.py", TRAIN=False)  # TEST alone draws the same
    assert run_here(script)[0] is None and snapshot(script.parent) == after

    samples = script.parent / "samples" / name
    drawn, pairs = tiles(samples / "test.png"), tiles(samples / "nearest.png", 16)
    real = mnist_images(small_mnist, drawn.shape[-1])
    assert torch.equal(pairs[:, 0::2], drawn)
    for sample, shown in zip(drawn.flatten(0, 1), pairs[:, 1::2].flatten(0, 1)):
        assert (real - shown).abs().amax(dim=(1, 2)).min() <= 1  # it is a real image,
        nearest = (real - sample).pow(2).sum(dim=(1, 2)).min()
        assert (shown - sample).pow(2).sum() <= 1.01 * nearest  # and none is nearer
    walks = tiles(samples / "interpolation.png", 10)
    assert (walks[:, 0] - drawn[0]).abs().max() <= 1
    assert (walks[:, 9] - drawn[1]).abs().max() <= 1
    first = tiles(samples / "real.png").flatten(0, 1)[0]
    assert (real - first).abs().amax(dim=(1, 2)).min() <= 1
    with Image.open(samples / "epochs.gif") as gif:
        assert gif.n_frames == 5  # untrained, and four epochs
        gif.seek(4)
        assert gif.info["duration"] >= 2000  # milliseconds: the last one stays

    edit(script, TEST_SEED=5)  # draws other samples from the same checkpoint
    assert run_here(script)[0] is None
    assert snapshot(script.parent)[samples / "test.png"] != after[samples / "test.png"]


# ---- Keeping apart, starting over, harmless edits ----
def test_a_copy_keeps_its_results_apart(copy_of):
    script = copy_of("vanilla_gan")
    before = snapshot(script.parent)
    copy = Path(shutil.copy(script, script.with_name("my_first.gan.py")))
    edit(copy, EPOCHS=1)
    assert run_here(copy)[0] is None
    after = snapshot(script.parent)
    assert all(after[path] == before[path] for path in before)
    assert load(copy)["settings"]["NAME"] == "my_first.gan"
    assert (script.parent / "samples" / "my_first.gan" / "epoch_0001.png").exists()


def test_load_false_starts_over(copy_of):
    script = copy_of("vanilla_gan")
    first = load(script)
    edit(script.parent / "config.py", LOAD=False)
    assert "epoch 1/4" in run_here(script)[1]
    assert same(load(script), first)  # the same seed gives the same run
    scalars, images = curves(script)
    assert len(scalars["quality/recall"]) == 4 and len(images["images/real"]) == 1


def test_a_checkpoint_outlives_harmless_changes(copy_of):
    script = copy_of("vanilla_gan")
    checkpoint = load(script)
    for name in "gen_optimizer", "disc_optimizer":  # as another version of torch has it
        (group,) = checkpoint[name]["param_groups"]
        group["foreign_option"] = group.pop("foreach")
    del checkpoint["settings"]["TEST_SEED"]
    path = script.parent / "checkpoints"
    torch.save(checkpoint, path / "other.pt")  # copied to another name
    script = script.rename(script.with_name("other.py"))
    edit(script, LOG_EVERY=2, EPOCHS=5)
    insert(script, "EXTRA = (torch.nn.ReLU, 0.2)  # a constant more", "LOG_EVERY")
    change(script, "disc_optimizer = Adam(", "disc_optimizer = Adam(lr=0.25, params=")
    change(
        script,
        "lr=0.25, params=discriminator.parameters(), LEARNING_RATE, BETAS",
        "lr=0.25, params=discriminator.parameters(), betas=(0.25, 0.5)",
    )
    message, output = run_here(script)
    assert message is None and "after epoch 4" in output and "has changed" in output
    (group,) = load(script)["disc_optimizer"]["param_groups"]
    assert group["lr"] == 0.25 and group["betas"] == (0.25, 0.5)  # as the line says
    assert run_here(script)[0] is None  # what was written can be loaded


# ---- Bad input ----
BAD = [
    {"BATCH_SIZE": TRAIN_IMAGES + 1}, {"BATCH_SIZE": 1.5}, {"BATCH_SIZE": 1},
    {"EPOCHS": 0}, {"EPOCHS": 2.0}, {"NOISE_DIM": 0}, {"LOG_EVERY": 0},
    {"LEARNING_RATE": "3e-4"}, {"LEARNING_RATE": -1.0}, {"BETAS": (0.5, 1.5)},
    {"BETAS": (0, 0.9)}, {"BETAS": 0.5}, {"NORMALIZE_STD": 0},
    {"HIDDEN_DIM": 0}, {"FEATURES": 0}, {"CRITIC_STEPS": 0}, {"DATASET": "cifar"},
]  # fmt: skip


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_impossible_settings_are_refused_by_name(settings, place):
    (setting,) = settings
    own = {"HIDDEN_DIM": "bce_logits_gan", "FEATURES": "dcgan_wgan_gp"}
    own |= {"CRITIC_STEPS": "dcgan_wgan_gp", "DATASET": "dcgan_wgan_gp"}
    script = place(own.get(setting, "vanilla_gan"), **settings)
    assert setting in refused(script) and snapshot(script.parent) == {}


@pytest.mark.parametrize(
    "flags",
    [{"TRAIN": False}, {"TRAIN": False, "TEST": True}, {"DEVICE": "gpu"},
     {"DEVICE": "cuda:99"}, {"SEED": "x"}],
)  # fmt: skip
def test_flags_that_cannot_work_are_refused(flags, place):
    script = place("vanilla_gan")
    edit(script.parent / "config.py", **flags)
    assert next(iter(flags)) in refused(script) and snapshot(script.parent) == {}


@pytest.mark.parametrize("path", ["CALLBACKS_PATH", "SAMPLES_PATH", "TENSORBOARD_PATH"])
def test_a_folder_that_cannot_be_written_is_named(path, place):
    script = place("vanilla_gan")
    edit(script.parent / "config.py", **{path: str(script / "folder")})  # within a file
    assert script.name in refused(script) and snapshot(script.parent) == {}


def test_an_existing_folder_that_cannot_be_written_is_named(place, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # even for an administrator
    assert "checkpoints" in refused(place("vanilla_gan"))


def test_missing_and_damaged_data_say_what_to_do(place):
    script = place("vanilla_gan")
    raw = script.parent / "data" / "MNIST" / "raw"
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(
        images.read_bytes()[:5000]
    )  # as a kill while unpacking leaves it
    assert "MNIST/raw" in refused(script)
    shutil.rmtree(raw)
    process = run(script, "-O")
    assert process.returncode == 1 and len(process.stderr.splitlines()) == 1
    assert "no network in tests" in process.stderr  # the cause
    archive = raw / "train-images-idx3-ubyte.gz"
    archive.write_bytes(b"damaged")
    assert "MNIST/raw" in refused(script) and archive.read_bytes() == b"damaged"


def test_a_mistake_in_the_code_shows_its_own_line(place):
    mistakes = [("nn.ReLU()", "nn.Relu()"), ("mnist.data", "mnist.dat")]
    scripts = [place("vanilla_gan") for _ in mistakes]
    for script, (old, new) in zip(scripts, mistakes):
        change(script, old, new, script.read_text().count(old))
    with ThreadPoolExecutor(2) as pool:
        for process, (_, new) in zip(pool.map(run, scripts), mistakes):
            *_, line, _, error = process.stderr.splitlines()
            assert new in line and error.startswith("AttributeError"), process.stderr


def test_colours_that_cannot_be_downloaded_name_the_cause(place):
    assert "no network" in refused(place("dcgan_wgan_gp", DATASET="cifar10"))


def test_changed_settings_and_networks_are_refused_by_name(copy_of):
    script = copy_of("vanilla_gan")
    before, text = snapshot(script.parent), script.read_text(encoding="utf-8")
    for setting, value in (
        ("LEARNING_RATE", 0.5),
        ("NOISE_DIM", 7),
        ("BETAS", (0.1, 0.9)),
    ):
        edit(script, **{setting: value})
        message = refused(script)
        assert f"{setting} = {value}" in message and "LOAD = False" in message
        script.write_text(text, encoding="utf-8")
    change(script, "512", "500", text.count("512"))
    assert "size mismatch" in refused(script) and snapshot(script.parent) == before


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "text", "evil", "foreign", "flipped"]
)
def test_bad_checkpoints_are_refused_and_kept(damage, copy_of, monkeypatch):
    script = copy_of("vanilla_gan")
    monkeypatch.chdir(script.parent)
    path = script.parent / "checkpoints" / "vanilla_gan.pt"
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
    before = snapshot(script.parent)
    assert path.name in refused(script)
    assert snapshot(script.parent) == before and not Path("executed").exists()


@pytest.mark.parametrize("name", ["vanilla_gan", "dcgan_wgan_gp"])
def test_a_diverging_run_is_seen_and_not_saved(name, copy_of):
    script = copy_of(name)
    edit(script, EPOCHS=6)
    nan = "[weight.data.fill_(torch.nan) for weight in generator.parameters()]"
    insert(
        script, f"if epoch == 6: {nan}", "noise = torch.randn(BATCH_SIZE"
    ) if "wgan" not in name else insert(
        script, f"if epoch == 6: {nan}", "for _ in range("
    )
    message, output = run_here(script)
    assert "LEARNING_RATE" in message and len(message.splitlines()) == 1
    assert load(script)["epoch"] == 5 and "epoch 6/6" in output
    assert max(step for step, _ in curves(script)[0]["loss/generator"]) == 30


# ---- The same text in all scripts ----
def shared_lines(name, update=True):
    """Return a script's lines outside settings, data, networks and losses, and, if so
    wanted, outside the two updates."""
    text = (HERE / f"{name}.py").read_text(encoding="utf-8")
    imports = text[text.index("import ") : text.index("# ---- Settings")]
    text = imports + text[text.index("# ---- Housekeeping") :]
    if not update:
        start, end = (
            text.index("        for step in range("),
            text.index("if step % 10"),
        )
        text = text[:start] + text[end:]
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", list(SCRIPTS)[1:])
def test_shared_lines_are_identical(name):
    wgan = "wgan" in name
    first, lines = shared_lines("vanilla_gan", not wgan), shared_lines(name, not wgan)
    changed = [line for line in difflib.ndiff(first, lines) if line[0] in "+-"]
    own = r"for name in|answers =|# \(N, |NORMALIZE_STD|\):$|\"[A-Z_]+\",$"
    if wgan:  # another network, no quality, and steps of its own
        own += "|[Cc]ritic|disc|NOISE_DIM|precision|recall|best|tags|held_out"
        own += "|batches|load_images|real_pixels|images.:64|speed =|steps =|{means"
    drifted = [line for line in changed if not re.search(own, line)]
    assert not drifted, "\n".join(drifted)
    assert len(lines) - len(changed) > (70 if wgan else 120)


# ---- Values ----
@each_script
def test_to_pixels_undoes_normalize(name, monkeypatch):
    module = importlib.import_module(name)
    shape, size = ((256, 3, 32, 32), 64) if "wgan" in name else ((256, 28, 28), 28)
    grey = torch.arange(256, dtype=torch.uint8)  # one image of each
    images = grey.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    for mean, std in (0.5, 0.5), (0.1307, 0.3081):
        monkeypatch.setattr(module, "NORMALIZE_MEAN", mean, raising=False)
        monkeypatch.setattr(module, "NORMALIZE_STD", std, raising=False)
        pixels = module.to_pixels(module.normalize(images))
        assert torch.allclose(pixels, grey.view(-1, 1, 1, 1) / 255, atol=1e-6)
        assert pixels.shape == (256, shape[1] if "wgan" in name else 1, size, size)


@each_script
def test_nothing_depends_on_assert(name):
    assert not re.search(r"^ *assert ", (HERE / f"{name}.py").read_text(), re.MULTILINE)


def test_importing_only_defines(tmp_path):
    files = [*(f"{name}.py" for name in SCRIPTS), "config.py"]
    for file in files:
        shutil.copy(HERE / file, tmp_path)
    command = [sys.executable, "-B", "-c", f"import {', '.join(SCRIPTS)}"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, b"", b"")
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_the_tracked_archives_are_all_of_mnist(tmp_path, monkeypatch):
    archives = [
        p for p in (HERE / "data" / "MNIST" / "raw").iterdir() if p.suffix == ".gz"
    ]
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for path in archives:
        shutil.copy(path, tmp_path / "MNIST" / "raw")
    module = importlib.import_module("vanilla_gan")
    monkeypatch.setattr(module.config, "DATA_PATH", tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert [len(module.load_images(train)) for train in (True, False)] == [
        60_000,
        10_000,
    ]


def test_precision_and_recall_order_good_and_bad_pictures():
    module = importlib.import_module("vanilla_gan")
    torch.manual_seed(0)
    with gzip.open(
        HERE / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    ) as file:
        content = bytearray(file.read(16 + 4000 * 784)[16:])
    with gzip.open(
        HERE / "data" / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    ) as file:
        labels = torch.frombuffer(bytearray(file.read(8 + 4000)[8:]), dtype=torch.uint8)
    images = torch.frombuffer(content, dtype=torch.uint8).view(-1, 1, 28, 28) / 255
    held_out, real = images[:1000], images[1000:]

    def scores(fake):
        return module.share_near(fake, held_out), module.share_near(held_out, fake)

    precision, recall = scores(real[:1000])
    assert precision > 0.9 and recall > 0.9
    assert scores(real[:250].repeat(4, 1, 1, 1))[1] < recall - 0.2  # few, repeated
    assert scores(real[labels[1000:] != 4][:1000])[1] < recall - 0.01  # a digit missing
    assert scores(real[:1].repeat(1000, 1, 1, 1))[1] < 0.01  # collapse
    assert max(scores(torch.rand(1000, 1, 28, 28))) == 0  # noise
    blurred = torch.nn.functional.avg_pool2d(real[:1000], 3, 1, 1)
    assert scores(blurred)[0] > 0.9  # precision is blind to it,
    assert scores(blurred)[1] < 0.3  # recall is not


@pytest.mark.parametrize("name", MNIST_SCRIPTS)
def test_losses_at_known_points_and_their_direction(name):
    module = importlib.import_module(name)
    logits = torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1).expand(3, 4, 1)
    no, undecided, yes = logits.sigmoid() if name == "vanilla_gan" else logits
    log2 = pytest.approx(0.6931, abs=1e-4)
    assert module.get_disc_loss(undecided, undecided).item() == log2
    assert module.get_gen_loss(undecided).item() == log2
    assert module.get_disc_loss(yes, no).item() == pytest.approx(0.0486, abs=1e-4)
    assert module.get_disc_loss(no, yes).item() == pytest.approx(3.0486, abs=1e-4)
    assert module.get_gen_loss(yes).item() == pytest.approx(0.0486, abs=1e-4)
    assert module.get_gen_loss(no).item() == pytest.approx(3.0486, abs=1e-4)


def test_logits_stay_exact_where_a_sigmoid_loses_the_gradient():
    vanilla, logits = map(importlib.import_module, MNIST_SCRIPTS[:2])
    sure = torch.full((4, 1), -200.0, requires_grad=True)
    vanilla.get_gen_loss(sure.sigmoid()).backward()
    assert vanilla.get_gen_loss(sure.sigmoid()) == 100 and not sure.grad.any()
    sure.grad = None
    logits.get_gen_loss(sure).backward()
    assert logits.get_gen_loss(sure) == 200 and (sure.grad == -0.25).all()  # mean of 4


def test_critic_and_generator_pull_in_opposite_directions():
    module = importlib.import_module("dcgan_wgan_gp")
    high, low = torch.full((4, 1, 1, 1), 2.0), torch.full((4, 1, 1, 1), -1.0)
    assert module.get_critic_loss(high, low, 0.5) == -2.5  # real high: good for C
    assert module.get_gen_loss(high) == -2 and module.get_gen_loss(low) == 1


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 3.0])
def test_gradient_penalty_of_a_linear_critic(length):
    module = importlib.import_module("dcgan_wgan_gp")
    critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 1))
    weight = critic[1].weight
    weight.data *= length / weight.data.norm()
    penalty, slope = module.gradient_penalty(critic, *torch.rand(2, 5, 3, 8, 8))
    assert penalty.item() == pytest.approx(10 * (length - 1) ** 2, abs=1e-4)
    assert slope.item() == pytest.approx(length, abs=1e-4)
    penalty.backward()
    assert weight.grad.isfinite().all()  # of a length of 0 too


def test_gradient_penalty_looks_at_each_image_between_real_and_fake():
    module, seen = importlib.import_module("dcgan_wgan_gp"), []

    def critic(images):  # its gradient at x is x, so each image has a slope of its own
        seen.append(images.detach())
        return images.pow(2).sum(dim=(1, 2, 3)) / 2

    penalty, slope = module.gradient_penalty(critic, *torch.ones(2, 6, 3, 4, 4).mul(
        torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)))  # fmt: skip
    slopes = seen[0].flatten(1).norm(dim=1)
    assert penalty.item() == pytest.approx(10 * (slopes - 1).pow(2).mean().item(), 1e-4)
    assert slope.item() == pytest.approx(slopes.mean().item(), 1e-4)
    assert seen[0].abs().max() <= 1 and len(seen[0].flatten().unique()) == 6


def test_colour_images_of_cifar10(monkeypatch):
    import numpy

    module = importlib.import_module("dcgan_wgan_gp")
    data = numpy.arange(9 * 32 * 32 * 3, dtype="uint8").reshape(9, 32, 32, 3)
    fake = type("CIFAR10", (), {"data": data})
    monkeypatch.setattr(module.datasets, "CIFAR10", lambda *_, **__: fake)
    images = module.load_images()
    assert images.shape == (9, 3, 32, 32) and images.is_contiguous()
    assert torch.equal(images[:, 1], torch.from_numpy(data)[..., 1])


@each_script
def test_networks_keep_to_their_shapes_and_ranges(name):
    module = importlib.import_module(name)
    wgan = "wgan" in name
    torch.manual_seed(0)
    generator = module.Generator()
    for weight in generator.parameters():
        weight.data *= 100  # drives it to its limits
    images = generator(torch.randn(8, module.NOISE_DIM, *[1, 1] * wgan))
    real = torch.tensor([0, 255], dtype=torch.uint8).view(2, *[1] * (2 + wgan))
    real = module.normalize(real.expand(2, *[3, 32, 32] if wgan else [28, 28]))
    assert images.shape[1:] == real.shape[1:]
    assert images.min() >= real.min() and images.max() <= real.max()
    assert images.min() < real.min() + 0.01 and images.max() > real.max() - 0.01
    answers = (module.Critic if wgan else module.Discriminator)()(100 * images)
    assert answers.shape == ((8, 1, 1, 1) if wgan else (8, 1))
    assert (answers.min() >= 0 and answers.max() <= 1) == (name == "vanilla_gan")


@pytest.mark.parametrize("name", ["vanilla_gan", "dcgan_wgan_gp"])
def test_data_are_shuffled_and_noise_is_new_in_each_step(name, place):
    script = place(name, EPOCHS=2)
    insert(
        script, "seen.append((real.detach().clone(), noise.clone()))", "history[step] ="
    )
    insert(script, "seen = __import__('builtins').seen", "fixed_noise = ")
    __import__("builtins").seen = seen = []
    assert run_here(script)[0] is None
    real, noise = (torch.cat(parts) for parts in zip(*seen))
    assert len(seen) == 10 and len(noise.unique(dim=0)) == 2 * TRAIN_IMAGES
    first, second = real.flatten(1).chunk(2)
    assert not torch.equal(first, second)
    if "wgan" not in name:  # each image once an epoch
        assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == TRAIN_IMAGES


# ---- README ----
def test_the_readme_links_what_is_there():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    found = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text)
    links = {link for pair in found for link in pair if link}
    headings = {
        re.sub(r"[^\w -]", "", line.strip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    folder = HERE / ".github" / "images"
    pictures = {path.relative_to(HERE).as_posix() for path in folder.iterdir()}
    assert pictures == {link for link in links if link.startswith(".github/images/")}
    for link in links - pictures:
        known = link.startswith("https://") or link[1:] in headings
        assert known or (HERE / link).exists(), link
