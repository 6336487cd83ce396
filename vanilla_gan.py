"""Vanilla GAN: two fully connected networks learn to draw handwritten digits by playing against each other.

The generator G turns random noise z into an image. The discriminator D is shown an image x and answers with D(x),
the probability that x is real. D learns to tell real from generated, G learns to be taken for real (equation 1):

    min over G, max over D:  mean of log D(x) over real x  +  mean of log(1 - D(G(z))) over noise z

Paper:   Generative Adversarial Networks, Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661
Run:     python vanilla_gan.py
Watch:   tensorboard --logdir runs
Expect:  digits after 3 epochs, most of them legible after 20; 50 epochs take 8 minutes on two CPU cores.
"""
import math
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets
from torchvision.utils import save_image

import config

# ---- Settings: edit a line to experiment, or copy the script and edit the copy ---------------------------------------
NAME = Path(__file__).stem  # names the checkpoint, the samples and the TensorBoard run, so a copy keeps its own
EPOCHS = 50  # passes over the training images; may be raised later to train on
BATCH_SIZE = 64  # real images a step, and as many generated ones
LEARNING_RATE = 3e-4  # Adam's step size, the same for both networks
BETAS = (0.5, 0.999)  # Adam's memory; 0.5 instead of 0.9 because the opponent changes and old gradients mislead
NOISE_DIM = 64  # length of a noise vector z
NORMALIZE_MEAN = 0.5  # pixels become (pixel - mean) / std: 0.5 and 0.5 give [-1, 1], the range of the generator's tanh;
NORMALIZE_STD = 0.5  # MNIST's own 0.1307 and 0.3081 give [-0.42, 2.82], where tanh cannot reach the white of a stroke
LOG_EVERY = 100  # steps averaged into one point of a TensorBoard curve


# ---- Data ------------------------------------------------------------------------------------------------------------
def load_images(train):
    """Return MNIST's 60,000 training or 10,000 test images, unpacked or downloaded if need be: uint8 (N, 28, 28)."""
    try:
        return datasets.MNIST(config.DATA_PATH, train=train, download=True).data
    except Exception as error:  # no network, no space, or a file that is not what its name says
        files = ", ".join(Path(name).name for name, _ in datasets.MNIST.resources)
        sys.exit(f"No MNIST ({type(error).__name__}): empty {config.DATA_PATH}/MNIST/raw, put {files} in it, try again.")


def normalize(images):
    """Turn uint8 images (N, 28, 28) into the networks' input: float (N, 784)."""
    return (images.flatten(1).float() / 255 - NORMALIZE_MEAN) / NORMALIZE_STD


def to_pixels(images):
    """Undo normalize: images (N, 784) become pictures (N, 1, 28, 28), clamped to [0, 1]."""
    return (images * NORMALIZE_STD + NORMALIZE_MEAN).clamp(0, 1).view(-1, 1, 28, 28)


# ---- Generator -------------------------------------------------------------------------------------------------------
class Generator(nn.Sequential):
    """Turn noise (N, NOISE_DIM) from the standard normal distribution into images (N, 784) in (-1, 1)."""

    def __init__(self):
        super().__init__(
            nn.Linear(NOISE_DIM, 256), nn.BatchNorm1d(256), nn.ReLU(),  # (N, 256)
            nn.Linear(256, 512), nn.BatchNorm1d(512), nn.ReLU(),  # (N, 512)
            nn.Linear(512, 28 * 28), nn.Tanh(),  # (N, 784)
        )


# ---- Discriminator ---------------------------------------------------------------------------------------------------
class Discriminator(nn.Sequential):
    """Turn images (N, 784) into D(x) (N, 1): the probability, from 0 to 1, that each is real."""

    def __init__(self):
        super().__init__(
            nn.Linear(28 * 28, 512), nn.LeakyReLU(0.2), nn.Dropout(0.3),  # (N, 512)
            nn.Linear(512, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3),  # (N, 256)
            nn.Linear(256, 1), nn.Sigmoid(),  # (N, 1)
        )


# ---- Loss ------------------------------------------------------------------------------------------------------------
bce = nn.BCELoss()  # the mean of -log(p) where the target is 1, of -log(1 - p) where it is 0


def get_disc_loss(on_real, on_fake):
    """Return the mean of D's losses on D(x) and D(G(z)), both (N, 1): equation 1 with the sign turned, halved."""
    return (bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))) / 2


def get_gen_loss(on_fake):
    """Return G's loss on D(G(z)) (N, 1): -log D(G(z)). Unlike log(1 - D(G(z))), steep while G is bad (section 3)."""
    return bce(on_fake, torch.ones_like(on_fake))


# ---- Looking at results ----------------------------------------------------------------------------------------------
@torch.no_grad()
def draw(generator, noise):
    """Turn noise (N, NOISE_DIM) into pictures (N, 1, 28, 28) in [0, 1], each independent of the others."""
    generator.eval()  # BatchNorm then uses the statistics it has gathered in training, not those of this batch
    pixels = torch.cat([to_pixels(generator(part)) for part in noise.split(500)])
    generator.train()
    return pixels


