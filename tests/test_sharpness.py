import math

import numpy as np
import pytest
import scipy.sparse.linalg as sparse
import torch
from torch import nn
from torch.func import functional_call

from samlib.models import build_model, softplus_for_relu
from samlib.sharpness import (
    ascent_sharpness,
    gauss_newton_diagonal,
    hessian_eigenvalues,
    hessian_rows,
    hessian_trace,
    loss_gradient,
    loss_value,
    normalized,
    random_direction_sharpness,
    sharpness_rows,
)


class Quadratic(nn.Module):
    """Two classes whose cross entropy, for label 0, is exactly q(w) = 9 + b.w + 1/2 w.A w."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, w: torch.Tensor, split: int) -> None:
        super().__init__()
        self.a, self.b = a, b
        self.u, self.v = nn.Parameter(w[:split].clone()), nn.Parameter(w[split:].clone())

    def forward(self, x):
        w = torch.cat([self.u, self.v])
        z = torch.log(torch.expm1(9 + self.b @ w + w @ self.a @ w / 2))  # log(1 + e^z) = q
        return torch.stack([torch.zeros_like(z), z]).expand(len(x), 2)


def quadratic(isotropic=False, at_minimum=False):
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a = root @ root.T
    if isotropic:  # each of the two tensors its own curvature
        a = torch.diag(torch.tensor([3.0] * 2 + [0.5] * 4, dtype=torch.float64))
    w = 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)
    b = -a @ w if at_minimum else torch.randn(6, generator=generator, dtype=torch.float64)
    return Quadratic(a, b, w, 2), torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64)


class Counting(nn.Module):
    """A small network with BatchNorm, that can raise at a given forward pass."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
        )
        self.passes, self.fails_at = 0, math.inf

    def forward(self, x):
        self.passes += 1
        if self.passes >= self.fails_at:
            raise RuntimeError("out of memory, say")
        return self.body(x)


