"""SAM and its masked variants: one optimizer, and one table of eight numbers for every update rule.

A parameter's *checkpoint* at one step says how its gradient changes from w (g) to the ascent point
w + rho g / ||g|| (g'):

                     |g'| >= |g|   |g'| < |g|
    same sign             1            2
    opposite sign         3            4          and 0, inactive, where g or g' is exactly zero
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import unwrap

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from samlib.compiled import compiled

ONES, ZEROS = (1.0,) * 4, (0.0,) * 4
ROW = 4096  # elements whose squares are summed one after the other
SMALL = 1 << 12  # elements up to which a tensor's own calls cost more than its arithmetic


@dataclass(frozen=True)
class Mix:
    """The rule d = sum_k [checkpoint = k] (a_k g' + b_k g) that turns (g, g') into the update direction.

    Inactive parameters (checkpoint 0) take a_1 g' + b_1 g.

    >>> Mix.parse("checkpoint134")
    Mix(name='checkpoint134', a=(1.0, 0.0, 1.0, 1.0), b=(0.0, 1.0, 0.0, 0.0))
    >>> Mix.parse("gain1x2").b
    (2.0, 1.0, 1.0, 1.0)
    """

    name: str = field(compare=False)
    a: tuple[float, ...]  # four numbers, on g'
    b: tuple[float, ...]  # four numbers, on g

    @classmethod
    def parse(cls, name: str) -> "Mix":
        """sgd, sam, magnitude, direction, checkpoint<subset of 1234>, scale<class>x<factor> or gain<class>x<factor>.

        Raises ValueError for anything else.
        """
        fixed = {
            "sgd": (ZEROS, ONES),
            "sam": (ONES, ZEROS),
            "magnitude": ((1.0, 1.0, -1.0, -1.0), ZEROS),
            "direction": (ZEROS, (1.0, 1.0, -1.0, -1.0)),
        }
        if name in fixed:
            return cls(name, *fixed[name])
        if match := re.fullmatch(r"checkpoint(1?2?3?4?)", name):
            if classes := match[1]:
                a = tuple(float(k in classes) for k in "1234")
                return cls(name, a, tuple(1.0 - x for x in a))
        if match := re.fullmatch(r"(scale|gain)([1-4])x([0-9]+(?:\.[0-9]+)?)", name):
            factor = float(match[3])
            if factor <= 1e6:
                scaled = tuple(factor if k == match[2] else 1.0 for k in "1234")
                return cls(name, scaled, ZEROS) if match[1] == "scale" else cls(name, ZEROS, scaled)
        raise ValueError(
            f"mix {name!r} is unknown; known are sgd, sam, magnitude, direction, checkpoint followed by some of 1234 "
            "in order (checkpoint134), scale<class>x<factor> and gain<class>x<factor> with a factor up to 1e6 (gain1x2)"
        )

    @property
    def second_pass(self) -> bool:
        """Whether a second gradient is needed at all: not for plain SGD."""
        return (self.a, self.b) != (ZEROS, ONES)

    @property
    def needs_g(self) -> bool:
        """Whether the update depends on g beside g': directly, or through a parameter's checkpoint."""
        return (self.a, self.b) != (ONES, ZEROS)


# Whether a class is in a subset of {2, 3, 4}, from g' as it lies along g (negative where the signs differ, zero where
# either is zero) and |g'| < |g|. Comparisons are what costs here: one or two of them each.
_MEMBERSHIP: dict[frozenset[int], Callable[[Tensor, Tensor], Tensor]] = {
    frozenset({2}): lambda along, smaller: (along > 0) & smaller,
    frozenset({3}): lambda along, smaller: (along < 0) & ~smaller,
    frozenset({4}): lambda along, smaller: (along < 0) & smaller,
    frozenset({2, 3}): lambda along, smaller: ((along < 0) ^ smaller) & (along != 0),
    frozenset({2, 4}): lambda along, smaller: smaller & (along != 0),
    frozenset({3, 4}): lambda along, smaller: along < 0,
    frozenset({2, 3, 4}): lambda along, smaller: (along < 0) | (smaller & (along != 0)),
}


def checkpoint_codes(g: Tensor, g_sam: Tensor) -> Tensor:
    """The checkpoint of every parameter, 0 to 4, decided exactly: no division, no epsilon, no product
    but that of the signs.

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


def flat(tensor: Tensor) -> Tensor:
    """The elements as one dimension in memory order, without a copy where the layout is dense."""
    if tensor.dim() == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # channels_last
    return tensor.reshape(-1)


def flat_view(tensor: Tensor) -> Tensor:
    """flat(tensor), of the same memory; the tensor itself where its layout has no such view, as a transposed matrix.

    Detached: torch.compile would look at what it is a view of.
    """
    view = flat(tensor)
    return (view if view.data_ptr() == tensor.data_ptr() else tensor).detach()


