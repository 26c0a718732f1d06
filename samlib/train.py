"""train(config, root) -> Run: one training from its configuration to its folder, resumable at any step."""

import ctypes
import io
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from samlib import probes
from samlib.config import RunConfig, UserError
from samlib.data import Batches, Data, load_data
from samlib.measures import Moment, StepProbes, measured
from samlib.models import build_model, mode
from samlib.probes import share
from samlib.runs import Run, write_atomic
from samlib.sam import SAM
from samlib.step import EagerStep, GraphStep

_one_at_a_time = threading.Lock()  # a process's threads share torch's settings and its generator


class Diverged(Exception):
    """A loss that is not finite: the run ends here and says so."""


def train(config: RunConfig, root: str | Path = "runs/local", *, progress: bool = True) -> Run:
    """Trains as configured and returns the run, at once where it is finished already; resumes one that was interrupted.

    The folder is `root/<run id>`; another process on the same run is waited for. A loss that is not finite ends the
    run with the status "diverged". Raises UserError for data that cannot be read, a device that is not there, a full
    disk, or a configuration that does not fit its data.
    """
    run = Run(config, root)
    if run.done and run.summary:
        run.clear_states()  # left there by a kill just after the summary was written
        return run
    device = pick_device(config)
    keep_memory()
    with _one_at_a_time, run.lock(), numerics(config, device):
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
    """Threads, TF32 and determinism as configured inside, and as they were after; nothing of what surrounds it, such as
    autocast, a default dtype or device, reaches inside. For one thread of a process at a time."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    conv, benchmark = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        torch.set_num_threads(config.threads)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest" if config.precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = config.precision != "fp32"
        torch.backends.cudnn.benchmark = not config.deterministic
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        # Only where another default stands: under a torch.device every call costs more.
        elsewhere = torch.get_default_device() != torch.device("cpu")
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            torch.device("cpu") if elsewhere else nullcontext(),
        ):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = conv, benchmark
        if config.deterministic:
            torch.use_deterministic_algorithms(deterministic)


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Mean loss, and predictions (n,), in evaluation mode and fp32, of uint8 images (n, channels, height, width)."""
    loss, predictions = torch.zeros((), dtype=torch.float64, device=images.device), [labels[:0]]
    with mode(model, training=False), probes.full_precision():
        for part, part_labels in zip(images.split(500), labels.split(500), strict=True):
            logits = model(data.normalized(part))
            loss += cross_entropy(logits, part_labels, reduction="sum")
            predictions.append(logits.argmax(1))
    return loss.item() / len(images) if len(images) else float("nan"), torch.cat(predictions)


