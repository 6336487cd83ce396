"""Convolutional GAN: the game of vanilla_gan.py between networks that know which pixels are neighbours.

To a Linear layer an image is 784 numbers in any order. A convolution looks at patches of 5x5 pixels, with the same
weights everywhere: a stroke learned in one place is known in all. D's convolutions move in steps (strides) of two and
so halve the image, 28, 14, 7. G's transposed convolutions paint a patch of 5x5 for each pixel; two of them double the
image, 7, 14, 28. Dropout blanks each number inside D with probability 0.3, anew in every pass, so that D cannot rely on
a few of them. D ends in a logit s, with D(x) = sigmoid(s); bce_logits_gan.py says why.

Paper:   DCGAN, Radford et al. 2016, https://arxiv.org/abs/1511.06434 (here G has LeakyReLU, D Dropout, not BatchNorm)
Run:     python conv_gan.py, and to watch it, tensorboard --logdir runs
Expect:  digits after 5 epochs, most of them legible after 8; an epoch takes 2 minutes on two CPU cores.
"""
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, utils

import config

# ---- Settings: edit a line to experiment, or copy the script and edit the copy ---------------------------------------
NAME = Path(__file__).stem  # names the checkpoint, the samples and the TensorBoard run, so a copy keeps its own
EPOCHS = 100  # passes over the training images; may be raised later to go on
BATCH_SIZE = 256  # real images a step, and as many generated ones; a step updates D, then G; BatchNorm needs 2
LEARNING_RATE = 1e-4  # Adam's step size, the same for both networks; the paper has 2e-4
BETAS = (0.5, 0.999)  # Adam's memory of gradients and their squares; 0.5 as in the paper: with 0.0 D leads longer
NOISE_DIM = 100  # length of a noise vector z
SEED = config.SEED  # of weights, data order and noise; pictures have random numbers of their own
LOG_EVERY = 100  # steps averaged into one point of the curves drawn within an epoch


# ---- Data ------------------------------------------------------------------------------------------------------------
def load_images(train):
    """Return MNIST's 60,000 training or 10,000 test images, unpacked or downloaded if need be: uint8 (N, 28, 28)."""
    try:
        return datasets.MNIST(config.DATA_PATH, train=train, download=True).data
    except Exception as error:  # no network, no space, or a file that is not what its name says
        sys.exit(f"No MNIST ({type(error).__name__}): put its four .gz archives alone in {config.DATA_PATH}/MNIST/raw.")


def normalize(images):
    """Turn uint8 images (N, 28, 28) into what D is shown and G learns to imitate: float (N, 1, 28, 28) in [-1, 1]."""
    return images.unsqueeze(1) / 127.5 - 1


def to_pixels(images):
    """Undo normalize: images (N, 1, 28, 28) become pictures in [0, 1]."""
    return images / 2 + 0.5


# ---- Networks: a stride of 2 makes 7 of 13 and of 14; on the way back output_padding=1 makes 14 of 7, not 13 ---------
class Generator(nn.Sequential):
    """Turn standard normal noise (N, NOISE_DIM) into images (N, 1, 28, 28) in [-1, 1]."""
    def __init__(self):
        super().__init__(
            nn.Linear(NOISE_DIM, 7 * 7 * 256, bias=False),  # (N, 12544); no bias: BatchNorm would subtract it
            nn.BatchNorm1d(7 * 7 * 256), nn.LeakyReLU(0.2),
            nn.Unflatten(1, (256, 7, 7)),  # (N, 256, 7, 7)
            nn.ConvTranspose2d(256, 128, 5, stride=1, padding=2, bias=False),  # (N, 128, 7, 7)
            nn.BatchNorm2d(128), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(128, 64, 5, stride=2, padding=2, output_padding=1, bias=False),  # (N, 64, 14, 14)
            nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(64, 1, 5, stride=2, padding=2, output_padding=1), nn.Tanh(),  # (N, 1, 28, 28)
        )


