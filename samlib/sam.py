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
from inspect import unwrap

import torch
from torch import Tensor

ONES, ZEROS = (1.0,) * 4, (0.0,) * 4
CONTROLS = ("shuffled", "rescaled", "length")


@dataclass(frozen=True)
class Mix:
    """The rule d = sum_k [checkpoint = k] (a_k g' + b_k g) that turns (g, g') into the update direction.

    Inactive parameters (checkpoint 0) take a_1 g' + b_1 g. A control, before the name, asks why a mix does what it does:
    shuffled permutes the checkpoints of each tensor's active parameters at random, rescaled takes d ||g|| / ||d||, length
    takes g ||d|| / ||g||, with norms over all parameters of a group.

    >>> Mix.parse("checkpoint134")
    Mix(name='checkpoint134', a=(1.0, 0.0, 1.0, 1.0), b=(0.0, 1.0, 0.0, 0.0), control='')
    >>> Mix.parse("shuffled-gain1x2").b
    (2.0, 1.0, 1.0, 1.0)
    """

    name: str = field(compare=False)
    a: tuple[float, ...]  # four numbers, on g'
    b: tuple[float, ...]  # four numbers, on g
    control: str = ""  # or one of CONTROLS

    @classmethod
    def parse(cls, name: str) -> "Mix":
        """sgd, sam, magnitude, direction, checkpoint<subset of 1234>, scale<class>x<factor>, gain<class>x<factor>, or a
        control before one of them: shuffled-<mix>, rescaled-<mix>, length-<mix>. scale2x0.5 is SANER (arXiv 2411.17132).

        Raises ValueError for anything else, and for a control that would change nothing.
        """
        control, dash, rest = name.partition("-")
        if dash and control in CONTROLS:
            mix = cls.parse(rest)
            if mix.control or (mix.a, mix.b) == (ZEROS, ONES):
                raise ValueError(f"mix {name!r}: {control} is a control of a mix that is neither sgd nor a control")
            if control == "shuffled" and len(set(zip(mix.a, mix.b, strict=True))) == 1:
                raise ValueError(f"mix {name!r}: {rest} treats all checkpoints alike, so shuffling them changes nothing")
            return cls(name, mix.a, mix.b, control)
        fixed = {
            "sgd": (ZEROS, ONES),
            "sam": (ONES, ZEROS),
            "magnitude": ((1.0, 1.0, -1.0, -1.0), ZEROS),
            "direction": (ZEROS, (1.0, 1.0, -1.0, -1.0)),
        }
        if name in fixed:
            return cls(name, *fixed[name])
        if (match := re.fullmatch(r"checkpoint(1?2?3?4?)", name)) and match[1]:
            a = tuple(float(k in match[1]) for k in "1234")
            return cls(name, a, tuple(1.0 - x for x in a))
        if match := re.fullmatch(r"(scale|gain)([1-4])x([0-9]+(?:\.[0-9]+)?)", name):
            factor = float(match[3])
            if factor <= 1e6:
                scaled = tuple(factor if k == match[2] else 1.0 for k in "1234")
                return cls(name, scaled, ZEROS) if match[1] == "scale" else cls(name, ZEROS, scaled)
        raise ValueError(
            f"mix {name!r} is unknown; known are sgd, sam, magnitude, direction, checkpoint followed by some of 1234 "
            "in order (checkpoint134), scale<class>x<factor> and gain<class>x<factor> with a factor up to 1e6 (gain1x2), "
            "and shuffled-, rescaled- or length- before one of them"
        )

    def warmed(self, progress: float) -> "Mix":
        """The mix on the way from SAM's eight numbers (progress 0) to its own (1), linearly."""
        a, b = ((t + progress * (x - t) for x in side) for t, side in ((1.0, self.a), (0.0, self.b)))
        return self if progress == 1 else Mix(self.name, tuple(a), tuple(b), self.control)

    @property
    def second_pass(self) -> bool:
        """Whether a second gradient is needed at all: not for plain SGD."""
        return (self.a, self.b) != (ZEROS, ONES)

    @property
    def needs_g(self) -> bool:
        """Whether the update depends on g beside g': directly, through a parameter's checkpoint, or its norm."""
        return bool(self.control) or (self.a, self.b) != (ONES, ZEROS)

    def direction(self, g: Tensor, g_sam: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """d of one tensor, before any rescaling; g and g_sam are of one shape. generator: of the shuffled control."""
        weights = list(zip(self.a, self.b, strict=True))
        d = _weighted(g, g_sam, *weights[0])
        others = set(weights) - {weights[0]}
        if others:
            codes = checkpoint_codes(g, g_sam)
            if self.control == "shuffled":
                codes = _shuffled(codes, generator)
        for other in others:
            members = [codes == k for k in (2, 3, 4) if weights[k - 1] == other]
            d = torch.where(sum(members[1:], members[0]), _weighted(g, g_sam, *other), d)
        return d


def checkpoint_codes(g: Tensor, g_sam: Tensor) -> Tensor:
    """The checkpoint of every parameter, 0 to 4, decided exactly: no division, no epsilon, no product but of signs.

    g and g_sam have one shape; so has the result (uint8). A NaN in either belongs to no class and gives 0.
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


def _shuffled(codes: Tensor, generator: torch.Generator | None) -> Tensor:
    active = codes != 0
    members = codes[active]
    order = torch.randperm(len(members), generator=generator, device=codes.device)
    return codes.masked_scatter(active, members[order])


@lru_cache
def _mix(name: str, progress: float = 1.0) -> Mix:
    return Mix.parse(name).warmed(progress)


def _scale(numerator: Tensor | float, norm: Tensor) -> Tensor:
    """numerator / norm as a scalar tensor, 0 where the norm is, and finite."""
    return torch.where(norm > 0, numerator / norm, 0.0).clamp(max=torch.finfo(norm.dtype).max)


def _laid_out(tensor: Tensor, model: Tensor) -> Tensor:
    return tensor if tensor.stride() == model.stride() else torch.empty_like(model).copy_(tensor)


class SAM(torch.optim.SGD):
    """Sharpness-Aware Minimization (Foret et al., 2021) and every mix of `Mix`, with SGD's momentum and weight decay.

    Two passes over the same batch a step::

        loss(model(x), y).backward()
        optimizer.first_step()   # w <- w + rho g / ||g||, over all parameters; gradients are cleared
        loss(model(x), y).backward()
        optimizer.second_step()  # back to w, bit for bit; then SGD along the mix of g and g'

    or `optimizer.step(closure)`, where the closure clears the gradients, computes the loss and calls backward. The
    second pass should not move BatchNorm's running statistics: see `samlib.models.frozen_statistics`.

    The perturbation uses the gradient of the loss alone; weight decay joins in the update. A zero gradient perturbs
    nothing. rho = 0 with mix "sam" is torch's SGD(fused=True), to the bit. Parameters without a gradient stay as they
    are; one that has a gradient in only one of the passes counts as zero in the other. An exception inside
    `step(closure)`, and `load_state_dict` between the half-steps, put the weights back; `restore()` does so by hand.

    params: tensors or parameter groups; lr, momentum, weight_decay: as torch.optim.SGD; rho: radius, in the units of
    the weights, at least 0; mix: a name that `Mix.parse` takes; seed: of the shuffled control, whose permutations follow
    from it and the number of the step. rho, mix, and `mix_progress` (see `Mix.warmed`), are settings of a parameter
    group, as lr is. Memory beyond SGD's: one copy of the parameters, and one of the gradients for a mix that needs g.
    Raises ValueError for a value out of range and RuntimeError for half-steps out of order.
    """

    _weights: dict[Tensor, Tensor] | None = None  # between the half-steps: w of the parameters that had a gradient
    _gradients: dict[Tensor, Tensor] | None = None  # and g of those whose mix needs it

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        rho: float = 0.05,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        mix: str = "sam",
        seed: int = 0,
    ) -> None:
        self._more_defaults = {"rho": rho, "mix": mix, "mix_progress": 1.0, "seed": seed, "steps": 0}
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict) -> None:
        self.defaults |= vars(self).pop("_more_defaults", {})
        group = self.defaults | param_group
        _mix(group["mix"])
        if not 0 <= group["rho"] < float("inf"):
            raise ValueError(f"rho is {group['rho']!r}: it must be a finite number of at least 0")
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        self.param_groups[-1]["fused"] = all(
            p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params
        )

    def __setstate__(self, state: dict) -> None:  # also what load_state_dict calls
        self.restore()
        super().__setstate__(state)

    @torch.no_grad()
    def restore(self) -> None:
        """Between the half-steps, puts the weights back as they were before the first; elsewhere does nothing."""
        for p, weights in (self._weights or {}).items():
            p.copy_(weights)
        self._weights = self._gradients = None

    @torch.no_grad()
    def first_step(self) -> None:
        """Moves the weights to the ascent point and clears the gradients. Call after the first backward pass."""
        if self._weights is not None:
            raise RuntimeError("first_step was called twice: call second_step after the second backward pass")
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        norm = torch.nn.utils.get_total_norm([p.grad for _, params in groups for p in params])
        self._weights = {p: p.clone() for _, params in groups for p in params}
        self._gradients = {}
        for group, params in groups:
            if _mix(group["mix"], group["mix_progress"]).needs_g:
                self._gradients |= {p: p.grad.clone() for p in params}  # .grad may be a buffer of somebody else's
            if group["rho"] > 0:
                scale = _scale(group["rho"], norm)
                for p in params:
                    p.addcmul_(p.grad, scale.to(p))
        self.zero_grad(set_to_none=True)

    @torch.no_grad()
    def second_step(self) -> None:
        """Puts the weights back and updates them along the mix. Call after the second backward pass."""
        if self._weights is None:
            raise RuntimeError("second_step was called without first_step")
        seen, gradients = self._weights, self._gradients
        self.restore()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None and p in seen:
                    p.grad = torch.zeros_like(p)
            mix = _mix(group["mix"], group["mix_progress"])
            if mix.needs_g:
                self._mix([p for p in group["params"] if p.grad is not None], gradients, mix, group)
            group["steps"] += 1
        self._update()

    def _mix(self, params: list[Tensor], gradients: dict[Tensor, Tensor], mix: Mix, group: dict) -> None:
        generator = None
        if mix.control == "shuffled" and params:
            seed = random.Random(f"{group['seed']} {group['steps']}").getrandbits(63)
            generator = torch.Generator(params[0].device).manual_seed(seed)
        g = [gradients[p] if p in gradients else torch.zeros_like(p) for p in params]
        d = [mix.direction(a, p.grad, generator) for a, p in zip(g, params, strict=True)]
        if mix.control in ("rescaled", "length") and params:
            along, other = (d, g) if mix.control == "rescaled" else (g, d)
            scale = _scale(torch.nn.utils.get_total_norm(other), torch.nn.utils.get_total_norm(along))
            d = [t * scale.to(t) for t in along]
        for p, t in zip(params, d, strict=True):
            p.grad = t

    # SGD's rule without torch's wrappers, which would call the hooks of a step a second time.
    _sgd: Callable = unwrap(torch.optim.SGD.step)

    @torch.no_grad()
    def _update(self) -> None:
        for group in self.param_groups:  # the fused rule wants one memory layout a parameter, and all buffers or none
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.grad = _laid_out(p.grad, p)
                if group["momentum"]:
                    buffer = self.state[p].get("momentum_buffer")
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p) if buffer is None else _laid_out(buffer, p)
        self._sgd()
        self._opt_called = True  # what a learning rate schedule looks for

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Both half-steps around a closure. Only plain SGD (mix "sgd" in every group) can step without one."""
        second_pass = any(_mix(group["mix"], group["mix_progress"]).second_pass for group in self.param_groups)
        if closure is None:
            if second_pass:
                raise RuntimeError("SAM needs a second gradient: call step(closure), or first_step and second_step")
            return self._update()
        with torch.enable_grad():
            loss = closure()
        if not second_pass:
            self._update()
            return loss
        self.first_step()
        try:
            with torch.enable_grad():
                closure()
            self.second_step()
        except BaseException:
            self.restore()
            raise
        return loss
