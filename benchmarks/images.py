"""CIFAR-10's images for the benchmarks: the JPEG re-encoding where it is there, else made-up ones of its shape."""

import numpy as np

import samlib.data
from samlib import PROJECT
from samlib.data import Source, load_source

FOLDER = PROJECT / "data/cifar10-jpeg"


def made_up(classes: int = 10) -> Source:
    """50,000 and 10,000 random images uint8 (n, 3, 32, 32), balanced: what is measured does not depend on pixels."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (60_000, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(60_000) % classes
    return Source(images[:50_000], labels[:50_000], images[50_000:], labels[50_000:], [str(k) for k in range(classes)])


def settings(classes: int = 10, *, real: bool = True) -> tuple[dict, str]:
    """Fields of RunConfig that name the images, and what they are in words."""
    if real and FOLDER.is_dir():
        return {"dataset": "imagefolder", "root": str(FOLDER)}, "CIFAR-10 (JPEG re-encoding)"
    name, source = f"cifar{classes}", made_up(classes)
    samlib.data.load_source = lambda config: source if config.dataset == name else load_source(config)
    return {"dataset": name}, f"made-up images of CIFAR-{classes}'s shape"