class Training:
    """The objects of one training and its position; `go` is the loop."""

    # Where it stands, and sums over the epoch's steps so far: what a state holds beside weights and momentum.
    POSITION = ("epoch", "done", "loss_sum", "right", "seconds")
    # What a finished run says of itself, beside the facts: the last evaluation's. And of early stopping, the epoch and
    # the test accuracy of the evaluation that is best on the validation images, the first of several that tie.
    FINAL = (
        "train_accuracy", "eval_train_accuracy", "eval_train_loss", "validation_accuracy", "validation_loss",
        "test_accuracy", "test_loss", "memorized", "corrected", "memorized_chance",
    )  # fmt: skip

    def __init__(self, config: RunConfig, run: Run, device: torch.device) -> None:
        self.config, self.run, self.device = config, run, device
        self.data = load_data(config, device)
        self.batches = Batches(self.data, config)
        self.total_steps = config.epochs * self.batches.steps
        late = [step for step in config.persistence_steps if step >= self.total_steps]
        if late:
            raise UserError(f"persistence_steps: step {late[0]} never comes, the last is {self.total_steps - 1}")
        for name in ("curvature_every", "convergence_every"):
            if getattr(config, name) and len(self.data.images) < 16:
                raise UserError(f"{name}: it needs 16 training images, the subset has {len(self.data.images)}")
        if config.noise_every and not self.data.flipped.any():
            images = len(self.data.images)
            raise UserError(f"noise_every: no label of {images} training images is flipped; raise noise_fraction")
        self.start()

    def start(self) -> None:
        """The objects as they are before the first step."""
        config = self.config
        channels, classes = self.data.images.shape[1], len(self.data.classes)
        model = build_model(config.model, config.width, config.stem, channels, classes, config.seed)
        self.model = model.to(self.device)
        settings = {"rho": config.rho, "momentum": config.momentum, "weight_decay": config.weight_decay}
        self.optimizer = SAM(model.parameters(), config.lr, mix=config.mix, seed=config.seed, **settings)
        # The first steps after a start are never a graph's, so to the bit a resumed run is not one that never stopped;
        # and a graph would replay one permutation for ever.
        graph = config.graph and not config.deterministic and not config.mix.startswith("shuffled")
        step = GraphStep if self.device.type == "cuda" and graph else EagerStep
        self.step = step(self.model, self.optimizer, config, self.device)
        self.probes = StepProbes(config, self.model, self.batches)
        self.epoch = self.done = 0  # the next step is step `done` of epoch `epoch`
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.right = torch.zeros((), dtype=torch.int64, device=self.device)
        self.seconds = 0.0

    def go(self, progress: bool) -> None:
        config, run = self.config, self.run
        self.resume()
        started = last_state = time.monotonic()
        before = self.seconds
        bar = tqdm(
            total=self.total_steps, initial=self.epoch * self.batches.steps + self.done, unit="step", mininterval=2.0,
            desc=run.id, disable=not progress,
        )  # fmt: skip
        self.model.train()
        try:
            for epoch in range(self.epoch, config.epochs):
                self.epoch = epoch
                lr = config.learning_rate(epoch)
                self.set_group(lr, config.mix_progress(epoch))
                plan = self.batches.epoch(epoch)

                for step in range(self.done, self.batches.steps):
                    batch = self.batches.assemble(*plan[step])
                    at = epoch * self.batches.steps + step
                    for table, rows in self.probes.tables(at, *batch, lr):
                        run.append(table, rows)
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
                if config.due(config.eval_every, epoch + 1):
                    run.append("metrics", [self.metrics_row(epoch + 1, lr)])
                params, states = list(self.model.parameters()), self.optimizer.state
                momentum = [states[p].get("momentum_buffer", torch.zeros_like(p)) for p in params]
                moment = Moment(config, self.model, self.data, self.batches, plan, momentum, lr)
                for table, rows in measured(moment, epoch + 1):
                    run.append(table, rows)
                self.done = 0
                self.loss_sum.zero_()
                self.right.zero_()
        except Diverged:
            step = self.epoch * self.batches.steps + self.done - 1
            nothing = dict.fromkeys((*self.FINAL, "stopped_epoch", "stopped_test_accuracy"))
            run.finish(self.facts() | {"status": "diverged", "diverged_step": step} | nothing)
            return
        finally:
            bar.close()
        self.finish()

    def finish(self) -> None:
        rows = self.run.rows["metrics"]
        if self.config.keep_weights:
            buffer = io.BytesIO()
            torch.save(self.model.state_dict(), buffer)
            write_atomic(self.run.folder / "weights.pt", buffer.getvalue())
        results = {name: None if rows[-1][name] != rows[-1][name] else rows[-1][name] for name in self.FINAL}
        stop = max(rows, key=lambda row: row["validation_accuracy"]) if len(self.data.validation_labels) else {}
        results |= {"stopped_epoch": stop.get("epoch"), "stopped_test_accuracy": stop.get("test_accuracy")}
        self.run.finish(self.facts() | {"status": "done", "diverged_step": None} | results)

    def facts(self) -> dict[str, Any]:
        gpu = self.device.type == "cuda"
        steps = self.epoch * self.batches.steps + (self.done or self.batches.steps)
        return {
            "steps": steps,
            "steps_per_epoch": self.batches.steps,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "train_images": len(self.data.images),
            "validation_images": len(self.data.validation_images),
            "flipped": int(self.data.flipped.sum()),
            "test_images": len(self.data.test_images),
            "number_of_classes": len(self.data.classes),
            "gradient_evaluations": steps * self.config.passes,
            "seconds": round(self.seconds, 3),
            "device_name": torch.cuda.get_device_name() if gpu else f"CPU, {self.config.threads} thread(s)",
        }

    def set_group(self, lr: float, mix_progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["mix_progress"] = mix_progress
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def metrics_row(self, epochs_done: int, lr: float) -> dict[str, Any]:
        data, seen = self.data, min(self.batches.steps * self.config.batch_size, len(self.data.images))
        test_loss, test = evaluate(self.model, data, data.test_images, data.test_labels)
        train_loss, predicted = evaluate(self.model, data, data.images, data.labels)
        validation_loss, validation = evaluate(self.model, data, data.validation_images, data.validation_labels)
        if not test_loss < float("inf"):
            raise Diverged
        corrected = share((predicted == data.true_labels)[data.flipped])
        return {
            "epoch": epochs_done,
            "step": epochs_done * self.batches.steps,
            "gradient_evaluations": epochs_done * self.batches.steps * self.config.passes,
            "lr": lr,
            "train_loss": self.loss_sum.item() / seen,
            "train_accuracy": self.right.item() / seen,
            "eval_train_loss": train_loss,
            "eval_train_accuracy": share(predicted == data.labels),
            "validation_loss": validation_loss,
            "validation_accuracy": share(validation == data.validation_labels),
            "test_loss": test_loss,
            "test_accuracy": share(test == data.test_labels),
            "memorized": share((predicted == data.labels)[data.flipped]),
            "corrected": corrected,
            "memorized_chance": (1 - corrected) / (len(data.classes) - 1),  # of a net that knows nothing of the flips
            "seconds": round(self.seconds, 3),
        }

    def save(self) -> None:
        state = {name: getattr(self, name) for name in self.POSITION}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.run.save_state(state | {"persistence": self.probes.persistence.state, "data": self.data.fingerprint})

    def use(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.probes.persistence.state = state["persistence"]
        for name in self.POSITION:
            setattr(self, name, state[name])

    def resume(self) -> None:
        if not self.run.load_state(self.use, self.data.fingerprint, self.device):
            self.start()  # anew also where a state was half taken
        elif self.run.described:
            return
        self.run.write_config(self.data.fingerprint)
