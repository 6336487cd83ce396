"""Logits GAN: the game of vanilla_gan.py with a numerically stable loss.

In vanilla_gan.py, D ends in a sigmoid, and BCELoss takes its logarithm. Call D's output
before the sigmoid the logit s: D(x) is sigmoid(s). In float32, both networks can lose
their gradient:

- For a fake with s of 17 or more, sigmoid(s) is rounded to 1, where its slope is 0. D
  learns nothing from its greatest mistakes.
- For a fake with s below -28, the gradient of G's loss with respect to s should be -1,
  but is -0.09 at s = -30 and -4e-6 at -40. With p = sigmoid(s), BCELoss divides by
  p (1 - p), which cancels the sigmoid's slope, but never by less than 1e-12.

Here, D ends in the logit, and BCEWithLogitsLoss computes sigmoid and logarithm in one
step, where exp() cannot overflow. Its gradient is sigmoid(s) - target, 1 for a fake
with s = 17:

    -log sigmoid(s)        =  max(0, -s)  +  log(1 + exp(-|s|))
    -log(1 - sigmoid(s))   =  max(0, s)   +  log(1 + exp(-|s|))

Also new: functions build the same layers from blocks, and G ends in a sigmoid. Its
outputs, pixels from 0 to 1, are normalised like those of real images.

Paper:   Goodfellow et al. 2014, equation 1, https://arxiv.org/abs/1406.2661
Run:     python bce_logits_gan.py; after Ctrl-C, the same command resumes
Watch:   pictures in samples/bce_logits_gan, and curves with tensorboard --logdir runs
Expect:  digits after 5 epochs, good ones after 12; all 50 take 3 to 8 minutes on a CPU
Healthy: D's loss is 0.6 to 0.69, G's 0.7 to 1, diversity near 1. If D's loss is near 0,
         D has won: it recognises every fake, and G rarely catches up
Draw:    set TRAIN = False and TEST = True in config.py, and run this script again
Change:  raise EPOCHS to train on; for other changes, edit a copy beside this file
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
BATCH_SIZE = 128  # real images in a step, and as many fakes
LEARNING_RATE = 3e-4  # Adam's step size; a resumed run ignores edits to it and BETAS
# How much Adam remembers: nothing (0.0) of past gradients, which were computed against
# an older opponent, and much (0.999) of their squares, which only scale its steps.
BETAS = (0.0, 0.999)
NOISE_DIM = 64  # random numbers from which G makes one image
# Pixels from 0 to 1 become (pixel - mean) / std, in real images and in fakes alike. So
# MNIST's own mean and standard deviation, 0.1307 and 0.3081, work here as well.
NORMALIZE_MEAN = 0.5
NORMALIZE_STD = 0.5
LOG_EVERY = 100  # steps between two points of a curve


# ---- Data ----
def load_images():
    """Return MNIST's training images: uint8 (60000, 28, 28)."""
    return datasets.MNIST(config.DATA_PATH, download=True).data


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
        nn.LeakyReLU(0.2),  # unlike ReLU, has a gradient at negative inputs too
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
    """Update D, then G, with real images (N, 784) and N fakes. Return a value for each
    curve, under its name in TensorBoard."""
    generator.train()  # draw() below leaves G in evaluation mode
    fake = generator(get_noise(len(real), real.device))  # (N, 784)

    # Update D: minimise the mean of -log D(x) and -log(1 - D(G(z))).
    # Without detach(), this backward() would go on through G, and free the part of the
    # graph that G's own backward() needs.
    real_output = discriminator(real)  # (N, 1)
    fake_output = discriminator(fake.detach())  # (N, 1)
    disc_loss = get_disc_loss(real_output, fake_output)
    disc_optimizer.zero_grad()
    disc_loss.backward()
    disc_optimizer.step()

    # Update G: show the same fakes to the new D, and minimise -log D(G(z)).
    # D gets gradients here too; the next zero_grad() of its optimizer clears them.
    gen_loss = get_gen_loss(discriminator(fake))
    gen_optimizer.zero_grad()
    gen_loss.backward()
    gen_optimizer.step()
    return {
        "loss/discriminator": disc_loss.detach(),  # the value alone, without its graph
        "loss/generator": gen_loss.detach(),
        "prob/real": real_output.detach().sigmoid().mean(),
        "prob/fake": fake_output.detach().sigmoid().mean(),
    }


# ======== The lesson ends here ========
# The rest turns it into a full run, and is almost the same in all four scripts. train()
# repeats train_step, and after each epoch it saves a picture and a checkpoint.
NAME = Path(__file__).stem  # this file's name, and that of its results
CHECKPOINT = config.CALLBACKS_PATH / f"{NAME}.pt"
SAMPLES = config.SAMPLES_PATH / NAME


@torch.no_grad()
def draw(generator, noise):
    """Return the pictures that G makes from noise, with pixels from 0 to 1.

    G is left in evaluation mode: BatchNorm uses the mean and variance gathered in
    training instead of the batch's, so that a picture depends on its own noise alone.
    """
    generator.eval()
    return to_pixels(generator(noise))


def get_diversity(fakes, reals):
    """Return the mean distance between two fakes, divided by that between two reals.

    It is near 1 if fakes are as varied as real images, and near 0 if they all look
    alike, which is called mode collapse. It does not say whether they look real.
    """
    return torch.pdist(fakes.flatten(1)).mean() / torch.pdist(reals.flatten(1)).mean()


