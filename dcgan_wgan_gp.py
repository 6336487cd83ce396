"""DCGAN with Wasserstein loss and gradient penalty: pictures in colour.

A critic C takes the place of the discriminator D. It gives each image a score, which
may be any number. C learns to score real images higher than fakes, and G to raise the
scores of its fakes:

    min over G, max over C:   mean of C(x)  -  mean of C(G(z))

C could make this difference as large as it likes by scaling its scores. So its slope,
the norm of its gradient with respect to an image, is limited to 1: the scores of two
images then differ by no more than the distance between the two. (Such a C is called
1-Lipschitz.) The largest difference that such a C can reach then tells how far fakes
are from real images. Pair each fake with a real image, so that the mean distance in the
pairs is as small as can be. By the Kantorovich-Rubinstein theorem, this mean, called
the Wasserstein distance, is that largest difference.

Once D catches every fake, a better fake gets the same answer, and G learns little.
The Wasserstein distance still shrinks as fakes come closer to real images, and C's
gradient shows G which way that is.

WGAN limits the slope by clipping C's weights, which favours a C that is too simple.
WGAN-GP adds a penalty to C's loss instead, for each slope that is not 1. Slopes below 1
count as well: the best C gives the two images of each such pair scores that differ by
their whole distance, and its slope between the two is 1. A penalty is no strict limit:
the difference that C reaches can be larger than the Wasserstein distance, and can be
compared only between runs with the same settings.

Papers:  DCGAN https://arxiv.org/abs/1511.06434, WGAN https://arxiv.org/abs/1701.07875,
         WGAN-GP https://arxiv.org/abs/1704.00028 (which has LayerNorm in C, batches of
         64 and a rate of 1e-4)
Run:     python dcgan_wgan_gp.py; after Ctrl-C, the same command resumes
Watch:   pictures in samples/dcgan_wgan_gp_cifar10; for curves, run tensorboard
         --logdir runs in this folder, and open the address that it prints
Expect:  colours after one epoch, which takes 7 to 30 minutes on a CPU; after five,
         objects that stand out from a background
Healthy: critic/estimate, the mean of C(x) - C(G(z)), and critic/gradient_norm, C's mean
         slope, rise for some hundred steps, to about 38 and 1.9. They fall as the fakes
         come closer, in five epochs to about 5 and 1.2. It is unhealthy if they keep
         rising. loss/generator says nothing: adding a number to all scores changes it,
         but not C's loss. distance, which compares pixels, falls to 0.03 in an epoch
Draw:    set TRAIN = False and TEST = True in config.py, and run this script again
Change:  edit a setting, and the next start goes on with it: more EPOCHS train longer.
         To compare settings, or to try other layers or another NOISE_DIM, use a copy
"""

import glob
import math
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

import config

# ---- Settings ----
DATASET = "cifar10"  # or "mnist", or a folder of pictures beside config.py
EPOCHS = 5  # each has as many steps of G as there are batches of images
BATCH_SIZE = 16  # real images in a step of C; small, so that an epoch has many steps
CRITIC_STEPS = 5  # for each step of G, so that C stays near its best
PENALTY_WEIGHT = 10  # lambda in WGAN-GP
LEARNING_RATE = 5e-5  # Adam's step size
# How much Adam remembers of past gradients, and of their squares: as in WGAN-GP.
BETAS = (0.0, 0.9)
NOISE_DIM = 100  # random numbers from which G makes one image
FEATURES = 16  # channels at 32x32, more at smaller sizes; DCGAN has 128, for a GPU
SIZE = 64  # height and width; the layers below are made for it: change both together
CHANNELS = 1 if DATASET == "mnist" else 3  # 1 makes the pictures of a folder grey
LOG_EVERY = 20  # steps between two points of a curve
PICTURES = 1000  # fakes after each epoch, for the distance; 64 of them are shown

# Names the results, so that each copy and each data set has its own
NAME = f"{Path(__file__).stem}_{Path(DATASET).name}"
CHECKPOINT = config.CALLBACKS_PATH / f"{NAME}.pt"
SAMPLES = config.SAMPLES_PATH / NAME


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
        error.add_note(f"Or put cifar-10-python.tar.gz into {config.DATA_PATH}.")
        raise
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def get_batches(count, device):
    """Return the image indices of each step: (steps, CRITIC_STEPS * BATCH_SIZE).

    They are drawn at random: on average, each image comes CRITIC_STEPS times.
    """
    steps = max(1, count // BATCH_SIZE)
    return torch.randint(count, (steps, CRITIC_STEPS * BATCH_SIZE), device=device)


def normalize(images):
    """Turn uint8 images of any size into float (N, CHANNELS, SIZE, SIZE), -1 to 1."""
    images = nn.functional.interpolate(images.float(), size=SIZE, mode="bilinear")
    return images / 127.5 - 1


def to_pixels(images):
    """Turn images (N, CHANNELS, SIZE, SIZE) from -1 to 1 into pictures from 0 to 1."""
    return images / 2 + 0.5


def get_noise(count, device):
    """Return standard normal noise for G: float (count, NOISE_DIM, 1, 1)."""
    return torch.randn(count, NOISE_DIM, 1, 1, device=device)


# ---- Networks ----
# In the layers, 4, 2, 1 are kernel size, stride and padding: convolutions then halve
# height and width, and transposed ones (see conv_gan.py) double them. With 4 alone, 1x1
# becomes 4x4, or 4x4 becomes 1x1. DCGAN begins with weights of standard deviation 0.02;
# PyTorch's default worked as well here.
class Generator(nn.Module):
    """Turn noise (N, NOISE_DIM, 1, 1) into images from -1 to 1, as normalize does."""

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
            nn.ConvTranspose2d(f, CHANNELS, 4, 2, 1),  # (N, CHANNELS, SIZE, SIZE)
            nn.Tanh(),
        )

    def forward(self, noise):
        return self.layers(noise)


