"""Measure the scripts' training speed: python .ci/bench.py [SCRIPT ...]

For each script, several rounds of three measurements in turn, so that a machine that slows down slows all three, each
in a process of its own, as memory that one has claimed makes the next one faster:
- script:   the script itself, run as a user runs it on a cut of MNIST; the images/s it prints for its second epoch
- bare:     the same networks, forward and backward passes and optimizer steps, again and again on one fixed batch
- tutorial: the usual way: DataLoader with ToTensor and Normalize, Adam not fused, a generator pass for each loss,
            a discriminator pass for each half of its batch, nothing frozen, .item() in every step
Prints the median images/s of each, and the median over the rounds of the ratios. Close other programs first.
"""

import contextlib
import gzip
import importlib.util
import multiprocessing
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parent.parent
# Each script with the steps of one measurement, some seconds long, and the settings that differ from its own.
SCRIPTS = {
    "vanilla_gan": (300, {}),
    "bce_logits_gan": (100, {}),
    "conv_gan": (6, {}),
    "dcgan_wgan_gp": (8, {"DATASET": "mnist", "FEATURES": 16}),
}
ROUNDS = 5


def cut_mnist(folder, count):
    """Write the first `count` training images, and as few test images as the script needs, in MNIST's own format."""
    folder.mkdir(parents=True)
    for name, number in ("train", count), ("t10k", 320):
        for kind, header, size in ("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1):
            with gzip.open(
                ROOT / "data" / "MNIST" / "raw" / f"{name}-{kind}-ubyte.gz"
            ) as file:
                start, content = bytearray(file.read(header)), file.read(number * size)
            start[4:8] = number.to_bytes(4, "big")
            (folder / f"{name}-{kind}-ubyte").write_bytes(start + content)


def place(name, folder):
    """Put a copy of the script with two epochs of the wanted length into the folder."""
    steps, settings = SCRIPTS[name]
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    for key, value in {"EPOCHS": 2, **settings}.items():
        text = re.sub(
            rf"^{key} = [^ ]+", f"{key} = {value!r}", text, flags=re.MULTILINE
        )
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "config.py", folder)
    cut_mnist(folder / "data" / "MNIST" / "raw", steps * load(name, folder).BATCH_SIZE)


