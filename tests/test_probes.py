"""The probes against per-element loops, Python sets, closed forms and a dense Hessian."""

import io
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from samlib import probes
from samlib.models import build_model
from samlib.probes import GradientPair, Persistence, checkpoint_codes, gradient_pair, probe_rows
from samlib.sam import SMALL

EDGES = ("1.2", "1.5", "2", "4", "8", "16")
DTYPES = [torch.float32, torch.float64]


def code(g, h):
    """The definition, for one number."""
    if math.isnan(g) or math.isnan(h) or g == 0 or h == 0:
        return 0
    if (g > 0) == (h > 0):
        return 1 if abs(h) >= abs(g) else 2
    return 3 if abs(h) >= abs(g) else 4


def codes_of(g, h):
    return [code(a, b) for a, b in zip(g, h, strict=True)]


def specials(dtype):
    tiny, least, most = (1e-45, 1.2e-38, 3e38) if dtype == torch.float32 else (5e-324, 2.3e-308, 1.7e308)
    positive = [0.0, tiny, 2 * tiny, 7 * tiny, least, 1e-30, 1.5e-30, 1e-9, 1.0, 1.0 + 1e-6, 1.5, 16.0, most, math.inf]
    values = torch.tensor([s * v for v in positive for s in (1, -1)], dtype=dtype)
    return torch.cartesian_prod(values, values).unbind(1)


def pair_of(g, h, names=None):
    return GradientPair(names or [f"p{i}" for i in range(len(g))], g, h, 1.0, 2.0)


def small(seed=0, dtype=torch.float32, norm=True):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(4)] if norm else []
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(dtype=torch.float32, size=16, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=draw, dtype=dtype), torch.randint(3, (size,), generator=draw)


# Codes


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_the_definition_for_zeros_denormals_equal_and_infinite_values(dtype):
    g, h = specials(dtype)
    codes = checkpoint_codes(g, h)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == codes_of(g.tolist(), h.tolist())
    assert set(codes.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_codes_are_the_definition_for_random_values_of_every_size(dtype):
    torch.manual_seed(0)
    exponents = torch.randint(-44, 38, (2, 20_000)).double()
    g, h = (torch.randn(2, 20_000).double() * 10**exponents).to(dtype)
    h[::3] = (g * torch.randn(20_000)).to(dtype)[::3]
    h[::7] = -g[::7]
    assert checkpoint_codes(g, h).tolist() == codes_of(g.tolist(), h.tolist())


def test_codes_keep_the_shape_and_nan_has_no_class():
    g, h = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert checkpoint_codes(g, h).shape == (2, 3, 4)
    assert checkpoint_codes(g[:, :, :0], h[:, :, :0]).numel() == 0
    nan = torch.tensor([math.nan, 1.0, math.nan, 0.0])
    assert checkpoint_codes(nan, torch.tensor([1.0, math.nan, math.nan, math.nan])).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="shape"):
        checkpoint_codes(g, h[0])


# Sums of a pair


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_and_bins_are_a_per_element_loop_on_special_values(dtype):
    g, h = specials(dtype)
    kind = np.float32 if dtype == torch.float32 else np.float64
    counts = [0] * 12
    with np.errstate(over="ignore"):
        for a, b in zip(g.numpy(), h.numpy(), strict=True):
            k = code(float(a), float(b))
            counts[k] += 1
            if k == 1:  # decided in the gradients' own precision
                counts[5 + sum(abs(b) >= kind(e) * abs(a) for e in EDGES)] += 1
    assert pair_of([g], [h]).sums()[0, :12].tolist() == counts


def test_bins_are_the_exact_ratios_on_random_values():
    torch.manual_seed(0)
    g, h = torch.randn(20_000), torch.randn(20_000) * 3
    bins = [0] * 7
    for a, b in zip(g.tolist(), h.tolist(), strict=True):
        if code(a, b) == 1:
            ratio = Fraction(abs(b)) / Fraction(abs(a))
            bins[sum(ratio >= Fraction(e) for e in EDGES)] += 1
    assert pair_of([g], [h]).sums()[0, 5:12].tolist() == bins
    assert min(bins) > 0


def test_an_edge_belongs_to_the_bin_above_it():
    g = torch.tensor([1.0, -0.25, 3.0]).repeat_interleave(6)
    edges = torch.tensor([float(e) for e in EDGES]).repeat(3)
    below = torch.nextafter(g * edges, torch.zeros(18))
    assert pair_of([g], [g * edges]).sums()[0, 5:12].tolist() == [0, 3, 3, 3, 3, 3, 3]
    assert pair_of([g], [below]).sums()[0, 5:12].tolist() == [3, 3, 3, 3, 3, 3, 0]
    assert pair_of([g], [g]).sums()[0, 5:12].tolist() == [18, 0, 0, 0, 0, 0, 0]