def laid_out(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor in the memory layout of its model; itself where it has it."""
    return tensor if tensor.stride() == model.stride() else torch.empty_like(model).copy_(tensor)


def chunks(*tensors: Tensor, size: int = 1 << 16) -> Iterable[tuple[Tensor, ...]]:
    """Flat tensors of one length, piece by piece: on a CPU a piece's temporaries stay in its cache."""
    if tensors[0].device.type != "cpu":
        return [tensors]
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm over all elements of all tensors, a scalar on the first one's device.

    On a CPU in rows of ROW elements: torch's own norm of one tensor runs on one core, and adds up all of its squares
    in its own precision, which float32 does not bear well for the millions of a layer.
    """
    if not tensors or any(t.device.type != "cpu" for t in tensors):
        return torch.nn.utils.get_total_norm(tensors)
    parts, short = [], []
    for tensor in map(flat, tensors):
        whole = tensor.numel() // ROW * ROW
        if whole:
            parts.append(torch.linalg.vector_norm(tensor[:whole].view(-1, ROW), dim=1))
        if whole < tensor.numel() or not whole:
            short.append(tensor[whole:])
    return torch.linalg.vector_norm(torch.cat([*parts, torch.stack(torch._foreach_norm(short))] if short else parts))


def _weighted(g: Tensor, g_sam: Tensor, a: float, b: float) -> Tensor:
    terms = [x if c == 1 else c * x for c, x in ((a, g_sam), (b, g)) if c]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(g)


def mix_gradients_(g: Tensor, g_sam: Tensor, mix: Mix) -> None:
    """Overwrites g_sam with sum_k [checkpoint = k] (a_k g_sam + b_k g); both of one shape."""
    classes: dict[tuple[float, float], set[int]] = {}
    for k, weights in enumerate(zip(mix.a, mix.b, strict=True), start=1):
        classes.setdefault(weights, set()).add(k)
    first, *others = classes.items()  # the first holds class 1, which inactive parameters follow
    d = _weighted(g, g_sam, *first[0])
    if others:
        along = g.sign() * g_sam  # exact, and zero for inactive parameters
        smaller = g_sam.abs() < g.abs()
        for weights, members in others:
            mask = _MEMBERSHIP[frozenset(members)](along, smaller)
            d = torch.where(mask, _weighted(g, g_sam, *weights), d)
    if d is not g_sam:
        g_sam.copy_(d)


# torch decorates these for its compiler, and the decorators import it: seconds, in every process, for nothing here.
_add_param_group = unwrap(torch.optim.SGD.add_param_group)
_zero_grad = unwrap(torch.optim.SGD.zero_grad)


@lru_cache
def _parse(name: str) -> Mix:
    return Mix.parse(name)


@lru_cache
def _compiled_mix(mix: Mix) -> Callable[[Tensor, Tensor], None]:
    return compiled(lambda g, g_sam: mix_gradients_(g, g_sam, mix), dynamic=True)


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
    nothing. Between the half-steps `p.data` of a parameter that moved is other memory; the weights themselves lie
    untouched, and come back as they were. rho = 0 with mix "sam" is torch's SGD(fused=True), to the bit. Parameters
    without a gradient stay as they are; one that has a gradient in only one of the passes counts as zero in the other.
    `rho` and `mix` are settings of a parameter group, as `lr` is. Memory beyond SGD's: one copy of the parameters, and
    one of the gradients for a mix that needs g.

    params: tensors or parameter groups; lr, momentum, weight_decay: as torch.optim.SGD; rho: radius, in the units of
    the weights, at least 0; mix: a name that `Mix.parse` takes; compile: compute masks in one compiled pass.
    Raises ValueError for a value out of range and RuntimeError for half-steps out of order.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        rho: float = 0.05,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        mix: str = "sam",
        *,
        compile: bool = False,
    ) -> None:
        self._group_defaults = {"rho": rho, "mix": mix}
        self._compile = compile
        self._spare: dict[Tensor, Tensor] = {}  # where the ascent point is, allocated once
        self._gradients: dict[Tensor, Tensor] = {}  # g, kept between the half-steps where the mix needs it
        self._seen: list[Tensor] | None = None  # between the half-steps: parameters that had a gradient
        self._ascended: list[tuple[Tensor, Tensor]] = []  # and the weights of those of them that moved
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict) -> None:
        group = {**self._group_defaults, **param_group}
        _parse(group["mix"])
        if not 0 <= group["rho"] < float("inf"):
            raise ValueError(f"rho is {group['rho']!r}: it must be a finite number of at least 0")
        _add_param_group(self, group)
        group = self.param_groups[-1]
        if all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"]):
            group["fused"] = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        _zero_grad(self, set_to_none)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_group_defaults": self._group_defaults, "_compile": self._compile}

    def __setstate__(self, state: dict) -> None:  # also what load_state_dict calls: a loaded state lies between steps
        super().__setstate__(state)
        self._spare, self._gradients, self._seen, self._ascended = {}, {}, None, []

    @torch.no_grad()
    def first_step(self) -> None:
        """Moves the weights to the ascent point and clears the gradients. Call after the first backward pass."""
        if self._seen is not None:
            raise RuntimeError("first_step was called twice: call second_step after the second backward pass")
        groups = [(g, [p for p in g["params"] if p.grad is not None]) for g in self.param_groups]
        seen = [p for _, params in groups for p in params]
        norm = total_norm([p.grad for p in seen])
        for group, params in groups:
            if params and group["rho"] > 0:
                self._ascend(params, group["rho"], norm)
            if _parse(group["mix"]).needs_g:
                self._gradients.update({p: p.grad for p in params})
        self.zero_grad(set_to_none=True)
        self._seen = seen

    @torch.no_grad()
    def second_step(self) -> None:
        """Puts the weights back and updates them along the mix. Call after the second backward pass."""
        if self._seen is None:
            raise RuntimeError("second_step was called without first_step")
        for p, weights in self._ascended:
            p.data = weights
        self._ascended.clear()
        for p in self._seen:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for group in self.param_groups:
            mix = _parse(group["mix"])
            if mix.needs_g:
                self._mix_(group["params"], mix)
        self._gradients.clear()
        self._seen = None
        self._update()
        self._opt_called = True  # what a learning rate schedule looks for

    def _ascend(self, params: list[Tensor], rho: float, norm: Tensor) -> None:
        """Puts w + rho g / norm in the weights' place, in memory of its own; nothing where the norm is zero."""
        if norm.device.type == "cpu" and not norm > 0:
            return
        spare = [self._spare.get(p) for p in params]
        if any(room is None for room in spare):
            spare = [torch.empty_like(p) if room is None else room for p, room in zip(params, spare, strict=True)]
            self._spare.update(zip(params, spare, strict=True))
        if norm.device.type == "cpu":  # one pass over the memory, which is what the time is spent on
            alpha = min(rho / norm.item(), torch.finfo(torch.float32).max)
            for p, room in zip(params, spare, strict=True):
                torch.add(p, p.grad, alpha=alpha, out=room)
        else:  # few kernels, and nothing that waits for the norm
            torch._foreach_copy_(spare, [p.grad for p in params])
            scale = torch.where(norm > 0, rho / norm, 0.0).clamp(max=torch.finfo(norm.dtype).max)
            torch._foreach_mul_(spare, scale)
            torch._foreach_add_(spare, params)
        # No weight is copied or computed: all come back as they were.
        for p, room in zip(params, spare, strict=True):
            self._ascended.append((p, p.data))
            p.data = room

    @torch.no_grad()
    def _update(self) -> None:
        """SGD's step. Its fused kernel wants one memory layout for all of a parameter's tensors, and momentum buffers
        for all parameters of a group or none; what is not contiguous, as channels_last, it copies: hence flat views."""
        for group in self.param_groups:
            params, grads, buffers = [], [], []
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.grad = laid_out(p.grad, p)
                view = (lambda t: t) if p.is_contiguous() else flat_view
                params.append(view(p))
                grads.append(view(p.grad))
                if group["momentum"]:
                    state = self.state[p]
                    buffer = state.get("momentum_buffer")
                    state["momentum_buffer"] = torch.zeros_like(p) if buffer is None else laid_out(buffer, p)
                    buffers.append(view(state["momentum_buffer"]))
            names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")
            scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}  # of a GradScaler
            sgd(params, grads, buffers, **{name: group[name] for name in names}, **scaling)

    def _mix_(self, params: list[Tensor], mix: Mix) -> None:
        small: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        for p in params:
            g = self._gradients.get(p)
            if g is None and p.grad is None:
                continue
            if g is None:
                g = torch.zeros_like(p.grad)
            if p.grad is None:
                p.grad = torch.zeros_like(g)
            g = laid_out(g, p.grad)
            pair = flat_view(g), flat_view(p.grad)
            if pair[1].dim() != 1:
                mix_gradients_(*pair, mix)
            elif p.numel() <= SMALL:
                small.setdefault((p.device, p.dtype), []).append(pair)
            elif self._compile:
                _compiled_mix(mix)(*pair)
            else:
                for piece in chunks(*pair):
                    mix_gradients_(*piece, mix)
        for pairs in small.values():
            g, g_sam = (torch.cat(side) for side in zip(*pairs, strict=True))
            mix_gradients_(g, g_sam, mix)
            views = [view for _, view in pairs]
            torch._foreach_copy_(views, g_sam.split([view.numel() for view in views]))

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Both half-steps around a closure. Only plain SGD (mix "sgd" in every group) can step without one."""
        second_pass = any(_parse(group["mix"]).second_pass for group in self.param_groups)
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
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss
