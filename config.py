"""What the four scripts have in common: what a run does, and where its files go."""

from pathlib import Path

# What a run does
TRAIN = True  # train up to the script's EPOCHS
LOAD = True  # resume from the checkpoint, if any; False starts over and replaces it
TEST = False  # draw with the checkpoint's generator, after training if TRAIN is True
SEED = 0  # all random numbers follow from it; with TEST, it chooses the samples
DEVICE = None  # None trains on the accelerator, if any; or "cpu", "cuda:1", "mps"

# Where files go. The paths are relative to this file: a script runs from any folder.
ROOT = Path(__file__).parent
DATA_PATH = ROOT / "data"  # datasets
CALLBACKS_PATH = ROOT / "checkpoints"  # one checkpoint per script
TENSORBOARD_PATH = ROOT / "runs"  # curves and pictures: tensorboard --logdir runs
SAMPLES_PATH = ROOT / "samples"  # pictures
