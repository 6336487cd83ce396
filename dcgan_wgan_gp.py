"""DCGAN with Wasserstein loss and gradient penalty: pictures in colour.

A critic C takes the place of the discriminator D. Its output is a score, which may be
any number. C learns to score real images higher than fakes, and G to raise the scores
of its fakes:

    min over G, max over C:   mean of C(x)  -  mean of C(G(z))

C could raise this difference without end by scaling its scores. So its slope, the norm
of its gradient with respect to an image, must not exceed 1: the scores of two images at
distance d then differ by at most d. Under this limit, the largest difference is, by a
theorem, the Wasserstein distance: how far the fakes would have to move, on average and
at the least, to be distributed like the real images. A D that is sure of every fake
gives G little sign of which ones are closer to real images. The Wasserstein distance
shrinks as fakes approach them, and the gradient of C shows G the way.

WGAN keeps the slope small by clipping C's weights to a small range, which allows C only
simple functions. WGAN-GP adds a penalty to C's loss instead, for slopes on either side
of 1: under the limit, the best C has slope 1 all the way from each fake to the real
image that it would have to move to.

The penalty is a soft limit. Take just one fake and one real image at distance d, and a
C that rises evenly between them, so that their scores differ by slope * d. With a
penalty of weight 10, C maximises slope * d - 10 * (slope - 1)^2, and its best slope is
1 + d / 20. The scores then differ by d + d^2 / 20, more than the distance. So the
difference that C reaches is only an estimate: compare it within a run, or between runs
with the same settings.

Papers:  DCGAN https://arxiv.org/abs/1511.06434, WGAN https://arxiv.org/abs/1701.07875,
         WGAN-GP https://arxiv.org/abs/1704.00028
Run:     python dcgan_wgan_gp.py; after Ctrl-C, the same command resumes
Watch:   pictures in samples/dcgan_wgan_gp, and curves with tensorboard --logdir runs
Expect:  colours after one epoch, which takes 7 to 20 minutes on a CPU; after five,
         objects that stand out from a background
Healthy: critic/estimate (the mean of C(x) minus that of C(G(z))) and
         critic/gradient_norm (C's mean slope) rise while C begins to learn, then fall
         as fakes come closer; the slope falls towards 1. loss/generator can be anything
Draw:    set TRAIN = False and TEST = True in config.py, and run this script again
Change:  raise EPOCHS to train on; for other changes, edit a copy beside this file
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

# ---- Settings ----
DATASET = "cifar10"  # or "mnist", or a folder of pictures beside config.py
# An epoch has len(images) // BATCH_SIZE steps of G. It is not a pass over the images:
# each step of C takes random ones.
EPOCHS = 5
BATCH_SIZE = 16  # real images in a step of C, and as many fakes; small, for more steps
CRITIC_STEPS = 5  # for each step of G, so that C stays near its best
PENALTY_WEIGHT = 10  # lambda in WGAN-GP
LEARNING_RATE = 5e-5  # Adam's step size; a resumed run ignores edits to it and BETAS
# How much Adam remembers of past gradients, and of their squares: as in WGAN-GP.
BETAS = (0.0, 0.9)
NOISE_DIM = 100  # random numbers from which G makes one image
FEATURES = 16  # channels at 32x32, more at smaller sizes; DCGAN has 128, for a GPU
CHANNELS = 1 if DATASET == "mnist" else 3  # 1 makes the pictures of a folder grey
LOG_EVERY = 20  # steps of G between two points of a curve


# ---- Data ----
def load_images():
    """Return the training images of DATASET: uint8 (N, CHANNELS, height, width)."""
    if DATASET == "mnist":
        return datasets.MNIST(config.DATA_PATH, download=True).data.unsqueeze(1)
    if DATASET != "cifar10":
        return load_folder()
    try:
        images = datasets.CIFAR10(config.DATA_PATH, download=True).data
    except (OSError, RuntimeError) as error:
        error.add_note(f"Put cifar-10-python.tar.gz into {config.DATA_PATH}.")
        raise
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def load_folder():
    """Return the pictures in the folder DATASET and below, except hidden ones:
    uint8 (N, CHANNELS, 64, 64)."""
    folder = config.ROOT / DATASET
    names = glob.glob("**/*", root_dir=folder, recursive=True)
    names = sorted(name for name in names if is_image_file(name))
    print(f"Found {len(names)} pictures in {folder}", flush=True)
    if len(names) < BATCH_SIZE:
        sys.exit("Too few for a batch: change DATASET, or lower BATCH_SIZE.")
    images = torch.empty(len(names), CHANNELS, 64, 64, dtype=torch.uint8)
    for i, name in enumerate(names):
        try:
            images[i] = load_picture(folder / name)
        except Exception as error:
            error.add_note(f"This picture cannot be read: {folder / name}")
            raise
    return images


def load_picture(path):
    """Return the middle square of a picture: uint8 (CHANNELS, 64, 64)."""
    picture = Image.open(path)
    if picture.mode.startswith(("I", "F")):
        raise ValueError("its channels have more than 8 bits")
    picture.draft(None, (128, 128))  # reads a large JPEG faster, at a smaller size
    picture = ImageOps.exif_transpose(picture).convert("RGBA")  # upright
    picture = ImageOps.fit(picture, (64, 64))
    square = Image.new("L" if CHANNELS == 1 else "RGB", (64, 64), "white")
    square.paste(picture, mask=picture)  # white stays behind transparent parts
    return pil_to_tensor(square)


def normalize(images):
    """Turn uint8 images of any size into float (N, CHANNELS, 64, 64), -1 to 1.

    64x64 is the size for which DCGAN's layers are made.
    """
    images = nn.functional.interpolate(images.float(), size=64, mode="bilinear")
    return images / 127.5 - 1


def to_pixels(images):
    """Turn images (N, CHANNELS, 64, 64) from -1 to 1 into pictures from 0 to 1."""
    return images / 2 + 0.5


def get_noise(count, device):
    """Return standard normal noise for G: float (count, NOISE_DIM, 1, 1)."""
    return torch.randn(count, NOISE_DIM, 1, 1, device=device)


# ---- Networks ----
# In the layers, 4, 2, 1 are kernel size, stride and padding. DCGAN begins with weights
# of standard deviation 0.02; PyTorch's default worked as well here.
class Generator(nn.Module):
    """Turn noise (N, NOISE_DIM, 1, 1) into images (N, CHANNELS, 64, 64), -1 to 1."""

    def __init__(self):
        super().__init__()
        f = FEATURES
        # BatchNorm gives each channel mean 0 and variance 1 over all pixels of a batch,
        # then scales and shifts it. It would subtract a bias again, so there is none.
        self.layers = nn.Sequential(
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
    one. InstanceNorm normalises each channel of each image by itself.
    """

    def __init__(self):
        super().__init__()
        f = FEATURES
        self.layers = nn.Sequential(
            nn.Conv2d(CHANNELS, f, 4, 2, 1),  # (N, f, 32, 32)
            nn.LeakyReLU(0.2),
            nn.Conv2d(f, f * 2, 4, 2, 1, bias=False),  # (N, 2f, 16, 16)
            nn.InstanceNorm2d(f * 2, affine=True),  # affine: learn scale and shift
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

    The best C has slope 1 between each fake and the real image that it would have to
    move to. Nobody knows these pairs. WGAN-GP (equation 3) pairs real images and fakes
    at random, and takes a random point between the two of each pair: an approximation
    that works in practice. real and fake: (N, CHANNELS, 64, 64).
    """
    alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = alpha * real + (1 - alpha) * fake
    mixed.requires_grad_()  # to differentiate C(mixed) with respect to it
    # Each score depends on its own image alone, so the gradient of their sum holds the
    # gradient of each. create_graph lets backward() go through these to C's weights.
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


# ---- One step of the game ----
def train_step(images, generator, critic, gen_optimizer, critic_optimizer):
    """Update C CRITIC_STEPS times, then G once, with fakes and random batches of the
    images (uint8). Return a value for each curve, under its name in TensorBoard."""
    generator.train()  # draw() below leaves G in evaluation mode

    # Update C: maximise the mean of C(x) - C(G(z)), minus the penalty.
    # detach() ends backward() at the fakes: G's gradients are not needed here.
    for _ in range(CRITIC_STEPS):
        indices = torch.randint(len(images), (BATCH_SIZE,), device=images.device)
        real = normalize(images[indices])  # (N, CHANNELS, 64, 64)
        fake = generator(get_noise(BATCH_SIZE, images.device)).detach()
        real_output = critic(real)  # (N, 1, 1, 1)
        fake_output = critic(fake)  # (N, 1, 1, 1)
        penalty, slope = gradient_penalty(critic, real, fake)
        critic_loss = get_critic_loss(real_output, fake_output, penalty)
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()

    # Update G: maximise the mean of C(G(z)), with the C that has just learned.
    # C gets gradients here too; the next zero_grad() of its optimizer clears them.
    fake = generator(get_noise(BATCH_SIZE, images.device))
    gen_loss = get_gen_loss(critic(fake))
    gen_optimizer.zero_grad()
    gen_loss.backward()
    gen_optimizer.step()
    return {
        "loss/critic": critic_loss.detach(),  # the value alone, without its graph
        "loss/generator": gen_loss.detach(),
        "critic/estimate": (real_output.mean() - fake_output.mean()).detach(),
        "critic/gradient_norm": slope.detach(),
        "critic/gradient_penalty": penalty.detach(),  # with PENALTY_WEIGHT
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
    critic = Critic().to(device)
    # fused=True makes Adam faster on a CPU.
    gen_optimizer = Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
    critic_optimizer = Adam(critic.parameters(), LEARNING_RATE, BETAS, fused=True)
    parts = {
        "generator": generator,
        "critic": critic,
        "gen_optimizer": gen_optimizer,
        "critic_optimizer": critic_optimizer,
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
        for _ in range(len(images) // BATCH_SIZE):
            curves = train_step(
                images, generator, critic, gen_optimizer, critic_optimizer
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
