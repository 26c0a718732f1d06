"""Mix: one table of eight numbers for every rule that turns SAM's two gradients into an update.

A parameter's *checkpoint* at one step says how its gradient changes from w (g) to the ascent point
w + rho g / ||g|| (g'):

                     |g'| >= |g|   |g'| < |g|
    same sign             1            2
    opposite sign         3            4          and 0, inactive, where g or g' is exactly zero

Beside the second document's own code: its optimizer for "checkpoint14" applies its mask inverted and is checkpoint23
here, and its classes SAMMAGNITUDE and SAMDIRECTION carry each other's names; all its other rules are these.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

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
            scale = ratio(get_total_norm(other), get_total_norm(along))
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
    signs = g.sign().mul_(g_sam.sign())  # -1, 0 or 1; a NaN has the sign 0
    smaller = g_sam.abs().lt_(g.abs())
    # In floats, which vectorize where bytes do not: 1 or 3 by the signs, 1 more where smaller, 0 where inactive.
    return smaller.add_(2).sub_(signs).mul_(signs.abs_()).to(torch.uint8)


def _weighted(g: Tensor, g_sam: Tensor, a: float, b: float) -> Tensor:
    terms = [x if c == 1 else c * x for c, x in ((a, g_sam), (b, g)) if c]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(g)


def ratio(numerator: Tensor | float, norm: Tensor) -> Tensor:
    """numerator / norm as a scalar tensor: 0 where the norm is, finite for a tiny one, NaN for a NaN."""
    return torch.where(norm == 0, 0.0, numerator / norm).clamp(max=torch.finfo(norm.dtype).max)
