"""Cross entropy of an output layer, a few rows at a time: all logits of a large vocabulary would fill the memory.

Legend of shapes: N tokens, E width of the network, V tokens of the vocabulary.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Logits at once: what stays in a processor's cache, or is enough to keep a GPU busy.
AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 28}


def linear_cross_entropy(
    hidden: Float[Tensor, "N E"], weight: Float[Tensor, "V E"], targets: Int[Tensor, "N"]
) -> Float[Tensor, ""]:
    """The mean of -log softmax(hidden weight^T) at the targets, as `F.cross_entropy` of `F.linear`.

    The gradients are found beside the loss, while the logits of a few rows are there (Wijmans et al. 2025, section 4,
    do so in one kernel).
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kind = hidden.device.type
        reduced = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        with torch.autocast(kind, enabled=False):
            rows, table = hidden.to(reduced), weight.to(reduced)
            of_rows, of_weight = torch.empty_like(rows), torch.zeros_like(weight)
            loss = weight.new_zeros(())
            step = max(1, AT_ONCE.get(kind, AT_ONCE["cpu"]) // len(weight))
            for part, target, place in zip(*(x.split(step) for x in (rows, targets, of_rows)), strict=True):
                scores = (part @ table.T).to(weight.dtype)
                scores -= scores.amax(1, keepdim=True)
                loss -= scores.gather(1, target[:, None]).sum()
                whole = scores.exp_().sum(1, keepdim=True)
                loss += whole.log().sum()
                # d loss / d score is the probability, less one at the target.
                error = scores.mul_(1 / (whole * len(targets)))
                error[torch.arange(len(target), device=target.device), target] -= 1 / len(targets)
                error = error.to(reduced)
                place[:] = error @ table
                of_weight += error.T @ part
        context.save_for_backward(of_rows.to(hidden.dtype), of_weight)
        return loss / len(targets)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        of_rows, of_weight = context.saved_tensors
        return gradient * of_rows, gradient * of_weight, None
