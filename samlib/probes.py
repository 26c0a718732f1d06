"""What the second document looks at: how every parameter's gradient changes at SAM's ascent point.

Each probe makes its own two passes, in fp32 and outside the optimizer, so that it means the same under SGD, SAM and
every mix, and changes nothing of the training.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from samlib.compiled import compiled
from samlib.models import frozen_statistics, layer_kinds, mode, weights_restored
from samlib.sam import SMALL, checkpoint_codes, chunks, flat, laid_out

CHECKPOINTS = ("inactive", "checkpoint1", "checkpoint2", "checkpoint3", "checkpoint4")
RATIO_EDGES = (1.2, 1.5, 2.0, 4.0, 8.0, 16.0)  # of |g'| / |g| within checkpoint 1 (Project 2)
BINS = tuple(f"bin{k}" for k in range(1, len(RATIO_EDGES) + 2))
T_975_7 = 2.364624  # the two-sided 5 % point of Student's t with 7 degrees of freedom


@dataclass
class GradientPair:
    """Both gradients of one batch, a tensor a parameter; zero for a parameter that is frozen or unused."""

    names: list[str]
    g: list[Tensor]
    g_sam: list[Tensor]
    loss: float
    loss_sam: float
    _codes: Tensor | None = field(default=None, repr=False)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The checkpoint of every parameter, uint8 (parameters,), layer after layer."""
        if self._codes is None:
            (codes,) = _by_layer(_codes, lambda g, g_sam: (checkpoint_codes(g, g_sam),), self.g, self.g_sam)
            self._codes = torch.cat(codes)
        return self._codes

    @torch.no_grad()
    def sums(self, *, compile: bool = False) -> Tensor:
        """float64 (layers, 15): for every layer the counts of checkpoints 0 to 4 and of the seven ratio bins, and the
        sums of g^2, g'^2 and g g'. A ratio lies in a bin when |g'| >= edge |g| in the gradients' own precision.

        compile: in one compiled pass, which gives the codes too.
        """
        if compile:
            sums, codes = _by_layer(_compiled(), _sums_and_codes, self.g, self.g_sam)
            self._codes = torch.cat(codes)
        else:
            (sums,) = _by_layer(_sums, lambda g, g_sam: (_pair_sums(g, g_sam),), self.g, self.g_sam)
        return torch.stack(sums).cpu()

    def sizes(self) -> Tensor:
        """|g| of every parameter (parameters,), in the order of the codes."""
        return torch.cat([flat(a).abs() for a in self.g])


@contextmanager
def full_precision() -> Iterator[None]:
    """Plain fp32 inside: no TF32 and no autocast."""
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def gradient(model: nn.Module, x: Tensor, y: Tensor, *, create_graph: bool = False) -> tuple[list[Tensor], Tensor]:
    """The gradient of the mean cross entropy, a tensor a parameter (zeros where there is none), and the loss ()."""
    params = list(model.parameters())
    trainable = [p for p in params if p.requires_grad]
    with torch.enable_grad():
        loss = cross_entropy(model(x), y)
        found = iter(torch.autograd.grad(loss, trainable, create_graph=create_graph, allow_unused=True))
    grads = [next(found) if p.requires_grad else None for p in params]
    return [torch.zeros_like(p) if g is None else laid_out(g, p) for p, g in zip(params, grads, strict=True)], loss


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


def gradient_pair(model: nn.Module, x: Tensor, y: Tensor, rho: float) -> GradientPair:
    """g at the weights and g' at the ascent point, on one batch in training mode; nothing of the model changes.

    x: (batch, channels, height, width) float32; y: (batch,) int64; rho in the units of the weights.
    """
    with mode(model, training=True), frozen_statistics(model), full_precision():
        g, loss = gradient(model, x, y)
        with ascended(model, g, rho):
            g_sam, loss_sam = gradient(model, x, y)
    return GradientPair([name for name, _ in model.named_parameters()], g, g_sam, loss.item(), loss_sam.item())


