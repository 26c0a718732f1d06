"""What the second document looks at: how every parameter's gradient changes at SAM's ascent point.

Each probe makes its own two passes, in fp32 and outside the optimizer, so that it means the same under SGD, SAM and
every mix, and changes nothing of the training. Parameters are counted layer after layer, in the model's order.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from samlib.mix import checkpoint_codes
from samlib.models import frozen_statistics, layer_kinds, mode, softplus_for_relu, weights_restored

CHECKPOINTS = ("inactive", "checkpoint1", "checkpoint2", "checkpoint3", "checkpoint4")
RATIO_EDGES = (1.2, 1.5, 2.0, 4.0, 8.0, 16.0)  # of |g'| / |g| within checkpoint 1 (Project 2)
BINS = tuple(f"bin{k}" for k in range(1, len(RATIO_EDGES) + 2))


@dataclass
class GradientPair:
    """Both gradients of one batch, a tensor a parameter; zero for a parameter that is unused."""

    names: list[str]
    g: list[Tensor]
    g_sam: list[Tensor]
    loss: float
    loss_sam: float

    @cached_property
    def layer_codes(self) -> list[Tensor]:
        """The checkpoints of every layer's parameters, each uint8 (size,)."""
        return [checkpoint_codes(a.flatten(), b.flatten()) for a, b in zip(self.g, self.g_sam, strict=True)]

    @cached_property
    def codes(self) -> Tensor:
        """The checkpoint of every parameter, uint8 (parameters,)."""
        return torch.cat(self.layer_codes)

    @cached_property
    def sizes(self) -> Tensor:
        """|g| of every parameter (parameters,)."""
        return torch.cat([a.flatten().abs() for a in self.g])


@contextmanager
def full_precision() -> Iterator[None]:
    """Plain fp32 inside: no TF32 and no autocast."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = conv


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Inside, passes are those of training, normalized by their batch, but move no running statistics."""
    with mode(model, training=True), frozen_statistics(model), full_precision():
        yield


def gradients(model: nn.Module, loss: Tensor, **options: bool) -> list[Tensor]:
    """The gradient of a loss, a tensor a parameter: zeros where there is none. options: of torch.autograd.grad."""
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, **options))


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm over all tensors, accumulated in float64."""
    return float(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).norm())


@contextmanager
def ascended(model: nn.Module, g: list[Tensor], rho: float) -> Iterator[None]:
    """Inside, the weights are at w + rho g / ||g||; where g is zero they stay."""
    params, length = list(model.parameters()), norm(g)
    with weights_restored(params):
        if length > 0 and rho > 0:
            with torch.no_grad():
                torch._foreach_add_(params, g, alpha=min(rho / length, torch.finfo(torch.float32).max))
        yield


@torch.enable_grad()
def gradient_pair(model: nn.Module, x: Tensor, y: Tensor, rho: float) -> GradientPair:
    """g at the weights and g' at the ascent point, on one batch in training mode; nothing of the model changes.

    x: (batch, channels, height, width) float32; y: (batch,) int64; rho in the units of the weights.
    """
    with as_trained(model):
        loss = cross_entropy(model(x), y)
        g = gradients(model, loss)
        with ascended(model, g, rho):
            loss_sam = cross_entropy(model(x), y)
            g_sam = gradients(model, loss_sam)
    return GradientPair([name for name, _ in model.named_parameters()], g, g_sam, loss.item(), loss_sam.item())


def probe_rows(pair: GradientPair, model: nn.Module) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One row for the table `probes` and one a layer for the table `layers`, without step and epoch.

    A ratio lies in a bin when |g'| >= edge |g| in the gradients' own precision.
    """
    kinds, layers = layer_kinds(model), []
    above = torch.zeros(len(RATIO_EDGES), dtype=torch.int64)
    dot = 0.0
    for name, g, g_sam, codes in zip(pair.names, pair.g, pair.g_sam, pair.layer_codes, strict=True):
        g, g_sam = g.flatten(), g_sam.flatten()
        counts = torch.bincount(codes, minlength=5).tolist()
        head = {"layer": name, "kind": kinds[name], "parameters": g.numel()}
        layers.append(head | dict(zip(CHECKPOINTS, counts, strict=True)))
        inside, size, size_sam = codes == 1, g.abs(), g_sam.abs()
        above += torch.stack([(inside & (size_sam >= edge * size)).sum() for edge in RATIO_EDGES]).cpu()
        dot += (g.double() * g_sam.double()).sum().item()
    total = sum(layer["parameters"] for layer in layers)
    counts = {name: sum(layer[name] for layer in layers) for name in CHECKPOINTS}
    edges = [counts["checkpoint1"], *above.tolist(), 0]
    counts |= {name: edges[k] - edges[k + 1] for k, name in enumerate(BINS)}
    length, length_sam = norm(pair.g), norm(pair.g_sam)
    row = {"loss": pair.loss, "loss_sam": pair.loss_sam, "grad_norm": length, "grad_norm_sam": length_sam}
    row["cosine"] = dot / (length * length_sam) if length and length_sam else float("nan")
    return row | {name: count / total for name, count in counts.items()}, layers


