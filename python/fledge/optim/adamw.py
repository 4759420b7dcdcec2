"""AdamW over torch's fused kernel, and what it shares with Muon: groups, state by parameter.

The arithmetic is `torch.optim.AdamW(fused=True)`'s, bit for bit, and a test holds it to that. Not
that class itself, because building any `torch.optim.Optimizer` imports torch's compiler: 1.4 s and
140 MB before the first step. Used by `optim.groups`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Optimizer:
    """Groups of parameters with their settings, and a dict of tensors for each parameter."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        self.param_groups = [dict(group) for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def zero_grad(self) -> None:
        """Gradients to zero. Their memory is kept: the next pass adds to it, without new pages."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()


class AdamW(Optimizer):
    """Adam with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101).

    A group has params, lr, betas, weight_decay; eps is the same for all.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, eps: float) -> None:
        super().__init__(groups)
        self.eps = eps

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for parameter in params:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            if not params:
                continue
            states = [self.state[p] for p in params]
            steps = [s["step"] for s in states]
            torch._foreach_add_(steps, 1.0)  # pyright: ignore[reportPrivateImportUsage]
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                params,
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )
