"""Muon with AdamW, against torch's own and against the paper's polynomial of each singular value."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dlref.tasks import MuonAdamW
from dlref.tasks.optimizers import Muon, orthogonal


def copies():
    torch.manual_seed(0)
    return [nn.ParameterList([torch.randn(8, 16), torch.randn(5, 8), torch.randn(8)]) for _ in range(2)]


def groups_of(parameters):
    matrix, table, vector = parameters
    return [{"params": [matrix], "hidden": True}, {"params": [table]}, {"params": [vector], "weight_decay": 0.0}]


def test_muon_adamw_matches_torchs_optimisers():
    ours, theirs = copies()
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    optimizer = MuonAdamW(groups_of(ours), lr=0.01, weight_decay=0.2)
    matrix, table, vector = theirs
    parts = [
        torch.optim.Muon([matrix], lr=0.01, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [table]}, {"params": [vector], "weight_decay": 0.0}],
            lr=0.01,
            weight_decay=0.2,
            betas=(0.9, 0.95),
        ),
    ]
    for step in range(12):
        if step == 5:  # change the rate like a schedule; later, resume from a checkpoint
            for part in (optimizer, *parts):
                for group in part.param_groups:
                    group["lr"] = 0.003
        if step == 8:
            kept = optimizer.state_dict()
            optimizer = MuonAdamW(groups_of(ours), lr=0.5)
            optimizer.load_state_dict(kept)
        gradients = [torch.randn_like(parameter) for parameter in ours]
        for side in (ours, theirs):
            for parameter, gradient in zip(side, gradients, strict=True):
                parameter.grad = gradient.clone()
        for part in (optimizer, *parts):
            part.step()
            part.zero_grad()
    (own, *others), (torchs, *known) = ours, theirs
    torch.testing.assert_close(own, torchs, rtol=0, atol=12 * 0.01 * 0.2 * 4 * 2**-8)  # torch's is in bfloat16
    torch.testing.assert_close(others, known)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)])
def test_orthogonal_applies_the_papers_polynomial_to_each_singular_value(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for matrix, found in zip(matrices.numpy().astype("float64"), orthogonal(matrices).numpy(), strict=True):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        values = values / np.sqrt((values**2).sum())
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        assert np.abs(found - left * values @ right).max() < 1e-5


def test_orthogonal_of_zero_is_zero():
    assert orthogonal(torch.zeros(2, 3, 4)).eq(0).all()


def test_orthogonal_returns_bfloat16_on_a_gpu():
    with FakeTensorMode():
        assert orthogonal(torch.zeros(2, 3, 4, device="cuda")).dtype == torch.bfloat16


def test_matrices_updated_together_move_as_they_would_alone():
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 6), (6, 4), (6, 4))]
    alone = [nn.Parameter(parameter.detach().clone()) for parameter in together]
    optimizers = [Muon(together, lr=0.1), *(Muon([parameter], lr=0.1) for parameter in alone)]
    for step in range(3):
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        together[2].grad = alone[2].grad = (
            None if step == 1 else together[2].grad
        )  # a layer without a gradient in one step
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, alone)


def test_muon_adamw_works_with_hidden_matrices_only():
    matrix = nn.Parameter(torch.randn(4, 4))
    optimizer = MuonAdamW([{"params": [matrix], "hidden": True}])
    before, matrix.grad = matrix.detach().clone(), torch.randn(4, 4)
    optimizer.step()
    assert not torch.equal(matrix, before)


def test_muon_uses_the_given_momentum():
    optimizer = MuonAdamW([{"params": [nn.Parameter(torch.ones(2, 2))], "hidden": True}], momentum=0.5)
    assert optimizer.param_groups[0]["momentum"] == 0.5


def test_invalid_options_or_parameters_of_muon_are_refused():
    for wrong in ("lr", "weight_decay", "momentum"):
        with pytest.raises(ValueError, match=rf"{wrong} -1.0.*; expected 0 or more"):
            Muon([nn.Parameter(torch.zeros(2, 2))], **{wrong: -1.0})
    with pytest.raises(ValueError, match="expected only matrices"):
        Muon([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="no group of hidden matrices"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(2))]}])


def test_adamw_uses_the_given_betas_and_step_evaluates_its_closure():
    matrix, table = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(5, 4))
    optimizer = MuonAdamW([{"params": [matrix], "hidden": True}, {"params": [table]}], betas=(0.5, 0.6))
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)

    def closure():
        loss = matrix.sum() + table.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 36
    assert not matrix.eq(1).any()
    assert not table.eq(1).any()
