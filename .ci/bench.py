"""Measure training speed: python .ci/bench.py [SCRIPT ...]

Three loops take turns, so that a machine that slows down slows all three:

- script:   train_step, with random images of the data
- bare:     the same arithmetic on one fixed batch
- tutorial: train_step with a DataLoader, Adam not fused, and .item() in each step

Prints the medians of images/s, and of the ratios in each round. Close other programs.
"""

import importlib
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
STEPS = {"vanilla_gan": 300, "bce_logits_gan": 300, "conv_gan": 50, "dcgan_wgan_gp": 20}
ROUNDS = 5


def bare_step(script, real, generator, opponent, gen_optimizer, optimizer):
    """Do the arithmetic of train_step on a fixed batch."""
    noise, wasserstein = script.get_noise(len(real), "cpu"), hasattr(script, "Critic")
    for _ in range(script.CRITIC_STEPS if wasserstein else 1):
        fake = generator(noise)
        outputs = opponent(real), opponent(fake.detach())
        if wasserstein:
            penalty, _ = script.gradient_penalty(opponent, real, fake.detach())
            loss = script.get_critic_loss(*outputs, penalty)
        else:
            loss = script.get_disc_loss(*outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if wasserstein:
        fake = generator(noise)
    gen_loss = script.get_gen_loss(opponent(fake))
    gen_optimizer.zero_grad()
    gen_loss.backward()
    gen_optimizer.step()


def speed(name, kind):
    """Return the images/s of a loop, after some steps that warm up."""
    script, steps = importlib.import_module(name), STEPS[name]
    wasserstein = hasattr(script, "Critic")
    if wasserstein:
        script.DATASET, script.CHANNELS = "mnist", 1
    networks = (
        script.Generator(),
        (script.Critic if wasserstein else script.Discriminator)(),
    )
    settings = {"lr": script.LEARNING_RATE, "betas": script.BETAS}
    settings["fused"] = kind != "tutorial"
    parts = *networks, *(torch.optim.Adam(n.parameters(), **settings) for n in networks)
    images = script.load_images()
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    )
    if wasserstein:  # whose train_step normalizes
        transform = transforms.PILToTensor()
    data = datasets.MNIST(ROOT / "data", transform=transform)
    loader = iter(DataLoader(data, script.BATCH_SIZE, shuffle=True))
    fixed = script.normalize(images[: script.BATCH_SIZE])
    start = time.perf_counter()
    for step in range(-steps // 5, steps):
        if step == 0:
            start = time.perf_counter()
        if kind == "bare":
            bare_step(script, fixed, *parts)
        elif kind == "script":
            indices = torch.randint(len(images), (script.BATCH_SIZE,))
            real = images if wasserstein else script.normalize(images[indices])
            script.train_step(real, *parts)
        else:
            real = next(loader)[0]
            real = real if wasserstein else real.view_as(fixed)
            for value in script.train_step(real, *parts).values():
                value.item()
    count = steps * script.BATCH_SIZE * (script.CRITIC_STEPS if wasserstein else 1)
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, images/s")
    print("script            script   bare  tutorial  script/bare  script/tutorial")
    for name in sys.argv[1:] or STEPS:
        name = name.removesuffix(".py")
        kinds = "script", "bare", "tutorial"
        rounds = [[speed(name, kind) for kind in kinds] for _ in range(ROUNDS)]
        medians = [statistics.median(column) for column in zip(*rounds)]
        to_bare = statistics.median(s / b for s, b, _ in rounds)
        to_tutorial = statistics.median(s / t for s, _, t in rounds)
        line = "{:16}{:8.0f}{:7.0f}{:10.0f}{:13.2f}{:17.2f}"
        print(line.format(name, *medians, to_bare, to_tutorial), flush=True)
