"""Follow the README: its links, pictures, commands, code and diffs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from test_smoke import V, assert_same, checkpoint, curves, place, run, trained

README = (HERE / "README.md").read_text("utf-8")


def blocks(language):
    """Return the README's blocks of code in a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", README)


def command(script, *words):
    """Run Python with some words in the folder of a script. Return what it prints."""
    options = {"cwd": script.parent, "text": True, "capture_output": True}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process
    output = subprocess.run([sys.executable, "-B", *words], **options, check=False)
    assert output.returncode == 0, output.stderr
    return output.stdout


def answer(name, **settings):
    """Return the script of an answer, made by the command of the README."""
    script = place(V, **settings)
    shutil.copytree(HERE / ".github/exercises", script.parent / ".github/exercises")
    (line,) = re.findall(rf"(?m)^cp {V}.py {name}.py && patch.*", README)
    subprocess.run(line, cwd=script.parent, shell=True, check=True)
    copy, diff = script.with_name(f"{name}.py"), f".github/exercises/{name}.diff"
    text = copy.read_text("utf-8")
    shutil.copy(script, copy)
    subprocess.run(["git", "apply", "-p0", diff], cwd=script.parent, check=True)
    assert copy.read_text("utf-8") == text != script.read_text("utf-8")
    return copy


def test_links_pictures_and_settings():
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    headings = re.findall(r"(?m)^#+ (.*)", README)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    names = os.listdir(HERE / ".github/images")
    pictures = {f".github/images/{name}" for name in names}
    assert pictures == {link for link in links if link.startswith(".github/images/")}
    for link in {*links} - pictures:
        assert link[1:] in anchors or "https:" in link or (HERE / link).exists(), link
    known = "".join(path.read_text("utf-8") for path in HERE.glob("*.py"))
    for name in {*re.findall(r"`([A-Z_]{4,})\b", README)} - {
        "NAME",
        "ADDRESS",
        "MNIST",
    }:
        assert re.search(rf"(?m)^{name} = ", known), name
    for name, whole, lesson in re.findall(
        r"\| \[`(\w+\.py)`\].*?\| (\d+), (\d+) \|", README
    ):
        lines = (HERE / name).read_text("utf-8").splitlines()
        assert int(whole) == len(lines), name
        end = lines.index("# ======== The lesson ends here ========")
        assert int(lesson) == end - 2, name


def test_the_printed_line_and_the_commands():
    script, output = trained(V)
    printed = output.split("\r")[-1].strip()
    (line,) = blocks("text")
    assert re.sub(r"[\d.]+", "0", line.strip()) == re.sub(r"[\d.]+", "0", printed)
    commands = [line for block in blocks("sh") for line in re.split(" && |\n", block)]
    (tensorboard,) = (c.split() for c in commands if c.startswith("tensorboard"))
    inspected = command(script, "-m", "tensorboard.main", "--inspect", *tensorboard[1:])
    assert "diversity" in inspected
    (diff,) = (c.split() for c in commands if c.startswith("diff"))
    shown = subprocess.run(diff, cwd=HERE, text=True, capture_output=True, check=False)
    assert shown.returncode == 1 and "BCEWithLogitsLoss" in shown.stdout


def test_the_map_and_drawing_from_python():
    script = place(V, EPOCHS=1, NOISE_DIM=2)
    noise_2 = script.rename(script.with_name("noise_2.py"))
    run(noise_2)
    the_map, first, *others = (b for b in blocks("python") if "DATASET" not in b)
    command(noise_2, "-c", the_map)
    with Image.open(script.with_name("map.png")) as picture:
        assert picture.size == (20 * 28, 20 * 28)
    script = trained(V)[0]
    assert len(others) == 4
    command(script, "-c", first + "".join(others))
    made = {path.name for path in script.parent.iterdir()}
    assert made > {f"digit_{i}.png" for i in range(10)}
    assert made > {"nearest.png", "found.png", "generator.pt2", "epochs.gif"}


@pytest.mark.parametrize("name", ["averaged", "choose_digit"])
def test_the_diffs_of_the_exercises(name):
    script = answer(name, EPOCHS=2)
    run(script, TEST=True)
    assert checkpoint(script)["epoch"] == 2
    assert (script.parent / f"samples/{name}/interpolation.png").exists()


RECORD = """
import torch, several
step = several.train_step
def recorded(real, generator, *rest):
    curves = step(real, generator, *rest)
    torch.save([*generator.parameters()], f"weights_{several.RANK}.pt")
    return curves
several.train_step = recorded
several.train()
"""


def test_several_processes():
    torchrun = "-m", "torch.distributed.run", "--nproc-per-node"
    script = answer("several")
    script.with_name("record.py").write_text(RECORD)
    command(script, *torchrun, "1", "record.py")
    plain = trained(V)[0]
    shutil.copytree(plain.parent, script.parent / "plain")
    shutil.copy(script, alone := script.parent / "plain/several.py")
    for folder in "checkpoints", "samples", "runs":
        for path in (script.parent / "plain" / folder).glob(f"{V}*"):
            path.rename(path.with_name(path.name.replace(V, "several")))
    assert_same(script, alone)

    script = answer("several", EPOCHS=1)
    script.with_name("record.py").write_text(RECORD)
    command(script, *torchrun, "2", "record.py")
    script.write_text(script.read_text().replace("EPOCHS = 1", "EPOCHS = 3"))
    command(script, *torchrun, "2", "record.py")  # resumes
    weights = [torch.load(script.with_name(f"weights_{i}.pt")) for i in (0, 1)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert checkpoint(script)["step"] == 15
    losses = [curves(s)[0]["loss/discriminator"] for s in (script, plain)]
    for (_, found), (_, expected) in zip(*losses, strict=True):
        assert found == pytest.approx(expected, abs=0.01)
