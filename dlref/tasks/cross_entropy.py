"""Cross entropy of an output layer, a few rows at a time: all logits of a large vocabulary would fill the memory.

Legend of shapes: N tokens, E width of the network, V tokens of the vocabulary.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Logits at once: what stays in a processor's cache, or is enough to keep a GPU busy.
AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 30}


def nll_and_gradient(
    scores: Float[Tensor, "N V"], targets: Int[Tensor, "N"], exact: torch.dtype
) -> tuple[Float[Tensor, "N 1"], Float[Tensor, "N V"]]:
    """-log softmax(scores) at the targets, and the gradient of its sum to the scores.

    The scores are overwritten. Intermediate values have the type `exact`, the gradient that of the scores.
    """
    reduced, targets = scores.dtype, targets[:, None]
    scores = scores.to(exact)
    scores -= scores.amax(1, keepdim=True)
    at_target = scores.gather(1, targets)
    whole = scores.exp_().sum(1, keepdim=True)
    losses = whole.log() - at_target
    gradient = scores.mul_(1 / whole).to(reduced)
    # The gradient is the probability, less one at the target: found there before it is rounded.
    return losses, gradient.scatter_(1, targets, (at_target.exp() / whole - 1).to(reduced))


def linear_cross_entropy(
    hidden: Float[Tensor, "N E"],
    weight: Float[Tensor, "V E"],
    targets: Int[Tensor, "N"],
    row_step: Callable = nll_and_gradient,
) -> Float[Tensor, ""]:
    """The mean of -log softmax(hidden weight^T) at the targets, as `F.cross_entropy` of `F.linear`.

    The gradients are found beside the loss, while the logits of a few rows are there (as Liger Kernel does, Hsu et
    al. 2024; Wijmans et al. 2025 compute the logits again on the way back). `row_step` is `nll_and_gradient` or its
    compiled form: all it does is memory traffic.
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
            step = rows_at_once(len(weight), kind)
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
        each = gradient / context.tokens  # not before: in float16 so small a gradient would be zero
        return each * of_rows, each * of_weight, None, None


def rows_at_once(vocabulary: int, kind: str) -> int:
    """A power of two, which batches of the usual sizes are a multiple of: all parts are of one shape then."""
    return 1 << max(0, (AT_ONCE.get(kind, AT_ONCE["cpu"]) // vocabulary).bit_length() - 1)
