"""SAM and its mixes, against closed forms and an obvious float64 loop over single numbers."""

import copy
import io
import itertools
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from samlib.models import frozen_statistics
from samlib.sam import SAM, Mix

SUBSETS = ["".join(s) for n in range(1, 5) for s in itertools.combinations("1234", n)]
TABLE = {  # design.md, by hand: the eight numbers
    "sgd": ((0, 0, 0, 0), (1, 1, 1, 1)),
    "sam": ((1, 1, 1, 1), (0, 0, 0, 0)),
    "magnitude": ((1, 1, -1, -1), (0, 0, 0, 0)),
    "direction": ((0, 0, 0, 0), (1, 1, -1, -1)),
    "gain1x2": ((0, 0, 0, 0), (2, 1, 1, 1)),
    "gain4x0.5": ((0, 0, 0, 0), (1, 1, 1, 0.5)),
    "scale3x0.1": ((1, 1, 0.1, 1), (0, 0, 0, 0)),
    "scale2x0.5": ((1, 0.5, 1, 1), (0, 0, 0, 0)),
    "scale1x0": ((0, 1, 1, 1), (0, 0, 0, 0)),
    "scale2x3": ((1, 3, 1, 1), (0, 0, 0, 0)),
    **{f"checkpoint{s}": (tuple(int(k in s) for k in "1234"), tuple(int(k not in s) for k in "1234")) for s in SUBSETS},
}


def code(g, h):
    """The definition, for one number."""
    if g == 0 or h == 0:
        return 0
    if (g > 0) == (h > 0):
        return 1 if abs(h) >= abs(g) else 2
    return 3 if abs(h) >= abs(g) else 4


def direction(name, g, h):
    a, b = TABLE[name]
    k = max(code(g, h), 1) - 1  # inactive parameters follow class 1
    return a[k] * h + b[k] * g


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*body).to(dtype)


def batches(count, dtype=torch.float64, size=8):
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(size, 1, 4, 4, generator=draw, dtype=dtype), torch.randint(3, (size,), generator=draw)


def half_steps(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.first_step()
    with frozen_statistics(model):
        cross_entropy(model(x), y).backward()
    optimizer.second_step()
    return loss.detach()


def train(model, optimizer, data):
    for x, y in data:
        half_steps(model, optimizer, x, y)


def quadratic(p, scale):
    """0.5 sum scale w^2, whose gradient is scale w."""
    return lambda: (0.5 * scale * p * p).sum().backward()


def same(a, b):
    """Equal to the bit, signs of zeros included."""
    a, b = a.detach(), b.detach()
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def flat_state(model):
    return [t.clone() for t in model.state_dict().values()]


# The closed form


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_sam_step_on_a_quadratic_has_the_closed_form(dtype):
    w, scale, lr, rho, decay = [1.0, -2.0, 0.5, 0.0], [3.0, 0.5, 10.0, 2.0], 0.1, 0.3, 0.01
    p = nn.Parameter(torch.tensor(w, dtype=dtype))
    optimizer = SAM([p], lr=lr, rho=rho, weight_decay=decay)
    s = torch.tensor(scale, dtype=dtype)
    quadratic(p, s)()
    optimizer.first_step()
    quadratic(p, s)()
    optimizer.second_step()
    norm = math.sqrt(sum((a * b) ** 2 for a, b in zip(scale, w, strict=True)))
    # g = A w;  g' = A (w + rho A w / |A w|);  w <- w - lr (g' + decay w)
    for i, (a, b) in enumerate(zip(scale, w, strict=True)):
        expected = b - lr * (a * (b + rho * a * b / norm) + decay * b)
        assert p[i].item() == pytest.approx(expected, rel=1e-14 if dtype == torch.float64 else 1e-6)


def test_the_perturbation_is_along_the_loss_gradient_alone_and_weights_come_back_to_the_bit():
    torch.manual_seed(3)
    tensors = [torch.randn(5, 3), torch.randn(7), torch.randn(()), torch.randn(2, 3, 2, 2)]
    params = [nn.Parameter(t.clone()) for t in tensors]
    optimizer = SAM(params, lr=0.0, rho=0.7, momentum=0.9, weight_decay=100.0, mix="checkpoint13")
    grads = [torch.randn_like(t) for t in tensors]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.first_step()
    norm = math.sqrt(sum(v * v for g in grads for v in g.double().flatten().tolist()))
    for p, t, g in zip(params, tensors, grads, strict=True):
        expected = t.double() + 0.7 * g.double() / norm  # weight decay has no part in it
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-7)
        assert p.grad is None
        p.grad = torch.randn_like(p)
    optimizer.second_step()
    assert all(same(p, t) for p, t in zip(params, tensors, strict=True))


# Every mix against a loop


CONTROLLED = [
    f"{control}-{name}"
    for control in ("shuffled", "rescaled", "length")
    for name in ("sam", "checkpoint1", "checkpoint134", "scale2x0.5", "gain1x2", "magnitude", "direction", "scale1x0")
    if (control, name) != ("shuffled", "sam")
]