def network(images=7, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Counting().to(dtype)
        model.body[1].running_mean.normal_()
        model.body[1].running_var.uniform_(0.5, 2)
        return model, torch.randn(images, 2, 4, 4, dtype=dtype), torch.randint(3, (images,))


def dense_hessian(model, x, y):
    """By torch.func, of evaluation-mode loss over the concatenated parameters."""
    model.eval()
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(vector):
        parts = vector.split([p.numel() for p in params.values()])
        state = {n: part.view_as(p) for (n, p), part in zip(params.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, state, (x,)), y)

    result = torch.func.hessian(loss)(torch.cat([p.flatten() for p in params.values()]))
    model.train()
    return result


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_ascent_sharpness_of_a_quadratic_is_its_closed_form():
    model, x, y = quadratic()
    w = flat(model.parameters()).detach()
    g = model.b + model.a @ w
    rho = 0.05
    expected = rho * g.norm() + rho**2 / 2 * (g @ model.a @ g) / g.norm() ** 2
    assert ascent_sharpness(model, x, y, rho) == pytest.approx(expected.item(), rel=1e-9)
    assert ascent_sharpness(model, x, y, 0.0) == 0


def test_ascent_sharpness_is_zero_without_a_gradient_and_not_a_number_where_the_weights_are_not():
    model, x, y = network()
    model.body[1].weight.data.zero_()
    model.body[1].bias.data.zero_()
    model.body[4].weight.data.zero_()
    model.body[4].bias.data.zero_()  # every image has the chances 1/3
    y = torch.arange(6) % 3  # and each class as many
    assert ascent_sharpness(model, x[:6], y, 0.1) == 0
    model.body[4].bias.data.fill_(math.nan)
    assert math.isnan(ascent_sharpness(model, x[:6], y, 0.1))


def random(model, x, y, **settings):
    return random_direction_sharpness(model, x, {"": y}, **settings)["", "raw"]


def test_random_direction_sharpness_of_an_isotropic_quadratic_is_exact_in_every_pair_whatever_its_slope():
    model, x, y = quadratic(isotropic=True)
    u, v = model.u.detach(), model.v.detach()
    result = random(model, x, y, scale=0.1, pairs=6)
    assert result["value"] == pytest.approx((0.01 * (3 * u @ u + 0.5 * v @ v) / 2).item(), rel=1e-9)
    assert result["std"] < 1e-12 and result["n"] == 6


def test_random_direction_sharpness_has_the_mean_that_the_hessian_trace_per_tensor_gives():
    model, x, y = quadratic()
    u, v, a = model.u.detach(), model.v.detach(), model.a
    expected = 0.2**2 / 2 * (u @ u * a[:2, :2].trace() / 2 + v @ v * a[2:, 2:].trace() / 4)
    result = random(model, x, y, scale=0.2, pairs=2000, seed=1)
    assert abs(result["value"] - expected.item()) < 4 * result["std"] / math.sqrt(2000)
    assert result["std"] / math.sqrt(2000) < 0.1 * expected  # the test can fail


def test_normalized_logits_have_mean_0_and_deviation_1_and_a_loss_that_their_size_cannot_change():
    model, x, y = network()
    z = 3 + 5 * torch.randn(50, 4, dtype=torch.float64)
    result = normalized(z)
    torch.testing.assert_close(result.mean(1), torch.zeros(50).double())
    torch.testing.assert_close(result.std(1, correction=0), torch.ones(50).double())
    assert torch.equal(normalized(torch.full((1, 4), 2.5)), torch.zeros(1, 4))
    before = {kind: loss_value(model, x, y, kind) for kind in ("raw", "normalized")}
    with torch.no_grad():
        model.body[4].weight *= 100
        model.body[4].bias *= 100
    assert loss_value(model, x, y, "normalized") == pytest.approx(before["normalized"], rel=1e-12)
    assert abs(loss_value(model, x, y, "raw") - before["raw"]) > 1


def test_a_network_that_only_grows_its_logits_looks_flat_in_the_raw_loss_and_unchanged_in_the_normalized():
    """What saturates where SGD fits its labels: the same decisions, a last layer a hundred times as large."""
    model, x, _ = network(images=40)
    model.eval()
    y = model(x).argmax(1)  # all right
    values = []
    for factor in (1, 100):
        with torch.no_grad():
            model.body[4].weight *= factor
            model.body[4].bias *= factor
        result = random_direction_sharpness(model, x, {"": y}, scale=0.01)
        values.append([result["", kind]["value"] for kind in ("raw", "normalized")])
    assert values[1][1] == pytest.approx(values[0][1], rel=1e-6)
    assert loss_value(model, x, y) < 0.05


@pytest.mark.parametrize("logits", ["raw", "normalized"])
def test_the_gradient_of_either_loss_is_the_one_of_finite_differences(logits):
    model, x, y = network()
    g = loss_gradient(model, x, y, logits)[-2]
    p = model.body[4].weight
    for index in ((0, 0), (2, 7)):
        sides = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p[index] += step
            sides.append(loss_value(model, x, y, logits))
            with torch.no_grad():
                p[index] -= step
        assert g[index].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-9)


def activated(activation):
    """The small network with another activation, in float64."""
    model, x, y = network()
    model.body[2] = activation()
    return model, x, y


@pytest.mark.parametrize("bytes_at_a_time", [1, 2**26])
def test_the_gauss_newton_diagonal_is_that_of_the_dense_matrix_and_of_a_relu_networks_hessian(
    bytes_at_a_time, monkeypatch
):
    monkeypatch.setattr("samlib.sharpness.JACOBIAN_BYTES", bytes_at_a_time)
    for activation, same in ((nn.ReLU, True), (nn.Softplus, False)):
        model, x, y = activated(activation)
        diagonal = flat(gauss_newton_diagonal(model, x))
        assert model.training
        hessian = dense_hessian(model, x, y).diagonal()
        model.eval()
        dense = torch.zeros_like(diagonal)
        for image in x:  # J (classes, parameters), slowly
            z = model(image[None])[0]
            params = list(model.parameters())
            rows = [flat(torch.autograd.grad(z[c], params, retain_graph=True)) for c in range(3)]
            jacobian, p = torch.stack(rows), z.detach().softmax(0)
            dense += (jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian).diagonal() / len(x)
        torch.testing.assert_close(diagonal, dense, rtol=1e-10, atol=1e-15)
        assert (diagonal >= 0).all()
        assert torch.allclose(diagonal, hessian, rtol=1e-8, atol=1e-13) == same


