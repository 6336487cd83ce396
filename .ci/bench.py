"""Measure the scripts' training speed: python .ci/bench.py [SCRIPT ...]

For each script, several rounds of three measurements in turn, so that a machine that slows down slows all three:
- script:   the script itself, run as a user runs it on a cut of the data; the images/s it prints for its second epoch
- bare:     the same networks, forward and backward passes and optimizer steps, again and again on one fixed batch
- tutorial: the usual way: DataLoader with ToTensor and Normalize, default Adam, a generator pass for each loss,
            a discriminator pass for each half of its batch, nothing frozen, .item() in every step
Prints the median images/s of each, and the median over the rounds of the ratios. Close other programs first.
"""
import contextlib
import gzip
import importlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEPS = {"vanilla_gan": 300}  # of one measurement: a few seconds
ROUNDS = 7


def cut_mnist(folder, count):
    """Write the first `count` training images, and as few test images as the script needs, in MNIST's own format."""
    folder.mkdir(parents=True)
    for name, number in ("train", count), ("t10k", 320):
        for kind, header, size in ("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1):
            with gzip.open(ROOT / "data" / "MNIST" / "raw" / f"{name}-{kind}-ubyte.gz") as file:
                start, content = bytearray(file.read(header)), file.read(number * size)
            start[4:8] = number.to_bytes(4, "big")
            (folder / f"{name}-{kind}-ubyte").write_bytes(start + content)


def speed_of_script(name, steps, batch_size):
    """Return the images/s that a copy of the script prints for its second epoch of `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cut_mnist(folder / "data" / "MNIST" / "raw", steps * batch_size)
        shutil.copy(ROOT / "config.py", folder)
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        (folder / f"{name}.py").write_text(re.sub(r"^EPOCHS = \d+", "EPOCHS = 2", text, flags=re.M), encoding="utf-8")
        script = [sys.executable, folder / f"{name}.py"]
        output = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(re.search(r"epoch 2/2 .*?([\d,]+) images/s", output)[1].replace(",", ""))


def speed_of_bare_steps(module, steps, device):
    """Return the images/s of the script's arithmetic alone."""
    generator, discriminator = module.Generator().to(device), module.Discriminator().to(device)
    gen_optimizer, disc_optimizer = (torch.optim.Adam(net.parameters(), module.LEARNING_RATE, module.BETAS, fused=True)
                                     for net in (generator, discriminator))
    real = module.normalize(torch.randint(256, (module.BATCH_SIZE, 28, 28), dtype=torch.uint8, device=device))
    noise = torch.randn(module.BATCH_SIZE, module.NOISE_DIM, device=device)
    is_real, is_fake = torch.ones(module.BATCH_SIZE, 1, device=device), torch.zeros(module.BATCH_SIZE, 1, device=device)

    def step():
        fake = generator(noise)
        on_real, on_fake = discriminator(torch.cat([real, fake.detach()])).chunk(2)
        disc_loss = (module.bce(on_real, is_real) + module.bce(on_fake, is_fake)) / 2
        disc_optimizer.zero_grad()
        disc_loss.backward()
        disc_optimizer.step()
        discriminator.requires_grad_(False)
        gen_loss = module.bce(discriminator(fake), is_real)
        gen_optimizer.zero_grad()
        gen_loss.backward()
        gen_optimizer.step()
        discriminator.requires_grad_(True)

    return module.BATCH_SIZE * steps / timed(step, steps, device)


def speed_of_tutorial(module, steps, device):
    """Return the images/s of the usual way with the same networks and batch size."""
    generator, discriminator = module.Generator().to(device), module.Discriminator().to(device)
    gen_optimizer, disc_optimizer = (torch.optim.Adam(net.parameters(), module.LEARNING_RATE, module.BETAS)
                                     for net in (generator, discriminator))
    shape = module.normalize(torch.zeros(1, 28, 28, dtype=torch.uint8)).shape[1:]
    mean, std = getattr(module, "NORMALIZE_MEAN", 0.5), getattr(module, "NORMALIZE_STD", 0.5)
    data = datasets.MNIST(ROOT / "data", download=True, transform=transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(mean, std)]))
    data = Subset(data, range(module.BATCH_SIZE * (steps + 3)))
    is_real, is_fake = torch.ones(module.BATCH_SIZE, 1, device=device), torch.zeros(module.BATCH_SIZE, 1, device=device)
    batches = iter(DataLoader(data, module.BATCH_SIZE, shuffle=True))

    def step():
        real = next(batches)[0].view(-1, *shape).to(device)
        fake = generator(torch.randn(len(real), module.NOISE_DIM, device=device))
        disc_loss = (module.bce(discriminator(real), is_real) + module.bce(discriminator(fake.detach()), is_fake)) / 2
        disc_optimizer.zero_grad()
        disc_loss.backward()
        disc_optimizer.step()
        fake = generator(torch.randn(len(real), module.NOISE_DIM, device=device))
        gen_loss = module.bce(discriminator(fake), is_real)
        gen_optimizer.zero_grad()
        gen_loss.backward()
        gen_optimizer.step()
        return disc_loss.item(), gen_loss.item()

    return module.BATCH_SIZE * steps / timed(step, steps, device)


def timed(step, steps, device):
    """Return the seconds that `steps` steps take, after three that are not counted."""
    for _ in range(3):
        step()
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else contextlib.nullcontext
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"torch {torch.__version__} on {device}{threads}; medians of {ROUNDS} rounds")
    print(f"{'script':16}{'script':>12}{'bare':>12}{'tutorial':>12}{'script/bare':>14}{'script/tutorial':>18}")
    for name in sys.argv[1:] or STEPS:
        name = name.removesuffix(".py")
        module, steps, rounds = importlib.import_module(name), STEPS[name], []
        for _ in range(ROUNDS):
            rounds.append((speed_of_script(name, steps, module.BATCH_SIZE),
                           speed_of_bare_steps(module, steps, device),
                           speed_of_tutorial(module, steps, device)))
        script, bare, tutorial = (statistics.median(speeds) for speeds in zip(*rounds))
        to_bare = statistics.median(script / bare for script, bare, _ in rounds)
        to_tutorial = statistics.median(script / tutorial for script, _, tutorial in rounds)
        print(f"{name:16}{script:10,.0f}/s{bare:10,.0f}/s{tutorial:10,.0f}/s{to_bare:13.2f}x{to_tutorial:17.2f}x",
              flush=True)
