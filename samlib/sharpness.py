"""How sharp the loss is at the weights: random-direction and ascent sharpness, Hessian eigenvalues, trace, diagonal.

Everything is measured in evaluation mode, on the mean cross entropy of one fixed sample: x (images, channels, height,
width) floating point, y (images,) int64, on the model's device. In training mode the numbers differ, since BatchNorm
then couples the images of a batch. The weights come back bit for bit, also when something raises; gradients (.grad),
BatchNorm's running statistics and the global random generators are not touched.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from samlib.models import mode, weights_restored
from samlib.probes import ascended

CHUNK = 512  # images a pass
HESSIAN_CHUNK = 128  # images a Hessian-vector product: fastest on a CPU, and a quarter of the memory
JACOBIAN_BYTES = 2**26  # of the per-image gradients that are in memory at a time
SCALE = 0.05  # of a random direction's norm, per tensor
PAIRS = 5  # of random directions, each with its opposite
TOLERANCE = 1e-3  # of an eigenvector: its residual as a share of its eigenvalue
LOGITS = {"raw": lambda z: z, "normalized": lambda z: normalized(z)}


def normalized(logits: Tensor) -> Tensor:  # (images, classes)
    """Each image's logits with mean 0 and standard deviation 1, so that their size cannot make a loss look flat.

    Source: Andriushchenko et al., 2023 (arXiv 2302.07011). Equal logits become zeros.
    """
    centred = logits - logits.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(logits.dtype).tiny)


@torch.no_grad()
def losses(model: nn.Module, x: Tensor, labels: dict[str, Tensor]) -> dict[tuple[str, str], float]:
    """Mean cross entropy in nats by (labels, logits: raw or normalized), from one pass; summed in float64."""
    total = {(name, kind): 0.0 for name in labels for kind in LOGITS}
    with mode(model, training=False):
        for start in range(0, len(x), CHUNK):
            logits = model(x[start : start + CHUNK]).double()  # (chunk, classes)
            for kind, transform in LOGITS.items():
                shown = transform(logits)
                for name, y in labels.items():
                    part = functional.cross_entropy(shown, y[start : start + CHUNK], reduction="sum")
                    total[name, kind] += part.item()
    return {key: value / len(x) for key, value in total.items()}


def loss_value(model: nn.Module, x: Tensor, y: Tensor, logits: str = "raw") -> float:
    """L(w): mean cross entropy in nats, of raw or normalized logits."""
    return losses(model, x, {"": y})["", logits]


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor, logits: str = "raw") -> list[Tensor]:
    """The gradient of L for every parameter, in their shapes; zero where L does not depend on it."""
    params = list(model.parameters())
    gradient = [torch.zeros_like(p) for p in params]
    with mode(model, training=False), torch.enable_grad():
        for x_chunk, y_chunk in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            loss = functional.cross_entropy(LOGITS[logits](model(x_chunk)), y_chunk, reduction="sum") / len(x)
            torch._foreach_add_(gradient, torch.autograd.grad(loss, params, materialize_grads=True))
    return gradient


def random_direction_sharpness(
    model: nn.Module, x: Tensor, labels: dict[str, Tensor], scale: float = SCALE, pairs: int = PAIRS, seed: int = 0
) -> dict[tuple[str, str], dict[str, float]]:
    """Mean over random pairs +d, -d of (L(w + d) + L(w - d)) / 2 - L(w) in nats, by (labels, logits): value, std (of
    the pairs, with n - 1) and n, the number of pairs.

    d is Gaussian, scaled tensor by tensor to `scale` of that tensor's norm. To second order the expected value is
    1/2 sum_t (scale ||w_t||)^2 tr(H_tt) / size_t; the first order, which is noise, cancels within a pair. Raises
    ValueError for fewer than two pairs.
    """
    if pairs < 2:
        raise ValueError(f"pairs is {pairs}: a spread needs at least 2")
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same directions on every device
    before = losses(model, x, labels)
    rises: dict[tuple[str, str], list[float]] = {key: [] for key in before}
    with weights_restored(model.parameters()) as weights:
        for _ in range(pairs):
            directions = []
            for w in weights:
                d = torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)
                directions.append(d * (scale * w.norm() / d.norm()))
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    for p, w, d in zip(model.parameters(), weights, directions, strict=True):
                        p.copy_(w + sign * d)
                sides.append(losses(model, x, labels))
            for key, values in rises.items():
                values.append((sides[0][key] + sides[1][key]) / 2 - before[key])
    return {
        key: {"value": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "n": pairs}
        for key, values in rises.items()
    }


def ascent_sharpness(model: nn.Module, x: Tensor, y: Tensor, rho: float, logits: str = "raw") -> float:
    """L(w + rho g / ||g||) - L(w) in nats, g = loss_gradient (Foret et al., 2021); 0 where g is zero."""
    g, before = loss_gradient(model, x, y, logits), loss_value(model, x, y, logits)
    with ascended(model, g, rho):
        return loss_value(model, x, y, logits) - before


def sharpness_rows(
    model: nn.Module, x: Tensor, labels: dict[str, Tensor], rhos: list[float], seed: int
) -> list[dict[str, Any]]:
    """Rows of the sharpness table, less the epoch, for both measures, every labels of x, say trained and true, and raw
    and normalized logits.

    measure, labels, logits, setting (scale or rho), value, std (over pairs; NaN for the ascent, which is one value), n.
    """
    rows = []
    for (name, logits), result in random_direction_sharpness(model, x, labels, seed=seed).items():
        rows.append({"measure": "random", "labels": name, "logits": logits, "setting": SCALE} | result)
    for name, y in labels.items():
        for logits in LOGITS:
            for rho in rhos:
                value = ascent_sharpness(model, x, y, rho, logits)
                row = {"measure": "ascent", "labels": name, "logits": logits, "setting": rho}
                rows.append(row | {"value": value, "std": math.nan, "n": 1})
    return rows


def gauss_newton_diagonal(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The diagonal of the Gauss-Newton matrix of L in evaluation mode, exactly: a tensor a parameter, in its shape.

    (1/N) sum_n sum_c p_nc (J_nc - sum_k p_nk J_nk)^2, J_nc the gradient of image n's logit c, p its softmax: per-image
    gradients, in chunks that bound memory. It needs no labels, and no entry is negative. A network that is piecewise
    linear in each single weight, as one of ReLUs is in evaluation mode, has it as the diagonal of its Hessian.
    """
    from torch.func import functional_call, vjp, vmap

    params, buffers = {name: p.detach() for name, p in model.named_parameters()}, dict(model.named_buffers())
    total = {name: torch.zeros_like(p) for name, p in params.items()}

    def image_squares(image: Tensor) -> dict[str, Tensor]:  # (channels, height, width)
        logits, pull_back = vjp(lambda p: functional_call(model, p | buffers, (image[None],))[0], params)
        p = logits.softmax(0)
        sides = p.sqrt()[:, None] * (torch.eye(len(p), dtype=p.dtype, device=p.device) - p)  # (classes, classes)
        parts = [vmap(pull_back)(part)[0] for part in sides.split(gradients)]
        return {name: sum(part[name].square().sum(0) for part in parts) for name in params}

    with mode(model, training=False), torch.no_grad():
        gradients = max(1, JACOBIAN_BYTES // sum(p.numel() * p.element_size() for p in params.values()))
        for chunk in x.split(max(1, gradients // model(x[:1]).shape[1])):
            for name, squares in vmap(image_squares)(chunk).items():
                total[name] += squares.sum(0) / len(x)
    return list(total.values())


def _hessian(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """curvlinops' operator for the Hessian of L; multiply with it in evaluation mode only."""
    from curvlinops import HessianLinearOperator  # here, since importing it takes seconds

    data = list(zip(x.split(HESSIAN_CHUNK), y.split(HESSIAN_CHUNK), strict=True))
    return HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, num_data=len(x), check_deterministic=False
    )  # the check costs two more passes and products, and nothing here is random


def hessian_eigenvalues(model: nn.Module, x: Tensor, y: Tensor, k: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """The k largest (algebraic) eigenvalues of the Hessian of L, descending, and their residuals ||H v - lambda v||.

    Both have shape (k,), in float64, v of norm 1: an eigenvalue lies within the residual of each value. By Lanczos
    (scipy's eigsh), from a fixed start. Both are NaN for one that did not converge, or a Hessian that is not finite.
    Raises ValueError unless 1 <= k < number of parameters.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    with mode(model, training=False):
        operator = _hessian(model, x, y)
        if not 1 <= k < operator.shape[0]:
            raise ValueError(f"k is {k}: it must be from 1 to {operator.shape[0] - 1}, below the number of parameters")
        dtype = next(model.parameters()).detach().cpu().numpy().dtype
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


def hessian_trace(model: nn.Module, x: Tensor, y: Tensor, samples: int, seed: int) -> tuple[float, float]:
    """The trace of the Hessian of L and its standard error: the mean of z . Hz over Rademacher vectors z.

    Source: Hutchinson, 1989. One sample's variance is 2 sum_{i != j} H_ij^2; each costs one Hessian-vector product.
    Raises ValueError for fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}: a standard error needs at least 2")
    traces = []
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same vectors on every device
    with mode(model, training=False), torch.no_grad():
        operator = _hessian(model, x, y)
        for _ in range(samples):
            z = [(2 * torch.randint(2, p.shape, generator=generator) - 1).to(p) for p in model.parameters()]
            product = operator @ z
            traces.append(sum((a * b).sum(dtype=torch.float64).item() for a, b in zip(product, z, strict=True)))
    return float(np.mean(traces)), float(np.std(traces, ddof=1)) / math.sqrt(samples)


def hessian_rows(model: nn.Module, x: Tensor, y: Tensor, samples: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the hessian table, less the epoch: quantity, value, error (residual or standard error) and samples, the
    number of random vectors, hence 0 for an eigenvalue."""
    found = [(value, error, 0) for value, error in np.stack(hessian_eigenvalues(model, x, y), 1).tolist()]
    found.append((*hessian_trace(model, x, y, samples, seed), samples))
    names = "eigenvalue1", "eigenvalue2", "trace"
    return [{"quantity": q, "value": v, "error": e, "samples": n} for q, (v, e, n) in zip(names, found, strict=True)]
