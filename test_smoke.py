"""Run the scripts as a user does, on a few hundred real images, and look at what they leave behind.

Each test works in a folder of its own that holds a copy of one script, config.py and a cut of MNIST. Settings are
changed the way a user changes them: by replacing the value on their line. No test reaches the network.
"""
import contextlib
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
# Each script with the settings that make it small; its other settings stay as they are.
SCRIPTS = {
    "vanilla_gan": {},
    "bce_logits_gan": {"HIDDEN_DIM": 32},
    "conv_gan": {},
    "dcgan_wgan_gp": {"DATASET": "mnist", "FEATURES": 4, "CRITIC_STEPS": 2},
}
TRAIN_IMAGES, TEST_IMAGES = 200, 100
MOMENTS = ["if time.perf_counter() - shown", "checkpoint_path.with_suffix"]  # within an epoch, at its very end
# Every run is made on the CPU, where it repeats bit for bit, and without network: a try leaves a file `network`.
GUARD = """
import socket, torch
from pathlib import Path
def refuse(*_, **__):
    Path(r"{folder}", "network").touch()
    raise OSError("no network in tests")
socket.socket.connect = socket.getaddrinfo = refuse
torch.accelerator.is_available = lambda: False
torch.set_num_threads(1)
"""


# ---- Helpers ---------------------------------------------------------------------------------------------------------
def edit(path, **settings):
    """Replace the values of settings, each on the one line that sets it."""
    text = path.read_text(encoding="utf-8")
    for name, value in settings.items():
        text, count = re.subn(rf"^{name} = .*?(?=  #|$)", lambda _: f"{name} = {value!r}", text, flags=re.MULTILINE)
        assert count == 1, f"{name} is set on {count} lines of {path.name}"
    path.write_text(text, encoding="utf-8")


def insert(path, line, before):
    """Insert a line of code before the one line of the script that starts with `before`, at the same indentation."""
    text = path.read_text(encoding="utf-8")
    text, count = re.subn(rf"^( *){re.escape(before)}", lambda m: f"{m[1]}{line}\n{m[0]}", text, flags=re.MULTILINE)
    assert count == 1, f"{before!r} starts {count} lines of {path.name}"
    path.write_text(text, encoding="utf-8")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(script):
    """Run `python script` from another folder and return the finished process."""
    env = {**os.environ, "PYTHONPATH": str(script.parent / "guard"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, str(script)], cwd=script.parent.parent, env=env, text=True,
                          capture_output=True, timeout=120)


def run_here(script, terminal=False):
    """Run the script within this process, which saves importing torch again; return (what sys.exit says, output)."""
    handler, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    output = Terminal() if terminal else io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "dont_write_bytecode", True)  # config.py may change twice within a second
        patch.setattr(socket.socket, "connect", None)  # put back afterwards, as are all the lines below
        patch.setattr(socket, "getaddrinfo", None)
        patch.setattr(torch.accelerator, "is_available", None)
        patch.syspath_prepend(script.parent)
        sys.modules.pop("config", None)
        try:
            runpy.run_path(str(script.parent / "guard" / "sitecustomize.py"))
            runpy.run_path(str(script), run_name="__main__")
            message = None
        except SystemExit as stop:
            message = stop.code
    sys.modules.pop("config", None)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)
    return message, output.getvalue()


def refused(script):
    """Run the script, which must refuse with one line; return that line."""
    message, output = run_here(script)
    assert isinstance(message, str) and len(message.splitlines()) == 1 and len(output.splitlines()) <= 1, message
    return message


