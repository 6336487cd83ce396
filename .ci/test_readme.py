"""Follow both pages: their links, pictures, commands, code and diffs."""

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parent.parent
README, ANSWERS = HERE / "README.md", HERE / ".github/exercises/README.md"
V, W = "vanilla_gan", "dcgan_wgan_gp"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def blocks(page, language):
    """Return a page's blocks of code in a language."""
    text = page.read_text("utf-8")
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def replace(path, **lines):
    """Give settings another value, each on its line."""
    text = path.read_text("utf-8")
    for name, value in lines.items():
        text, count = re.subn(rf"(?m)^{name} = .*", f"{name} = {value!r}", text)
        assert count == 1, name
    path.write_text(text, "utf-8")


def start(command, folder):
    options = {"cwd": folder, "env": ENVIRONMENT, "capture_output": True, "text": True}
    return subprocess.run(command, **options, check=False)


def run(folder, *words):
    """Run Python in a folder, which must succeed. Return what it prints."""
    command = [sys.executable, *words]
    result = start(command, folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def project(tmp_path):
    """Return a folder with the project, and 120 images of MNIST."""
    unwanted = shutil.ignore_patterns(".git", ".venv", "data", "runs", "samples")
    project = shutil.copytree(HERE, tmp_path / "gans", ignore=unwanted)
    (project / "data/MNIST/raw").mkdir(parents=True)
    for path in (HERE / "data/MNIST/raw").glob("*.gz"):
        header, size = (16, 784) if "images" in path.name else (8, 1)
        content = bytearray(gzip.decompress(path.read_bytes())[: header + 120 * size])
        content[4:8] = (120).to_bytes(4, "big")
        (project / "data/MNIST/raw" / path.stem).write_bytes(content)
    replace(project / "config.py", DEVICE="cpu")
    return project


def shrink(script, **settings):
    """Give a script small settings."""
    settings = {
        "EPOCHS": 2,
        "BATCH_SIZE": 24,
        "PICTURES": 80,
        "LOG_EVERY": 1,
    } | settings
    replace(script, **settings)


def checkpoint(folder, name):
    return torch.load(folder / f"checkpoints/{name}.pt", weights_only=True)


def curve(folder, name, tag):
    events = EventAccumulator(str(folder / "runs" / name)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def answer(project, name):
    """Make the script of an answer with the page's own command."""
    (command,) = re.findall(
        rf"(?m)^(cp \w+\.py {name}\.py)\n(git apply .*)", ANSWERS.read_text("utf-8")
    )
    for line in command:
        subprocess.run(line.split(), cwd=project, check=True)
    shrink(project / f"{name}.py")
    return project / f"{name}.py"


def test_links_pictures_and_settings():
    pictures = {path.name for path in (HERE / ".github/images").iterdir()}
    shown, known = set(), "".join(p.read_text("utf-8") for p in HERE.glob("*.py"))
    for page in README, ANSWERS:
        text = page.read_text("utf-8")
        links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        for link in links:
            if link.startswith("https:"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            shown.add(target.name)
            headings = re.findall(r"(?m)^#+ (.*)", target.read_text()) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", h.lower()) for h in headings]
            assert not anchor or anchor in [a.replace(" ", "-") for a in anchors], link
        for name in {*re.findall(r"`([A-Z_]{4,})\b", text)} - {"MNIST"}:
            assert re.search(rf"(?m)^{name} = ", known), name
    assert pictures <= shown


def test_the_step_on_the_first_screen():
    def code(text):
        lines = [line.split("  #")[0].strip() for line in text.splitlines()]
        return [line for line in lines if line and not line.startswith("#")]

    script = (HERE / f"{V}.py").read_text("utf-8")
    step = code(re.search(r"(?s)\n    fake = .*?(?=\n    return)", script)[0])
    assert step == code(blocks(README, "python")[0])


def test_the_first_five_minutes(project):
    shrink(project / f"{V}.py")
    printed = run(project, f"{V}.py").splitlines()[-1]
    (line,) = blocks(README, "text")
    assert re.sub(r"[\d.]+", "0", line.strip()) == re.sub(r"[\d.]+", "0", printed)
    (command,) = re.findall(r"`tensorboard (.*?)`", README.read_text("utf-8"))
    inspected = run(project, "-m", "tensorboard.main", "--inspect", *command.split())
    assert "distance" in inspected
    (command,) = re.findall(r"`(git diff .*?)`", README.read_text("utf-8"))
    diff = start(command.split(), project)
    assert diff.returncode == 1 and "BCEWithLogitsLoss" in diff.stdout


def test_the_message_of_the_check(project):
    mine = project / "mine.py"
    text = (project / f"{V}.py").read_text("utf-8")
    mine.write_text(
        text.replace("discriminator(fake))", "discriminator(fake.detach()))")
    )
    check = [sys.executable, ".github/exercises/check.py", "mine.py"]
    result = start(check, project)
    message = (result.stdout + result.stderr).strip()
    assert result.returncode == 1 and message in README.read_text("utf-8"), message


def test_own_pictures(project):
    settings = next(b for b in blocks(README, "python") if "DATASET" in b)
    names = re.findall(r"(?m)^(\w+) = ", settings)
    script = project / "my_pictures.py"
    text = (project / f"{W}.py").read_text("utf-8")
    for name, line in zip(names, settings.splitlines()):
        text, count = re.subn(rf"(?m)^{name} = .*", lambda _: line, text)  # noqa: B023
        assert count == 1, name
    script.write_text(text.replace("EPOCHS = 50", "EPOCHS = 0"))
    (project / "pictures").mkdir()
    Image.new("RGB", (90, 70), "red").save(project / "pictures/red.webp")
    code = "import my_pictures as m; print(m.NAME, len(m.load_images()))"
    assert run(project, "-c", code).endswith("my_pictures_pictures 5000\n")


DRAW = blocks(README, "python")[-1]
RECIPES = blocks(ANSWERS, "python")


def recipe(word):
    """Return the recipe that contains a word."""
    (block,) = (block for block in RECIPES if word in block)
    return block


def test_drawing_from_python(project):
    shrink(project / f"{V}.py")
    run(project, f"{V}.py")
    words = "between", "nearest.png", "found.png", "generator.pt2", "epochs.gif"
    compile(recipe("generator.onnx"), "onnx", "exec")  # its packages are not installed
    run(project, "-c", DRAW + "".join(recipe(word) for word in words))
    made = {path.name for path in project.iterdir()}
    assert made > {f"digit_{i}.png" for i in range(10)}
    assert made > {"between.png", "nearest.png", "found.png", "generator.pt2"}
    assert "epochs.gif" in made and len(RECIPES) == len(words) + 5


def test_the_map(project):
    shutil.copy(project / f"{V}.py", noise_2 := project / "noise_2.py")
    shrink(noise_2, NOISE_DIM=2)
    run(project, "noise_2.py")
    run(project, "-c", recipe("noise_2"))
    with Image.open(project / "map.png") as picture:
        assert picture.size == (20 * 28, 20 * 28)


def test_ten_sevens(project):
    answer(project, "choose_digit")
    run(project, "choose_digit.py")
    run(project, "-c", recipe("sevens.png"))
    assert (project / "sevens.png").exists()


def test_a_rate_that_falls(project):
    script = project / f"{V}.py"
    shrink(script, EPOCHS=4)
    (line,) = re.findall(
        r"(?m)^ +torch.manual_seed\(10.*\n", text := script.read_text()
    )
    script.write_text(text.replace(line, line + recipe("param_groups")))
    run(project, script.name)
    group = checkpoint(project, V)["gen_optimizer"]["param_groups"][0]
    assert group["lr"] == pytest.approx(3e-4 / 4)


def test_pictures_that_do_not_fit_into_memory(project):
    script = project / f"{W}.py"
    replace(script, DATASET="pictures")
    text = script.read_text("utf-8")
    (line,) = re.findall(r"(?m)^ +images = torch.empty.*\n", text)
    (last,) = re.findall(r"(?m)^ +return images.repeat.*\n", text)
    text = text.replace(last, "    return images\n")
    script.write_text(text.replace(line, recipe("from_file")))
    (project / "pictures").mkdir()
    Image.new("RGB", (90, 70), "red").save(project / "pictures/red.png")
    code = f"import {W} as w; print(w.load_images().float().mean((0, 2, 3)).tolist())"
    assert run(project, "-c", code).endswith("[255.0, 0.0, 0.0]\n")
    assert (project / "images.bin").stat().st_size == 3 * 64 * 64


@pytest.mark.parametrize("name", ["averaged", "choose_digit"])
def test_the_diffs_of_the_exercises(project, name):
    answer(project, name)
    replace(project / "config.py", TEST=True)
    run(project, f"{name}.py")
    assert checkpoint(project, name)["epoch"] == 2
    assert (project / f"samples/{name}/test.png").exists()


RECORD = """
import torch, several
step = several.train_step
def recorded(real, generator, *rest):
    values = step(real, generator, *rest)
    torch.save([*generator.parameters()], f"weights_{several.RANK}.pt")
    return values
several.train_step = recorded
several.train()
"""


def test_several_processes(project):
    torchrun = "-m", "torch.distributed.run", "--nproc-per-node"
    script = answer(project, "several")
    replace(script, EPOCHS=3)
    shrink(project / f"{V}.py", EPOCHS=3)
    run(project, f"{V}.py")
    run(project, *torchrun, "1", "several.py")
    plain, alone = (checkpoint(project, name) for name in (V, "several"))
    torch.testing.assert_close(plain, alone, rtol=0, atol=0)

    (project / "record.py").write_text(RECORD)
    (project / "checkpoints/several.pt").unlink()
    replace(script, EPOCHS=1)
    replace(project / "config.py", TEST=True)
    run(project, *torchrun, "2", "record.py")
    replace(script, EPOCHS=3)
    run(project, *torchrun, "2", "record.py")  # resumes
    weights = [torch.load(project / f"weights_{i}.pt") for i in (0, 1)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    distances = (curve(project, name, "distance") for name in ("several", V))
    for (_, found), (_, expected) in zip(*distances, strict=True):
        assert found == pytest.approx(expected, abs=0.01)

    run(project, *torchrun, "2", "several.py")  # draws: in the first process alone
    assert (project / "samples/several/test.png").exists()
    code = "several.CHECKPOINT = several.CHECKPOINT.with_suffix(f'.{several.RANK}')"
    (project / "record.py").write_text(RECORD.replace("several.train()", code))
    shutil.copy(project / "checkpoints/several.pt", project / "checkpoints/several.0")
    (project / "apart.py").write_text("import record\n\nrecord.several.train()")
    result = start([sys.executable, *torchrun, "2", "apart.py"], project)
    assert result.returncode and "the same checkpoint" in result.stderr