class Discriminator(nn.Sequential):
    """Turn images (N, 1, 28, 28) into logits (N, 1): above 0, D takes it for real; D(x) is the sigmoid."""
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 64, 5, stride=2, padding=2), nn.LeakyReLU(0.2), nn.Dropout(0.3),  # (N, 64, 14, 14)
            nn.Conv2d(64, 128, 5, stride=2, padding=2), nn.LeakyReLU(0.2), nn.Dropout(0.3),  # (N, 128, 7, 7)
            nn.Flatten(), nn.Linear(128 * 7 * 7, 1),  # (N, 1)
        )


# ---- Loss ------------------------------------------------------------------------------------------------------------
bce = nn.BCEWithLogitsLoss()  # mean of -log sigmoid(s) where the target is 1, of -log(1 - sigmoid(s)) where it is 0


# ---- Looking at results ----------------------------------------------------------------------------------------------
@torch.no_grad()
def draw(generator, noise):
    """Turn noise (N, NOISE_DIM) into pictures (N, 1, 28, 28) in [0, 1]."""
    generator.eval()  # BatchNorm uses the statistics gathered in training: a picture depends on its own noise alone
    pixels = torch.cat([to_pixels(generator(part)) for part in noise.split(500)])  # 500 at a time: less memory
    generator.train()
    return pixels


def sliced_wasserstein(a, b):
    """Return how far apart two equally large sets (N, C, H, W) are (sliced Wasserstein, after Rabin et al. 2011):
    project both on a direction, sort, average |a - b| by rank, then over 256 random directions, always the same."""
    directions = torch.randn(a[0].numel(), 256, generator=torch.Generator().manual_seed(0))
    directions = nn.functional.normalize(directions, dim=0).to(a.device)  # of length 1
    a, b = ((pixels.flatten(1) @ directions).sort(dim=0).values for pixels in (a, b))  # (N, 256)
    return (a - b).abs().mean().item()


