"""What runs on a CPU, two cores: an update, a step, a probe, an epoch, the first document's job, the runner, memory."""

import copy
import gc
import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import images, measure
from benchmarks.measure import Row, in_turn, ratios, seconds
from benchmarks.reference_sam import LoopCheckpoint134, LoopSAM
from samlib.config import RunConfig, UserError
from samlib.models import build_model
from samlib.probes import as_trained, gradient_pair, gradients, probe_rows
from samlib.runs import Run, load_runs
from samlib.sam import SAM
from samlib.step import EagerStep
from samlib.train import Training, keep_memory, numerics, train

SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
LAPTOP = {"model": "resnet18", "stem": "cifar", "width": 16, "image_size": 16, "rho": 0.1}  # studies/laptop
DIGITS = {"dataset": "digits", "model": "resnet6", "stem": "cifar", "width": 16, "batch_size": 64, "rho": 0.4}
CPU = torch.device("cpu")


def measure_all(quick: bool) -> None:
    if importlib.util.find_spec("pytorch_optimizer") is None:
        raise UserError("bench: pytorch_optimizer is not installed here; use `make bench`, which installs it")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # child processes too
    torch.set_num_threads(2)
    begin, facts, rows = time.monotonic(), measure.machine(), []
    fields, facts["images"] = images.settings(real=not quick)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, measurement in {
            "arithmetic": lambda: arithmetic(3 if quick else 15),  # first: memory is kept from what comes next on
            "step": lambda: steps(*((2, 32) if quick else (20, 128))),
            "probe": lambda: probe(*((2, 32) if quick else (9, 128))),
            "epoch": lambda: epoch_shares(fields, root, quick),
            "first document": lambda: first_document(fields, root, *((1, 1, 1, 256) if quick else (2, 1, 10, 10_000))),
            "workers": lambda: workers(fields, root, *((1, 1) if quick else (4, 4))),
            "runner": lambda: runner(root, *((2, 1) if quick else (12, 3))),
            "load_runs": lambda: loading(root, 20 if quick else 1000),
            "memory": memory,
        }.items():
            took = time.monotonic()
            rows += measurement()
            gc.collect()
            print(f"{name}: {time.monotonic() - took:.0f} s", file=sys.stderr, flush=True)
    facts["load"] += f", {os.getloadavg()[0]:.1f} after"
    facts["took"] = f"{(time.monotonic() - begin) / 60:.1f} minutes"
    judged = [row for row in rows if row.bar is not None]
    notes = [
        f"{sum(row.met for row in judged)} of {len(judged)} bars are met. Each median is over rounds in which the "
        "things compared were measured in turn. The GPU's numbers are in gpu.md.",
    ]
    print("\n" + measure.report("cpu", "Speed on a CPU", facts, rows, notes, None if quick else measure.RESULTS))


def resnet18() -> nn.Module:
    from samlib._torchvision import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


# The arithmetic of the optimizer, on ResNet-18's 11.2 million parameters


def arithmetic(repeats: int) -> list[Row]:
    from pytorch_optimizer import SAM as OtherSAM

    params = [p.detach() for p in resnet18().parameters()]
    g = [1e-3 * torch.randn_like(p) for p in params]
    g_sam = [0.8 * a + 5e-4 * torch.randn_like(a) for a in g]

    def half_steps(make: Callable) -> Callable[[], float]:
        mine = [nn.Parameter(p.clone()) for p in params]
        optimizer = make(mine)

        def both() -> float:
            spent = 0.0
            for given, half in ((g, optimizer.first_step), (g_sam, optimizer.second_step)):
                for p, gradient in zip(mine, given, strict=True):
                    p.grad = gradient.clone()  # a half-step may write to it
                spent += seconds(half)
            return spent

        return both

    functions = {
        "samlib": lambda p: SAM(p, **SGD),
        "davda54/sam": lambda p: LoopSAM(p, **SGD),
        "pytorch_optimizer": lambda p: OtherSAM(p, torch.optim.SGD, **SGD),
        "samlib, checkpoint134": lambda p: SAM(p, mix="checkpoint134", **SGD),
        "the second document's loop": lambda p: LoopCheckpoint134(p, **SGD),
    }
    times = in_turn({name: half_steps(make) for name, make in functions.items()}, repeats, warm=3)

    def row(what: str, other: str, ours: str, bar: float | None) -> Row:
        pair = {name: times[name] for name in (other, ours)}
        return Row(what, ratios(times, other, ours), "times", bar, True, milliseconds(pair), pair)

    return [
        row("SAM's arithmetic, 11.2 M parameters: faster than the loop of github.com/davda54/sam",
            "davda54/sam", "samlib", 1),
        row("the same: faster than pytorch_optimizer's SAM", "pytorch_optimizer", "samlib", 1),
        row("checkpoint134's: faster than the second document's loop (told, not judged)",
            "the second document's loop", "samlib, checkpoint134", None),
    ]  # fmt: skip