SETTINGS = {"lr": 0.1, "rho": 0.3, "momentum": 0.9, "weight_decay": 5e-3}


def length(rows):
    return math.sqrt(math.fsum(v * v for row in rows for v in row))


def warm(name, progress):
    """The eight numbers on the way from SAM's to the mix's."""
    a, b = TABLE[name]
    return [1 + progress * (x - 1) for x in a], [progress * x for x in b]


def oracle(model, data, name, settings, permuted=None, progress=None):
    """The update rule in Python floats, one number after the other; running statistics put back after pass two.

    permuted(step, tensor, codes of its active parameters): their order under the shuffle; progress(step): of the
    warm-up.
    """
    control, _, mix = name.partition("-") if name.startswith(("shuffled", "rescaled", "length")) else ("", "", name)
    params = list(model.parameters())
    velocity = [[0.0] * p.numel() for p in params]
    for step, (x, y) in enumerate(data):
        a, b = warm(mix, 1.0 if progress is None else progress(step))
        g = [t.flatten().tolist() for t in torch.autograd.grad(cross_entropy(model(x), y), params)]
        w = [p.detach().flatten().tolist() for p in params]
        statistics = {k: t.clone() for k, t in model.named_buffers()}
        up = settings["rho"] / length(g)
        put(params, [[u + up * v for u, v in zip(s, t, strict=True)] for s, t in zip(w, g, strict=True)])
        h = [t.flatten().tolist() for t in torch.autograd.grad(cross_entropy(model(x), y), params)]
        for k, t in model.named_buffers():
            t.copy_(statistics[k])
        d = []
        for i in range(len(g)):
            codes = [code(u, v) for u, v in zip(g[i], h[i], strict=True)]
            if control == "shuffled":
                active = [j for j, c in enumerate(codes) if c]
                order = permuted(step, i, [codes[j] for j in active])
                assert sorted(order) == sorted(codes[j] for j in active)
                for j, c in zip(active, order, strict=True):
                    codes[j] = c
            d.append([a[max(c, 1) - 1] * v + b[max(c, 1) - 1] * u for c, u, v in zip(codes, g[i], h[i], strict=True)])
        if control == "rescaled":
            scale = length(g) / length(d)
            d = [[v * scale for v in row] for row in d]
        if control == "length":
            scale = length(d) / length(g)
            d = [[v * scale for v in row] for row in g]
        for i in range(len(w)):
            for j in range(len(w[i])):
                velocity[i][j] = settings["momentum"] * velocity[i][j] + d[i][j] + settings["weight_decay"] * w[i][j]
                w[i][j] -= settings["lr"] * velocity[i][j]
        put(params, w)


def put(params, rows):
    with torch.no_grad():
        for p, row in zip(params, rows, strict=True):
            p.copy_(torch.tensor(row, dtype=p.dtype).reshape(p.shape))


