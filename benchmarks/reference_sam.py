"""SAM, its masked variant and the probe as people write them: a Python loop over parameters, masks from a ratio."""

import torch
from torch import Tensor


class ReferenceSAM(torch.optim.Optimizer):
    """Foret et al., 2021, Algorithm 1, around torch's SGD: a loop over parameters without needless temporaries."""

    def __init__(self, params, rho: float = 0.05, **sgd) -> None:
        super().__init__(params, dict(rho=rho, **sgd))
        self.base_optimizer = torch.optim.SGD(self.param_groups, **sgd)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.norm(torch.stack([p.grad.norm(p=2) for group in self.param_groups for p in group["params"]]), p=2)
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                e_w = p.grad * scale.to(p)
                p.add_(e_w)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        self.zero_grad()


class UsualSAM(ReferenceSAM):
    """The same as the implementation that most people copy has it (github.com/davda54/sam), operation by operation."""

    @torch.no_grad()
    def first_step(self) -> None:
        sizes = [(1.0 * p.grad).norm(p=2) for group in self.param_groups for p in group["params"]]
        norm = torch.norm(torch.stack(sizes), p=2)
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                e_w = 1.0 * p.grad * scale.to(p)
                p.add_(e_w)
        self.zero_grad()


class ReferenceMaskedSAM(ReferenceSAM):
    """The second document's checkpoint 1, 3 and 4 from SAM, the rest from SGD, by the ratio of the two gradients."""

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_g"] = p.grad.clone()
        super().first_step()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                old_g = self.state[p]["old_g"]
                ratio = p.grad.div(old_g.add(1e-8))
                mask = torch.logical_or(ratio > 1, ratio < 0)
                p.grad = p.grad.mul(mask) + old_g.mul(torch.logical_not(mask))
        super().second_step()


@torch.no_grad()
def reference_probe(g: list[Tensor], g_sam: list[Tensor]) -> dict[str, float]:
    """Codes, fractions, ratio bins, norms and cosine, parameter after parameter, with divisions."""
    names = ["checkpoint1", "checkpoint2", "checkpoint3", "checkpoint4"]
    counts = dict.fromkeys([*names, *(f"bin{k}" for k in range(1, 8))], 0)
    edges = [1.0, 1.2, 1.5, 2.0, 4.0, 8.0, 16.0, float("inf")]
    dot = square = square_sam = 0.0
    codes, total = [], 0
    for a, b in zip(g, g_sam, strict=True):
        ratio = b / (a + 1e-8)
        masks = [ratio >= 1, (ratio >= 0) & (ratio < 1), ratio <= -1, (ratio < 0) & (ratio > -1)]
        code = torch.zeros_like(a, dtype=torch.uint8)
        for k, (name, mask) in enumerate(zip(names, masks, strict=True), start=1):
            counts[name] += mask.sum().item()
            code[mask] = k
        codes.append(code.flatten())
        for k in range(7):
            counts[f"bin{k + 1}"] += ((ratio >= edges[k]) & (ratio < edges[k + 1])).sum().item()
        dot += (a * b).sum().item()
        square += a.norm().item() ** 2
        square_sam += b.norm().item() ** 2
        total += a.numel()
    shares = {name: count / total for name, count in counts.items()}
    norms = {"grad_norm": square**0.5, "grad_norm_sam": square_sam**0.5, "cosine": dot / (square * square_sam) ** 0.5}
    return shares | norms | {"codes": torch.cat(codes)}
