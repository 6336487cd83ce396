"""DCGAN with Wasserstein loss and gradient penalty: pictures in colour.

A critic C takes the place of the discriminator D. Its output is a score, which may be
any number. C learns to score real images higher than fakes, and G to raise the score of
its fakes:

    min over G, max over C:   mean of C(x)  -  mean of C(G(z))

C's slope, the norm of its gradient with respect to an image, must not exceed 1, or C
could raise the difference by scaling its scores. Under this limit, the largest
difference is the Wasserstein distance: how far the fakes would have to move to be
distributed like the real images. Even where a D would be sure that all fakes are fake,
the distance says how far off they are, and the gradient of C shows G the way. WGAN
limits the slope by clipping C's weights to a small range. The best C has slope exactly
1 between real images and fakes, so WGAN-GP penalises smaller slopes as well.

The difference that C reaches is only an estimate of the distance. Compare it within a
run, or between runs with the same settings.

Papers: DCGAN https://arxiv.org/abs/1511.06434, WGAN https://arxiv.org/abs/1701.07875,
        WGAN-GP https://arxiv.org/abs/1704.00028
Run:    python dcgan_wgan_gp.py, and beside it tensorboard --logdir runs
Draw:   set TRAIN = False and TEST = True in config.py, and run it again
Expect: the estimate rises, then falls; colours after an epoch, which takes 7 to 20
        minutes on a CPU, and objects before a background after five
"""

import glob
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets
from torchvision.datasets.folder import is_image_file
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

import config

# ---- Settings: try other values in a copy of this file ----
NAME = Path(__file__).stem  # names the results: a copy of this file gets its own
DATASET = "cifar10"  # or "mnist", or a folder of pictures
EPOCHS = 5  # each has len(images) // BATCH_SIZE steps of G; raise it to train longer
# Real images in a critic step, and as many fakes. A small batch gives G many steps in
# five epochs. On a GPU, try 64 with LEARNING_RATE = 2e-4: fewer, larger steps.
BATCH_SIZE = 16
CRITIC_STEPS = 5  # for each step of G, so that C stays near its best
PENALTY_WEIGHT = 10  # lambda in WGAN-GP
LEARNING_RATE = 5e-5  # Adam's step size, for both networks
# How much Adam remembers of past gradients, and of their squares. The first is 0.0, as
# past gradients were computed against an opponent that has changed since.
BETAS = (0.0, 0.9)
NOISE_DIM = 100  # random numbers from which G makes one image
FEATURES = 16  # channels at 32x32, more at smaller sizes; on a GPU try 64
CHANNELS = 1 if DATASET == "mnist" else 3  # 1 makes the pictures of a folder grey
TEST_SEED = 1  # another seed draws other samples
LOG_EVERY = 20  # steps of G between two points of a curve


# ---- Data ----
def load_images():
    """Return the training images of DATASET: uint8 (N, CHANNELS, height, width)."""
    if DATASET == "mnist":
        dataset = datasets.MNIST
        archives = "MNIST's four .gz files, and nothing else, into MNIST/raw"
    elif DATASET == "cifar10":
        dataset = datasets.CIFAR10
        archives = "an undamaged cifar-10-python.tar.gz"
    else:
        return load_folder()
    try:
        data = dataset(config.DATA_PATH, download=True).data
    except (OSError, RuntimeError) as error:
        sys.exit(f"{error}\nIn {config.DATA_PATH}, put {archives}.")
    if DATASET == "mnist":
        return data.unsqueeze(1)  # (60000, 1, 28, 28)
    return torch.from_numpy(data).permute(0, 3, 1, 2).contiguous()


def load_folder():
    """Return the pictures in the folder DATASET and below, except hidden ones:
    uint8 (N, CHANNELS, 64, 64), the middle square of each."""
    folder = config.ROOT / DATASET
    images = []
    for name in sorted(glob.glob("**/*", root_dir=folder, recursive=True)):
        if is_image_file(name):
            picture = ImageOps.exif_transpose(Image.open(folder / name))  # upright
            picture = ImageOps.fit(picture.convert("RGBA"), (64, 64))
            square = Image.new("L" if CHANNELS == 1 else "RGB", (64, 64), "white")
            square.paste(picture, mask=picture)  # white stays behind transparent parts
            images.append(pil_to_tensor(square))
    print(f"Found {len(images)} pictures in {folder}")
    if len(images) < BATCH_SIZE:
        sys.exit("Too few for a batch: change DATASET, or lower BATCH_SIZE.")
    return torch.stack(images)