@pytest.fixture
def permutations(monkeypatch):
    """Every permutation that torch draws, in order."""
    drawn, draw = [], torch.randperm

    def record(n, **options):
        drawn.append(draw(n, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "randperm", record)
    return drawn


@pytest.mark.parametrize("name", [*TABLE, *CONTROLLED])
def test_a_mix_is_the_obvious_loop_over_20_steps_with_batchnorm(name, permutations):
    ours, theirs = network(), network()
    train(ours, SAM(ours.parameters(), mix=name, **SETTINGS), batches(20))
    tensors = len(list(theirs.parameters()))
    assert len(permutations) == (20 * tensors if name.startswith("shuffled") else 0)

    def permuted(step, tensor, codes):  # one permutation a tensor and step, of its active parameters alone
        return [codes[k] for k in permutations[step * tensors + tensor].tolist()]

    oracle(theirs, batches(20), name, SETTINGS, permuted)
    for (k, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, k=k: f"{name} {k}: {m}")
    assert ours[1].num_batches_tracked == 20


def test_the_mixes_of_the_loop_lead_to_different_weights():
    ends = {}
    for name in TABLE:
        model = network()
        train(model, SAM(model.parameters(), lr=0.1, rho=0.3, mix=name), batches(5))
        ends[name] = nn.utils.parameters_to_vector(model.parameters()).detach()
    for a, b in itertools.combinations(ends, 2):
        assert torch.allclose(ends[a], ends[b], rtol=0, atol=1e-9) == (TABLE[a] == TABLE[b]), (a, b)


@pytest.mark.parametrize("name", list(TABLE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mix_handles_zeros_denormals_and_ties_as_its_definition(name, dtype):
    tiny = 1e-45 if dtype == torch.float32 else 5e-324
    values = [0.0, -0.0, tiny, -tiny, 2 * tiny, 1e-30, -1e-30, 1.0, -1.0, 1.5, -1.5, 3e38, -3e38]
    g, h = (torch.tensor(v, dtype=dtype) for v in zip(*itertools.product(values, values), strict=True))
    p = nn.Parameter(torch.zeros_like(g))
    optimizer = SAM([p], lr=1.0, rho=0.0, mix=name)
    p.grad = g.clone()
    optimizer.first_step()
    p.grad = h.clone()
    optimizer.second_step()
    for i, (a, b) in enumerate(zip(g.tolist(), h.tolist(), strict=True)):
        assert p[i].item() == torch.tensor(-direction(name, a, b), dtype=dtype).item(), (a, b)


def test_fp32_training_follows_the_float64_loop():
    ours, theirs = network(torch.float32), network(torch.float32).double()
    train(ours, SAM(ours.parameters(), lr=0.1, rho=0.1, momentum=0.9), batches(20, torch.float32))
    settings = {"lr": 0.1, "rho": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    oracle(theirs, [(x.double(), y) for x, y in batches(20, torch.float32)], "sam", settings)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-4)


# rho = 0


@pytest.mark.parametrize("options", [{"fused": True}, {}, {"foreach": True}], ids=str)
def test_rho_zero_is_torchs_fused_sgd_to_the_bit_and_its_others_to_rounding(options):
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    theirs = network(torch.float32)
    sgd = torch.optim.SGD(theirs.parameters(), **settings, **options)
    for x, y in batches(20, torch.float32):
        sgd.zero_grad()
        cross_entropy(theirs(x), y).backward()
        sgd.step()
    for mix in ("sam", "sgd", "checkpoint2", "direction"):
        ours = network(torch.float32)
        train(ours, SAM(ours.parameters(), rho=0.0, mix=mix, **settings), batches(20, torch.float32))
        for (k, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            if options.get("fused"):
                assert torch.equal(a, b), f"{mix}: {k} differs by {(a - b).abs().max()}"
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_mix_sgd_steps_as_torchs_sgd_without_a_closure_and_with_one():
    models = [network(torch.float32) for _ in range(3)]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    sgd = torch.optim.SGD(models[0].parameters(), fused=True, **settings)
    bare, closed = (SAM(m.parameters(), mix="sgd", rho=0.5, **settings) for m in models[1:])
    for x, y in batches(10, torch.float32):
        calls = []

        def closure(model, optimizer, x=x, y=y, calls=calls):
            calls.append(model)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        closure(models[0], sgd)
        sgd.step()
        loss = closure(models[1], bare)
        bare.step()
        assert torch.equal(closed.step(lambda c=closure: c(models[2], closed)), loss)
        assert len(calls) == 3  # no second pass is made
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(flat_state(model), flat_state(models[0]), strict=True))


# Degenerate gradients


@pytest.mark.parametrize("name", ["sam", "checkpoint134", "direction", "scale1x0"])
def test_a_zero_gradient_perturbs_nothing_and_gives_no_nan(name):
    start = torch.tensor([1.0, -2.0, 0.0])
    p = nn.Parameter(start.clone())
    optimizer = SAM([p], lr=0.1, rho=0.5, momentum=0.9, mix=name)
    for _ in range(2):
        p.grad = torch.zeros(3)
        optimizer.first_step()
        assert same(p, start)
        p.grad = torch.zeros(3)
        optimizer.second_step()
        assert torch.equal(p, start)


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-30, 1e-20, 1e18])
@pytest.mark.parametrize("shape", [(), (1,), (50,)])
def test_tiny_and_large_gradients_neither_raise_nor_give_nan(value, shape):
    p = nn.Parameter(torch.ones(shape))
    optimizer = SAM([p], lr=0.1, rho=0.5)
    p.grad = torch.full(shape, value)
    optimizer.first_step()
    assert p.isfinite().all() and ((p.detach() - 1).norm() <= 0.501)
    p.grad = torch.full(shape, value)
    optimizer.second_step()
    assert p.isfinite().all()


def test_parameters_without_a_gradient_stay_and_have_no_part_in_the_norm():
    used, frozen, unused = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = SAM([used, frozen, unused], lr=0.1, rho=1.0, momentum=0.9, weight_decay=0.1, mix="checkpoint1")
    for _ in range(3):
        before = used.detach().clone()
        quadratic(used, torch.ones(2))()
        optimizer.first_step()
        torch.testing.assert_close(used.detach(), before + before / before.norm())
        quadratic(used, torch.ones(2))()
        optimizer.second_step()
        optimizer.zero_grad()
    assert frozen.tolist() == unused.tolist() == [1.0, 2.0]
    assert used.tolist() != [1.0, 2.0]


@pytest.mark.parametrize("name", list(TABLE))
@pytest.mark.parametrize("only", ["first", "second"])
def test_a_gradient_in_only_one_pass_counts_as_zero_in_the_other(name, only):
    settings = {"lr": 0.1, "rho": 0.2, "momentum": 0.9, "weight_decay": 0.1, "mix": name}
    ends = []
    for explicit in (False, True):
        p, other = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([3.0]))
        optimizer = SAM([p, other], **settings)
        for _ in range(2):
            for half, step in (("first", optimizer.first_step), ("second", optimizer.second_step)):
                p.grad = torch.tensor([1.0, 0.5]) if half == only else torch.zeros(2) if explicit else None
                other.grad = torch.tensor([1.0])
                step()
        ends.append((p.detach(), other.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ["sgd", "sam", "checkpoint134"])
def test_a_parameter_whose_gradient_comes_later_starts_its_momentum_then(name):
    ours, theirs = ([nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    optimizer = SAM(ours, lr=0.1, rho=0.0, momentum=0.9, mix=name)
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    for i in range(4):
        for (a, b), opt in ((ours, optimizer), (theirs, sgd)):
            a.grad, b.grad = torch.full((3,), i + 0.7), torch.full((3,), 0.3) if i % 2 else None
            if opt is sgd or name == "sgd":
                opt.step()
            else:
                opt.first_step()
                a.grad, b.grad = torch.full((3,), i + 0.7), torch.full((3,), 0.3) if i % 2 else None
                opt.second_step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# State


def test_a_state_dict_in_the_middle_of_training_continues_to_the_bit():
    for name in ("sam", "checkpoint134", "sgd"):
        data = list(batches(12, torch.float32))
        through = network(torch.float32)
        settings = {"lr": 0.1, "rho": 0.2, "momentum": 0.9, "weight_decay": 5e-4, "mix": name}
        optimizer = SAM(through.parameters(), **settings)
        train(through, optimizer, data[:5])
        file = io.BytesIO()
        torch.save({"model": through.state_dict(), "optimizer": optimizer.state_dict()}, file)
        train(through, optimizer, data[5:])
        file.seek(0)
        state = torch.load(file, weights_only=True)
        resumed = network(torch.float32, seed=9)
        other = SAM(resumed.parameters(), lr=9.0, rho=9.0, mix="sgd" if name != "sgd" else "sam")  # all replaced
        resumed.load_state_dict(state["model"])
        other.load_state_dict(state["optimizer"])
        train(resumed, other, data[5:])
        assert all(torch.equal(a, b) for a, b in zip(flat_state(resumed), flat_state(through), strict=True))
        a, b = optimizer.state_dict(), other.state_dict()
        assert a["param_groups"] == b["param_groups"]
        for i in a["state"]:
            assert torch.equal(a["state"][i]["momentum_buffer"], b["state"][i]["momentum_buffer"])


def test_a_deep_copy_with_its_model_trains_on_as_the_original():
    model = network()
    optimizer = SAM(model.parameters(), lr=0.1, momentum=0.9, mix="checkpoint1")
    data = list(batches(4))
    train(model, optimizer, data[:2])
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, data[2:])
    train(twin, twin_optimizer, data[2:])
    assert all(torch.equal(a, b) for a, b in zip(flat_state(model), flat_state(twin), strict=True))


def test_groups_have_their_own_rho_and_mix_under_one_global_norm():
    w = [[1.0, -2.0], [0.5, 3.0], [4.0, -1.0]]
    settings = [{"rho": 0.1}, {"rho": 2.5, "mix": "checkpoint134", "lr": 0.5}, {"mix": "sgd", "weight_decay": 0.1}]
    params = [nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in w]
    groups = [{"params": [p]} | s for p, s in zip(params, settings, strict=True)]
    optimizer = SAM(groups, lr=0.1, rho=0.7, mix="sam")
    assert [(g["rho"], g["mix"]) for g in optimizer.param_groups] == [
        (0.1, "sam"), (2.5, "checkpoint134"), (0.7, "sgd"),
    ]  # fmt: skip

    def gradients(point):  # of sum of sin(3 w) over everything
        return [[3 * math.cos(3 * v) for v in row] for row in point]

    def closure():
        optimizer.zero_grad()
        loss = sum((3 * p).sin().sum() for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)
    g = gradients(w)
    norm = math.sqrt(sum(v * v for row in g for v in row))
    rho = [0.1, 2.5, 0.7]
    h = gradients([[a + r * b / norm for a, b in zip(*rows, strict=True)] for r, *rows in zip(rho, w, g, strict=True)])
    for i in range(3):
        for j in range(2):
            name, lr, decay = ("sam", "checkpoint134", "sgd")[i], (0.1, 0.5, 0.1)[i], (0, 0, 0.1)[i]
            expected = w[i][j] - lr * (direction(name, g[i][j], h[i][j]) + decay * w[i][j])
            assert params[i][j].item() == pytest.approx(expected, rel=1e-12)


# Layouts


@pytest.mark.parametrize("name", ["sam", "checkpoint134", "sgd"])
def test_channels_last_weights_train_as_contiguous_ones(name):
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        body = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2), nn.Flatten()
        model = nn.Sequential(*body, nn.Linear(2, 3)).double().to(memory_format=layout)
        optimizer = SAM(model.parameters(), lr=0.1, rho=0.3, momentum=0.9, weight_decay=0.01, mix=name)
        for x, y in batches(8):
            half_steps(model, optimizer, x.repeat(1, 2, 1, 1).to(memory_format=layout), y)
        ends.append(flat_state(model))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("layouts", itertools.product(LAYOUTS, LAYOUTS, LAYOUTS), ids="-".join)
def test_any_memory_layout_of_weights_and_gradients_gives_the_same_step(layouts):
    torch.manual_seed(2)
    w, g, h = (torch.randn(2, 3, 4, 5) for _ in range(3))
    ends = []
    for a, b, c in (layouts, ("contiguous",) * 3):
        p = nn.Parameter(LAYOUTS[a](w.clone()))
        optimizer = SAM([p], lr=0.1, rho=0.5, momentum=0.9, mix="checkpoint134")
        for _ in range(2):
            p.grad = LAYOUTS[b](g.clone())
            optimizer.first_step()
            p.grad = LAYOUTS[c](h.clone())
            optimizer.second_step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_weights_whose_layout_changes_in_the_middle_of_training_keep_their_momentum():
    torch.manual_seed(2)
    w, *grads = (torch.randn(2, 3, 4, 5) for _ in range(4))
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(w.clone())
        optimizer = SAM([p], lr=0.1, momentum=0.9, mix="sgd")
        for i, g in enumerate(grads):
            if i == 1:
                p.data = p.data.to(memory_format=layout)
            p.grad = torch.empty_like(p).copy_(g)
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


# Use


def test_step_with_a_closure_is_the_two_half_steps_to_the_bit():
    for name in ("sam", "checkpoint24", "gain1x2"):
        halves, whole = network(torch.float32), network(torch.float32)
        settings = {"lr": 0.1, "rho": 0.2, "momentum": 0.9, "weight_decay": 5e-4, "mix": name}
        first, second = SAM(halves.parameters(), **settings), SAM(whole.parameters(), **settings)
        for x, y in batches(6, torch.float32):
            passes = []

            def closure(x=x, y=y, passes=passes, second=second, whole=whole):
                passes.append(1)
                second.zero_grad()
                if len(passes) == 1:
                    loss = cross_entropy(whole(x), y)
                else:
                    with frozen_statistics(whole):
                        loss = cross_entropy(whole(x), y)
                loss.backward()
                return loss

            with torch.no_grad():  # the closure gets its gradients all the same
                returned = second.step(closure)
            assert torch.equal(returned, half_steps(halves, first, x, y))  # the loss before the update
            assert len(passes) == 2
        assert all(torch.equal(a, b) for a, b in zip(flat_state(halves), flat_state(whole), strict=True))


def test_half_steps_out_of_order_raise_and_leave_the_weights():
    p = nn.Parameter(torch.ones(2))
    optimizer = SAM([p], lr=0.1)
    with pytest.raises(RuntimeError, match="without first_step"):
        optimizer.second_step()
    p.grad = torch.ones(2)
    optimizer.first_step()
    up = p.detach().clone()
    with pytest.raises(RuntimeError, match="twice"):
        optimizer.first_step()
    assert same(p, up)
    p.grad = torch.ones(2)
    optimizer.second_step()
    with pytest.raises(RuntimeError, match="without first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()


def test_a_step_without_any_gradient_changes_nothing():
    p = nn.Parameter(torch.ones(2))
    optimizer = SAM([p], lr=0.1, weight_decay=1.0, mix="checkpoint1")
    optimizer.first_step()
    optimizer.second_step()
    assert p.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), -float("inf")])
