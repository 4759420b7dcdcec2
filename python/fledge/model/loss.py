"""The output head and its cross-entropy in one pass, logits never held whole.

At a small depth the logits are by far the largest tensor of a step: 16,384 tokens by 32,768 words
are 2 GiB in fp32, three quarters of the arithmetic, and, allocated anew each pass, most of the page
faults. So the loss and both its gradients are made chunk by chunk while some rows of logits are in
cache, in buffers that are kept. Used by `model.transformer`. `naive_linear_cross_entropy` is the
readable twin. Shapes: N rows, D hidden, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.model.layers import HALF, widened
from fledge.products import multiply

CHUNK_LOGITS = 2**23
"""Logits in one buffer (32 MiB in fp32): 256 rows of 32,768 words, 2,048 rows of 4,096."""
ACCELERATOR_CHUNK_LOGITS = 2**27
"""The same where products must be large to be fast (half a GiB in fp32: 4,096 rows of 32,768)."""
KEPT_STEP = 128  # rows: their number is a multiple of it where there are enough
SURE = 1e-30
"""Below this a probability may have lost bits or vanished; its logarithm is made from logits."""


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap tanh(logits / cap): no logit beyond +-cap (Gemma 2, arXiv 2408.00118)."""
    return cap * torch.tanh(logits / cap)