def _by_layer(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    by_row: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    g: list[Tensor],
    g_sam: list[Tensor],
) -> list[tuple[Tensor, ...]]:
    """What function(g, g_sam) gives for every layer's flat gradients, a tuple over the layers for each of its results;
    `by_row` is the same for each row of matrices, which small layers of one size are put into.

    The largest layer comes first, because torch.compile plans its threads for the first size that it sees; and the
    tensors are no views, because it would look at their bases.
    """
    pairs = [(flat(a).detach(), flat(laid_out(b, a)).detach()) for a, b in zip(g, g_sam, strict=True)]
    results: dict[int, tuple[Tensor, ...]] = {}
    alike: dict[int, list[int]] = {}
    for i in sorted(range(len(pairs)), key=lambda i: -pairs[i][0].numel()):
        if pairs[i][0].numel() > SMALL:
            results[i] = function(*pairs[i])
        else:
            alike.setdefault(len(pairs[i][0]), []).append(i)
    for layers in alike.values():
        rows = by_row(*(torch.stack(side) for side in zip(*(pairs[i] for i in layers), strict=True)))
        results.update(zip(layers, zip(*rows, strict=True), strict=True))
    return list(zip(*(results[i] for i in range(len(pairs))), strict=True))


def _pair_sums(g: Tensor, g_sam: Tensor, edges: Callable[[], tuple[float, ...]] = lambda: RATIO_EDGES) -> Tensor:
    """float64 (..., 15) of (..., n): the five counts, the seven bins', and the sums of g^2, g'^2 and g g'."""
    size, along = g.abs(), g.sign() * g_sam  # g' as it lies along g: exact, and negative where the signs differ
    along = along.masked_fill(along == 0, float("nan"))  # inactive: in none of the comparisons
    masks = (along > 0, along < 0, along <= -size, along >= size, *(along >= edge * size for edge in edges()))
    counts = [mask.sum(-1, dtype=torch.int32) for mask in masks]  # cheaper than int64; no tensor has 2^31 elements
    same, other, in3, in1, *above = (c.double() for c in counts)
    bins = [a - b for a, b in zip((in1, *above), above, strict=False)]
    squares = [(a * b).sum(-1, dtype=torch.float64) for a, b in ((g, g), (g_sam, g_sam), (g, g_sam))]
    columns = [g.shape[-1] - same - other, in1, same - in1, in3, other - in3, *bins, above[-1], *squares]
    return torch.stack(columns, -1)


def _codes(g: Tensor, g_sam: Tensor) -> tuple[Tensor]:
    return (torch.cat([checkpoint_codes(*piece) for piece in chunks(g, g_sam)]),)


def _sums(g: Tensor, g_sam: Tensor) -> tuple[Tensor]:
    return (sum(_pair_sums(*piece) for piece in chunks(g, g_sam)),)


def _sums_and_codes(g: Tensor, g_sam: Tensor, **edges: Callable) -> tuple[Tensor, Tensor]:
    return _pair_sums(g, g_sam, **edges), checkpoint_codes(g, g_sam)


@lru_cache
def _compiled() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    edges = torch.compiler.assume_constant_result(lambda: RATIO_EDGES)  # not six more inputs of every call
    return compiled(lambda g, g_sam: _sums_and_codes(g, g_sam, edges=edges), dynamic=True)


def probe_rows(pair: GradientPair, model: nn.Module, *, compile: bool = False) -> tuple[dict, list[dict]]:
    """One row for the table `probes` and one a layer for the table `layers`, without step and epoch."""
    sums = pair.sums(compile=compile)  # (layers, 15)
    total = sums.sum(0)
    size = sum(t.numel() for t in pair.g)
    length, length_sam = total[12].sqrt().item(), total[13].sqrt().item()
    row = {"loss": pair.loss, "loss_sam": pair.loss_sam, "grad_norm": length, "grad_norm_sam": length_sam}
    row["cosine"] = total[14].item() / (length * length_sam) if length and length_sam else float("nan")
    row |= {name: total[k].item() / size for k, name in enumerate((*CHECKPOINTS, *BINS))}
    kinds = layer_kinds(model)
    layers = [
        {"layer": name, "kind": kinds[name], "parameters": g.numel()}
        | {code: int(n) for code, n in zip(CHECKPOINTS, counts, strict=False)}
        for name, g, counts in zip(pair.names, pair.g, sums.tolist(), strict=True)
    ]
    return row, layers


