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
from samlib.probes import BINS, CHECKPOINTS, GradientPair, Persistence, checkpoint_codes, gradient_pair, probe_rows

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


# Counts of a pair


class Layers(nn.Module):
    """Parameters of the sizes of these gradients, and no forward."""

    def __init__(self, g):
        super().__init__()
        self.p = nn.ParameterList([torch.zeros_like(t) for t in g])


def counted(g, h):
    """What a probe counts: numbers of parameters by checkpoint and by bin, and each layer's."""
    names = [f"p.{k}" for k in range(len(g))]
    row, layers = probe_rows(pair_of(g, h, names), Layers(g))
    total = sum(t.numel() for t in g)
    return [round(row[n] * total) for n in CHECKPOINTS], [round(row[n] * total) for n in BINS], layers, row


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_and_bins_are_a_per_element_loop_on_special_values(dtype):
    g, h = specials(dtype)
    kind = np.float32 if dtype == torch.float32 else np.float64
    counts, bins = [0] * 5, [0] * 7
    with np.errstate(over="ignore"):
        for a, b in zip(g.numpy(), h.numpy(), strict=True):
            k = code(float(a), float(b))
            counts[k] += 1
            if k == 1:  # decided in the gradients' own precision
                bins[sum(abs(b) >= kind(e) * abs(a) for e in EDGES)] += 1
    assert counted([g], [h])[:2] == (counts, bins)


def test_bins_are_the_exact_ratios_on_random_values():
    torch.manual_seed(0)
    g, h = torch.randn(20_000), torch.randn(20_000) * 3
    bins = [0] * 7
    for a, b in zip(g.tolist(), h.tolist(), strict=True):
        if code(a, b) == 1:
            ratio = Fraction(abs(b)) / Fraction(abs(a))
            bins[sum(ratio >= Fraction(e) for e in EDGES)] += 1
    assert counted([g], [h])[1] == bins
    assert min(bins) > 0


def test_an_edge_belongs_to_the_bin_above_it():
    g = torch.tensor([1.0, -0.25, 3.0]).repeat_interleave(6)
    edges = torch.tensor([float(e) for e in EDGES]).repeat(3)
    below = torch.nextafter(g * edges, torch.zeros(18))
    assert counted([g], [g * edges])[1] == [0, 3, 3, 3, 3, 3, 3]
    assert counted([g], [below])[1] == [3, 3, 3, 3, 3, 3, 0]
    assert counted([g], [g])[1] == [18, 0, 0, 0, 0, 0, 0]


def test_many_layers_of_many_sizes_are_counted_as_each_by_itself():
    draw = torch.Generator().manual_seed(0)
    sizes = [3, 20_000, 1, 4097, 3, 1, 20]
    g, h = ([torch.randn(n, generator=draw) for n in sizes] for _ in "gh")
    g[0][1] = g[3][5] = h[1][::3] = 0
    counts, bins, layers, row = counted(g, h)
    exact = [codes_of(a.tolist(), b.tolist()) for a, b in zip(g, h, strict=True)]
    assert [[layer[n] for n in CHECKPOINTS] for layer in layers] == [[c.count(k) for k in range(5)] for c in exact]
    assert [layer["parameters"] for layer in layers] == sizes
    assert counts == np.sum([[c.count(k) for k in range(5)] for c in exact], axis=0).tolist()
    assert sum(bins) == counts[1]
    a, b = (np.concatenate([t.numpy().astype(np.float64) for t in side]) for side in (g, h))
    assert row["grad_norm"] == pytest.approx(math.sqrt(a @ a), rel=1e-12)
    assert row["cosine"] == pytest.approx(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b), rel=1e-12)
    assert pair_of(g, h).codes.tolist() == sum(exact, [])


