"""One training, as its notebook shows it: a figure and a table. Imports little: a study draws it once a run."""

from io import BytesIO

import pandas as pd
import PIL.Image
from IPython.display import Image
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL.Image import Quantize

from samlib.runs import Run

STYLE = {"figure.dpi": 80, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
CHECKPOINTS = {1: "#0072B2", 2: "#56B4E9", 3: "#E69F00", 4: "#CC79A7"}  # Okabe-Ito, as in every figure
CURVES = {  # of a panel: the column of metrics.csv, its name
    "loss": {"train_loss": "training, during the epoch", "eval_train_loss": "training", "test_loss": "test"},
    "accuracy in %": {"train_accuracy": "training, during the epoch", "eval_train_accuracy": "training",
                      "test_accuracy": "test", "memorized": "flipped labels memorized",
                      "corrected": "flipped labels corrected"},
}  # fmt: skip


def training_curves(run: Run) -> Image:
    """Loss and accuracy by epoch, and the checkpoints' shares of all parameters where the run has probes.

    A PNG of 64 colours, a quarter of the usual size: a study keeps one a run.
    """
    metrics, probes = run.table("metrics"), run.table("probes")
    with rc_context(STYLE):
        panels = 2 + (len(probes) > 0)
        figure = Figure(figsize=(3.4 * panels, 3.1), layout="constrained")
        axes = figure.subplots(1, panels)
        for ax, (label, curves) in zip(axes, CURVES.items(), strict=False):
            for column, name in curves.items():
                if column in metrics and metrics[column].notna().any():
                    scale = 100 if "%" in label else 1
                    ax.plot(metrics.epoch, scale * metrics[column], lw=1.3, marker=".", markevery=0.05, label=name)
            ax.set(xlabel="epoch", ylabel=label)
        if len(probes):
            own = probes[probes.rho == run.config.rho]
            for k, color in CHECKPOINTS.items():
                epoch = own.step / run.summary["steps_per_epoch"]
                axes[2].plot(epoch, 100 * own[f"checkpoint{k}"], lw=1.0, color=color, label=f"checkpoint {k}")
            axes[2].set(xlabel="epoch", ylabel="share of the parameters in %", ylim=(0, None))
        for ax in axes:
            if ax.lines:
                ax.legend(frameon=False, fontsize=8)
        full, small = BytesIO(), BytesIO()
        figure.savefig(full)
    PIL.Image.open(full).convert("RGB").quantize(64, Quantize.FASTOCTREE).save(small, "PNG", optimize=True)
    return Image(small.getvalue(), format="png", alt=f"{run.id}, by epoch: {', '.join(ax.get_ylabel() for ax in axes)}")


def final_numbers(run: Run) -> pd.DataFrame:
    """Where the run ended, one row a number; of a run that diverged, where."""
    summary, probes = run.summary, run.table("probes")
    rows = {"status": summary["status"]}
    if summary["status"] == "diverged":
        rows["step of the first loss that was not finite"] = f"{summary['diverged_step']:,}"
    else:
        rows["test accuracy"] = f"{100 * summary['test_accuracy']:.2f} %"
        rows["training accuracy, on the labels trained on"] = f"{100 * summary['eval_train_accuracy']:.2f} %"
        for name in ("memorized", "corrected") if summary["flipped"] else ():
            rows[f"flipped labels {name}"] = f"{100 * summary[name]:.2f} % of {summary['flipped']:,}"
        last = probes[(probes.rho == run.config.rho) & (probes.epoch == probes.epoch.max())] if len(probes) else probes
        for k in CHECKPOINTS if len(last) else ():
            share = f"{100 * last[f'checkpoint{k}'].mean():.2f} %"
            rows[f"parameters in checkpoint {k}, mean of the last epoch"] = share
    rows["training images"], rows["test images"] = f"{summary['train_images']:,}", f"{summary['test_images']:,}"
    rows["steps"], rows["gradient evaluations"] = f"{summary['steps']:,}", f"{summary['gradient_evaluations']:,}"
    rows["seconds"], rows["on"] = f"{summary['seconds']:,.1f}", summary["device_name"]
    return pd.DataFrame({"value": rows}).rename_axis(index=run.id)
