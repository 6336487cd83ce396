"""Logits GAN: the game of vanilla_gan.py with a numerically stable loss.

In vanilla_gan.py, D ends in a sigmoid, and BCELoss takes its logarithm. Call D's output
before the sigmoid the logit s: D(x) is sigmoid(s). In float32, both networks can lose
their gradient:

- For a fake with s of 17 or more, sigmoid(s) is rounded to 1, where its slope is 0. D
  learns nothing from its greatest mistakes.
- For a fake with s far below 0, the gradient of G's loss with respect to s should be
  -1, but is -0.09 at s = -30 and -4e-6 at -40. BCELoss divides by p (1 - p), where
  p = sigmoid(s), to cancel the sigmoid's slope, but never by less than 1e-12.

Here, D ends in the logit, and BCEWithLogitsLoss computes sigmoid and logarithm in one
step, where exp() cannot overflow. Its gradient is sigmoid(s) - target, 1 for a fake
with s = 17:

    -log sigmoid(s)        =  max(0, -s)  +  log(1 + exp(-|s|))
    -log(1 - sigmoid(s))   =  max(0, s)   +  log(1 + exp(-|s|))

Also new: functions build the same layers from blocks, and G ends in a sigmoid. Its
outputs, pixels from 0 to 1, are normalised like those of real images.

Paper:   Goodfellow et al. 2014, equation 1, https://arxiv.org/abs/1406.2661
Run:     python bce_logits_gan.py; after Ctrl-C, the same command resumes
Watch:   pictures in samples/bce_logits_gan; for curves, run tensorboard --logdir runs
         in this folder, and open the address that it prints
Expect:  digits after 5 epochs, good ones after 12; all 50 take 3 to 8 minutes on a CPU
Healthy: D's loss is 0.6 to 0.69, G's 0.7 to 1, and distance (of fakes from real images)
         falls to 0.04. If D's loss stays near 0, D has won: no small change to a fake
         makes D doubt any more, so G no longer learns what would make fakes better
Draw:    set TRAIN = False and TEST = True in config.py, and run this script again
Change:  edited settings count from the next start on; try other layers in a copy
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
# How much Adam remembers: nothing (0.0) of past gradients, which were computed against
# an older opponent, and much (0.999, the default) of their squares, which scale steps.
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
    order. The last few, if they fill no batch, are skipped, unless there is no other.
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
        nn.LeakyReLU(0.2),  # G learns through D: where ReLU is flat, this is not
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
        # No BatchNorm: it would hide from D that fakes and real images differ in mean.
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
    """Repeat train_step up to EPOCHS, resuming from the checkpoint if there is one."""
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
    print(f"{epochs_done} of {EPOCHS} epochs are done. To train longer, raise EPOCHS.")
    if epochs_done >= EPOCHS:
        return

    print(f"Training on {device}. Pictures are in {SAMPLES}.", flush=True)
    images = load_images().to(device)
    # TensorBoard hides an older run's points: those after the checkpoint, or all.
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

    The dot product with a random direction turns each picture into one number. Sorted,
    the numbers of both sets nearly agree if the sets are distributed alike. This is the
    root of their mean squared difference, over 256 directions: 0.03 to 0.05 for random
    sets of 1,000 real digits, above 0.1 for fakes that look alike, are pale, or noise.
    It hardly sees fine strokes, so pictures get better after it has stopped falling.
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
    checkpoint = torch.load(CHECKPOINT, map_location="cpu")  # works without its GPU too
    for name, part in parts.items():
        state = checkpoint[name]
        if "optimizer" in name:  # keep the script's settings, such as its learning rate
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