def test_sums_over_several_chunks_are_those_of_the_whole():
    torch.manual_seed(0)
    g, h = torch.randn(200_001), torch.randn(200_001)
    g[::11] = 0
    sums = pair_of([g], [h]).sums()[0].numpy()
    a, b = g.numpy().astype(np.float64), h.numpy().astype(np.float64)
    codes = np.where(a * b == 0, 0, 1 + (abs(b) < abs(a)) + 2 * (np.sign(a) != np.sign(b)))
    assert sums[:5].tolist() == np.bincount(codes, minlength=5).tolist()
    np.testing.assert_allclose(sums[12:], [a @ a, b @ b, a @ b], rtol=1e-6)
    whole = probes._pair_sums(g, h).numpy()
    assert sums[:12].tolist() == whole[:12].tolist()
    np.testing.assert_allclose(sums[12:], whole[12:], rtol=1e-12)


@pytest.mark.parametrize("compile", [False, True])
def test_many_layers_of_many_sizes_are_counted_as_each_by_itself(compile):
    """Small layers of one size are counted together, large ones by themselves."""
    draw = torch.Generator().manual_seed(0)
    sizes = [3, 100_000, SMALL, 1, SMALL + 1, 3, 1, SMALL, 20, 3]
    g, h = ([torch.randn(n, generator=draw) for n in sizes] for _ in "gh")
    g[0][1] = g[7][5] = h[1][::3] = 0
    pair = pair_of(g, h)
    sums = pair.sums(compile=compile)
    assert sums.shape == (len(sizes), 15) and sums.dtype == torch.float64
    exact = [codes_of(a.tolist(), b.tolist()) for a, b in zip(g, h, strict=True)]
    assert sums[:, :5].tolist() == [np.bincount(codes, minlength=5).tolist() for codes in exact]
    assert sums[:, 5:12].sum(1).tolist() == sums[:, 1].tolist()
    products = [
        [float(x.double() @ y.double()) for x, y in ((a, a), (b, b), (a, b))] for a, b in zip(g, h, strict=True)
    ]
    np.testing.assert_allclose(sums[:, 12:], products, rtol=1e-6, atol=1e-4)
    assert pair.codes().tolist() == sum(exact, [])


def test_layouts_of_the_two_gradients_do_not_matter():
    torch.manual_seed(0)
    g, h = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    last = torch.channels_last
    expected = pair_of([g], [h]).sums()
    for a, b in ((g.to(memory_format=last), h), (g, h.to(memory_format=last)), tuple(
        t.to(memory_format=last) for t in (g, h)
    )):  # fmt: skip
        torch.testing.assert_close(pair_of([a], [b]).sums(), expected, rtol=1e-12, atol=1e-9)
        pair = pair_of([a], [b])
        order = checkpoint_codes(g, h), g.abs()
        if not a.is_contiguous():
            order = [t.permute(0, 2, 3, 1) for t in order]
        assert pair.codes().tolist() == order[0].flatten().tolist()
        assert pair.sizes().tolist() == order[1].flatten().tolist()


# Rows of a probe


def test_a_probes_row_is_the_float64_definition_and_its_fractions_sum_to_one():
    model, (x, y) = small(), batch()
    pair = gradient_pair(model, x, y, rho=0.5)
    row, layers = probe_rows(pair, model)
    g, h = (torch.cat([t.flatten() for t in side]).double().numpy() for side in (pair.g, pair.g_sam))
    codes = codes_of(g, h)
    assert row["grad_norm"] == pytest.approx(np.linalg.norm(g), rel=1e-6)
    assert row["grad_norm_sam"] == pytest.approx(np.linalg.norm(h), rel=1e-6)
    assert row["cosine"] == pytest.approx(g @ h / np.linalg.norm(g) / np.linalg.norm(h), rel=1e-6)
    names = ("inactive", "checkpoint1", "checkpoint2", "checkpoint3", "checkpoint4")
    for k, name in enumerate(names):
        assert row[name] == codes.count(k) / len(codes)
    assert sum(row[name] for name in names) == pytest.approx(1, abs=1e-12)
    assert sum(row[f"bin{k}"] for k in range(1, 8)) == pytest.approx(row["checkpoint1"], abs=1e-12)
    assert (row["loss"], row["loss_sam"]) == (pair.loss, pair.loss_sam)
    start = 0
    for layer, (name, p) in zip(layers, model.named_parameters(), strict=True):
        part = codes[start : start + p.numel()]
        start += p.numel()
        kind = "batchnorm" if name.startswith("1.") else "linear"
        assert (layer["layer"], layer["kind"], layer["parameters"]) == (name, kind, p.numel())
        assert [layer[n] for n in names] == [part.count(k) for k in range(5)]
        assert sum(layer[n] for n in names) == p.numel()


