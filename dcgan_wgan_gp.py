"""DCGAN with Wasserstein loss: colour pictures and a curve of their quality.

A critic C replaces the discriminator D. It gives unbounded scores and maximises

    mean of C(x) over real x  -  mean of C(G(z)) over noise z

with a slope, the norm of its gradient in x, of at most 1. The best value is the
Wasserstein distance: how far fakes must move to be spread like real images. A sure D
teaches badly. C keeps a slope. WGAN limits it by clipping C's weights, WGAN-GP
penalises slopes other than 1.

Papers: DCGAN https://arxiv.org/abs/1511.06434, WGAN https://arxiv.org/abs/1701.07875,
        WGAN-GP https://arxiv.org/abs/1704.00028
Run:    python dcgan_wgan_gp.py, then tensorboard --logdir runs
Expect: distance up, then down; colours after 2 epochs, each 6 to 9 minutes;
        shapes with the tips below
"""

import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

import config

# ---- Settings: try others in a copy, which keeps its results apart ----
NAME = Path(__file__).stem  # names all files of a run
DATASET = "cifar10"  # or "mnist", or a folder of pictures
EPOCHS = 5  # of len(images) // BATCH_SIZE G steps
BATCH_SIZE = 64  # real images in a critic step, and as many fakes
CRITIC_STEPS = 5  # per step of G; 1 draws sooner, measures worse
PENALTY_WEIGHT = 10  # lambda in WGAN-GP
LEARNING_RATE = 5e-5  # Adam's step size; try 2e-4
BETAS = (0.0, 0.9)  # no momentum: old gradients suit an old opponent
NOISE_DIM = 100  # channels of the noise
# Channels at 32x32, fewer on a CPU
FEATURES = 64 if config.DEVICE != "cpu" and torch.accelerator.is_available() else 16
CHANNELS = 1 if DATASET == "mnist" else 3
SEED = config.SEED  # the same seed gives the same run
TEST_SEED = 1  # any but SEED draws other samples
LOG_EVERY = 100  # steps averaged per point of a curve


# ---- Data ----
def load_images():
    """Return the images of DATASET: uint8 (N, CHANNELS, size, size)."""
    if DATASET == "mnist":
        known, files = datasets.MNIST, "only MNIST/raw/*.gz"
    elif DATASET == "cifar10":
        known, files = datasets.CIFAR10, "cifar-10-python.tar.gz"
    else:
        return load_folder()
    try:
        data = known(config.DATA_PATH, download=True).data
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        sys.exit(f"Put {files} into {config.DATA_PATH}. {error!r}")
    images = torch.as_tensor(data).view(*data.shape[:3], CHANNELS)
    return images.permute(0, 3, 1, 2).contiguous()  # faster


def load_folder():
    """Return the middle squares of pictures in DATASET: uint8 (N, 3, 64, 64)."""
    images = []
    for path in filter(Path.is_file, sorted(Path(DATASET).expanduser().rglob("*"))):
        try:
            picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
        except Exception as error:
            print(f"Skipped {path}: {error!r}")
            continue
        square = Image.new("RGBA", (64, 64), "white")
        square.alpha_composite(ImageOps.fit(picture, (64, 64)))
        images.append(pil_to_tensor(square.convert("RGB")))
        if sys.stdout.isatty():
            print(f"{len(images)} pictures", end="\r", flush=True)
    if not images:
        sys.exit('DATASET is not "cifar10", "mnist" or a folder of pictures.')
    return torch.stack(images)


def normalize(images):
    """Turn uint8 images into float (N, CHANNELS, 64, 64), -1 to 1."""
    images = nn.functional.interpolate(images.float(), size=64, mode="bilinear")
    return images / 127.5 - 1


def to_pixels(images):
    """Undo normalize, not the size: 0 to 1."""
    return images / 2 + 0.5


