"""Convolutional GAN: networks that work on patches, with the loss of bce_logits_gan.py.

To a Linear layer, an image is 784 numbers in no particular order. A convolution looks
at patches of 5x5 pixels with the same weights everywhere, so a stroke learned in one
place is known everywhere. A layer has many such sets of weights, and each makes one
channel. In D, patches that start two pixels apart (stride 2) halve height and width:
28, 14, 7. In G, a transposed convolution goes the other way: for each pixel of each
channel, it paints a 5x5 patch of weights, multiplied by the pixel's value, and adds up
all patches. With stride 2, it doubles height and width: 7, 14, 28.

As in bce_logits_gan.py, D gives the logit s, and D(x) is sigmoid(s). Also new are
Dropout in D, LeakyReLU in G, and small batches, which make many steps in each epoch.

Paper:   Radford et al. 2015, DCGAN, https://arxiv.org/abs/1511.06434, with other layers
Run:     python conv_gan.py; after Ctrl-C, the same command resumes
Watch:   pictures in samples/conv_gan; for curves, run tensorboard --logdir runs
         in this folder, and open the address that it prints
Expect:  digits after one epoch, which takes 3 to 10 minutes on a CPU, and good ones
         after 5 epochs
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
EPOCHS = 100  # passes over the training images
BATCH_SIZE = 16  # real images in a step, and equally many fakes
LEARNING_RATE = 1e-4  # Adam's step size
# Adam steps along an average of past gradients, divided by the root of an average of
# their squares. BETAS say how much these remember: nothing (0.0, not 0.9) of gradients,
# which come from an older opponent, and much (0.999, the default) of squares.
BETAS = (0.0, 0.999)
NOISE_DIM = 100  # random numbers from which G makes one image
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
    """Turn uint8 images (N, 28, 28) into float (N, 1, 28, 28) from -1 to 1."""
    return images.unsqueeze(1) / 127.5 - 1


def to_pixels(images):
    """Undo normalize: float (N, 1, 28, 28) becomes pictures from 0 to 1."""
    return images / 2 + 0.5


def get_noise(count, device):
    """Return standard normal noise for G: float (count, NOISE_DIM)."""
    return torch.randn(count, NOISE_DIM, device=device)


# ---- Networks ----
class Generator(nn.Module):
    """Turn noise (N, NOISE_DIM) into images (N, 1, 28, 28) from -1 to 1."""

    def __init__(self):
        super().__init__()
        # BatchNorm gives each feature or channel mean 0 and variance 1 over the batch,
        # then scales and shifts it. It would subtract a bias again, so there is none.
        # Seven patches of 5 pixels, 2 apart, span 17 pixels. padding cuts off 2 on each
        # side (in Conv2d, it adds 2), and output_padding gives 1 back: 7 becomes 14,
        # and then 14 becomes 28. With stride 1 they span 11, of which 7 are left.
        double = {"stride": 2, "padding": 2, "output_padding": 1}
        self.layers = nn.Sequential(
            nn.Linear(NOISE_DIM, 7 * 7 * 256, bias=False),  # (N, 12544)
            nn.BatchNorm1d(7 * 7 * 256),
            nn.LeakyReLU(0.2),
            nn.Unflatten(1, (256, 7, 7)),  # (N, 256, 7, 7)
            nn.ConvTranspose2d(256, 128, 5, padding=2, bias=False),  # (N, 128, 7, 7)
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(128, 64, 5, **double, bias=False),  # (N, 64, 14, 14)
            nn.BatchNorm2d(64),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(64, 1, 5, **double),  # (N, 1, 28, 28)
            nn.Tanh(),
        )

    def forward(self, noise):
        return self.layers(noise)


class Discriminator(nn.Module):
    """Turn images (N, 1, 28, 28) into logits (N, 1): D(x) is their sigmoid."""

    def __init__(self):
        super().__init__()
        # Real images and fakes come in separate batches. BatchNorm would give both the
        # same mean, and so hide a difference from D.
        self.layers = nn.Sequential(
            nn.Conv2d(1, 64, 5, stride=2, padding=2),  # (N, 64, 14, 14)
            nn.LeakyReLU(0.2),  # G's gradients come through D; ReLU blocks some of them
            nn.Dropout(0.3),  # zeroes a random 30%: D must not rely on a few values
            nn.Conv2d(64, 128, 5, stride=2, padding=2),  # (N, 128, 7, 7)
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Flatten(),  # (N, 6272)
            nn.Linear(128 * 7 * 7, 1),  # (N, 1)
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
    """Update D, then G, with real images (N, 1, 28, 28) and N fakes.

    Return the values of TensorBoard's curves: {name: tensor of one number}.
    """
    generator.train()  # back to training mode: draw() switches to evaluation mode
    fake = generator(get_noise(len(real), real.device))  # (N, 1, 28, 28)

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