def sliced_wasserstein(a, b):
    """Return the sliced Wasserstein distance (Rabin et al. 2011) of two equally large sets of pictures (N, C, H, W).

    Along one direction it is the mean difference of the sorted values; this is its mean over 256 random directions.
    """
    directions = torch.randn(a[0].numel(), 256, generator=torch.Generator().manual_seed(0)).to(a.device)
    directions = nn.functional.normalize(directions, dim=0)  # unit length
    a, b = ((pixels.flatten(1) @ directions).sort(dim=0).values for pixels in (a, b))  # (N, 256)
    return (a - b).abs().mean().item()


if __name__ == "__main__":
    # ---- Device and set-up -------------------------------------------------------------------------------------------
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    live = sys.stdout.isatty()  # a terminal shows a line that changes within the epoch; a file gets one line an epoch
    signal.signal(signal.SIGINT, lambda *_: sys.exit("\n" * live + "Stopped. Run again with LOAD = True to go on."))
    settings = {name: value for name, value in globals().items() if name.isupper()} | {"SEED": config.SEED}
    checkpoint_path = Path(config.CALLBACKS_PATH, f"{NAME}.pt")
    samples_path = Path(config.SAMPLES_PATH, NAME)
    runs_path = Path(config.TENSORBOARD_PATH, NAME)
    if not config.TRAIN and not (config.TEST and config.LOAD and checkpoint_path.exists()):
        sys.exit(f"Nothing to do: set TRAIN = True in config.py, or TEST and LOAD once there is a {checkpoint_path}.")

    images = load_images(train=True).to(device)  # all of them, 47 MB: no loading, decoding or copying while it trains
    for name, most in ("EPOCHS", 10**6), ("BATCH_SIZE", len(images)), ("NOISE_DIM", 10**6), ("LOG_EVERY", 10**6):
        if not isinstance(settings[name], int) or not 1 <= settings[name] <= most:
            sys.exit(f"{name} is {settings[name]!r}, but must be a whole number from 1 to {most:,}.")
    torch.manual_seed(config.SEED)
    generator, discriminator = Generator().to(device), Discriminator().to(device)
    try:
        generator_optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
        discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), LEARNING_RATE, BETAS, fused=True)
        for folder in (checkpoint_path.parent, samples_path, runs_path):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:  # a setting that Adam refuses, a folder that cannot be written
        sys.exit(f"Cannot start: {error}. Mend it in the settings of this script or in config.py.")

    # ---- Load --------------------------------------------------------------------------------------------------------
    done = 0  # epochs completed
    parts = {"generator": generator, "generator_optimizer": generator_optimizer,
             "discriminator": discriminator, "discriminator_optimizer": discriminator_optimizer}
    rng = torch if device.type == "cpu" else torch.get_device_module(device)  # source of order, noise and dropout
    if config.LOAD and checkpoint_path.exists():
        try:
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)  # plain data: runs no code
            for name in settings | checkpoint["settings"]:
                now, then = settings.get(name), checkpoint["settings"].get(name)
                if now != then and not (name == "EPOCHS" and now > then):
                    sys.exit(f"{name} = {now}, but {then} in {checkpoint_path}: set it back, or LOAD = False.")
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            if device.type in checkpoint["random_state"]:  # a CPU cannot go on with a GPU's random numbers
                rng.set_rng_state(checkpoint["random_state"][device.type])
            done = checkpoint["epoch"]
        except Exception as error:  # damaged, foreign or malicious, or the networks have changed since
            error = " ".join(str(error).split())[:200]
            sys.exit(f"{checkpoint_path} does not fit ({error}): move it away, or set LOAD = False to start over.")

    # ---- Train -------------------------------------------------------------------------------------------------------
    if config.TRAIN and done == EPOCHS:
        print(f"{NAME}: all {EPOCHS} epochs are done. Raise EPOCHS to train on, set TEST = True to draw samples.")
    elif config.TRAIN:
        print(f"epochs {done + 1} to {EPOCHS} on {device}; pictures in {samples_path}, curves in {runs_path}", flush=True)
        held_out = to_pixels(normalize(load_images(train=False)[::5][:len(images)].to(device)))  # 2,000, not trained on
        real = to_pixels(normalize(images[:len(held_out)]))
        real_distance = sliced_wasserstein(real, held_out)  # as near as real pictures come
        noise = torch.randn(max(64, len(held_out)), NOISE_DIM, generator=torch.Generator().manual_seed(config.SEED)).to(device)
        steps = len(images) // BATCH_SIZE  # in an epoch; the few images left over have their turn in another epoch
        first = done * steps + 1 if done else 0  # curves count steps; drop what a killed run wrote after its checkpoint
        writer = SummaryWriter(runs_path, purge_step=first)
        writer.add_text("settings", "  \n".join(f"{name} = {value!r}" for name, value in settings.items()), first)
        if done == 0:
            for tag, name, pixels in ("real", "real", real), ("fake", "epoch_0000", draw(generator, noise)):
                save_image(pixels[:64], samples_path / f"{name}.png")
                writer.add_images(f"images/{tag}", pixels[:64], 0)

        for epoch in range(done + 1, EPOCHS + 1):
            order = torch.randperm(len(images), device=device)[:steps * BATCH_SIZE].view(steps, BATCH_SIZE)
            history = torch.empty(steps, 4, device=device)  # losses, D(x), D(G(z)): reading makes a GPU wait
            start = shown = time.perf_counter()
            for step, batch in enumerate(order, 1):
                real = normalize(images[batch])
                fake = generator(torch.randn(BATCH_SIZE, NOISE_DIM, device=device))

                # Discriminator: raise log D(x) + log(1 - D(G(z))). detach() keeps this loss from training G.
                on_real, on_fake = discriminator(torch.cat([real, fake.detach()])).chunk(2)
                disc_loss = get_disc_loss(on_real, on_fake)
                discriminator_optimizer.zero_grad()
                disc_loss.backward()
                discriminator_optimizer.step()

                # Generator: raise log D(G(z)). Frozen, D passes the gradient on to G and computes none of its own.
                discriminator.requires_grad_(False)
                gen_loss = get_gen_loss(discriminator(fake))
                generator_optimizer.zero_grad()
                gen_loss.backward()
                generator_optimizer.step()
                discriminator.requires_grad_(True)

                history[step - 1] = torch.stack([disc_loss, gen_loss, on_real.mean(), on_fake.mean()]).detach()
                if time.perf_counter() - shown > 0.5 or step == steps:
                    means = history[:step].mean(dim=0).tolist()
                    if not all(map(math.isfinite, means)):
                        sys.exit("\n" * live + f"Loss not finite in epoch {epoch}: lower LEARNING_RATE. Checkpoint kept.")
                    shown = time.perf_counter()
                    speed = step * BATCH_SIZE / (shown - start)
                    line = f"epoch {epoch}/{EPOCHS}  D {means[0]:.3f}  G {means[1]:.3f}  {speed:,.0f} images/s"
                    left = ((EPOCHS - epoch + 1) * steps - step) * BATCH_SIZE / speed / 60
                    if live:
                        print(f"\r{line}  {step / steps:4.0%}  {left:.1f} min left ", end="", flush=True)

            # Results: a line, the curves, the pictures, the checkpoint
            pixels = draw(generator, noise)
            distance = sliced_wasserstein(pixels[:len(held_out)], held_out)
            print("\r" * live + f"{line}  D(x) {means[2]:.2f}  D(G(z)) {means[3]:.2f}  "
                  f"distance {distance:.4f} (real {real_distance:.4f})", flush=True)
            for i, values in enumerate(history.cpu().split(LOG_EVERY), 1):
                for tag, value in zip(("loss/discriminator", "loss/generator", "prob/real", "prob/fake"), values.mean(0)):
                    writer.add_scalar(tag, value, (epoch - 1) * steps + min(i * LOG_EVERY, steps))
            writer.add_scalar("quality/sliced_wasserstein", distance, epoch * steps)
            writer.add_scalar("speed/images_per_second", speed, epoch * steps)
            writer.add_images("images/fake", pixels[:64], epoch * steps)
            writer.flush()  # before the checkpoint, so that a kill in between leaves no gap in the curves
            save_image(pixels[:64], samples_path / f"epoch_{epoch:04}.png")
            checkpoint = {"epoch": epoch, "settings": settings, "random_state": {device.type: rng.get_rng_state()}}
            checkpoint |= {name: part.state_dict() for name, part in parts.items()}
            torch.save(checkpoint, checkpoint_path.with_suffix(".tmp"))
            checkpoint_path.with_suffix(".tmp").replace(checkpoint_path)  # whole or not at all, whenever it is killed
        writer.close()

    # ---- Test --------------------------------------------------------------------------------------------------------
    if config.TEST:
        noise = torch.randn(64, NOISE_DIM, generator=torch.Generator().manual_seed(config.SEED + 1)).to(device)
        samples = draw(generator, noise)
        save_image(samples, samples_path / "test.png")

        # Is noise space smooth? Each row walks from one noise vector to another; cos and sin keep the variance at 1.
        angle = torch.linspace(0, math.pi / 2, 10, device=device).view(1, 10, 1)
        walks = noise[:8, None] * angle.cos() + noise[8:16, None] * angle.sin()  # (8, 10, NOISE_DIM)
        save_image(draw(generator, walks.flatten(0, 1)), samples_path / "interpolation.png", nrow=10)

        # Does it copy? Below each row of samples stand the training images nearest to them in pixel space.
        distances = [torch.cdist(samples.flatten(1), to_pixels(normalize(i)).flatten(1)) for i in images.split(5000)]
        nearest = to_pixels(normalize(images[torch.cat(distances, dim=1).argmin(dim=1)]))
        rows = torch.stack([samples.unflatten(0, (8, 8)), nearest.unflatten(0, (8, 8))], dim=1)  # (8, 2, 8, 1, 28, 28)
        save_image(rows.flatten(0, 2), samples_path / "nearest.png")
        print(f"{NAME}: drew test.png, interpolation.png and nearest.png in {samples_path}")