def test_a_radius_out_of_range_is_refused(rho):
    with pytest.raises(ValueError, match="rho"):
        SAM([nn.Parameter(torch.ones(1))], lr=0.1, rho=rho)
    optimizer = SAM([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": rho})


@pytest.mark.parametrize("name", list(TABLE))
def test_a_name_gives_the_eight_numbers_of_the_design(name):
    mix = Mix.parse(name)
    assert (mix.a, mix.b) == TABLE[name]
    assert mix.name == name
    assert mix.second_pass == (name != "sgd")


BAD = [
    "", "SAM", "sam ", " sam", "sam\n", "checkpoint", "checkpoint5", "checkpoint0", "checkpoint11", "checkpoint21",
    "checkpoint1,2", "checkpoint134\n", "scale5x1", "scale0x1", "scale1", "scale12x2", "scalex2", "gain1x", "gain1x-1",
    "gain1xnan", "gain1xinf", "gain1x1e3", "gain1x.5", "gain1x2.", "gain1x1000001", "gain1x" + "9" * 400, "gain1X2",
    "gain1x\u0662", "checkpoint\u0661", "sgd+sam", "adam", "none",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=lambda n: repr(n)[:20])
def test_a_name_that_is_no_mix_is_refused_with_its_name(name):
    with pytest.raises(ValueError, match="mix") as error:
        Mix.parse(name)
    assert repr(name) in str(error.value)
    with pytest.raises(ValueError, match="mix"):
        SAM([nn.Parameter(torch.ones(1))], lr=0.1, mix=name)


def test_a_learning_rate_schedule_works_without_a_warning():
    p = nn.Parameter(torch.ones(1))
    optimizer = SAM([p], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        expected = 1.0
        for epoch in range(4):
            lr = 0.05 * (1 + math.cos(math.pi * epoch / 4))
            for half in (optimizer.first_step, optimizer.second_step):
                p.grad = torch.ones(1)
                half()
            expected -= lr
            assert p.item() == pytest.approx(expected)
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def held(optimizer):
    """Elements of the tensors that the optimizer holds beside parameters, each storage once."""
    own = {p.data_ptr() for g in optimizer.param_groups for p in g["params"]}
    found = {}

    def look(value):
        if isinstance(value, torch.Tensor):
            if value.data_ptr() not in own:
                found[value.data_ptr()] = value.numel()
        elif isinstance(value, dict):
            for item in value.values():
                look(item)
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                look(item)

    look(vars(optimizer))
    return sum(found.values())


@pytest.mark.parametrize("name, most", [("sgd", 0), ("sam", 1), ("checkpoint134", 2)])
def test_memory_beyond_sgds_is_one_copy_and_one_more_only_where_the_mix_needs_g(name, most):
    params = [nn.Parameter(torch.randn(100, 10)), nn.Parameter(torch.randn(7))]
    size = 1007
    optimizer = SAM(params, lr=0.1, momentum=0.9, mix=name)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        if name == "sgd":
            optimizer.step()
        else:
            optimizer.first_step()
            momentum = sum(s["momentum_buffer"].numel() for s in optimizer.state.values())
            assert held(optimizer) - momentum <= most * size
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.second_step()
        assert held(optimizer) <= (1 + min(most, 1)) * size  # momentum, and the copy of the weights that is kept


@pytest.mark.parametrize("halves", [False, True])
def test_a_hook_on_the_step_is_called_once_a_step_also_where_torchs_own_sgd_is_in_use(halves):
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)  # from here on its step calls hooks of its own
    w, calls = torch.nn.Parameter(torch.ones(3)), []
    optimizer = SAM([w], lr=0.1, rho=0.05)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    if halves:
        for half in (optimizer.first_step, optimizer.second_step):
            closure()
            half()
    else:
        optimizer.step(closure)
    assert calls == ["before", "after"]


# The controls


def test_a_shuffle_puts_each_active_parameter_anywhere_in_its_tensor_with_one_probability():
    g, h = torch.ones(6), torch.tensor([2.0, 0.5, 2.0, 2.0, 0.0, 2.0])  # one of five active is in checkpoint 2
    mix, found = Mix.parse("shuffled-scale2x0"), torch.zeros(6)
    draws = 2000
    for seed in range(draws):
        (d,) = mix.update([g], [h], seed)
        found += (d == 0) & (h != 0)
    assert found[4] == 0 and found.sum() == draws
    share = 1 / 5
    assert (found[[0, 1, 2, 3, 5]] / draws - share).abs().max() < 4 * math.sqrt(share * (1 - share) / draws)


def test_the_shuffle_follows_from_seed_and_step_and_not_from_the_global_generator():
    ends = {}
    for seed, noise in ((0, 0), (0, 1), (1, 0)):
        model = network(torch.float32)
        optimizer = SAM(model.parameters(), mix="shuffled-checkpoint13", seed=seed, **SETTINGS)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        train(model, optimizer, batches(4, torch.float32))
        assert torch.equal(torch.get_rng_state(), before)
        ends[seed, noise] = flat_state(model)
    assert all(torch.equal(a, b) for a, b in zip(ends[0, 0], ends[0, 1], strict=True))
    assert not torch.equal(ends[0, 0][0], ends[1, 0][0])


def test_the_norms_of_a_control_are_of_its_group_alone():
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    optimizer = SAM([{"params": [p]} for p in params], lr=1.0, rho=0.0, mix="rescaled-sam")
    for grads, step in (
        (([3.0, 4.0], [0.0, 1.0]), optimizer.first_step),
        (([0.0, 1.0], [8.0, 6.0]), optimizer.second_step),
    ):
        for p, v in zip(params, grads, strict=True):
            p.grad = torch.tensor(v)
        step()
    torch.testing.assert_close(params[0].detach(), -torch.tensor([0.0, 5.0]))
    torch.testing.assert_close(params[1].detach(), -torch.tensor([0.8, 0.6]))


@pytest.mark.parametrize("name", ["rescaled-scale1x0", "length-sam", "rescaled-direction"])
def test_controls_of_zero_gradients_are_zero_and_no_nan(name):
    one, zero = torch.ones(3), torch.zeros(3)
    for g, h in ((zero, zero), (zero, one), (one, zero), (one, 2 * one), (1e-30 * one, one)):
        (d,) = Mix.parse(name).update([g], [h])
        assert d.isfinite().all()
        if not g.any():
            assert not d.any()


@pytest.mark.parametrize(
    "name, words",
    [
        ("shuffled-sgd", "neither sgd nor a control"),
        ("rescaled-sgd", "neither sgd nor a control"),
        ("length-gain1x1", "neither sgd nor a control"),  # sgd by another name
        ("shuffled-sam", "treats all checkpoints alike"),
        ("shuffled-checkpoint1234", "treats all checkpoints alike"),
        ("shuffled-rescaled-checkpoint1", "neither sgd nor a control"),
        ("length-length-sam", "neither sgd nor a control"),
        ("shuffled-", "'' is unknown"),
        ("shuffled", "'shuffled' is unknown"),
        ("rescaled-none", "'none' is unknown"),
        ("Rescaled-sam", "'Rescaled-sam' is unknown"),
        ("sam-rescaled", "'sam-rescaled' is unknown"),
    ],
)
def test_a_control_that_makes_no_sense_is_refused_in_one_sentence(name, words):
    with pytest.raises(ValueError, match="^mix") as error:
        Mix.parse(name)
    assert words in str(error.value) and "\n" not in str(error.value)


# The warm-up


@pytest.mark.parametrize(
    "name", ["scale2x0.5", "checkpoint134", "gain1x2", "rescaled-checkpoint2", "shuffled-direction"]
)
def test_a_warm_up_goes_linearly_from_sams_numbers(name, permutations):
    ours, theirs = network(), network()
    optimizer = SAM(ours.parameters(), mix=name, **SETTINGS)
    for step, batch in enumerate(batches(6)):
        optimizer.param_groups[0]["mix_progress"] = min(1.0, step / 4)
        train(ours, optimizer, [batch])
    orders = iter(permutations)

    def permuted(step, tensor, codes):
        return [codes[k] for k in next(orders).tolist()] if step else codes  # SAM at first: nothing to shuffle

    oracle(theirs, batches(6), name, SETTINGS, permuted, lambda step: min(1.0, step / 4))
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_saner_warms_its_factor_from_1_to_alpha_and_leaves_the_other_classes_to_sam():
    factors = [Mix.parse("scale2x0.5").warmed(t) for t in (0.0, 0.5, 1.0)]
    assert [m.a for m in factors] == [(1, 1, 1, 1), (1, 0.75, 1, 1), (1, 0.5, 1, 1)]
    assert all(m.b == (0, 0, 0, 0) for m in factors)


# What must not happen between the half-steps (and after)


@pytest.mark.parametrize("name", [*TABLE, *CONTROLLED])
def test_rho_zero_gives_sgd_to_the_bit_wherever_the_mix_takes_each_gradient_once(name):
    mix = Mix.parse(name)
    once = all(a + b == 1 for a, b in zip(mix.a, mix.b, strict=True)) or (mix.a[0], mix.b[0]) in ((1, 0), (0, 1))
    ends = []
    for kind in ({"mix": name, "rho": 0.0}, {"mix": "sgd"}):  # g' = g: every parameter is in class 1, or inactive
        model = network(torch.float32)
        optimizer = SAM(model.parameters(), **(SETTINGS | kind))
        for x, y in batches(6, torch.float32):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            if kind["mix"] != "sgd":
                optimizer.first_step()
                with frozen_statistics(model):
                    cross_entropy(model(x), y).backward()
                optimizer.second_step()
            else:
                optimizer.step()
        ends.append(flat_state(model))
    same_ends = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    if name.startswith("shuffled") or not mix.control:
        assert same_ends == once
    elif once or mix.control == "rescaled" and mix.a[0] + mix.b[0]:  # the norms cancel, to rounding
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "sam", "checkpoint134", "length-sam", "direction"])
def test_gradient_buffers_that_the_second_pass_overwrites_change_nothing(name):
    """As DistributedDataParallel(gradient_as_bucket_view=True) keeps them: .grad is the same memory in every pass."""
    ends = []
    for persistent in (False, True):
        p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 0.5]))
        optimizer, buffer = SAM([p], lr=0.1, rho=0.5, momentum=0.9, mix=name), torch.zeros(4)
        for _ in range(4):
            for half in (optimizer.first_step, optimizer.second_step):
                gradient = torch.autograd.grad((3 * p).sin().sum(), p)[0]
                p.grad = buffer.copy_(gradient) if persistent else gradient
                half()
        ends.append(p.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ["sam", "checkpoint134"])
