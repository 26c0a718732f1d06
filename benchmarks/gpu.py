"""What runs on a GPU: the first document's grid, one run of the second's, the captured step beside the eager one."""

import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from benchmarks import images, measure
from benchmarks.measure import Row, in_turn, ratios, seconds
from samlib.config import RunConfig, UserError
from samlib.models import build_model
from samlib.sam import SAM
from samlib.step import EagerStep, GraphStep
from samlib.train import numerics, train


def measure_all(quick: bool, short: tuple[int, int] = (10, 20), folder: Path = measure.RESULTS) -> None:
    """Prints the table; without `quick` it is in the folder, written anew with each row: time on a GPU may end."""
    need_cuda()
    begin, facts, rows = time.monotonic(), measure.machine(), []
    short = (1, 2) if quick else short
    notes = [
        f"Times of whole runs are taken from trainings of {short[0]} and {short[1]} epochs, start, loading and capture "
        f"included: T({short[0]}), and the difference of both for every further {short[1] - short[0]} epochs."
    ]
    with tempfile.TemporaryDirectory() as runs:
        for row in in_order(Path(runs), quick, short):
            rows.append(row)
            facts["took"] = f"{(time.monotonic() - begin) / 60:.1f} minutes"
            unfinished = facts | {"took": f"{facts['took']}, and not at its end: rows are missing"}
            measure.report("gpu", "Speed on a GPU", unfinished, rows, notes, None if quick else folder)
    print("\n" + measure.report("gpu", "Speed on a GPU", facts, rows, notes, None if quick else folder))


def in_order(root: Path, quick: bool, short: tuple[int, int]) -> Iterator[Row]:
    """The quick ones first."""
    yield from losses(8 if quick else 50)
    yield from speed(10 if quick else 100, 2 if quick else 7)
    yield grid(root, short, "bf16")
    yield long_run(root, short)
    yield grid(root, short, "fp32")


def need_cuda() -> None:
    if not torch.cuda.is_available():
        raise UserError("bench gpu: no CUDA device here; nothing is measured, and the table stays as it is")


def minutes(config: RunConfig, root: Path, short: tuple[int, int]) -> float:
    """Minutes of a whole run, from two short ones with the same intervals."""

    def whole(epochs: int) -> None:
        run = train(config.model_copy(update={"epochs": epochs}), root, progress=False)
        assert run.summary["status"] == "done", f"{run.id} diverged: its time is that of a part"

    few, more = (seconds(lambda epochs=epochs: whole(epochs)) for epochs in short)
    return (few + (more - few) * (config.epochs - short[0]) / (short[1] - short[0])) / 60


def grid(root: Path, short: tuple[int, int], precision: str) -> Row:
    """18 runs of one seed: each optimizer and data fraction once, taken for its three levels of label noise."""
    of_all, parts = {"dataset": "cifar10", "precision": precision, "device": "cuda"}, {}
    images.settings(real=False)
    train(RunConfig(data_fraction=0.01, epochs=1, **of_all), root, progress=False)  # warm
    for mix, fraction in product(("sgd", "sam"), (0.01, 0.1, 1.0)):
        config = RunConfig(mix=mix, data_fraction=fraction, **of_all)
        parts[f"{mix}, {fraction:.0%}"] = minutes(config, root, short)
    note = "minutes a run: " + ", ".join(f"{name}: {value:.2f}" for name, value in parts.items())
    what = f"the first document's 18-run grid for one seed, 100 epochs, made-up images, {precision}"
    return Row(what, [3 * sum(parts.values())], "minutes", 10, False, note)


def long_run(root: Path, short: tuple[int, int]) -> Row:
    images.settings(classes=100, real=False)
    config = RunConfig(
        dataset="cifar100", stem="cifar", mix="sam", rho=0.1, data_fraction=0.9, batch_size=256, epochs=200,
        precision="bf16", probe_every=176, device="cuda",
    )  # fmt: skip
    what = "one SAM run: ResNet-18, CIFAR stem, batch 256, 200 epochs of 45,000 made-up images, a probe an epoch, bf16"
    return Row(what, [minutes(config, root, short)], "minutes", 12)


def made(kind: type, mix: str, lr: float, config: RunConfig) -> tuple[EagerStep | GraphStep, list[tuple]]:
    """A step of the first document's model from one start, and batches on the device."""
    device = torch.device("cuda")
    model = build_model("resnet18", 64, "imagenet", 3, 10, 0).to(device, memory_format=torch.channels_last)
    optimizer = SAM(model.parameters(), lr, rho=0.05, momentum=0.9, weight_decay=5e-4, mix=mix)
    draw = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(128, 3, 32, 32, generator=draw), torch.randint(0, 10, (128,), generator=draw)) for _ in range(8)
    ]
    batches = [(x.to(device, memory_format=torch.channels_last), y.to(device)) for x, y in batches]
    return kind(model, optimizer, config, device), batches


def losses(steps: int) -> Iterator[Row]:
    """The captured step against the eager one, on deterministic kernels: the largest relative difference of losses."""
    need_cuda()
    for mix in ("sgd", "sam", "checkpoint134"):
        config = RunConfig(mix=mix, deterministic=True)
        curves = []
        with numerics(config, torch.device("cuda")):
            for kind in (EagerStep, GraphStep):
                step, batches = made(kind, mix, 0.0625, config)  # a learning rate that float32 holds exactly
                curves.append(torch.stack([step(*batches[k % 8])[0].clone() for k in range(steps)]).double())
        difference = ((curves[0] - curves[1]).abs() / curves[0]).max().item()
        what = f"graph and eager, {mix}: largest relative difference of the losses of {steps} steps"
        yield Row(what, [difference], "", 1e-3)


def speed(steps: int, repeats: int) -> Iterator[Row]:
    for mix, precision in product(("sgd", "sam"), ("fp32", "bf16")):
        config = RunConfig(mix=mix, precision=precision)
        with numerics(config, torch.device("cuda")):
            functions = {}
            for name, kind in (("eager", EagerStep), ("graph", GraphStep)):
                step, batches = made(kind, mix, 1e-3, config)

                def run(step=step, batches=batches) -> None:
                    for k in range(steps):
                        step(*batches[k % 8])
                    torch.cuda.synchronize()

                functions[name] = run
            times = in_turn(functions, repeats)
        each = ", ".join(f"{name} {1e3 * sorted(t)[len(t) // 2] / steps:.2f} ms a step" for name, t in times.items())
        what = f"the first document's model, {mix}, {precision}: eager over graph"
        yield Row(what, ratios(times, "eager", "graph"), "times", None, True, each, times)
