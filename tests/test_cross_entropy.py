"""The cross entropy of an output layer in parts, beside torch's of all logits at once."""

import pytest
import torch
from torch.nn import functional as F

from dlref.tasks.cross_entropy import AT_ONCE, linear_cross_entropy, nll_and_gradient


@pytest.mark.parametrize("at_once", [1, 20, 70, 1 << 21])
def test_the_loss_in_parts_is_torchs_with_its_gradients(monkeypatch, at_once):
    monkeypatch.setitem(AT_ONCE, "cpu", at_once)
    sides = []
    for loss in (linear_cross_entropy, lambda x, w, y: F.cross_entropy(F.linear(x, w), y)):
        torch.manual_seed(0)
        hidden, weight = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((9, 5), (7, 5)))
        found = 3 * loss(hidden.sin(), weight, torch.randint(7, (9,)))
        found.backward()
        sides.append((found.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*sides)


def test_parts_of_the_loss_have_one_shape_where_a_batch_is_of_the_usual_size(monkeypatch):
    monkeypatch.setitem(AT_ONCE, "cpu", 1000)
    seen = []
    hidden, weight, targets = torch.randn(64, 3), torch.randn(100, 3), torch.randint(100, (64,))
    linear_cross_entropy(hidden, weight, targets, lambda *parts: seen.append(len(parts[0])) or nll_and_gradient(*parts))
    assert seen == [8] * 8  # and not ten at a time, and four


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_loss_compiled_is_the_loss(kind, unchecked):
    scores, targets = torch.randn(8, 40).to(kind), torch.randint(40, (8,))
    expected = nll_and_gradient(scores.clone(), targets, torch.float32)
    found = torch.compile(nll_and_gradient, dynamic=False)(scores.clone(), targets, torch.float32)
    torch.testing.assert_close(found, expected)


def test_the_gradients_of_the_loss_do_not_vanish_in_float16():
    """Of tens of thousands of tokens each has a part that float16 cannot hold."""
    hidden, weight = torch.randn(20_000, 8, requires_grad=True), torch.randn(500, 8)
    targets = torch.randint(500, (20_000,))
    with torch.autocast("cpu", torch.float16):
        found = linear_cross_entropy(hidden, weight, targets)
    exact = F.cross_entropy(F.linear(hidden, weight), targets)
    (ours,), (theirs,) = torch.autograd.grad(found, hidden), torch.autograd.grad(exact, hidden)
    torch.testing.assert_close(ours * 20_000, theirs * 20_000, rtol=2e-2, atol=2e-2)


def test_scores_of_any_size_have_a_loss():
    """exp(200) is none of float32's numbers."""
    scores, targets = torch.tensor([[200.0, 0.0, 199.0], [-200.0, -201.0, -300.0]]), torch.tensor([2, 1])
    nll, gradient = nll_and_gradient(scores.clone(), targets, torch.float32)
    wanted = scores.clone().requires_grad_()
    loss = F.cross_entropy(wanted, targets, reduction="sum")
    torch.testing.assert_close(nll.sum(), loss.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, wanted)[0])


def test_the_gradients_of_the_loss_are_its_differences():
    hidden, weight = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((6, 3), (4, 3)))
    targets = torch.randint(4, (6,))
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets), (hidden, weight))


def test_the_loss_in_parts_is_torchs_in_half_precision():
    hidden, weight = torch.randn(50, 32), torch.randn(40, 32, requires_grad=True)
    targets = torch.randint(40, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
        theirs = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    (of_ours,), (of_theirs,) = torch.autograd.grad(ours, weight), torch.autograd.grad(theirs, weight)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_ours, of_theirs, rtol=2e-2, atol=2e-3)


def test_parts_add_up_in_the_precision_of_the_weights(monkeypatch):
    """A bfloat16 of eight digits would lose most of what a few rows of thousands add."""
    hidden, weight = torch.rand(4096, 4), torch.zeros(3, 4, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.long)
    monkeypatch.setitem(AT_ONCE, "cpu", 24)  # 8 rows at once
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, targets).backward()
    expected = (torch.tensor([1 / 3 - 1, 1 / 3, 1 / 3])[:, None] * hidden.mean(0)).float()
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, expected, rtol=1e-2, atol=0)


def test_a_token_that_is_nearly_certain_has_its_small_gradient_in_half_precision():
    """A probability of 0.9995 rounded to bfloat16 is 1, less one at the target is nothing."""
    scores = torch.tensor([[7.6, 0.0]], dtype=torch.bfloat16)
    exact = scores.double().softmax(1) - torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    _, gradient = nll_and_gradient(scores.clone(), torch.tensor([0]), torch.float32)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=0)