def test_an_exception_in_the_second_pass_leaves_weights_and_momentum_as_they_were(error, name):
    model = network(torch.float32)
    optimizer = SAM(model.parameters(), mix=name, **SETTINGS)
    *first, (x, y) = batches(4, torch.float32)
    train(model, optimizer, first)
    weights, momentum = flat_state(model), copy.deepcopy(optimizer.state_dict())
    passes = []

    def closure(fails=True):
        passes.append(1)
        if fails and len(passes) == 2:
            raise error
        optimizer.zero_grad()
        with frozen_statistics(model):
            loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert all(same(a, b) for a, b in zip(flat_state(model), weights, strict=True))
    assert optimizer.state_dict()["param_groups"] == momentum["param_groups"]
    for i, state in optimizer.state_dict()["state"].items():
        assert same(state["momentum_buffer"], momentum["state"][i]["momentum_buffer"])
    optimizer.step(lambda: closure(fails=False))  # and it goes on


@pytest.mark.parametrize("order", ["optimizer alone", "optimizer first", "model first"])
def test_a_state_loaded_between_the_half_steps_ends_in_its_own_weights(order):
    model = network(torch.float32)
    optimizer = SAM(model.parameters(), **SETTINGS)
    *data, (x, y) = batches(4, torch.float32)
    kept, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, data)
    before = copy.deepcopy(model.state_dict())
    cross_entropy(model.eval()(x), y).backward()
    optimizer.first_step()
    if order == "model first":
        model.load_state_dict(kept)
    optimizer.load_state_dict(state)
    if order == "optimizer first":
        model.load_state_dict(kept)
    expected = before if order == "optimizer alone" else kept
    assert all(same(a, b) for a, b in zip(model.state_dict().values(), expected.values(), strict=True))
    with pytest.raises(RuntimeError, match="without first_step"):
        optimizer.second_step()