def load(name, folder):
    """Return the script in the folder as a module."""
    sys.path.insert(0, str(folder))  # for config.py
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alone(measure, *arguments):
    """Return what a function returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def speed_of_script(name, folder):
    """Return the images/s that the script in the folder prints for its second epoch."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    script = [sys.executable, folder / f"{name}.py"]
    output = subprocess.run(
        script, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return float(
        re.search(r"epoch 2/2 .*?([\d,]+) images/s", output)[1].replace(",", "")
    )


class Game:
    """Both networks of a script with their optimizers, and the pieces of a step."""

    def __init__(self, module, device, fused):
        self.module, self.device, self.wasserstein = (
            module,
            device,
            hasattr(module, "Critic"),
        )
        self.generator = module.Generator().to(device)
        self.critic = (
            module.Critic if self.wasserstein else module.Discriminator
        )().to(device)  # or discriminator
        self.gen_optimizer, self.critic_optimizer = (
            torch.optim.Adam(
                net.parameters(),
                module.LEARNING_RATE,
                module.BETAS,
                fused=True if fused else None,
            )
            for net in (self.generator, self.critic)
        )
        self.is_real = torch.ones(module.BATCH_SIZE, 1, device=device)
        self.is_fake = torch.zeros(module.BATCH_SIZE, 1, device=device)
        self.critic_steps = module.CRITIC_STEPS if self.wasserstein else 1

    def noise(self):
        shape = (
            (self.module.NOISE_DIM, 1, 1)
            if self.wasserstein
            else (self.module.NOISE_DIM,)
        )
        return torch.randn(self.module.BATCH_SIZE, *shape, device=self.device)

    def critic_loss(self, on_real, on_fake, real, fake):
        if self.wasserstein:
            penalty, _ = self.module.gradient_penalty(self.critic, real, fake)
            return penalty - on_real.mean() + on_fake.mean()
        return (
            self.module.bce(on_real, self.is_real)
            + self.module.bce(on_fake, self.is_fake)
        ) / 2

    def gen_loss(self, on_fake):
        return (
            -on_fake.mean()
            if self.wasserstein
            else self.module.bce(on_fake, self.is_real)
        )

    def speed(self, step, steps):
        """Return the images/s of `steps` calls, after as many that are not counted."""
        for _ in range(steps):
            step()
        synchronize = (
            torch.accelerator.synchronize
            if self.device.type != "cpu"
            else contextlib.nullcontext
        )
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        return (
            self.module.BATCH_SIZE
            * self.critic_steps
            * steps
            / (time.perf_counter() - start)
        )


def train(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def speed_of_bare_steps(name, folder):
    """Return the images/s of the script's arithmetic alone."""
    module, steps, device = load(name, folder), SCRIPTS[name][0], pick_device()
    game = Game(module, device, fused=True)
    shape = (1, 28, 28) if game.wasserstein else (28, 28)
    real = module.normalize(
        torch.randint(
            256, (module.BATCH_SIZE, *shape), dtype=torch.uint8, device=device
        )
    )
    noise = game.noise()

    def step():
        for _ in range(game.critic_steps):
            fake = game.generator(noise)
            on_real, on_fake = game.critic(torch.cat([real, fake.detach()])).chunk(2)
            train(
                game.critic_optimizer,
                game.critic_loss(on_real, on_fake, real, fake.detach()),
            )
        game.critic.requires_grad_(False)
        train(
            game.gen_optimizer,
            game.gen_loss(
                game.critic(game.generator(noise) if game.wasserstein else fake)
            ),
        )
        game.critic.requires_grad_(True)

    return game.speed(step, steps)


def speed_of_tutorial(name, folder):
    """Return the images/s of the usual way with the same networks and batch size."""
    module, steps, device = load(name, folder), SCRIPTS[name][0], pick_device()
    game = Game(module, device, fused=False)
    mean, std = (
        getattr(module, "NORMALIZE_MEAN", 0.5),
        getattr(module, "NORMALIZE_STD", 0.5),
    )
    if isinstance(list(module.Generator())[-1], torch.nn.Sigmoid):
        mean, std = 0.0, 1.0
    ways = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    data = datasets.MNIST(
        folder / "data",
        transform=transforms.Compose([transforms.Resize(64)] * game.wasserstein + ways),
    )
    shape = module.normalize(torch.zeros(1, *[1] * game.wasserstein, 28, 28)).shape[1:]

    def endless():
        while True:
            yield from DataLoader(data, module.BATCH_SIZE, shuffle=True)

    batches = endless()

    def step():
        for _ in range(game.critic_steps):
            real = next(batches)[0].view(-1, *shape).to(device)
            fake = game.generator(game.noise()).detach()
            loss = game.critic_loss(game.critic(real), game.critic(fake), real, fake)
            train(game.critic_optimizer, loss)
        gen_loss = game.gen_loss(game.critic(game.generator(game.noise())))
        train(game.gen_optimizer, gen_loss)
        return loss.item(), gen_loss.item()

    return game.speed(step, steps)


def pick_device():
    return (
        torch.accelerator.current_accelerator()
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )


if __name__ == "__main__":
    device = pick_device()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"torch {torch.__version__} on {device}{threads}; medians of {ROUNDS} rounds")
    print(
        f"{'script':16}{'script':>12}{'bare':>12}{'tutorial':>12}{'script/bare':>14}{'script/tutorial':>18}"
    )
    for name in sys.argv[1:] or SCRIPTS:
        name, rounds = name.removesuffix(".py"), []
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            place(name, folder)
            for _ in range(ROUNDS):
                rounds.append(
                    (
                        speed_of_script(name, folder),
                        alone(speed_of_bare_steps, name, folder),
                        alone(speed_of_tutorial, name, folder),
                    )
                )
        script, bare, tutorial = (statistics.median(speeds) for speeds in zip(*rounds))
        to_bare = statistics.median(script / bare for script, bare, _ in rounds)
        to_tutorial = statistics.median(
            script / tutorial for script, _, tutorial in rounds
        )
        print(
            f"{name:16}{script:10,.0f}/s{bare:10,.0f}/s{tutorial:10,.0f}/s{to_bare:13.2f}x{to_tutorial:17.2f}x",
            flush=True,
        )