class Persistence:
    """Experiments 2 and 3: how long a parameter stays in checkpoint 1, on the batch of a reference step, kept, and on
    the later steps' own batches.

    `layers`: the number of parameters of each layer, within which the chance levels are taken. `state` goes into a
    resume state.
    """

    def __init__(self, steps: Iterable[int], lags: Iterable[int], window: int, layers: list[int]) -> None:
        self.steps, self.lags, self.window, self.layers = tuple(steps), tuple(lags), window, layers
        self.state: dict[str, dict] = {"references": {}, "intersections": {}}

    def wants(self, step: int) -> bool:
        """Whether a step must be probed: it is a reference, or one of those that follow it."""
        return any(0 <= step - r < self.window or step - r in self.lags for r in self.steps)

    def by_layer(self, mask: Tensor) -> Tensor:
        """How many of each layer's parameters are in the set, float64 (layers,); mask: bool (parameters,)."""
        return torch.stack([part.sum() for part in mask.split(self.layers)]).double().cpu()

    def rows(self, step: int, codes: Tensor, again: Callable[[int], Tensor]) -> tuple[list[dict], list[dict]]:
        """Rows of the tables `overlaps` and `intersections` for a probed step.

        codes (parameters,): of the step's own batch; again(reference): of that step's batch, at the present weights.
        `chance` is the expected size if the sets were drawn at random within each layer: from the parameters active at
        both steps for an overlap, and for an intersection from those active at the reference step.
        """
        references, running = self.state["references"], self.state["intersections"]
        overlaps, intersections = [], []
        if step in self.steps:
            references[step] = codes
        for reference, first in references.items():
            found = {"other": codes, "same": again(reference) if step > reference else codes}
            head = {"reference_step": reference, "step": step}
            for batch, now in found.items():
                members = now == 1
                total = {"size": int(members.sum()), "active": int((now != 0).sum()), "parameters": len(now)}
                if step > reference:
                    both = (first != 0) & (now != 0)
                    here, there, room = map(self.by_layer, (members & both, (first == 1) & both, both))
                    row = head | {"lag": step - reference, "batch": batch, "reference_size": int((first == 1).sum())}
                    row |= {"overlap": int((members & (first == 1)).sum())}
                    overlaps.append(row | {"chance": float((here * there / room.clamp_min(1)).sum())} | total)
                if step - reference < self.window:
                    active = first != 0
                    kept, share = running.get((reference, batch), (active, torch.ones(len(self.layers)).double()))
                    room = self.by_layer(active)
                    kept, share = kept & members, share * self.by_layer(members & active) / room.clamp_min(1)
                    running[reference, batch] = kept, share
                    row = head | {"steps": step - reference + 1, "batch": batch, "intersection": int(kept.sum())}
                    intersections.append(row | {"chance": float((room * share).sum())} | total)
                else:
                    running.pop((reference, batch), None)
        return overlaps, intersections


def threshold_row(pair: GradientPair) -> dict[str, Any]:
    """Project 1: with k = the size of checkpoint 1, the k-th largest |g|, and how many of checkpoint 1 reach it.

    `chance`: how many would if checkpoint 1 were as many of each layer's active parameters, at random.
    """
    k, total = int((pair.codes == 1).sum()), len(pair.codes)
    threshold = pair.sizes.kthvalue(total - k + 1).values.item() if k else float("nan")
    above, chance = 0, 0.0
    for g, codes in zip(pair.g, pair.layer_codes, strict=True):
        large, inside, active = g.flatten().abs() >= threshold, codes == 1, codes != 0
        above += int((large & inside).sum())
        chance += int((large & active).sum()) * int(inside.sum()) / max(1, int(active.sum()))
    row = {"threshold": threshold, "checkpoint1": k, "above": above, "chance": chance}
    return row | {"active": int((pair.codes != 0).sum()), "parameters": total}