def test_a_state_of_torchs_sgd_loads_and_keeps_rho_and_mix():
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    model, plain = network(torch.float32), network(torch.float32)
    sgd = torch.optim.SGD(plain.parameters(), fused=True, **settings)
    ours = SAM(model.parameters(), lr=9.0, rho=0.0, mix="checkpoint2")
    data = list(batches(6, torch.float32))

    def step(x, y):
        sgd.zero_grad()
        cross_entropy(plain(x), y).backward()
        sgd.step()

    for batch in data[:3]:
        step(*batch)
    model.load_state_dict(plain.state_dict())
    ours.load_state_dict(copy.deepcopy(sgd.state_dict()))  # torch would share the buffers
    (group,) = ours.param_groups
    assert (group["rho"], group["mix"], group["lr"], group["momentum"]) == (0.0, "checkpoint2", 0.1, 0.9)
    for batch in data[3:]:
        step(*batch)
    train(model, ours, data[3:])
    assert all(torch.equal(a, b) for a, b in zip(flat_state(model), flat_state(plain), strict=True))


@pytest.mark.parametrize("option", [{"nesterov": True}, {"maximize": True}, {"dampening": 0.5}], ids=str)
def test_a_state_of_a_rule_that_sam_does_not_have_is_refused(option):
    p = nn.Parameter(torch.ones(2))
    other = torch.optim.SGD([p], lr=0.1, momentum=0.9, **option).state_dict()
    with pytest.raises(ValueError, match=f"an optimizer with {next(iter(option))}, which SAM does not have"):
        SAM([p], lr=0.1).load_state_dict(other)


