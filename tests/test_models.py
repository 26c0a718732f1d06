"""The ResNets against torchvision's, and the guards around a pass at other weights."""

import pytest
import torch
from torch import nn

from samlib.models import BLOCKS, build_model, frozen_statistics, layer_kinds, mode, weights_restored


def flat_state(model):
    return [t.clone() for t in model.state_dict().values()]


def unchanged(before, model):
    return all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


# Models


@pytest.mark.parametrize("name, classes", [("resnet18", 10), ("resnet34", 7)])
def test_width_64_with_the_imagenet_stem_is_torchvisions_resnet_to_the_bit(name, classes):
    from samlib._torchvision import torchvision

    ours = build_model(name, 64, "imagenet", 3, classes, seed=5)
    torch.manual_seed(5)
    theirs = getattr(torchvision.models, name)(num_classes=classes)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert unchanged(flat_state(theirs), ours)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for training in (True, False):  # the second with the running statistics that the first has moved
        ours.train(training)
        theirs.train(training)
        assert torch.equal(ours(x), theirs(x))
        assert unchanged(flat_state(theirs), ours)


def test_known_numbers_of_parameters():
    def size(*args):
        return sum(p.numel() for p in build_model(*args, seed=0).parameters())

    assert size("resnet18", 64, "cifar", 3, 10) == 11_173_962  # the usual CIFAR ResNet-18
    assert size("resnet18", 64, "imagenet", 3, 1000) == 11_689_512  # torchvision's documentation
    assert size("resnet34", 64, "imagenet", 3, 1000) == 21_797_672


@pytest.mark.parametrize("stem, sizes", [("cifar", (32, 16, 8, 4)), ("imagenet", (8, 4, 2, 1))])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_maps_of_each_stage_at_32x32(name, stem, sizes):
    model = build_model(name, 4, stem, 3, 10, seed=0)
    seen = []
    stages = [getattr(model, stage) for stage in model.stages]
    for stage in stages:
        stage.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[1:])))
    model(torch.zeros(2, 3, 32, 32))
    assert seen == [(4 << i, s, s) for i, s in enumerate(sizes[: len(stages)])]
    assert tuple(len(stage) for stage in stages) == BLOCKS[name]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_any_channels_classes_and_small_images(channels, classes, stem):
    model = build_model("resnet10", 3, stem, channels, classes, seed=0)
    for size in (8, 17):
        logits = model(torch.randn(2, channels, size, size)) if stem == "cifar" or size > 8 else None
        if logits is not None:
            assert logits.shape == (2, classes) and logits.isfinite().all()
            logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_initial_weights_follow_from_the_seed_alone_and_the_global_generator_is_left():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = build_model("resnet10", 8, "cifar", 3, 10, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again = build_model("resnet10", 8, "cifar", 3, 10, seed=1)
    other = build_model("resnet10", 8, "cifar", 3, 10, seed=2)
    assert unchanged(flat_state(first), again)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_every_parameter_has_the_kind_of_its_layer():
    model = build_model("resnet10", 4, "cifar", 3, 10, seed=0)
    kinds = layer_kinds(model)
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        assert kinds[name] == ("convolution" if p.dim() == 4 else "linear" if name.startswith("fc.") else "batchnorm")

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.body = nn.Sequential(nn.Conv1d(1, 1, 1), nn.LayerNorm(2), nn.BatchNorm1d(1), nn.Bilinear(1, 1, 1))

    assert layer_kinds(Odd()) == {
        "scale": "other", "body.0.weight": "convolution", "body.0.bias": "convolution", "body.1.weight": "other",
        "body.1.bias": "other", "body.2.weight": "batchnorm", "body.2.bias": "batchnorm", "body.3.weight": "other",
        "body.3.bias": "other",
    }  # fmt: skip
    assert layer_kinds(nn.Linear(1, 1)) == {"weight": "linear", "bias": "linear"}


# Guards


def small():
    torch.manual_seed(0)
    untracked = nn.BatchNorm2d(2, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), untracked, nn.BatchNorm2d(2, momentum=None))


def test_frozen_statistics_normalizes_by_the_batch_and_moves_nothing():
    model, twin, x = small(), small(), torch.randn(4, 1, 6, 6) + 3
    before = flat_state(model)
    with frozen_statistics(model):
        inside = model(x)
    assert torch.equal(inside, twin(x))  # the batch's own statistics, as in a plain training pass
    assert unchanged(before, model) and not unchanged(before, twin)
    model(x)
    assert unchanged(flat_state(twin), model)  # they move again, by as much


def test_frozen_statistics_leaves_evaluation_mode_alone():
    model, x = small(), torch.randn(4, 1, 6, 6)
    model(x + 5)
    model.eval()
    expected = model(x)
    with frozen_statistics(model):
        assert torch.equal(model(x), expected)


def test_frozen_statistics_ends_also_when_something_raises_and_nests():
    model, x = small(), torch.randn(4, 1, 6, 6)
    before = flat_state(model)
    with pytest.raises(ZeroDivisionError), frozen_statistics(model):
        model(x)
        raise ZeroDivisionError
    assert [model[i].track_running_stats for i in (1, 3, 4)] == [True, False, True]
    with frozen_statistics(model):
        with frozen_statistics(model):
            model(x)
        model(x)
    assert unchanged(before, model)
    model(x)
    assert not unchanged(before, model)


@pytest.mark.parametrize("training", [True, False])
def test_each_modules_own_mode_comes_back_also_when_something_raises(training):
    model = small()
    model[1].eval()
    before = [m.training for m in model.modules()]
    with mode(model, training=training):
        assert all(m.training == training for m in model.modules())
    assert [m.training for m in model.modules()] == before
    with pytest.raises(ZeroDivisionError), mode(model, training=training):
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == before


def test_moved_weights_come_back_to_the_bit_also_when_something_raises():
    values = torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45, 3e38])
    p = nn.Parameter(values.clone())
    q = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    q_before, strides = q.detach().clone(), q.stride()
    for error in (None, ZeroDivisionError):
        try:
            with weights_restored(t for t in (p, q)) as copies, torch.no_grad():
                assert torch.equal(copies[1], q_before)
                p.mul_(0.3)
                q.add_(1.0)
                if error:
                    raise error
        except ZeroDivisionError:
            pass
        assert torch.equal(p.detach().view(torch.int32), values.view(torch.int32))
        assert torch.equal(q, q_before) and q.stride() == strides
        assert p.requires_grad and q.requires_grad
