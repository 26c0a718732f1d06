"""What runs on a CPU, two cores: the optimizer, the probe, an epoch, the first document's job, the runner, memory."""

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
from pathlib import Path

import nbformat
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import images, measure
from benchmarks.measure import Row, in_turn, ratios, seconds
from benchmarks.reference_sam import ReferenceMaskedSAM, ReferenceSAM, UsualSAM, reference_probe
from samlib import PROJECT
from samlib.config import RunConfig, UserError
from samlib.models import build_model
from samlib.probes import GradientPair, probe_rows
from samlib.runs import Run, load_runs
from samlib.sam import SAM
from samlib.step import EagerStep
from samlib.train import Training, numerics, train

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
LAPTOP = {"model": "resnet18", "stem": "cifar", "width": 16, "image_size": 16, "rho": 0.1}  # studies/laptop
DIGITS = {"dataset": "digits", "model": "resnet10", "stem": "cifar", "width": 8, "batch_size": 64, "rho": 0.1}


def measure_all(quick: bool) -> None:
    if importlib.util.find_spec("pytorch_optimizer") is None:
        raise UserError("bench: pytorch_optimizer is not installed here; use `make bench`, which installs it")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # child processes too
    torch.set_num_threads(2)
    begin, facts, rows = time.monotonic(), measure.machine(), []
    fields, words = images.settings(real=not quick)
    facts["images"] = words
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, measurement in {
            "step": lambda: sam_step(*((2, 32) if quick else (20, 128))),
            "arithmetic": lambda: arithmetic(3 if quick else 15),
            "probe": lambda: probe(2 if quick else 9),
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
    measure.report("cpu", "Speed on a CPU", facts, rows, notes, keep=not quick)


def resnet18() -> nn.Module:
    from samlib._torchvision import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


# The step


def sam_step(repeats: int, batch: int) -> list[Row]:
    model = resnet18().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch,))
    settings = SGD | {"lr": 1e-3}
    config = RunConfig(mix="sam", batch_size=batch)
    step = EagerStep(model, SAM(model.parameters(), rho=0.05, **settings), config, torch.device("cpu"))

    def passes() -> None:
        for _ in range(2):
            model.zero_grad()
            cross_entropy(model(x), y).backward()

    times = in_turn({"passes": passes, "step": lambda: step(x, y)}, repeats, warm=2)
    what = f"SAM step of torchvision's ResNet-18 at 32x32, batch {batch}, over two bare forward and backward passes"
    return [Row(what, ratios(times, "step", "passes"), "times", 1.04, seconds=times)]


# The arithmetic of the optimizer and of the probe, on ResNet-18's 11.2 million parameters


def gradients() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params = [p.detach() for p in build_model("resnet18", 64, "imagenet", 3, 10, 0).parameters()]
    torch.manual_seed(0)
    g = [1e-3 * torch.randn_like(p) for p in params]
    return params, g, [0.8 * a + 5e-4 * torch.randn_like(a) for a in g]


# What each way reads and writes, in copies of the parameters: where both are bound by memory, the most that is to gain.
# samlib: norm 1, ascent 3, SGD 5. The loop: norm 1, clone 2, g * scale 2, its addition 3; SGD: weight decay 3, momentum
# 2 + 3, weights 3.
TRAFFIC = "memory read and written, in copies of the parameters: the loop 19, samlib 9, or 2.1 times"


def arithmetic(repeats: int) -> list[Row]:
    from pytorch_optimizer import SAM as OtherSAM

    params, g, g_sam = gradients()

    def steps(make: Callable) -> Callable[[], float]:
        mine = [nn.Parameter(p.clone()) for p in params]
        ours = [[t.clone() for t in tensors] for tensors in (g, g_sam)]
        optimizer = make(mine)

        def step() -> float:
            for kept, given in zip((g, g_sam), ours, strict=True):
                torch._foreach_copy_(given, kept)
            begin = time.perf_counter()
            for given, half in zip(ours, (optimizer.first_step, optimizer.second_step), strict=True):
                for p, gradient in zip(mine, given, strict=True):
                    p.grad = gradient
                half()
            return time.perf_counter() - begin

        return step

    functions = {
        "samlib, SAM": lambda p: SAM(p, rho=0.05, **SGD),
        "a Python loop, SAM": lambda p: ReferenceSAM(p, rho=0.05, **SGD),
        "the usual Python loop, SAM": lambda p: UsualSAM(p, rho=0.05, **SGD),
        "pytorch_optimizer, SAM": lambda p: OtherSAM(p, torch.optim.SGD, rho=0.05, **SGD),
        "samlib, checkpoint134, compiled": lambda p: SAM(p, rho=0.05, mix="checkpoint134", compile=True, **SGD),
        "samlib, checkpoint134, eager": lambda p: SAM(p, rho=0.05, mix="checkpoint134", **SGD),
        "a Python loop, checkpoint134": lambda p: ReferenceMaskedSAM(p, rho=0.05, **SGD),
    }
    times = in_turn({name: steps(make) for name, make in functions.items()}, repeats, warm=3)

    def row(what: str, slow: str, fast: str, bar: float | None, note: str = "") -> Row:
        pair = {name: times[name] for name in (slow, fast)}
        milliseconds = ", ".join(f"{name}: {1e3 * sorted(t)[len(t) // 2]:.0f} ms" for name, t in pair.items())
        return Row(what, ratios(times, slow, fast), "times", bar, True, f"{milliseconds}{note}", pair)

    masked = "a Python loop, checkpoint134"
    return [
        row("SAM's arithmetic, 11.2 M parameters: faster than a Python loop without needless temporaries",
            *list(functions)[1::-1], 2.5, f"; {TRAFFIC}"),
        row("the same: faster than the loop of github.com/davda54/sam (told, not judged)", "the usual Python loop, SAM",
            "samlib, SAM", None),
        row("the same: faster than pytorch_optimizer's SAM", "pytorch_optimizer, SAM", "samlib, SAM", 2.5),
        row("a masked mix (checkpoint134): faster than a Python loop", masked, "samlib, checkpoint134, compiled", 4),
        row("the same without torch.compile (told, not judged)", masked, "samlib, checkpoint134, eager", None),
    ]  # fmt: skip


