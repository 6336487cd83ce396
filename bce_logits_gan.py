"""Logits GAN: the game of vanilla_gan.py with a loss that stays exact, deeper networks of blocks, images in [0, 1].

There D ends in a sigmoid, and the loss takes its logarithm. On the way float32 loses the logit s, the sigmoid's input:
sigmoid(17) is 1, sigmoid(-200) is 0, BCELoss cuts log(0) off at -100, and the gradient is 0 just where the loss is
largest. Here D ends in s, and BCEWithLogitsLoss takes the larger exponent out of the log (log-sum-exp trick):

    -log sigmoid(s)  =  log(exp(0) + exp(-s))  =  max(0, -s) + log(1 + exp(-|s|))

Paper:   Generative Adversarial Networks, Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661
Run:     python bce_logits_gan.py, and to watch it, tensorboard --logdir runs
Expect:  digits after 5 epochs, most of them legible after 25; 50 epochs take 3 minutes on two CPU cores.
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
EPOCHS = 50  # passes over the training images; may be raised later to go on
BATCH_SIZE = 128  # real images a step, and as many generated ones; a step updates D, then G; BatchNorm needs 2
LEARNING_RATE = 3e-4  # Adam's step size, the same for both networks
BETAS = (0.0, 0.999)  # Adam's memory of gradients and their squares; 0.0: the opponent changes, old gradients mislead
NOISE_DIM = 64  # length of a noise vector z
HIDDEN_DIM = 64  # width of G's first and D's last block; G's others have 2, 4, 8 times as much, D's 2 and 4
SEED = config.SEED  # of weights, data order and noise; pictures have random numbers of their own
LOG_EVERY = 100  # steps averaged into one point of the curves drawn within an epoch


# ---- Data ------------------------------------------------------------------------------------------------------------
def load_images(train):
    """Return MNIST's 60,000 training or 10,000 test images, unpacked or downloaded if need be: uint8 (N, 28, 28)."""
    try:
        return datasets.MNIST(config.DATA_PATH, train=train, download=True).data
    except Exception as error:  # no network, no space, or a file that is not what its name says
        sys.exit(f"No MNIST ({type(error).__name__}): put its four .gz archives alone in {config.DATA_PATH}/MNIST/raw.")


def normalize(images):
    """Turn uint8 images (N, 28, 28) into what D is shown and G learns to imitate: float (N, 784) in [0, 1]."""
    return images.flatten(1) / 255


def to_pixels(images):
    """Undo normalize: images (N, 784) become pictures (N, 1, 28, 28) in [0, 1]."""
    return images.view(-1, 1, 28, 28)


# ---- Networks: shapes are for HIDDEN_DIM = 64 ------------------------------------------------------------------------
def get_gen_block(in_dim, out_dim):
    """Return a block of the generator, (N, in_dim) to (N, out_dim): to try another layer, change it here alone."""
    return nn.Sequential(nn.Linear(in_dim, out_dim), nn.BatchNorm1d(out_dim), nn.ReLU())


def get_disc_block(in_dim, out_dim):
    """Return a block of the discriminator, (N, in_dim) to (N, out_dim)."""
    return nn.Sequential(nn.Linear(in_dim, out_dim), nn.LeakyReLU(0.2))


class Generator(nn.Sequential):
    """Turn standard normal noise (N, noise_dim) into images (N, image_dim) in [0, 1]."""
    def __init__(self, noise_dim=NOISE_DIM, image_dim=28 * 28, hidden_dim=HIDDEN_DIM):
        super().__init__(
            get_gen_block(noise_dim, hidden_dim),  # (N, 64)
            get_gen_block(hidden_dim, hidden_dim * 2),  # (N, 128)
            get_gen_block(hidden_dim * 2, hidden_dim * 4),  # (N, 256)
            get_gen_block(hidden_dim * 4, hidden_dim * 8),  # (N, 512)
            nn.Linear(hidden_dim * 8, image_dim), nn.Sigmoid(),  # (N, 784)
        )


class Discriminator(nn.Sequential):
    """Turn images (N, image_dim) into logits (N, 1): above 0, D takes it for real; D(x) is the sigmoid."""
    def __init__(self, image_dim=28 * 28, hidden_dim=HIDDEN_DIM):
        super().__init__(
            get_disc_block(image_dim, hidden_dim * 4),  # (N, 256)
            get_disc_block(hidden_dim * 4, hidden_dim * 2),  # (N, 128)
            get_disc_block(hidden_dim * 2, hidden_dim),  # (N, 64)
            nn.Linear(hidden_dim, 1),  # (N, 1)
        )


# ---- Loss ------------------------------------------------------------------------------------------------------------
bce = nn.BCEWithLogitsLoss()  # mean of -log sigmoid(s) where the target is 1, of -log(1 - sigmoid(s)) where it is 0


def get_disc_loss(on_real, on_fake):
    """Return D's loss from its logits (N, 1). An image that it is wrong and sure about costs about |s|, one on which it
    guesses (s = 0) log 2 = 0.69. Near 0 D has won, and G learns little."""
    return (bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))) / 2


def get_gen_loss(on_fake):
    """Return G's loss from D's logits (N, 1) on generated images, which D should take for real."""
    return bce(on_fake, torch.ones_like(on_fake))


