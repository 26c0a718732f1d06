"""The figure of one training. Imports little: a study draws it once a run."""

from io import BytesIO

import PIL.Image
from IPython.display import Image
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from samlib.runs import Run

STYLE = {"figure.dpi": 80, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
LOSSES = {"train_loss": "trained on, as augmented", "eval_train_loss": "training images", "test_loss": "test images"}
ACCURACIES = {
    "train_accuracy": "trained on, as augmented",
    "eval_train_accuracy": "training images",
    "test_accuracy": "test images",
    "memorized": "flipped labels memorized",
    "corrected": "flipped labels corrected",
}