def test_softplus_for_relu_keeps_the_weights_and_puts_the_relus_back():
    model = build_model("resnet6", 2, "cifar", 1, 3, 0).eval()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before, weights = model(x), [id(p) for p in model.parameters()]
    with pytest.raises(RuntimeError), softplus_for_relu(model):
        assert not any(isinstance(m, nn.ReLU) for m in model.modules())
        assert [id(p) for p in model.parameters()] == weights and not torch.equal(model(x), before)
        raise RuntimeError
    assert torch.equal(model(x), before)
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared)
    with softplus_for_relu(twice):
        assert not any(isinstance(m, nn.ReLU) for m in twice.modules())
    assert twice[1] is twice[3] is shared


def test_random_directions_follow_from_the_seed_alone():
    model, x, y = network()
    state = torch.random.get_rng_state()
    first = random(model, x, y, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert random(model, x, y, seed=5) == first
    assert random(model, x, y, seed=6) != first


def test_loss_and_gradient_in_chunks_are_those_of_the_whole_sample():
    model, x, y = network(images=1100)
    model.eval()
    loss = nn.functional.cross_entropy(model(x), y)
    assert loss_value(model, x, y) == pytest.approx(loss.item(), rel=1e-12)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss_gradient(model, x, y), list(expected))


def test_eigenvalues_are_the_dense_hessians_within_their_residuals():
    model, x, y = network(images=150)  # two unequal chunks
    dense = torch.linalg.eigvalsh(dense_hessian(model, x, y)).flip(0)[:3].numpy()
    values, residuals = hessian_eigenvalues(model, x, y, k=3)
    assert np.all(np.abs(values - dense) <= residuals + 1e-10)
    assert np.all(residuals <= 2e-3 * values)
    np.testing.assert_array_equal(hessian_eigenvalues(model, x, y, k=3)[0], values)  # and again the same


def test_largest_eigenvalues_are_algebraic_not_of_magnitude():
    model, x, y = quadratic()
    model.a = torch.diag(torch.tensor([-9.0, 3.0, 2.0, 0.1, 0.0, 1.0], dtype=torch.float64))
    model.u.data.zero_(), model.v.data.zero_()
    values, _ = hessian_eigenvalues(model, x, y, k=2)
    np.testing.assert_allclose(values, [3, 2], rtol=1e-8)


def test_eigenvalues_of_a_zero_hessian_are_zero_and_of_a_diverged_model_not_a_number():
    model, x, y = quadratic()
    model.a, model.b = 0 * model.a, 0 * model.b
    assert hessian_eigenvalues(model, x, y)[0].tolist() == [0, 0]
    model.u.data.fill_(math.nan)
    assert np.isnan(hessian_eigenvalues(model, x, y)).all()


def test_an_eigenvalue_that_did_not_converge_is_not_a_number_beside_those_that_did(monkeypatch):
    model, x, y = quadratic()
    dense, vectors = torch.linalg.eigh(model.a)

    def stops_early(*args, **kwargs):
        raise sparse.ArpackNoConvergence("", dense[-1:].numpy(), vectors[:, -1:].numpy())

    monkeypatch.setattr(sparse, "eigsh", stops_early)
    values, residuals = hessian_eigenvalues(model, x, y, k=2)
    assert values[0] == dense[-1] and residuals[0] < 1e-10
    assert np.isnan([values[1], residuals[1]]).all()