def save_checkpoint(parts, epoch, step):
    """Save the state of each part, and the numbers of completed epochs and steps.

    parts: {name: network or optimizer}. Adam's state is its averages of gradients and
    of their squares, and its settings.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    new = CHECKPOINT.with_suffix(".new")
    torch.save({"epoch": epoch, "step": step, **states}, new)
    new.replace(CHECKPOINT)  # a run that is killed while saving keeps the old file


def load_checkpoint(parts):
    """Load the states of the parts. Return the completed epochs and steps."""
    try:
        # weights_only refuses a file with code in it. The file is loaded to the CPU,
        # from where load_state_dict copies to the device of each part.
        checkpoint = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint["epoch"], checkpoint["step"]
    except Exception as error:  # Python prints it as usual, then this note
        error.add_note(
            f"If there is no {CHECKPOINT}, train first. If it does not fit this "
            "script, undo your last edit, or move the checkpoint away to start anew."
        )
        raise


def train():
    """Train both networks up to EPOCHS, from the checkpoint if there is one."""
    gpu = torch.accelerator.current_accelerator(check_available=True)  # or None
    device = config.DEVICE or gpu or "cpu"
    torch.manual_seed(config.SEED)
    fixed_noise = get_noise(64, device)  # for the pictures of all epochs
    generator = Generator().to(device)
    discriminator = Discriminator().to(device)
    # fused=True makes Adam faster on a CPU.
    gen_optimizer = Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
    disc_optimizer = Adam(discriminator.parameters(), LEARNING_RATE, BETAS, fused=True)
    parts = {
        "generator": generator,
        "discriminator": discriminator,
        "gen_optimizer": gen_optimizer,
        "disc_optimizer": disc_optimizer,
    }
    epochs_done = step = 0
    if config.LOAD and CHECKPOINT.exists():
        epochs_done, step = load_checkpoint(parts)
    print(f"{epochs_done} of {EPOCHS} epochs are done. To train longer, raise EPOCHS.")
    print(f"Progress is saved in {CHECKPOINT}. To start anew, move it away.")
    if epochs_done >= EPOCHS:
        return
    print(f"Training on {device}. Each epoch adds a picture to {SAMPLES}.", flush=True)

    images = load_images().to(device)
    real_pixels = to_pixels(normalize(images[:64])).cpu()
    # TensorBoard hides an older run's points from purge_step on: a resumed run hides
    # those after its checkpoint, and a new run all, the picture of step 0 too.
    purge_step = step + 1 if step else 0
    writer = SummaryWriter(config.TENSORBOARD_PATH / NAME, purge_step=purge_step)
    SAMPLES.mkdir(parents=True, exist_ok=True)
    if epochs_done == 0:
        writer.add_images("images/real", real_pixels, 0)
        save_image(real_pixels, SAMPLES / "real.png")
        save_image(draw(generator, fixed_noise), SAMPLES / "epoch_0000.png")

    for epoch in range(epochs_done + 1, EPOCHS + 1):
        start = time.time()
        # Each epoch has its own seed, so that a stopped one is repeated with the same
        # random numbers. 10_000 keeps the epochs of different SEEDs apart.
        torch.manual_seed(10_000 * config.SEED + epoch)
        history = []
        for indices in torch.randperm(len(images), device=device).split(BATCH_SIZE):
            real = normalize(images[indices])
            curves = train_step(
                real, generator, discriminator, gen_optimizer, disc_optimizer
            )
            history.append(curves)
            step += 1
            if step % LOG_EVERY == 0:
                for name, value in curves.items():
                    writer.add_scalar(name, value, step)
                print(f"epoch {epoch}, step {step}", end="\r", flush=True)

        pixels = draw(generator, fixed_noise).cpu()
        if not pixels.isfinite().all():
            sys.exit("Training diverged: lower LEARNING_RATE in a copy of this file.")
        # Show the mean of each curve over the epoch.
        shown = {name: sum(c[name] for c in history) / len(history) for name in curves}
        shown["diversity"] = get_diversity(pixels, real_pixels)
        writer.add_scalar("diversity", shown["diversity"], step)
        writer.add_images("images/fake", pixels, step)
        writer.flush()
        save_image(pixels, SAMPLES / f"epoch_{epoch:04}.png")
        save_checkpoint(parts, epoch, step)
        values = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
        minutes = (EPOCHS - epoch) * (time.time() - start) / 60
        print(f"epoch {epoch}/{EPOCHS}  {values}  {minutes:.1f} min left", flush=True)


def test():
    """Draw samples, and blends between them, with the checkpoint's generator."""
    generator = Generator()
    load_checkpoint({"generator": generator})
    torch.manual_seed(-1 - config.SEED)  # negative, unlike the seeds of training
    noise = get_noise(64, "cpu")
    SAMPLES.mkdir(parents=True, exist_ok=True)
    save_image(draw(generator, noise), SAMPLES / "test.png", nrow=8)
    # Each column of interpolation.png goes from a picture in the first row of test.png
    # to the one below it.
    mixes = [noise[:8].lerp(noise[8:16], i / 9) for i in range(10)]
    save_image(draw(generator, torch.cat(mixes)), SAMPLES / "interpolation.png", nrow=8)
    print(f"Drew test.png and interpolation.png in {SAMPLES}")


if __name__ == "__main__":
    if config.TRAIN:
        train()
    if config.TEST:
        test()