class Workspace:
    """Buffers that outlive a pass, so that the next one meets no fresh pages.

    A model owns one; it is no part of its state and may be dropped at any time.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of that shape, and of the dtype and device of `like`."""
        size = math.prod(shape)
        held = self._held.get(name)
        if (
            held is None
            or held.numel() < size
            or (held.dtype, held.device) != (like.dtype, like.device)
        ):
            held = self._held[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(shape)

    def drop(self) -> None:
        """Frees every buffer."""
        self._held.clear()

    def __deepcopy__(self, memo: dict) -> Workspace:
        return Workspace()


def chunk_rows(vocab: int, device: torch.device | str = "cpu") -> int:
    """Rows of logits alive at once."""
    on_cpu = torch.device(device).type == "cpu"
    return max(16, (CHUNK_LOGITS if on_cpu else ACCELERATOR_CHUNK_LOGITS) // vocab)


@torch.no_grad()
def head_pass(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    cap: float | None,
    grad_x: Tensor | None,
    grad_head: Tensor | None,
    workspace: Workspace,
) -> Tensor:
    """sum_n weight_n * -log softmax(x_n W^T)[target_n] in nats, a float64 scalar.

    Writes its gradient into `grad_x` [N, D] and adds that of the head to `grad_head` [V, D]; either
    may be None. With p the softmax and w the weight, the gradient by a logit is w (p - [target]);
    w multiplies the rows of x and of grad_x, which are D long, and not those of the logits.

    The products are in what x is in; softmax, loss and weights are at least float32, and the head's
    gradient is added up in what it is in.
    """
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no more
    total = torch.zeros((), dtype=exact, device=x.device)
    head = head.to(x.dtype)
    step = chunk_rows(head.shape[0], x.device)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        part, target, weight = x[rows], targets[rows, None], weights[rows, None]
        log_likely, slopes, factor = _slopes(
            part, head, target, cap, workspace, needed=not (grad_x is None and grad_head is None)
        )
        total -= (log_likely * weight).sum(dtype=exact)
        if slopes is None:
            continue
        weight = weight * factor
        if grad_x is not None:
            torch.mul(multiply(slopes, head.T), weight, out=grad_x[rows])
        if grad_head is not None:
            grad_head += multiply(slopes.T, (part * weight).to(part.dtype).T)
    return total


def _slopes(
    x: Tensor,
    head: Tensor,
    target: Tensor,
    cap: float | None,
    workspace: Workspace,
    *,
    needed: bool,
) -> tuple[Tensor, Tensor | None, float]:
    """(log p[target] [n, 1], slopes [n, V] or None, factor) of a chunk: -d log p / d logit is
    factor x slopes. The slopes are a buffer of the workspace, good until the next chunk.

    A capped logit is c tanh(l / c) = 2c s - c with s = sigmoid(2 l / c), for which torch has a
    much faster kernel; the softmax does not see the constant, and the slope of the cap is
    4 s (1 - s).
    """
    shape = (len(x), head.shape[0])

    def buffer() -> Tensor:
        return workspace.take("logits", shape, x)

    if cap is None:
        probabilities = widened(multiply(x, head, out=buffer))
        before = probabilities.gather(1, target)
        whole = None if _looks(x) else probabilities.logsumexp(dim=-1, keepdim=True)
        torch.softmax(probabilities, dim=-1, out=probabilities)
    else:
        sigmoids = _doubled_over(x, head, cap, buffer).sigmoid_()
        probabilities = workspace.take("probabilities", shape, sigmoids)
        torch.mul(sigmoids, 2.0 * cap, out=probabilities)
        before = probabilities.gather(1, target)
        whole = None if _looks(x) else probabilities.logsumexp(dim=-1, keepdim=True)
        torch.softmax(probabilities, dim=-1, out=probabilities)
    if whole is not None:
        log_likely = before - whole
    else:
        likely = probabilities.gather(1, target)
        log_likely = likely.log()
        unsure = (likely[:, 0] < SURE).nonzero()[:, 0]
        if len(unsure):  # a vanishing p[target] has no logarithm: take that of the logits instead
            again = widened(x[unsure] @ head.T)
            if cap is not None:
                again = 2.0 * cap * torch.sigmoid(again * (2.0 / cap))
            log_likely[unsure] = before[unsure] - again.logsumexp(dim=-1, keepdim=True)
    if not needed:
        return log_likely, None, 1.0
    if cap is None:
        probabilities.scatter_add_(1, target, torch.full_like(before, -1.0))
        return log_likely, probabilities.to(x.dtype), 1.0
    probabilities.scatter_add_(1, target, torch.full_like(before, -1.0))
    probabilities.mul_(sigmoids)
    probabilities.addcmul_(probabilities, sigmoids, value=-1.0)
    return log_likely, probabilities.to(x.dtype), 4.0


def _looks(x: Tensor) -> bool:
    """Whether it is cheap to look at a few numbers first: a GPU would have to be waited for."""
    return x.device.type == "cpu"


def _doubled_over(x: Tensor, head: Tensor, cap: float, buffer: Callable[[], Tensor]) -> Tensor:
    """2 l / cap of every logit l; in half precision the logits are rounded once, not x as well."""
    if x.dtype in HALF:
        return widened(multiply(x, head, out=buffer)).mul_(2.0 / cap)
    return multiply(x * (2.0 / cap), head, out=buffer)


@torch.no_grad()
def token_logprobs(
    x: Tensor, head: Tensor, targets: Tensor, *, cap: float | None, workspace: Workspace
) -> Tensor:
    """log softmax(x_n W^T)[target_n] of every row, [N], at least fp32; no gradient."""
    head = head.to(x.dtype)
    step = chunk_rows(head.shape[0], x.device)
    parts = [
        _slopes(
            x[at : at + step], head, targets[at : at + step, None], cap, workspace, needed=False
        )
        for at in range(0, x.shape[0], step)
    ]
    return (
        torch.cat([log_likely[:, 0] for log_likely, _, _ in parts]) if parts else widened(x[:, 0])
    )


def kept_rows(weights: Tensor) -> Tensor:
    """Which rows are computed: those with a weight, and as many others as fill up KEPT_STEP.

    Rows of weight 0, most of a batch of chats, cost nothing. A few of them are computed all the
    same, so that the products come in few sizes: for every new one oneDNN makes and keeps code, and
    the allocator's memory falls to pieces (a quickstart grew from 1.4 to 3.8 GB).
    """
    trained = weights != 0
    missing = -int(trained.sum()) % KEPT_STEP
    others = (~trained).nonzero()[:missing, 0]
    return torch.cat((trained.nonzero()[:, 0], others)).sort().values


class _LinearCrossEntropy(torch.autograd.Function):
    """`head_pass` for autograd: the gradients are made in the forward pass and scaled later."""

    @staticmethod
    def forward(ctx, x, head, targets, weights, cap, workspace) -> Tensor:  # type: ignore[override]
        need_x, need_head = ctx.needs_input_grad[:2]
        kept = kept_rows(weights)
        every = len(kept) == len(x)
        rows = x if every else x[kept]
        grad_rows = torch.empty_like(rows) if need_x else None
        grad_head = torch.zeros_like(head) if need_head else None
        total = head_pass(
            rows,
            head,
            targets if every else targets[kept],
            weights if every else weights[kept],
            cap=cap,
            grad_x=grad_rows,
            grad_head=grad_head,
            workspace=workspace,
        )
        if grad_rows is not None and not every:
            grad_rows = torch.zeros_like(x).index_copy_(0, kept, grad_rows)
        ctx.save_for_backward(grad_rows, grad_head)
        return total.to(widened(x).dtype)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        scaled = [None if g is None else g * upstream for g in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def linear_cross_entropy(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    cap: float | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Weighted sum of cross-entropies in nats, differentiable, logits never held whole.

    x [N, D], head [V, D], targets [N] token ids, weights [N] (0 = not trained on), cap: softcap.
    """
    workspace = workspace or Workspace()
    return _LinearCrossEntropy.apply(x, head, targets, weights, cap, workspace)  # type: ignore[return-value]


def add_loss_gradients(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    cap: float | None,
    workspace: Workspace,
) -> Tensor:
    """The same sum (float64), its gradient added to `head.grad`, which must exist, and sent back
    through x: what a training step needs, without a second copy of the head's gradient."""
    states, kept = x.detach(), kept_rows(weights)
    every = len(kept) == len(states)
    rows = states if every else states[kept]
    grad_rows = workspace.take("grad_x", tuple(rows.shape), rows)
    total = head_pass(
        rows,
        head.detach(),
        targets if every else targets[kept],
        weights if every else weights[kept],
        cap=cap,
        grad_x=grad_rows,
        grad_head=head.grad if head.requires_grad else None,
        workspace=workspace,
    )
    x.backward(grad_rows if every else torch.zeros_like(states).index_copy_(0, kept, grad_rows))
    return total


def naive_linear_cross_entropy(
    x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, *, cap: float | None = None
) -> Tensor:
    """The readable twin of `linear_cross_entropy`; tests hold the two equal."""
    logits = widened(x @ head.to(x.dtype).T)
    if cap is not None:
        logits = softcap(logits, cap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * weights).sum()
