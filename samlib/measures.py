"""What a run measures after an epoch: a registry of tables, each with the field that says how often, and its function.

To add a measure: a function of a `Moment` that returns rows, an entry in MEASURES, and, for a new interval, a field of
`RunConfig` and for a new table a name in `samlib.runs.TABLES`. The training loop names none of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from samlib import probes
from samlib.config import RunConfig
from samlib.data import Batches, Data, generator
from samlib.sharpness import gauss_newton_diagonal, hessian_rows, sharpness_rows

TRACE_SAMPLES = 16  # Hessian-vector products for the trace
NOISE_BATCHES = 4  # batches that the noise probe adds up
CONVERGENCE_BATCHES = 64  # at least, of the whole training set
Rows = list[dict[str, Any]]


@dataclass
class Moment:
    """The weights after an epoch, and what they are measured on: what concerns a step's gradients on batches of that
    epoch, what concerns the loss on a fixed sample without augmentation."""

    config: RunConfig
    model: nn.Module
    data: Data
    batches: Batches
    plan: list[tuple[Tensor, ...]]  # of the epoch that has ended
    momentum: list[Tensor]  # a buffer a parameter
    lr: float

    @cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """The epoch's first batch."""
        return self.batches.assemble(*self.plan[0])

    @cached_property
    def rows(self) -> Tensor:
        """The fixed sample's rows of the training set (samples,)."""
        images = self.data.images
        order = torch.randperm(len(images), generator=generator("sample", self.config.subset_seed))
        return order[: self.config.measure_samples].to(images.device)

    @cached_property
    def sample(self) -> tuple[Tensor, Tensor]:
        """The fixed sample: images (samples, channels, height, width) and labels as trained on (samples,)."""
        return self.data.normalized(self.data.images[self.rows]), self.data.labels[self.rows]

    @cached_property
    def sample_pair(self) -> probes.GradientPair:
        return probes.gradient_pair(self.model, *self.sample, self.config.rho)


def thresholds(moment: Moment) -> Rows:
    return [probes.threshold_row(probes.gradient_pair(moment.model, *moment.batch, moment.config.rho))]


def noise(moment: Moment) -> Rows:
    plans = moment.plan[:NOISE_BATCHES]
    batches = [(*moment.batches.assemble(*plan), moment.data.flipped[plan[0]]) for plan in plans]
    return probes.noise_rows(moment.model, batches, moment.config.rho)


def sharpness(moment: Moment) -> Rows:
    x, y = moment.sample
    labels = {"trained": y} | ({"true": moment.data.true_labels[moment.rows]} if moment.config.noise_fraction else {})
    with probes.full_precision():
        return sharpness_rows(moment.model, x, labels, moment.config.radii, moment.config.subset_seed)


def scan(moment: Moment) -> Rows:
    return probes.scan_rows(moment.model, *moment.batch, moment.config.scan_rhos)


def prediction(moment: Moment) -> Rows:
    return probes.prediction_rows(moment.model, *moment.batch, moment.config.scan_rhos)


def hessian(moment: Moment) -> Rows:
    with probes.full_precision():
        return hessian_rows(moment.model, *moment.sample, TRACE_SAMPLES, moment.config.subset_seed)


def diagonal(moment: Moment) -> Rows:
    with probes.full_precision():
        exact = gauss_newton_diagonal(moment.model, moment.sample[0])
    rows, correlation = probes.diagonal_rows(moment.sample_pair, exact)
    return [row | {"spearman": correlation} for row in rows]


def convergence(moment: Moment) -> Rows:
    config, data, n = moment.config, moment.data, len(moment.data.images)
    order = torch.randperm(n, generator=generator("convergence", config.subset_seed)).to(data.images.device)
    pieces = max(min(CONVERGENCE_BATCHES, n // 2), -(-n // config.batch_size))  # of two images at least
    batches = [(data.normalized(data.images[rows]), data.labels[rows]) for rows in order.tensor_split(pieces)]
    updates = [moment.lr * t for t in moment.momentum]
    rows = probes.convergence_rows(
        moment.model, batches, moment.sample_pair, updates, config.weight_decay, moment.batches.steps
    )
    return [{"lr": moment.lr} | row for row in rows]


@dataclass(frozen=True)
class Measure:
    table: str
    every: str  # the field of RunConfig that says after how many epochs
    rows: Callable[[Moment], Rows]


MEASURES = (
    Measure("thresholds", "threshold_every", thresholds),
    Measure("noise", "noise_every", noise),
    Measure("sharpness", "sharpness_every", sharpness),
    Measure("scan", "scan_every", scan),
    Measure("prediction", "curvature_every", prediction),
    Measure("hessian", "curvature_every", hessian),
    Measure("diagonal", "curvature_every", diagonal),
    Measure("convergence", "convergence_every", convergence),
)


def measured(moment: Moment, epochs_done: int) -> Iterator[tuple[str, Rows]]:
    """The tables that are due after this many epochs, with their rows."""
    for measure in MEASURES:
        if moment.config.due(getattr(moment.config, measure.every), epochs_done):
            yield measure.table, [{"epoch": epochs_done} | row for row in measure.rows(moment)]


class StepProbes:
    """The probes of single steps, before their update, on their batch; under every mix with two passes of their own."""

    def __init__(self, config: RunConfig, model: nn.Module, batches: Batches) -> None:
        self.config, self.model, self.batches = config, model, batches
        layers = [p.numel() for p in model.parameters()]
        self.persistence = probes.Persistence(
            config.persistence_steps, config.persistence_lags, config.persistence_window, layers
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The images and labels of any step of the run: they follow from the seed and its number."""
        epoch, within = divmod(step, self.batches.steps)
        return self.batches.assemble(*self.batches.epoch(epoch)[within])

    def tables(self, step: int, x: Tensor, y: Tensor, lr: float) -> Iterator[tuple[str, Rows]]:
        """The rows of one step, by table, probed on its batch; none where it is not to be probed."""
        config, model = self.config, self.model
        if not config.probe_every or (step % config.probe_every and not self.persistence.wants(step)):
            return
        epoch, within = divmod(step, self.batches.steps)
        pairs = [probes.gradient_pair(model, x, y, rho) for rho in config.radii]
        for rho, pair in zip(config.radii, pairs, strict=True):
            row, layers = probes.probe_rows(pair, model)
            yield "probes", [{"step": step, "epoch": epoch, "lr": lr, "rho": rho} | row]
            if rho == config.rho and within < config.probe_every and not step % config.probe_every:  # once an epoch
                yield "layers", [{"step": step, "epoch": epoch} | layer for layer in layers]
        if config.persistence_steps:

            def again(reference: int) -> Tensor:
                return probes.gradient_pair(model, *self.batch(reference), config.rho).codes

            overlaps, intersections = self.persistence.rows(step, pairs[0].codes, again)
            yield "overlaps", overlaps
            yield "intersections", intersections