if __name__ == "__main__":
    # ---- Device and set-up -------------------------------------------------------------------------------------------
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    live = sys.stdout.isatty()  # text * live is for a terminal alone, where a line changes within the epoch
    signal.signal(signal.SIGINT, lambda *_: sys.exit("\n" * live + "Stopped. Run again with LOAD = True to go on."))
    settings = {key: value if isinstance(value, (int, float, str, tuple)) else repr(value)  # plain: loads safely
                for key, value in globals().items() if key.isupper()}
    checkpoint_path = Path(config.CALLBACKS_PATH, f"{NAME}.pt")
    samples_path, runs_path = Path(config.SAMPLES_PATH, NAME), Path(config.TENSORBOARD_PATH, NAME)
    try:
        assert config.TRAIN or config.TEST and config.LOAD and checkpoint_path.exists(), "TRAIN first, or LOAD and TEST"
        images = load_images(train=True).to(device)  # they stay there: training reads no file
        for name, least in ("EPOCHS", 1), ("BATCH_SIZE", 2), ("NOISE_DIM", 1), ("LOG_EVERY", 1), ("SEED", 0):
            assert isinstance(settings[name], int) and settings[name] >= least, f"{name} must be an integer >= {least}"
        assert BATCH_SIZE <= len(images), f"BATCH_SIZE = {BATCH_SIZE} is more than the {len(images)} training images"
        for folder in (samples_path, checkpoint_path.parent, runs_path)[:3 if config.TRAIN else 1]:
            folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        generator, discriminator = Generator().to(device), Discriminator().to(device)
        generator_optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)  # quicker
        discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), LEARNING_RATE, BETAS, fused=True)
        settings |= {"Generator": repr(generator), "Discriminator": repr(discriminator)}  # Load refuses other layers
    except Exception as error:  # an impossible setting, a folder that cannot be made
        sys.exit(f"Cannot start: {error}. Mend it in this script or in config.py.")
    parts = {"generator": generator, "generator_optimizer": generator_optimizer,
             "discriminator": discriminator, "discriminator_optimizer": discriminator_optimizer}
    rng = torch if device.type == "cpu" else torch.get_device_module(device)  # holds the random state
    done = 0  # complete epochs

    # ---- Load --------------------------------------------------------------------------------------------------------
    if config.LOAD and checkpoint_path.exists():
        try:
            assert zipfile.ZipFile(checkpoint_path).testzip() is None, "damaged"
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)  # plain data: runs no code
            for name in settings | checkpoint["settings"]:
                now, then = settings.get(name), checkpoint["settings"].get(name)
                if now != then and not (name == "EPOCHS" and now > then):
                    sys.exit(f"{name} = {now!r:.50} but {then!r:.50} in {checkpoint_path}: undo it, or LOAD = False.")
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            rng.set_rng_state(checkpoint["random_state"].get(device.type, rng.get_rng_state()))  # not another device's
            done = checkpoint["epoch"]
        except Exception as error:  # damaged, foreign or malicious
            sys.exit(f"{checkpoint_path} does not fit ({error!r:.120}): move it away, or LOAD = False to start over.")

    # ---- Train -------------------------------------------------------------------------------------------------------
    if config.TRAIN and done == EPOCHS:
        print(f"{NAME}: all {EPOCHS} epochs are done. To train on raise EPOCHS, to draw set TEST = True in config.py.")
    elif config.TRAIN:
        print(f"Epochs {done + 1} to {EPOCHS} on {device}. Pictures: {samples_path}. Curves: {runs_path}.", flush=True)
        held_out = to_pixels(normalize(load_images(train=False)[::5][:len(images)].to(device)))  # 2,000, not trained on
        real_pixels = to_pixels(normalize(images[:len(held_out)]))
        real_distance = sliced_wasserstein(real_pixels, held_out)  # about what a perfect generator would reach
        noise = torch.randn(max(64, len(held_out)), NOISE_DIM, generator=torch.Generator().manual_seed(SEED)).to(device)
        steps = len(images) // BATCH_SIZE  # in an epoch; the few images left over have their turn in another epoch
        is_real, is_fake = torch.ones(BATCH_SIZE, 1, device=device), torch.zeros(BATCH_SIZE, 1, device=device)
        tags = "loss/discriminator", "loss/generator", "prob/real", "prob/fake"
        writer = SummaryWriter(runs_path, purge_step=done * steps + 1 if done else 0)  # hide what was left over
        writer.add_text("settings", "  \n".join(f"{key} = {value!r}" for key, value in settings.items()), done * steps)
        if done == 0:
            for tag, name, pixels in ("real", "real", real_pixels), ("fake", "epoch_0000", draw(generator, noise[:64])):
                utils.save_image(pixels[:64], samples_path / f"{name}.png")
                writer.add_images(f"images/{tag}", pixels[:64], 0)
        for epoch in range(done + 1, EPOCHS + 1):
            order = torch.randperm(len(images), device=device)[:steps * BATCH_SIZE].view(steps, BATCH_SIZE)
            history = torch.empty(steps, len(tags), device=device)  # on the device: reading it would wait for each step
            start = shown = time.perf_counter()
            for step, batch in enumerate(order, 1):
                real = normalize(images[batch])
                fake = generator(torch.randn(BATCH_SIZE, NOISE_DIM, device=device))

                # Discriminator: raise log D(x) + log(1 - D(G(z))), halved. detach() keeps its gradient out of G.
                on_real, on_fake = discriminator(torch.cat([real, fake.detach()])).chunk(2)
                disc_loss = (bce(on_real, is_real) + bce(on_fake, is_fake)) / 2
                discriminator_optimizer.zero_grad()
                disc_loss.backward()
                discriminator_optimizer.step()

                # Generator: raise log D(G(z)), not lower log(1 - D(G(z))): steeper (non-saturating) for D(G(z)) near 0.
                discriminator.requires_grad_(False)  # frozen: D passes the gradient on to G, computes none of its own
                gen_loss = bce(discriminator(fake), is_real)
                generator_optimizer.zero_grad()
                gen_loss.backward()
                generator_optimizer.step()
                discriminator.requires_grad_(True)

                probs = on_real.sigmoid().mean(), on_fake.sigmoid().mean()
                history[step - 1] = torch.stack([disc_loss, gen_loss, *probs]).detach()
                if time.perf_counter() - shown > 0.5 or step == steps:
                    means, shown = history[:step].mean(dim=0).tolist(), time.perf_counter()
                    speed = order[:step].numel() / (shown - start)
                    line = f"epoch {epoch}/{EPOCHS}  D {means[0]:.3f}  G {means[1]:.3f}  {speed:,.0f} images/s"
                    left = ((EPOCHS - epoch + 1) * steps / step - 1) * (shown - start) / 60
                    print(f"\r{line}  {step / steps:4.0%}  {left:.1f} min left " * live, end="", flush=True)
            pixels = draw(generator, noise)
            distance = sliced_wasserstein(pixels[:len(held_out)], held_out)
            print("\r" * live + f"{line}  distance {distance:.4f} (real {real_distance:.4f})", flush=True)
            if not all(x.isfinite().all() for x in (history, *generator.parameters(), *discriminator.parameters())):
                sys.exit("Not saved: loss or weights are not finite. Lower LEARNING_RATE and set LOAD = False.")
            for i, values in enumerate(history.cpu().split(LOG_EVERY), 1):
                for tag, value in zip(tags, values.mean(dim=0)):
                    writer.add_scalar(tag, value, (epoch - 1) * steps + min(i * LOG_EVERY, steps))
            writer.add_scalar("quality/sliced_wasserstein", distance, epoch * steps)
            writer.add_scalar("speed/images_per_second", speed, epoch * steps)
            writer.add_images("images/fake", pixels[:64], epoch * steps)
            writer.flush()  # before the checkpoint, so that a kill in between leaves no gap in the curves
            utils.save_image(pixels[:64], samples_path / f"epoch_{epoch:04}.png")
            checkpoint = {"epoch": epoch, "settings": settings, "random_state": {device.type: rng.get_rng_state()}}
            checkpoint |= {name: part.state_dict() for name, part in parts.items()}
            torch.save(checkpoint, checkpoint_path.with_suffix(".tmp"))
            checkpoint_path.with_suffix(".tmp").replace(checkpoint_path)  # whole or not at all, whenever it is killed

    # ---- Test --------------------------------------------------------------------------------------------------------
    if config.TEST:
        noise = torch.randn(64, NOISE_DIM, generator=torch.Generator().manual_seed(SEED + 1)).to(device)
        samples = draw(generator, noise)
        # Is latent (noise) space smooth? Each row walks from one noise vector to another; cos, sin keep the variance.
        angle = torch.linspace(0, torch.pi / 2, 10, device=device).view(1, 10, 1)
        walks = noise[:8, None] * angle.cos() + noise[8:16, None] * angle.sin()  # (8, 10, NOISE_DIM)
        # Does it copy? To the right of each sample stands the training image nearest to it in pixel space.
        distances = [torch.cdist(samples.flatten(1), to_pixels(normalize(i)).flatten(1)) for i in images.split(5000)]
        nearest = to_pixels(normalize(images[torch.cat(distances, dim=1).argmin(dim=1)]))
        utils.save_image(samples, samples_path / "test.png")
        utils.save_image(draw(generator, walks.flatten(0, 1)), samples_path / "interpolation.png", nrow=10)
        utils.save_image(torch.stack([samples, nearest], dim=1).flatten(0, 1), samples_path / "nearest.png", nrow=16)
        print(f"{NAME}: drew test.png, interpolation.png and nearest.png in {samples_path}")