def probe(repeats: int) -> list[Row]:
    model = build_model("resnet18", 64, "imagenet", 3, 10, 0)
    _, g, g_sam = gradients()
    names = [name for name, _ in model.named_parameters()]

    def ours(compile: bool) -> None:
        pair = GradientPair(names, g, g_sam, 0.0, 0.0)
        probe_rows(pair, model, compile=compile)
        pair.codes()

    functions = {
        "a Python loop with divisions": lambda: reference_probe(g, g_sam),
        "samlib, compiled": lambda: ours(True),
        "samlib, eager": lambda: ours(False),
    }
    times = in_turn(functions, repeats, warm=2)
    slow, compiled, eager = functions
    milliseconds = [1e3 * t for t in times[compiled]]
    note = "codes, five fractions, ratio bins, norms, cosine, and the counts of every layer"
    return [
        Row("a full probe, 11.2 M parameters: faster than a Python loop with divisions", ratios(times, slow, compiled),
            "times", 8, True, note, times),
        Row("the same, its time", milliseconds, "ms", 30),
        Row("the same without torch.compile (told, not judged)", ratios(times, slow, eager), "times", None),
    ]  # fmt: skip


# An epoch


def epoch_shares(fields: dict, root: Path, quick: bool) -> list[Row]:
    cases = {
        "the first document's model, two threads": fields | {"data_fraction": 0.02, "epochs": 3, "threads": 2},
        "the laptop studies' model, one thread": fields | LAPTOP | {"data_fraction": 0.05, "epochs": 3, "threads": 1},
        "the quick study's model (told, not judged)": DIGITS | {"epochs": 6, "threads": 1},
    }
    rows = []
    for words, values in cases.items():
        values = values | ({"epochs": 1, "data_fraction": 0.01} if quick and "root" not in values else {})
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

    with run.lock(), numerics(config, torch.device("cpu")):
        training = Training(config, run, torch.device("cpu"))
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
    from samlib.batch import kernels
    from samlib.batch.runner import dask_client, execute, run_all

    numbers = iter(range(10**6))
    folder = root / "runner"
    folder.mkdir()
    empty = folder / "empty.ipynb"
    cells = [nbformat.v4.new_code_cell("value = 1", metadata={"tags": ["parameters"]})]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), empty)
    processes = 2

    def overhead() -> float:
        configs = [RunConfig(epochs=1, seed=next(numbers), device="cpu", **DIGITS) for _ in range(runs)]
        wall = []
        quietly(lambda: wall.append(seconds(lambda: run_all(configs, folder, workers=processes))))
        trained = sum(Run(config, folder).summary["seconds"] for config in configs)
        return (wall[0] * processes - trained) / runs

    def cluster() -> None:
        with dask_client(processes, None):
            pass

    def kernel() -> None:
        execute(str(empty), str(folder / "out.ipynb"), {"value": 2}, str(PROJECT))

    def first_kernel() -> None:
        kernels.stop()
        kernel()

    functions = {"a run": overhead, "Dask cluster": cluster, "first kernel": first_kernel, "kernel": kernel}
    times = in_turn(functions, repeats)
    middle = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    dask, first = (middle[name] * processes / runs for name in ("Dask cluster", "first kernel"))
    note = (
        f"of {runs} runs of one epoch on {processes} workers, a run: Dask cluster {dask:.1f} s, each worker's first "
        f"kernel with its imports {first:.1f} s ({middle['first kernel']:.1f} s once), every kernel, forked from it, "
        f"{middle['kernel']:.1f} s, the rest (data, evaluation, figure, files, and two at a time) "
        f"{middle['a run'] - dask - first - middle['kernel']:.1f} s"
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
