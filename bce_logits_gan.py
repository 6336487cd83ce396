"""Logits GAN: the game of vanilla_gan.py with a numerically stable loss.

In vanilla_gan.py, D ends in a sigmoid, and BCELoss takes its logarithm. Call D's output
before the sigmoid the logit s: D(x) is sigmoid(s). Both networks can lose their
gradient:

- If D takes a fake for real, with s of 17 or more, float32 rounds p = sigmoid(s) to 1,
  so its slope is 0. D learns nothing from its worst mistakes.
- If D is sure of a fake, s is far below 0. G's loss -log p has slope -1 / p, and the
  sigmoid has p (1 - p), so the gradient with respect to s should be near -1. But it is
  -0.09 at s = -30 and -4e-6 at -40, because BCELoss computes -1 / p as
  (p - 1) / (p (1 - p)), and never divides by less than 1e-12.

Here, D gives the logit, and BCEWithLogitsLoss computes sigmoid and logarithm together:

    -log sigmoid(s)        =  max(0, -s)  +  log(1 + exp(-|s|))
    -log(1 - sigmoid(s))   =  max(0, s)   +  log(1 + exp(-|s|))

This exp() cannot overflow, and the gradient is sigmoid(s) - target: 1 for D's mistake
at s = 17, and -1 for G at s = -40.

Also new: functions build the same layers from blocks, and G ends in a sigmoid. Its
outputs, pixels from 0 to 1, are normalised like those of real images.

Paper:   Goodfellow et al. 2014, equation 1, https://arxiv.org/abs/1406.2661
Run:     python bce_logits_gan.py; after Ctrl-C, the same command resumes
Watch:   pictures in samples/bce_logits_gan; for curves, run tensorboard --logdir runs
         in this folder, and open the address that it prints
Expect:  digits after 5 epochs, good ones after 12; all 50 take 3 to 10 minutes on a CPU
Healthy: D's loss stays at 0.6 to 0.69, G's at 0.7 to 1, and distance (of fakes from
         real images) falls to 0.03. If D's loss stays near 0, D has won: it catches
         every fake, whatever G tries, and fakes get no better
Draw:    set TRAIN = False and TEST = True in config.py, and run this script again
Change:  edit a setting, and the next start goes on with it: more EPOCHS train longer.
         To compare settings, or to try other layers or another NOISE_DIM, use a copy
"""

import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets
from torchvision.utils import save_image

import config

# ---- Settings ----
EPOCHS = 50  # passes over the training images
BATCH_SIZE = 128  # real images in a step, and equally many fakes
LEARNING_RATE = 3e-4  # Adam's step size
# Adam steps along an average of past gradients, divided by the root of an average of
# their squares. BETAS say how much these remember: nothing (0.0, not 0.9) of gradients,
# which come from an older opponent, and much (0.999, the default) of squares.
BETAS = (0.0, 0.999)
NOISE_DIM = 64  # random numbers from which G makes one image
# Pixels from 0 to 1 become (pixel - mean) / std, in real images and in fakes alike. So
# MNIST's own mean and standard deviation, 0.1307 and 0.3081, work here as well.
NORMALIZE_MEAN = 0.5
NORMALIZE_STD = 0.5
LOG_EVERY = 100  # steps between two points of a curve
PICTURES = 1000  # fakes after each epoch, for the distance; 64 of them are shown

NAME = Path(__file__).stem  # names the results after this file, so a copy has its own
CHECKPOINT = config.CALLBACKS_PATH / f"{NAME}.pt"
SAMPLES = config.SAMPLES_PATH / NAME


# ---- Data ----
def load_images():
    """Return MNIST's training images: uint8 (60000, 28, 28)."""
    return datasets.MNIST(config.DATA_PATH, download=True).data