def test_a_zero_gradient_has_no_cosine_and_is_all_inactive():
    model = nn.Linear(2, 2)
    zeros = [torch.zeros_like(p) for p in model.parameters()]
    row, layers = probe_rows(pair_of(zeros, zeros, ["weight", "bias"]), model)
    assert row["inactive"] == 1 and row["grad_norm"] == 0 and math.isnan(row["cosine"])
    assert [layer["inactive"] for layer in layers] == [4, 2]


# The pair of gradients


def logistic(w, b, x, y):
    """Closed-form loss and gradients of softmax regression."""
    logits = x @ w.T + b
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(3)[y]) / len(y)
    return -np.log(p[np.arange(len(y)), y]).mean(), error.T @ x, error.sum(0)


@pytest.mark.parametrize("rho", [0.0, 0.05, 2.0])
def test_both_gradients_of_softmax_regression_have_the_closed_form(rho):
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 3).double(), batch(torch.float64)
    w, b = (p.detach().numpy().copy() for p in model.parameters())
    loss, gw, gb = logistic(w, b, x.numpy(), y.numpy())
    norm = math.sqrt((gw**2).sum() + (gb**2).sum())
    loss_sam, hw, hb = logistic(w + rho * gw / norm, b + rho * gb / norm, x.numpy(), y.numpy())
    pair = gradient_pair(model, x, y, rho)
    assert pair.names == ["weight", "bias"]
    for got, expected in zip((*pair.g, *pair.g_sam, pair.loss, pair.loss_sam), (gw, gb, hw, hb, loss, loss_sam),
                             strict=True):  # fmt: skip
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


class Breaks(nn.Module):
    """Raises in the n-th forward pass."""

    def __init__(self, model, at):
        super().__init__()
        self.model, self.at, self.calls = model, at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise ZeroDivisionError
        return self.model(x)


@pytest.mark.parametrize("at", [1, 2, None])
@pytest.mark.parametrize("training", [True, False])
def test_a_probe_leaves_weights_statistics_modes_and_gradients_to_the_bit(at, training):
    model, (x, y) = Breaks(small(), at), batch()
    model.train(training)
    model.model[1].train(not training)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, generator = [m.training for m in model.modules()], torch.get_rng_state()
    if at:
        with pytest.raises(ZeroDivisionError):
            gradient_pair(model, x, y, 0.5)
    else:
        gradient_pair(model, x, y, 0.5)
        probes.scan_rows(model, x, y, [0.1, 0.2])
        probes.prediction_rows(model, x, y, [0.1])
        pair = gradient_pair(model, x, y, 0.5)
        probes.convergence_rows(model, x, y, pair, [torch.ones_like(p) for p in model.parameters()], 0.1, 5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_probe_is_in_training_mode_and_full_precision_whatever_surrounds_it():
    model, (x, y) = small(), batch()
    plain = gradient_pair(model, x, y, 0.3)
    model.eval()
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        other = gradient_pair(model, x, y, 0.3)
        assert torch.is_autocast_enabled("cpu")
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == flags
    for a, b in zip((*plain.g, *plain.g_sam), (*other.g, *other.g_sam), strict=True):
        assert torch.equal(a, b)


def test_frozen_and_unused_parameters_are_inactive_and_do_not_move():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.frozen, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.used(torch.tanh(self.frozen(x)))

    torch.manual_seed(0)
    model, (x, y) = Part(), batch()
    pair = gradient_pair(model, x, y, 0.5)
    row, layers = probe_rows(pair, model)
    for layer, g, h in zip(layers, pair.g, pair.g_sam, strict=True):
        dead = not layer["layer"].startswith("used")
        assert (layer["inactive"] == layer["parameters"]) == dead
        assert (not g.any() and not h.any()) == dead
    assert row["inactive"] == (12 + 6) / (12 + 12 + 6)
    (rest,) = probes.prediction_rows(model, x, y, [1e-3])
    assert rest["parameters"] == 30 and rest["right"] > 0.8
    assert len(probes.convergence_rows(model, x, y, pair, [torch.zeros_like(p) for p in model.parameters()], 0, 1)) == 5


def test_a_gradient_of_denormal_numbers_is_probed_without_an_error():
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, -95.0]))  # the other class has probability 5e-42
    pair = gradient_pair(model, torch.ones(4, 1), torch.zeros(4, dtype=torch.int64), 0.05)
    assert all(t.isfinite().all() for t in (*pair.g, *pair.g_sam))