def test_layouts_of_the_two_gradients_do_not_matter():
    torch.manual_seed(0)
    g, h = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    last = torch.channels_last
    for a, b in itertools.product((g, g.to(memory_format=last)), (h, h.to(memory_format=last))):
        assert counted([a], [b])[:2] == counted([g], [h])[:2]
        pair = pair_of([a], [b])
        assert pair.codes.tolist() == checkpoint_codes(g, h).flatten().tolist()
        assert pair.sizes.tolist() == g.abs().flatten().tolist()


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
        halves = [(x[:8], y[:8]), (x[8:], y[8:])]
        probes.convergence_rows(model, halves, pair, [torch.ones_like(p) for p in model.parameters()], 0.1, 5)
        probes.noise_rows(model, [(x, y, y == 1)], 0.5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm1d))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_probe_is_in_training_mode_and_full_precision_whatever_surrounds_it(precision):
    model, (x, y) = small(), batch()
    plain = gradient_pair(model, x, y, 0.3)
    model.eval()
    flags = lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)  # noqa: E731
    try:
        torch.set_float32_matmul_precision(precision)
        before = flags()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            other = gradient_pair(model, x, y, 0.3)
            assert torch.is_autocast_enabled("cpu")
        assert flags() == before == (precision, before[1])
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip((*plain.g, *plain.g_sam), (*other.g, *other.g_sam), strict=True):
        assert torch.equal(a, b)


def test_unused_parameters_are_inactive_and_do_not_move():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model, (x, y) = Part(), batch()
    pair = gradient_pair(model, x, y, 0.5)
    row, layers = probe_rows(pair, model)
    for layer, g, h in zip(layers, pair.g, pair.g_sam, strict=True):
        dead = not layer["layer"].startswith("used")
        assert (layer["inactive"] == layer["parameters"]) == dead
        assert (not g.any() and not h.any()) == dead
    assert row["inactive"] == 6 / (12 + 6)
    for rest in probes.prediction_rows(model, x, y, [1e-3]):
        assert rest["parameters"] == 18 and rest["right"] > 0.8
    halves, still = [(x[:8], y[:8]), (x[8:], y[8:])], [torch.zeros_like(p) for p in model.parameters()]
    assert len(probes.convergence_rows(model, halves, pair, still, 0, 1)) == 5
    assert sum(row["parameters"] for row in probes.noise_rows(model, [(x, y, y == 1)], 0.5)) == 18


def test_a_gradient_of_denormal_numbers_is_probed_without_an_error():
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, -95.0]))  # the other class has probability 5e-42
    pair = gradient_pair(model, torch.ones(4, 1), torch.zeros(4, dtype=torch.int64), 0.05)
    assert all(t.isfinite().all() for t in (*pair.g, *pair.g_sam))


def test_layouts_of_model_and_images_change_no_table():
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(16) % 10
    tables = []
    for m, b in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        torch.manual_seed(0)
        body = (
            nn.Conv2d(3, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, 2),
            nn.ReLU(),
            nn.Flatten(),
        )
        model = nn.Sequential(*body, nn.Linear(24, 10)).double().to(memory_format=m)
        images = x.to(memory_format=b)
        pair = gradient_pair(model, images, y, 0.1)
        updates = [0.1 * g * g.abs() for g in pair.g]
        row, layers = probe_rows(pair, model)
        diagonal, correlation = probes.diagonal_rows(pair, [t.contiguous() * 2 for t in pair.g])
        halves = [(images[:8], y[:8]), (images[8:], y[8:])]
        resting = probes.convergence_rows(model, halves, pair, updates, 0.01, 100)
        resting += probes.noise_rows(model, [(images, y, y > 6)], 0.1)
        rows = [row, *layers, *diagonal, {"correlation": correlation}, *resting, probes.threshold_row(pair)]
        rows += probes.scan_rows(model, images, y, [0.1, 0.5]) + probes.prediction_rows(model, images, y, [0.1])
        tables.append([v for r in rows for v in r.values() if not isinstance(v, str)])
    for other in tables[1:]:
        np.testing.assert_allclose(other, tables[0], rtol=1e-6, atol=1e-12, equal_nan=True)


# Sets and persistence


