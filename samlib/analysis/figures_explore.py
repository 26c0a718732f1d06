"""What 00_explore shows: SAM on a loss of two weights, any finished runs beside each other, and controls above both."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ipywidgets import HTML, VBox
from matplotlib.figure import Figure

from samlib.analysis import figures
from samlib.analysis.figures import look
from samlib.analysis.results import found_path, mix_order
from samlib.config import UserError
from samlib.probes import BINS, CHECKPOINTS, RATIO_EDGES
from samlib.runs import load_runs, load_table
from samlib.sam import SAM, checkpoint_codes

START, LR, STEPS = (-1.6, 2.0), 0.2, 60
CURVES = {  # of metrics.csv: how it is drawn
    "test_accuracy": {"label": "test accuracy", "color": "black"},
    "eval_train_accuracy": {"label": "training accuracy", "color": figures.GREY, "linestyle": "--"},
    "memorized": {"label": "flips memorized", "color": "#843C39", "linestyle": ":"},
}


def valley(w1: Any, w2: Any) -> Any:
    """L(w) = (w₂ − w₁²/2)² / 2 + (w₁ − 1)² / 20: a curved valley with its minimum, 0, at (1, 1/2)."""
    return (w2 - w1**2 / 2) ** 2 / 2 + (w1 - 1) ** 2 / 20


def path(rho: float) -> pd.DataFrame:
    """SAM on `valley` from START, a row a step: both weights before it, and the checkpoint of each."""
    w = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer, rows = SAM([w], lr=LR, rho=rho), []
    for _ in range(STEPS):
        here = w.tolist()
        valley(*w).backward()
        g = w.grad
        optimizer.first_step()
        valley(*w).backward()
        rows.append(here + checkpoint_codes(g, w.grad).tolist())
        optimizer.second_step()
        optimizer.zero_grad()
    return pd.DataFrame(rows, columns=["w1", "w2", "checkpoint_w1", "checkpoint_w2"])


def plane(rho: float) -> Figure:
    """The paths of SAM and SGD over the loss's contours, each step coloured by both weights' checkpoints."""
    sam, sgd = path(rho), path(0.0)
    figure, [[plan, by_step]] = figures.figure(1, 2, height=4.0, width_ratios=(3, 2))
    w1, w2 = np.meshgrid(np.linspace(-2.4, 1.4, 191), np.linspace(-0.3, 2.3, 131))
    plan.contour(w1, w2, valley(w1, w2), levels=np.geomspace(0.01, 8, 14), colors="#bbbbbb", linewidths=0.8)
    plan.plot(sgd.w1, sgd.w2, **look("sgd", marker="", label="SGD's path"))
    plan.plot(sam.w1, sam.w2, color=figures.GREY, linewidth=0.6)
    for weight, side, shift in (("w1", "left", -0.15), ("w2", "right", 0.15)):
        half = {"marker": "o", "fillstyle": side, "markerfacecoloralt": "none", "markersize": 9, "markeredgewidth": 0}
        for code in range(1, 5):
            at, style = sam[sam[f"checkpoint_{weight}"] == code], look(f"checkpoint{code}", linestyle="", **half)
            plan.plot(at.w1, at.w2, **style)
            by_step.plot(at.index, at[f"checkpoint_{weight}"] + shift, **style)
    plan.set(xlabel="w₁", ylabel="w₂")
    by_step.set(xlabel="step", ylabel="checkpoint", ylim=(4.5, 0.5), yticks=range(1, 5))
    plan.set_title(f"SAM at ρ = {rho:g}; left half: w₁, right half: w₂")
    figures.legend(figure, plan, columns=5)
    alt = f"SAM's path over a curved valley at ρ = {rho:g}, each step coloured by the checkpoints of the two weights"
    return figures.describe(figure, alt, f"{valley.__doc__.partition(':')[0]}; learning rate {LR:g}, {STEPS} steps")


def runs_below(root: str | Path) -> pd.DataFrame:
    """load_runs with the column `below`, that root; first those with the most probes, SGD before SAM."""
    runs = load_runs(found_path(root)).assign(below=found_path(root))
    if runs.empty:
        raise UserError(f"{root} holds no finished run; `make study` makes some in runs/local")
    probes = runs.steps // runs.probe_every.where(runs.probe_every > 0, np.inf)
    return runs.loc[sorted(runs.index, key=lambda name: (-probes[name], mix_order(runs.mix[name])))]


def beside(runs: pd.DataFrame, done: float, **names: str) -> Figure:
    """A row a run: its curves, and at its last probe before a share of its steps was done, at its own radius, its
    checkpoints by layer and the ratios in checkpoint 1; what it does not have is left empty. runs: of runs_below;
    names: of some of them."""
    figure, axes = figures.figure(len(names), 3, height=0.8 + 2.8 * len(names), width_ratios=(5, 6, 5))
    for (curves, by_layer, ratios), name in zip(axes, names.values(), strict=True):
        run = runs.loc[name]
        metrics, layers, probes = (load_table(table, run.below, [name]) for table in ("metrics", "layers", "probes"))
        for column, style in CURVES.items():
            if column in metrics and metrics[column].notna().any():
                curves.plot(metrics.step, 100 * metrics[column], **style)
        curves.axvline(done * run.steps, color=figures.GREY, linewidth=0.8)
        curves.set(xlabel="step", ylabel="%", ylim=(0, 103))
        curves.set_title(name)
        if probes.empty or layers.empty:
            for panel in (by_layer, ratios):
                panel.set(xticks=[], yticks=[], xlabel="not measured in this run")
            continue
        step, counted = (t.step[t.step <= done * run.steps].max() for t in (probes, layers))  # layers: once an epoch
        layers, probe = layers[layers.step == counted], probes[(probes.step == step) & (probes.rho == run.rho)].iloc[0]
        shares = 100 * layers[[*CHECKPOINTS[1:], CHECKPOINTS[0]]].div(layers.parameters, axis=0)
        for code, ends in shares.cumsum(axis=1).items():
            bar = {"color": look(code)["color"], "edgecolor": "white", "linewidth": 0.3, "label": look(code)["label"]}
            by_layer.barh(range(len(shares)), shares[code], left=ends - shares[code], height=0.9, **bar)
        every = -(-len(shares) // 16)
        by_layer.set(ylim=(len(shares) - 0.5, -0.5), xlim=(0, 100), xlabel=f"% of a layer's parameters, step {counted}")
        by_layer.set_yticks(range(0, len(shares), every), layers.layer.iloc[::every])
        edges = [f"from {edge:g}" for edge in (1, *RATIO_EDGES)]
        ratios.bar(edges, 100 * probe[list(BINS)].astype(float) / probe.checkpoint1, color=look("checkpoint1")["color"])
        ratios.tick_params("x", rotation=45)
        ratios.set(xlabel="|g'| / |g|", ylabel="% of checkpoint 1")
        ratios.set_title(f"step {step}")
    figures.legend(figure, columns=4)
    about = f"Accuracies, checkpoints by layer and ratios after {done:.0%} of the steps: {' and '.join(names.values())}"
    return figures.describe(figure, about)


class Explorer(VBox):
    """Controls above the figure that a function draws of their values; where there is no kernel, the figure alone."""

    def __init__(self, draw: Callable[..., Figure], **controls: Any) -> None:
        self.draw, self.controls, self.page = draw, controls, HTML()
        super().__init__([*controls.values(), self.page])
        for control in controls.values():
            control.observe(self.redraw, "value")
        self.redraw()

    def redraw(self, change: Any = None) -> None:
        picture = figures.show(self.draw(**{name: control.value for name, control in self.controls.items()}))
        self.data, self.about = picture._repr_mimebundle_()
        source = f"data:image/png;base64,{self.data['image/png']}"
        self.page.value = f'<img src="{source}" width="{picture.width}" alt="{escape(picture.alt)}">'

    def _repr_mimebundle_(self, **options: Any) -> tuple[dict, dict]:
        return super()._repr_mimebundle_(**options) | self.data, self.about
