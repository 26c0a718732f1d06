"""One update of the weights: as ordinary calls, or on a GPU captured once and replayed as one CUDA graph."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from samlib.config import RunConfig
from samlib.models import frozen_statistics
from samlib.sam import SAM

EAGER_STEPS = 3  # before a capture: kernels are chosen, momentum buffers made


class EagerStep:
    """One update: both passes over one batch, and the optimizer between and after them."""

    def __init__(self, model: nn.Module, optimizer: SAM, config: RunConfig, device: torch.device) -> None:
        self.model, self.optimizer, self.second = model, optimizer, config.passes == 2
        self.bf16 = config.precision == "bf16"
        self.device = device

    def backward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            logits = self.model(x)
            loss = cross_entropy(logits.float(), y)
        loss.backward()
        return loss.detach(), logits.detach()

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss () at the weights before the update, and how many of the batch were right ()."""
        self.optimizer.zero_grad()
        loss, logits = self.backward(x, y)
        if self.second:
            self.optimizer.first_step()
            with frozen_statistics(self.model):
                self.backward(x, y)
            self.optimizer.second_step()
        else:
            self.optimizer.step()
        return loss, (logits.argmax(1) == y).sum()


class GraphStep:
    """As EagerStep, for static input buffers: a batch is copied in and the graph is replayed, with no Python between.

    One graph a batch size: the last, smaller batch of an epoch has its own. The first steps of each size are ordinary
    training steps on a side stream; nothing is done twice. The learning rate is a tensor, so that a schedule can
    change it.
    """

    def __init__(self, model: nn.Module, optimizer: SAM, config: RunConfig, device: torch.device) -> None:
        self.eager = EagerStep(model, optimizer, config, device)
        self.optimizer = optimizer
        self.stream = torch.cuda.Stream()
        self.seen: dict[int, int] = {}
        self.graphs: dict[int, tuple[Any, Tensor, Tensor, tuple[Tensor, Tensor]]] = {}
        self.mixes: list[float] = []  # how far each group's mix is on its way, which a graph holds fast
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        size = len(y)
        mixes = [group["mix_progress"] for group in self.optimizer.param_groups]
        if mixes != self.mixes:
            self.graphs, self.mixes = {}, mixes
        if size not in self.graphs:
            if self.seen.get(size, 0) < EAGER_STEPS:
                self.seen[size] = self.seen.get(size, 0) + 1
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    result = self.eager(x, y)
                torch.cuda.current_stream().wait_stream(self.stream)
                return result
            static_x, static_y = x.clone(), y.clone()
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):  # records, does not run
                result = self.eager(static_x, static_y)
            self.graphs[size] = (graph, static_x, static_y, result)
        graph, static_x, static_y, result = self.graphs[size]
        static_x.copy_(x)
        static_y.copy_(y)
        graph.replay()
        return result
