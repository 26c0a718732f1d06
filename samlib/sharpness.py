"""How sharp the loss is at the weights: random-direction and ascent sharpness, Hessian eigenvalues, trace, diagonal.

Everything is measured in evaluation mode, on the mean cross entropy of one fixed sample: x (images, channels, height,
width) floating point, y (images,) int64, on the model's device. In training mode the numbers differ, since BatchNorm
then couples the images of a batch. Frozen parameters (requires_grad False) stay put: they are neither perturbed nor
part of the Hessian. The weights come back bit for bit, also when something raises; gradients (.grad), BatchNorm's
running statistics and the global random generators are not touched.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from samlib.models import mode, weights_restored

CHUNK = 512  # images a pass
HESSIAN_CHUNK = 128  # images a Hessian-vector product: fastest on a CPU, and a quarter of the memory
SCALE = 0.05  # of a random direction's norm, per tensor
TOLERANCE = 1e-3  # of an eigenvector: its residual as a share of its eigenvalue


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def losses(model: nn.Module, x: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Mean cross entropy in nats under each of the labels, from one pass; summed in float64."""
    total = dict.fromkeys(labels, 0.0)
    with mode(model, training=False):
        for start in range(0, len(x), CHUNK):
            logits = model(x[start : start + CHUNK]).double()  # (chunk, classes)
            for name, y in labels.items():
                total[name] += functional.cross_entropy(logits, y[start : start + CHUNK], reduction="sum").item()
    return {name: value / len(x) for name, value in total.items()}


