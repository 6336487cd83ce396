"""What the scripts have in common: what a run does, its seed, and where its files go."""
from pathlib import Path

TRAIN = True  # train: from the checkpoint if LOAD finds one, else from scratch
LOAD = True  # start from the script's checkpoint if there is one; False starts over and overwrites it
TEST = False  # draw samples, interpolations and nearest training images; without TRAIN this needs LOAD and a checkpoint

SEED = 0  # one seed for weights, data order and noise

ROOT = Path(__file__).parent  # paths are relative to this file, so a script runs from any folder
DATA_PATH = ROOT / "data"  # datasets
CALLBACKS_PATH = ROOT / "checkpoints"  # one checkpoint a script
TENSORBOARD_PATH = ROOT / "runs"  # tensorboard --logdir runs
SAMPLES_PATH = ROOT / "samples"  # PNG grids