def normalize(images):
    """Turn uint8 images of any size into float (N, CHANNELS, 64, 64), -1 to 1."""
    images = nn.functional.interpolate(images.float(), size=64, mode="bilinear")
    return images / 127.5 - 1


def to_pixels(images):
    """Turn images (N, CHANNELS, 64, 64) from -1 to 1 into pictures from 0 to 1."""
    return images / 2 + 0.5


# ---- Networks ----
# In the layers, 4, 2, 1 are kernel size, stride and padding. DCGAN begins with weights
# of standard deviation 0.02; PyTorch's default worked as well here.
class Generator(nn.Module):
    """Turn noise (N, NOISE_DIM, 1, 1) into images (N, CHANNELS, 64, 64), -1 to 1."""

    def __init__(self):
        super().__init__()
        f = FEATURES
        self.layers = nn.Sequential(
            # No bias, as BatchNorm subtracts the mean, and the bias with it.
            nn.ConvTranspose2d(NOISE_DIM, f * 8, 4, bias=False),  # (N, 8f, 4, 4)
            nn.BatchNorm2d(f * 8),
            nn.ReLU(),
            nn.ConvTranspose2d(f * 8, f * 4, 4, 2, 1, bias=False),  # (N, 4f, 8, 8)
            nn.BatchNorm2d(f * 4),
            nn.ReLU(),
            nn.ConvTranspose2d(f * 4, f * 2, 4, 2, 1, bias=False),  # (N, 2f, 16, 16)
            nn.BatchNorm2d(f * 2),
            nn.ReLU(),
            nn.ConvTranspose2d(f * 2, f, 4, 2, 1, bias=False),  # (N, f, 32, 32)
            nn.BatchNorm2d(f),
            nn.ReLU(),
            nn.ConvTranspose2d(f, CHANNELS, 4, 2, 1),  # (N, CHANNELS, 64, 64)
            nn.Tanh(),
        )

    def forward(self, noise):
        return self.layers(noise)


class Critic(nn.Module):
    """Turn images (N, CHANNELS, 64, 64) into scores (N, 1, 1, 1).

    BatchNorm would mix the images of a batch, but the penalty is on the slope at each
    one. InstanceNorm normalises each channel of each image by itself. (WGAN-GP suggests
    LayerNorm, which normalises all channels of an image together.)
    """

    def __init__(self):
        super().__init__()
        f = FEATURES
        self.layers = nn.Sequential(
            nn.Conv2d(CHANNELS, f, 4, 2, 1),  # (N, f, 32, 32)
            nn.LeakyReLU(0.2),
            nn.Conv2d(f, f * 2, 4, 2, 1, bias=False),  # (N, 2f, 16, 16)
            nn.InstanceNorm2d(f * 2, affine=True),  # affine: learn scale and bias
            nn.LeakyReLU(0.2),
            nn.Conv2d(f * 2, f * 4, 4, 2, 1, bias=False),  # (N, 4f, 8, 8)
            nn.InstanceNorm2d(f * 4, affine=True),
            nn.LeakyReLU(0.2),
            nn.Conv2d(f * 4, f * 8, 4, 2, 1, bias=False),  # (N, 8f, 4, 4)
            nn.InstanceNorm2d(f * 8, affine=True),
            nn.LeakyReLU(0.2),
            nn.Conv2d(f * 8, 1, 4),  # (N, 1, 1, 1)
        )

    def forward(self, images):
        return self.layers(images)