def milliseconds(times: dict[str, list[float]]) -> str:
    return ", ".join(f"{name}: {1e3 * sorted(t)[len(t) // 2]:.0f} ms" for name, t in times.items())


# The step, as in a training: freed memory stays with the process, and the images are channels_last


def steps(repeats: int, batch: int) -> list[Row]:
    keep_memory()
    laptop = build_model(LAPTOP["model"], LAPTOP["width"], LAPTOP["stem"], 3, 10, 0)
    cases = {
        "torchvision's ResNet-18 at 32x32, two threads": (resnet18(), 32, 2),
        "the laptop studies' model, one thread": (laptop, LAPTOP["image_size"], 1),
    }
    rows = []
    for words, (model, size, threads) in cases.items():
        x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
        y = torch.randint(0, 10, (batch,))
        functions = {"bare": bare(model, x, y)}
        for mix in ("sam", "checkpoint134"):
            config = RunConfig(mix=mix, batch_size=batch, threads=threads)
            step = EagerStep(model, SAM(model.parameters(), mix=mix, **SGD), config, CPU)
            functions[mix] = lambda step=step, x=x, y=y: step(x, y)
        with numerics(config, CPU):
            times = in_turn(functions, repeats, warm=2)
        for mix in ("sam", "checkpoint134"):
            what = f"a {mix} step of {words}, batch {batch}, over two bare passes and torch's fused SGD step"
            rows.append(Row(what, ratios(times, mix, "bare"), "times", 1.08, False, milliseconds(times), times))
    return rows