def loss_value(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """L(w): mean cross entropy in nats."""
    return losses(model, x, {"": y})[""]


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradient of L for every trainable parameter, in their shapes; zero where L does not depend on it."""
    params = _trainable(model)
    gradient = [torch.zeros_like(p) for p in params]
    if not params:
        return gradient
    with mode(model, training=False), torch.enable_grad():
        for x_chunk, y_chunk in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            loss = functional.cross_entropy(model(x_chunk), y_chunk, reduction="sum") / len(x)
            torch._foreach_add_(gradient, torch.autograd.grad(loss, params, materialize_grads=True))
    return gradient


def _random_differences(
    model: nn.Module, x: Tensor, labels: dict[str, Tensor], scale: float, draws: int, seed: int
) -> dict[str, dict[str, float]]:
    if draws < 2:
        raise ValueError(f"draws is {draws}: a spread needs at least 2")
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same directions on every device
    before = losses(model, x, labels)
    differences: dict[str, list[float]] = {name: [] for name in labels}
    with weights_restored(_trainable(model)) as weights:
        for _ in range(draws):
            with torch.no_grad():
                for p, w in zip(_trainable(model), weights, strict=True):
                    d = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
                    p.copy_(w + d * (scale * w.norm() / d.norm()))
            for name, value in losses(model, x, labels).items():
                differences[name].append(value - before[name])
    return {
        name: {"value": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "n": draws}
        for name, values in differences.items()
    }


def random_direction_sharpness(
    model: nn.Module, x: Tensor, y: Tensor, scale: float = SCALE, draws: int = 10, seed: int = 0
) -> dict[str, float]:
    """Mean over draws of L(w + d) - L(w) in nats: value, std (of the draws, with n - 1) and n.

    d is Gaussian, scaled tensor by tensor to `scale` of that tensor's norm. To second order the expected value is
    1/2 sum_t (scale ||w_t||)^2 tr(H_tt) / size_t. Raises ValueError for fewer than two draws.
    """
    return _random_differences(model, x, {"": y}, scale, draws, seed)[""]


def ascent_sharpness(model: nn.Module, x: Tensor, y: Tensor, rho: float) -> float:
    """L(w + rho g / ||g||) - L(w) in nats, g = loss_gradient (Foret et al., 2021); 0 where g is zero."""
    params, g = _trainable(model), loss_gradient(model, x, y)
    norm = math.sqrt(sum(torch.linalg.vector_norm(t, dtype=torch.float64).item() ** 2 for t in g))
    if norm == 0:
        return 0.0
    before = loss_value(model, x, y)
    with weights_restored(params):
        with torch.no_grad():
            torch._foreach_add_(params, g, alpha=rho / norm)
        return loss_value(model, x, y) - before


def sharpness_rows(
    model: nn.Module, x: Tensor, labels: dict[str, Tensor], rho: float, seed: int
) -> list[dict[str, Any]]:
    """Rows of the sharpness table, less the epoch, for both measures and every labels of x, say trained and true.

    measure, labels, setting (scale or rho), value, std (over draws; NaN for the ascent, which is one value) and n.
    """
    rows = []
    for name, result in _random_differences(model, x, labels, SCALE, 10, seed).items():
        rows.append({"measure": "random", "labels": name, "setting": SCALE, **result})
    for name, y in labels.items():
        value = ascent_sharpness(model, x, y, rho)
        rows.append({"measure": "ascent", "labels": name, "setting": rho, "value": value, "std": math.nan, "n": 1})
    return rows


def _hessian(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """curvlinops' operator for the Hessian of L; multiply with it in evaluation mode only."""
    from curvlinops import HessianLinearOperator  # here, since importing it takes seconds

    params = _trainable(model)
    if not params:
        raise ValueError("the model has no trainable parameter: its Hessian is empty")
    data = list(zip(x.split(HESSIAN_CHUNK), y.split(HESSIAN_CHUNK), strict=True))
    return HessianLinearOperator(
        model, nn.CrossEntropyLoss(), params, data, num_data=len(x), check_deterministic=False
    )  # the check costs two more passes and products, and nothing here is random


def hessian_eigenvalues(model: nn.Module, x: Tensor, y: Tensor, k: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The k largest (algebraic) eigenvalues of the Hessian of L, descending, and their residuals ||H v - lambda v||.

    Both have shape (k,), in float64, v of norm 1: an eigenvalue lies within the residual of each value. By Lanczos
    (scipy's eigsh), from a fixed start. Both are NaN for one that did not converge, or a Hessian that is not finite.
    Raises ValueError unless 1 <= k < number of trainable parameters.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    with mode(model, training=False):
        operator = _hessian(model, x, y)
        if not 1 <= k < operator.shape[0]:
            raise ValueError(f"k is {k}: it must be from 1 to {operator.shape[0] - 1}, below the number of parameters")
        dtype = next(iter(_trainable(model))).detach().cpu().numpy().dtype
        linear = operator.to_scipy(dtype)  # in the parameters' precision: half the memory in float32
        start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(dtype)
        size = float(np.linalg.norm(linear @ start))
        if size == 0 or not math.isfinite(size):  # a zero Hessian, or none: ARPACK takes neither
            return np.full(k, size * 0), np.full(k, size * 0)
        try:
            values, vectors = eigsh(linear, k, which="LA", v0=start, tol=TOLERANCE, maxiter=10)  # at most ~200 products
        except ArpackNoConvergence as error:
            values, vectors = error.eigenvalues, error.eigenvectors
        order = np.argsort(values)[::-1]
        result = np.full((2, k), math.nan)
        for i, j in enumerate(order):
            v = vectors[:, j].astype(np.float64)
            hv = (linear @ vectors[:, j]).astype(np.float64)
            result[:, i] = values[j], np.linalg.norm(hv - float(values[j]) * v) / np.linalg.norm(v)
    return result[0], result[1]


@dataclass(frozen=True)
class DiagonalEstimate:
    """The Hessian's diagonal and trace by Hutchinson's estimator, each with its standard error."""

    mean: list[Tensor]  # in the shapes of the trainable parameters
    standard_error: list[Tensor]  # of each element of the mean, from the spread over samples
    trace: float
    trace_standard_error: float
    samples: int  # Rademacher vectors


def hessian_diagonal(model: nn.Module, x: Tensor, y: Tensor, samples: int, seed: int) -> DiagonalEstimate:
    """E[z * Hz] over Rademacher vectors z (Hutchinson, 1989; Bekas et al., 2007); the trace from the same vectors.

    The variances of one sample are sum_{j != i} H_ij^2 for element i and 2 sum_{i != j} H_ij^2 for the trace. Each
    sample costs one Hessian-vector product. Raises ValueError for fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}: a standard error needs at least 2")
    params = _trainable(model)
    mean, squares = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    traces = []
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same vectors on every device
    with mode(model, training=False), torch.no_grad():
        operator = _hessian(model, x, y)
        for n in range(1, samples + 1):
            z = [(2 * torch.randint(2, p.shape, generator=generator) - 1).to(p) for p in params]
            sample = torch._foreach_mul(operator @ z, z)
            traces.append(sum(s.sum(dtype=torch.float64).item() for s in sample))
            for m, q, s in zip(mean, squares, sample, strict=True):  # Welford: no cancellation
                delta = s - m
                m.add_(delta / n)
                q.add_(delta * (s - m))
        error = [(q / (samples * (samples - 1))).sqrt() for q in squares]
    trace_error = float(np.std(traces, ddof=1)) / math.sqrt(samples)
    return DiagonalEstimate(mean, error, float(np.mean(traces)), trace_error, samples)


def hessian_rows(eigenvalues: np.ndarray, residuals: np.ndarray, diagonal: DiagonalEstimate) -> list[dict[str, Any]]:
    """Rows of the hessian table, less the epoch: quantity, value, error (residual or standard error) and samples.

    samples counts random vectors, hence 0 for an eigenvalue, whose error is no sampling error.
    """
    rows = [
        {"quantity": f"eigenvalue{i}", "value": float(value), "error": float(residual), "samples": 0}
        for i, (value, residual) in enumerate(zip(eigenvalues, residuals, strict=True), start=1)
    ]
    error = diagonal.trace_standard_error
    return [*rows, {"quantity": "trace", "value": diagonal.trace, "error": error, "samples": diagonal.samples}]
