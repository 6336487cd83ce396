"""Follow the README: its links, pictures, commands, code and diffs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from test_smoke import B, V, checkpoint, edit, place, run

README = (HERE / "README.md").read_text("utf-8")


def blocks(language):
    """Return the README's blocks of code in a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", README)


def test_links_pictures_and_settings():
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'src="([^"]+)"', README)
    headings = re.findall(r"(?m)^#+ (.*)", README)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    pictures = {
        f".github/images/{name}" for name in os.listdir(HERE / ".github/images")
    }
    assert pictures == {link for link in links if link.startswith(".github/images/")}
    for link in {*links} - pictures:
        assert link[1:] in anchors or "https:" in link or (HERE / link).exists(), link
    known = "".join(path.read_text("utf-8") for path in HERE.glob("*.py"))
    for name in {*re.findall(r"`([A-Z_]{4,})\b", README)} - {"NAME", "ADDRESS"}:
        assert re.search(rf"(?m)^{name} = ", known), name
    for name, lines in re.findall(r"\| \[`(\w+\.py)`\].*?\| (\d+) \|", README):
        assert int(lines) == len((HERE / name).read_text("utf-8").splitlines()), name


def test_the_printed_line_the_commands_and_drawing_from_python():
    script = place(V)
    printed = run(script).splitlines()[2] + "\n"
    (line,) = blocks("text")
    assert re.sub(r"[\d.]+", "0", line) == re.sub(r"[\d.]+", "0", printed)
    commands = [command for block in blocks("sh") for command in block.split(" && ")]
    (tensorboard,) = (c.split() for c in commands if c.startswith("tensorboard"))
    words = [sys.executable, "-m", "tensorboard.main", "--inspect", *tensorboard[1:]]
    options = {"cwd": script.parent, "text": True, "capture_output": True}
    output = subprocess.run(words, **options, check=True).stdout
    assert "quality/recall" in output
    (diff,) = (c.split() for c in commands if c.startswith("diff"))
    shown = subprocess.run(diff, cwd=HERE, text=True, capture_output=True, check=False)
    assert shown.returncode == 1 and "BCEWithLogitsLoss" in shown.stdout
    (code,) = (block for block in blocks("python") if "save_image" in block)
    subprocess.run([sys.executable, "-Bc", code], cwd=script.parent, check=True)
    assert len(list(script.parent.glob("digit_*.png"))) == 10


@pytest.mark.parametrize("name, source", [("averaged", B), ("choose_digit", V)])
def test_the_diffs_of_the_exercises(name, source):
    script = place(source, EPOCHS=1)
    target = script.rename(script.with_name(f"{name}.py"))
    before = target.read_text("utf-8")
    (diff,) = (block for block in blocks("diff") if f"+++ {name}.py" in block)
    patch = script.with_name("answer.diff")
    patch.write_text(diff, "utf-8")
    command = ["git", "apply", "-p0", patch.name]
    subprocess.run(command, cwd=script.parent, check=True)
    assert target.read_text("utf-8") != before
    edit(target.with_name("config.py"), TEST=True)
    run(target)
    assert checkpoint(target)["epoch"] == 1
    assert (script.parent / f"samples/{name}/nearest.png").exists()
