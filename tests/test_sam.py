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
from samlib.sam import ROW, SAM, SMALL, Mix, mix_gradients_, total_norm

SUBSETS = ["".join(s) for n in range(1, 5) for s in itertools.combinations("1234", n)]
TABLE = {  # design.md, by hand: the eight numbers
    "sgd": ((0, 0, 0, 0), (1, 1, 1, 1)),
    "sam": ((1, 1, 1, 1), (0, 0, 0, 0)),
    "magnitude": ((1, 1, -1, -1), (0, 0, 0, 0)),
    "direction": ((0, 0, 0, 0), (1, 1, -1, -1)),
    "gain1x2": ((0, 0, 0, 0), (2, 1, 1, 1)),
    "gain4x0.5": ((0, 0, 0, 0), (1, 1, 1, 0.5)),
    "scale3x0.1": ((1, 1, 0.1, 1), (0, 0, 0, 0)),
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


def oracle(model, data, name, lr, rho, momentum, decay):
    """SAM's update rule in Python floats, one number after the other; running statistics put back after pass two."""
    params, velocity = list(model.parameters()), None
    for x, y in data:
        g = [t.flatten().tolist() for t in torch.autograd.grad(cross_entropy(model(x), y), params)]
        w = [p.detach().flatten().tolist() for p in params]
        norm = math.sqrt(math.fsum(v * v for t in g for v in t))
        statistics = {k: b.clone() for k, b in model.named_buffers()}
        put(params, [[a + rho * b / norm for a, b in zip(s, t, strict=True)] for s, t in zip(w, g, strict=True)])
        h = [t.flatten().tolist() for t in torch.autograd.grad(cross_entropy(model(x), y), params)]
        for k, b in model.named_buffers():
            b.copy_(statistics[k])
        new, speeds = [], []
        for i in range(len(w)):
            row, speed = [], []
            for j in range(len(w[i])):
                d = direction(name, g[i][j], h[i][j]) + decay * w[i][j]
                v = d if velocity is None else momentum * velocity[i][j] + d
                speed.append(v)
                row.append(w[i][j] - lr * v)
            new.append(row)
            speeds.append(speed)
        velocity = speeds
        put(params, new)


def put(params, rows):
    with torch.no_grad():
        for p, row in zip(params, rows, strict=True):
            p.copy_(torch.tensor(row, dtype=p.dtype).reshape(p.shape))


@pytest.mark.parametrize("name", list(TABLE))
def test_a_mix_is_the_obvious_loop_over_20_steps_with_batchnorm(name):
    ours, theirs = network(), network()
    settings = {"lr": 0.1, "rho": 0.3, "momentum": 0.9}
    train(ours, SAM(ours.parameters(), mix=name, weight_decay=5e-3, **settings), batches(20))
    oracle(theirs, batches(20), name, decay=5e-3, **settings)
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
    oracle(theirs, [(x.double(), y) for x, y in batches(20, torch.float32)], "sam", 0.1, 0.1, 0.9, 0.0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_is_that_of_all_elements_in_float64(dtype):
    draw = torch.Generator().manual_seed(0)
    shapes = [(), (1,), (3, 5), (ROW,), (ROW + 1,), (3 * ROW - 1,), (16, 7, 3, 3), (1536, 1536)]
    tensors = [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]
    tensors.append(tensors[-2].to(memory_format=torch.channels_last))
    tensors += [tensors[-2].T, torch.zeros(0, dtype=dtype)]
    for chosen in (tensors, tensors[:3], tensors[3:4], tensors[-3:], tensors[-1:]):
        exact = torch.cat([t.double().flatten() for t in chosen]).square().sum().sqrt()
        norm = total_norm(chosen)
        assert norm.shape == () and norm.dtype == dtype
        assert norm.item() == pytest.approx(exact.item(), rel=1e-6 if dtype == torch.float32 else 1e-14)
    assert total_norm([]) == 0
    assert total_norm([torch.tensor([1.0, float("nan")])]).isnan()


@pytest.mark.parametrize("compile", [False, True])
def test_small_and_large_tensors_of_several_dtypes_take_the_mix_alike(compile):
    """Small ones are mixed together, large ones by themselves."""
    draw = torch.Generator().manual_seed(0)
    sizes = [1, 7, SMALL, SMALL + 1, 3, 100_000]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float32, torch.float64, torch.float64]
    params = [nn.Parameter(torch.zeros(n, dtype=d)) for n, d in zip(sizes, dtypes, strict=True)]
    g, g_sam = ([torch.randn(n, generator=draw, dtype=d) for n, d in zip(sizes, dtypes, strict=True)] for _ in "ab")
    for name in ("checkpoint24", "gain4x0.5"):
        optimizer = SAM(params, lr=1.0, mix=name, compile=compile)
        for grads, step in ((g, optimizer.first_step), (g_sam, optimizer.second_step)):
            for p, gradient in zip(params, grads, strict=True):
                p.grad = gradient.clone()
            step()
        for p, a, b in zip(params, g, g_sam, strict=True):
            expected = [direction(name, x, y) for x, y in zip(a[:200].tolist(), b[:200].tolist(), strict=True)]
            torch.testing.assert_close(p.grad[:200], torch.tensor(expected, dtype=p.dtype), rtol=0, atol=0)
            mix_gradients_(a, alone := b.clone(), Mix.parse(name))
            assert torch.equal(p.grad, alone)


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


def test_an_update_copies_no_tensor_whatever_its_layout():
    """torch's fused kernel makes contiguous copies of channels_last tensors where it is given them as they are."""
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.05, momentum=0.9)
    for _ in range(2):
        for step in (optimizer.first_step, optimizer.second_step):
            model(torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)).square().sum().backward()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                step()
    names = {event.name for event in profile.events()}
    assert "aten::_fused_sgd_" in names and not names & {"aten::clone", "aten::copy_"}


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


