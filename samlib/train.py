"""train(config, root) -> Run: one training from its configuration to its folder, resumable at any step."""

import ctypes
import io
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from samlib import probes
from samlib.config import RunConfig, UserError
from samlib.data import Batches, Data, generator, load_data
from samlib.models import build_model, mode
from samlib.runs import Run, write_atomic
from samlib.sam import SAM
from samlib.step import EagerStep, GraphStep

DIAGONAL_SAMPLES = 16  # Hessian-vector products for trace and diagonal


class Diverged(Exception):
    """A loss that is not finite: the run ends here and says so."""


def train(config: RunConfig, root: str | Path = "runs/local", *, progress: bool = True) -> Run:
    """Trains as configured and returns the run, at once where it is finished already; resumes one that was interrupted.

    The folder is `root/<run id>`; another process on the same run is waited for. A loss that is not finite ends the
    run with the status "diverged". Raises UserError for data that cannot be read, a device that is not there, a full
    disk, or a configuration that does not fit its data.
    """
    run = Run(config, root)
    if run.done:
        run.clear_states()  # left there by a kill just after the summary was written
        return run
    device = pick_device(config)
    keep_memory()
    with run.lock(), numerics(config, device):
        if not run.done:
            Training(config, run, device).go(progress)
    return run


def pick_device(config: RunConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' is configured, but torch finds no CUDA device; set device to 'cpu' or 'auto'")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def keep_memory() -> None:
    """Lets freed memory stay with the process, where the C library is glibc. Else that of every large tensor goes back
    to the system, and every step on a CPU spends time on mapping and zeroing it anew."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # the names' numbers in malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25)  # the most before glibc 2.35


@contextmanager
def numerics(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Threads, TF32 and determinism as configured inside, and as they were after."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.set_num_threads(config.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
        torch.backends.cudnn.benchmark = not config.deterministic
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv
        torch.backends.cudnn.benchmark = benchmark
        if config.deterministic:  # the call alone imports torch's compiler
            torch.use_deterministic_algorithms(deterministic)


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Mean loss, and predictions (n,), in evaluation mode and fp32, of uint8 images (n, channels, height, width)."""
    loss, predictions = torch.zeros((), dtype=torch.float64, device=images.device), []
    with mode(model, training=False), probes.full_precision():
        for part, part_labels in zip(images.split(500), labels.split(500), strict=True):
            logits = model(data.normalized(part))
            loss += cross_entropy(logits, part_labels, reduction="sum")
            predictions.append(logits.argmax(1))
    return loss.item() / len(images), torch.cat(predictions)


class Training:
    """The objects of one training and its position; `go` is the loop."""

    def __init__(self, config: RunConfig, run: Run, device: torch.device) -> None:
        self.config, self.run, self.device = config, run, device
        self.data = load_data(config, device)
        self.batches = Batches(self.data, config)
        self.total_steps = config.epochs * self.batches.steps
        late = [step for step in config.persistence_steps if step >= self.total_steps]
        if late:
            raise UserError(f"persistence_steps: step {late[0]} never comes, the last is {self.total_steps - 1}")
        if config.curvature_every and len(self.data.images) < 16:
            raise UserError(f"curvature_every: it needs 16 training images, the subset has {len(self.data.images)}")
        channels = self.data.images.shape[1]
        model = build_model(config.model, config.width, config.stem, channels, len(self.data.classes), config.seed)
        layout = torch.channels_last if self.data.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout)
        settings = {"rho": config.rho, "momentum": config.momentum, "weight_decay": config.weight_decay}
        self.optimizer = SAM(model.parameters(), config.lr, mix=config.mix, compile=config.compile, **settings)
        # The first steps after a start are never a graph's, so to the bit a resumed run is not one that never stopped.
        graph = config.graph and not config.compile and not config.deterministic
        step = GraphStep if device.type == "cuda" and graph else EagerStep
        self.step = step(self.model, self.optimizer, config, device)
        self.persistence = probes.Persistence(config.persistence_steps, config.persistence_window)
        draw = generator("sample", config.subset_seed)
        self.sample = torch.randperm(len(self.data.images), generator=draw)[: config.measure_samples].to(device)
        # Position: the next step is step `done` of epoch `epoch`. Sums: over the epoch's steps so far.
        self.epoch = self.done = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.right = torch.zeros((), dtype=torch.int64, device=device)
        self.seconds = 0.0

    def go(self, progress: bool) -> None:
        config, run = self.config, self.run
        self.resume()
        started = last_state = time.monotonic()
        before = self.seconds
        bar = tqdm(
            total=self.total_steps, initial=self.epoch * self.batches.steps + self.done, unit="step", mininterval=2.0,
            desc=run.id, disable=not progress, dynamic_ncols=False, ncols=110,
        )  # fmt: skip
        self.model.train()
        try:
            for epoch in range(self.epoch, config.epochs):
                self.epoch = epoch
                lr = config.learning_rate(self.epoch)
                self.set_lr(lr)
                plan = self.batches.epoch(self.epoch)

                for step in range(self.done, self.batches.steps):
                    self.probe(plan[step], step, lr)
                    batch = self.batches.assemble(*plan[step])
                    loss, right = self.step(*batch)
                    self.loss_sum += loss * len(batch[1])
                    self.right += right
                    self.done = step + 1
                    bar.update()
                    if self.device.type == "cpu" and not loss.isfinite():
                        raise Diverged
                    self.seconds = before + time.monotonic() - started
                    if time.monotonic() - last_state >= config.state_seconds:
                        self.save()
                        last_state = time.monotonic()

                finite = [t.isfinite().all() for t in (self.loss_sum, *self.model.parameters())]
                if not torch.stack(finite).all():  # on a GPU, looked at once an epoch: nothing waits inside one
                    raise Diverged
                epochs_done = self.epoch + 1
                if config.due(config.eval_every, epochs_done):
                    run.append("metrics", self.metrics_row(epochs_done, lr))
                self.measure(epochs_done, plan, lr)
                self.done = 0
                self.loss_sum.zero_()
                self.right.zero_()
        except Diverged:
            step = self.epoch * self.batches.steps + self.done - 1
            run.finish(self.facts() | {"status": "diverged", "diverged_step": step} | dict.fromkeys(self.FINAL))
            return
        finally:
            bar.close()
        self.finish()

    def finish(self) -> None:
        run = self.run
        run.write_tables()
        metrics = run.table("metrics")
        final, best = metrics.iloc[-1], metrics.loc[metrics.test_accuracy.idxmax()]
        if self.config.keep_weights:
            buffer = io.BytesIO()
            torch.save(self.model.state_dict(), buffer)
            write_atomic(run.folder / "weights.pt", buffer.getvalue())
        results = {name: None if final[name] != final[name] else float(final[name]) for name in self.FINAL[:-2]}
        results |= {"best_test_accuracy": float(best.test_accuracy), "best_epoch": int(best.epoch)}
        run.finish(self.facts() | {"status": "done", "diverged_step": None} | results)

    # What a finished run says of itself, beside the facts; a diverged one says nothing here.
    FINAL = (
        "train_accuracy", "eval_train_accuracy", "eval_train_loss", "test_accuracy", "test_loss", "memorized",
        "corrected", "best_test_accuracy", "best_epoch",
    )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        gpu = self.device.type == "cuda"
        return {
            "steps": self.epoch * self.batches.steps + (self.done or self.batches.steps),
            "steps_per_epoch": self.batches.steps,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "train_images": len(self.data.images),
            "flipped": int(self.data.flipped.sum()),
            "test_images": len(self.data.test_images),
            "number_of_classes": len(self.data.classes),
            "gradient_evaluations": (self.epoch * self.batches.steps + (self.done or self.batches.steps))
            * self.config.passes,
            "seconds": round(self.seconds, 3),
            "device_name": torch.cuda.get_device_name() if gpu else f"CPU, {self.config.threads} thread(s)",
        }

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def metrics_row(self, epochs_done: int, lr: float) -> dict[str, Any]:
        data, seen = self.data, min(self.batches.steps * self.config.batch_size, len(self.data.images))
        test_loss, test = evaluate(self.model, data, data.test_images, data.test_labels)
        train_loss, predicted = evaluate(self.model, data, data.images, data.labels)
        if not test_loss < float("inf"):
            raise Diverged
        flips = data.flipped.any()
        return {
            "epoch": epochs_done,
            "step": epochs_done * self.batches.steps,
            "gradient_evaluations": epochs_done * self.batches.steps * self.config.passes,
            "lr": lr,
            "train_loss": self.loss_sum.item() / seen,
            "train_accuracy": self.right.item() / seen,
            "eval_train_loss": train_loss,
            "eval_train_accuracy": share(predicted == data.labels),
            "test_loss": test_loss,
            "test_accuracy": share(test == data.test_labels),
            "memorized": share((predicted == data.labels)[data.flipped]) if flips else float("nan"),
            "corrected": share((predicted == data.true_labels)[data.flipped]) if flips else float("nan"),
            "seconds": round(self.seconds, 3),
        }

    def probe(self, plan: tuple[Tensor, ...], step: int, lr: float) -> None:
        """The probe of one step, before its update, on its batch; under every mix with its own two passes."""
        config, at = self.config, self.epoch * self.batches.steps + step
        if not config.probe_every or (at % config.probe_every and not self.persistence.wants(at)):
            return
        pair = probes.gradient_pair(self.model, *self.batches.assemble(*plan), config.rho)
        row, layers = probes.probe_rows(pair, self.model, compile=config.compile)
        where = {"step": at, "epoch": self.epoch}
        self.run.append("probes", where | {"lr": lr} | row)
        if self.probed_epoch != self.epoch:
            self.probed_epoch = self.epoch
            self.run.append("layers", (where | layer for layer in layers))
        if config.persistence_steps:
            overlaps, intersections = self.persistence.rows(at, pair.codes())
            self.run.append("overlaps", overlaps)
            self.run.append("intersections", intersections)

    probed_epoch = -1

    def measure(self, epochs_done: int, plan: list, lr: float) -> None:
        """What is measured at the weights after an epoch: on its first batch what concerns a step's gradients, on the
        fixed unaugmented sample what concerns the loss."""
        from samlib.sharpness import hessian_diagonal, hessian_eigenvalues, hessian_rows, sharpness_rows

        config, model, data, run = self.config, self.model, self.data, self.run
        after = {"epoch": epochs_done}
        images = data.images[self.sample]
        y, true = data.labels[self.sample], data.true_labels[self.sample]
        seed = config.subset_seed

        def rows(items: list[dict]) -> Iterator[dict]:
            return (after | item for item in items)

        if config.due(config.threshold_every, epochs_done):
            batch = self.batches.assemble(*plan[0])
            run.append("thresholds", after | probes.threshold_row(probes.gradient_pair(model, *batch, config.rho)))
        if config.due(config.sharpness_every, epochs_done):
            labels = {"trained": y, "true": true} if config.noise_fraction else {"trained": y}
            with probes.full_precision():
                run.append("sharpness", rows(sharpness_rows(model, data.normalized(images), labels, config.rho, seed)))
        if config.due(config.scan_every, epochs_done):
            run.append("scan", rows(probes.scan_rows(model, *self.batches.assemble(*plan[0]), config.scan_rhos)))
        if config.due(config.curvature_every, epochs_done):
            batch = self.batches.assemble(*plan[0])
            run.append("prediction", rows(probes.prediction_rows(model, *batch, config.scan_rhos)))
            x = data.normalized(images)
            with probes.full_precision():
                pair = probes.gradient_pair(model, x, y, config.rho)
                values, residuals = hessian_eigenvalues(model, x, y)
                diagonal = hessian_diagonal(model, x, y, DIAGONAL_SAMPLES, seed)
            by_code, correlation = probes.diagonal_rows(pair, diagonal.mean, diagonal.standard_error)
            run.append("diagonal", rows(by_code))
            run.append("hessian", rows(hessian_rows(values, residuals, diagonal)))
            size = {"quantity": "spearman_diagonal_gradient", "value": correlation, "error": float("nan")}
            run.append("hessian", after | size | {"samples": DIAGONAL_SAMPLES})
            buffers = (self.optimizer.state[p].get("momentum_buffer") for p in model.parameters())
            params = list(model.parameters())
            updates = [torch.zeros_like(p) if b is None else lr * b for p, b in zip(params, buffers, strict=True)]
            resting = probes.convergence_rows(model, x, y, pair, updates, config.weight_decay, self.batches.steps)
            run.append("convergence", ({"epoch": epochs_done, "lr": lr} | row for row in resting))

    def save(self) -> None:
        self.run.save_state(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "epoch": self.epoch,
                "done": self.done,
                "loss_sum": self.loss_sum,
                "right": self.right,
                "seconds": self.seconds,
                "probed_epoch": self.probed_epoch,
                "persistence": self.persistence.state,
            }
        )

    def resume(self) -> None:
        state = self.run.load_state(self.device)
        if state is None or not (self.run.folder / "config.json").exists():
            self.run.write_config()
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("epoch", "done", "loss_sum", "right", "seconds", "probed_epoch"):
            setattr(self, name, state[name])
        config = self.config
        held = {k: {s: t.cpu() for s, t in sets.items()} for k, sets in state["persistence"].items()}
        self.persistence = probes.Persistence(config.persistence_steps, config.persistence_window, held)


def share(mask: Tensor) -> float:
    return mask.double().mean().item()


def seconds_per_step(config: RunConfig, steps: int = 3) -> float:
    """A short measurement, for estimates: the median time of a training step as configured, on made-up images."""
    device = pick_device(config)
    size = config.image_size or {"digits": 8, "fashion-mnist": 28}.get(config.dataset, 32)
    channels = 1 if config.dataset in ("digits", "fashion-mnist") else 3
    classes = 100 if config.dataset == "cifar100" else 10
    keep_memory()
    with numerics(config, device):
        layout = torch.channels_last if size >= 16 else torch.contiguous_format
        model = build_model(config.model, config.width, config.stem, channels, classes, 0)
        model = model.to(device, memory_format=layout)
        step = EagerStep(model, SAM(model.parameters(), 0.01, config.rho, mix=config.mix), config, device)
        x = torch.randn(config.batch_size, channels, size, size, device=device).to(memory_format=layout)
        y = torch.randint(0, classes, (config.batch_size,), device=device)
        times = []
        for _ in range(steps + 1):
            begin = time.perf_counter()
            step(x, y)[0].item()
            times.append(time.perf_counter() - begin)
    return sorted(times[1:])[steps // 2]