def scan_rows(model: nn.Module, x: Tensor, y: Tensor, rhos: Iterable[float]) -> list[dict[str, Any]]:
    """Codes on fixed weights and one batch over an increasing grid of rho: rows of the table `scan`, without epoch.

    `still` counts the parameters in checkpoint 1 at this rho and at every smaller one: what the second document calls
    "not escaping the attractor".
    """
    kinds, rows = layer_kinds(model), []
    still: list[Tensor] | None = None
    for rho in rhos:
        pair = gradient_pair(model, x, y, rho)
        inside = [codes == 1 for codes in pair.layer_codes]
        still = inside if still is None else [a & b for a, b in zip(still, inside, strict=True)]
        for name, codes, stays in zip(pair.names, pair.layer_codes, still, strict=True):
            counts = dict(zip(CHECKPOINTS, torch.bincount(codes, minlength=5).tolist(), strict=True))
            head = {"rho": rho, "layer": name, "kind": kinds[name], "parameters": len(codes)}
            rows.append(head | counts | {"still": int(stays.sum())})
    return rows


@torch.enable_grad()
def prediction_rows(model: nn.Module, x: Tensor, y: Tensor, rhos: Iterable[float]) -> list[dict[str, Any]]:
    """How many codes the second-order prediction g' = g + rho H g / ||g|| gets right: rows of the table `prediction`.

    One Hessian-vector product (Pearlmutter, 1994), in training mode as the codes themselves; once for the net as it is,
    and once with softplus in place of ReLU at the same weights, which has no kinks. `constant` is the share that naming
    the commonest code for every parameter gets right.
    """
    rows = []
    for activation in ("relu", "softplus"):
        with as_trained(model), softplus_for_relu(model) if activation == "softplus" else nullcontext():
            g = gradients(model, cross_entropy(model(x), y), create_graph=True)
            fixed = [t.detach() for t in g]
            length = norm(fixed)
            product = gradients(model, sum((t * f).sum() for t, f in zip(g, fixed, strict=True)))
            del g
            for rho in rhos:
                true, scale = gradient_pair(model, x, y, rho).codes, rho / length if length else 0.0
                linear = zip(fixed, product, strict=True)
                predicted = torch.cat([checkpoint_codes(f, f + scale * h).flatten() for f, h in linear])
                row = {"rho": rho, "activation": activation, "right": share(predicted == true)}
                commonest = torch.bincount(true, minlength=5).max().item()
                rows.append(row | {"constant": commonest / len(true), "parameters": len(true)})
    return rows


def diagonal_rows(pair: GradientPair, diagonal: list[Tensor]) -> tuple[list[dict[str, Any]], float]:
    """The Hessian's diagonal by checkpoint (table `diagonal`), and over the active parameters the rank correlation of
    its size with |g|. diagonal: in the shapes of the parameters."""
    from scipy.stats import spearmanr  # half a second, which only this needs

    codes, sizes = pair.codes.cpu().numpy(), pair.sizes.cpu().numpy()
    value = torch.cat([t.flatten() for t in diagonal]).cpu().numpy()
    rows = []
    for code in range(5):
        inside = value[codes == code]
        quantiles = np.quantile(inside, (0.05, 0.25, 0.5, 0.75, 0.95)) if len(inside) else [float("nan")] * 5
        row = {"checkpoint": code, "parameters": len(inside)}
        row["mean"] = float(inside.mean(dtype=np.float64)) if len(inside) else float("nan")
        several = len(inside) > 1
        row["standard_error"] = float(inside.std(ddof=1) / len(inside) ** 0.5) if several else float("nan")
        row |= dict(zip(("q05", "q25", "median", "q75", "q95"), map(float, quantiles), strict=True))
        rows.append(row | {"zero": float((inside == 0).mean()) if len(inside) else float("nan")})
    active = codes != 0
    constant = not active.any() or np.ptp(sizes[active]) == 0 or np.ptp(value[active]) == 0
    return rows, float("nan") if constant else float(spearmanr(np.abs(value[active]), sizes[active]).statistic)