def test_weights_that_are_a_transposed_matrix_take_the_mix():
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for p in (nn.Parameter(w.clone().t()), nn.Parameter(w.t().contiguous())):
        optimizer = SAM([p], lr=0.1, rho=1.0, mix="checkpoint134")

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            (3 * p).sin().sum().backward()

        optimizer.step(closure)
        ends.append(p.detach())
    assert torch.equal(*ends)


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


def test_the_compiled_mix_is_the_eager_one_to_the_bit():
    values = [0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30, 0.5, 1.0, -1.0, 1.5, -1.5, 3e38, float("inf"), -float("inf")]
    specials = torch.tensor(list(itertools.product(values, values))).T
    torch.manual_seed(0)
    pairs = [specials, torch.randn(2, 1001), torch.randn(2, 5, 7), torch.randn(2, 3, 4, 3, 3)]
    ends = []
    for compile in (False, True):
        params = [nn.Parameter(torch.zeros(pair.shape[1:])) for pair in pairs]
        params[3].data = params[3].data.to(memory_format=torch.channels_last)
        optimizer = SAM(params, lr=1.0, rho=0.0, mix="checkpoint134", compile=compile)
        for half, step in enumerate((optimizer.first_step, optimizer.second_step)):
            for p, pair in zip(params, pairs, strict=True):
                p.grad = torch.empty_like(p).copy_(pair[half])
            step()
        ends.append([p.detach() for p in params])
    for a, b in zip(*ends, strict=True):
        assert same(a, b)
    for got, g, h in zip(ends[1][0].tolist(), *specials.tolist(), strict=True):
        assert got == -direction("checkpoint134", g, h) or math.isnan(direction("checkpoint134", g, h))


def test_a_hook_on_the_step_is_called_once_a_step_also_where_torchs_own_sgd_is_in_use():
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)  # from here on its step calls hooks of its own
    w, calls = torch.nn.Parameter(torch.ones(3)), []
    optimizer = SAM([w], lr=0.1, rho=0.05)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert calls == [1]
