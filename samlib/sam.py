"""SAM and its masked variants: one optimizer, and one table of eight numbers for every update rule.

A parameter's *checkpoint* at one step says how its gradient changes from w (g) to the ascent point
w + rho g / ||g|| (g'):

                     |g'| >= |g|   |g'| < |g|
    same sign             1            2
    opposite sign         3            4          and 0, inactive, where g or g' is exactly zero

Beside the second document's own code: its optimizer for "checkpoint14" applies its mask inverted and is checkpoint23
here, and its classes SAMMAGNITUDE and SAMDIRECTION carry each other's names; all its other rules are these.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.sgd import sgd

ONES, ZEROS = (1.0,) * 4, (0.0,) * 4
CONTROLS = ("shuffled", "rescaled", "length")


@dataclass(frozen=True)
class Mix:
    """The rule d = sum_k [checkpoint = k] (a_k g' + b_k g) that turns (g, g') into the update direction.

    Inactive parameters take a_1 g' + b_1 g. A control, before the name, asks why a mix does what it does: shuffled
    permutes the checkpoints of each tensor's active parameters at random, rescaled takes d ||g|| / ||d||, length takes
    g ||d|| / ||g||, with norms over all parameters of a group.

    >>> Mix.parse("checkpoint134")
    Mix(name='checkpoint134', a=(1.0, 0.0, 1.0, 1.0), b=(0.0, 1.0, 0.0, 0.0), control='')
    """

    name: str = field(compare=False)
    a: tuple[float, ...]  # four numbers, on g'
    b: tuple[float, ...]  # four numbers, on g
    control: str = ""  # or one of CONTROLS

    @classmethod
    def parse(cls, name: str) -> "Mix":
        """The mix of a name; scale2x0.5 is SANER (arXiv 2411.17132). Raises ValueError that tells the known ones."""
        control, dash, rest = name.partition("-")
        if dash and control in CONTROLS:
            mix = cls.parse(rest)
            if mix.control or not mix.second_pass:
                raise ValueError(f"mix {name!r}: {control} is a control of a mix that is neither sgd nor a control")
            if control == "shuffled" and len(set(zip(mix.a, mix.b, strict=True))) == 1:
                raise ValueError(f"mix {name!r}: {rest} treats all checkpoints alike: there is nothing to shuffle")
            return cls(name, mix.a, mix.b, control)
        signs = (1.0, 1.0, -1.0, -1.0)
        fixed = {"sgd": (ZEROS, ONES), "sam": (ONES, ZEROS), "magnitude": (signs, ZEROS), "direction": (ZEROS, signs)}
        if name in fixed:
            return cls(name, *fixed[name])
        if match := re.fullmatch(r"checkpoint(?=.)(1?2?3?4?)", name):
            a = tuple(float(k in match[1]) for k in "1234")
            return cls(name, a, tuple(1.0 - x for x in a))
        match = re.fullmatch(r"(scale|gain)([1-4])x([0-9]+(?:\.[0-9]+)?)", name)
        if match and (factor := float(match[3])) <= 1e6:
            scaled = tuple(factor if k == match[2] else 1.0 for k in "1234")
            return cls(name, scaled, ZEROS) if match[1] == "scale" else cls(name, ZEROS, scaled)
        raise ValueError(
            f"mix {name!r} is unknown; known are sgd, sam, magnitude, direction, checkpoint and some of 1234 in "
            "order (checkpoint134), scale<class>x<factor> and gain<class>x<factor> with a factor up to 1e6 (gain1x2), "
            "and shuffled-, rescaled- or length- before one of them"
        )

    def warmed(self, progress: float) -> "Mix":
        """The mix on the way from SAM's eight numbers (progress 0) to its own (1), linearly, under the same control."""
        a, b = (tuple(t + progress * (x - t) for x in side) for t, side in ((1.0, self.a), (0.0, self.b)))
        return self if progress == 1 else Mix(self.name, a, b, self.control)

    @property
    def second_pass(self) -> bool:
        """Whether a second gradient is needed at all: not for plain SGD."""
        return (self.a, self.b) != (ZEROS, ONES)

    @property
    def needs_g(self) -> bool:
        """Whether the update depends on g beside g': directly, through a parameter's checkpoint, or its norm."""
        return bool(self.control) or (self.a, self.b) != (ONES, ZEROS)

    def update(self, g: list[Tensor], g_sam: list[Tensor], seed: int = 0) -> list[Tensor]:
        """d, a tensor a parameter as g and g_sam are, each pair of one shape; seed: of the shuffled control."""
        shuffle = torch.Generator(g[0].device).manual_seed(seed) if self.control == "shuffled" else None
        d = [self._direction(*pair, shuffle) for pair in zip(g, g_sam, strict=True)]
        if self.control in ("rescaled", "length"):
            along, other = (d, g) if self.control == "rescaled" else (g, d)
            scale = _ratio(get_total_norm(other), get_total_norm(along))
            d = [t * scale.to(t) for t in along]
        return d

    def _direction(self, g: Tensor, g_sam: Tensor, shuffle: torch.Generator | None) -> Tensor:
        first, *others = dict.fromkeys(zip(self.a, self.b, strict=True))
        d = _weighted(g, g_sam, *first)
        if others:
            codes = checkpoint_codes(g, g_sam)
            if shuffle:
                active = codes != 0
                members = codes[active]
                order = torch.randperm(len(members), generator=shuffle, device=codes.device)
                codes = codes.masked_scatter(active, members[order])
            if not first[0]:  # a NaN of g' is in no class, but must show
                d = torch.add(d, g_sam, alpha=0.0)
        for other in others:
            members = [codes == k for k in (2, 3, 4) if (self.a[k - 1], self.b[k - 1]) == other]
            d = torch.where(sum(members[1:], members[0]), _weighted(g, g_sam, *other), d)
        return d


def checkpoint_codes(g: Tensor, g_sam: Tensor) -> Tensor:
    """The checkpoint of every parameter, 0 to 4, decided exactly: no division, no epsilon, no product but of signs.

    g and g_sam have one shape, else ValueError; so has the result (uint8). A NaN in either belongs to no class: 0.
    Source: the four cases of "Geometry SAM", with the ties and zeros that a ratio leaves open put in 1, 3 and 0.

    >>> checkpoint_codes(torch.tensor([1., 2., 1., 2., 0.]), torch.tensor([2., 1., -2., -1., 1.])).tolist()
    [1, 2, 3, 4, 0]
    """
    if g.shape != g_sam.shape:
        raise ValueError(f"g has shape {tuple(g.shape)} and g_sam {tuple(g_sam.shape)}: they must be of one shape")
    signs = g.sign() * g_sam.sign()  # -1, 0 or 1; a NaN has the sign 0
    smaller = g_sam.abs() < g.abs()
    # In floats, which vectorize where bytes do not: 1 or 3 by the signs, 1 more where smaller, 0 where inactive.
    return ((2 - signs + smaller.to(signs.dtype)) * signs.abs()).to(torch.uint8)


def _weighted(g: Tensor, g_sam: Tensor, a: float, b: float) -> Tensor:
    terms = [x if c == 1 else c * x for c, x in ((a, g_sam), (b, g)) if c]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(g)


def _ratio(numerator: Tensor | float, norm: Tensor) -> Tensor:
    """numerator / norm as a scalar tensor: 0 where the norm is, finite for a tiny one, NaN for a NaN."""
    return torch.where(norm == 0, 0.0, numerator / norm).clamp(max=torch.finfo(norm.dtype).max)


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
            keep, scale = _mix(group).needs_g, _ratio(group["rho"], norm)
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