def drawn(sizes, step, batch):
    """Codes of a step on a batch, made up: some parameters that stay, and some that are dead, in each layer."""
    draw = torch.Generator().manual_seed(1000 * step + batch)
    codes = torch.randint(5, (sum(sizes),), generator=draw, dtype=torch.uint8)
    codes[: sizes[0] // 2] = 1 if step % 5 else codes[: sizes[0] // 2]
    codes[-sizes[-1] // 3 :] = 0
    return codes


def chance_in(sizes, universe, *sets):
    """The expected size of the common part of random sets of these sizes within each layer's universe."""
    expected, start = Fraction(0), 0
    for size in sizes:
        layer = set(range(start, start + size)) & universe
        start += size
        if layer:
            expected += len(layer) * math.prod((Fraction(len(s & layer), len(layer)) for s in sets), start=Fraction(1))
    return float(expected)


@pytest.mark.parametrize("saved_after", [None, 0, 3, 4, 8, 12])
def test_overlaps_and_running_intersections_are_those_of_pythons_sets(saved_after):
    sizes, references, lags, window, every = [203, 1, 150, 49], (0, 3, 11), (1, 7), 4, 6  # windows of 0 and 3 overlap
    made = lambda: Persistence(references, lags, window, sizes)  # noqa: E731
    tracker = made()
    wanted = {r + k for r in references for k in (*range(window), *lags)}
    assert [s for s in range(30) if tracker.wants(s)] == sorted(wanted)
    probed = [s for s in range(20) if s % every == 0 or s in wanted]
    now = lambda step, batch: drawn(sizes, step, batch)  # noqa: E731
    members = lambda step, batch, k=1: {i for i, c in enumerate(now(step, batch).tolist()) if c == k}  # noqa: E731
    active = lambda step, batch: set(range(sum(sizes))) - members(step, batch, 0)  # noqa: E731
    for step in probed:
        overlaps, intersections = tracker.rows(step, now(step, step), lambda reference, step=step: now(step, reference))
        expected = {"overlaps": [], "intersections": []}
        for r, batch in itertools.product([r for r in references if r <= step], ("other", "same")):
            images = lambda s, r=r, batch=batch: s if batch == "other" else r  # noqa: E731
            here, there = members(step, images(step)), members(r, r)
            total = {"size": len(here), "active": len(active(step, images(step))), "parameters": sum(sizes)}
            head = {"reference_step": r, "step": step}
            if step > r:
                both = active(step, images(step)) & active(r, r)
                expected["overlaps"].append(
                    head
                    | {"lag": step - r, "batch": batch, "reference_size": len(there), "overlap": len(here & there)}
                    | {"chance": pytest.approx(chance_in(sizes, both, here, there), rel=1e-12)}
                    | total
                )
            if step < r + window:
                sets = [members(s, images(s)) for s in range(r, step + 1)]
                expected["intersections"].append(
                    head
                    | {"steps": step - r + 1, "batch": batch, "intersection": len(set.intersection(*sets))}
                    | {"chance": pytest.approx(chance_in(sizes, active(r, r), *sets), rel=1e-12)}
                    | total
                )
        assert overlaps == expected["overlaps"] and intersections == expected["intersections"]
        if step == saved_after:
            file = io.BytesIO()
            torch.save(tracker.state, file)
            file.seek(0)
            tracker = made()
            tracker.state = torch.load(file, weights_only=True)


def test_the_chance_of_an_overlap_and_an_intersection_is_what_random_sets_have():
    """Monte Carlo: every set redrawn within each layer, in its size."""
    sizes, lag = [30, 80], 3
    first, *later = (drawn(sizes, step, 0) for step in range(4))
    tracker, rows = Persistence((0,), (lag,), 4, sizes), []
    for step, codes in enumerate((first, *later)):
        rows.append(tracker.rows(step, codes, lambda _, codes=codes: codes))
    overlap = next(row for row in rows[lag][0] if row["batch"] == "other")
    draw, found = np.random.default_rng(0), {"overlap": [], "intersection": []}
    layers = [slice(0, 30), slice(30, 110)]

    def redrawn(codes, universe):
        result = np.zeros(110, bool)
        for layer in layers:
            room = np.flatnonzero(universe[layer]) + layer.start
            result[draw.choice(room, int((codes[layer] == 1)[universe[layer]].sum()), replace=False)] = True
        return result

    codes = [c.numpy() for c in (first, *later)]
    for _ in range(4000):
        both = (codes[0] != 0) & (codes[lag] != 0)
        found["overlap"].append((redrawn(codes[0], both) & redrawn(codes[lag], both)).sum())
        active = codes[0] != 0
        found["intersection"].append(np.logical_and.reduce([redrawn(c, active) for c in codes]).sum())
    for name, chance in (("overlap", overlap["chance"]), ("intersection", rows[lag][1][0]["chance"])):
        error = np.std(found[name]) / math.sqrt(4000)
        assert abs(np.mean(found[name]) - chance) < 4 * error, name


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
    large = [abs(v) >= threshold for v in g.tolist()]
    above = sum(c == 1 and big for c, big in zip(codes, large, strict=True))
    chance = 0
    for layer in (slice(0, 100), slice(100, 500)):
        active = [big for c, big in zip(codes[layer], large[layer], strict=True) if c]
        chance += sum(active) / len(active) * codes[layer].count(1)
    assert row == {
        "threshold": threshold, "checkpoint1": k, "above": above, "chance": pytest.approx(chance),
        "active": 500 - codes.count(0), "parameters": 500,
    }  # fmt: skip
    assert 0 < above <= k


def test_the_chance_of_a_threshold_is_the_mean_over_every_choice_within_the_layers():
    g = [torch.tensor([5.0, 4.0, 1.0, 0.5]), torch.tensor([3.0, 2.0, 0.1])]
    h = [torch.tensor([6.0, 0.0, 2.0, -0.5]), torch.tensor([-3.0, 2.5, 0.2])]  # one inactive; checkpoint 1: 2 and 2
    row = probes.threshold_row(pair_of(g, h))
    assert (row["checkpoint1"], row["threshold"], row["above"]) == (4, 2.0, 2)
    large = [[True, False, False], [True, True, False]]  # of the active ones, at least the threshold
    choices = itertools.product(*(itertools.combinations(layer, 2) for layer in large))
    assert row["chance"] == pytest.approx(np.mean([sum(a) + sum(b) for a, b in choices]))


def test_without_any_member_there_is_no_threshold():
    g = torch.ones(5)
    row = probes.threshold_row(pair_of([g], [-g]))
    assert math.isnan(row.pop("threshold"))
    assert row == {"checkpoint1": 0, "above": 0, "chance": 0.0, "active": 5, "parameters": 5}
    assert probes.threshold_row(pair_of([g], [2 * g])) == {
        "threshold": 1.0, "checkpoint1": 5, "above": 5, "chance": 5.0, "active": 5, "parameters": 5,
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
    rows = probes.prediction_rows(model, x, y, rhos)
    assert [row["activation"] for row in rows] == ["relu"] * 5 + ["softplus"] * 5
    for row, other, rho in zip(rows[:5], rows[5:], rhos, strict=True):
        assert row | {"activation": 0} == other | {"activation": 0}  # no ReLU here: the same net twice
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


class Kinked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.relu, self.last = nn.Linear(3, 60), nn.ReLU(), nn.Linear(60, 3)

    def forward(self, x):
        return self.last(self.relu(self.first(x)))


def test_softplus_in_place_of_relu_is_predicted_where_kinks_are_missed():
    model, (x, y) = Kinked().double(), batch(torch.float64, size=64)
    relu, softplus = probes.prediction_rows(model, x, y, [0.003])
    assert (relu["activation"], softplus["activation"]) == ("relu", "softplus")
    assert softplus["right"] == 1 and relu["right"] < 0.99  # at so small a radius the second order is all there is
    assert isinstance(model.relu, nn.ReLU)
    # The softplus net's codes, from its own dense gradients.
    model.relu = nn.Softplus()
    again, _ = probes.prediction_rows(model, x, y, [0.003])
    assert again["right"] == softplus["right"] and again["constant"] == softplus["constant"]


# The Hessian's diagonal


def test_diagonal_rows_are_numpys_statistics_by_checkpoint():
    torch.manual_seed(0)
    shapes = [(20, 10), (4, 3, 3, 3), (7,)]
    g, h, mean = ([torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(3))
    g[0][0] = mean[1][1] = 0
    g[1] = g[1].to(memory_format=torch.channels_last)
    h[1] = h[1].to(memory_format=torch.channels_last)
    rows, correlation = probes.diagonal_rows(pair_of(g, h), mean)
    g, h, mean = (np.concatenate([t.flatten().numpy() for t in side]) for side in (g, h, mean))
    codes = np.array(codes_of(g, h))
    assert len(rows) == 5
    for k, row in enumerate(rows):
        inside = mean[codes == k]
        expected = {
            "checkpoint": k, "parameters": len(inside), "mean": inside.mean(),
            "standard_error": inside.std(ddof=1) / math.sqrt(len(inside)),
            "q05": np.quantile(inside, 0.05), "q25": np.quantile(inside, 0.25), "median": np.median(inside),
            "q75": np.quantile(inside, 0.75), "q95": np.quantile(inside, 0.95), "zero": np.mean(inside == 0),
        }  # fmt: skip
        assert row == pytest.approx(expected, rel=1e-12)
    ranks = [scipy.stats.rankdata(abs(v[codes != 0])) for v in (mean, g)]
    assert correlation == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-12)


def test_empty_checkpoints_and_constant_sizes_have_no_statistics():
    g = [torch.ones(3)]
    rows, correlation = probes.diagonal_rows(pair_of(g, g), [torch.tensor([1.0, 2.0, 3.0])])
    assert math.isnan(correlation)
    assert [row["parameters"] for row in rows] == [0, 3, 0, 0, 0]
    assert rows[1]["mean"] == 2 and rows[1]["zero"] == 0
    for name in ("mean", "standard_error", "q05", "median", "zero"):
        assert math.isnan(rows[2][name])


# Convergence


@pytest.mark.parametrize("count", [2, 8])
def test_convergence_rows_are_an_explicit_loop(count):
    model, (x, y) = small(dtype=torch.float64), batch(torch.float64, 64)
    with torch.no_grad():
        model[3].bias[0] = 0.0
    torch.manual_seed(4)
    updates = [torch.randn_like(p) * 1e-3 * (torch.rand_like(p) > 0.2) for p in model.parameters()]
    decay, steps = 0.05, 3
    pair = gradient_pair(model, x, y, 0.5)
    parts = list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))
    rows = probes.convergence_rows(model, parts, pair, updates, decay, steps)
    pieces = []
    for part, labels in parts:
        statistics = {k: v.clone() for k, v in model.named_buffers()}
        grads = torch.autograd.grad(cross_entropy(model(part), labels), list(model.parameters()))
        for k, b in model.named_buffers():
            b.copy_(statistics[k])
        pieces.append([v for t in grads for v in t.flatten().tolist()])
    w = [v for p in model.parameters() for v in p.flatten().tolist()]
    u = [v for t in updates for v in t.flatten().tolist()]
    codes = pair.codes.tolist()
    members = {k: [i for i, c in enumerate(codes) if c == k] for k in range(5)}
    shift = set(range(12, 16))  # the bias before BatchNorm has a gradient of rounding noise: its t is of no account
    for k, row in enumerate(rows):
        assert (row["checkpoint"], row["parameters"], row["batches"]) == (k, len(members[k]), count)
        assert row["chance"] == pytest.approx(2 * scipy.stats.t.sf(2, count - 1))
        medians = ("gradient", "weight", "update", "relative_update", "detectable")
        if not members[k]:
            assert all(math.isnan(row[n]) for n in (*medians, "moving", "significant"))
            continue
        means, errors = {}, {}
        for i in members[k]:
            sample = [piece[i] + decay * w[i] for piece in pieces]
            means[i], errors[i] = abs(np.mean(sample)), np.std(sample, ddof=1) / math.sqrt(count)
        significant = sum(means[i] > 2 * errors[i] for i in members[k])
        moving = sum(abs(u[i]) * steps > 0.01 * abs(w[i]) for i in members[k])
        assert row["moving"] == pytest.approx(moving / len(members[k]))
        noise = len(shift & set(members[k]))
        assert abs(row["significant"] * len(members[k]) - significant) <= noise + 1e-9
        for name, values in {
            "gradient": list(means.values()), "weight": [abs(w[i]) for i in members[k]],
            "update": [abs(u[i]) for i in members[k]],
            "relative_update": [abs(u[i]) / max(abs(w[i]), 1e-12) for i in members[k]],
            "detectable": [2 * errors[i] for i in members[k]],
        }.items():  # fmt: skip
            values = sorted(values)  # of an even number, the lower of the two in the middle
            assert row[name] == pytest.approx(values[(len(values) - 1) // 2], rel=1e-9), (k, name)
    assert sum(len(m) for m in members.values()) == len(w) and len([m for m in members.values() if m]) >= 4


def overall(rows, name):
    """A share by checkpoint, over all parameters."""
    counts = [row["parameters"] for row in rows]
    return sum(n * row[name] for n, row in zip(counts, rows, strict=True) if n) / sum(counts)


def test_a_converged_convex_model_is_told_from_an_untrained_one():
    torch.manual_seed(0)
    x = torch.randn(640, 20, dtype=torch.float64)
    y = (x @ torch.randn(20, 4, dtype=torch.float64) + torch.randn(640, 4, dtype=torch.float64)).argmax(1)
    model, decay = nn.Linear(20, 4).double(), 1e-2

    def verdict():
        rest = nn.Linear(20, 4)
        rest.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        parts = list(zip(x.float().tensor_split(64), y.tensor_split(64), strict=True))
        pair = gradient_pair(rest, x.float(), y, 0.05)
        rows = probes.convergence_rows(rest, parts, pair, [torch.zeros_like(p) for p in rest.parameters()], decay, 1)
        return overall(rows, "significant"), rows

    untrained, rows = verdict()
    assert untrained > 0.6 and rows[1]["chance"] == pytest.approx(2 * scipy.stats.t.sf(2, 63))
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y) + decay / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-6
    converged, rows = verdict()
    assert converged < rows[1]["chance"]  # in fact none: the batches are the whole training set
    assert overall(rows, "gradient") < 1e-3 * overall(rows, "detectable")


class Tossed(nn.Module):
    """Two classes, one of them with the logit w x: at w = 0 the gradient of an image is (1/2 - y) x."""

    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), x @ self.w], 1)


