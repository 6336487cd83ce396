"""Logits GAN: vanilla_gan.py, with deeper networks and a loss safe from rounding.

There D ends in a sigmoid, and the loss takes its logarithm. In between, float32 rounds:
sigmoid(18) is 1, sigmoid(-200) is 0. A fake at 18 teaches D nothing, one at -200
teaches G nothing. Here D ends in the logit s, and BCEWithLogitsLoss does both in one:

    -log sigmoid(s)  =  log(1 + exp(-s))  =  max(0, -s) + log(1 + exp(-|s|))

Paper:  Goodfellow et al. 2014, equation 1, https://arxiv.org/abs/1406.2661
Run:    python bce_logits_gan.py, then tensorboard --logdir runs
Expect: digits after 5 epochs, good ones after 10; all 50 in 4 to 6 minutes
"""

import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets
from torchvision.utils import save_image

import config

# ---- Settings: try others in a copy, which keeps its results apart ----
NAME = Path(__file__).stem  # names all files of a run
EPOCHS = 50  # passes over the images; raise it to go on
BATCH_SIZE = 128  # real images in a step, and as many fakes
LEARNING_RATE = 3e-4  # Adam's step size, for both networks
BETAS = (0.0, 0.999)  # no momentum: old gradients suit an old opponent
NOISE_DIM = 64  # random numbers that G gets for one image
HIDDEN_DIM = 64  # width of the narrowest block
SEED = config.SEED  # the same seed gives the same run
TEST_SEED = 1  # any but SEED draws other samples
LOG_EVERY = 100  # steps averaged per point of a curve