@pytest.mark.parametrize("name", ["sam", "sgd", "checkpoint2"])
def test_a_sparse_gradient_is_refused_before_anything_moves(name):
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = SAM(table.parameters(), lr=0.1, mix=name)
    before = table.weight.detach().clone()
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients only"):
        optimizer.first_step() if name != "sgd" else optimizer.step()
    assert same(table.weight, before)


def test_a_gradient_scaler_steps_sgd_as_torchs_and_is_told_what_sam_needs():
    ends = []
    for make in (lambda p: SAM(p, lr=0.1, momentum=0.9, mix="sgd"), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
        model, scaler = network(torch.float32), torch.amp.GradScaler("cpu")
        optimizer = make(model.parameters())
        for x, y in batches(3, torch.float32):
            optimizer.zero_grad()
            scaler.scale(cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(flat_state(model))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    model, scaler = network(torch.float32), torch.amp.GradScaler("cpu")
    optimizer = SAM(model.parameters(), lr=0.1)
    scaler.scale(cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="call step\\(closure\\), or first_step and second_step"):
        scaler.step(optimizer)


@pytest.mark.parametrize("name", ["sam", "checkpoint134", "sgd"])
def test_weights_whose_dtype_changes_in_the_middle_of_training_go_on_in_it(name):
    model, whole = network(torch.float32), network(torch.float32).double()
    optimizer, other = (SAM(m.parameters(), mix=name, **SETTINGS) for m in (model, whole))
    data = [(x.float().double(), y) for x, y in batches(6)]
    train(model, optimizer, [(x.float(), y) for x, y in data[:3]])
    train(model.double(), optimizer, data[3:])
    train(whole, other, data)
    for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*TABLE, "rescaled-sam", "shuffled-checkpoint2", "length-direction"])
@pytest.mark.parametrize("half", ["first", "second"])
def test_a_nan_gradient_shows_as_a_nan(name, half):
    if name == "sgd" and half == "second":
        return
    p = nn.Parameter(torch.ones(3))
    optimizer = SAM([p], lr=0.1, rho=0.5, mix=name)
    bad = torch.tensor([1.0, math.nan, 2.0])
    p.grad = bad.clone() if half == "first" else torch.ones(3)
    optimizer.first_step()
    assert bool(p.isnan().any()) == (half == "first")
    p.grad = 0.5 * p.detach() if half == "first" else bad.clone()  # a gradient that depends on the weights
    optimizer.second_step()
    assert p.isnan().any()


def test_the_norm_of_millions_of_gradients_is_theirs_to_one_part_in_ten_thousand():
    draw = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(3_000_000))
    optimizer = SAM([p], lr=0.1, rho=1.0)
    p.grad = torch.randn(3_000_000, generator=draw) * 1e-3
    optimizer.first_step()
    assert p.detach().double().norm().item() == pytest.approx(1.0, rel=1e-4)
