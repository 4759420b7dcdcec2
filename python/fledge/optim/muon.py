"""Muon: momentum whose matrix updates are made orthogonal before they are applied.

Jordan et al. 2024 (the Muon post and modded-nanogpt). Each matrix's momentum M = U S V^T is
replaced by about U V^T, so that every direction of the matrix learns at the same speed. Used by
`optim.groups`; parameters of one shape are stacked and orthogonalised together. Never sees
embeddings, heads or norms: AdamW trains those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from fledge.optim.adamw import Optimizer
from fledge.products import multiply_each

# Polar Express (Amsel et al. 2025, arXiv 2505.16932), degree-5 odd polynomials, five steps: each
# row a, b, c maps every singular value s to a s + b s^3 + c s^5 and drives it towards 1.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: Tensor, *, products: torch.dtype | None = None) -> Tensor:
    """About U V^T of each matrix U S V^T in a stack [..., rows, columns].

    products: what its products are made in; the polynomials were made for bfloat16, and the result
    is only about U V^T in any. None = what the matrices are in, which the result is in, too.
    """
    x = matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    x = x if products is None else x.to(products)  # only now: a small gradient would vanish
    for a, b, c in POLAR_EXPRESS:
        gram = multiply_each(x, x)
        # gram is its own transpose
        x = a * x + multiply_each(b * gram + c * multiply_each(gram, gram), x.mT)
    return (x.mT if tall else x).to(matrices.dtype)


def even_out(update: Tensor, average: Tensor, beta2: float) -> Tensor:
    """NorMuon (Li et al. 2025, arXiv 2510.05491): every row, or column, moves equally fast in time.

    update [..., rows, columns]; `average` holds the running mean square of each row (each column of
    a wide matrix), [..., rows, 1] or [..., 1, columns], and is brought up to date. Each is divided
    by the root of its average; the norm of the whole matrix stays what it was.
    """
    across = -1 if update.shape[-2] >= update.shape[-1] else -2
    mean_square = update.square().mean(dim=across, keepdim=True)
    average.lerp_(mean_square, 1.0 - beta2)
    scale = average.clamp_min(1e-10).rsqrt()
    before = mean_square.sum(dim=(-2, -1), keepdim=True)
    after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return update * (scale * (before / after.clamp_min(1e-10)).sqrt())


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised per matrix, with decoupled weight decay.

    The step of a rows x columns matrix is lr * sqrt(max(1, rows / columns)), so that the change of
    the layer's output has the same size for every shape (Bernstein and Newhouse 2024). Weight
    decay is cautious: it acts only where it agrees with the update's direction (arXiv 2411.16085).
    A parameter of three dimensions [E, rows, columns] is E matrices (experts). `beta2` above 0
    turns `even_out` on.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        beta2: float = 0.0,
        products: torch.dtype | None = None,
    ) -> None:
        """products: what the orthogonalisation multiplies in; all else is as the parameters."""
        self.products = products
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "beta2": beta2}
        super().__init__([{"params": list(params)} | settings])

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_one_shape(parameters, shape, group)

    def _step_one_shape(self, parameters: list[Tensor], shape: torch.Size, group: dict) -> None:
        momentum, beta2 = group["momentum"], group["beta2"]
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1.0 - momentum)
            updates.append(parameter.grad.lerp(buffer, momentum))
        scale = group["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5
        whitened = orthogonalize(torch.stack(updates), products=self.products)
        for parameter, update in zip(parameters, whitened, strict=True):
            if beta2:
                update = even_out(update, self._average(parameter, update), beta2)
            if group["weight_decay"]:
                agrees = (update * parameter) > 0
                shrink = group["lr"] * group["weight_decay"]
                parameter.sub_(parameter * agrees, alpha=shrink)
            parameter.sub_(update, alpha=scale)

    def _average(self, parameter: Tensor, update: Tensor) -> Tensor:
        state = self.state[parameter]
        if "row_variance" not in state:
            across = -1 if update.shape[-2] >= update.shape[-1] else -2
            # starts at what an orthogonal matrix has, so that the first steps are plain Muon's
            state["row_variance"] = torch.full_like(
                update.mean(dim=across, keepdim=True), 1.0 / max(update.shape[-2:])
            )
        return state["row_variance"]