# ---- Data ----
def load_images(train):
    """Return MNIST's 60,000 training or 10,000 test images: uint8 (N, 28, 28)."""
    try:
        mnist = datasets.MNIST(config.DATA_PATH, train=train, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        sys.exit(f"No MNIST: put only its .gz files in DATA_PATH/MNIST/raw. {error!r}")
    return mnist.data


def normalize(images):
    """Turn uint8 images (N, 28, 28) into what G imitates: float (N, 784), 0 to 1."""
    return images.flatten(1) / 255


def to_pixels(images):
    """Turn images (N, 784) into pictures (N, 1, 28, 28), 0 to 1."""
    return images.view(-1, 1, 28, 28)


# ---- Networks ----
def get_gen_block(in_dim, out_dim):
    """Return a block of G, (N, in_dim) to (N, out_dim)."""
    return nn.Sequential(
        nn.Linear(in_dim, out_dim),
        nn.BatchNorm1d(out_dim),
        nn.ReLU(),
    )


def get_disc_block(in_dim, out_dim):
    """Return a block of D, (N, in_dim) to (N, out_dim)."""
    return nn.Sequential(
        nn.Linear(in_dim, out_dim),
        nn.LeakyReLU(0.2),
    )


class Generator(nn.Sequential):
    """Turn standard normal noise (N, NOISE_DIM) into images (N, 784) from 0 to 1."""

    def __init__(self):
        super().__init__(
            get_gen_block(NOISE_DIM, HIDDEN_DIM),  # (N, 64)
            get_gen_block(HIDDEN_DIM, HIDDEN_DIM * 2),  # (N, 128)
            get_gen_block(HIDDEN_DIM * 2, HIDDEN_DIM * 4),  # (N, 256)
            get_gen_block(HIDDEN_DIM * 4, HIDDEN_DIM * 8),  # (N, 512)
            nn.Linear(HIDDEN_DIM * 8, 28 * 28),  # (N, 784)
            nn.Sigmoid(),
        )


class Discriminator(nn.Sequential):
    """Turn images (N, 784) into logits (N, 1): D(x) is their sigmoid."""

    def __init__(self):
        super().__init__(
            get_disc_block(28 * 28, HIDDEN_DIM * 4),  # (N, 256)
            get_disc_block(HIDDEN_DIM * 4, HIDDEN_DIM * 2),  # (N, 128)
            get_disc_block(HIDDEN_DIM * 2, HIDDEN_DIM),  # (N, 64)
            nn.Linear(HIDDEN_DIM, 1),  # (N, 1)
        )

    def forward(self, images):
        """Return the logits. Black goes in as -1: weights learn nothing from 0."""
        return super().forward(2 * images - 1)


# ---- Losses ----
bce = nn.BCEWithLogitsLoss()  # for target 0, s becomes -s


def get_disc_loss(real_output, fake_output):
    """Return D's loss from its logits (N, 1): > 0 is right if real, < 0 if fake."""
    real_loss = bce(real_output, torch.ones_like(real_output))
    fake_loss = bce(fake_output, torch.zeros_like(fake_output))
    return (real_loss + fake_loss) / 2


def get_gen_loss(fake_output):
    """Return G's loss from D's logits for fakes (N, 1): G pushes them up."""
    return bce(fake_output, torch.ones_like(fake_output))


# ---- Quality ----
def share_near(images, others, k=5):
    """Return the share of images (N, ...) near one of others (M, ...): as near as that
    one's k-th neighbour among them. Precision is the share of fakes near real
    images, recall that of real images near fakes.
    After https://arxiv.org/abs/1904.06991, on pixels."""
    images, others = images.flatten(1), others.flatten(1)
    # k + 1: each is its own nearest
    reach = torch.cdist(others, others).topk(k + 1, largest=False).values[:, -1]
    is_near = torch.cdist(images, others) <= reach  # (N, M)
    return is_near.any(dim=1).float().mean().item()


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
    for name in "EPOCHS", "BATCH_SIZE", "NOISE_DIM", "HIDDEN_DIM", "LOG_EVERY":
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
    images = load_images(train=True).to(device)
    if not 2 <= BATCH_SIZE <= len(images):
        sys.exit(f"{len(images)} images: BATCH_SIZE must be from 2 to that.")
    fixed_noise = torch.randn(1000, NOISE_DIM).to(device)  # the same every epoch
    generator = Generator().to(device)
    discriminator = Discriminator().to(device)
    gen_optimizer = Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)
    disc_optimizer = Adam(discriminator.parameters(), LEARNING_RATE, BETAS, fused=True)
    parts = {"generator": generator, "discriminator": discriminator}
    parts |= {"gen_optimizer": gen_optimizer, "disc_optimizer": disc_optimizer}
    epochs_done = load_checkpoint(parts)

    # ---- Train ----
    steps = len(images) // BATCH_SIZE  # a smaller last batch is left out
    tags = ["loss/discriminator", "loss/generator", "prob/real", "prob/fake"]
    epochs = range(epochs_done + 1, EPOCHS + 1) if config.TRAIN else []
    if not epochs and not epochs_done:
        sys.exit("No checkpoint to draw from: set TRAIN or LOAD = True.")
    if epochs:
        print(f"Training to epoch {EPOCHS} on {device}: {SAMPLES}, {RUNS}", flush=True)
        held_out = to_pixels(normalize(load_images(train=False)[::10].to(device)))
        real_pixels = to_pixels(normalize(images[:: 1 + len(images) // 1000]))
        goal = share_near(real_pixels, held_out), share_near(held_out, real_pixels)
        writer = SummaryWriter(RUNS, purge_step=epochs_done * steps + (epochs_done > 0))
        writer.add_text("settings", str(settings), epochs_done * steps)
        if epochs_done == 0:
            show(writer, "real", real_pixels, 0, "real")
            show(writer, "fake", draw(generator, fixed_noise), 0, "epoch_0000")
    for epoch in epochs:
        torch.manual_seed(10_000 * SEED + epoch)  # the same after a stop
        batches = torch.randperm(len(images), device=device).split(BATCH_SIZE)
        history = torch.zeros(steps, len(tags), device=device)
        start = time.time()
        for step in range(steps):
            real = normalize(images[batches[step]])  # (N, 784)
            noise = torch.randn(BATCH_SIZE, NOISE_DIM, device=device)
            fake = generator(noise)  # (N, 784)

            # Update D: minimise the mean of -log D(x) and -log(1 - D(G(z))).
            # detach(): no gradient flows into G, whose turn is below.
            real_output = discriminator(real)  # (N, 1)
            fake_output = discriminator(fake.detach())
            disc_loss = get_disc_loss(real_output, fake_output)
            disc_optimizer.zero_grad()
            disc_loss.backward()
            disc_optimizer.step()

            # Update G: minimise -log D(G(z)), with the D that has just learned.
            # Goodfellow draws new fakes. The same ones save time.
            gen_loss = get_gen_loss(discriminator(fake))
            gen_optimizer.zero_grad()
            gen_loss.backward(inputs=list(generator.parameters()))  # skips D's
            gen_optimizer.step()

            answers = [real_output.sigmoid().mean(), fake_output.sigmoid().mean()]
            history[step] = torch.stack([disc_loss, gen_loss, *answers]).detach()
            if step % 10 == 0 and sys.stdout.isatty():
                share = (step + 1) / steps
                left = (EPOCHS - epoch + 1 - share) / share * (time.time() - start) / 60
                text = f"epoch {epoch} {share:4.0%} {left:.1f} min left "
                print(text, end="\r", flush=True)

        means = history.mean(dim=0).tolist()
        speed = steps * BATCH_SIZE / (time.time() - start)
        pixels = draw(generator, fixed_noise)
        precision = share_near(pixels, held_out)
        recall = share_near(held_out, pixels)
        print(
            f"epoch {epoch}/{EPOCHS}  D {means[0]:.3f}  G {means[1]:.3f}  "
            f"precision {precision:.2f} (real {goal[0]:.2f})  "
            f"recall {recall:.2f} (real {goal[1]:.2f})  {speed:,.0f} images/s",
            flush=True,
        )
        step = (epoch - 1) * steps
        for part in history.cpu().split(LOG_EVERY):
            step += len(part)
            for tag, value in zip(tags, part.mean(dim=0)):
                writer.add_scalar(tag, value, step)
        writer.add_scalar("quality/precision", precision, step)
        writer.add_scalar("quality/recall", recall, step)
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
        noise = torch.randn(64, NOISE_DIM).to(device)
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
            first, *rest = [Image.open(path) for path in paths]
            gif = SAMPLES / "epochs.gif"
            first.save(gif, append_images=rest, save_all=True, duration=100, loop=0)
        print(f"Drew pictures in {SAMPLES}.")
    elif not epochs:
        print(f"{epochs_done} epochs are done. See TRAIN, EPOCHS and TEST.")
