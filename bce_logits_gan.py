"""Logits GAN: the game of vanilla_gan.py with a numerically stable loss.

In vanilla_gan.py, D ends in a sigmoid, and BCELoss takes its logarithm. Call D's output
before the sigmoid the logit s: D(x) is sigmoid(s). In float32, both networks can lose
their gradient:

- For a fake with s of 17 or more, sigmoid(s) is rounded to 1, where its slope is 0. D
  learns nothing from its greatest mistakes.
- For a fake with s below -28, the gradient of G's loss in s should be -1, but is -0.09
  at s = -30 and -4e-6 at -40, as BCELoss never divides by less than 1e-12.

Here, D ends in the logit, and BCEWithLogitsLoss computes sigmoid and logarithm in one
step, in which exp() never exceeds 1:

    -log sigmoid(s)  =  log(1 + exp(-s))  =  max(0, -s) + log(1 + exp(-|s|))

Also new: functions build the same layers from blocks, and G ends in a sigmoid.

Paper:  Goodfellow et al. 2014, equation 1, https://arxiv.org/abs/1406.2661
Run:    python bce_logits_gan.py, and beside it tensorboard --logdir runs
Draw:   set TRAIN = False and TEST = True in config.py, and run it again
Expect: digits after 5 epochs, good ones after 12; all 50 in 3 to 8 minutes on a CPU
"""

import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets
from torchvision.utils import save_image

import config

# ---- Settings: try other values in a copy of this file ----
NAME = Path(__file__).stem  # names the results: a copy of this file gets its own
EPOCHS = 50  # passes over the training images; raise it to train longer
BATCH_SIZE = 128  # real images in a step, and as many fakes
LEARNING_RATE = 3e-4  # Adam's step size, for both networks
# How much Adam remembers of past gradients, and of their squares. The first is 0.0, as
# past gradients were computed against an opponent that has changed since.
BETAS = (0.0, 0.999)
NOISE_DIM = 64  # random numbers from which G makes one image
# Pixels from 0 to 1 become (pixel - mean) / std. With 0 and 1 they stay as they are, in
# the range of sigmoid, with which G ends.
NORMALIZE_MEAN = 0.0
NORMALIZE_STD = 1.0
TEST_SEED = 1  # another seed draws other samples
LOG_EVERY = 100  # steps between two points of a curve


# ---- Data ----
def load_images(train):
    """Return MNIST's 60,000 training or 10,000 test images: uint8 (N, 28, 28)."""
    try:
        return datasets.MNIST(config.DATA_PATH, train=train, download=True).data
    except (OSError, RuntimeError) as error:
        folder = Path(config.DATA_PATH, "MNIST/raw")
        sys.exit(f"{error}\nPut MNIST's four .gz files, and nothing else, in {folder}.")


def normalize(images):
    """Turn uint8 images (N, 28, 28) into the images that D gets: float (N, 784)."""
    return (images.flatten(1) / 255 - NORMALIZE_MEAN) / NORMALIZE_STD


def to_pixels(images):
    """Undo normalize: float (N, 784) becomes pictures (N, 1, 28, 28) from 0 to 1."""
    return (images * NORMALIZE_STD + NORMALIZE_MEAN).clamp(0, 1).view(-1, 1, 28, 28)


# ---- Networks ----
def get_gen_block(in_dim, out_dim):
    """Return a block of G, from (N, in_dim) to (N, out_dim)."""
    return nn.Sequential(
        nn.Linear(in_dim, out_dim),
        nn.BatchNorm1d(out_dim),  # centres and scales each feature over the batch
        nn.ReLU(),
    )


def get_disc_block(in_dim, out_dim):
    """Return a block of D, from (N, in_dim) to (N, out_dim)."""
    return nn.Sequential(
        nn.Linear(in_dim, out_dim),
        nn.LeakyReLU(0.2),  # lets gradients through below 0 too
    )


class Generator(nn.Module):
    """Turn standard normal noise (N, NOISE_DIM) into images (N, 784) from 0 to 1."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            get_gen_block(NOISE_DIM, 64),  # (N, 64)
            get_gen_block(64, 128),  # (N, 128)
            get_gen_block(128, 256),  # (N, 256)
            get_gen_block(256, 512),  # (N, 512)
            nn.Linear(512, 28 * 28),  # (N, 784)
            nn.Sigmoid(),
        )

    def forward(self, noise):
        return self.layers(noise)


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
        # 0 to 1 becomes -1 to 1: where a pixel is 0, its weights would get no gradient.
        return self.layers(2 * images - 1)


# ---- Losses ----
# The mean of -log sigmoid(s) where the target is 1, of -log sigmoid(-s) where it is 0
bce = nn.BCEWithLogitsLoss()


def get_disc_loss(real_output, fake_output):
    """Return D's loss from logits (N, 1) that should be high if real, low if fake."""
    real_loss = bce(real_output, torch.ones_like(real_output))
    fake_loss = bce(fake_output, torch.zeros_like(fake_output))
    return (real_loss + fake_loss) / 2  # halved, to be on the scale of G's loss


