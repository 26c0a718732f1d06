"""SAM and its masked variants: one optimizer, and a `Mix` for every update rule."""

import random
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.sgd import sgd

from samlib.mix import Mix, checkpoint_codes, ratio

__all__ = ["SAM", "Mix", "checkpoint_codes"]


def _like(tensor: Tensor, p: Tensor) -> Tensor:
    """The tensor in the dtype, device and memory layout of a parameter: the fused rule reads memory, not indices."""
    same = (tensor.dtype, tensor.device, tensor.stride()) == (p.dtype, p.device, p.stride())
    return tensor if same else torch.empty_like(p).copy_(tensor)


@lru_cache
def _warmed(name: str, progress: float) -> Mix:
    return Mix.parse(name).warmed(progress)


def _mix(group: dict) -> Mix:
    return _warmed(group["mix"], group["mix_progress"])


def _moving(group: dict) -> list[Tensor]:
    """The parameters that have a gradient."""
    params = [p for p in group["params"] if p.grad is not None]
    if any(p.grad.layout != torch.strided for p in params):
        raise RuntimeError("SAM takes dense gradients only, and a parameter has a sparse one: use sparse=False there")
    return params


class SAM(torch.optim.Optimizer):
    """Sharpness-Aware Minimization (Foret et al., 2021) and every mix of `Mix`, with SGD's momentum and weight decay.

    Two passes over the same batch a step::

        loss(model(x), y).backward()
        optimizer.first_step()   # w <- w + rho g / ||g||, over all parameters; gradients are cleared
        loss(model(x), y).backward()
        optimizer.second_step()  # back to w, bit for bit; then SGD along the mix of g and g'

    or `optimizer.step(closure)`, where the closure clears the gradients, computes the loss and calls backward. The
    second pass should not move BatchNorm's running statistics: see `samlib.models.frozen_statistics`.

    The perturbation is along the loss's gradient alone; weight decay joins in the update. A zero gradient perturbs
    nothing, a NaN shows in the weights. rho = 0 with mix "sam" is torch's SGD(fused=True), to the bit. A parameter
    without a gradient stays; one with a gradient in only one pass counts as zero in the other. An exception inside
    `step(closure)` puts the weights back, and so does `load_state_dict` between the half-steps, but for weights that
    were written to since; `restore()` does it by hand. A state of torch's SGD loads: rho and mix stay as they are.

    params: tensors or parameter groups; lr, momentum, weight_decay: as torch.optim.SGD; rho: radius, in the units of
    the weights, at least 0; mix: a name that `Mix.parse` takes; seed: of the shuffled control, whose permutations
    follow from it and the number of the step. rho, mix and `mix_progress` (of `Mix.warmed`) are settings of a group, as
    lr is. Memory beyond SGD's: one copy of the parameters, and one of the gradients for a mix that needs g. Raises
    ValueError for a value out of range, RuntimeError for half-steps out of order and sparse gradients.
    """

    # Between the half-steps, of each parameter that had a gradient: w; g, where the mix needs it; and torch's count of
    # writes to the parameter.
    _before: dict[Tensor, tuple[Tensor, Tensor | None, int]] | None = None

    def __init__(
        self, params: Iterable, lr: float | Tensor, rho: float = 0.05, momentum: float = 0.0, weight_decay: float = 0.0,
        mix: str = "sam", seed: int = 0,
    ) -> None:  # fmt: skip
        own = {"rho": rho, "mix": mix, "mix_progress": 1.0, "seed": seed, "steps": 0}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay} | own)

    def add_param_group(self, param_group: dict) -> None:
        group = self.defaults | param_group
        Mix.parse(group["mix"])
        for name in ("lr", "rho", "momentum", "weight_decay"):
            if not 0 <= group[name] < float("inf"):
                raise ValueError(f"{name} is {group[name]!r}: it must be a finite number of at least 0")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict) -> None:  # also what load_state_dict calls
        for group in state["param_groups"]:
            if other := [name for name in ("nesterov", "maximize", "dampening") if group.get(name)]:
                raise ValueError(f"the state is of an optimizer with {other[0]}, which SAM does not have")
        self._before = {p: kept for p, kept in (self._before or {}).items() if p._version == kept[2]}
        self.restore()
        super().__setstate__(state)
        for group in self.param_groups:
            group |= {name: self.defaults[name] for name in self.defaults.keys() - group.keys() - {"differentiable"}}

    @torch.no_grad()
    def restore(self) -> None:
        """Between the half-steps, puts the weights back as they were before the first; elsewhere does nothing."""
        for p, (weights, *_) in (self._before or {}).items():
            p.copy_(weights)
        self._before = None

    @torch.no_grad()
    def first_step(self) -> None:
        """Moves the weights to the ascent point and clears the gradients. Call after the first backward pass."""
        if self._before is not None:
            raise RuntimeError("first_step was called twice: call second_step after the second backward pass")
        groups = [(group, _moving(group)) for group in self.param_groups]
        norm = get_total_norm([p.grad for _, params in groups for p in params])
        self._before = {}
        for group, params in groups:
            keep, scale = _mix(group).needs_g, ratio(group["rho"], norm)
            for p in params:
                before = p.clone(), p.grad.clone() if keep else None  # .grad may be a buffer of somebody else's
                if group["rho"] > 0:
                    p.addcmul_(p.grad, scale.to(p))
                self._before[p] = (*before, p._version)
        self.zero_grad(set_to_none=True)

    @torch.no_grad()
    def second_step(self) -> None:
        """Puts the weights back and updates them along the mix. Call after the second backward pass."""
        if self._before is None:
            raise RuntimeError("second_step was called without first_step")
        before = self._before
        self.restore()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None and p in before:
                    p.grad = torch.zeros_like(p)
            mix, params = _mix(group), _moving(group)
            if mix.needs_g and params:
                g = [before[p][1] if p in before else torch.zeros_like(p) for p in params]
                seed = random.Random(f"{group['seed']} {group['steps']}").getrandbits(63)
                for p, d in zip(params, mix.update(g, [p.grad for p in params], seed), strict=True):
                    p.grad = d
            group["steps"] += 1
        self._update()

    @torch.optim.Optimizer.profile_hook_step  # a step's hooks, called here also for half-steps by hand
    @torch.no_grad()
    def _update(self) -> None:
        for group in self.param_groups:
            params, buffers = _moving(group), []
            for p in params if group["momentum"] else ():
                buffer = self.state[p].get("momentum_buffer")
                buffers.append(torch.zeros_like(p) if buffer is None else _like(buffer, p))
                self.state[p]["momentum_buffer"] = buffers[-1]
            settings = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
            settings |= {"dampening": 0.0, "nesterov": False, "maximize": False, "has_sparse_grad": False}
            sgd(params, [_like(p.grad, p) for p in params], buffers, fused=True, **settings)
        self._opt_called = True  # what a learning rate schedule looks for

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Both half-steps around a closure. Only plain SGD (mix "sgd" in every group) can step without one."""
        second_pass = any(_mix(group).second_pass for group in self.param_groups)
        if closure is None and second_pass:
            raise RuntimeError("SAM needs a second gradient: call step(closure), or first_step and second_step")
        closure = closure and torch.enable_grad()(closure)
        loss = closure and closure()
        if not second_pass:
            self._update()
            return loss
        try:
            self.first_step()
            closure()
            self.second_step()
        except BaseException:
            self.restore()
            raise
        return loss

    step.hooked = True  # so torch does not call the hooks here as well