def test_the_trace_is_the_dense_hessians_within_a_few_standard_errors_which_are_those_of_theory():
    model, x, y = network()
    dense = dense_hessian(model, x, y)
    trace, error = hessian_trace(model, x, y, samples=200, seed=0)
    assert abs(trace - dense.trace()) < 4 * error
    off = dense - torch.diag(dense.diagonal())
    assert error == pytest.approx((2 * off.square().sum() / 200).sqrt().item(), rel=0.3)


def test_the_trace_of_a_diagonal_hessian_is_exact():
    model, x, y = quadratic(isotropic=True)
    trace, error = hessian_trace(model, x, y, samples=3, seed=0)
    assert trace == pytest.approx(model.a.trace().item()) and error < 1e-12


MEASURES = [
    lambda model, x, y: random(model, x, y, pairs=3),
    lambda model, x, y: ascent_sharpness(model, x, y, 0.1),
    lambda model, x, y: hessian_eigenvalues(model, x, y),
    lambda model, x, y: hessian_trace(model, x, y, 3, 0),
    lambda model, x, y: gauss_newton_diagonal(model, x),
]


@pytest.mark.parametrize("measure", MEASURES, ids=["random", "ascent", "eigenvalues", "trace", "diagonal"])
@pytest.mark.parametrize("fails_at", [math.inf, 3, 2, 1])
def test_weights_statistics_modes_and_gradients_come_back_bit_for_bit_also_when_a_pass_raises(
    measure, fails_at, monkeypatch
):
    monkeypatch.setattr("samlib.sharpness.JACOBIAN_BYTES", 1)  # a pass an image
    model, x, y = network(dtype=torch.float32)
    model.train()
    model.body[2].eval()  # a mode of its own
    model.fails_at = fails_at
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    tensors = [id(p) for p in model.parameters()]
    if fails_at == math.inf:
        measure(model, x, y)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            measure(model, x, y)
    assert all(torch.equal(t.view(-1), before[n].view(-1)) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == tensors
    assert all(p.grad is None for p in model.parameters())


def test_rows_name_every_measure_and_labels_and_the_curvature_of_a_resnet():
    model = build_model("resnet10", 4, "cifar", 1, 3, 0)
    x, y = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    labels = {"trained": y, "true": (y + 1) % 3}
    rows = sharpness_rows(model, x, labels, rhos=[0.1, 0.2], seed=2)
    names = [(r["measure"], r["labels"], r["logits"], r["setting"], r["n"]) for r in rows]
    kinds = [(name, logits) for name in labels for logits in ("raw", "normalized")]
    assert names == [("random", *kind, 0.05, 5) for kind in kinds] + [
        ("ascent", *kind, rho, 1) for kind in kinds for rho in (0.1, 0.2)
    ]
    assert {tuple(row) for row in rows} == {("measure", "labels", "logits", "setting", "value", "std", "n")}
    single = random(model, x, labels["true"], seed=2)
    assert (rows[2]["value"], rows[2]["std"]) == (single["value"], single["std"])
    assert rows[8]["value"] == ascent_sharpness(model, x, labels["true"], 0.1) > 0
    assert rows[11]["value"] == ascent_sharpness(model, x, labels["true"], 0.2, "normalized") > 0

    values, residuals = hessian_eigenvalues(model, x, y)
    assert values[0] > values[1] > 0 and residuals[0] < 2e-3 * values[0]
    trace, error = hessian_trace(model, x, y, samples=2, seed=0)
    rows = hessian_rows(model, x, y, samples=2, seed=0)
    assert [row["quantity"] for row in rows] == ["eigenvalue1", "eigenvalue2", "trace"]
    assert [(row["value"], row["error"]) for row in rows[:2]] == list(zip(values, residuals, strict=True))
    assert rows[2] == {"quantity": "trace", "value": trace, "error": error, "samples": 2}


def test_values_out_of_range_are_refused():
    model, x, y = network()
    with pytest.raises(ValueError, match="pairs is 1"):
        random(model, x, y, pairs=1)
    with pytest.raises(ValueError, match="samples is 1"):
        hessian_trace(model, x, y, samples=1, seed=0)
    with pytest.raises(ValueError, match="k is 0"):
        hessian_eigenvalues(model, x, y, k=0)