# ---- Looking at results ----------------------------------------------------------------------------------------------
@torch.no_grad()
def draw(generator, noise):
    """Turn noise (N, NOISE_DIM) into pictures (N, 1, 28, 28) in [0, 1]."""
    generator.eval()  # BatchNorm uses the statistics gathered in training: a picture depends on its own noise alone
    pixels = torch.cat([to_pixels(generator(part)) for part in noise.split(500)])  # 500 at a time: less memory
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
        for name, least in (("EPOCHS", 1), ("BATCH_SIZE", 2), ("NOISE_DIM", 1), ("HIDDEN_DIM", 1), ("LOG_EVERY", 1),
                            ("SEED", 0)):
            assert isinstance(settings[name], int) and settings[name] >= least, f"{name} must be an integer >= {least}"
        assert BATCH_SIZE <= len(images), f"BATCH_SIZE = {BATCH_SIZE} is more than the {len(images)} training images"
        for folder in (samples_path, checkpoint_path.parent, runs_path)[:3 if config.TRAIN else 1]:
            folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(SEED)
        generator, discriminator = Generator().to(device), Discriminator().to(device)
        generator_optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, BETAS, fused=True)  # quicker
        discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), LEARNING_RATE, BETAS, fused=True)
        settings |= {"Generator": repr(generator), "Discriminator": repr(discriminator)}  # Load refuses other layers
    except Exception as error:  # an impossible setting, a folder that cannot be made
        sys.exit(f"Cannot start: {error}. Mend it in this script or in config.py.")
    parts = {"generator": generator, "generator_optimizer": generator_optimizer,
             "discriminator": discriminator, "discriminator_optimizer": discriminator_optimizer}
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
        held_out = to_pixels(normalize(load_images(train=False)[::5][:len(images)].to(device)))  # 2,000, not trained on
        real_pixels = to_pixels(normalize(images[:len(held_out)]))
        real_distance = sliced_wasserstein(real_pixels, held_out)  # about what a perfect generator would reach
        noise = torch.randn(max(64, len(held_out)), NOISE_DIM, generator=torch.Generator().manual_seed(SEED)).to(device)
        steps = len(images) // BATCH_SIZE  # in an epoch; the few images left over have their turn in another epoch
        tags = "loss/discriminator", "loss/generator", "prob/real", "prob/fake"
        writer = SummaryWriter(runs_path, purge_step=done * steps + 1 if done else 0)  # hide what was left over
        writer.add_text("settings", "  \n".join(f"{key} = {value!r}" for key, value in settings.items()), done * steps)
        if done == 0:
            for tag, name, pixels in ("real", "real", real_pixels), ("fake", "epoch_0000", draw(generator, noise[:64])):
                utils.save_image(pixels[:64], samples_path / f"{name}.png")
                writer.add_images(f"images/{tag}", pixels[:64], 0)
        for epoch in range(done + 1, EPOCHS + 1):
            order = torch.randperm(len(images), device=device)[:steps * BATCH_SIZE].view(steps, BATCH_SIZE)
            history = torch.empty(steps, len(tags), device=device)  # on the device: reading it would wait for each step
            start = shown = time.perf_counter()
            for step, batch in enumerate(order, 1):
                real = normalize(images[batch])
                fake = generator(torch.randn(BATCH_SIZE, NOISE_DIM, device=device))

                # Discriminator: raise log D(x) + log(1 - D(G(z))), halved. detach() keeps its gradient out of G.
                on_real, on_fake = discriminator(torch.cat([real, fake.detach()])).chunk(2)
                disc_loss = get_disc_loss(on_real, on_fake)
                discriminator_optimizer.zero_grad()
                disc_loss.backward()
                discriminator_optimizer.step()

                # Generator: raise log D(G(z)), not lower log(1 - D(G(z))): steeper (non-saturating) for D(G(z)) near 0.
                discriminator.requires_grad_(False)  # frozen: D passes the gradient on to G, computes none of its own
                gen_loss = get_gen_loss(discriminator(fake))
                generator_optimizer.zero_grad()
                gen_loss.backward()
                generator_optimizer.step()
                discriminator.requires_grad_(True)

                probs = on_real.sigmoid().mean(), on_fake.sigmoid().mean()
                history[step - 1] = torch.stack([disc_loss, gen_loss, *probs]).detach()
                if time.perf_counter() - shown > 0.5 or step == steps:
                    means, shown = history[:step].mean(dim=0).tolist(), time.perf_counter()
                    speed = order[:step].numel() / (shown - start)
                    line = f"epoch {epoch}/{EPOCHS}  D {means[0]:.3f}  G {means[1]:.3f}  {speed:,.0f} images/s"
                    left = ((EPOCHS - epoch + 1) * steps / step - 1) * (shown - start) / 60
                    print(f"\r{line}  {step / steps:4.0%}  {left:.1f} min left " * live, end="", flush=True)
            pixels = draw(generator, noise)
            distance = sliced_wasserstein(pixels[:len(held_out)], held_out)
            print("\r" * live + f"{line}  distance {distance:.4f} (real {real_distance:.4f})", flush=True)
            if not all(x.isfinite().all() for x in (history, *generator.parameters(), *discriminator.parameters())):
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