class Critic(nn.Module):
    """Turn images (N, CHANNELS, SIZE, SIZE) into scores (N, 1, 1, 1).

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

    The penalty term of WGAN-GP's equation 3. Nobody knows the best pairs, so the paper
    pairs fakes and real images at random, and takes a random point between the two.
    real and fake: (N, CHANNELS, SIZE, SIZE).
    """
    alpha = torch.rand_like(real[:, :1, :1, :1])  # (N, 1, 1, 1), from 0 to 1
    mixed = alpha * real + (1 - alpha) * fake
    mixed.requires_grad_()  # to differentiate C(mixed) with respect to it
    # Each score depends on its own image alone, so the gradient of their sum holds the
    # gradient of each. C learns from the slopes, so backward() has to differentiate
    # these gradients once more: create_graph keeps what that needs. grad() returns a
    # tuple, with the gradients for each input.
    scores = critic(mixed)
    gradients = torch.autograd.grad(scores.sum(), mixed, create_graph=True)[0]
    slopes = gradients.flatten(1).norm(dim=1)  # (N,)
    return PENALTY_WEIGHT * (slopes - 1).pow(2).mean(), slopes.mean()


def get_critic_loss(real_output, fake_output, penalty):
    """Return C's loss from its scores (N, 1, 1, 1): the mean for fakes minus the mean
    for real images, plus the penalty."""
    return fake_output.mean() - real_output.mean() + penalty


def get_gen_loss(fake_output):
    """Return G's loss from C's scores of fakes (N, 1, 1, 1), which G wants high."""
    return -fake_output.mean()


# ---- One step of the game ----
def train_step(real, generator, critic, gen_optimizer, critic_optimizer):
    """Update C CRITIC_STEPS times, each with its share of the real images, then G once.

    real: (CRITIC_STEPS * N, CHANNELS, SIZE, SIZE)
    Return the values of TensorBoard's curves, those of C from its last step:
    {name: tensor of one number}.
    """
    generator.train()  # back to training mode: draw() switches to evaluation mode

    # Update C: maximise the mean of C(x) - C(G(z)), minus the penalty, with new fakes
    # each time. detach() cuts them off from G: backward() computes C's gradients alone.
    for batch in real.chunk(CRITIC_STEPS):
        fake = generator(get_noise(len(batch), real.device)).detach()
        real_output = critic(batch)  # (N, 1, 1, 1)
        fake_output = critic(fake)  # (N, 1, 1, 1)
        penalty, slope = gradient_penalty(critic, batch, fake)
        critic_loss = get_critic_loss(real_output, fake_output, penalty)
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()

    # Update G: maximise the mean of C(G(z)), with the new C. backward() gives C
    # gradients, too, but gen_optimizer changes G alone.
    fake = generator(get_noise(len(batch), real.device))
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


# ---- Training ----
def train():
    """Train up to EPOCHS, and resume from the checkpoint if there is one."""
    gpu = torch.accelerator.current_accelerator(check_available=True)  # or None
    device = config.DEVICE or gpu or "cpu"
    torch.manual_seed(config.SEED)
    fixed_noise = get_noise(PICTURES, device)  # the same for the pictures of all epochs
    generator = Generator().to(device)
    critic = Critic().to(device)
    # Each optimizer changes one network. fused=True computes the same, but faster.
    gen_optimizer = Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
    critic_optimizer = Adam(critic.parameters(), LEARNING_RATE, BETAS, fused=True)
    parts = {  # what a checkpoint saves
        "generator": generator,
        "critic": critic,
        "gen_optimizer": gen_optimizer,
        "critic_optimizer": critic_optimizer,
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
                real, generator, critic, gen_optimizer, critic_optimizer
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
def load_folder():
    """Return the pictures in the folder DATASET and below, except hidden ones.

    uint8 (N, CHANNELS, SIZE, SIZE). If they are fewer than 5,000, all are repeated
    equally often, so that an epoch has enough steps. Files with other endings than
    IMG_EXTENSIONS, such as a phone's .heic, are skipped: convert them first.
    """
    folder = config.ROOT / DATASET
    names = glob.glob("**/*", root_dir=folder, recursive=True)
    names = sorted(name for name in names if is_image_file(name))
    print(f"Found {len(names)} pictures in {folder}", flush=True)
    if not names:
        sys.exit(f"Change DATASET. Pictures end in {', '.join(IMG_EXTENSIONS)}.")
    images = torch.empty(len(names), CHANNELS, SIZE, SIZE, dtype=torch.uint8)
    for i, name in enumerate(names):
        try:
            picture = load_picture(folder / name)
        except Exception as error:
            error.add_note(f"This picture cannot be read: {folder / name}")
            raise
        images[i] = picture
    return images.repeat(math.ceil(5000 / len(images)), 1, 1, 1)


def load_picture(path):
    """Return the middle square of a picture: uint8 (CHANNELS, SIZE, SIZE)."""
    picture = Image.open(path)
    if picture.mode.startswith(("I", "F")):  # integers or floats of 16 or 32 bits
        raise ValueError("its channels have more than 8 bits")
    picture.draft(None, (2 * SIZE, 2 * SIZE))  # reads large JPEGs faster
    picture = ImageOps.exif_transpose(picture).convert("RGBA")  # upright
    picture = ImageOps.fit(picture, (SIZE, SIZE))
    square = Image.new("L" if CHANNELS == 1 else "RGB", picture.size, "white")
    square.paste(picture, mask=picture)  # white stays behind transparent parts
    return pil_to_tensor(square)


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