def test_layouts_of_model_and_images_change_no_table():
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(16) % 10
    tables = []
    for m, b in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        model = build_model("resnet10", 4, "cifar", 3, 10, seed=0).double().to(memory_format=m)
        images = x.to(memory_format=b)
        pair = gradient_pair(model, images, y, 0.1)
        updates = [0.1 * g * g.abs() for g in pair.g]
        mean, error = ([t.contiguous() * s for t in pair.g] for s in (2.0, -1.0))
        row, layers = probe_rows(pair, model)
        diagonal, correlation = probes.diagonal_rows(pair, mean, error)
        resting = probes.convergence_rows(model, images, y, pair, updates, 0.01, 100)
        rows = [row, *layers, *diagonal, {"correlation": correlation}, *resting, probes.threshold_row(pair)]
        rows += probes.scan_rows(model, images, y, [0.1, 0.5]) + probes.prediction_rows(model, images, y, [0.1])
        tables.append([v for r in rows for v in r.values() if not isinstance(v, str)])
    for other in tables[1:]:
        np.testing.assert_allclose(other, tables[0], rtol=1e-6, atol=1e-12, equal_nan=True)


# Sets and persistence


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
def test_a_packed_set_has_its_size_and_intersects_as_pythons_sets(size):
    torch.manual_seed(size)
    a, b = torch.rand(size) < 0.5, torch.rand(size) < 0.3
    sets = [{i for i in range(size) if mask[i]} for mask in (a, b)]
    packed = [probes.pack(mask) for mask in (a, b)]
    assert packed[0].dtype == torch.uint8 and len(packed[0]) == math.ceil(size / 8)
    assert [probes.count(p) for p in packed] == [len(s) for s in sets]
    assert probes.count(packed[0] & packed[1]) == len(sets[0] & sets[1])


@pytest.mark.parametrize("saved_after", [None, 0, 3, 4, 8, 12])
def test_overlaps_and_running_intersections_are_those_of_pythons_sets(saved_after):
    torch.manual_seed(0)
    references, window, every = (0, 3, 11), 4, 6  # the windows of 0 and 3 overlap
    tracker = Persistence(references, window)
    probed = [s for s in range(20) if s % every == 0 or any(r <= s < r + window for r in references)]
    assert [s for s in range(20) if tracker.wants(s)] == [0, 1, 2, 3, 4, 5, 6, 11, 12, 13, 14]
    sets, active = {}, {}
    for step in probed:
        codes = torch.randint(5, (403,), dtype=torch.uint8)
        codes[:200] = 1 if step % 5 else codes[:200]  # some that stay
        sets[step] = {i for i, c in enumerate(codes.tolist()) if c == 1}
        active[step] = sum(c != 0 for c in codes.tolist())
        overlaps, intersections = tracker.rows(step, codes)
        total = {"size": len(sets[step]), "active": active[step], "parameters": 403}
        assert overlaps == [
            {"reference_step": r, "step": step, "reference_size": len(sets[r]), "overlap": len(sets[r] & sets[step])}
            | total
            for r in references
            if step > r
        ]
        assert intersections == [
            {"reference_step": r, "step": step, "steps": step - r + 1}
            | {"intersection": len(set.intersection(*(sets[s] for s in range(r, step + 1))))}
            | total
            for r in references
            if r <= step < r + window
        ]
        if step == saved_after:
            file = io.BytesIO()
            torch.save(tracker.state, file)
            file.seek(0)
            tracker = Persistence(references, window, torch.load(file, weights_only=True))


