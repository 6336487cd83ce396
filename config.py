"""What the four scripts have in common: what a run does, and where its files go."""

from pathlib import Path

# What a run does
TRAIN = True  # train, from the checkpoint if LOAD finds one, else from scratch
LOAD = True  # start from the script's checkpoint if there is one; False starts over
TEST = False  # draw samples from random noise; without TRAIN it needs a checkpoint
SEED = 0  # one seed for the weights, the data order and the noise of training
DEVICE = None  # None takes the accelerator if there is one; or "cpu", "cuda:1", "mps"

# Where files go. The paths are relative to this file: a script runs from any folder.
ROOT = Path(__file__).parent
DATA_PATH = ROOT / "data"  # datasets
CALLBACKS_PATH = ROOT / "checkpoints"  # one checkpoint a script
TENSORBOARD_PATH = ROOT / "runs"  # curves and pictures: tensorboard --logdir runs
SAMPLES_PATH = ROOT / "samples"  # pictures