def pack(mask: Tensor) -> Tensor:
    """A set of parameters, bool (n,), as bits: uint8 (ceil(n / 8),) on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def count(packed: Tensor) -> int:
    """The size of a packed set."""
    return int(np.bitwise_count(packed.numpy()).sum(dtype=np.int64))


class Persistence:
    """Experiments 2 and 3: how long a parameter stays in checkpoint 1.

    At each reference step the set is kept; every later probe is compared with it, and the sets of the consecutive steps
    that follow are intersected one after the other. Packed sets, one bit a parameter; `state` goes into a resume state.
    """

    def __init__(self, steps: Iterable[int], window: int, state: dict | None = None) -> None:
        self.steps, self.window = tuple(steps), window
        self.references: dict[int, Tensor] = dict(state["references"]) if state else {}
        self.intersections: dict[int, Tensor] = dict(state["intersections"]) if state else {}

    @property
    def state(self) -> dict:
        return {"references": self.references, "intersections": self.intersections}

    def wants(self, step: int) -> bool:
        """Whether a step must be probed: it is a reference, or one of those that follow it."""
        return any(0 <= step - reference < self.window for reference in self.steps)

    def rows(self, step: int, codes: Tensor) -> tuple[list[dict], list[dict]]:
        """Rows of the tables `overlaps` and `intersections` for a probed step with these codes (parameters,)."""
        members = pack(codes == 1)
        size, total = count(members), {"active": int((codes != 0).sum()), "parameters": codes.numel()}
        overlaps, intersections = [], []
        if step in self.steps:
            self.references[step] = self.intersections[step] = members
        for reference, kept in self.references.items():
            if step > reference:
                overlaps.append(
                    {"reference_step": reference, "step": step, "reference_size": count(kept), "size": size}
                    | {"overlap": count(kept & members)}
                    | total
                )
            if 0 <= step - reference < self.window:
                self.intersections[reference] = self.intersections[reference] & members
                intersections.append(
                    {"reference_step": reference, "step": step, "steps": step - reference + 1, "size": size}
                    | {"intersection": count(self.intersections[reference])}
                    | total
                )
            else:
                self.intersections.pop(reference, None)
        return overlaps, intersections


def threshold_row(pair: GradientPair) -> dict:
    """Project 1: with k = the size of checkpoint 1, the k-th largest |g|, and how many of checkpoint 1 reach it."""
    sizes, codes = pair.sizes(), pair.codes()
    members = codes == 1
    k, total = int(members.sum()), sizes.numel()
    threshold = sizes.kthvalue(total - k + 1).values.item() if k else float("nan")
    above = int((sizes[members] >= threshold).sum())
    size = {"active": int((codes != 0).sum()), "parameters": total}
    return {"threshold": threshold, "checkpoint1": k, "above": above} | size


def scan_rows(model: nn.Module, x: Tensor, y: Tensor, rhos: Iterable[float]) -> list[dict]:
    """Codes on fixed weights and one batch over an increasing grid of rho: rows of the table `scan`, without epoch.

    `still` counts the parameters in checkpoint 1 at this rho and at every smaller one: what the second document calls
    "not escaping the attractor".
    """
    kinds, rows = layer_kinds(model), []
    still: list[Tensor] | None = None
    for rho in rhos:
        pair = gradient_pair(model, x, y, rho)
        codes = [checkpoint_codes(flat(a), flat(b)) for a, b in zip(pair.g, pair.g_sam, strict=True)]
        still = [c == 1 if still is None else s & (c == 1) for s, c in zip(still or codes, codes, strict=True)]
        for name, code, stays in zip(pair.names, codes, still, strict=True):
            counts = torch.bincount(code.long(), minlength=5).tolist()
            rows.append(
                {"rho": rho, "layer": name, "kind": kinds[name], "parameters": code.numel()}
                | dict(zip(CHECKPOINTS, counts, strict=True))
                | {"still": int(stays.sum())}
            )
    return rows


def prediction_rows(model: nn.Module, x: Tensor, y: Tensor, rhos: Iterable[float]) -> list[dict]:
    """How many codes the second-order prediction g' = g + rho H g / ||g|| gets right: rows of the table `prediction`.

    One Hessian-vector product (Pearlmutter, 1994), in training mode as the codes themselves. `constant` is the share
    that calling every parameter by the commonest code gets right.
    """
    with mode(model, training=True), frozen_statistics(model), full_precision():
        g, _ = gradient(model, x, y, create_graph=True)
        fixed = [t.detach() for t in g]
        length = norm(fixed)
        trainable = [(i, p) for i, p in enumerate(model.parameters()) if p.requires_grad]
        dot = sum((t * f).sum() for t, f in zip(g, fixed, strict=True))
        products = torch.autograd.grad(dot, [p for _, p in trainable], allow_unused=True)
        hg = [torch.zeros_like(t) for t in fixed]
        for (i, _), product in zip(trainable, products, strict=True):
            if product is not None:
                hg[i] = product
        del g, dot
    rows = []
    for rho in rhos:
        true = gradient_pair(model, x, y, rho).codes()
        scale = rho / length if length else 0.0
        predicted = torch.cat([checkpoint_codes(flat(f), flat(f + scale * h)) for f, h in zip(fixed, hg, strict=True)])
        commonest = torch.bincount(true.long(), minlength=5).max().item()
        rows.append(
            {"rho": rho, "right": (predicted == true).double().mean().item()}
            | {"constant": commonest / true.numel(), "parameters": true.numel()}
        )
    return rows


def diagonal_rows(pair: GradientPair, mean: list[Tensor], error: list[Tensor]) -> tuple[list[dict], float]:
    """The Hessian diagonal's estimate by checkpoint (table `diagonal`), and the rank correlation of its size with |g|.

    mean and error: the estimate and its standard error, in the shapes of the parameters.
    """
    from scipy.stats import spearmanr  # half a second, which only this needs

    codes = pair.codes().cpu().numpy()
    value = torch.cat([flat(t.to(g.device)) for t, g in zip(_like(mean, pair.g), pair.g, strict=True)]).cpu().numpy()
    noise = torch.cat([flat(t) for t in _like(error, pair.g)]).cpu().numpy()
    rows = []
    for code in range(5):
        inside, spread = value[codes == code], noise[codes == code]
        quantiles = np.quantile(inside, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist() if len(inside) else [float("nan")] * 5
        several = len(inside) > 1
        rows.append(
            {
                "checkpoint": code,
                "parameters": len(inside),
                "mean": float(inside.mean()) if len(inside) else float("nan"),
            }
            | {"standard_error": float(inside.std(ddof=1) / len(inside) ** 0.5) if several else float("nan")}
            | dict(zip(("q05", "q25", "median", "q75", "q95"), quantiles, strict=True))
            | {"negative": float((inside < 0).mean()) if len(inside) else float("nan")}
            | {"noise": float(np.median(spread)) if len(inside) else float("nan")}
        )
    sizes = pair.sizes().cpu().numpy()
    constant = np.ptp(sizes) == 0 or np.ptp(np.abs(value)) == 0
    return rows, float("nan") if constant else float(spearmanr(np.abs(value), sizes).statistic)


def _like(tensors: list[Tensor], models: list[Tensor]) -> list[Tensor]:
    """The tensors in the memory order of their models, so that flat() puts both in one order."""
    return [torch.empty_like(m).copy_(t) for t, m in zip(tensors, models, strict=True)]


def convergence_rows(
    model: nn.Module, x: Tensor, y: Tensor, pair: GradientPair, updates: list[Tensor], weight_decay: float, steps: int
) -> list[dict]:
    """Whether parameters have come to rest, by checkpoint: rows of the table `convergence`, without epoch and lr.

    The gradient is the objective's, weight decay included. `updates`: lr x momentum buffer, a tensor a parameter;
    `moving` is the share that `steps` such updates would move by over 1 % of the weight; `significant` the share whose
    mean gradient over eight pieces of the sample differs from zero (t test, 5 %: what chance gives).
    """
    pieces = []
    with mode(model, training=True), frozen_statistics(model), full_precision():
        for part_x, part_y in zip(x.tensor_split(8), y.tensor_split(8), strict=True):
            g, _ = gradient(model, part_x, part_y)
            decayed = (a + weight_decay * p.detach() for a, p in zip(g, model.parameters(), strict=True))
            pieces.append(torch.cat([flat(t) for t in decayed]))
    stacked = torch.stack(pieces)  # (8, parameters)
    mean, spread = stacked.mean(0), stacked.std(0) / len(pieces) ** 0.5
    significant = mean.abs() > T_975_7 * spread
    weights = torch.cat([flat(p.detach()).abs() for p in model.parameters()])
    update = torch.cat([flat(t).abs() for t in _like(updates, list(model.parameters()))])
    relative = update / weights.clamp_min(1e-12)
    codes, rows = pair.codes(), []
    for code in range(5):
        inside = codes == code
        size = int(inside.sum())

        def median(values: Tensor, inside: Tensor = inside, size: int = size) -> float:
            return values[inside].median().item() if size else float("nan")

        def share(mask: Tensor, inside: Tensor = inside, size: int = size) -> float:
            return mask[inside].double().mean().item() if size else float("nan")

        rows.append(
            {"checkpoint": code, "parameters": size, "gradient": median(mean.abs()), "weight": median(weights)}
            | {"update": median(update), "relative_update": median(relative)}
            | {"moving": share(relative * steps > 0.01), "significant": share(significant)}
        )
    return rows