@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_is_the_kth_largest_of_the_sorted_gradients(ties):
    torch.manual_seed(0)
    g, h = torch.randn(500), torch.randn(500)
    if ties:
        g, h = g.mul(2).round(), h.mul(2).round()
    row = probes.threshold_row(pair_of([g[:100].reshape(10, 10), g[100:]], [h[:100].reshape(10, 10), h[100:]]))
    codes = codes_of(g.tolist(), h.tolist())
    k = codes.count(1)
    threshold = sorted((abs(v) for v in g.tolist()), reverse=True)[k - 1]
    above = sum(c == 1 and abs(v) >= threshold for c, v in zip(codes, g.tolist(), strict=True))
    assert row == {
        "threshold": threshold, "checkpoint1": k, "above": above, "active": 500 - codes.count(0), "parameters": 500,
    }  # fmt: skip
    assert 0 < above <= k


def test_without_any_member_there_is_no_threshold():
    g = torch.ones(5)
    row = probes.threshold_row(pair_of([g], [-g]))
    assert math.isnan(row.pop("threshold"))
    assert row == {"checkpoint1": 0, "above": 0, "active": 5, "parameters": 5}
    assert probes.threshold_row(pair_of([g], [2 * g])) == {
        "threshold": 1.0, "checkpoint1": 5, "above": 5, "active": 5, "parameters": 5,
    }  # fmt: skip


# The grid of rho


def test_a_scan_counts_codes_and_who_was_in_checkpoint_1_throughout():
    model, (x, y) = small(), batch()
    rhos = [0.01, 0.3, 1.0, 3.0]
    rows = iter(probes.scan_rows(model, x, y, rhos))
    still = None
    for rho in rhos:
        pair = gradient_pair(model, x, y, rho)
        members = set()
        for name, g, h in zip(pair.names, pair.g, pair.g_sam, strict=True):
            codes, row = codes_of(g.flatten().tolist(), h.flatten().tolist()), next(rows)
            assert (row["rho"], row["layer"], row["parameters"]) == (rho, name, len(codes))
            assert row["kind"] == ("batchnorm" if name.startswith("1.") else "linear")
            assert [row[n] for n in probes.CHECKPOINTS] == [codes.count(k) for k in range(5)]
            inside = {(name, i) for i, c in enumerate(codes) if c == 1}
            stays = inside if still is None else inside & still
            assert row["still"] == len(stays)
            members |= stays
        still = members
    assert next(rows, None) is None
    assert still  # some remain, so that the last comparison says something


@pytest.mark.parametrize("norm", [False, True])
def test_the_prediction_is_that_of_the_dense_hessian(norm):
    model, (x, y) = small(dtype=torch.float64, norm=norm), batch(torch.float64)
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    w = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes])
        params = {n: t.reshape(s) for n, t, s in zip(names, parts, shapes, strict=True)}
        statistics = {n: b.clone() for n, b in model.named_buffers()}
        return cross_entropy(torch.func.functional_call(model, params | statistics, x), y)

    gradient = torch.func.grad(loss)
    g, hessian = gradient(w), torch.autograd.functional.hessian(loss, w)
    # A constant shift before BatchNorm changes nothing: that bias has a gradient of rounding noise, left out here.
    clean = g.abs() > 1e-12
    rhos = [1e-3, 0.1, 0.7, 2.0, 10.0]
    wrong = 0
    for row, rho in zip(probes.prediction_rows(model, x, y, rhos), rhos, strict=True):
        true = codes_of(g.tolist(), gradient(w + rho * g / g.norm()).tolist())
        predicted = codes_of(g.tolist(), (g + rho * hessian @ g / g.norm()).tolist())
        right = [t == p for t, p, c in zip(true, predicted, clean.tolist(), strict=True) if c]
        noise = len(true) - len(right)
        assert noise == (4 if norm else 0)
        assert abs(row["right"] * len(true) - sum(right)) <= noise + 1e-9
        constant = max(true.count(k) for k in range(5))
        assert abs(row["constant"] * len(true) - constant) <= noise + 1e-9
        assert (row["rho"], row["parameters"]) == (rho, len(true))
        wrong += len(right) - sum(right)
        if rho == 1e-3:
            assert all(right)  # the quadratic is exact in the limit
    assert wrong > 0  # and is not far out, so that the comparison says something


# The Hessian's diagonal


