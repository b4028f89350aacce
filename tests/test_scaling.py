"""The counts behind docs/scaling.md, compared with values derived by hand or counted by torch."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling import cases, measure, page, sweeps
from benchmarks.scaling.measure import Case, Line, Sweep, kept
from dlref.models import ResNet
from dlref.tasks.task import freeze


def stack(rows: int) -> Case:
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    inputs = torch.randn(rows, 3)
    return Case(network, lambda: network(inputs).sum())


def test_activations_shared_by_layers_are_counted_once():
    # 3 numbers a row for the first matrix, 5 that ReLU and the second matrix share; no weights.
    assert kept(stack(7)) == 4 * 7 * (3 + 5)


def test_a_view_counts_with_its_whole_storage():
    network, inputs = nn.Linear(3, 1), torch.randn(10, 3)
    assert kept(Case(network, lambda: network(inputs[:2]).sum())) == 4 * 10 * 3


def test_counting_changes_no_gradient():
    case = stack(4)
    kept(case)
    assert all(p.grad is None for p in case.network.parameters())
    case.step()
    first = [p.grad.clone() for p in case.network.parameters()]
    kept(case)
    case.step()
    for before, after in zip(first, case.network.parameters(), strict=True):
        torch.testing.assert_close(before, after.grad, rtol=0, atol=0)


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_the_slope_of_a_power_is_its_exponent(power):
    sizes = [1, 2, 4, 8, 16]
    assert page.slope(sizes, [3 * x**power for x in sizes]) == pytest.approx(power)


def test_small_sizes_do_not_affect_the_slope():
    assert page.slope([1, 2, 4, 8, 16], [70, 80, 4, 8, 16]) == pytest.approx(1)


def test_gpt_flops_match_the_counted_operations():
    torch.manual_seed(0)
    case = cases.gpt(2, 128, "cpu", layers=2, width=128, vocabulary=256, written_out=True)
    # The fused kernel computes the scores again in the backward pass, and is not counted on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        case.step()
    assert cases.gpt_flops(2 * 128, 128, 2, 128, 256) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_gpt_bytes_match_the_bytes_kept_for_the_backward_pass():
    for choices in ({}, {"whole": True}, {"written_out": True}):
        case = cases.gpt(2, 128, "cpu", layers=2, width=128, vocabulary=512, **choices)
        assert cases.gpt_bytes(2 * 128, 128, 2, 128, 512, **choices) == pytest.approx(kept(case), rel=0.1)


def test_kept_bytes_grow_linearly_with_the_batch():
    network = ResNet(18)
    one, two, three = (kept(cases.images(network, batch, 64, "cpu")) for batch in (1, 2, 3))
    assert three - two == two - one
    # Constant: a mean and a deviation for each channel of a norm, and the number of samples that the loss averages.
    channels = sum(layer.num_features for layer in network.modules() if isinstance(layer, nn.BatchNorm2d))
    assert 2 * one - two == 4 * (2 * channels + 1)
    assert one == pytest.approx(cases.map_bytes(18, 64), rel=0.2)


def test_feature_maps_grow_with_the_image_and_operations_match_the_paper():
    assert cases.map_bytes(18, 128) == 4 * cases.map_bytes(18, 64)
    assert cases.forward_flops(50, 224) == pytest.approx(2 * 4.1, rel=0.02)  # table 1 of the paper has 3.8


def test_the_loss_in_parts_keeps_no_logits():
    plain, parts = (cases.gpt(4, 64, "cpu", 1, 64, 4096, whole=whole) for whole in (True, False))
    logits, gradient = 4 * 4 * 64 * 4096, 4 * 4096 * 64
    hidden = 4 * 4 * 64 * 64
    assert kept(plain) - kept(parts) == pytest.approx(logits - gradient, abs=2 * hidden)


def test_fused_attention_keeps_no_attention_weights():
    one, two = (kept(cases.gpt(1, context, "cpu", 1, 64, 64)) for context in (256, 512))
    assert two < 2 * one
    written_out = kept(cases.gpt(1, 512, "cpu", 1, 64, 64, written_out=True))
    assert written_out - two == pytest.approx(4 * 512**2, rel=0.1)


def test_frozen_layers_keep_no_activations():
    network = ResNet(18)
    whole = kept(cases.images(network, 2, 64, "cpu"))
    freeze(network, "conv1|bn1|layer[123]")
    assert kept(cases.images(network, 2, 64, "cpu")) < whole / 5


def test_training_with_adam_holds_16_bytes_per_parameter():
    case = cases.with_adam(stack(2))
    case.step()
    assert case.stands() == 16 * sum(p.numel() for p in case.network.parameters())


def test_ten_times_the_series_take_ten_times_the_bytes_and_no_more_activations():
    few, many = (cases.many_series(number, "cpu", batch=4) for number in (100, 1000))
    assert many.stands() == pytest.approx(10 * few.stands(), rel=0.001)
    many.step()
    assert kept(many) == pytest.approx(kept(few), rel=0.01)


def test_seq2seq_bytes_match_the_bytes_kept_with_each_attention():
    for attention in ("general", "mlp"):
        case = cases.seq2seq(2, 64, "cpu", attention)
        assert 2 * cases.seq2seq_bytes(64, attention) == pytest.approx(kept(case), rel=0.15)


def test_every_sweep_runs_at_its_smallest_size():
    for name, sweep in sweeps.sweeps("cpu").items():
        assert 4 <= len(sweep.sizes) <= 6, name
        assert sweep.sizes == sorted(sweep.sizes)
        for line in sweep.lines:
            assert line.case(sweep.sizes[0]).loss().isfinite(), name


def test_a_sweep_is_measured_drawn_and_written(tmp_path):
    def made_up(rows: int) -> Case:
        return stack(rows)

    lines = [Line("one", made_up, (1, 1)), Line("no time", made_up, (None, 1), memory=lambda size: 32 * size)]
    found = measure.measured(Sweep("a stack", "rows", [1, 2, 4, 8], "∝ rows", lines), "a stack", "cpu", turns=1)
    assert found["lines"]["one"]["bytes"] == [32, 64, 128, 256] == found["lines"]["no time"]["paper_memory"]
    assert found["lines"]["no time"]["seconds"] is None
    whole = {
        "machine": "here",
        "device": "cpu",
        "threads": 1,
        "python": "3",
        "versions": {"torch": "2"},
        "turns": 1,
        "sweeps": {"rows": found},
        "levers": {"a stack": {"baseline": {"seconds": [1.0], "bytes": 10}, "half": {"seconds": [0.5], "bytes": 5}}},
    }
    before = "before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n"
    (tmp_path / "scaling.md").write_text(before)
    page.write(whole, tmp_path)
    text = (tmp_path / "scaling.md").read_text()
    assert text.startswith("before\n<!-- measured -->\n")
    assert text.endswith("\n<!-- /measured -->\nafter\n")
    assert "| a stack: no time | rows, 1 to 8 | ∝ rows | – | – | 1.00 | 1.00 |" in text
    assert "| a stack | half | 500 | 0 | 50% |" in text
    assert "old" not in text
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"scaling.png", "scaling-memory.png"}
    with pytest.raises(ValueError, match="once"):
        page.put_between("no marks", "")


def test_each_list_of_numbers_is_written_on_one_line():
    assert page.lines_of({"a": [[1, 2], [3.5]]}) == '{\n "a": [\n  [1, 2],\n  [3.5]\n ]\n}\n'


def test_lower_precision_keeps_fewer_bytes():
    case = cases.gpt(4, 128, "cpu", 2, 64, 256)
    assert kept(cases.halved(case, "cpu")) < 0.9 * kept(case)


def test_the_loss_in_parts_with_attention_written_out_equals_the_whole_loss():
    torch.manual_seed(0)
    whole = cases.gpt(2, 32, "cpu", 1, 64, 128, whole=True)
    torch.manual_seed(0)
    parts = cases.gpt(2, 32, "cpu", 1, 64, 128, written_out=True)
    torch.testing.assert_close(whole.loss(), parts.loss())