# ---- Networks. 4, 2, 1 are kernel, stride and padding. ----
class Generator(nn.Sequential):
    """Turn noise (N, NOISE_DIM, 1, 1) into images (N, CHANNELS, 64, 64), -1 to 1."""

    def __init__(self, f=FEATURES):
        super().__init__(
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


class Critic(nn.Sequential):
    """Turn images (N, CHANNELS, 64, 64) into scores (N, 1, 1, 1).

    BatchNorm mixes images, but the penalty is on the slope of each. InstanceNorm
    treats each image by itself.
    """

    def __init__(self, f=FEATURES):
        super().__init__(
            nn.Conv2d(CHANNELS, f, 4, 2, 1),  # (N, f, 32, 32)
            nn.LeakyReLU(0.2),
            nn.Conv2d(f, f * 2, 4, 2, 1, bias=False),  # (N, 2f, 16, 16)
            nn.InstanceNorm2d(f * 2, affine=True),
            nn.LeakyReLU(0.2),
            nn.Conv2d(f * 2, f * 4, 4, 2, 1, bias=False),  # (N, 4f, 8, 8)
            nn.InstanceNorm2d(f * 4, affine=True),
            nn.LeakyReLU(0.2),
            nn.Conv2d(f * 4, f * 8, 4, 2, 1, bias=False),  # (N, 8f, 4, 4)
            nn.InstanceNorm2d(f * 8, affine=True),
            nn.LeakyReLU(0.2),
            nn.Conv2d(f * 8, 1, 4),  # (N, 1, 1, 1)
        )


# ---- Losses ----
def gradient_penalty(critic, real, fake):
    """Return PENALTY_WEIGHT times the mean of (slope - 1)^2, and the mean slope.

    Along the cheapest moves from fakes to real images, the best C has slope 1. Points
    between random pairs (N, CHANNELS, 64, 64) stand for these.
    """
    share = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = share * real + (1 - share) * fake
    mixed.requires_grad_()  # for its gradient
    # A score depends on its own image alone: one gradient of the sum gives all N.
    # create_graph: backward() differentiates it again.
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    slope = gradient.flatten(1).norm(dim=1)
    return PENALTY_WEIGHT * (slope - 1).pow(2).mean(), slope.mean()


def get_critic_loss(real_output, fake_output, penalty):
    """Return C's loss from its scores (N, 1, 1, 1): it wants real higher."""
    return fake_output.mean() - real_output.mean() + penalty


def get_gen_loss(fake_output):
    """Return G's loss from C's scores of fakes: it wants them high."""
    return -fake_output.mean()


# ---- Housekeeping: the same text in all four scripts. Skip it at first. ----
CHECKPOINT = Path(config.CALLBACKS_PATH, f"{NAME}.pt")
SAMPLES = Path(config.SAMPLES_PATH, NAME)
RUNS = Path(config.TENSORBOARD_PATH, NAME)
script = Path(__file__).read_text(encoding="utf-8")
plain = int, float, str, bool
settings = {k: v for k, v in globals().items() if k.isupper() and type(v) in plain}
settings["BETAS"] = BETAS


def prepare():
    """Check settings, seed, make folders, return the device."""
    counts = "EPOCHS BATCH_SIZE CRITIC_STEPS NOISE_DIM FEATURES LOG_EVERY"
    for name in counts.split():
        if not isinstance(settings.get(name), int) or settings[name] < 1:
            sys.exit(f"{name} must be a whole number above 0.")
    found = torch.accelerator.current_accelerator(check_available=True)
    try:
        torch.manual_seed(10_000 * SEED + TEST_SEED)
        torch.manual_seed(SEED)
        device = torch.zeros(1, device=config.DEVICE or found).device
        Adam([torch.zeros(1)], settings["LEARNING_RATE"], BETAS, fused=True)  # valid?
        for folder in CHECKPOINT.parent, SAMPLES, RUNS:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except Exception as error:
        sys.exit(f"Fix SEED, TEST_SEED, LEARNING_RATE, BETAS, DEVICE or path. {error}")
    return device


def save_checkpoint(parts, epoch):
    """Save what a run needs to go on exactly."""
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    checkpoint |= {"epoch": epoch, "settings": settings, "script": script}
    checkpoint["random_state"] = torch.initial_seed()
    new = CHECKPOINT.with_name(f"{NAME}.{time.time_ns()}.tmp")
    torch.save(checkpoint, new)
    new.replace(CHECKPOINT)  # safe from a kill


def load_checkpoint(parts):
    """Load the parts. Return the epochs done."""
    if not config.LOAD or not CHECKPOINT.exists():
        print("Starting from scratch.")
        return 0
    advice = f"Move {CHECKPOINT} away, or set LOAD = False."
    try:
        if zipfile.ZipFile(CHECKPOINT).testzip():
            raise ValueError("damaged")
        # weights_only: never runs code in the file
        saved = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
        for name, new in settings.items():
            old = saved["settings"].get(name, new)
            if old != new and name not in ("NAME", "EPOCHS", "TEST_SEED", "LOG_EVERY"):
                sys.exit(f"{name} = {new!r}, but it was {old!r}. {advice}")
        for name, part in parts.items():
            if "optimizer" in name:  # rates are the script's
                saved[name]["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(saved[name])
            for w, state in getattr(part, "state", {}).items():
                torch.stack([w, *(v for v in state.values() if v.ndim)])  # must fit
        print(f"Going on after epoch {saved['epoch']} of {CHECKPOINT}.")
        if saved["script"] != script:
            print(f"{NAME}.py has changed since then.")
        return int(saved["epoch"])
    except Exception as error:
        sys.exit(f"{advice} {error!r}")


def show(writer, tag, pixels, step, name):
    """Show the first 64 pictures in TensorBoard and a PNG file."""
    writer.add_images(f"images/{tag}", pixels[:64].nan_to_num(), step)
    save_image(pixels[:64], SAMPLES / f"{name}.png")


@torch.no_grad()
def draw(generator, noise):
    """Return G's pictures of the noise (N, ...), 0 to 1."""
    generator.eval()  # BatchNorm uses running averages
    pixels = to_pixels(generator(noise))
    generator.train()
    return pixels


if __name__ == "__main__":
    # ---- Set-up ----
    signal.signal(signal.SIGINT, lambda *_: sys.exit("Stopped. Run it again to go on."))
    device = prepare()
    images = load_images().to(device)
    if not 2 <= BATCH_SIZE <= len(images):
        sys.exit(f"{len(images)} images: BATCH_SIZE must be from 2 to that.")
    fixed_noise = torch.randn(64, NOISE_DIM, 1, 1).to(device)  # the same every epoch
    generator = Generator().to(device)
    critic = Critic().to(device)
    gen_optimizer = Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
    critic_optimizer = Adam(critic.parameters(), LEARNING_RATE, BETAS, fused=True)
    parts = {"generator": generator, "critic": critic}
    parts |= {"gen_optimizer": gen_optimizer, "critic_optimizer": critic_optimizer}
    epochs_done = load_checkpoint(parts)

    # ---- Train ----
    steps = len(images) // BATCH_SIZE  # of G in an epoch
    tags = ["loss/critic", "loss/generator", "critic/wasserstein_distance"]
    tags += ["critic/gradient_norm", "critic/gradient_penalty"]
    epochs = range(epochs_done + 1, EPOCHS + 1) if config.TRAIN else []
    if not epochs and not epochs_done:
        sys.exit("No checkpoint to draw from: set TRAIN or LOAD = True.")
    if epochs:
        print(f"Training to epoch {EPOCHS} on {device}: {SAMPLES}, {RUNS}", flush=True)
        writer = SummaryWriter(RUNS, purge_step=epochs_done * steps + (epochs_done > 0))
        writer.add_text("settings", str(settings), epochs_done * steps)
        if epochs_done == 0:
            show(writer, "real", to_pixels(normalize(images[:64])), 0, "real")
            show(writer, "fake", draw(generator, fixed_noise), 0, "epoch_0000")
    for epoch in epochs:
        torch.manual_seed(10_000 * SEED + epoch)  # the same after a stop
        history = torch.zeros(steps, len(tags), device=device)
        start = time.time()
        for step in range(steps):
            # Update C: maximise C(x) - C(G(z)), less the penalty.
            for _ in range(CRITIC_STEPS):
                real = images[torch.randint(len(images), (BATCH_SIZE,), device=device)]
                real = normalize(real)
                noise = torch.randn(BATCH_SIZE, NOISE_DIM, 1, 1, device=device)
                fake = generator(noise).detach()  # G's turn is below
                real_output = critic(real)
                fake_output = critic(fake)
                penalty, slope = gradient_penalty(critic, real, fake)
                critic_loss = get_critic_loss(real_output, fake_output, penalty)
                critic_optimizer.zero_grad()
                critic_loss.backward()
                critic_optimizer.step()

            # Update G: maximise C(G(z)).
            noise = torch.randn(BATCH_SIZE, NOISE_DIM, 1, 1, device=device)
            gen_loss = get_gen_loss(critic(generator(noise)))
            gen_optimizer.zero_grad()
            gen_loss.backward(inputs=list(generator.parameters()))  # skips C's
            gen_optimizer.step()

            # Of C's last step:
            distance = real_output.mean() - fake_output.mean()
            values = [critic_loss, gen_loss, distance, slope, penalty]
            history[step] = torch.stack(values).detach()
            if step % 10 == 0 and sys.stdout.isatty():
                share = (step + 1) / steps
                left = (EPOCHS - epoch + 1 - share) / share * (time.time() - start) / 60
                text = f"epoch {epoch} {share:4.0%} {left:.1f} min left "
                print(text, end="\r", flush=True)

        means = history.mean(dim=0).tolist()
        speed = steps * CRITIC_STEPS * BATCH_SIZE / (time.time() - start)
        pixels = draw(generator, fixed_noise)
        print(
            f"epoch {epoch}/{EPOCHS}  C {means[0]:.3f}  G {means[1]:.3f}  "
            f"distance {means[2]:.3f}  slope {means[3]:.2f}  {speed:,.0f} images/s",
            flush=True,
        )
        step = (epoch - 1) * steps
        for part in history.cpu().split(LOG_EVERY):
            step += len(part)
            for tag, value in zip(tags, part.mean(dim=0)):
                writer.add_scalar(tag, value, step)
        writer.add_scalar("speed/images_per_second", speed, step)
        show(writer, "fake", pixels, step, f"epoch_{epoch:04}")
        writer.flush()
        if not (history.isfinite().all() and pixels.isfinite().all()):
            sys.exit("A loss is NaN or inf. Lower LEARNING_RATE and set LOAD = False.")
        save_checkpoint(parts, epoch)
        epochs_done = epoch

    # ---- Test ----
    if config.TEST:
        torch.manual_seed(TEST_SEED)
        noise = torch.randn(64, NOISE_DIM, 1, 1).to(device)
        samples = draw(generator, noise)
        save_image(samples, SAMPLES / "test.png")
        # Does G copy? Right of each sample: the nearest image.
        real = (to_pixels(normalize(part)).flatten(1) for part in images.split(1000))
        distances = [torch.cdist(samples.flatten(1), part) for part in real]
        nearest = images[torch.cat(distances, dim=1).argmin(dim=1)]
        pairs = torch.stack([samples, to_pixels(normalize(nearest))], dim=1)
        save_image(pairs.flatten(0, 1), SAMPLES / "nearest.png", nrow=16)
        # Is noise space smooth? Each row walks from noise to noise.
        walk = [draw(generator, noise[:8].lerp(noise[8:16], i / 9)) for i in range(10)]
        walk = torch.stack(walk, dim=1).flatten(0, 1)
        save_image(walk, SAMPLES / "interpolation.png", nrow=10)
        paths = sorted(SAMPLES.glob("epoch_*.png"))[: epochs_done + 1]
        paths = paths[:: 1 + epochs_done // 100] + paths[-1:] * 20  # the last one stays
        if paths:
            first, *rest = [Image.open(path).reduce(2) for path in paths]
            gif = SAMPLES / "epochs.gif"
            first.save(gif, append_images=rest, save_all=True, duration=100, loop=0)
        print(f"Drew pictures in {SAMPLES}.")
    elif not epochs:
        print(f"{epochs_done} epochs are done. See TRAIN, EPOCHS and TEST.")
