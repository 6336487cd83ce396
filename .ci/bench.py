"""Measure the scripts' training speed: python .ci/bench.py [SCRIPT ...]

For each script, three measurements take turns, so that a machine that slows down slows
all three. Each has a process of its own, as memory that was claimed once is faster:

- script:   the script's own train() on a cut of MNIST, its second epoch
- bare:     the same arithmetic, again and again on one fixed batch
- tutorial: the usual loop: DataLoader with transforms, Adam not fused, new fakes for
            G's update, .item() in every step

Prints the medians of images/s, and of the ratios in each round. Close other programs.
"""

import contextlib
import gzip
import importlib
import io
import multiprocessing
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
# Each script with the steps of one measurement, and the settings that differ
SCRIPTS = {
    "vanilla_gan": (300, {}),
    "bce_logits_gan": (300, {}),
    "conv_gan": (12, {}),
    "dcgan_wgan_gp": (20, {"DATASET": "mnist"}),
}
ROUNDS = 5


def place(name, folder):
    """Put a copy of the script and a cut of MNIST into the folder."""
    steps, settings = SCRIPTS[name]
    text = (ROOT / f"{name}.py").read_text("utf-8")
    batch_size = int(re.search(r"(?m)^BATCH_SIZE = (\d+)", text)[1])
    for key, value in {"EPOCHS": 2, **settings}.items():
        text = re.sub(rf"(?m)^{key} = \S+", f"{key} = {value!r}", text)
    (folder / f"{name}.py").write_text(text, "utf-8")
    shutil.copy(ROOT / "config.py", folder)
    raw = folder / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for archive in (ROOT / "data/MNIST/raw").glob("*.gz"):
        count = 320 if "t10k" in archive.name else steps * batch_size
        header, size = (16, 28 * 28) if "images" in archive.name else (8, 1)
        with gzip.open(archive) as file:
            content = bytearray(file.read(header + count * size))
        content[4:8] = count.to_bytes(4, "big")
        (raw / archive.stem).write_bytes(content)


def load(name, folder):
    """Import the script from the folder."""
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def alone(measure, *arguments):
    """Call a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def speed(module, device, step, steps):
    """Return the images/s of many steps, after as many that warm up."""
    for _ in range(2):
        if device.type != "cpu":
            torch.accelerator.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
    images = steps * module.BATCH_SIZE * getattr(module, "CRITIC_STEPS", 1)
    return images / (time.perf_counter() - start)


def pick_device():
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def parts_of(module, device, **options):
    """Return both networks and their optimizers."""
    networks = [module.Generator().to(device)]
    opponent = getattr(module, "Critic", None) or module.Discriminator
    networks.append(opponent().to(device))
    adam = [
        torch.optim.Adam(n.parameters(), module.LEARNING_RATE, module.BETAS, **options)
        for n in networks
    ]
    return *networks, *adam


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def opponent_loss(module, opponent, real, fake):
    """Return the loss of the discriminator or critic."""
    outputs = opponent(real), opponent(fake)
    if hasattr(module, "Critic"):
        penalty, _ = module.gradient_penalty(opponent, real, fake)
        return module.get_critic_loss(*outputs, penalty)
    return module.get_disc_loss(*outputs)


def noise_for(module, device):
    dims = [1, 1] * hasattr(module, "Critic")
    return torch.randn(module.BATCH_SIZE, module.NOISE_DIM, *dims, device=device)


def script_speed(name, folder):
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    module, times = load(name, folder), []
    for path in module.CHECKPOINT.parent, module.SAMPLES:
        path.mkdir(parents=True, exist_ok=True)
    draw = module.draw

    def timed_draw(*arguments):  # at the end of each epoch
        times.append(time.perf_counter())
        return draw(*arguments)

    def save_checkpoint(*_):
        times.append(time.perf_counter())

    module.draw, module.save_checkpoint = timed_draw, save_checkpoint
    with contextlib.redirect_stdout(io.StringIO()):
        module.train()
    *_, begin, end, _ = times  # of the second epoch: from the last save to its drawing
    steps = SCRIPTS[name][0] * getattr(module, "CRITIC_STEPS", 1)
    return steps * module.BATCH_SIZE / (end - begin)


def bare_speed(name, folder):
    module, device = load(name, folder), pick_device()
    generator, opponent, gen_optimizer, optimizer = parts_of(module, device, fused=True)
    wasserstein = hasattr(module, "Critic")
    shape = (1, 28, 28) if wasserstein else (28, 28)
    real = torch.randint(256, (module.BATCH_SIZE, *shape), dtype=torch.uint8)
    real, noise = module.normalize(real.to(device)), noise_for(module, device)

    def step():
        for _ in range(getattr(module, "CRITIC_STEPS", 1)):
            fake = generator(noise)
            update(optimizer, opponent_loss(module, opponent, real, fake.detach()))
        if wasserstein:
            fake = generator(noise)
        update(gen_optimizer, module.get_gen_loss(opponent(fake)))

    return speed(module, device, step, SCRIPTS[name][0])


def tutorial_speed(name, folder):
    module, device = load(name, folder), pick_device()
    generator, opponent, gen_optimizer, optimizer = parts_of(module, device)
    wasserstein = hasattr(module, "Critic")
    mean = getattr(module, "NORMALIZE_MEAN", 0.5)
    std = getattr(module, "NORMALIZE_STD", 0.5)
    ways = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    transform = transforms.Compose([transforms.Resize(64)] * wasserstein + ways)
    data = datasets.MNIST(folder / "data", transform=transform)
    shape = module.normalize(torch.zeros(1, *[1] * wasserstein, 28, 28)).shape[1:]

    def endless():
        while True:
            yield from DataLoader(data, module.BATCH_SIZE, shuffle=True)

    batches = endless()

    def step():
        for _ in range(getattr(module, "CRITIC_STEPS", 1)):
            real = next(batches)[0].view(-1, *shape).to(device)
            fake = generator(noise_for(module, device)).detach()
            loss = opponent_loss(module, opponent, real, fake)
            update(optimizer, loss)
        fake = generator(noise_for(module, device))
        gen_loss = module.get_gen_loss(opponent(fake))
        update(gen_optimizer, gen_loss)
        return loss.item(), gen_loss.item()

    return speed(module, device, step, SCRIPTS[name][0])


if __name__ == "__main__":
    print(f"torch {torch.__version__} on {pick_device()}, medians of {ROUNDS} rounds")
    print(f"{torch.get_num_threads()} threads, columns in images/s, then ratios")
    print("script            script   bare  tutorial  script/bare  script/tutorial")
    for name in sys.argv[1:] or SCRIPTS:
        name, rounds = name.removesuffix(".py"), []
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            place(name, folder)
            for _ in range(ROUNDS):
                measures = script_speed, bare_speed, tutorial_speed
                rounds.append([alone(measure, name, folder) for measure in measures])
        script, bare, tutorial = (statistics.median(column) for column in zip(*rounds))
        to_bare = statistics.median(s / b for s, b, _ in rounds)
        to_tutorial = statistics.median(s / t for s, _, t in rounds)
        print(
            f"{name:16}{script:8.0f}{bare:7.0f}{tutorial:10.0f}"
            f"{to_bare:13.2f}{to_tutorial:17.2f}",
            flush=True,
        )
