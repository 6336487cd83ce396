"""DCGAN with Wasserstein loss and gradient penalty: colour pictures, and a curve that falls as they get better.

Where a discriminator D is sure, log(1 - D(G(z))) is flat; to raise log D(G(z)) instead, as the scripts before do, gives
generator G unstable gradients (Arjovsky and Bottou 2017). A critic C answers with any number. It is trained to raise

    mean of C(x) over real x  -  mean of C(G(z)) over noise z

with its slope, the norm of its gradient in x, at most 1. The most it can reach is the Wasserstein or earth mover's
distance: how far, on average, generated images must at least be moved to become real. It has a slope for G even where
the two do not overlap. WGAN clips C's weights to [-0.01, 0.01]: too simple a C. WGAN-GP penalizes slopes other than 1.

Papers:  DCGAN arxiv.org/abs/1511.06434, WGAN arxiv.org/abs/1701.07875, WGAN-GP arxiv.org/abs/1704.00028 (algorithm 1)
Run:     python dcgan_wgan_gp.py, and to watch it, tensorboard --logdir runs
Expect:  colours after 2 epochs, rough shapes after 5; 6 minutes an epoch on two CPU cores at FEATURES = 16, 48 at 64.
"""
import signal
import sys
import time
import zipfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, utils

import config

# ---- Settings: edit a line to experiment, or copy the script and edit the copy ---------------------------------------
NAME = Path(__file__).stem  # names the checkpoint, the samples and the TensorBoard run, so a copy keeps its own
DATASET = "cifar10"  # or "mnist", which comes with the project
EPOCHS = 5  # of data set size / BATCH_SIZE generator steps; may be raised later to go on
BATCH_SIZE = 64  # real images a critic step, and as many generated ones
CRITIC_STEPS = 5  # before each generator step: G learns from a critic that has nearly caught up with it
PENALTY_WEIGHT = 10  # lambda in WGAN-GP
LEARNING_RATE = 5e-5  # Adam's step size, the same for both networks; WGAN-GP has 1e-4
BETAS = (0.0, 0.9)  # Adam's memory of gradients and their squares, as in WGAN-GP; 0.0: old gradients mislead
NOISE_DIM = 100  # channels of the noise z
FEATURES = 64  # channels at 32x32, 64 as in DCGAN's code; deeper layers have 2, 4 and 8 times as many; on a CPU try 16
CHANNELS = 1 if DATASET == "mnist" else 3  # 1: grey; 3: red, green and blue
SEED = config.SEED  # of weights, data order and noise; pictures have random numbers of their own
LOG_EVERY = 100  # steps averaged into one point of the curves drawn within an epoch