def test_of_pure_noise_as_many_parameters_seem_moving_as_chance_says():
    draw = torch.Generator().manual_seed(0)
    size, count = 8000, 12
    x, y = torch.randn(count * 10, size, generator=draw), torch.randint(2, (count * 10,), generator=draw)
    model = Tossed(size)
    pair = gradient_pair(model, x, y, 0.05)
    parts = list(zip(x.split(10), y.split(10), strict=True))
    rows = probes.convergence_rows(model, parts, pair, [torch.zeros(size)], 0.1, 1)
    chance = rows[1]["chance"]
    assert chance == pytest.approx(2 * scipy.stats.t.sf(2, count - 1))
    assert abs(overall(rows, "significant") - chance) < 4 * math.sqrt(chance * (1 - chance) / size)


# Noise by checkpoint


def noisy_net():
    torch.manual_seed(3)
    body = [nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*body).double()


@pytest.mark.parametrize("none_flipped", [False, True])
def test_noise_rows_are_a_loop_over_single_images(none_flipped):
    model, rho = noisy_net(), 0.4
    draw = torch.Generator().manual_seed(0)
    parts = []
    for size in (8, 5):
        x = torch.randn(size, 1, 4, 4, generator=draw, dtype=torch.float64)
        flipped = torch.rand(size, generator=draw) < (0.0 if none_flipped else 0.5)
        parts.append((x, torch.randint(3, (size,), generator=draw), flipped))
    params = list(model.parameters())

    def by_image(x, y):
        """Each image's share of the gradient, with the whole batch's statistics: (images, parameters)."""
        rows = []
        for i in range(len(y)):
            statistics = {k: b.clone() for k, b in model.named_buffers()}
            log_p = model(x).log_softmax(1)
            grads = torch.autograd.grad(-log_p[i, y[i]] / len(y), params)
            for k, b in model.named_buffers():
                b.copy_(statistics[k])
            rows.append([v for t in grads for v in t.flatten().tolist()])
        return rows

    kinds = [
        k
        for p, k in zip(params, ["convolution", *["batchnorm"] * 2, *["linear"] * 2], strict=True)
        for _ in range(p.numel())
    ]
    names = [
        "parameters", "sets_direction", "g_l1", "g_flipped", "g_sam_l1", "g_sam_flipped", "flipped_l1",
        "flipped_sam_l1", "clean_l1", "clean_sam_l1",
    ]  # fmt: skip
    sums = {(c, k): dict.fromkeys(names, 0.0) for k in ("convolution", "batchnorm", "linear") for c in range(5)}
    for x, y, flipped in parts:
        sides = []
        w = [p.detach().clone() for p in params]
        for ascended in (False, True):
            if ascended:
                norm = math.sqrt(sum((a + b) ** 2 for a, b in sides[0]))
                step = torch.tensor([rho * (a + b) / norm for a, b in sides[0]], dtype=torch.float64)
                with torch.no_grad():
                    for p, d in zip(params, step.split([p.numel() for p in params]), strict=True):
                        p.add_(d.reshape(p.shape))
            images = by_image(x, y)
            table = np.array(images)
            dirty, clean = table[flipped.numpy()].sum(0), table[~flipped.numpy()].sum(0)
            sides.append(list(zip(dirty.tolist(), clean.tolist(), strict=True)))
        with torch.no_grad():
            for p, b in zip(params, w, strict=True):
                p.copy_(b)
        pair = gradient_pair(model, x, y, rho)  # the parts add up to g, and to g'
        for total, side in ((pair.g, sides[0]), (pair.g_sam, sides[1])):
            flat = torch.cat([t.flatten() for t in total]).tolist()
            np.testing.assert_allclose([a + b for a, b in side], flat, rtol=1e-9, atol=1e-13)
        for kind, (f, c), (f2, c2) in zip(kinds, *sides, strict=True):
            row = sums[code(f + c, f2 + c2), kind]
            sign, sign2 = (math.copysign(1, v) if v else 0 for v in (f + c, f2 + c2))
            values = (
                1, f * (f + c) > 0 and abs(f) > abs(c), abs(f + c), sign * f, abs(f2 + c2), sign2 * f2,
                abs(f), abs(f2), abs(c), abs(c2),
            )  # fmt: skip
            for name, value in zip(names, values, strict=True):
                row[name] += value
    rows = probes.noise_rows(model, parts, rho)
    assert [(row["checkpoint"], row["kind"]) for row in rows] == list(sums)
    for row in rows:
        expected = sums[row["checkpoint"], row["kind"]]
        assert {n: row[n] for n in names} == pytest.approx(expected, rel=1e-8, abs=1e-12)
        assert (row["batches"], row["images"], row["flipped"]) == (2, 13, int(sum(f.sum() for *_, f in parts)))
        if none_flipped:
            assert row["sets_direction"] == row["flipped_l1"] == row["g_flipped"] == 0
    assert sum(row["parameters"] for row in rows) == 2 * len(kinds)


def test_where_all_images_are_flipped_they_bring_the_whole_gradient():
    model, (x, y) = small(norm=False), batch()
    for row in probes.noise_rows(model, [(x, y, torch.ones(16, dtype=torch.bool))], 0.3):
        assert row["g_flipped"] == pytest.approx(row["g_l1"]) and row["clean_l1"] == 0
        if row["checkpoint"]:
            assert row["sets_direction"] == row["parameters"]
