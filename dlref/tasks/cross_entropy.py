"""Cross entropy of an output layer, a few rows at a time, as all logits of a large vocabulary would fill the memory.

Legend of shapes: N tokens, E width of the network, V size of the vocabulary.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Number of logits computed at once: few enough for a CPU's cache, enough to keep a GPU busy.
AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 30}
IN_FLOAT16 = 4096  # rows at once at most: over more, the sum of the gradients can exceed float16's largest number


def nll_and_gradient(
    scores: Float[Tensor, "N V"], targets: Int[Tensor, "N"], exact: torch.dtype
) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N V"]]:
    """Return -log softmax(scores) at the targets, and the gradient of its sum with respect to the scores.

    The scores may be overwritten. Intermediate values have the dtype `exact`, the gradient that of the scores.
    """
    reduced, targets = scores.dtype, targets[:, None]
    scores = scores.to(exact)
    scores -= scores.amax(1, keepdim=True)
    at_target = scores.gather(1, targets)
    whole = scores.exp_().sum(1, keepdim=True)
    losses = whole.log() - at_target
    gradient = scores.mul_(1 / whole).to(reduced)
    # The gradient is the probability, minus one at the target. There it is computed before rounding.
    return losses, gradient.scatter_(1, targets, (at_target.exp() / whole - 1).to(reduced))


def linear_cross_entropy(
    hidden: Float[Tensor, "N E"],
    weight: Float[Tensor, "V E"],
    targets: Int[Tensor, "N"],
    row_step: Callable = nll_and_gradient,
) -> Float[Tensor, ""]:
    """Return the mean of -log softmax(hidden weight^T) at the targets, like `F.cross_entropy` of `F.linear`.

    The gradients are computed together with the loss, while the logits of a few rows are in memory (as in Liger Kernel,
    Hsu et al. 2024; Wijmans et al. 2025 recompute the logits in the backward pass). `row_step` is `nll_and_gradient` or
    its compiled form; its time is all memory traffic.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, row_step)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden: Tensor, weight: Tensor, targets: Tensor, row_step: Callable) -> Tensor:
        kind = hidden.device.type
        reduced = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            rows, table = hidden.to(reduced), weight.to(reduced)
            of_rows, of_weight = torch.empty_like(rows), torch.zeros_like(weight)
            loss = weight.new_zeros(())
            step = rows_at_once(len(weight), kind, reduced)
            for part, target, place in zip(*(x.split(step) for x in (rows, targets, of_rows)), strict=True):
                losses, gradient = row_step(part @ table.T, target, weight.dtype)
                loss += losses.sum()
                place[:] = gradient @ table
                of_weight += gradient.T @ part
        context.save_for_backward(of_rows.to(hidden.dtype), of_weight)
        context.tokens = len(targets)
        return loss / len(targets)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_rows, of_weight = context.saved_tensors
        each = gradient / context.tokens  # not in `forward`: in float16, so small a gradient would be zero
        return each * of_rows, each * of_weight, None, None


def rows_at_once(vocabulary: int, kind: str, reduced: torch.dtype) -> int:
    """Return a power of two, so that the parts of batches of the usual sizes all have the same shape."""
    rows = 1 << max(0, (AT_ONCE.get(kind, AT_ONCE["cpu"]) // vocabulary).bit_length() - 1)
    return min(rows, IN_FLOAT16) if reduced is torch.float16 else rows
