"""SAM and its masked variant as people write them: a Python loop over parameters, masks from a ratio."""

import torch


class LoopSAM(torch.optim.Optimizer):
    """As the implementation that most people copy has it (github.com/davda54/sam), operation by operation."""

    def __init__(self, params, rho: float = 0.05, **sgd) -> None:
        super().__init__(params, dict(rho=rho, **sgd))
        self.base_optimizer = torch.optim.SGD(self.param_groups, **sgd)
        self.param_groups = self.base_optimizer.param_groups

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

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        self.zero_grad()


class LoopCheckpoint134(LoopSAM):
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