def test_diagonal_rows_are_numpys_statistics_by_checkpoint():
    torch.manual_seed(0)
    shapes = [(20, 10), (4, 3, 3, 3), (7,)]
    g, h, mean, error = ([torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(4))
    g[0][0] = 0
    g[1] = g[1].to(memory_format=torch.channels_last)
    h[1] = h[1].to(memory_format=torch.channels_last)
    rows, correlation = probes.diagonal_rows(pair_of(g, h), mean, error)
    g, h, mean, error = (np.concatenate([t.flatten().numpy() for t in side]) for side in (g, h, mean, error))
    codes = np.array(codes_of(g, h))
    assert len(rows) == 5
    for k, row in enumerate(rows):
        inside = mean[codes == k]
        expected = {
            "checkpoint": k, "parameters": len(inside), "mean": inside.mean(),
            "standard_error": inside.std(ddof=1) / math.sqrt(len(inside)),
            "q05": np.quantile(inside, 0.05), "q25": np.quantile(inside, 0.25), "median": np.median(inside),
            "q75": np.quantile(inside, 0.75), "q95": np.quantile(inside, 0.95), "negative": np.mean(inside < 0),
            "noise": np.median(error[codes == k]),
        }  # fmt: skip
        assert row == pytest.approx(expected, rel=1e-12)
    ranks = [scipy.stats.rankdata(abs(v)) for v in (mean, g)]
    assert correlation == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-12)


def test_empty_checkpoints_and_constant_sizes_have_no_statistics():
    g = [torch.ones(3)]
    rows, correlation = probes.diagonal_rows(pair_of(g, g), [torch.tensor([1.0, 2.0, 3.0])], [torch.ones(3)])
    assert math.isnan(correlation)
    assert [row["parameters"] for row in rows] == [0, 3, 0, 0, 0]
    assert rows[1]["mean"] == 2 and rows[1]["negative"] == 0
    for name in ("mean", "standard_error", "q05", "median", "negative", "noise"):
        assert math.isnan(rows[2][name])


# Convergence


@pytest.mark.parametrize("size", [64, 20, 17])
def test_convergence_rows_are_an_explicit_loop(size):
    model, (x, y) = small(dtype=torch.float64), batch(torch.float64, size)
    with torch.no_grad():
        model[3].bias[0] = 0.0
    torch.manual_seed(4)
    updates = [torch.randn_like(p) * 1e-3 * (torch.rand_like(p) > 0.2) for p in model.parameters()]
    decay, steps = 0.05, 3
    pair = gradient_pair(model, x, y, 0.5)
    rows = probes.convergence_rows(model, x, y, pair, updates, decay, steps)
    # Eight pieces as equal as can be, each normalized by its own statistics.
    bounds = np.cumsum([0, *(size // 8 + (i < size % 8) for i in range(8))])
    pieces = []
    for low, high in itertools.pairwise(bounds):
        statistics = {k: v.clone() for k, v in model.named_buffers()}
        grads = torch.autograd.grad(cross_entropy(model(x[low:high]), y[low:high]), list(model.parameters()))
        for k, b in model.named_buffers():
            b.copy_(statistics[k])
        pieces.append([v for t in grads for v in t.flatten().tolist()])
    w = [v for p in model.parameters() for v in p.flatten().tolist()]
    u = [v for t in updates for v in t.flatten().tolist()]
    codes = pair.codes().tolist()
    members = {k: [i for i, c in enumerate(codes) if c == k] for k in range(5)}
    shift = set(range(12, 16))  # the bias before BatchNorm has a gradient of rounding noise: its t is of no account
    for k, row in enumerate(rows):
        assert (row["checkpoint"], row["parameters"]) == (k, len(members[k]))
        if not members[k]:
            assert all(math.isnan(row[n]) for n in ("gradient", "weight", "update", "relative_update", "moving"))
            continue
        means, t = {}, {}
        for i in members[k]:
            sample = [piece[i] + decay * w[i] for piece in pieces]
            means[i] = abs(np.mean(sample))
            t[i] = means[i] / (np.std(sample, ddof=1) / math.sqrt(8)) > scipy.stats.t.ppf(0.975, 7)
        moving = sum(abs(u[i]) * steps > 0.01 * abs(w[i]) for i in members[k])
        assert row["moving"] == pytest.approx(moving / len(members[k]))
        noise = len(shift & set(members[k]))
        assert abs(row["significant"] * len(members[k]) - sum(t.values())) <= noise + 1e-9
        for name, values in {
            "gradient": list(means.values()), "weight": [abs(w[i]) for i in members[k]],
            "update": [abs(u[i]) for i in members[k]],
            "relative_update": [abs(u[i]) / max(abs(w[i]), 1e-12) for i in members[k]],
        }.items():  # fmt: skip
            values = sorted(values)  # of an even number, the lower of the two in the middle
            assert row[name] == pytest.approx(values[(len(values) - 1) // 2], rel=1e-9), (k, name)
    assert sum(len(m) for m in members.values()) == len(w) and len([m for m in members.values() if m]) >= 4
