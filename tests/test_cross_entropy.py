"""The cross entropy of an output layer in parts, against torch's over all logits at once."""

import pytest
import torch
from torch.nn import functional as F

from dlref.tasks.cross_entropy import AT_ONCE, linear_cross_entropy, nll_and_gradient


@pytest.mark.parametrize("at_once", [1, 20, 70, 1 << 21])
def test_loss_and_gradients_in_parts_match_torch(monkeypatch, at_once):
    monkeypatch.setitem(AT_ONCE, "cpu", at_once)
    sides = []
    for loss in (linear_cross_entropy, lambda x, w, y: F.cross_entropy(F.linear(x, w), y)):
        torch.manual_seed(0)
        hidden, weight = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((9, 5), (7, 5)))
        found = 3 * loss(hidden.sin(), weight, torch.randint(7, (9,)))
        found.backward()
        sides.append((found.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*sides)


def test_parts_of_the_loss_have_one_shape_for_usual_batch_sizes(monkeypatch):
    monkeypatch.setitem(AT_ONCE, "cpu", 1000)
    seen = []
    hidden, weight, targets = torch.randn(64, 3), torch.randn(100, 3), torch.randint(100, (64,))
    linear_cross_entropy(hidden, weight, targets, lambda *parts: seen.append(len(parts[0])) or nll_and_gradient(*parts))
    assert seen == [8] * 8  # rather than six parts of ten and one of four


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_compiled_loss_matches_the_eager_one(kind, unchecked):
    scores, targets = torch.randn(8, 40).to(kind), torch.randint(40, (8,))
    expected = nll_and_gradient(scores.clone(), targets, torch.float32)
    found = torch.compile(nll_and_gradient, dynamic=False)(scores.clone(), targets, torch.float32)
    torch.testing.assert_close(found, expected)


def test_gradients_do_not_vanish_in_float16():
    """The mean over tens of thousands of tokens gives each a gradient that is too small for float16."""
    hidden, weight = torch.randn(20_000, 8, requires_grad=True), torch.randn(500, 8)
    targets = torch.randint(500, (20_000,))
    with torch.autocast("cpu", torch.float16):
        found = linear_cross_entropy(hidden, weight, targets)
    exact = F.cross_entropy(F.linear(hidden, weight), targets)
    (ours,), (theirs,) = torch.autograd.grad(found, hidden), torch.autograd.grad(exact, hidden)
    torch.testing.assert_close(ours * 20_000, theirs * 20_000, rtol=2e-2, atol=2e-2)


def test_gradients_of_many_tokens_do_not_overflow_in_float16(monkeypatch):
    """Their sum over the tokens of a batch is 94,000 here; a smaller scale of the loss would not help."""
    monkeypatch.setitem(AT_ONCE, "cpu", AT_ONCE["cuda"])
    hidden, weight = torch.full((20_000, 4), 5.0), torch.zeros(16, 4, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        linear_cross_entropy(hidden, weight, torch.zeros(20_000, dtype=torch.long)).backward()
    expected = torch.full((16, 4), 5 / 16)
    expected[0] -= 5
    torch.testing.assert_close(weight.grad, expected, rtol=1e-2, atol=0)


def test_loss_and_gradient_are_right_for_logits_whose_exponential_overflows():
    """exp(200) is too large for float32."""
    scores, targets = torch.tensor([[200.0, 0.0, 199.0], [-200.0, -201.0, -300.0]]), torch.tensor([2, 1])
    nll, gradient = nll_and_gradient(scores.clone(), targets, torch.float32)
    wanted = scores.clone().requires_grad_()
    loss = F.cross_entropy(wanted, targets, reduction="sum")
    torch.testing.assert_close(nll.sum(), loss.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, wanted)[0])


def test_gradients_match_finite_differences():
    hidden, weight = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((6, 3), (4, 3)))
    targets = torch.randint(4, (6,))
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets), (hidden, weight))


def test_loss_and_gradient_in_parts_match_torch_in_half_precision():
    hidden, weight = torch.randn(50, 32), torch.randn(40, 32, requires_grad=True)
    targets = torch.randint(40, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
        theirs = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    (of_ours,), (of_theirs,) = torch.autograd.grad(ours, weight), torch.autograd.grad(theirs, weight)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_ours, of_theirs, rtol=2e-2, atol=2e-3)


def test_gradients_of_the_parts_are_summed_in_the_precision_of_the_weights(monkeypatch):
    """With its eight significant bits, bfloat16 would lose most of what a few rows out of thousands add."""
    hidden, weight = torch.rand(4096, 4), torch.zeros(3, 4, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.long)
    monkeypatch.setitem(AT_ONCE, "cpu", 24)  # 8 rows at once
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, targets).backward()
    expected = (torch.tensor([1 / 3 - 1, 1 / 3, 1 / 3])[:, None] * hidden.mean(0)).float()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, expected, rtol=1e-2, atol=0)


def test_the_small_gradient_of_a_nearly_certain_token_survives_half_precision():
    """A probability of 0.9995 rounds to 1 in bfloat16, and the gradient at the target, minus 1, to zero."""
    scores = torch.tensor([[7.6, 0.0]], dtype=torch.bfloat16)
    exact = scores.double().softmax(1) - torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    _, gradient = nll_and_gradient(scores.clone(), torch.tensor([0]), torch.float32)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=0)
