"""How long runs would take here, from a few timed steps of each kind."""

import math
import os
import time
from collections.abc import Iterable

import psutil
import torch

from samlib import PROJECT
from samlib.config import RunConfig, UserError
from samlib.models import build_model
from samlib.sam import SAM
from samlib.step import EagerStep
from samlib.study import DATASETS
from samlib.train import keep_memory, numerics, pick_device

NOTEBOOK_SECONDS = 1.0  # of a notebook, in a kernel that is there
KIND = "dataset root image_size model stem width batch_size precision threads device graph passes".split()


def estimated_seconds(configs: Iterable[RunConfig]) -> tuple[float, list[str]]:
    """Worker-seconds that runs would take, and what could not be estimated, in sentences.

    Counts training steps, evaluations (a third of a pass an image) and notebooks; not the probes and measures. A step
    that could need more than half of the free memory is not tried.
    """
    seconds, notes = 0.0, set()
    steps: dict[tuple, float] = {}
    for config in configs:
        kind = tuple(getattr(config, name) for name in KIND)
        try:
            train, test = image_counts(config)
        except UserError as error:
            notes.add(str(error))
            continue
        if (need := step_bytes(config)) > psutil.virtual_memory().available / 2:
            notes.add(f"{config.run_id}: a step may need {need / 2**30:,.1f} GiB, which is not tried")
            continue
        if kind not in steps:
            steps[kind] = seconds_per_step(config)
        train *= config.data_fraction * (1 - config.validation_fraction)
        evaluations = math.ceil(config.epochs / config.eval_every)
        seconds += config.epochs * math.ceil(train / config.batch_size) * steps[kind]
        seconds += evaluations * (train + test) * steps[kind] / config.batch_size / config.passes / 3
        seconds += NOTEBOOK_SECONDS
    return seconds, sorted(notes)


def seconds_per_step(config: RunConfig, steps: int = 3) -> float:
    """The median time of a training step as configured, eager, on made-up images of three channels."""
    device = pick_device(config)
    size = config.image_size or (DATASETS[config.dataset].size if config.dataset in DATASETS else 32)
    keep_memory()
    with numerics(config, device):
        layout = torch.channels_last if size >= 16 else torch.contiguous_format
        model = build_model(config.model, config.width, config.stem, 3, 10, 0).to(device)
        step = EagerStep(model, SAM(model.parameters(), 0.01, config.rho, mix=config.mix), config, device)
        x = torch.randn(config.batch_size, 3, size, size, device=device).to(memory_format=layout)
        y = torch.randint(0, 10, (config.batch_size,), device=device)
        times = []
        for _ in range(steps + 1):
            begin = time.perf_counter()
            step(x, y)[0].item()
            times.append(time.perf_counter() - begin)
    return sorted(times[1:])[steps // 2]


def image_counts(config: RunConfig) -> tuple[int, int]:
    """Training and test images, counted without reading them."""
    if config.dataset in DATASETS:
        return DATASETS[config.dataset].images
    train, test = (sum(len(names) for *_, names in os.walk(PROJECT / config.root / p)) for p in ("train", "test"))
    if not (train and test):
        raise UserError(f"root: {config.root!r} holds no train/<class>/<image> and test/<class>/<image>")
    return train, test


def step_bytes(config: RunConfig) -> int:
    """What a step needs at most: six times the weights, and the activations of a batch."""
    with torch.device("meta"):
        model = build_model(config.model, config.width, config.stem, 3, 100, 0)
    pixels = (config.image_size or (DATASETS[config.dataset].size if config.dataset in DATASETS else 32)) ** 2
    activations = config.batch_size * pixels * config.width * (16 if config.stem == "cifar" else 4)
    return 4 * (6 * sum(p.numel() for p in model.parameters()) + activations)
