"""Run the scripts as a user does, on 120 real images, and look at what they leave.

They run in temporary folders, each with a copy of a script, config.py and a cut of
MNIST. Settings are changed on their own lines. No test needs a network.
"""

import contextlib
import functools
import gzip
import importlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

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
    "bce_logits_gan": {},
    "conv_gan": {},
    "dcgan_wgan_gp": {"DATASET": "mnist", "FEATURES": 4, "CRITIC_STEPS": 2},
}
V, B, C, W = SCRIPTS
NOWHERE = "http://127.0.0.1:1"  # where nobody answers
os.environ |= {"http_proxy": NOWHERE, "https_proxy": NOWHERE, "OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)
sys.dont_write_bytecode = True
FOLDERS = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
SIZE = {V: 28, B: 28, C: 28, W: 64}  # of a picture
NOISE_TAIL = {V: (), B: (), C: (), W: (1, 1)}  # what follows NOISE_DIM in noise's shape
each_script = pytest.mark.parametrize("name", SCRIPTS)


# ---- Helpers ----
def replace(path, old, new):
    """Replace a pattern that a file has once."""
    text, count = re.subn(f"(?m){old}", new, path.read_text("utf-8"))
    assert count == 1, old
    path.write_text(text, "utf-8")


def edit(path, **settings):
    """Give settings another value, each on its line."""
    for name, value in settings.items():
        replace(path, f"^{name} = .*", f"{name} = {value!r}")


def insert(path, line, before):
    """Insert a line before another one, indented like it."""
    replace(path, rf"^( *)(?={re.escape(before)})", rf"\1{line}\n\1")


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
    """Put a small copy of a script into a new folder, and return its path."""
    folder = Path(tempfile.mkdtemp(dir=FOLDERS.name))
    cut_mnist(folder / "data", 120)
    edit(Path(shutil.copy(HERE / "config.py", folder)), DEVICE="cpu")
    script = Path(shutil.copy(HERE / f"{name}.py", folder))
    edit(script, EPOCHS=4, BATCH_SIZE=24, LOG_EVERY=2)
    edit(script, **SCRIPTS[name] | settings)
    if name == C:  # takes long to draw a thousand pictures
        replace(script, r"randn\(1000", "randn(100")
    return script


def copy(script):
    """Copy a script with all its results into a new folder."""
    folder = Path(tempfile.mkdtemp(dir=FOLDERS.name))
    return shutil.copytree(script.parent, folder, dirs_exist_ok=True) / script.name


def load(script, run_name=None):
    """Run a script in this process, which is faster. Return its names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "config", raising=False)
        patch.syspath_prepend(script.parent)
        return runpy.run_path(str(script), run_name=run_name)


def run(script, terminal=False):
    """Run a script as __main__, and return what it prints."""
    output = io.StringIO()
    output.isatty = lambda: terminal
    with contextlib.redirect_stdout(output):
        load(script, "__main__")
    return output.getvalue()


def refused(script):
    """Return the message with which a script must end, without harm to a file."""
    before = snapshot(script)
    with pytest.raises(SystemExit) as stop:
        run(script)
    assert isinstance(stop.value.code, str) and snapshot(script) == before
    return stop.value.code


def snapshot(script):
    """Return all files beside the script, with a hash of their content."""
    files = filter(Path.is_file, script.parent.rglob("*"))
    return {(f, hash(f.read_bytes())) for f in files if f.suffix != ".py"}


def changes(script, before):
    """Return the names of files that are not as before."""
    return {path.name for path, _ in before ^ snapshot(script)}


def checkpoint(script):
    path = script.parent / f"checkpoints/{script.stem}.pt"
    return torch.load(path, weights_only=True)


def curves(script):
    """Return TensorBoard's curves {tag: [(step, value)]}, and its pictures' steps."""
    path = str(script.parent / "runs" / script.stem)
    events = EventAccumulator(path, size_guidance={"images": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    scalars = {tag: [(e.step, e.value) for e in scalars[tag]] for tag in scalars}
    images = events.Tags()["images"]
    return scalars, {tag: [e.step for e in events.Images(tag)] for tag in images}


def tiles(path, width):
    """Return the pictures of a grid: float (rows, columns, height, width), 0 to 255."""
    grid = pil_to_tensor(Image.open(path).convert("RGB"))[0, 2:, 2:].float()
    height = 64 if width in (64, 128) else 28
    return grid.unfold(0, height, height + 2).unfold(1, width, width + 2)


def assert_same(script, other):
    """Compare all that two runs leave."""
    torch.testing.assert_close(checkpoint(script), checkpoint(other), rtol=0, atol=0)
    assert curves(script) == curves(other)
    pictures, others = (
        {p.name: p.read_bytes() for p in s.parent.glob("samples/*/*.png")}
        for s in (script, other)
    )
    assert pictures == others


@functools.cache
def trained(name):
    """Train a script, once for all tests. Return its path and what it prints."""
    script = place(name)
    return script, run(script)


# ---- A run and what it leaves ----
@each_script
def test_a_run_and_what_it_leaves(name):
    script, output = trained(name)
    lines = output.splitlines()
    assert len(lines) == 6
    assert "scratch" in lines[0] and str(script.parent / "samples" / name) in lines[1]
    assert [line.split()[1] for line in lines[2:]] == ["1/4", "2/4", "3/4", "4/4"]
    assert all(line.endswith("min left") for line in lines[2:])

    opponent = "critic" if name == W else "disc"
    saved = checkpoint(script)
    optimizers = ["gen_optimizer", f"{opponent}_optimizer"]
    networks = ["generator", "critic" if name == W else "discriminator"]
    assert saved.keys() == {"epoch", *networks, *optimizers} and saved["epoch"] == 4
    steps = [saved[part]["state"][0]["step"] for part in optimizers]
    assert steps == [20, 40 if name == W else 20]
    settings = load(script)
    for group in (saved[part]["param_groups"][0] for part in optimizers):
        assert group["lr"] == settings["LEARNING_RATE"]
        assert group["betas"] == settings["BETAS"]

    samples = script.parent / "samples" / name
    files = {path.name for path in samples.iterdir()}
    assert files == {"real.png", *(f"epoch_000{i}.png" for i in range(5))}
    untrained = tiles(samples / "epoch_0000.png", SIZE[name])
    assert 25 < untrained.min() < untrained.max() < 230  # contrast is not stretched
    real = tiles(samples / "real.png", SIZE[name])
    assert real.min() == 0 and real.max() > 250

    scalars, images = curves(script)
    tags = {"loss/generator", "loss/critic", "critic/wasserstein_distance"}
    tags |= {"critic/gradient_norm", "critic/gradient_penalty"}
    if name != W:
        tags = {"loss/generator", "loss/discriminator", "prob/real", "prob/fake"}
        tags |= {"quality/precision", "quality/recall"}
    assert scalars.keys() == tags
    for tag, points in scalars.items():
        ends = [4, 9, 14, 19] if "quality" in tag else [*range(0, 20, 2)]
        assert [step for step, _ in points] == ends, tag
        low, high = (0, 1) if tag.startswith(("prob", "quality")) else (-1e9, 1e9)
        assert all(low <= value <= high for _, value in points), tag
    assert images == {"images/real": [0], "images/fake": [0, 4, 9, 14, 19]}


CURVES = {
    V: {
        "loss/discriminator": "-(real_output * (1 - fake_output)).log().mean() / 2",
        "loss/generator": "-discriminator(fake).log().mean()",
        "prob/real": "real_output.mean()",
        "prob/fake": "fake_output.mean()",
    },
    W: {
        "loss/critic": "fake_output.mean() - real_output.mean() + penalty",
        "loss/generator": "-critic(generator(noise)).mean()",
        "critic/wasserstein_distance": "real_output.mean() - fake_output.mean()",
        "critic/gradient_norm": "slope",
        "critic/gradient_penalty": "penalty",
    },
}
LOSSES = {
    V: {"disc_loss": "discriminator", "gen_loss": "generator"},
    W: {"critic_loss": "critic", "gen_loss": "generator"},
}


@pytest.mark.parametrize("name", CURVES)
def test_what_changes_in_training_and_what_stays(name, monkeypatch):
    script = place(name, LEARNING_RATE=0.0, EPOCHS=3, LOG_EVERY=1)
    monkeypatch.setattr(torch, "seen", [], raising=False)
    values = ", ".join(CURVES[name].values())
    line = f"torch.seen.append((real, noise, {values}))"
    insert(script, line, "if step % LOG_EVERY")
    for loss, network in LOSSES[name].items():  # no gradient is left of an older loss
        line = f"assert all(p.grad is None for p in {network}.parameters())"
        insert(script, line, f"{loss}.backward()")
    run(script)
    real, noise, *values = zip(*torch.seen)
    for tag, expected in zip(CURVES[name], values):
        found = [value for _, value in curves(script)[0][tag]]
        assert found == pytest.approx([value.item() for value in expected], abs=1e-5)
    # The images are shuffled, and the noise is new in each step.
    first, second, third = torch.cat(real).flatten(1).chunk(3)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert len(torch.cat(noise).unique(dim=0)) == 3 * 120
    if name == V:  # each image once an epoch
        assert len(first.unique(dim=0)) == len(third.unique(dim=0)) == 120
    # Nothing learns and the noise is fixed, so each picture of epoch 3 is most like the
    # one of epoch 2 in its place. Only BatchNorm's averages still move.
    samples = script.parent / "samples" / name
    grids = [tiles(samples / f"epoch_000{i}.png", SIZE[name]) for i in (2, 3)]
    likeness = torch.corrcoef(torch.cat(grids).flatten(0, 1).flatten(1))[:64, 64:]
    assert torch.equal(likeness.argmax(dim=1), torch.arange(64))


def test_a_terminal_sees_progress():
    script = place(V, EPOCHS=1)
    edit(script.with_name("config.py"), DEVICE=None)  # the default
    *lines, last = run(script, terminal=True).splitlines(keepends=True)
    assert not any("None" in line for line in lines)
    updates = [line for line in lines if line.endswith("\r")]
    assert len(updates) == 3 and len(last) > max(map(len, updates))


# ---- Killed and started again ----
KILLED_BEFORE = {
    V: "disc_optimizer.zero_grad()",
    B: "new.replace(CHECKPOINT)",
    C: "save_checkpoint(parts, epoch)",
    W: "gen_optimizer.zero_grad()",
}


@functools.cache
def killed():
    """Start each script as a user does, from another folder, and kill it in epoch 3.
    Return {name: path}."""
    scripts = {name: place(name) for name in SCRIPTS}
    for name, script in scripts.items():
        insert(script, "if epoch == 3: import os; os._exit(9)", KILLED_BEFORE[name])
    processes = [subprocess.Popen([sys.executable, s]) for s in scripts.values()]
    assert [process.wait() for process in processes] == [9] * 4
    return scripts


@each_script
def test_killed_and_started_again_is_as_never_stopped(name):
    whole, script = trained(name)[0], killed()[name]
    assert checkpoint(script)["epoch"] == 2
    shutil.copy(whole, script)  # without the line that kills it
    assert "after epoch 2," in run(script)
    assert_same(script, whole)
    assert len(list(script.parent.glob("checkpoints/*"))) == 1


def test_load_false_starts_over_and_another_seed_is_another_run():
    script = copy(trained(V)[0])
    edit(script.with_name("config.py"), LOAD=False)
    assert "scratch" in run(script)
    assert_same(script, trained(V)[0])
    edit(script.with_name("config.py"), SEED=1)
    before = snapshot(script)
    run(script)
    assert changes(script, before) >= {"epoch_0000.png", "epoch_0001.png", f"{V}.pt"}


def test_a_scheduler_goes_on_exactly():
    whole, stopped = scripts = place(V), place(V, EPOCHS=2)
    for script in scripts:
        scheduler = "torch.optim.lr_scheduler.ExponentialLR(gen_optimizer, 0.5)"
        insert(script, f"'scheduler': {scheduler},", '"gen_optimizer":')
        insert(script, "parts['scheduler'].step()", "save_checkpoint(parts, epoch)")
        run(script)
    edit(stopped, EPOCHS=4)
    assert "G 7.5e-05, D 0.0003" in run(stopped)  # the rates in use
    assert_same(stopped, whole)


def test_no_epoch_is_left():
    script = copy(trained(V)[0])
    before = snapshot(script)
    output = run(script)
    assert "EPOCHS" in output and f"{V}.pt" in output and snapshot(script) == before


# ---- TEST ----
@each_script
def test_drawing_with_a_checkpoint(name):
    script, size = copy(trained(name)[0]), SIZE[name]
    samples = script.parent / "samples" / name
    shutil.copy(samples / "real.png", samples / "epoch_0005.png")  # of a longer run
    before = snapshot(script)
    edit(script.with_name("config.py"), TEST=True)
    run(script)
    drawn = {"test.png", "interpolation.png", "nearest.png", "epochs.gif"}
    assert changes(script, before) == drawn
    after = snapshot(script)
    edit(script.with_name("config.py"), TRAIN=False)
    run(script)
    assert snapshot(script) == after

    test = tiles(samples / "test.png", size)
    pairs = tiles(samples / "nearest.png", 2 * size)
    real = datasets.MNIST(script.parent / "data").data.unsqueeze(1).float()
    real = torch.nn.functional.interpolate(real, size, mode="bilinear")
    assert torch.equal(pairs[..., :size], test)
    for sample, shown in zip(test.flatten(0, 1), pairs[..., size:].flatten(0, 1)):
        assert (real - shown).abs().amax(dim=(1, 2, 3)).min() <= 1  # it is a real image
        nearest = (real - sample).pow(2).sum(dim=(1, 2, 3)).min()
        assert (shown - sample).pow(2).sum() <= 1.01 * nearest  # and none is nearer
    walk = tiles(samples / "interpolation.png", size)
    assert len(walk) == 10 and (walk[[0, 9]] - test[:2]).abs().max() <= 1
    with Image.open(samples / "epochs.gif") as gif:
        assert gif.n_frames == 5  # untrained, and four epochs
    edit(script, TEST_SEED=5)
    run(script)
    assert not torch.equal(tiles(samples / "test.png", size), test)


@each_script
def test_a_picture_depends_on_its_own_noise_alone(name):
    script = load(place(name))
    generator = script["Generator"]()
    noise = torch.randn(6, script["NOISE_DIM"], *NOISE_TAIL[name])
    generator(noise)  # gives BatchNorm its averages
    together, alone = (script["draw"](generator, part) for part in (noise, noise[:1]))
    assert torch.allclose(together[:1], alone, atol=1e-4) and generator.training
    assert 0 <= together.min() and together.max() <= 1


# ---- Own pictures ----
def test_a_folder_of_pictures():
    script = place(W, DATASET="own [1]", EPOCHS=1, BATCH_SIZE=4)
    folder = script.parent / "own [1]"  # beside the script
    for path in folder / ".hidden", folder / "below", script.parent / "linked":
        path.mkdir(parents=True)
    turned = Image.new("RGB", (300, 100), "lime")
    turned.paste("red", (100, 0, 150, 100))  # the middle square: red, and blue
    turned.paste("blue", (150, 0, 200, 100))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera lay on its side: left is up
    turned.save(folder / "a.JPG", exif=exif, quality=95)
    Image.new("RGBA", (90, 70)).save(folder / "below/b.png")
    for path in folder / "c.bmp", folder / ".hidden/d.png", folder / "._e.png":
        Image.new("L", (8, 8)).save(path)
    (folder / "notes.txt").write_text("no picture")
    try:
        (folder / "link").symlink_to(script.parent / "linked")
    except OSError:  # Windows may not allow links
        (folder / "link").mkdir()
    Image.new("1", (7, 9)).save(folder / "link/f.png")
    assert "Found 4 pictures" in run(script)
    images = load(script)["load_images"]()
    assert images.shape == (4, 3, 64, 64) and images.dtype == torch.uint8
    red, lime, blue = images[0].float().mean(dim=2)
    assert red[:30].min() > 190 and blue[34:].min() > 190 and lime.max() < 50
    assert images[1].min() == 255 and not images[2].any()  # transparent is white
    edit(script, EPOCHS=2, BATCH_SIZE=5)
    assert "BATCH_SIZE" in refused(script)
    edit(script, BATCH_SIZE=4, CHANNELS=1)
    assert load(script)["load_images"]().shape == (4, 1, 64, 64)  # grey
    edit(script, CHANNELS=3, DATASET="nowhere")
    assert "DATASET" in refused(script)


# ---- What goes wrong ----
def test_bad_checkpoints_are_refused():
    script = copy(trained(V)[0])
    path = script.parent / f"checkpoints/{V}.pt"
    replace(script, r"BatchNorm1d\(512\)", "BatchNorm1d(512, affine=False)")
    assert "does not fit" in refused(script).splitlines()[-1]
    shutil.copy(trained(V)[0], script)
    edit(script.with_name("config.py"), TEST=True)
    good, whole = path.read_bytes(), checkpoint(script)
    touch = {"__reduce__": lambda _: (Path.touch, (script.parent / "executed",))}
    malicious = {**whole, "epoch": type("Malicious", (), touch)()}
    incomplete = {key: whole[key] for key in whole if key != "disc_optimizer"}
    for bad in good[: len(good) // 2], b"", b"no zip", malicious, incomplete, [1, 2]:
        torch.save(bad, path)
        if isinstance(bad, bytes):  # no checkpoint at all
            path.write_bytes(bad)
        assert path.name in refused(script).splitlines()[-1]


@each_script
def test_drawing_needs_a_checkpoint(name):
    script = place(name)
    edit(script.with_name("config.py"), TRAIN=False, TEST=True)
    assert "TRAIN" in refused(script)


@pytest.mark.filterwarnings("error")  # a warning would stand beside the message
@pytest.mark.parametrize("name", [B, W])
def test_pictures_that_are_not_finite_are_not_saved(name):
    script = copy(trained(name)[0])
    edit(script, EPOCHS=5)
    insert(script, "next(generator.parameters()).data /= 0", "if step % LOG_EVERY")
    before = snapshot(script)
    with pytest.raises(SystemExit, match="LEARNING_RATE"):
        run(script)
    assert all("events" in name for name in changes(script, before))


@each_script
def test_data_that_cannot_be_had(name):
    script = place(name)
    raw = script.parent / "data/MNIST/raw"
    # torchvision does not replace a damaged file, so that the archives do not help.
    os.truncate(raw / "train-images-idx3-ubyte", 5000)
    assert "and nothing else" in refused(script).splitlines()[-1]
    shutil.rmtree(raw)
    assert "MNIST" in refused(script).splitlines()[-1]
    if name == W:
        edit(script, DATASET="cifar10", CHANNELS=3)
        assert "cifar-10-python.tar.gz" in refused(script).splitlines()[-1]


@each_script
def test_a_mistake_shows_its_own_line(name):
    script = place(name)
    replace(script, r"download=True\).data", "download=True).datum")
    with pytest.raises(AttributeError) as caught:
        run(script)
    assert "datum" in traceback.extract_tb(caught.tb)[-1].line


# ---- Values ----
def test_the_same_idea_is_the_same_text():
    texts = {name: (HERE / f"{name}.py").read_text("utf-8") for name in SCRIPTS}
    shared = {  # from where to where
        "@torch.no_grad()": (SCRIPTS, "\n\n\n"),
        "# ---- Checkpoints": (SCRIPTS, "# ----"),
        "if __name__": (SCRIPTS, "\n\n\n"),
        "def share_near": ((V, B, C), "# ----"),
        "# ---- Training": ((V, B, C), "if __name__"),
    }
    for begin, (names, end) in shared.items():
        parts = [texts[name].split(begin)[1].split(end)[0] for name in names]
        parts = [re.sub(r"\.sigmoid\(\)|  # \(N, .*", "", part) for part in parts]
        assert len({*parts}) == 1, begin


@each_script
def test_importing_only_defines(name, capsys):
    script = place(name)
    other = script.rename(script.with_name("other.py"))
    before = snapshot(other)
    assert load(other)["CHECKPOINT"].name == "other.pt"
    assert snapshot(other) == before and not any(capsys.readouterr())
    assert not re.search("(?m)^ *assert ", other.read_text("utf-8"))  # gone under -O


@each_script
def test_shapes_and_ranges(name):
    module = importlib.import_module(name)
    size = (3, 32, 32) if name == W else (28, 28)
    grey = torch.arange(256, dtype=torch.uint8)  # one image of each
    real = module.normalize(grey.expand(*size, 256).movedim(-1, 0))
    pixels = module.to_pixels(real)
    assert pixels.shape[1:] == ((3, 64, 64) if name == W else (1, 28, 28))
    assert torch.allclose(pixels, grey.view(-1, 1, 1, 1) / 255, atol=1e-6)
    torch.manual_seed(0)
    generator = module.Generator()
    for weight in generator.parameters():
        weight.data *= 100  # drives it to its limits, which are those of real images
    images = generator(torch.randn(8, module.NOISE_DIM, *NOISE_TAIL[name]))
    assert images.shape[1:] == real.shape[1:]
    assert real.min() <= images.min() < real.min() + 0.01
    assert real.max() >= images.max() > real.max() - 0.01
    discriminator = (module.Critic if name == W else module.Discriminator)()
    answers = discriminator(100 * images)
    assert answers.shape == ((8, 1, 1, 1) if name == W else (8, 1))
    assert (answers.min() >= 0 and answers.max() <= 1) == (name == V)
    black = module.normalize(torch.zeros(8, *size, dtype=torch.uint8))
    discriminator(black).sum().backward()  # all weights learn from black
    assert next(discriminator.parameters()).grad.any()


@pytest.mark.parametrize("name", [V, B])
def test_another_normalisation(name, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "NORMALIZE_MEAN", 0.1307)
    monkeypatch.setattr(module, "NORMALIZE_STD", 0.3081)
    images = torch.randint(256, (8, 28, 28), dtype=torch.uint8)
    real = module.normalize(images)
    assert torch.allclose(real, (images.flatten(1) / 255 - 0.1307) / 0.3081, atol=1e-6)
    assert torch.allclose(module.to_pixels(real)[:, 0], images / 255, atol=1e-6)


def test_cifar10_keeps_its_colours(monkeypatch):
    data = torch.randint(256, (9, 32, 32, 3), dtype=torch.uint8)
    fake = type("CIFAR10", (), {"data": data.numpy()})
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **__: fake)
    images = importlib.import_module(W).load_images()
    assert torch.equal(images, data.movedim(3, 1))


def test_precision_and_recall_order_good_and_bad_pictures(tmp_path):
    share_near = importlib.import_module(V).share_near
    torch.manual_seed(0)
    cut_mnist(tmp_path, 4000)
    mnist = datasets.MNIST(tmp_path)
    held_out, real = (mnist.data / 255).split([1000, 3000])

    def scores(fake):
        return share_near(fake, held_out), share_near(held_out, fake)

    precision, recall = scores(real[:1000])
    assert precision > 0.9 and recall > 0.9
    assert scores(real[:250].repeat(4, 1, 1))[1] < recall - 0.2  # few, repeated
    assert scores(real[mnist.targets[1000:] != 4][:1000])[1] < recall - 0.01  # no 4
    assert scores(real[:1].repeat(1000, 1, 1))[1] < 0.01  # collapse
    assert max(scores(torch.rand(1000, 28, 28))) == 0  # noise
    precision, recall = scores(torch.nn.functional.avg_pool2d(real[:1000], 3, 1, 1))
    assert precision > 0.9 and recall < 0.3  # blurred: only recall sees it


def test_collapse_shows_in_recall():
    script = place(V, EPOCHS=1)
    insert(script, "pixels[:] = test_images[0]", "precision = share_near")
    assert "precision 1.00  recall 0.0" in run(script)


@pytest.mark.parametrize("name", [V, B, C])
def test_losses_at_known_points(name):
    module = importlib.import_module(name)
    logits = torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1).expand(3, 4, 1)
    answers = logits.sigmoid() if name == V else logits  # no, undecided, yes
    found = [module.get_disc_loss(*pair) for pair in zip(answers, answers.flip(0))]
    found += [module.get_gen_loss(answer) for answer in answers]
    expected = 2 * [3.0486, 0.6931, 0.0486]
    assert torch.stack(found).tolist() == pytest.approx(expected, abs=1e-4)


def test_logits_keep_the_gradients_that_a_sigmoid_loses():
    def gradients(name, s):
        """Return those of D's and of G's loss in the logit of a fake."""
        script = importlib.import_module(name)
        s = torch.tensor([[s]], requires_grad=True)
        output = s.sigmoid() if name == V else s
        disc_loss = script.get_disc_loss(output.detach(), output)
        losses = disc_loss, script.get_gen_loss(output)
        return [torch.autograd.grad(x, s, retain_graph=True)[0].item() for x in losses]

    expected = {16.0: (0.5, 0), 17.0: (0, 0), -27.0: (0, -1)}  # of a sigmoid
    expected |= {-30.0: (0, -0.0936), -40.0: (0, 0)}
    for s, found in expected.items():
        assert gradients(V, s) == pytest.approx(found, abs=1e-3)
        kept = (0.5, 0) if s > 0 else (0, -1)
        assert gradients(B, s) == pytest.approx(kept, abs=1e-3)


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