# ---- Losses ----
def gradient_penalty(critic, real, fake):
    """Return PENALTY_WEIGHT times the mean of (slope - 1)^2, and the mean slope.

    For the Wasserstein distance, each fake moves to a real image, and along the line
    between the two, the best C has slope 1. Nobody knows these pairs, so a random point
    is taken between each real image and a random fake, both (N, CHANNELS, 64, 64).
    """
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = share * real + (1 - share) * fake
    mixed.requires_grad_()  # to differentiate C(mixed) with respect to it
    # Each score depends on its own image alone, so the gradient of their sum holds the
    # gradient of each. create_graph lets backward() differentiate these by C's weights.
    scores = critic(mixed)
    gradients = torch.autograd.grad(scores.sum(), mixed, create_graph=True)[0]
    slopes = gradients.flatten(1).norm(dim=1)  # (N,)
    return PENALTY_WEIGHT * (slopes - 1).pow(2).mean(), slopes.mean()


def get_critic_loss(real_output, fake_output, penalty):
    """Return C's loss from its scores (N, 1, 1, 1): the mean of fakes minus the mean of
    real images, plus the penalty."""
    return fake_output.mean() - real_output.mean() + penalty


def get_gen_loss(fake_output):
    """Return G's loss from C's scores of fakes (N, 1, 1, 1), which G wants high."""
    return -fake_output.mean()


# ---- Pictures ----
SAMPLES = Path(config.SAMPLES_PATH, NAME)


