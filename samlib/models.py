"""ResNets by depth, width and stem, and the guards around a pass in another mode, or at other weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BLOCKS = {  # of every stage; two stages are for 8x8 images, of which a third and fourth would leave single pixels
    "resnet6": (1, 1),
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016), with torchvision's names."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or channels != planes:
            self.downsample = nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:  # (batch, channels, height, width)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """torchvision's ResNet of basic blocks, for any number of stages, width, stem, channels and classes.

    At width 64 with the imagenet stem it is torchvision's, weights and outputs, bit for bit (a test holds the two
    together). Written here because torchvision fixes the widths, costs each run over a second to import, and has no
    build to match torch's CPU build.
    """

    def __init__(self, blocks: tuple[int, ...], width: int, stem: str, channels: int, classes: int) -> None:
        super().__init__()
        cifar = stem == "cifar"
        self.conv1 = nn.Conv2d(channels, width, *((3, 1, 1) if cifar else (7, 2, 3)), bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        self.stages = [f"layer{stage + 1}" for stage in range(len(blocks))]
        planes = width
        for stage, count in enumerate(blocks):
            layers = []
            for block in range(count):
                out = width << stage
                layers.append(BasicBlock(planes, out, 2 if stage and not block else 1))
                planes = out
            setattr(self, self.stages[stage], nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(planes, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (batch, channels, height, width) -> (batch, classes)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def build_model(name: str, width: int, stem: str, channels: int, classes: int, seed: int) -> ResNet:
    """The named ResNet with initial weights that follow from the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ResNet(BLOCKS[name], width, stem, channels, classes)


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """Parameter name -> convolution, batchnorm, linear or other."""
    kinds = {nn.Linear: "linear", nn.modules.conv._ConvNd: "convolution", nn.modules.batchnorm._BatchNorm: "batchnorm"}
    result = {}
    for prefix, module in model.named_modules():
        kind = next((kind for base, kind in kinds.items() if isinstance(module, base)), "other")
        for name, _ in module.named_parameters(recurse=False):
            result[f"{prefix}.{name}".lstrip(".")] = kind
    return result


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm in training mode normalizes by the batch as ever, but its running statistics do not move."""
    tracking = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    try:
        for module in tracking:
            module.track_running_stats = False
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside, and each module's own mode again after."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def weights_restored(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Inside, the parameters may be moved; after, also when something raises, they are as before, bit for bit.

    Yields the copies that they are restored from, in their order.
    """
    params = list(params)
    before = [p.detach().clone() for p in params]
    try:
        yield before
    finally:
        with torch.no_grad():
            for p, b in zip(params, before, strict=True):
                p.copy_(b)


@contextmanager
def softplus_for_relu(model: nn.Module) -> Iterator[None]:
    """Inside, every ReLU is a softplus, which is like it but has no kink; the weights are the same."""
    # Not named_children: it leaves out a second name of the same ReLU.
    places = [(m, name, c) for m in model.modules() for name, c in m._modules.items() if isinstance(c, nn.ReLU)]
    try:
        for module, name, _ in places:
            setattr(module, name, nn.Softplus())
        yield
    finally:
        for module, name, relu in places:
            setattr(module, name, relu)