def get_gen_loss(fake_output):
    """Return G's loss from D's logits for fakes (N, 1), which G pushes up."""
    return bce(fake_output, torch.ones_like(fake_output))


# ---- Pictures ----
SAMPLES = Path(config.SAMPLES_PATH, NAME)


@torch.no_grad()
def draw(generator, noise):
    """Return the pictures that G makes from noise (N, ...), with pixels from 0 to 1."""
    generator.eval()  # BatchNorm uses running averages instead of this batch's
    pixels = to_pixels(generator(noise))
    generator.train()
    return pixels


def share_near(images, others, k=5):
    """Return the share of images (N, ...) near at least one of others (M, ...).

    Around each of the others lies a circle that reaches to its k-th nearest neighbour
    among the others. An image is near if it lies in at least one circle. Precision is
    the share of fakes near real images. Recall is the share of real images near fakes,
    and low if all fakes look alike. Even training images, as fakes, get about 0.94.
    Paper: https://arxiv.org/abs/1904.06991, which compares features instead of pixels.
    """
    images, others = images.flatten(1), others.flatten(1)
    # In each sorted row, the image itself comes first, its k-th neighbour at index k.
    radius = torch.cdist(others, others).sort(dim=1).values[:, k]  # (M,)
    near = torch.cdist(images, others) <= radius  # (N, M)
    return near.any(dim=1).float().mean().item()


# ---- Checkpoints ----
CHECKPOINT = Path(config.CALLBACKS_PATH, f"{NAME}.pt")


def save_checkpoint(parts, epoch):
    """Save the states of all parts, and the number of completed epochs."""
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    checkpoint["epoch"] = epoch
    new = CHECKPOINT.with_suffix(".tmp")
    torch.save(checkpoint, new)
    new.replace(CHECKPOINT)  # if the run is killed while saving, the old file survives


def load_checkpoint(parts):
    """Load the states of the parts, and return the number of completed epochs.

    An optimizer's learning rate and betas are restored as well: a resumed run ignores
    LEARNING_RATE and BETAS.
    """
    try:
        # weights_only: a file from elsewhere cannot run code
        checkpoint = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint["epoch"]
    except Exception as error:
        sys.exit(f"{error}\n{CHECKPOINT} is damaged or does not fit: move it away.")