def bare(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Two forward and backward passes on one batch, then SGD: what a SAM step cannot do without."""
    optimizer = torch.optim.SGD(model.parameters(), fused=True, **SGD)

    def step() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def probe(repeats: int, batch: int) -> list[Row]:
    model = build_model("resnet18", 64, "imagenet", 3, 10, 0)
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,))
    pair = gradient_pair(model, x, y, 0.05)

    def one_pass() -> None:
        with as_trained(model):
            gradients(model, cross_entropy(model(x), y))

    def counting() -> None:
        probe_rows(replace(pair), model)  # a new pair: one keeps its codes

    times = in_turn({"one pass": one_pass, "counting": counting}, repeats, warm=2)
    what = f"counting a probe of 11.2 M parameters over one of its two passes, batch {batch} at 32x32, two threads"
    return [Row(what, ratios(times, "counting", "one pass"), "times", 1, False, milliseconds(times), times)]


# An epoch


def epoch_shares(fields: dict, root: Path, quick: bool) -> list[Row]:
    cases = {
        "the first document's model, two threads": fields | {"data_fraction": 0.02, "epochs": 3, "threads": 2},
        "the laptop studies' model, one thread": fields | LAPTOP | {"data_fraction": 0.05, "epochs": 3, "threads": 1},
        "the quick study's model (told, not judged)": DIGITS | {"epochs": 6, "threads": 1},
    }
    rows = []
    for words, values in cases.items():
        values = values | ({"epochs": 1, "data_fraction": 0.01} if quick and values["dataset"] != "digits" else {})
        config = RunConfig(mix="sgd", device="cpu", eval_every=10**6, **values)
        shares = outside(config, root)
        bar = None if "told" in words else 3
        rows.append(Row(f"share of an SGD epoch outside forward, backward and update: {words}", shares, "%", bar))
    return rows


def outside(config: RunConfig, root: Path) -> list[float]:
    """For every epoch, the share of its time in % that is not the step's: what a step does is only the update's."""
    run = Run(config, root)
    marks: list[float] = []
    inside: list[float] = []

    def mark(*_: object) -> None:
        marks.append(time.perf_counter())
        inside.append(0.0)

    with run.lock(), numerics(config, CPU):
        training = Training(config, run, CPU)
        training.resume()  # which makes the step anew
        training.resume = lambda: None
        step, plan, row = training.step, training.batches.epoch, training.metrics_row

        def timed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            begin = time.perf_counter()
            result = step(x, y)
            inside[-1] += time.perf_counter() - begin
            return result

        def planned(epoch: int) -> list:
            mark()
            return plan(epoch)

        def ended(*arguments: object) -> dict:
            mark()
            return row(*arguments)

        training.step, training.batches.epoch, training.metrics_row = timed, planned, ended
        quietly(lambda: training.go(progress=True))
    return [100 * (1 - s / (b - a)) for a, b, s in zip(marks, marks[1:], inside, strict=False)]


def quietly(function: Callable) -> None:
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        function()


# The first document's job


def first_document(fields: dict, root: Path, rounds: int, epochs: int, ours: int, tested: int) -> list[Row]:
    from benchmarks.first_document import FirstDocument

    fraction = 0.01
    theirs = {mix: FirstDocument(fields, fraction, mix, tested) for mix in ("sgd", "sam")}
    base = RunConfig(data_fraction=fraction, epochs=ours, threads=2, device="cpu", **fields)

    def train_ours(mix: str) -> float:
        config = base.model_copy(update={"mix": mix})
        shutil.rmtree(root / "job", ignore_errors=True)
        return seconds(lambda: train(config, root / "job", progress=False)) / ours

    functions = {}
    for mix in ("sgd", "sam"):
        functions[f"first document's way, {mix}"] = lambda mix=mix: theirs[mix].seconds_per_epoch(epochs)
        functions[f"samlib, {mix}"] = lambda mix=mix: train_ours(mix)
    times = in_turn(functions, rounds, warm=0)
    (d_sgd, o_sgd, d_sam, o_sam) = times.values()
    values = [(a + c) / (b + d) for a, b, c, d in zip(d_sgd, o_sgd, d_sam, o_sam, strict=True)]
    note = (
        f"seconds an epoch: {', '.join(f'{name}: {sorted(t)[len(t) // 2]:.1f}' for name, t in times.items())}. "
        f"samlib: whole trainings of {ours} epochs, loading and evaluations (every 10 epochs and last) included; the "
        f"first document's way: {epochs} epochs a round, their loading left out, taken for all"
    )
    what = "1 % of CIFAR-10, SGD and SAM, equal epochs: faster than the first document's way"
    return [Row(what, values, "times", 3, True, note, times)]


# Two workers of one thread against one of two


def work(pipe, fields: dict, real: bool, root: str) -> None:
    """A worker process: trains what it is sent (threads, epochs, number), and says when it is done."""
    if not real:
        images.settings(real=False)
    while order := pipe.recv():
        threads, epochs, number = order
        values = fields | LAPTOP | {"data_fraction": 0.02, "epochs": epochs, "threads": threads, "seed": number}
        train(RunConfig(mix="sam", device="cpu", eval_every=10**6, **values), root, progress=False)
        pipe.send(number)


def workers(fields: dict, root: Path, rounds: int, epochs: int) -> list[Row]:
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for k in range(2):
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(theirs, fields, "root" in fields, str(root / f"w{k}"))))
        processes[-1].start()
        pipes.append(mine)
    numbers = iter(range(10**6))

    def runs(threads: int) -> None:
        """Two runs at a time of one thread, or one of two."""
        used = pipes[: 2 // threads]
        for pipe in used:
            pipe.send((threads, epochs, next(numbers)))
        for pipe in used:
            pipe.recv()

    times = in_turn(
        {"one worker of two threads": lambda: runs(2), "two workers of one thread": lambda: runs(1)}, rounds
    )
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    values = [2 * ratio for ratio in ratios(times, *times)]
    what = "runs an hour of two one-thread workers over one two-thread worker, the laptop studies' model"
    return [Row(what, values, "times", 1.35, True, seconds=times)]


# The runner


def runner(root: Path, runs: int, repeats: int) -> list[Row]:
    from samlib.batch.runner import run_all

    numbers, folder, processes = iter(range(10**6)), root / "runner", 2

    def overhead() -> float:
        """Seconds of a worker for each run of one epoch, less those of its training."""
        configs = [RunConfig(epochs=1, seed=next(numbers), device="cpu", **DIGITS) for _ in range(runs)]
        wall: list[float] = []
        quietly(lambda: wall.append(seconds(lambda: run_all(configs, folder, workers=processes))))
        trained = sum(Run(config, folder).summary["seconds"] for config in configs)
        return (wall[0] * processes - trained) / runs

    times = in_turn({"a run": overhead}, repeats)
    note = (
        f"{runs} runs of one epoch on {processes} workers; the start of Dask is in it, and of a kernel where it is new"
    )
    return [Row("the runner's overhead a run (Dask, papermill, kernel, imports)", times["a run"], "s", 5, False, note)]


def loading(root: Path, count: int) -> list[Row]:
    config = RunConfig(epochs=1, device="cpu", **DIGITS)
    run = train(config, root / "one", progress=False)
    origin = json.loads((run.folder / "config.json").read_text())
    for seed in range(count):
        other = Run(config.model_copy(update={"seed": seed}), root / "many")
        shutil.copytree(run.folder, other.folder)
        origin["config"]["seed"] = seed
        (other.folder / "config.json").write_text(json.dumps(origin | {"run_id": other.id}, indent=1))
    loaded = []
    times = in_turn({"load": lambda: loaded.append(len(load_runs(root / "many")))}, 5)
    assert set(loaded) == {count}
    return [Row(f"load_runs() on {count:,} finished runs", times["load"], "s", 1)]


# Memory


def memory() -> list[Row]:
    def live() -> int:
        """Bytes of all tensors alive, each storage once."""
        storages = {}
        for item in gc.get_objects():
            if type(item) in (Tensor, nn.Parameter):
                for tensor in (item, item.grad if item.is_leaf else None):
                    if tensor is not None:
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    x, y = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
    most, back = {}, {}
    for mix in ("sgd", "sam", "checkpoint134"):
        gc.collect()
        before = live()
        model = resnet18()
        optimizer = SAM(model.parameters(), mix=mix, **SGD | {"lr": 0.0})
        copy_of = copy.deepcopy(list(model.parameters()))
        size = sum(p.nbytes for p in copy_of)

        peaks: list[int] = []

        def closure(model: nn.Module = model, optimizer: SAM = optimizer, peaks: list[int] = peaks) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            peaks.append(live())
            return loss

        for _ in range(2):
            optimizer.step(closure)
        bits = zip(model.parameters(), copy_of, strict=True)
        back[mix] = all(torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32)) for a, b in bits)
        most[mix] = (max(*peaks, live()) - before) / size
        del model, optimizer, copy_of, closure, bits
    note = "copies of the parameters, counted from the tensors alive after each backward pass and after the step; "
    word = {True: "the weights came back bit for bit", False: "THE WEIGHTS DID NOT COME BACK BIT FOR BIT"}
    return [
        Row(f"memory of a step over SGD's: {mix}", [round(most[mix] - most["sgd"], 3)], "copies", bar, False,
            note + word[back[mix]])
        for mix, bar in (("sam", 1), ("checkpoint134", 2))
    ]  # fmt: skip