def get_batches(count, device):
    """Return the image indices of each step in an epoch: tensors (BATCH_SIZE,).

    All images are in memory, so no DataLoader is needed. Each comes once, in random
    order. An incomplete last batch is left out, unless it is the only one.
    """
    steps = max(1, count // BATCH_SIZE)
    return torch.randperm(count, device=device).split(BATCH_SIZE)[:steps]


def normalize(images):
    """Turn uint8 images (N, 28, 28) into the images that D gets: float (N, 784)."""
    return (images.flatten(1) / 255 - NORMALIZE_MEAN) / NORMALIZE_STD


def to_pixels(images):
    """Undo normalize: float (N, 784) becomes pictures (N, 1, 28, 28) from 0 to 1."""
    return (images * NORMALIZE_STD + NORMALIZE_MEAN).clamp(0, 1).view(-1, 1, 28, 28)


def get_noise(count, device):
    """Return standard normal noise for G: float (count, NOISE_DIM)."""
    return torch.randn(count, NOISE_DIM, device=device)


# ---- Networks ----
def get_gen_block(in_dim, out_dim):
    """Return a block of G, from (N, in_dim) to (N, out_dim)."""
    return nn.Sequential(
        # BatchNorm gives each feature mean 0 and variance 1 over the batch, then scales
        # and shifts it. A bias before it would be subtracted again, so there is none.
        nn.Linear(in_dim, out_dim, bias=False),
        nn.BatchNorm1d(out_dim),
        nn.ReLU(),
    )


def get_disc_block(in_dim, out_dim):
    """Return a block of D, from (N, in_dim) to (N, out_dim)."""
    return nn.Sequential(
        nn.Linear(in_dim, out_dim),
        nn.LeakyReLU(0.2),  # G's gradients come through D; ReLU blocks some of them
    )


class Generator(nn.Module):
    """Turn noise (N, NOISE_DIM) into images (N, 784), normalised like real ones."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            get_gen_block(NOISE_DIM, 64),  # (N, 64)
            get_gen_block(64, 128),  # (N, 128)
            get_gen_block(128, 256),  # (N, 256)
            get_gen_block(256, 512),  # (N, 512)
            nn.Linear(512, 28 * 28),  # (N, 784)
            nn.Sigmoid(),  # pixels from 0 to 1
        )

    def forward(self, noise):
        return (self.layers(noise) - NORMALIZE_MEAN) / NORMALIZE_STD


class Discriminator(nn.Module):
    """Turn images (N, 784) into logits (N, 1): D(x) is their sigmoid."""

    def __init__(self):
        super().__init__()
        # Real images and fakes come in separate batches. BatchNorm would give both the
        # same mean, and so hide a difference from D.
        self.layers = nn.Sequential(
            get_disc_block(28 * 28, 256),  # (N, 256)
            get_disc_block(256, 128),  # (N, 128)
            get_disc_block(128, 64),  # (N, 64)
            nn.Linear(64, 1),  # (N, 1)
        )

    def forward(self, images):
        return self.layers(images)


# ---- Losses ----
# The mean of -log sigmoid(s) if the target is 1, of -log(1 - sigmoid(s)) if it is 0
bce = nn.BCEWithLogitsLoss()


def get_disc_loss(real_output, fake_output):
    """Return D's loss from logits (N, 1) that should be high if real, low if fake."""
    real_loss = bce(real_output, torch.ones_like(real_output))
    fake_loss = bce(fake_output, torch.zeros_like(fake_output))
    return (real_loss + fake_loss) / 2  # halved, to be on the scale of G's loss


def get_gen_loss(fake_output):
    """Return G's loss from D's logits for fakes (N, 1), which G pushes up."""
    return bce(fake_output, torch.ones_like(fake_output))


# ---- One step of the game ----
def train_step(real, generator, discriminator, gen_optimizer, disc_optimizer):
    """Update D, then G, with real images (N, 784) and N fakes.

    Return the values of TensorBoard's curves: {name: tensor of one number}.
    """
    generator.train()  # back to training mode: draw() switches to evaluation mode
    fake = generator(get_noise(len(real), real.device))  # (N, 784)

    # Update D: minimise the mean of -log D(x) and -log(1 - D(G(z))).
    # detach() cuts the fakes off from G: this backward() computes D's gradients alone.
    real_output = discriminator(real)  # (N, 1)
    fake_output = discriminator(fake.detach())  # (N, 1)
    disc_loss = get_disc_loss(real_output, fake_output)
    disc_optimizer.zero_grad()
    disc_loss.backward()
    disc_optimizer.step()

    # Update G: show the same fakes to the new D, and minimise -log D(G(z)). backward()
    # gives D gradients, too, but gen_optimizer changes G alone.
    gen_loss = get_gen_loss(discriminator(fake))
    gen_optimizer.zero_grad()
    gen_loss.backward()
    gen_optimizer.step()
    return {
        "loss/discriminator": disc_loss.detach(),  # the value alone, without its graph
        "loss/generator": gen_loss.detach(),
        "prob/real": real_output.detach().sigmoid().mean(),  # before D's update
        "prob/fake": fake_output.detach().sigmoid().mean(),
    }


# ---- Training ----
def train():
    """Train up to EPOCHS, and resume from the checkpoint if there is one."""
    gpu = torch.accelerator.current_accelerator(check_available=True)  # or None
    device = config.DEVICE or gpu or "cpu"
    torch.manual_seed(config.SEED)
    fixed_noise = get_noise(PICTURES, device)  # the same for the pictures of all epochs
    generator = Generator().to(device)
    discriminator = Discriminator().to(device)
    # Each optimizer changes one network. fused=True computes the same, but faster.
    gen_optimizer = Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
    disc_optimizer = Adam(discriminator.parameters(), LEARNING_RATE, BETAS, fused=True)
    parts = {  # what a checkpoint saves
        "generator": generator,
        "discriminator": discriminator,
        "gen_optimizer": gen_optimizer,
        "disc_optimizer": disc_optimizer,
    }
    epochs_done, step = 0, 0
    if config.LOAD and CHECKPOINT.exists():
        epochs_done, step = load_checkpoint(parts)
    print(f"{epochs_done} of {EPOCHS} epochs are done.")
    if epochs_done >= EPOCHS:
        return

    print(f"Training on {device}. Pictures are in {SAMPLES}.", flush=True)
    images = load_images().to(device)
    # TensorBoard hides what an older run wrote from purge_step on; 0 hides all of it.
    purge_step = step + 1 if step else 0
    writer = SummaryWriter(config.TENSORBOARD_PATH / NAME, purge_step=purge_step)
    if epochs_done == 0:
        show(generator, fixed_noise, images, writer, epoch=0, step=0)
    for epoch in range(epochs_done + 1, EPOCHS + 1):
        start = time.time()
        # Each epoch has its own seed, so that an interrupted one can be repeated.
        torch.manual_seed(10_000 * config.SEED + epoch)
        for indices in get_batches(len(images), device):
            real = normalize(images[indices])
            values = train_step(
                real, generator, discriminator, gen_optimizer, disc_optimizer
            )
            step += 1
            if step % LOG_EVERY == 0:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                print(f"epoch {epoch}, step {step}", end="\r", flush=True)

        values["distance"] = show(generator, fixed_noise, images, writer, epoch, step)
        save_checkpoint(parts, epoch, step)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        minutes = (EPOCHS - epoch) * (time.time() - start) / 60
        print(f"epoch {epoch}/{EPOCHS}  {shown}  {minutes:.1f} min left", flush=True)


# ======== The lesson ends here; pictures and files follow ========
@torch.no_grad()
def draw(generator, noise):
    """Return the pictures that G makes from noise, with pixels from 0 to 1.

    In evaluation mode, BatchNorm uses the mean and variance gathered in training, not
    the batch's: a picture depends on its own noise alone. train_step switches back.
    """
    generator.eval()
    return to_pixels(generator(noise))


def get_distance(fakes, reals):
    """Return the sliced Wasserstein distance of fakes and equally many real pictures.

    The dot product with a random direction turns each picture into one number. If both
    sets are distributed alike, their smallest numbers nearly agree, and so do the
    second smallest, and so on. The distance is the root of the mean squared difference
    of these pairs, over 256 directions: about 0.02 for two sets of 1,000 real digits,
    above 0.1 if fakes look alike, are pale, or noise. It hardly sees fine strokes.
    """
    directions = nn.functional.normalize(torch.randn(fakes[0].numel(), 256), dim=0)
    fakes = (fakes.flatten(1) @ directions).sort(dim=0).values
    reals = (reals.flatten(1) @ directions).sort(dim=0).values
    return (fakes - reals).pow(2).mean().sqrt()


def show(generator, noise, images, writer, epoch, step):
    """Save 64 fakes and 64 real pictures. Return the distance for all fakes."""
    fakes = draw(generator, noise).cpu()
    if not fakes.isfinite().all():
        sys.exit("Training diverged: lower LEARNING_RATE, and run this script again.")
    indices = torch.randint(len(images), (len(fakes),), device=images.device)
    reals = to_pixels(normalize(images[indices])).cpu()
    distance = get_distance(fakes, reals)
    writer.add_scalar("distance", distance, step)
    writer.add_images("images/fake", fakes[:64], step)
    writer.add_images("images/real", reals[:64], step)
    writer.flush()
    SAMPLES.mkdir(parents=True, exist_ok=True)
    save_image(fakes[:64], SAMPLES / f"epoch_{epoch:04}.png")
    save_image(reals[:64], SAMPLES / "real.png")
    return distance


def save_checkpoint(parts, epoch, step):
    """Save the state of each part, and the numbers of completed epochs and steps."""
    states = {name: part.state_dict() for name, part in parts.items()}
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    new = CHECKPOINT.with_suffix(".new")
    torch.save({"epoch": epoch, "step": step, **states}, new)
    new.replace(CHECKPOINT)  # a run that is killed while saving keeps the old file


def load_checkpoint(parts):
    """Load the state of each part. Return the numbers of completed epochs and steps."""
    print(f"Loading {CHECKPOINT}. To start anew, move it away.", flush=True)
    checkpoint = torch.load(CHECKPOINT, map_location="cpu")  # its GPU is not needed
    for name, part in parts.items():
        state = checkpoint[name]
        if "optimizer" in name:  # its settings come from the script, not the file
            state["param_groups"] = part.state_dict()["param_groups"]
        part.load_state_dict(state)
    return checkpoint["epoch"], checkpoint["step"]


def test():
    """Draw 64 samples with the checkpoint's generator."""
    generator = Generator()
    load_checkpoint({"generator": generator})
    torch.manual_seed(-1 - config.SEED)  # negative, unlike the seeds of training
    SAMPLES.mkdir(parents=True, exist_ok=True)
    save_image(draw(generator, get_noise(64, "cpu")), SAMPLES / "test.png")
    print(f"Drew {SAMPLES / 'test.png'}")


if __name__ == "__main__":
    if config.TRAIN:
        train()
    if config.TEST:
        test()