# ---- Data ------------------------------------------------------------------------------------------------------------
def load_images(train):
    """Return the first 96 % of DATASET's training images, or the rest, held out: uint8 (N, CHANNELS, size, size)."""
    try:
        data = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST}[DATASET](config.DATA_PATH, download=True).data
        data = data.unsqueeze(1) if DATASET == "mnist" else torch.from_numpy(data).permute(0, 3, 1, 2)
        return data[:len(data) * 24 // 25] if train else data[len(data) * 24 // 25:]
    except Exception as error:  # no network, no space, or a file that is not what its name says
        sys.exit(f'No {DATASET} ({type(error).__name__}). Offline: DATASET = "mnist", in {config.DATA_PATH}/MNIST/raw.')


def normalize(images):
    """Turn uint8 images (N, CHANNELS, size, size) into what C is shown: float (N, CHANNELS, 64, 64) in [-1, 1]."""
    return nn.functional.interpolate(images.float(), size=64, mode="bilinear") / 127.5 - 1


def to_pixels(images):
    """Undo normalize, but for the size: images (N, CHANNELS, 64, 64) become pictures in [0, 1]."""
    return images / 2 + 0.5


# ---- Networks: 4, 2, 1 (kernel 4x4, stride 2, padding 1) doubles or halves; shapes are for FEATURES = 64 -------------
class Generator(nn.Sequential):
    """Turn standard normal noise (N, NOISE_DIM, 1, 1) into images (N, CHANNELS, 64, 64) in [-1, 1]."""
    def __init__(self, f=FEATURES):
        super().__init__(
            nn.ConvTranspose2d(NOISE_DIM, f * 8, 4, bias=False), nn.BatchNorm2d(f * 8), nn.ReLU(),  # (N, 512, 4, 4)
            nn.ConvTranspose2d(f * 8, f * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(f * 4), nn.ReLU(),  # (N, 256, 8, 8)
            nn.ConvTranspose2d(f * 4, f * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(f * 2), nn.ReLU(),  # (N, 128, 16, 16)
            nn.ConvTranspose2d(f * 2, f, 4, 2, 1, bias=False), nn.BatchNorm2d(f), nn.ReLU(),  # (N, 64, 32, 32)
            nn.ConvTranspose2d(f, CHANNELS, 4, 2, 1), nn.Tanh(),  # (N, CHANNELS, 64, 64)
        )


class Critic(nn.Sequential):
    """Turn images (N, CHANNELS, 64, 64) into scores (N, 1, 1, 1). No BatchNorm: the penalty is on each image alone."""
    def __init__(self, f=FEATURES):
        super().__init__(
            nn.Conv2d(CHANNELS, f, 4, 2, 1), nn.LeakyReLU(0.2),  # (N, 64, 32, 32)
            nn.Conv2d(f, f * 2, 4, 2, 1, bias=False),  # (N, 128, 16, 16)
            nn.InstanceNorm2d(f * 2, affine=True), nn.LeakyReLU(0.2),  # InstanceNorm: each image by itself
            nn.Conv2d(f * 2, f * 4, 4, 2, 1, bias=False),  # (N, 256, 8, 8)
            nn.InstanceNorm2d(f * 4, affine=True), nn.LeakyReLU(0.2),
            nn.Conv2d(f * 4, f * 8, 4, 2, 1, bias=False),  # (N, 512, 4, 4)
            nn.InstanceNorm2d(f * 8, affine=True), nn.LeakyReLU(0.2), nn.Conv2d(f * 8, 1, 4),  # (N, 1, 1, 1)
        )


# ---- Loss ------------------------------------------------------------------------------------------------------------
def gradient_penalty(critic, real, fake):
    """Return PENALTY_WEIGHT times the mean of (|gradient of C| - 1)^2, and the mean |gradient|, at random places
    between real and fake images (N, CHANNELS, 64, 64): on the best way from fake to real the best C has slope 1."""
    share = torch.rand(len(real), 1, 1, 1, device=real.device)  # epsilon in WGAN-GP, one an image
    mixed = (share * real + (1 - share) * fake).requires_grad_()
    gradient, = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)  # each image's own; differentiable
    norm = (gradient.flatten(1).pow(2).sum(dim=1) + 1e-12).sqrt()  # (N,); the root of 0 has no finite slope
    return PENALTY_WEIGHT * (norm - 1).pow(2).mean(), norm.mean()


# ---- Looking at results ----------------------------------------------------------------------------------------------
@torch.no_grad()
def draw(generator, noise):
    """Turn noise (N, NOISE_DIM) into pictures (N, CHANNELS, 64, 64) in [0, 1]."""
    generator.eval()  # BatchNorm uses the statistics gathered in training: a picture depends on its own noise alone
    pixels = torch.cat([to_pixels(generator(part[..., None, None])) for part in noise.split(500)])  # 500: less memory
    generator.train()
    return pixels


def sliced_wasserstein(a, b):
    """Return how far apart two equally large sets (N, C, H, W) are (sliced Wasserstein, after Rabin et al. 2011):
    project both on a direction, sort, average |a - b| by rank, then over 256 random directions, always the same."""
    directions = torch.randn(a[0].numel(), 256, generator=torch.Generator().manual_seed(0))
    directions = nn.functional.normalize(directions, dim=0).to(a.device)  # of length 1
    a, b = ((pixels.flatten(1) @ directions).sort(dim=0).values for pixels in (a, b))  # (N, 256)
    return (a - b).abs().mean().item()


if __name__ == "__main__":
    # ---- Device and set-up -------------------------------------------------------------------------------------------
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    live = sys.stdout.isatty()  # text * live is for a terminal alone, where a line changes within the epoch
    signal.signal(signal.SIGINT, lambda *_: sys.exit("\n" * live + "Stopped. Run again with LOAD = True to go on."))
    settings = {key: value if isinstance(value, (int, float, str, tuple)) else repr(value)  # plain: loads safely
                for key, value in globals().items() if key.isupper()}
    checkpoint_path = Path(config.CALLBACKS_PATH, f"{NAME}.pt")
    samples_path, runs_path = Path(config.SAMPLES_PATH, NAME), Path(config.TENSORBOARD_PATH, NAME)
    try:
        assert config.TRAIN or config.TEST and config.LOAD and checkpoint_path.exists(), "TRAIN first, or LOAD and TEST"
        images = load_images(train=True).to(device)  # they stay there: training reads no file
        for name, least in (("EPOCHS", 1), ("BATCH_SIZE", 2), ("CRITIC_STEPS", 1), ("NOISE_DIM", 1), ("FEATURES", 1),
                            ("LOG_EVERY", 1), ("SEED", 0)):
            assert isinstance(settings[name], int) and settings[name] >= least, f"{name} must be an integer >= {least}"
        assert BATCH_SIZE <= len(images), f"BATCH_SIZE = {BATCH_SIZE} is more than the {len(images)} training images"
        for folder in (samples_path, checkpoint_path.parent, runs_path)[:3 if config.TRAIN else 1]:
            folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        generator, critic = Generator().to(device), Critic().to(device)
        generator_optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)  # quicker
        critic_optimizer = torch.optim.Adam(critic.parameters(), LEARNING_RATE, BETAS, fused=True)
        settings |= {"Generator": repr(generator), "Critic": repr(critic)}  # Load refuses other layers
    except Exception as error:  # an impossible setting, a folder that cannot be made
        sys.exit(f"Cannot start: {error}. Mend it in this script or in config.py.")
    parts = {"generator": generator, "generator_optimizer": generator_optimizer,
             "critic": critic, "critic_optimizer": critic_optimizer}
    rng = torch if device.type == "cpu" else torch.get_device_module(device)  # holds the random state
    done = 0  # complete epochs

    # ---- Load --------------------------------------------------------------------------------------------------------
    if config.LOAD and checkpoint_path.exists():
        try:
            assert zipfile.ZipFile(checkpoint_path).testzip() is None, "damaged"
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)  # plain data: runs no code
            for name in settings | checkpoint["settings"]:
                now, then = settings.get(name), checkpoint["settings"].get(name)
                if now != then and not (name == "EPOCHS" and now > then):
                    sys.exit(f"{name} = {now!r:.50} but {then!r:.50} in {checkpoint_path}: undo it, or LOAD = False.")
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            rng.set_rng_state(checkpoint["random_state"].get(device.type, rng.get_rng_state()))  # not another device's
            done = checkpoint["epoch"]
        except Exception as error:  # damaged, foreign or malicious
            sys.exit(f"{checkpoint_path} does not fit ({error!r:.120}): move it away, or LOAD = False to start over.")

    # ---- Train -------------------------------------------------------------------------------------------------------
    if config.TRAIN and done == EPOCHS:
        print(f"{NAME}: all {EPOCHS} epochs are done. To train on raise EPOCHS, to draw set TEST = True in config.py.")
    elif config.TRAIN:
        print(f"Epochs {done + 1} to {EPOCHS} on {device}. Pictures: {samples_path}. Curves: {runs_path}.", flush=True)
        held_out = to_pixels(normalize(load_images(train=False).to(device)))  # 2,000 of CIFAR-10's, not trained on
        real_pixels = to_pixels(normalize(images[:len(held_out)]))
        real_distance = sliced_wasserstein(real_pixels, held_out)  # about what a perfect generator would reach
        noise = torch.randn(max(64, len(held_out)), NOISE_DIM, generator=torch.Generator().manual_seed(SEED)).to(device)
        steps = (len(images) + len(held_out)) // BATCH_SIZE  # generator steps in an epoch, 781 for CIFAR-10's 50,000
        tags = ("loss/critic", "loss/generator", "critic/wasserstein_distance", "critic/gradient_norm",
                "critic/gradient_penalty")
        writer = SummaryWriter(runs_path, purge_step=done * steps + 1 if done else 0)  # hide what was left over
        writer.add_text("settings", "  \n".join(f"{key} = {value!r}" for key, value in settings.items()), done * steps)
        if done == 0:
            for tag, name, pixels in ("real", "real", real_pixels), ("fake", "epoch_0000", draw(generator, noise[:64])):
                utils.save_image(pixels[:64], samples_path / f"{name}.png")
                writer.add_images(f"images/{tag}", pixels[:64], 0)
        for epoch in range(done + 1, EPOCHS + 1):
            order = torch.randint(len(images), (steps, CRITIC_STEPS, BATCH_SIZE), device=device)  # with repeats
            history = torch.empty(steps, len(tags), device=device)  # on the device: reading it would wait for each step
            start = shown = time.perf_counter()
            for step, batches in enumerate(order, 1):
                # Critic: raise mean C(x) - mean C(G(z)), less the penalty. detach() keeps its gradient out of G.
                for batch in batches:
                    real = normalize(images[batch])
                    fake = generator(torch.randn(BATCH_SIZE, NOISE_DIM, 1, 1, device=device)).detach()
                    on_real, on_fake = critic(torch.cat([real, fake])).chunk(2)
                    wasserstein = on_real.mean() - on_fake.mean()
                    penalty, norm = gradient_penalty(critic, real, fake)
                    critic_loss = penalty - wasserstein
                    critic_optimizer.zero_grad()
                    critic_loss.backward()
                    critic_optimizer.step()

                # Generator: raise mean C(G(z)).
                critic.requires_grad_(False)  # frozen: C passes the gradient on to G, computes none of its own
                gen_loss = -critic(generator(torch.randn(BATCH_SIZE, NOISE_DIM, 1, 1, device=device))).mean()
                generator_optimizer.zero_grad()
                gen_loss.backward()
                generator_optimizer.step()
                critic.requires_grad_(True)

                history[step - 1] = torch.stack([critic_loss, gen_loss, wasserstein, norm, penalty]).detach()
                if time.perf_counter() - shown > 0.5 or step == steps:
                    means, shown = history[:step].mean(dim=0).tolist(), time.perf_counter()
                    speed = order[:step].numel() / (shown - start)
                    line = f"epoch {epoch}/{EPOCHS}  C {means[0]:.3f}  G {means[1]:.3f}  {speed:,.0f} images/s"
                    left = ((EPOCHS - epoch + 1) * steps / step - 1) * (shown - start) / 60
                    print(f"\r{line}  {step / steps:4.0%}  {left:.1f} min left " * live, end="", flush=True)
            pixels = draw(generator, noise)
            distance = sliced_wasserstein(pixels[:len(held_out)], held_out)
            print("\r" * live + f"{line}  distance {distance:.4f} (real {real_distance:.4f})", flush=True)
            if not all(x.isfinite().all() for x in (history, *generator.parameters(), *critic.parameters())):
                sys.exit("Not saved: loss or weights are not finite. Lower LEARNING_RATE and set LOAD = False.")
            for i, values in enumerate(history.cpu().split(LOG_EVERY), 1):
                for tag, value in zip(tags, values.mean(dim=0)):
                    writer.add_scalar(tag, value, (epoch - 1) * steps + min(i * LOG_EVERY, steps))
            writer.add_scalar("quality/sliced_wasserstein", distance, epoch * steps)
            writer.add_scalar("speed/images_per_second", speed, epoch * steps)
            writer.add_images("images/fake", pixels[:64], epoch * steps)
            writer.flush()  # before the checkpoint, so that a kill in between leaves no gap in the curves
            utils.save_image(pixels[:64], samples_path / f"epoch_{epoch:04}.png")
            checkpoint = {"epoch": epoch, "settings": settings, "random_state": {device.type: rng.get_rng_state()}}
            checkpoint |= {name: part.state_dict() for name, part in parts.items()}
            torch.save(checkpoint, checkpoint_path.with_suffix(".tmp"))
            checkpoint_path.with_suffix(".tmp").replace(checkpoint_path)  # whole or not at all, whenever it is killed

    # ---- Test --------------------------------------------------------------------------------------------------------
    if config.TEST:
        noise = torch.randn(64, NOISE_DIM, generator=torch.Generator().manual_seed(SEED + 1)).to(device)
        samples = draw(generator, noise)
        # Is latent (noise) space smooth? Each row walks from one noise vector to another; cos, sin keep the variance.
        angle = torch.linspace(0, torch.pi / 2, 10, device=device).view(1, 10, 1)
        walks = noise[:8, None] * angle.cos() + noise[8:16, None] * angle.sin()  # (8, 10, NOISE_DIM)
        # Does it copy? To the right of each sample stands the training image nearest to it in pixel space.
        distances = [torch.cdist(samples.flatten(1), to_pixels(normalize(i)).flatten(1)) for i in images.split(5000)]
        nearest = to_pixels(normalize(images[torch.cat(distances, dim=1).argmin(dim=1)]))
        utils.save_image(samples, samples_path / "test.png")
        utils.save_image(draw(generator, walks.flatten(0, 1)), samples_path / "interpolation.png", nrow=10)
        utils.save_image(torch.stack([samples, nearest], dim=1).flatten(0, 1), samples_path / "nearest.png", nrow=16)
        print(f"{NAME}: drew test.png, interpolation.png and nearest.png in {samples_path}")
