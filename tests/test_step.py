"""One update of the weights: as the half-steps by hand, and on a GPU the captured step as the eager one."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from samlib.config import RunConfig
from samlib.models import build_model, frozen_statistics
from samlib.sam import SAM
from samlib.step import EagerStep, GraphStep
from samlib.train import numerics

LR = 0.0625  # float32 holds it exactly: the captured step's learning rate is a float32 tensor


def made(mix: str, device: str, seed: int = 0):
    model = build_model("resnet10", 8, "cifar", 3, 10, seed).to(device)
    return model, SAM(model.parameters(), LR, rho=0.05, momentum=0.9, weight_decay=5e-4, mix=mix)


def batches(count: int, size: int, device: str):
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        x, y = torch.randn(size, 3, 16, 16, generator=draw), torch.randint(0, 10, (size,), generator=draw)
        yield x.to(device), y.to(device)


@pytest.mark.parametrize("mix", ["sgd", "sam", "checkpoint134"])
def test_a_step_is_the_half_steps_by_hand_and_tells_of_the_weights_before_it(mix):
    model, optimizer = made(mix, "cpu")
    other, by_hand = made(mix, "cpu")
    step = EagerStep(model, optimizer, RunConfig(mix=mix), torch.device("cpu"))
    for x, y in batches(3, 8, "cpu"):
        with torch.no_grad():
            logits = copy.deepcopy(other)(x)
        loss, right = step(x, y)
        assert loss.item() == cross_entropy(logits, y).item() and right.item() == (logits.argmax(1) == y).sum().item()
        by_hand.zero_grad()
        cross_entropy(other(x), y).backward()
        if mix == "sgd":
            by_hand.step()
        else:
            by_hand.first_step()
            with frozen_statistics(other):
                cross_entropy(other(x), y).backward()
            by_hand.second_step()
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the captured step was not tested")
@pytest.mark.parametrize("mix", ["sgd", "sam", "checkpoint134"])
def test_over_50_steps_the_captured_step_has_the_losses_of_the_eager_one_to_rounding(mix):
    device = torch.device("cuda")
    config = RunConfig(mix=mix, deterministic=True)  # one choice of kernels for both
    curves = []
    with numerics(config, device):
        for kind in (EagerStep, GraphStep):
            step = kind(*made(mix, "cuda"), config, device)
            losses = []
            for k, (x, y) in enumerate(batches(50, 32, "cuda")):
                smaller = 20 if k % 10 == 9 else 32  # an epoch's last batch has a graph of its own
                losses.append(step(x[:smaller], y[:smaller])[0].clone())
            curves.append(torch.stack(losses).double())
    eager, graph = curves
    assert eager.isfinite().all() and eager.std() > 0.01
    torch.testing.assert_close(graph[:10], eager[:10], rtol=1e-5, atol=0)
    torch.testing.assert_close(graph, eager, rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the captured step was not tested")
def test_the_captured_step_follows_a_learning_rate_that_changes():
    device = torch.device("cuda")
    config = RunConfig(mix="sam", deterministic=True)
    with numerics(config, device):
        model, optimizer = made("sam", "cuda")
        step = GraphStep(model, optimizer, config, device)
        for x, y in batches(6, 32, "cuda"):
            step(x, y)
        optimizer.param_groups[0]["lr"].fill_(0.0)
        before = [p.detach().clone() for p in model.parameters()]
        for x, y in batches(2, 32, "cuda"):
            step(x, y)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