def same(a, b):
    """Tell whether two checkpoints are equal, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def load(script):
    return torch.load(script.parent / "checkpoints" / f"{script.stem}.pt", weights_only=True)


def curves(script):
    """Return what TensorBoard shows of the run: {tag: [(step, value), ...]}, and the steps of its pictures."""
    events = EventAccumulator(str(script.parent / "runs" / script.stem), size_guidance={"images": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}


def picture(path):
    """Return a PNG as a uint8 tensor (3, height, width)."""
    return pil_to_tensor(Image.open(path))


def tiles(path, columns=8):
    """Return the pictures of a grid, red channel: float (rows, columns, size, size)."""
    grid = picture(path)[0, 2:, 2:].float()
    size = grid.shape[1] // columns
    return grid.unfold(0, size - 2, size).unfold(1, size - 2, size)


def mnist_images(raw, size=28):
    """Return the small training set as the script sees it: float (N, size, size), 0 to 255."""
    images = torch.frombuffer(bytearray((raw / "train-images-idx3-ubyte").read_bytes()[16:]), dtype=torch.uint8)
    images = images.view(-1, 1, 28, 28).float()
    return (images if size == 28 else torch.nn.functional.interpolate(images, size=size, mode="bilinear"))[:, 0]


def texts(script):
    """Return the settings as TensorBoard shows them."""
    events = EventAccumulator(str(script.parent / "runs" / script.stem)).Reload()
    return events.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()


def snapshot(folder):
    """Return every file a run left, with its content."""
    return {path: path.read_bytes() for part in ("checkpoints", "samples", "runs")
            for path in (folder / part).rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory):
    """Cut the first images out of the tracked archives, in MNIST's own format."""
    raw = tmp_path_factory.mktemp("mnist")
    for name, count in ("train", TRAIN_IMAGES), ("t10k", TEST_IMAGES):
        for kind, header, size in ("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1):
            with gzip.open(HERE / "data" / "MNIST" / "raw" / f"{name}-{kind}-ubyte.gz") as file:
                start, images = bytearray(file.read(header)), file.read(count * size)
            start[4:8] = count.to_bytes(4, "big")
            (raw / f"{name}-{kind}-ubyte").write_bytes(start + images)
    return raw


@pytest.fixture(scope="session")
def place(small_mnist, tmp_path_factory):
    """Return a function that puts a shrunk copy of a script into a new folder, under its own or another name."""
    def place(name, copy=None, **settings):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(small_mnist, folder / "data" / "MNIST" / "raw")
        shutil.copy(HERE / "config.py", folder)
        script = Path(shutil.copy(HERE / f"{name}.py", folder / f"{copy or name}.py"))
        (folder / "guard").mkdir()
        (folder / "guard" / "sitecustomize.py").write_text(GUARD.format(folder=folder))
        edit(script, **{"EPOCHS": 4, "BATCH_SIZE": 40, "LOG_EVERY": 3, **SCRIPTS[name], **settings})
        return script
    return place


@pytest.fixture(scope="session")
def trained(place):
    """Return a function that gives a script and its process, trained for 4 epochs or killed in the third, at a line of
    MOMENTS. All of them run in the background, some at a time; nobody may write beside one that was not killed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = {}
        for moment in None, *MOMENTS:
            for name in SCRIPTS:
                script = place(name)
                if moment:
                    insert(script, "if epoch == 3: __import__('os').kill(__import__('os').getpid(), 9)", moment)
                made[name, moment] = script, pool.submit(run, script)
        yield lambda name, moment=None: (made[name, moment][0], made[name, moment][1].result())
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def copy_of(trained, tmp_path):
    """Return a function that gives a trained script with all its results, in a folder that the test may change."""
    def copy_of(name):
        script, _ = trained(name)
        shutil.copytree(script.parent, tmp_path / name)
        return tmp_path / name / script.name
    return copy_of


each_script = pytest.mark.parametrize("name", SCRIPTS)


# ---- A run and what it leaves ----------------------------------------------------------------------------------------
@each_script
def test_training_leaves_what_it_promises(name, trained):
    script, process = trained(name)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 5 and "\r" not in process.stdout  # what is done, then one line an epoch
    assert all(f"epoch {i}/4" in lines[i] for i in range(1, 5))

    checkpoint = load(script)
    assert checkpoint["epoch"] == 4
    assert checkpoint["settings"]["EPOCHS"] == 4 and checkpoint["settings"]["SEED"] == 0
    networks = {"generator", "critic" if "wgan" in name else "discriminator"}
    optimizers = {f"{key}_optimizer" for key in networks}
    assert set(checkpoint) == {"epoch", "settings", "random_state"} | networks | optimizers
    assert all(tensor.isfinite().all() for key in networks for tensor in checkpoint[key].values())

    steps = 4 * (TRAIN_IMAGES // checkpoint["settings"]["BATCH_SIZE"])
    expected = {key: steps * (checkpoint["settings"]["CRITIC_STEPS"] if key == "critic" else 1) for key in networks}
    assert {key: checkpoint[f"{key}_optimizer"]["state"][0]["step"].item() for key in networks} == expected

    samples = script.parent / "samples" / name
    assert sorted(path.name for path in samples.iterdir()) == [f"epoch_000{i}.png" for i in range(5)] + ["real.png"]
    assert not (script.parent / "network").exists()


@each_script
def test_both_networks_learn_and_the_noise_stays(name, trained, place):
    script = place(name, EPOCHS=1)
    assert run_here(script)[0] is None
    early, late = load(script), load(trained(name)[0])
    for key in early:
        if key in ("generator", "discriminator", "critic"):
            assert all(not torch.equal(early[key][weight], late[key][weight]) for weight in early[key]), key
    still = place(name, LEARNING_RATE=0.0, EPOCHS=3)  # nothing learns, so each picture is most like itself
    assert run_here(still)[0] is None  # but not equal, as BatchNorm's statistics still settle
    grids = [tiles(still.parent / "samples" / name / f"epoch_000{i}.png") for i in (2, 3)]
    likeness = torch.corrcoef(torch.cat(grids).flatten(0, 1).flatten(1))[:64, 64:]
    assert torch.equal(likeness.argmax(dim=1), torch.arange(64))


@each_script
def test_real_png_shows_the_first_training_images(name, trained, small_mnist):
    script, _ = trained(name)
    shown = tiles(script.parent / "samples" / name / "real.png")
    count = 8 if "wgan" in name else TEST_IMAGES // 5  # as many as are held out
    real = mnist_images(small_mnist, size=shown.shape[-1])[:count]
    assert (shown.flatten(0, 1)[:count] - real).abs().max() <= 1


@each_script
def test_tensorboard_shows_all_curves(name, trained):
    script, _ = trained(name)
    scalars, images = curves(script)
    steps = TRAIN_IMAGES // load(script)["settings"]["BATCH_SIZE"]
    own = {"loss/critic", "critic/wasserstein_distance", "critic/gradient_norm", "critic/gradient_penalty"} \
        if "wgan" in name else {"loss/discriminator", "prob/real", "prob/fake"}
    assert set(scalars) == own | {"loss/generator", "quality/sliced_wasserstein", "speed/images_per_second"}
    for tag, points in scalars.items():
        ends = [steps * epoch for epoch in range(1, 5)]
        if not tag.startswith(("quality", "speed")):  # LOG_EVERY is 3
            ends = [(epoch * steps) + min(i + 3, steps) for epoch in range(4) for i in range(0, steps, 3)]
        assert [step for step, _ in points] == ends, tag
        assert all(value == value and abs(value) < 1e9 for _, value in points), tag
        if tag.startswith("prob"):
            assert all(0 <= value <= 1 for _, value in points), tag
    assert images == {"images/real": [0], "images/fake": [steps * epoch for epoch in range(5)]}
    settings = texts(script)
    assert "EPOCHS = 4" in settings and "SEED = 0" in settings


# ---- Resume ----------------------------------------------------------------------------------------------------------
@each_script
def test_two_epochs_and_two_more_equal_four(name, trained, place):
    script = place(name, EPOCHS=2)
    assert run_here(script)[0] is None
    assert load(script)["epoch"] == 2
    edit(script, EPOCHS=4)
    assert run_here(script)[0] is None
    check_same_as_never_stopped(script, trained(name)[0])


@each_script
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in_the_third_epoch_and_started_again(name, moment, trained, place):
    script, process = trained(name, moment)
    assert process.returncode != 0
    assert load(script)["epoch"] == 2
    assert not (script.parent / "samples" / name / "epoch_0004.png").exists()
    shutil.copy(trained(name)[0], script)  # the script without the line that kills it
    time.sleep(1)  # TensorBoard puts runs in order by the second in which they began
    assert "Epochs 3 to 4" in run_here(script)[1]
    check_same_as_never_stopped(script, trained(name)[0])


def check_same_as_never_stopped(script, straight):
    assert same(load(script), load(straight))
    scalars, images = curves(script)
    expected, expected_images = curves(straight)
    del scalars["speed/images_per_second"], expected["speed/images_per_second"]
    assert scalars == expected and images == expected_images
    for path in (straight.parent / "samples" / straight.stem).iterdir():
        assert path.read_bytes() == (script.parent / "samples" / script.stem / path.name).read_bytes()


@each_script
def test_ctrl_c_keeps_the_last_epoch_and_says_how_to_go_on(name, place):
    script = place(name)
    insert(script, "if epoch == 2: signal.raise_signal(signal.SIGINT)", "history[step - 1] =")
    message, _ = run_here(script)
    assert len(message.splitlines()) == 1 and "LOAD = True" in message
    assert load(script)["epoch"] == 1


@each_script
def test_a_terminal_sees_a_line_that_updates(name, place):
    message, output = run_here(place(name, EPOCHS=1), terminal=True)
    assert message is None
    line = output.split("\n")[1].split("\r")  # the line below what is being done
    assert all(part in line[1] for part in ("epoch 1/1", "images/s", "%", "min left")) and len(line[1]) < 80
    assert "100%" in line[-2] and "0.0 min left" in line[-2]
    assert "distance" in line[-1] and len(line[-1]) >= len(line[-2])  # covers what stood there


# ---- Test ------------------------------------------------------------------------------------------------------------
@each_script
def test_one_flip_draws_samples_and_changes_nothing(name, copy_of):
    script = copy_of(name)
    before = snapshot(script.parent)
    edit(script.parent / "config.py", TEST=True)
    assert run_here(script)[0] is None
    after = snapshot(script.parent)
    assert {path.name for path in set(after) - set(before)} == {"test.png", "interpolation.png", "nearest.png"}
    assert all(after[path] == before[path] for path in before)

    for path in set(after) - set(before):
        path.unlink()
    edit(script.parent / "config.py", TRAIN=False)  # TEST alone draws the same
    assert run_here(script)[0] is None
    assert snapshot(script.parent) == after


@each_script
def test_nearest_shows_training_images(name, copy_of, small_mnist):
    script = copy_of(name)
    edit(script.parent / "config.py", TEST=True)
    assert run_here(script)[0] is None
    samples = script.parent / "samples" / name
    drawn, pairs = tiles(samples / "test.png"), tiles(samples / "nearest.png", columns=16)
    real = mnist_images(small_mnist, size=drawn.shape[-1])
    real = real[:192] if "wgan" in name else real  # the others are held out
    assert torch.equal(pairs[:, 0::2], drawn)
    for sample, shown in zip(pairs[:, 0::2].flatten(0, 1), pairs[:, 1::2].flatten(0, 1)):
        assert (real - shown).abs().amax(dim=(1, 2)).min() <= 1  # it is a training image,
        nearest = (real - sample).pow(2).sum(dim=(1, 2)).min()
        assert (shown - sample).pow(2).sum() <= 1.01 * nearest  # and none is nearer


@each_script
def test_interpolation_walks_from_sample_to_sample(name, copy_of):
    script = copy_of(name)
    edit(script.parent / "config.py", TEST=True)
    assert run_here(script)[0] is None
    samples = script.parent / "samples" / name
    drawn, grid = tiles(samples / "test.png"), picture(samples / "interpolation.png")[0, 2:, 2:].float()
    size = drawn.shape[-1]
    walks = grid.unfold(0, size, size + 2).unfold(1, size, size + 2)
    assert walks.shape[:2] == (8, 10)
    assert (walks[:, 0] - drawn[0]).abs().max() <= 1 and (walks[:, 9] - drawn[1]).abs().max() <= 1
    steps = (walks[:, 1:] - walks[:, :-1]).abs().mean(dim=(0, 2, 3))
    assert (steps < (walks[:, 9] - walks[:, 0]).abs().mean() / 2).all() and (steps > 0).all()


# ---- Keeping apart, starting over ------------------------------------------------------------------------------------
@each_script
def test_a_copy_keeps_its_results_apart(name, copy_of):
    script = copy_of(name)
    before = snapshot(script.parent)
    copy = Path(shutil.copy(script, script.with_name("my_first.gan.py")))
    edit(copy, EPOCHS=1)
    assert run_here(copy)[0] is None
    after = snapshot(script.parent)
    assert all(after[path] == before[path] for path in before)
    assert load(copy)["epoch"] == 1 and load(copy)["settings"]["NAME"] == "my_first.gan"
    assert (script.parent / "samples" / "my_first.gan" / "epoch_0001.png").exists()
    assert (script.parent / "runs" / "my_first.gan").exists()


@each_script
def test_load_false_starts_over(name, copy_of):
    script = copy_of(name)
    first = load(script)
    edit(script.parent / "config.py", LOAD=False)
    assert "epoch 1/4" in run_here(script)[1]
    assert same(load(script), first)  # and the same seed gives the same run
    scalars, images = curves(script)
    assert len(scalars["quality/sliced_wasserstein"]) == 4 and len(images["images/real"]) == 1


# ---- Bad input -------------------------------------------------------------------------------------------------------
def test_bad_input_ends_with_status_1_and_one_line(place):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for process in pool.map(run, [place(name, BATCH_SIZE=0) for name in SCRIPTS]):
            assert process.returncode == 1 and process.stdout == ""
            assert len(process.stderr.splitlines()) == 1 and "BATCH_SIZE must be" in process.stderr


@each_script
@pytest.mark.parametrize("settings, named", [
    ({"BATCH_SIZE": TRAIN_IMAGES + 1}, "more than"), ({"BATCH_SIZE": 1.5}, "BATCH_SIZE"),
    ({"BATCH_SIZE": 1}, "BATCH_SIZE"), ({"EPOCHS": -1}, "EPOCHS"), ({"NOISE_DIM": 0}, "NOISE_DIM"),
    ({"LEARNING_RATE": "3e-4"}, "Cannot start"), ({"LEARNING_RATE": -1.0}, "learning rate"),
    ({"BETAS": (0.5, 1.5)}, "beta"), ({"BETAS": (0, 0.9)}, "betas"), ({"LOG_EVERY": 0}, "LOG_EVERY"),
])
def test_impossible_settings_are_refused(name, settings, named, place):
    script = place(name, **settings)
    assert named in refused(script)
    assert not (script.parent / "checkpoints" / f"{name}.pt").exists()


@each_script
@pytest.mark.parametrize("flags", [{"TRAIN": False}, {"TRAIN": False, "TEST": True},
                                   {"TRAIN": False, "TEST": True, "LOAD": False}])
def test_flags_that_leave_nothing_to_do_are_refused(name, flags, place):
    script = place(name)
    edit(script.parent / "config.py", **flags)
    assert "TRAIN first" in refused(script)
    assert snapshot(script.parent) == {}


@each_script
@pytest.mark.parametrize("setting", ["CALLBACKS_PATH", "SAMPLES_PATH", "TENSORBOARD_PATH"])
def test_a_folder_that_cannot_be_written_is_named(name, setting, place):
    script = place(name)
    edit(script.parent / "config.py", **{setting: str(script / "folder")})  # a folder within a file
    assert script.name in refused(script)
    assert snapshot(script.parent) == {}


@each_script
def test_missing_and_damaged_data_name_the_files(name, place):
    script = place(name)
    raw = script.parent / "data" / "MNIST" / "raw"
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:5000])  # as a kill while unpacking leaves it
    assert "MNIST/raw" in refused(script) and not (script.parent / "network").exists()
    shutil.rmtree(raw)
    assert "MNIST/raw" in refused(script) and (script.parent / "network").exists()
    archive = raw / "train-images-idx3-ubyte.gz"
    archive.write_bytes(b"damaged")
    assert "MNIST/raw" in refused(script) and archive.read_bytes() == b"damaged"


@each_script
def test_the_tracked_archives_are_all_of_mnist(name, tmp_path, monkeypatch):
    shutil.copytree(HERE / "data" / "MNIST" / "raw", tmp_path / "MNIST" / "raw", ignore=lambda folder, names: [
        file for file in names if not file.endswith(".gz")])
    module = importlib.import_module(name)
    monkeypatch.setattr(module.config, "DATA_PATH", tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    if "wgan" in name:
        monkeypatch.setattr(module, "DATASET", "mnist")
    parts = [len(module.load_images(train)) for train in (True, False)]
    assert parts == ([57_600, 2_400] if "wgan" in name else [60_000, 10_000])


@each_script
def test_changed_settings_and_networks_are_refused_by_name(name, copy_of):
    script = copy_of(name)
    before, text = snapshot(script.parent), script.read_text(encoding="utf-8")
    for setting, value in ("LEARNING_RATE", 0.5), ("NOISE_DIM", 7), ("EPOCHS", 3):
        edit(script, **{setting: value})
        message = refused(script)
        assert setting in message and str(value) in message and str(load(script)["settings"][setting]) in message
        script.write_text(text, encoding="utf-8")
    edit(script.parent / "config.py", SEED=1)
    assert "SEED" in refused(script)
    edit(script.parent / "config.py", SEED=0)
    script.write_text(text.replace("nn.LeakyReLU(0.2)", "nn.LeakyReLU(0.3)"), encoding="utf-8")
    assert "Generator" in refused(script) or "Discriminator" in refused(script) or "Critic" in refused(script)
    assert snapshot(script.parent) == before


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@each_script
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "malicious", "foreign", "flipped"])
def test_bad_checkpoints_are_refused_and_kept(name, damage, copy_of, monkeypatch):
    script = copy_of(name)
    monkeypatch.chdir(script.parent)
    path = script.parent / "checkpoints" / f"{name}.pt"
    good = path.read_bytes()
    if damage == "malicious":
        torch.save({**load(script), "epoch": Malicious()}, path)
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        middle = len(good) // 2
        flipped = good[:middle] + bytes(255 - byte for byte in good[middle:middle + 9]) + good[middle + 9:]
        path.write_bytes({"cut": good[:middle], "empty": b"", "text": b"no checkpoint", "flipped": flipped}[damage])
    before = snapshot(script.parent)
    assert path.name in refused(script)
    assert snapshot(script.parent) == before and not Path("executed").exists()


@each_script
def test_a_loss_that_is_not_finite_stops_the_run(name, copy_of):
    script = copy_of(name)
    edit(script, EPOCHS=6)
    insert(script, "if epoch == 6: [weight.data.fill_(torch.nan) for weight in generator.parameters()]", "real = norm")
    message, output = run_here(script)
    assert "LEARNING_RATE" in message and len(message.splitlines()) == 1 and "nan" in output
    assert load(script)["epoch"] == 5


@each_script
def test_weights_that_overflow_in_the_last_step_are_not_saved(name, place):
    script = place(name, LEARNING_RATE=1e38, BATCH_SIZE=TRAIN_IMAGES // 2 + 1)
    assert "LEARNING_RATE" in run_here(script)[0]
    assert not (script.parent / "checkpoints" / f"{name}.pt").exists()


# ---- One skeleton --------------------------------------------------------------------------------------------------
def shared_parts(text):
    """Return the parts of a script that are the same text in all of them, but for the name of the second network."""
    text = text.replace("critic", "discriminator").replace("Critic", "Discriminator")
    function = text[text.index("def sliced_wasserstein"):text.index("if __name__")]
    load = text[text.index("    # ---- Load"):text.index("    # ---- Train")]
    save = text[text.index("            writer.flush()"):text.index("    # ---- Test")]
    return function + load + save


@each_script
def test_shared_lines_are_identical(name):
    first, text = ((HERE / f"{script}.py").read_text(encoding="utf-8") for script in (next(iter(SCRIPTS)), name))
    assert shared_parts(text) == shared_parts(first)
    for line in "weights_only=True", "dim=0).values", ".replace(checkpoint_path)":  # a line that drifts is noticed
        assert line in text and shared_parts(text.replace(line, line.upper())) != shared_parts(first)


# ---- Values ----------------------------------------------------------------------------------------------------------
@each_script
@pytest.mark.parametrize("mean, std", [(0.5, 0.5), (0.1307, 0.3081)])
def test_to_pixels_undoes_normalize(name, mean, std, monkeypatch):
    module = importlib.import_module(name)
    if hasattr(module, "NORMALIZE_MEAN"):
        monkeypatch.setattr(module, "NORMALIZE_MEAN", mean)
        monkeypatch.setattr(module, "NORMALIZE_STD", std)
    shape, size = ((256, 3, 32, 32), 64) if "wgan" in name else ((256, 28, 28), 28)
    grey = torch.arange(256, dtype=torch.uint8)  # one image of each
    pixels = module.to_pixels(module.normalize(grey.view(-1, *[1] * (len(shape) - 1)).expand(shape)))
    assert torch.allclose(pixels, grey.view(-1, 1, 1, 1) / 255, atol=1e-6)
    assert pixels.shape == (256, shape[1] if len(shape) == 4 else 1, size, size)


def test_importing_only_defines(tmp_path):
    files = [*(f"{name}.py" for name in SCRIPTS), "config.py"]
    for file in files:
        shutil.copy(HERE / file, tmp_path)
    code = "".join(f"import {name}; {name}.Generator(), {name}.{'Critic' if 'wgan' in name else 'Discriminator'}()\n"
                   for name in SCRIPTS)
    process = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert {path.name for path in tmp_path.iterdir()} == set(files)


@each_script
def test_sliced_wasserstein_is_zero_for_equal_sets_and_the_shift_for_shifted_ones(name):
    distance = importlib.import_module(name).sliced_wasserstein
    a = torch.rand(50, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    assert distance(a, a[torch.randperm(50)]) == 0
    assert distance(a, a + 0.25) == pytest.approx(0.25)  # with one pixel, every direction is plus or minus that pixel


def test_bce_at_known_points():
    bce = importlib.import_module("vanilla_gan").bce
    undecided, sure, ones, zeros = (torch.full((4, 1), value) for value in (0.5, 0.9, 1.0, 0.0))
    assert bce(undecided, ones).item() == bce(undecided, zeros).item() == pytest.approx(0.6931, abs=1e-4)  # log 2
    assert bce(sure, ones).item() == pytest.approx(0.1054, abs=1e-4)  # -log 0.9
    assert bce(sure, zeros).item() == pytest.approx(2.3026, abs=1e-4)  # -log 0.1


def test_logits_stay_exact_where_a_sigmoid_loses_the_gradient():
    vanilla, logits = importlib.import_module("vanilla_gan"), importlib.import_module("bce_logits_gan")
    sure, ones = torch.full((4, 1), -200.0, requires_grad=True), torch.ones(4, 1)
    vanilla.bce(sure.sigmoid(), ones).backward()
    assert vanilla.bce(sure.sigmoid(), ones) == 100 and not sure.grad.any()  # cut off, and nothing to learn from
    sure.grad = None
    logits.get_gen_loss(sure).backward()
    assert logits.get_gen_loss(sure) == 200 and torch.equal(sure.grad, torch.full((4, 1), -0.25))  # of a mean of 4


def test_logits_losses_at_known_points():
    module = importlib.import_module("bce_logits_gan")
    zero, right, wrong = torch.zeros(4, 1), torch.full((4, 1), 3.0), torch.full((4, 1), -5.0)
    guesses = [module.get_disc_loss(zero, zero).item(), module.get_gen_loss(zero).item()]
    assert guesses == pytest.approx([0.6931, 0.6931], abs=1e-4)  # log 2
    assert module.get_disc_loss(right, wrong).item() == pytest.approx((0.0486 + 0.0067) / 2, abs=1e-4)
    assert module.get_disc_loss(wrong, right).item() == pytest.approx((5.0067 + 3.0486) / 2, abs=1e-4)
    assert module.get_gen_loss(wrong).item() == pytest.approx(5.0067, abs=1e-4)


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0, 3.0])
def test_gradient_penalty_of_a_linear_critic(length):
    module = importlib.import_module("dcgan_wgan_gp")
    critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 1))
    weight = critic[1].weight
    weight.data *= length / weight.data.norm()
    real, fake = torch.rand(2, 5, 3, 8, 8)
    penalty, norm = module.gradient_penalty(critic, real, fake)
    assert penalty.item() == pytest.approx(module.PENALTY_WEIGHT * (length - 1) ** 2, abs=1e-4)
    assert norm.item() == pytest.approx(length, abs=1e-4)
    penalty.backward()
    assert weight.grad.isfinite().all()  # of a length of 0 too


def test_gradient_penalty_looks_at_each_image_between_real_and_fake():
    module, seen = importlib.import_module("dcgan_wgan_gp"), []

    def critic(images):  # its gradient at x is x, so each image has a norm of its own
        seen.append(images.detach())
        return images.pow(2).sum(dim=(1, 2, 3)) / 2
    real, fake = torch.full((6, 3, 4, 4), 1.0), torch.full((6, 3, 4, 4), -1.0)
    penalty, norm = module.gradient_penalty(critic, real, fake)
    norms = seen[0].flatten(1).norm(dim=1)
    assert penalty.item() == pytest.approx(module.PENALTY_WEIGHT * (norms - 1).pow(2).mean().item(), rel=1e-4)
    assert norm.item() == pytest.approx(norms.mean().item(), rel=1e-4)
    assert seen[0].abs().max() <= 1 and len(seen[0].flatten().unique()) == 6  # one random number an image


def test_cifar10_that_cannot_be_downloaded_names_the_way_out(place):
    script = place("dcgan_wgan_gp", DATASET="cifar10")
    assert 'DATASET = "mnist"' in refused(script) and (script.parent / "network").exists()


def test_colour_images_of_cifar10(monkeypatch):
    import numpy
    module = importlib.import_module("dcgan_wgan_gp")
    data = numpy.arange(100 * 32 * 32 * 3, dtype="uint8").reshape(100, 32, 32, 3)  # as torchvision has it
    monkeypatch.setattr(module.datasets, "CIFAR10", lambda *_, **__: type("CIFAR10", (), {"data": data}))
    images, held_out = module.load_images(train=True), module.load_images(train=False)
    assert images.shape == (96, 3, 32, 32) and held_out.shape == (4, 3, 32, 32)
    assert torch.equal(torch.cat([images, held_out])[:, 1], torch.from_numpy(data)[..., 1])


@each_script
def test_networks_keep_to_their_shapes_and_ranges(name):
    module = importlib.import_module(name)
    wgan = "wgan" in name
    torch.manual_seed(0)
    generator = module.Generator()
    for weights in generator.parameters():
        weights.data *= 100  # drives it to its limits
    images = generator(torch.randn(8, module.NOISE_DIM, *[1, 1] * wgan))
    real = torch.tensor([0, 255], dtype=torch.uint8).view(2, *[1] * (2 + wgan))
    real = module.normalize(real.expand(2, 3, 32, 32) if wgan else real.expand(2, 28, 28))
    assert images.shape[1:] == real.shape[1:]
    assert images.min() >= real.min() and images.max() <= real.max()  # draws nothing that no real image can show,
    assert images.min() < real.min() + 0.01 and images.max() > real.max() - 0.01  # and everything that one can
    answers = (module.Critic if wgan else module.Discriminator)()(100 * images)
    assert answers.shape == ((8, 1, 1, 1) if wgan else (8, 1))
    probabilities = answers.min() >= 0 and answers.max() <= 1
    assert probabilities == (name == "vanilla_gan")  # the others end without sigmoid


# ---- README ----------------------------------------------------------------------------------------------------------
def test_the_readme_links_what_is_there():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    links = {link for link in re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text) for link in link if link}
    headings = {re.sub(r"[^\w -]", "", line.strip("# ").lower()).replace(" ", "-")
                for line in text.splitlines() if line.startswith("#")}
    pictures = {path.relative_to(HERE).as_posix() for path in (HERE / ".github" / "images").iterdir()}
    assert pictures == {link for link in links if link.startswith(".github/images/")}  # none missing, none left over
    for link in links - pictures:
        assert link.startswith("https://") or link[1:] in headings or (HERE / link).exists(), link