@torch.no_grad()
def draw(generator, noise):
    """Return the pictures that G makes from noise (N, ...), with pixels from 0 to 1."""
    generator.eval()  # BatchNorm uses running averages instead of this batch's
    pixels = to_pixels(generator(noise))
    generator.train()
    return pixels


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
    """Train both networks. After each epoch, draw and save."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = config.DEVICE or accelerator or "cpu"
    torch.manual_seed(config.SEED)
    fixed_noise = torch.randn(64, NOISE_DIM, 1, 1).to(device)  # the same in every epoch
    generator = Generator().to(device)
    critic = Critic().to(device)
    # fused updates all weights in one go, which is faster.
    gen_optimizer = Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
    critic_optimizer = Adam(critic.parameters(), LEARNING_RATE, BETAS, fused=True)
    # A checkpoint holds these. A scheduler belongs here too: add it before the first
    # epoch, as older checkpoints lack it, and step it before each save.
    parts = {
        "generator": generator,
        "critic": critic,
        "gen_optimizer": gen_optimizer,
        "critic_optimizer": critic_optimizer,
    }
    epochs_done = 0
    if config.LOAD and CHECKPOINT.exists():
        epochs_done = load_checkpoint(parts)
        gen_lr = gen_optimizer.param_groups[0]["lr"]
        critic_lr = critic_optimizer.param_groups[0]["lr"]
        print(f"Resuming after epoch {epochs_done}, rates: G {gen_lr}, C {critic_lr}")
    else:
        print("Starting from scratch")
    if epochs_done >= EPOCHS:
        print(f"Raise EPOCHS to train longer. To start anew, move {CHECKPOINT} away.")
        return

    runs = Path(config.TENSORBOARD_PATH, NAME)
    print(f"Training on {device}, pictures: {SAMPLES}, curves: {runs}", flush=True)
    images = load_images().to(device)
    steps = len(images) // BATCH_SIZE  # of G in an epoch
    # purge_step makes TensorBoard forget what came after the checkpoint.
    writer = SummaryWriter(runs, purge_step=epochs_done * steps)
    if epochs_done == 0:
        real_pixels = to_pixels(normalize(images[:64]))
        writer.add_images("images/real", real_pixels, 0)
        save_image(real_pixels, SAMPLES / "real.png")
        pixels = draw(generator, fixed_noise)
        writer.add_images("images/fake", pixels, 0)
        save_image(pixels, SAMPLES / "epoch_0000.png")

    for epoch in range(epochs_done + 1, EPOCHS + 1):
        start = time.time()
        # Each epoch has its own seed, so that an interrupted one is repeated exactly.
        torch.manual_seed(10_000 * config.SEED + epoch)
        critic_sum = gen_sum = estimate_sum = 0
        for step in range((epoch - 1) * steps, epoch * steps):
            # Update C: maximise the mean of C(x) - C(G(z)), minus the penalty.
            # detach() keeps the gradients of this loss out of G.
            for _ in range(CRITIC_STEPS):
                batch = torch.randint(len(images), (BATCH_SIZE,), device=device)
                real = normalize(images[batch])  # (N, CHANNELS, 64, 64)
                noise = torch.randn(BATCH_SIZE, NOISE_DIM, 1, 1, device=device)
                fake = generator(noise).detach()  # (N, CHANNELS, 64, 64)
                real_output = critic(real)  # (N, 1, 1, 1)
                fake_output = critic(fake)
                penalty, slope = gradient_penalty(critic, real, fake)
                critic_loss = get_critic_loss(real_output, fake_output, penalty)
                critic_optimizer.zero_grad()
                critic_loss.backward()
                critic_optimizer.step()

            # Update G: maximise the mean of C(G(z)), with the C that has just learned.
            # C gets gradients here too; its next zero_grad() clears them.
            noise = torch.randn(BATCH_SIZE, NOISE_DIM, 1, 1, device=device)
            gen_loss = get_gen_loss(critic(generator(noise)))
            gen_optimizer.zero_grad()
            gen_loss.backward()
            gen_optimizer.step()

            # C's estimate of the Wasserstein distance, from the last of its steps
            estimate = (real_output.mean() - fake_output.mean()).detach()
            critic_sum += critic_loss.detach()  # the value without its graph
            gen_sum += gen_loss.detach()
            estimate_sum += estimate
            if step % LOG_EVERY == 0:
                writer.add_scalar("loss/critic", critic_loss, step)
                writer.add_scalar("loss/generator", gen_loss, step)
                writer.add_scalar("critic/wasserstein_distance", estimate, step)
                writer.add_scalar("critic/gradient_norm", slope, step)
                writer.add_scalar("critic/gradient_penalty", penalty, step)
                if sys.stdout.isatty():
                    print(f"epoch {epoch}, step {step}", end="\r", flush=True)

        pixels = draw(generator, fixed_noise)  # (64, CHANNELS, 64, 64)
        if not pixels.isfinite().all():
            sys.exit("G draws NaN: lower LEARNING_RATE in a copy of this script.")
        writer.add_images("images/fake", pixels, step)
        writer.flush()
        save_image(pixels, SAMPLES / f"epoch_{epoch:04}.png")
        save_checkpoint(parts, epoch)
        minutes = (EPOCHS - epoch) * (time.time() - start) / 60
        print(
            f"epoch {epoch}/{EPOCHS}  "
            f"loss C {critic_sum / steps:.3f}  G {gen_sum / steps:.3f}  "
            f"estimate {estimate_sum / steps:.3f}  {minutes:.1f} min left",
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
    noise = torch.randn(64, NOISE_DIM, 1, 1)
    samples = draw(generator, noise)  # (64, CHANNELS, 64, 64)
    save_image(samples, SAMPLES / "test.png")

    # What lies between two pictures? Each column goes from one noise vector to another.
    steps = [noise[:8].lerp(noise[8:16], i / 9) for i in range(10)]
    save_image(draw(generator, torch.cat(steps)), SAMPLES / "interpolation.png")

    # Only this run's pictures: an older, longer run may have left more of them.
    paths = [SAMPLES / f"epoch_{epoch:04}.png" for epoch in range(epochs_done + 1)]
    film = [Image.open(path).reduce(2) for path in paths if path.exists()]
    if film:
        gif = SAMPLES / "epochs.gif"
        film[0].save(gif, append_images=film[1:], save_all=True, duration=200, loop=0)

    # Does G copy? To the right of each sample is the training image nearest to it.
    images = load_images()
    distances = []
    for part in images.split(1000):  # all at once would take gigabytes
        real = to_pixels(normalize(part))  # (N, CHANNELS, 64, 64)
        distances.append(torch.cdist(samples.flatten(1), real.flatten(1)))
    nearest = images[torch.cat(distances, dim=1).argmin(dim=1)]
    nearest = to_pixels(normalize(nearest))  # (64, CHANNELS, 64, 64)
    save_image(torch.cat([samples, nearest], dim=3), SAMPLES / "nearest.png")
    print(f"The pictures are in {SAMPLES}.")


if __name__ == "__main__":
    for folder in CHECKPOINT.parent, SAMPLES:
        folder.mkdir(parents=True, exist_ok=True)
    if config.TRAIN:
        train()
    if config.TEST:
        test()