@torch.enable_grad()
def convergence_rows(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    pair: GradientPair,
    updates: list[Tensor],
    weight_decay: float,
    steps: int,
) -> list[dict[str, Any]]:
    """Whether parameters have come to rest, by checkpoint: rows of the table `convergence`, without epoch and lr.

    batches: the whole training set, at least two. t is the mean over them of the objective's gradient (weight decay
    included) over its standard error. `significant` is the share with |t| > 2, `chance` that of a parameter at rest,
    `detectable` the median gradient that would have been significant. `updates`: lr x momentum buffer, a tensor a
    parameter; `moving` is the share that `steps` such updates would move by over 1 % of the weight.
    """
    from scipy.stats import t as student

    total = torch.zeros(len(pair.codes), dtype=torch.float64, device=pair.codes.device)
    squares = torch.zeros_like(total)
    with as_trained(model):
        for n, (x, y) in enumerate(batches, start=1):  # Welford: no cancellation
            g = gradients(model, cross_entropy(model(x), y))
            decayed = [(a + weight_decay * p.detach()).flatten() for a, p in zip(g, model.parameters(), strict=True)]
            difference = torch.cat(decayed).double() - total
            total += difference / n
            squares += difference**2 * ((n - 1) / n)
    gradient, error = total.abs(), (squares / (n * (n - 1))).sqrt()
    weights = torch.cat([p.detach().flatten().abs() for p in model.parameters()])
    update = torch.cat([t.flatten().abs() for t in updates])
    relative = update / weights.clamp_min(1e-12)
    sizes = {"gradient": gradient, "weight": weights, "update": update, "relative_update": relative}
    rows = []
    for code in range(5):
        inside = pair.codes == code
        row = {"checkpoint": code, "parameters": int(inside.sum()), "batches": n}
        row |= {"significant": share((gradient > 2 * error)[inside]), "chance": float(2 * student.sf(2, n - 1))}
        row["detectable"] = _median(2 * error[inside])
        row |= {name: _median(values[inside]) for name, values in sizes.items()}
        rows.append(row | {"moving": share((relative * steps > 0.01)[inside])})
    return rows


def share(mask: Tensor) -> float:
    """The share of a bool tensor that is true; NaN of an empty one."""
    return mask.double().mean().item()


def _median(values: Tensor) -> float:
    return values.median().item() if len(values) else float("nan")


NOISE_SUMS = (
    "parameters", "sets_direction", "g_l1", "g_flipped", "g_sam_l1", "g_sam_flipped", "flipped_l1", "flipped_sam_l1",
    "clean_l1", "clean_sam_l1",
)  # fmt: skip


@torch.enable_grad()
def noise_rows(model: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor]], rho: float) -> list[dict[str, Any]]:
    """What images with flipped labels bring to g and to g', by checkpoint and kind of layer: rows of the table `noise`.

    batches: images, labels and which labels are flipped, bool (batch,). Both parts of a gradient are over the whole
    batch's size and with its BatchNorm statistics, so g = g_flipped + g_clean. Summed over parameters and batches:
    `sets_direction`, how many have in g_flipped the larger part, of g's sign; `g_l1` = sum |g| and `g_flipped` =
    sum sign(g) g_flipped, its share that flipped images bring (the rest is the clean images'); `flipped_l1` =
    sum |g_flipped|; those with `sam` are of g', g'_flipped and g'_clean.
    """
    kinds = list(layer_kinds(model).values())
    sums = {kind: torch.zeros(5, len(NOISE_SUMS), dtype=torch.float64) for kind in kinds}

    def parts(x: Tensor, y: Tensor, flipped: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        losses = cross_entropy(model(x), y, reduction="none") / len(y)
        return gradients(model, losses[flipped].sum(), retain_graph=True), gradients(model, losses[~flipped].sum())

    for x, y, flipped in batches:
        with as_trained(model):
            here = parts(x, y, flipped)
            with ascended(model, [a + b for a, b in zip(*here, strict=True)], rho):
                there = parts(x, y, flipped)
        for kind, *layer in zip(kinds, *here, *there, strict=True):
            f, c, f_sam, c_sam = (t.flatten().double() for t in layer)
            g, g_sam = f + c, f_sam + c_sam
            sets = (f.sign() == g.sign()) & (f.abs() > c.abs())
            along, along_sam = g.sign() * f, g_sam.sign() * f_sam
            lengths = (t.abs() for t in (f, f_sam, c, c_sam))
            columns = [torch.ones_like(g), sets.double(), g.abs(), along, g_sam.abs(), along_sam, *lengths]
            codes = checkpoint_codes(g.to(x.dtype), g_sam.to(x.dtype)).long()
            table = torch.zeros(5, len(columns), dtype=torch.float64, device=g.device)
            sums[kind] += table.index_add_(0, codes, torch.stack(columns, 1)).cpu()
    head = {"batches": len(batches), "images": sum(len(y) for _, y, _ in batches)}
    head["flipped"] = int(sum(f.sum() for *_, f in batches))
    return [
        {"checkpoint": code, "kind": kind} | head | dict(zip(NOISE_SUMS, values, strict=True))
        for kind, table in sums.items()
        for code, values in enumerate(table.tolist())
    ]