# ---- Training ----
def train():
    """Train both networks. After each epoch, draw, measure and save."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = config.DEVICE or accelerator or "cpu"
    torch.manual_seed(config.SEED)
    fixed_noise = torch.randn(1000, NOISE_DIM).to(device)  # the same in every epoch
    generator = Generator().to(device)
    discriminator = Discriminator().to(device)
    # fused updates all weights in one go, which is faster.
    gen_optimizer = Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
    disc_optimizer = Adam(discriminator.parameters(), LEARNING_RATE, BETAS, fused=True)
    # A checkpoint holds these. A scheduler belongs here too: add it before the first
    # epoch, as older checkpoints lack it, and step it before each save.
    parts = {
        "generator": generator,
        "discriminator": discriminator,
        "gen_optimizer": gen_optimizer,
        "disc_optimizer": disc_optimizer,
    }
    epochs_done = 0
    if config.LOAD and CHECKPOINT.exists():
        epochs_done = load_checkpoint(parts)
        gen_lr = gen_optimizer.param_groups[0]["lr"]
        disc_lr = disc_optimizer.param_groups[0]["lr"]
        print(f"Resuming after epoch {epochs_done}, rates: G {gen_lr}, D {disc_lr}")
    else:
        print("Starting from scratch")
    if epochs_done >= EPOCHS:
        print(f"Raise EPOCHS to train longer. To start anew, move {CHECKPOINT} away.")
        return

    runs = Path(config.TENSORBOARD_PATH, NAME)
    print(f"Training on {device}, pictures: {SAMPLES}, curves: {runs}", flush=True)
    images = load_images(train=True).to(device)
    test_images = load_images(train=False)[::10].to(device) / 255  # 1,000 of 10,000
    steps = len(images) // BATCH_SIZE  # in an epoch; a smaller last batch is left out
    # purge_step makes TensorBoard forget what came after the checkpoint.
    writer = SummaryWriter(runs, purge_step=epochs_done * steps)
    if epochs_done == 0:
        real_pixels = images[:64].unsqueeze(1) / 255  # (64, 1, 28, 28)
        writer.add_images("images/real", real_pixels, 0)
        save_image(real_pixels, SAMPLES / "real.png")
        pixels = draw(generator, fixed_noise[:64])
        writer.add_images("images/fake", pixels, 0)
        save_image(pixels, SAMPLES / "epoch_0000.png")

    for epoch in range(epochs_done + 1, EPOCHS + 1):
        start = time.time()
        # Each epoch has its own seed, so that an interrupted one is repeated exactly.
        torch.manual_seed(10_000 * config.SEED + epoch)
        batches = torch.randperm(len(images), device=device).split(BATCH_SIZE)[:steps]
        disc_sum = gen_sum = 0
        for step, batch in enumerate(batches, start=(epoch - 1) * steps):
            real = normalize(images[batch])  # (N, 784)
            noise = torch.randn(BATCH_SIZE, NOISE_DIM, device=device)
            fake = generator(noise)  # (N, 784)

            # Update D: minimise the mean of -log D(x) and -log(1 - D(G(z))).
            # detach() keeps the gradients of this loss out of G.
            real_output = discriminator(real)  # (N, 1)
            fake_output = discriminator(fake.detach())
            disc_loss = get_disc_loss(real_output, fake_output)
            disc_optimizer.zero_grad()
            disc_loss.backward()
            disc_optimizer.step()

            # Update G: minimise -log D(G(z)) for the same fakes, after D's update.
            # D gets gradients here too; its next zero_grad() clears them.
            gen_loss = get_gen_loss(discriminator(fake))
            gen_optimizer.zero_grad()
            gen_loss.backward()
            gen_optimizer.step()

            disc_sum += disc_loss.detach()  # the value without its graph
            gen_sum += gen_loss.detach()
            if step % LOG_EVERY == 0:
                writer.add_scalar("loss/discriminator", disc_loss, step)
                writer.add_scalar("loss/generator", gen_loss, step)
                writer.add_scalar("prob/real", real_output.sigmoid().mean(), step)
                writer.add_scalar("prob/fake", fake_output.sigmoid().mean(), step)
                if sys.stdout.isatty():
                    print(f"epoch {epoch}, step {step}", end="\r", flush=True)

        pixels = draw(generator, fixed_noise)  # (1000, 1, 28, 28)
        if not pixels.isfinite().all():
            sys.exit("G draws NaN: lower LEARNING_RATE in a copy of this script.")
        precision = share_near(pixels, test_images)
        recall = share_near(test_images, pixels)
        writer.add_scalar("quality/precision", precision, step)
        writer.add_scalar("quality/recall", recall, step)
        writer.add_images("images/fake", pixels[:64], step)
        writer.flush()
        save_image(pixels[:64], SAMPLES / f"epoch_{epoch:04}.png")
        save_checkpoint(parts, epoch)
        minutes = (EPOCHS - epoch) * (time.time() - start) / 60
        print(
            f"epoch {epoch}/{EPOCHS}  "
            f"loss D {disc_sum / steps:.3f}  G {gen_sum / steps:.3f}  "
            f"precision {precision:.2f}  recall {recall:.2f}  {minutes:.1f} min left",
            flush=True,
        )


# ---- Test ----
def test():
    """Draw test.png, nearest.png, interpolation.png and epochs.gif, on the CPU."""
    if not CHECKPOINT.exists():
        sys.exit(f"There is no {CHECKPOINT}: train first, with TRAIN = True.")
    generator = Generator()
    epochs_done = load_checkpoint({"generator": generator})
    torch.manual_seed(TEST_SEED)
    noise = torch.randn(64, NOISE_DIM)
    samples = draw(generator, noise)  # (64, 1, 28, 28)
    save_image(samples, SAMPLES / "test.png")

    # What lies between two digits? Each column goes from one noise vector to another.
    steps = [noise[:8].lerp(noise[8:16], i / 9) for i in range(10)]
    save_image(draw(generator, torch.cat(steps)), SAMPLES / "interpolation.png")

    # Only this run's pictures: an older, longer run may have left more of them.
    paths = [SAMPLES / f"epoch_{epoch:04}.png" for epoch in range(epochs_done + 1)]
    film = [Image.open(path).copy() for path in paths if path.exists()]
    if film:
        gif = SAMPLES / "epochs.gif"
        film[0].save(gif, append_images=film[1:], save_all=True, duration=200, loop=0)

    # Does G copy? To the right of each sample is the training image nearest to it.
    real = load_images(train=True).unsqueeze(1) / 255  # (60000, 1, 28, 28)
    distances = torch.cdist(samples.flatten(1), real.flatten(1))  # (64, 60000)
    nearest = real[distances.argmin(dim=1)]
    save_image(torch.cat([samples, nearest], dim=3), SAMPLES / "nearest.png")
    print(f"The pictures are in {SAMPLES}.")


if __name__ == "__main__":
    for folder in CHECKPOINT.parent, SAMPLES:
        folder.mkdir(parents=True, exist_ok=True)
    if config.TRAIN:
        train()
    if config.TEST:
        test()
