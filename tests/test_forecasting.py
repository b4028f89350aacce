"""Forecasting: windows, scales and masks with known results, scores, sampling at the edge, data modules."""

import json
import math
import re
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import yaml
from conftest import ROOT
from lightning import Trainer
from refusals import error_of
from scipy import integrate
from sklearn.metrics import mean_pinball_loss
from test_detection import fit
from test_tasks import sgd
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dlref.data import DatedSeries, LongSeries, RowSeries, SageMakerSeries, SyntheticSeries, WideSeries
from dlref.data.forecasting import Channels, ForecastingData
from dlref.data.series import to_series
from dlref.data.windows import Draws, SeriesStore, Window
from dlref.export.contender import program
from dlref.export.convert import Plan, convert, is_quantised
from dlref.export.graph import example_at, first_sizes, write_onnx, write_program
from dlref.export.targets import TARGETS
from dlref.models import DeepAR
from dlref.runtime import UserError, make_runner
from dlref.runtime.bundle import OnnxGraph
from dlref.runtime.calendar import Frequency
from dlref.runtime.lines import Line
from dlref.runtime.runners.forecasting import LEVELS, Past, prediction
from dlref.runtime.series import Record, first_differences
from dlref.tasks import Beta, Deterministic, Forecaster, Gaussian, NegativeBinomial, StudentT, figures
from dlref.tasks.deployable import Graph
from dlref.tasks.forecast_scores import BASELINES, QuantileScores, SampleScores, crps, last_value, seasonal_naive
from dlref.tasks.forecasting import OWN, scale_of
from dlref.training.devices import widest_float

H = Frequency.parse("H")
LONGEST = max(H.lags)
START = "2024-01-01 00:00:00"


def forecaster(distribution=None, cardinality=(), dynamic=0, static=0, context=6, horizon=4, cell="lstm", **task):
    """Return a small forecaster for hourly series."""
    distribution = distribution or StudentT()
    features = len(H.cycles) + 1 + dynamic + static
    sizes = {"lags": len(H.lags), "features": features, "parameters": distribution.parameters}
    network = DeepAR(**sizes, cardinality=list(cardinality), cell=cell, num_cells=8)
    task = Forecaster(distribution, **{"network": network, "optimizer": sgd} | task)
    known = {"cardinality": list(cardinality), "unseen": [[] for _ in cardinality], "category_names": ()}
    lengths = {"context_length": context, "prediction_length": horizon}
    task.remember({"frequency": str(H), **lengths, **known, "dynamic_features": dynamic, "static_features": static})
    return task.eval()


def window_of(values, observed=None, features=5, categories=0, context=6, horizon=4):
    """Return a window of values (B, context + horizon) after a history of ones as long as the data modules' own."""
    values = torch.as_tensor(values, dtype=torch.float32)
    history = torch.ones(len(values), LONGEST + 1)
    observed = torch.ones_like(values, dtype=torch.bool) if observed is None else torch.as_tensor(observed)
    return Window(
        torch.cat([history, values], 1),
        torch.cat([history.bool(), observed], 1),
        torch.rand(*values.shape, features),
        torch.zeros(len(values), categories, dtype=torch.long),
        torch.ones(len(values)),
        known=torch.full((len(values),), LONGEST + 1 + context),
    )


def data(**changes):
    """Twelve days of six series."""
    sizes = {"count": 6, "length": 400, "frequency": "H", "prediction_length": 4, "context_length": 6}
    return SyntheticSeries(**{**sizes, "batch_size": 8, "batches": 3} | changes)


# Inputs of the network


class Recorder(nn.Module):
    """A network that records its inputs and returns zeros."""

    def forward(self, lagged, features, categories, scale, state=None):
        self.lagged, self.scale = lagged, scale
        return torch.zeros(*lagged.shape[:2], 3), torch.zeros(2, len(lagged), 1)


def test_lagged_values_are_the_values_that_many_steps_before():
    task = forecaster(network=Recorder())
    counting = torch.arange(1.0, LONGEST + 11)[None]
    task(window_of(torch.ones(1, 10))._replace(values=counting))
    found = task.network.lagged[0] * task.network.scale
    now = counting[0, -10:, None]
    torch.testing.assert_close(now - found, torch.tensor(H.lags).float().expand(10, -1), rtol=1e-4, atol=1e-2)


def test_lags_above_longest_lag_are_left_out():
    assert forecaster(longest_lag=3).lags == [1, 2, 3]


def test_scale_is_the_mean_absolute_value_of_observed_points():
    target = torch.tensor(
        [[2.0, -4.0, 99.0], [0.0, 0.0, 0.0], [0.0, -7.0, -7.0], [0.0, 0.0, 0.0], [2e-12, 4e-12, 3e-12]]
    )
    observed = torch.tensor([[True, True, False], [True] * 3, [False] * 3, [False] * 3, [True] * 3])
    assert scale_of(target, observed, torch.tensor(5.0)).tolist() == [3, 5, 7, 5, pytest.approx(3e-12)]


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("unit", [1, 1024])
def test_a_context_without_a_scale_has_the_typical_one_of_the_training_series(tmp_path, difference, unit):
    """Means 2 and 8 of values, 4 and 0 of changes; neither zeros nor held-out or unused values count."""
    targets = [[0, 4] * 200 + [1e6] * 8, [8] * 400 + [1e6] * 8, [0] * 408, [1e6] * 12]
    rows = [{"start": START, "target": [unit * value for value in target]} for target in targets]
    (tmp_path / "series.json").write_text("\n".join(map(json.dumps, rows)))
    series = SageMakerSeries(str(tmp_path / "series.json"), **SIZES, batches=1)
    task = forecaster(difference=difference)
    fit(tmp_path, task, series)
    assert task.typical_scale.item() == pytest.approx(4 * unit)
    again = forecaster(difference=difference)
    again.load_state_dict(task.state_dict())
    encode = again.deployable(window_of(torch.zeros(1, 10))).graphs["encode"]
    inputs = {name: tensor.numpy() for name, tensor in encode.inputs.items()}
    assert encode(**inputs | {"target": np.zeros((1, 6), np.float32)})["scale"] == pytest.approx(4 * unit)


def test_training_divides_a_context_without_a_scale_by_the_typical_one():
    task = forecaster(network=Recorder())
    task.typical_scale.fill_(5)
    task(window_of(torch.zeros(1, 10)))
    assert task.network.scale.tolist() == [5]


def test_changes_beside_missing_values_have_no_part_in_the_typical_change(tmp_path):
    row = {"start": START, "target": [0, 2, None, 100, 102] + [102 + 2 * place for place in range(1, 400)]}
    (tmp_path / "series.json").write_text(json.dumps(row))
    series = SageMakerSeries(str(tmp_path / "series.json"), **SIZES)
    series.setup()
    assert series.splits["train"].typical(True) == pytest.approx(2)


def test_a_small_series_after_a_large_one_counts_in_the_typical_scale(tmp_path):
    rows = [{"start": START, "target": [value] * 400} for value in (1e13, 1e-3)]
    (tmp_path / "series.json").write_text("\n".join(map(json.dumps, rows)))
    series = SageMakerSeries(str(tmp_path / "series.json"), **SIZES, by_scale=True)
    series.setup()
    assert series.weight.tolist() == pytest.approx([1e13, 1e-3])
    assert series.splits["train"].typical(False) == pytest.approx(1e5)


def test_the_typical_scale_reaches_to_the_end_of_the_last_window_whatever_their_distance(tmp_path):
    """Two windows of validation, a prediction apart: 392 times 1, then 101 to the end of both; 1e6 is for the test."""
    row = {"start": START, "target": [1] * 392 + [101] * 8 + [1e6] * 4}
    (tmp_path / "series.json").write_text(json.dumps(row))
    series = SageMakerSeries(str(tmp_path / "series.json"), **SIZES, val_windows=2)
    series.setup()
    assert series.splits["val"].typical(False) == pytest.approx(3)


def test_scale_and_forecast_do_not_depend_on_future_values():
    task = forecaster(network=Recorder())
    one, other = window_of(torch.ones(1, 10)), window_of(torch.tensor([[1.0] * 6 + [1e6] * 4]))
    task(one)
    scale = task.network.scale
    task(other)
    assert torch.equal(scale, task.network.scale)
    task = forecaster()
    other = other._replace(features=one.features)
    assert torch.equal(task.paths(one), task.paths(other))


def test_missing_values_are_left_out_of_the_loss():
    task = forecaster()
    observed = [[True] * 8 + [False, True]]
    window = window_of(torch.rand(1, 10), observed)
    loss, _ = task.loss(window)
    parameters = tuple(parameter.detach() for parameter in task(window))
    likelihood = task.distribution.log_prob(window.values[:, -10:], parameters)
    expected = -likelihood[torch.tensor(observed)].mean()
    torch.testing.assert_close(loss.detach(), expected)
    assert task.loss(window_of(torch.rand(1, 10), [[False] * 10])) == (0, 0)


def test_training_step_logs_its_loss_with_the_number_of_observed_points():
    """Devices weigh their shares of a batch by this number."""
    task, said, observed = forecaster(), [], [[True] * 8 + [False, True], [False] * 9 + [True]]
    task.log_train_loss = lambda loss, count: said.append(count) or loss
    window = window_of(torch.rand(2, 10), observed)
    loss = task.training_step(window, 0)
    assert said == [10]
    torch.testing.assert_close(loss, task.loss(window)[0])


@pytest.mark.parametrize("difference", [False, True])
def test_series_with_almost_no_history_have_a_finite_loss_and_forecast(difference):
    """One series has a single observed point, the other is all zeros."""
    task = forecaster(difference=difference)
    values = torch.zeros(2, LONGEST + 11)
    values[0, -5] = 3.0
    observed = torch.zeros_like(values, dtype=torch.bool)
    observed[0, -5], observed[1] = True, True
    window = window_of(torch.zeros(2, 10))._replace(values=values, observed=observed)
    loss, _ = task.loss(window)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in task.network.parameters())
    assert task.paths(window).isfinite().all()


def test_loss_runs_the_recurrent_layers_once_over_context_and_prediction(monkeypatch):
    task, calls = forecaster(), []
    forward = task.network.rnn.forward
    monkeypatch.setattr(task.network.rnn, "forward", lambda *given: calls.append(given) or forward(*given))
    task.loss(window_of(torch.rand(3, 10)))
    assert [given[0].shape[:2] for given in calls] == [(3, 10)]


@pytest.mark.parametrize("distribution", [StudentT(), Gaussian(), NegativeBinomial(), Beta(), Deterministic()])
def test_the_loss_never_reads_a_tensors_value(distribution):
    """Fake tensors have no values, so reading one is an error."""
    task, window = forecaster(distribution, (5,)), window_of(torch.rand(3, 10), categories=1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert task.loss(Window(*map(mode.from_tensor, window[:4])))[0].shape == ()


@pytest.mark.gpu
def test_a_training_step_never_synchronises_with_the_gpu():
    module = data()
    module.setup()
    windows = module.splits["train"].to(torch.device("cuda"))
    task = forecaster(cardinality=(4,), dynamic=1).cuda().train()
    numbers = torch.arange(8).cuda()
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss, _ = task.loss(windows[numbers])
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


# Differenced series


class Ones(nn.Module):
    """A network that returns ones."""

    def forward(self, lagged, features, categories, scale, state=None):
        return torch.ones(*lagged.shape[:2], 1), torch.zeros(2, len(lagged), 1)


def test_a_difference_from_or_to_a_missing_value_is_missing():
    values, observed = np.array([1.0, 3.0, 3.0, 7.0, 6.0]), np.array([True, True, False, True, True])
    change, known = first_differences(values, observed)
    assert change.tolist() == [2, 0, 0, -1]
    assert known.tolist() == [True, False, False, True]


@pytest.mark.parametrize(("missing", "expected"), [([], [13, 15, 17, 19]), ([-2], [13.5, 16, 18.5, 21])])
def test_differenced_forecasts_scale_by_the_mean_change_and_start_at_the_last_value(missing, expected):
    """Changes of 3, 2, 1, 4, 0 and 2 average 2, the first four 2.5; each predicted change equals the scale."""
    task = forecaster(Deterministic(), network=Ones(), difference=True)
    values, observed = np.array([-1.0, 2, 4, 5, 9, 9, 11]), np.ones(11, bool)
    observed[[place - 4 for place in missing]] = False
    values[missing] = values[[place - 1 for place in missing]]  # as the data module fills them
    window = window_of([[*values, 0, 0, 0, 0]], [observed.tolist()])
    assert task.paths(window)[0, 0].tolist() == expected
    served = task.deployable(window)
    runner = make_runner("forecasting", served.graphs, served.metadata)
    target = [*np.ones(LONGEST).tolist(), *np.where(observed[:7], values, np.nan).tolist()]
    target = [None if np.isnan(value) else value for value in target]
    assert runner({"start": START, "target": target})["mean"] == expected


def test_differenced_loss_is_the_loss_of_the_differenced_values():
    torch.manual_seed(0)
    differenced = forecaster(difference=True)
    plain = forecaster(network=differenced.network)
    window = window_of(torch.rand(3, 10), torch.rand(3, 10) > 0.2)
    both = [first_differences(*row) for row in zip(window.values.numpy(), window.observed.numpy(), strict=True)]
    values, observed = (torch.from_numpy(np.stack(part)) for part in zip(*both, strict=True))
    of_values, _ = plain.loss(window._replace(values=values, observed=observed))
    torch.testing.assert_close(differenced.loss(window)[0], of_values)


def test_differenced_sampling_agrees_with_one_call_over_the_drawn_values():
    task = forecaster(Deterministic(), difference=True)
    window = window_of(torch.rand(2, 10))
    paths = task.paths(window)[:, 0]
    filled = window._replace(values=torch.cat([window.values[:, :-4], paths], 1))
    change, _ = task(task.modelled(filled))
    added = window.values[:, -5, None] + change[:, -4:].cumsum(1)
    torch.testing.assert_close(added, paths, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("difference", [False, True])
def test_the_runner_prepares_a_series_exactly_like_its_window(tmp_path, difference):
    """Compared byte by byte because they seed the noise: zeros of another sign would draw other paths."""
    series = [
        [-3.0, -2, -1, 1, 2],
        [-1.0],
        [5.0],
        [None, None, 4.0, None, 6.0, 7.0],
        [7.0, 7.0, 3.0, None, None],
        np.random.default_rng(0).normal(size=LONGEST + 50).round(2).tolist(),
    ]
    entries = [{"start": START, "target": target} for target in series]
    (tmp_path / "series.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    module = SageMakerSeries(str(tmp_path / "series.json"), frequency="H", prediction_length=4, context_length=6)
    module.setup()
    task = forecaster(difference=difference)
    window = module.splits["predict"][torch.arange(len(series))]
    seen, served = task.past(window), task.deployable(window)
    runner = make_runner("forecasting", served.graphs, served.metadata)
    for i, entry in enumerate(entries):
        for name, part in runner.past(entry, "here")._asdict().items():
            if name == "features":
                np.testing.assert_allclose(part, seen.features[i], rtol=1e-6)
            else:
                assert part.tobytes() == getattr(seen, name)[i].tobytes(), (i, name)
    paths = [runner(one)["mean"] for one in entries]
    np.testing.assert_allclose(paths, task.paths(window).mean(1), rtol=1e-4, atol=1e-4)


def test_changes_beyond_float32_are_refused_without_a_warning():
    task = forecaster(difference=True)
    served = task.deployable(window_of(torch.rand(1, 10)))
    runner = make_runner("forecasting", served.graphs, served.metadata)
    for target in ([3e38, -3e38] * 10, [1.0, 2.0] * 20 + [3e38, -3e38, 1.0, 2.0], [-3e38, None, 3e38, 3.4e38, 3e38]):
        with pytest.raises(UserError, match="the forecast is not finite"):
            runner({"start": START, "target": target})
    assert np.isfinite(runner({"start": START, "target": [3e38, -3e38] + [1.0, 2.0] * LONGEST})["mean"]).all()


# Baselines and scores


def test_baselines_of_counting_values():
    values = torch.arange(1.0, 9).repeat(2, 1)
    known = torch.tensor([20, 2])  # of the second series, only the last two values
    assert seasonal_naive(values, known, 5, 3).tolist() == [[6, 7, 8, 6, 7], [8, 7, 8, 8, 7]]
    assert last_value(values, known, 3, 3).tolist() == [[8, 8, 8]] * 2


def test_quantile_scores_match_scikit_learn_and_numpy():
    target, paths = torch.randn(5, 4) * 10, torch.randn(5, 50, 4) * 10
    observed = torch.rand(5, 4) > 0.3
    scores = SampleScores(4)
    scores.update(paths[:2], target[:2], observed[:2], torch.ones(2))
    scores.update(paths[2:], target[2:], observed[2:], torch.ones(3))
    known = target[observed].numpy()
    losses = []
    for level in LEVELS:
        forecast = np.quantile(paths.numpy(), level, axis=1)[observed.numpy()]
        losses.append(2 * mean_pinball_loss(known, forecast, alpha=level) * len(known) / np.abs(known).sum())
    values = scores.compute()
    assert values["wql"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert values["nd"].item() == pytest.approx(losses[4], rel=1e-5)
    mean = paths.mean(1)[observed].numpy()
    assert values["rmse"].item() == pytest.approx(np.sqrt(np.mean((mean - known) ** 2)), rel=1e-5)
    below = [(known <= np.quantile(paths.numpy(), q, axis=1)[observed.numpy()]).mean() for q in LEVELS]
    np.testing.assert_allclose(values["coverage"], below)


def test_coverage_includes_values_equal_to_the_quantile():
    scores = SampleScores(1)
    scores.update(torch.full((1, 7, 1), 3.0), torch.tensor([[3.0]]), torch.ones(1, 1, dtype=torch.bool), torch.ones(1))
    assert scores.compute()["coverage"].tolist() == [1.0] * len(LEVELS)


def test_crps_is_the_integral_of_the_squared_difference_of_distributions():
    paths, value = torch.randn(1, 7, 1), torch.tensor([[0.3]])
    points = np.sort(paths.numpy().ravel())

    def squared(x):
        return ((points <= x).mean() - (x >= 0.3)) ** 2

    expected, _ = integrate.quad(squared, -10, 10, points=[*points, 0.3], limit=200)
    assert crps(paths, value).item() == pytest.approx(expected, abs=1e-5)


def test_msis_follows_m4_and_leaves_out_series_with_zero_seasonal_error():
    """One of two values lies 2.5 outside the interval from 2.5 to 97.5: (95 + 2.5 · 40) / 2 + 95 / 2."""
    paths = torch.arange(101.0)[None, :, None].expand(2, 101, 2)
    scores = SampleScores(2)
    target = torch.tensor([[50.0, 100.0], [1e6, 1e6]])
    scores.update(paths, target, torch.ones(2, 2, dtype=torch.bool), torch.tensor([5.0, 0.0]))
    assert scores.compute()["msis"].item() == pytest.approx((95 + (95 + 40 * 2.5)) / 2 / 5)


def test_crps_and_msis_use_only_observed_points():
    """CRPS is divided by the sum of |values|; MSIS is averaged per window, then over windows with observed points."""
    target, paths = torch.randn(4, 3) * 10, torch.randn(4, 50, 3) * 10
    observed = torch.tensor([[True, False, True], [True] * 3, [False] * 3, [False, False, True]])
    error, scores = torch.tensor([0.5, 2.0, 1.0, 4.0]), SampleScores(3)
    for rows in (slice(0, 1), slice(1, 4)):
        scores.update(paths[rows], target[rows].where(observed[rows], 1e6), observed[rows], error[rows])
    found = scores.compute()
    expected = crps(paths, target)[observed].sum() / target[observed].abs().sum()
    assert found["crps"].item() == pytest.approx(expected.item(), rel=1e-5)
    low, high = np.quantile(paths.numpy(), [0.025, 0.975], axis=1)
    y, there = target.numpy(), observed.numpy()
    score = high - low + 40 * (np.maximum(low - y, 0) + np.maximum(y - high, 0))
    by_window = [score[i][there[i]].mean() / error[i].item() for i in (0, 1, 3)]
    assert found["msis"].item() == pytest.approx(np.mean(by_window), rel=1e-4)


def test_wql_of_a_point_forecast_equals_its_normalised_deviation():
    target, observed = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    scores = QuantileScores(2)
    scores.update(torch.tensor([[2.0, 3.0]])[..., None].expand(1, 2, 9), target, observed)
    assert scores.compute()["wql"] == scores.compute()["nd"] == pytest.approx(0.25)


def test_scores_by_time_ahead_divide_each_times_loss_by_its_own_values():
    """Forecasts 2 above 4 and 1 below 5, 2 below 10; the pinball losses of all levels sum to 4.5 per unit."""
    target, observed = torch.tensor([[4.0, 10.0], [5.0, 1e6]]), torch.tensor([[True, True], [True, False]])
    forecasts, scores = torch.tensor([[6.0, 8.0], [4.0, 0.0]]), QuantileScores(2)
    scores.update(forecasts[..., None].expand(2, 2, len(LEVELS)), target, observed)
    assert scores.compute()["by_time"].tolist() == pytest.approx([3 / 9, 2 / 10])
    assert scores.compute()["wql"].item() == pytest.approx(5 / 19)


def test_evaluate_returns_the_normalised_deviation_of_a_runners_point_forecasts():
    task, windows = forecaster(Deterministic()), [window_of(torch.rand(size, 10)) for size in (3, 2)]
    windows[0].observed[1, -2] = False
    found = task.evaluate(task.deployable(windows[0]).runner(), windows)
    errors, targets = [], []
    for window in windows:
        target, there = window.values[:, -4:], window.observed[:, -4:]
        errors += (task.paths(window)[:, 0] - target)[there].abs().tolist()
        targets += target[there].tolist()
    assert found == pytest.approx(sum(errors) / sum(targets), rel=1e-5)


def test_degradation_from_a_loss_of_zero_is_infinite():
    task = forecaster()
    assert task.degradation(0.0, 0.0) == 0
    assert task.degradation(0.0, 0.1) == math.inf


def test_degradation_is_in_per_cent_of_the_reference():
    assert forecaster().degradation(0.2, 0.21) == pytest.approx(5)


# Graphs and the runner


@pytest.fixture(scope="module", params=[StudentT, Gaussian, NegativeBinomial, Beta, Deterministic])
def exported(request, tmp_path_factory):
    """Return a task, a window of two series with categories and features, its graphs, their folder and a runner.

    `encode` does not depend on the distribution: it is exported for Student's t only; the others use PyTorch's.
    """
    torch.manual_seed(0)
    distribution = request.param
    task = forecaster(distribution(), (5, 3), dynamic=1, static=1)
    window = window_of(torch.rand(2, 10), features=7, categories=2)
    served = task.deployable(window)
    folder = tmp_path_factory.mktemp("graphs")
    graphs = dict(served.graphs)
    for name in ("encode", "step") if distribution is StudentT else ("step",):
        write_onnx(graphs[name], folder / f"{name}.onnx", TARGETS["cpu"])
        graphs[name] = OnnxGraph(folder / f"{name}.onnx", "CPUExecutionProvider")
    return task, window, served, folder, make_runner("forecasting", graphs, served.metadata)


def test_the_same_noise_gives_the_same_paths_in_pytorch_and_in_the_bundle(exported):
    task, window, _, _, runner = exported
    by_pytorch, by_bundle = task.paths(window).numpy(), runner.paths(task.past(window))
    assert by_pytorch.shape == (2, 100, 4)
    np.testing.assert_allclose(by_bundle, by_pytorch, rtol=1e-4, atol=1e-4)
    if not isinstance(task.distribution, Deterministic):
        assert by_pytorch[:, :, -1].std(1).min() > 0


def test_the_example_series_in_a_bundles_description_can_be_forecast(exported):
    _, _, served, _, runner = exported
    shown = re.search(r"\n    (\{.*\})\n", runner.takes(served.metadata))
    assert len(runner(json.loads(shown[1]))["mean"]) == 4


def test_graphs_match_pytorch_at_sizes_not_used_in_tracing(exported):
    _, _, served, _, runner = exported
    for name, sizes in (("encode", {"batch": 5, "context": 17}), ("encode", {"batch": 1, "context": 1})):
        inputs = {key: tensor.numpy() for key, tensor in example_at(served.graphs[name], sizes).items()}
        expected = served.graphs[name](**inputs)
        for key, array in runner.encode(**inputs).items():
            np.testing.assert_allclose(array, expected[key], rtol=1e-5, atol=1e-5)
    for sizes in ({"batch": 3, "sample": 11}, {"batch": 1, "sample": 1}):
        inputs = {key: tensor.numpy() for key, tensor in example_at(served.graphs["step"], sizes).items()}
        expected = served.graphs["step"](**inputs)
        for key, array in runner.step(**inputs).items():
            np.testing.assert_allclose(array, expected[key], rtol=1e-4, atol=1e-4)


def test_int8_quantisation_changes_forecasts_little(exported, tmp_path):
    task, window, served, folder, runner = exported
    graphs = {}  # weights of seven bits, whose products do not overflow on any x86-64
    for path in folder.glob("*.onnx"):
        unbounded = served.graphs[path.stem].unbounded
        convert(path, tmp_path / path.name, TARGETS["x86-64-avx2"], Plan("int8"), [], unbounded)
        assert is_quantised(tmp_path / path.name) == ("LSTM" in served_operators(path) or path.stem == "step")
        graphs[path.stem] = OnnxGraph(tmp_path / path.name, "CPUExecutionProvider")
    small = make_runner("forecasting", dict(served.graphs) | graphs, served.metadata)
    exact, found = (one.paths(task.past(window)).mean(1) for one in (runner, small))
    np.testing.assert_allclose(found, exact, atol=0.1 * np.abs(exact).max())
    past = task.past(window)
    past.values[1, : -task.context] *= 1e4  # a series that dwarfs the other one must not cost it precision
    exact, found = (one.paths(past).mean(1)[0] for one in (runner, small))
    np.testing.assert_allclose(found, exact, atol=0.1 * np.abs(exact).max())


@pytest.mark.parametrize(("target", "plan"), [("x86-64", "int8"), ("qualcomm", "int16"), ("cuda", "float16")])
def test_no_calibrated_range_or_float16_is_chosen_for_the_values_of_series(target, plan, tmp_path):
    """A network of convolutions: series ten times those of training would be cut off, and the metric not show it."""
    inputs, axes = {"lagged": torch.rand(2, 3, 8)}, {"lagged": {0: "batch"}}
    graph = Graph(nn.Conv1d(3, 4, 2), inputs, ["state"], axes, {"batch": (1, 2)}, unbounded=("lagged",))
    write_onnx(graph, tmp_path / "encode.onnx", TARGETS[target])
    plan = Plan(plan, None if plan == "float16" else "MinMax")
    feeds = [{"lagged": inputs["lagged"][:1].numpy()}]
    arguments = tmp_path / "encode.onnx", tmp_path / "small.onnx", TARGETS[target], plan, feeds
    convert(*arguments)  # nothing else is in the way
    with pytest.raises(UserError, match="encode: the values of lagged have no bound"):
        convert(*arguments, graph.unbounded)


def test_a_layer_that_reads_the_values_of_series_is_not_quantised_dynamically(tmp_path):
    """Of one row per series, such as the features of a step: these layers are `Gemm`, not `MatMul`."""
    layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    graph = Graph(layers.eval(), {"features": torch.rand(2, 4)}, ["value"], {}, {}, unbounded=("features",))
    write_onnx(graph, tmp_path / "step.onnx", TARGETS["x86-64"])
    convert(tmp_path / "step.onnx", tmp_path / "int8.onnx", TARGETS["x86-64"], Plan("int8"), [], graph.unbounded)
    products = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node if "MatMul" in node.op_type]
    assert products == ["MatMul", "MatMulInteger"]


def served_operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


def test_exported_programs_without_categories_reload_and_match(tmp_path):
    for name, graph in forecaster().deployable(window_of(torch.rand(2, 10))).graphs.items():
        write_program(graph, tmp_path / f"{name}.pt2", TARGETS["cpu"])
        answer = program(tmp_path / f"{name}.pt2", "eager", "cpu")
        inputs = {key: tensor.numpy() for key, tensor in example_at(graph, first_sizes(graph)).items()}
        for found, expected in zip(answer(**inputs), graph(**inputs).values(), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_sampling_step_by_step_agrees_with_one_call_over_the_drawn_values():
    """Given the drawn values as lags, the single call of training reproduces the states of sampling."""
    task = forecaster(Deterministic())
    window = window_of(torch.rand(2, 10))
    paths = task.paths(window)[:, 0]
    filled = window._replace(values=torch.cat([window.values[:, :-4], paths], 1))
    value, _ = task(filled)
    torch.testing.assert_close(value[:, -4:], paths, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def runner():
    torch.manual_seed(0)
    task = forecaster(cardinality=(5,), dynamic=1)
    task.facts["unseen"] = [[3]]
    served = task.deployable(window_of(torch.rand(2, 10), features=6, categories=1))
    return make_runner("forecasting", served.graphs, served.metadata)


def instance(points=30, **changes):
    """Return a valid series for the runner."""
    values = [float(i % 7) for i in range(points)]
    return {"start": START, "target": values, "cat": [2], "dynamic_feat": [[0.5] * (points + 4)]} | changes


def test_a_sagemaker_request_gets_a_sagemaker_response(runner):
    configuration = {"num_samples": 50, "output_types": ["mean", "quantiles", "samples"], "quantiles": ["0.1", "0.50"]}
    answer = runner({"instances": [instance(), instance(9)], "configuration": configuration})
    assert [set(one) for one in answer["predictions"]] == [{"mean", "quantiles", "samples"}] * 2
    first = answer["predictions"][0]
    paths = np.array(first["samples"])
    assert paths.shape == (50, 4)
    np.testing.assert_allclose(first["mean"], paths.mean(0), rtol=1e-5)
    np.testing.assert_allclose(first["quantiles"]["0.50"], np.median(paths, 0), rtol=1e-5)
    assert list(first["quantiles"]) == ["0.1", "0.50"]
    json.dumps(answer)
    for kind in configuration["output_types"]:
        answer = runner({"instances": [instance()], "configuration": {"output_types": [kind]}})
        assert [set(one) for one in answer["predictions"]] == [{kind}]


def test_a_series_may_be_given_as_arrays_and_its_forecast_ignores_other_series(runner):
    plain = runner(instance())
    arrays = runner(instance(target=np.array(instance()["target"]), dynamic_feat=np.full((1, 34), 0.5)))
    pythons = runner(
        instance(
            start=datetime.fromisoformat(instance()["start"]),
            target=tuple(map(np.float64, instance()["target"])),
            dynamic_feat=(tuple([0.5] * 34),),
        )
    )
    assert pythons == plain
    assert runner(instance(start=np.datetime64(instance()["start"]))) == plain
    for moment in (np.datetime64("2024-01-01T00:30:00.750"), np.datetime64("NaT", "s")):
        with pytest.raises(UserError, match="start"):
            runner(instance(start=moment))
    request = {"instances": (instance(),), "configuration": {"num_samples": np.int64(100)}}
    assert runner(request)["predictions"][0]["mean"] == plain["mean"]
    among = runner([instance(8), instance(), instance(50)])[1]
    assert set(plain) == {"mean", "quantiles"}
    assert list(plain["quantiles"]) == [str(level) for level in LEVELS]
    assert plain == arrays
    np.testing.assert_allclose(among["mean"], plain["mean"], rtol=1e-5)
    np.testing.assert_allclose(*(list(answer["quantiles"].values()) for answer in (among, plain)), rtol=1e-4)


def test_null_and_nan_are_filled_and_left_out_of_the_scale(runner):
    """They take the previous value; in the context they are also left out of the scale."""
    target = instance()["target"]
    target[3] = None
    nan = [*target[:3], "NaN", *target[4:]]
    filled = [*target[:3], target[2], *target[4:]]
    assert runner(instance(target=target)) == runner(instance(target=nan)) == runner(instance(target=filled))
    past = runner.past(instance(target=[*[0.0] * 26, 3.0, None, None, 5.0]), "here")
    assert past.values[-4:].tolist() == [3, 3, 3, 5]
    assert past.observed.tolist() == [True, True, True, False, False, True]
    encoded = runner.encode(
        target=past.values[None, -6:],
        observed=past.observed[None],
        lagged=np.zeros((1, 6, len(H.lags)), np.float32),
        features=past.features[None, :6],
        categories=past.categories[None],
    )
    assert encoded["scale"].tolist() == [2]


def test_path_noise_is_stratified_and_uncorrelated(runner):
    noise = runner.noise(np.ones(3, np.float32), 50, 0)
    assert noise.shape == (50, 4, 2)
    assert noise.dtype == np.float32
    np.testing.assert_array_equal(np.sort((noise * 50).astype(int), axis=0)[:, 2, 1], np.arange(50))
    assert (
        np.abs(np.corrcoef(noise.reshape(50, 8).T) - np.eye(8)).max() < 0.5
    )  # each path changes its stratum from column to column
    assert noise.min() >= 0
    assert noise.max() < 1


def test_each_series_has_its_own_noise(runner):
    one, other = (runner.noise(np.float32([value, 1]), 10, 0) for value in (1, 2))
    assert not np.array_equal(one, other)


def test_requests_with_different_seeds_are_not_batched_together(runner):
    one, other = (runner.read({"instances": [instance()], "configuration": {"seed": seed}}) for seed in (0, 1))
    assert runner.together(one, one)
    assert not runner.together(one, other)
    assert not runner.together(other, one)


def test_num_samples_other_than_a_bundles_fixed_number_is_refused(runner):
    step = SimpleNamespace(shape=runner.step.shape | {"noise": (1, 8, 1)})
    fixed = make_runner("forecasting", {"encode": runner.encode, "step": step}, runner.metadata)
    with pytest.raises(UserError, match="num_samples: 100; expected 8, the fixed number of this bundle"):
        fixed([instance()])


def test_deeply_nested_lists_and_invalid_file_names_only_fail_their_own_input(runner):
    deep = json.dumps(instance()).replace('"target": [', '"target": [' + "[" * 900 + "]" * 900 + ", ")
    answers = list(runner.stream([instance(), Line("a.jsonl:2", deep), "a\0b", "\ud800.json", instance()]))
    assert [isinstance(answer, UserError) for answer in answers] == [False, True, True, True, False]
    assert str(answers[1]).startswith("a.jsonl:2: ")


def test_quantiles_of_values_near_the_float32_limit_are_finite():
    paths = np.float32([[-3e38], [3e38]])
    assert np.isfinite(prediction(paths)["quantiles"]["0.5"]).all()


class Sevens:
    """A step whose values are 7 divided by the scale, rounded to float32."""

    shape = dict.fromkeys(("noise", "lagged"), ("batch", "sample", 1))

    def __call__(self, lagged, scale, state, **_):
        return {"value": np.float32(7) / np.broadcast_to(scale[:, None], lagged.shape[:2]), "next_state": state}


def test_forecasts_of_counts_are_whole_numbers(runner):
    """Dividing by a scale and multiplying again may change a value; the scale here is the series' last value."""

    def encode(target, **_):
        return {"scale": target[:, -1], "state": np.zeros((1, len(target), 1), np.float32)}

    counts = make_runner("forecasting", {"encode": encode, "step": Sevens()}, runner.metadata | {"whole_numbers": True})
    targets = [[*instance()["target"], scale] for scale in np.linspace(0.1, 9, 200).tolist()]
    pasts = [runner.past(instance(31, target=target), "here") for target in targets]
    assert (counts.paths(Past(*map(np.stack, zip(*pasts, strict=True))), 4) == 7).all()


def test_forecasts_of_whole_changes_keep_the_fraction_of_the_level(runner):
    """Such as a meter that counts up from 0.5."""

    def encode(target, **_):
        return {"scale": np.full(len(target), 0.3, np.float32), "state": np.zeros((1, len(target), 1), np.float32)}

    whole = runner.metadata | {"whole_numbers": True, "differenced": True}
    counts = make_runner("forecasting", {"encode": encode, "step": Sevens()}, whole)
    past = counts.past(instance(target=[*instance()["target"][:-1], 1739.5]), "here")
    (paths,) = counts.paths(Past(*(part[None] for part in past)), 4)
    assert (paths == 1739.5 + 7 * np.arange(1, counts.horizon + 1)).all()


def test_another_seed_draws_other_paths(runner):
    one, same, other = (
        runner({"instances": [instance()], "configuration": {"seed": seed}})["predictions"][0]["mean"]
        for seed in (0, 0, 7)
    )
    assert one == same == runner(instance())["mean"]
    assert one != other


def test_a_bad_line_yields_its_error_and_the_other_lines_their_forecasts(runner, tmp_path):
    good = json.dumps(instance() | {"id": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "lines.jsonl").write_text("\n".join(["{bad", good, "[]", good]), encoding="utf-8")
    sources = [source for _, source in runner.inputs(str(tmp_path / "lines.jsonl"))]
    kinds = [type(answer) for answer in runner.stream(sources)]
    assert kinds == [UserError, dict, UserError, dict]
    assert [source for _, source in runner.inputs("none.json")] == ["none.json"]
    ((_, typed),) = runner.inputs(json.dumps(instance()))
    assert runner(typed) == runner(instance())


def test_a_forecast_beyond_float32_names_its_series(runner):
    with pytest.raises(UserError, match=r"request: instances\[1\]: the forecast is not finite"):
        runner({"instances": [instance(), instance(target=[3e38] * 30)]})


def test_files_may_hold_a_request_a_series_or_one_series_per_line(runner, tmp_path):
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, (instance(), instance(12)))) + "\n")
    (tmp_path / "one.json").write_text(json.dumps(instance(), indent=1))
    (tmp_path / "request.json").write_text(json.dumps({"instances": [instance()]}))
    lines = list(runner.inputs(str(tmp_path / "lines.jsonl")))
    assert [name for name, _ in lines] == [f"{tmp_path}/lines.jsonl:1", f"{tmp_path}/lines.jsonl:2"]
    (one,), (request,) = (list(runner.inputs(str(tmp_path / name))) for name in ("one.json", "request.json"))
    assert (
        runner(lines[0][1]) == runner(one[1]) == runner(request[1])["predictions"][0] == runner(tmp_path / "one.json")
    )


BAD_REQUESTS = [
    ({"instances": [instance()], "num_samples": 7}, "'num_samples'; expected only instances and configuration"),
    (instance(feat_static_cat=[1]), "feat_static_cat; expected cat, its name"),
    (instance(feat_dynamic_real=[[0.5] * 34]), "feat_dynamic_real; expected dynamic_feat, its name"),
    ("[]", "'[]'; expected one JSON object"),
    ("{", "expected one JSON object"),
    ("", "expected one JSON object"),
    ('{"instances": 3}', "instances: expected a list"),
    ({"instances": [instance()], "configuration": {"quantiles": ["0.1", "a"]}}, "quantiles: "),
    ('{"instances": []}', "instances: expected a list"),
    ('{"instances": [3]}', "instances[0]: int; expected a series"),
    ({"instances": [instance(), instance(start="2024")]}, "instances[1]: start: '2024'; expected YYYY-MM-DD"),
    (instance(start=None), "start: None"),
    (instance(start="2024-01-01T00:00:00Z"), "without a time zone"),
    (instance(start="2024-02-30"), "start: '2024-02-30'"),
    (instance(target=None), "target: None; expected a list of numbers"),
    (instance(target="1,2"), "target: '1,2'"),
    (instance(target=[1.0, "two"] + [0.0] * 28), "target[1]: 'two'"),
    (instance(target=[1.0, True] + [0.0] * 28), "target[1]: True"),
    (instance(target=[1.0, 1e300] + [0.0] * 28), "target[1]: 1e+300"),
    (instance(target=[1.0, [2.0]] + [0.0] * 28), "target[1]: [2.0]"),
    (instance(target=[None] * 30), "target: 30 values, all missing"),
    (instance(target=[], dynamic_feat=[[0.5] * 4]), "target: 0 values, all missing"),
    (instance(cat=[5]), "cat[0]: 5; expected 0 to 4"),
    (instance(cat=[-1]), "cat[0]: -1"),
    (instance(cat=[1.0]), "cat[0]: 1.0"),
    (instance(cat=["a"]), "cat[0]: 'a'"),
    (instance(cat=[1, 1]), "cat: 2 of them; expected 1"),
    (instance(cat=None), "cat: 0 of them; expected 1"),
    (instance(dynamic_feat=None), "dynamic_feat: 0 of them; expected 1"),
    (instance(dynamic_feat=[[0.5] * 30]), "dynamic_feat: 30 values; expected 34"),
    (instance(dynamic_feat=[[0.5] * 34] * 2), "dynamic_feat: 2 of them; expected 1"),
    (instance(dynamic_feat=[[0.5] * 33 + [None]]), "dynamic_feat[0][33]: None"),
    (instance(dynamic_feat=[[0.5] * 33 + ["NaN"]]), "dynamic_feat[0][33]: 'NaN'"),
    (instance(dynamic_feat=[0.5] * 34), "dynamic_feat: ["),
    (instance(dynamic_feat={"a": 1}), "dynamic_feat: {'a': 1}"),
    (instance(feat_static_real=[1.0]), "feat_static_real: 1 of them; expected 0"),
    (instance(feat_static_real="a"), "feat_static_real: 'a'"),
    ({"instances": [instance()], "configuration": []}, "configuration: []"),
    ({"instances": [instance()], "configuration": {"num_samples": 0}}, "num_samples: 0"),
    (
        {"instances": [instance()], "configuration": {"num_sample": 7}},
        "configuration: 'num_sample'; expected num_samples",
    ),
    ({"instances": [instance()], "configuration": {"seed": -1}}, "seed: -1; expected 0 to"),
    ({"instances": [instance()], "configuration": {"seed": "a"}}, "seed: 'a'"),
    (
        {"instances": [instance()] * 300, "configuration": {"num_samples": 10**5}},
        "num_samples: 100000; expected 1 to 55924",
    ),
    ({"instances": [instance()], "configuration": {"quantiles": [10**400]}}, "quantiles: ["),
    ({"instances": [instance()], "configuration": {"quantiles": {"0.1": 3}}}, "quantiles: {'0.1': 3}"),
    ({"instances": [instance()], "configuration": {"quantiles": [" 0.5 "]}}, "quantiles: [' 0.5 ']"),
    ({"instances": [instance()], "configuration": {"quantiles": ["0.0"]}}, "quantiles: ['0.0']"),
    (instance(cat=[3]), "cat[0]: 3; expected a value seen in training"),
    ({"instances": [instance()], "configuration": {"num_samples": 10**9}}, "num_samples: 1000000000"),
    ({"instances": [instance()], "configuration": {"num_samples": "100"}}, "num_samples: '100'"),
    ({"instances": [instance()], "configuration": {"num_samples": True}}, "num_samples: True"),
    ({"instances": [instance()], "configuration": {"output_types": "mean"}}, "output_types: 'mean'"),
    ({"instances": [instance()], "configuration": {"output_types": ["median"]}}, "output_types: ['median']"),
    ({"instances": [instance()], "configuration": {"output_types": [["mean"]]}}, "output_types: [['mean']]"),
    ({"instances": [instance()], "configuration": {"output_types": []}}, "output_types: []"),
    ({"instances": [instance()], "configuration": {"quantiles": ["a"]}}, "quantiles: ['a']"),
    ({"instances": [instance()], "configuration": {"quantiles": ["1"]}}, "quantiles: ['1']"),
    ({"instances": [instance()], "configuration": {"quantiles": ["nan"]}}, "quantiles: ['nan']"),
    ({"instances": [instance()], "configuration": {"quantiles": []}}, "quantiles: []"),
    ({"instances": [instance()], "configuration": {"quantiles": 0.5}}, "quantiles: 0.5"),
]


@pytest.mark.parametrize(("content", "complaint"), BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_invalid_requests_are_refused_in_one_line_that_says_what_was_expected(runner, tmp_path, content, complaint):
    path = tmp_path / "request.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    (answer,) = runner.stream(source for _, source in runner.inputs(str(path)))
    assert isinstance(answer, UserError)
    assert complaint in str(answer)
    assert "; expected" in str(answer) or ": expected" in str(answer)
    assert str(answer).startswith(f"{path}: ")
    assert len(str(answer).splitlines()) == 1


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x1f\x8b broken"])
def test_files_that_are_not_text_are_refused(runner, tmp_path, content):
    path = tmp_path / ("a.json.gz" if content[0] == 0x1F else "a.json")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"(not UTF-8|unreadable).*; expected JSON"):
        runner(path)
    with pytest.raises(UserError, match="Is a directory"):
        runner(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"lags": []},
        {"lags": [0]},
        {"lags": ["1"]},
        {"lags": [10**12]},
        {"lags": [2, 1]},
        {"lags": [1, 3, 2]},
        {"differenced": None},
        {"context_length": 0},
        {"context_length": 10**13},
        {"uniforms": -1},
        {"frequency": 1},
        {"cardinality": None},
        {"cardinality": ["a"]},
        {"cardinality": [0]},
        {"unseen": []},
    ],
    ids=str,
)
def test_invalid_metadata_or_graphs_are_refused(runner, changes):
    with pytest.raises(UserError, match="not forecasting"):
        make_runner("forecasting", {"encode": runner.encode, "step": runner.step}, runner.metadata | changes)
    with pytest.raises(UserError, match="not forecasting"):
        make_runner("forecasting", {"step": runner.step}, runner.metadata)


def test_a_category_may_have_a_single_value(runner):
    graphs = {"encode": runner.encode, "step": runner.step}
    known = make_runner("forecasting", graphs, runner.metadata | {"cardinality": [1], "unseen": [[]]})
    with pytest.raises(UserError, match=r"cat\[0\]: 2; expected 0 to 0, as in training"):
        known.read(instance())


# Data modules


def ends_of(module, split):
    """Return for each series where its windows in a split end."""
    windows = module.splits[split]
    item, end = windows.ends(torch.arange(len(windows)))
    return [end[item == i].tolist() for i in range(len(windows.count))]


def test_windows_of_the_splits_follow_one_another():
    module = data(count=2, val_windows=2, test_windows=3)
    module.setup()
    assert ends_of(module, "test") == [[392, 396, 400]] * 2
    assert ends_of(module, "val") == [[384, 388]] * 2
    assert ends_of(module, "train") == [list(range(5, 381))] * 2
    assert ends_of(module, "predict") == [[404]] * 2
    batch = next(iter(module.test_dataloader()))
    points = module.splits["test"].store
    torch.testing.assert_close(batch.values[2, -4:], points.values[396:400])
    assert batch.truth.shape == (6, 4, 9)
    assert len(module.val_dataloader().dataset) == 4


def test_seasonal_error_uses_all_points_before_the_forecast():
    module = data(count=1)
    module.setup()
    store = module.splits["test"].store
    values = torch.where(store.observed, store.values, torch.nan)[:396]
    expected = (values[24:] - values[:-24]).abs().nanmean()
    torch.testing.assert_close(next(iter(module.test_dataloader())).seasonal_error[0], expected)


def jsonl(path, *lengths, **fields):
    """Write series of counting numbers."""
    rows = [{"start": START, "target": list(range(1, 1 + n))} | fields for n in lengths]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


SIZES = {"frequency": "H", "prediction_length": 4, "context_length": 6}


def test_series_too_short_for_a_window_are_left_out_of_each_split(tmp_path, capfd):
    module = SageMakerSeries(jsonl(tmp_path / "a.json", 300, 5, 9, 4, 13), **SIZES)
    module.setup()
    assert [len(ends) for ends in ends_of(module, "train")] == [288, 0, 0, 0, 1]
    assert [len(ends) for ends in ends_of(module, "val")] == [1, 0, 1, 0, 1]
    assert [len(ends) for ends in ends_of(module, "test")] == [1, 1, 1, 0, 1]


def test_draws_follow_series_weights_and_by_scale_weighs_by_mean_absolute_value():
    counts, weights = torch.tensor([1000, 0, 10]), torch.tensor([1.0, 50.0, 3.0])
    numbers = torch.cat(list(Draws(counts, weights, 100, 200).draw(torch.Generator().manual_seed(0))))
    assert len(numbers) == 20_000
    assert numbers.max() < 1010
    assert (numbers >= 1000).float().mean() == pytest.approx(0.75, abs=0.02)
    assert np.bincount(numbers[numbers >= 1000] - 1000) / 15_000 == pytest.approx([0.1] * 10, abs=0.01)
    module = data(by_scale=True)
    module.setup()
    store = module.splits["train"].store
    for i in range(6):
        values = store.values.where(store.observed, torch.nan)[store.begin[i] :][:392]
        expected = values.abs().nanmean()
        assert module.weight[i].item() == pytest.approx(expected.item(), rel=1e-5)


def test_by_scale_never_draws_a_series_without_points_to_train_from(tmp_path):
    module = SageMakerSeries(jsonl(tmp_path / "a.json", 300, 5), by_scale=True, **SIZES)
    module.setup()
    assert module.weight.tolist() == [146.5, 0]  # the mean of 1 to 292
    numbers = torch.cat(list(module.order(1).draw(torch.Generator().manual_seed(0))))
    assert numbers.max() < module.splits["train"].count[0]


def test_short_series_and_series_with_too_few_windows_are_counted_in_the_log(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("dlref.data.forecasting.rank_zero_info", said.append)
    SageMakerSeries(jsonl(tmp_path / "a.json", 300, 11), test_windows=3, **SIZES).setup()
    assert said == [
        "train: 1 of 2 series are too short for a window, from their first known value on, and left out",
        "val: 1 of 2 series are too short for a window, from their first known value on, and left out",
        "test: 1 of 2 series have fewer than 3 windows",
    ]


def test_missing_values_before_a_series_make_no_difference(tmp_path):
    """A table has blanks where one of its series begins later than the others."""
    rows = [{"start": START, "target": list(range(400))}, {"start": "2024-01-17 12:00:00", "target": [9, 8, 7, 6, 5]}]
    padded = [rows[0], {"start": START, "target": [None] * 396 + rows[1]["target"]}]
    found = []
    for name, lines in (("short", rows), ("padded", padded)):
        path = tmp_path / f"{name}.json"
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
        module = SageMakerSeries(str(path), val_windows=2, **{**SIZES, "prediction_length": 2})
        module.setup()
        found.append({split: windows.count.tolist() for split, windows in module.splits.items() if split != "predict"})
        known = [int(known) for batch in module.test_dataloader() for known in batch.known]
        assert known == [398, 3]
    assert found[0] == found[1] == {"train": [392, 0], "val": [2, 1], "test": [1, 1]}


def test_the_seasonal_naive_forecast_repeats_a_value_carried_over_a_gap(tmp_path):
    """The window begins a season before the forecast, within the gap."""
    target = [float(hour) for hour in range(4 * 1440)]
    day = slice(3 * 1440 - 10, 3 * 1440)
    target[day] = [None] * 10
    path = tmp_path / "minutes.json"
    path.write_text(json.dumps({"start": START, "target": target}) + "\n")
    module = SageMakerSeries(str(path), **{**SIZES, "frequency": "1min", "prediction_length": 10})
    module.setup()
    (batch,) = module.test_dataloader()
    forecast = seasonal_naive(batch.values[:, :-10], batch.known, 10, 1440)
    assert forecast.tolist() == [[3.0 * 1440 - 11] * 10]


@pytest.mark.parametrize("test", ["same.json", "./same.json"])
def test_series_that_are_trained_on_and_tested_are_told(tmp_path, monkeypatch, test):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "same.json", 300, 300)
    with pytest.warns(UserWarning, match="test: 1 of 1 files are among those of train"):
        SageMakerSeries("same.json", test, **SIZES).setup()


def test_categories_absent_from_training_are_listed_as_unseen(tmp_path):
    rows = [{"start": START, "target": [1.0] * 200, "cat": [cat, 0]} for cat in (0, 2)]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, rows)))
    module = SageMakerSeries(str(tmp_path / "a.json"), cardinality=[4, 1], **SIZES)
    module.setup()
    assert (module.cardinality, module.unseen) == ([4, 1], [[1, 3], []])


def test_categories_without_a_training_window_cause_a_warning(tmp_path):
    rows = [{"start": START, "target": [1.0] * points, "cat": [cat]} for cat, points in enumerate((300, 9, 13))]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"train: no window of a series with cat\[0\] in \[1\]: nothing is learnt"):
        SageMakerSeries(str(tmp_path / "a.json"), **SIZES).setup()


def test_separate_test_and_predict_files_are_used_for_their_splits(tmp_path):
    train = jsonl(tmp_path / "train.json", 300, cat=1, dynamic_feat=[[1.0] * 300])
    test = jsonl(tmp_path / "test.json", 308, cat=1, dynamic_feat=[[1.0] * 308])
    coming = jsonl(tmp_path / "predict.json", 308, cat=1, dynamic_feat=[[1.0] * 312])
    module = SageMakerSeries(train, test, **SIZES)
    module.setup()
    assert (ends_of(module, "val"), ends_of(module, "test")) == ([[300]], [[308]])
    assert module.cardinality == [2]
    with pytest.raises(UserError, match=r"expected --data\.init_args\.predict"):
        module.predict_dataloader()
    module = SageMakerSeries(train, test, coming, **SIZES)
    module.setup()
    assert ends_of(module, "predict") == [[312]]
    assert module.sources() == [f"{coming}:1"]


def test_series_to_test_and_to_predict_are_held_once_if_they_are_the_same(tmp_path):
    module = SageMakerSeries(jsonl(tmp_path / "a.json", 300), **SIZES)
    module.setup()
    stores = {name: windows.store for name, windows in module.splits.items()}
    assert len(stores) == 4
    assert len(set(map(id, stores.values()))) == 1


def test_series_to_test_or_predict_are_checked_against_those_of_training(tmp_path):
    fields = {"cat": 1, "dynamic_feat": [[1.0] * 300]}
    train = jsonl(tmp_path / "train.json", 300, **fields)
    same = jsonl(tmp_path / "same.json", 300, **fields)
    other = jsonl(tmp_path / "other.json", 300, **fields | {"cat": 0})
    with pytest.raises(UserError, match=r"other\.json:1: cat\[0\]: 0; expected one seen in training, \[1\]"):
        SageMakerSeries(train, other, **SIZES).setup()
    with pytest.raises(UserError, match=r"same\.json:1: dynamic_feat: 300 values; expected 304"):
        SageMakerSeries(train, predict=same, **SIZES).setup()


def test_the_same_values_in_all_table_formats_become_the_same_windows(tmp_path):
    values = np.arange(1, 401) % 50
    times = [str(np.datetime64("2024-01-01T00:00:00") + np.timedelta64(i, "h")).replace("T", " ") for i in range(400)]
    (tmp_path / "wide.txt").write_text("\n".join(f"{v},{2 * v}" for v in values))
    (tmp_path / "dated.csv").write_text(
        "date,a,b\n" + "\n".join(f"{t},{v},{2 * v}" for t, v in zip(times, values, strict=True))
    )
    rows = [[name, *(k * values)] for name, k in (("a", 1), ("b", 2))]
    for name, start, stop in (("train", 1, 397), ("test", 397, 401)):
        cells = [",".join(map(str, [row[0], *row[start:stop]])) for row in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join([",".join(f"V{i}" for i in range(stop - start + 1)), *cells]))
    long = [f"{name},{t},{k * v}" for name, k in (("a", 1), ("b", 2)) for t, v in zip(times, values, strict=True)]
    (tmp_path / "long.csv").write_text("\n".join(["item_id,timestamp,target", *long]))
    modules = [
        WideSeries(str(tmp_path / "wide.txt"), START, **SIZES),
        DatedSeries([str(tmp_path / "dated.csv")], **SIZES),
        RowSeries(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"), START, **SIZES),
        LongSeries(str(tmp_path / "long.csv"), **SIZES),
    ]
    batches = []
    for module in modules:
        module.setup()
        assert (module.cardinality, module.dynamic_features) == ([], 0)
        batches.append(next(iter(module.test_dataloader())))
    assert batches[0].values[1, -4:].tolist() == [94, 96, 98, 0]
    for batch in batches[1:]:
        for one, other in zip(batch[:5], batches[0][:5], strict=True):
            assert torch.equal(one, other)
    own = WideSeries(str(tmp_path / "wide.txt"), START, own_category=True, **SIZES)
    own.setup()
    assert (own.cardinality, own.category_names) == ([2], ["column 1", "column 2"])  # names do not contain the folder
    (tmp_path / "more").mkdir()
    paths = [str(tmp_path / "dated.csv"), str(tmp_path / "more/dated.csv")]
    Path(paths[1]).write_bytes(Path(paths[0]).read_bytes())
    two = DatedSeries(paths, points=350, **SIZES)
    two.setup()
    assert (len(two.sources()), ends_of(two, "test")) == (4, [[350]] * 4)
    assert two.sources() == ["dated.csv: a", "dated.csv: b", "more/dated.csv: a", "more/dated.csv: b"]
    with pytest.raises(UserError, match="expected each file once"):
        DatedSeries([*paths, paths[0]], **SIZES).setup()


def test_rows_of_two_tables_are_joined_by_name(tmp_path):
    (tmp_path / "train.csv").write_text("id,V1,V2\na,1,2\nb,10,20\n")
    (tmp_path / "test.csv").write_text("id,V1\nb,30\na,3\n")
    series = RowSeries(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"), **SIZES).table(H)
    assert series.names == ["a", "b"]
    assert series.target.tolist() == [1, 2, 3, 10, 20, 30]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"frequency": "1Y"}, "frequency: '1Y'; expected a whole number and min"),
        ({"frequency": "30min"}, "frequency: 30min; expected 1H"),
        ({"prediction_length": 0}, "prediction_length: 0; expected at least 1"),
        ({"context_length": 0}, "context_length: 0; expected at least 1"),
        ({"batches": 0}, "batches: 0; expected at least 1"),
        ({"val_windows": 0}, "val_windows: 0; expected at least 1"),
        ({"points": -1}, "points: -1; expected at least 1"),
        ({"length": 100}, "length: 100; expected at least 336"),
        ({"points": 396}, "points: 396; expected none, since test or predict"),
        ({"cardinality": [3]}, "cat[0]: 3; expected 0 to 2"),
        ({"cardinality": [4, 4]}, "cardinality: [4, 4]; expected auto or 1 numbers"),
        ({"prediction_length": 200}, "train: all 6 series are too short"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(changes, complaint):
    with pytest.raises(UserError) as caught:
        data(**changes).setup()
    assert complaint in str(caught.value)


def test_by_scale_refuses_series_of_only_zeros(tmp_path):
    rows = [{"start": START, "target": [0.0] * 392 + [1.0] * 8}]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="by_scale: only zeros to train from"):
        SageMakerSeries(str(tmp_path / "a.json"), by_scale=True, **SIZES).setup()


def test_train_and_test_tables_with_different_series_are_refused(tmp_path):
    for name, series in (("train", "H1"), ("test", "H2")):
        (tmp_path / f"{name}.csv").write_text("V1,V2\n" + f"{series},1")
    with pytest.raises(UserError, match="series H1 is in only one of the files; expected those of"):
        RowSeries(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"), **SIZES).setup()


# The task


@pytest.mark.parametrize("wrong", [{"lags": 39}, {"features": 5}, {"cardinality": [3]}, {"cardinality": []}])
def test_a_network_with_wrong_sizes_is_refused_with_the_right_sizes(tmp_path, wrong):
    network = DeepAR(**{"lags": 40, "features": 6, "cardinality": [4]} | wrong)
    task = Forecaster(StudentT(), network=network, optimizer=sgd)
    with pytest.raises(
        UserError, match=r"expected model.init_args.network.init_args of lags: 40, features: 6, card.*\[4\]"
    ):
        fit(tmp_path, task, data(count=12))


class Pairs(DeepAR):
    """A network whose state is two tensors, like that of torch's LSTM."""

    def forward(self, *inputs):
        answer, state = super().forward(*inputs)
        return answer, tuple(state.chunk(2))


def test_a_network_whose_state_is_a_tuple_is_refused(tmp_path):
    task = Forecaster(StudentT(), network=Pairs(40, 6, [4]), optimizer=sgd)
    with pytest.raises(UserError, match=r"network returns \[13, 3, 3\], tuple; expected parameters .* and a state"):
        fit(tmp_path, task, data(count=12))


class TimeFirst(DeepAR):
    """A network that takes time as the first axis, like torch's recurrent layers by default."""

    def forward(self, lagged, features, categories, scale, state=None):
        for layer in self.rnn.layers:
            layer.batch_first = False
        return super().forward(lagged, features, categories, scale, state)


class Last(DeepAR):
    """A network that returns the parameters of the last time alone, which would count for all times."""

    def forward(self, *inputs):
        answer, state = super().forward(*inputs)
        return answer[:, -1:], state


class BatchFirst(DeepAR):
    """A network that returns its state with the series as the first axis."""

    def forward(self, lagged, features, categories, scale, state=None):
        answer, state = super().forward(lagged, features, categories, scale, state)
        return answer, state.transpose(0, 1)


@pytest.mark.parametrize(
    ("kind", "layers", "found"),
    [
        (TimeFirst, 2, "[13, 3, 3], [4, 3, 40]"),
        (Last, 2, "[13, 1, 3], [4, 13, 40]"),
        (BatchFirst, 1, "[13, 3, 3], [13, 2, 40]"),
    ],
)
def test_a_network_that_confuses_axes_is_refused(tmp_path, kind, layers, found, unchecked):
    task = Forecaster(StudentT(), network=kind(40, 6, [4], num_layers=layers), optimizer=sgd)
    with pytest.raises(UserError, match=re.escape(f"network returns {found}; expected parameters")):
        fit(tmp_path, task, data(count=12))


class Mixed(DeepAR):
    """A network whose parameters are also those of other times (axis 1), or of other series (axis 0)."""

    axis = 1

    def forward(self, *inputs):
        answer, state = super().forward(*inputs)
        return answer + answer.mean(self.axis, keepdim=True), state


class Forgetful(DeepAR):
    """A network that starts afresh in each call."""

    def forward(self, lagged, features, categories, scale, state=None):
        return super().forward(lagged, features, categories, scale)


@pytest.mark.parametrize("kind", [Mixed, type("Across", (Mixed,), {"axis": 0}), Forgetful])
def test_a_network_that_looks_ahead_or_at_other_series_or_forgets_its_state_is_refused(tmp_path, kind):
    task = Forecaster(StudentT(), network=kind(40, 6, [4]), optimizer=sgd)
    with pytest.raises(UserError, match="network's parameters change with later times, other series or a state"):
        fit(tmp_path, task, data(count=12))


def test_a_network_with_the_wrong_number_of_parameters_is_refused(tmp_path):
    network = DeepAR(40, 6, [4], parameters=2)
    with pytest.raises(UserError, match=r"network returns 2 parameters; expected .*parameters: 3"):
        fit(tmp_path, Forecaster(StudentT(), network=network, optimizer=sgd), data(count=12))


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        ([range(100, 500), range(200)], None),  # meters that count up; the second series starts lower
        (
            [range(400, 0, -1)],
            "target: changes that NegativeBinomial assigns no likelihood to; expected whole numbers of 0",
        ),
        ([[1, None] * 400], "target: no two consecutive values; expected some, or difference false"),
    ],
)
def test_with_difference_the_changes_and_not_the_values_must_be_in_the_support(tmp_path, targets, complaint):
    lines = [json.dumps({"start": START, "target": list(target)}) for target in targets]
    (tmp_path / "counts.json").write_text("\n".join(lines) + "\n")
    sizes = {"frequency": "H", "prediction_length": 4, "context_length": 6, "batches": 2}
    counts = SageMakerSeries(str(tmp_path / "counts.json"), **sizes)
    network = DeepAR(len(H.lags), 5, parameters=2, num_cells=4)
    task = Forecaster(NegativeBinomial(), difference=True, network=network, optimizer=sgd)
    if complaint is None:
        fit(tmp_path, task, counts)
        return
    with pytest.raises(UserError, match=complaint):
        fit(tmp_path, task, counts)


@pytest.mark.parametrize(("distribution", "support"), [(NegativeBinomial(), "whole numbers"), (Beta(), "0 to 1")])
def test_values_outside_the_distributions_support_are_refused(tmp_path, distribution, support):
    network = DeepAR(40, 6, [4], parameters=2)
    with pytest.raises(UserError, match=f"assigns no likelihood to; expected {support}"):
        fit(tmp_path, Forecaster(distribution, network=network, optimizer=sgd), data(count=12))


def test_a_fit_logs_scores_next_to_those_of_the_baselines(tmp_path):
    """Also checks that two epochs give a wql below 1 and that three figures are written."""
    task = Forecaster(
        StudentT(),
        network=DeepAR(40, 6, [4], num_cells=16),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
    )
    module = data(count=40, batches=20)
    trainer = fit(tmp_path / "run", task, module, max_epochs=2)
    (values,) = trainer.test(task, datamodule=module, verbose=False)
    names = {name.removeprefix("test/") for name in values}
    asked = {
        "wql",
        "nd",
        "rmse",
        "msis",
        "crps",
        "seasonal_naive_rmse",
        "last_value_msis",
        "last_value_crps",
        "seasonal_naive_wql",
        "seasonal_naive_nd",
        "last_value_nd",
        "oracle_wql",
    }
    assert asked | {f"coverage_{level}" for level in LEVELS} <= names
    assert values["test/oracle_wql"] < values["test/wql"] < 1
    (validated,) = trainer.validate(task, datamodule=module, verbose=False)
    assert {name.removeprefix("val/") for name in validated} == names
    task.draw(tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "forecasts.png",
        "calibration.png",
        "by_time.png",
    }


def test_a_prediction_length_of_one_is_tested_and_drawn(tmp_path):
    """torchmetrics returns a scalar for a result with one element."""
    task = Forecaster(StudentT(), network=DeepAR(40, 6, [4]), optimizer=sgd)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.test(task, datamodule=data(prediction_length=1), verbose=False)
    assert all(len(share) == 1 for share in task.by_time.values())
    task.draw(tmp_path / "figures")
    assert (tmp_path / "figures/by_time.png").is_file()


def test_values_without_neighbours_are_dots_in_the_figures(tmp_path, monkeypatch):
    """A line through one point has no length, and a fan over one step no width."""
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    nan, paths = math.nan, torch.arange(6.0).view(3, 2)
    past, after = torch.tensor([1.0, nan, 3.0, 4.0, nan, 5.0]), torch.tensor([nan, 2.0])
    figures.forecasts(tmp_path / "several.png", [(past, after, paths)])
    figures.forecasts(tmp_path / "one.png", [(past, after[1:], paths[:, :1])])
    figures.by_time(tmp_path / "by_time.png", {"this model": torch.tensor([0.5]), "last value": torch.tensor([0.7])})
    dots = [[line.get_marker() == "." and line.get_markevery() for line in axes.get_lines()] for axes in drawn]
    assert dots == [[[0, 5], False, [1], False], [[0, 5], [0], [0], False], [[0], [0]]]
    assert all(fan.get_datalim(drawn[1].transData).width > 0 for fan in drawn[1].collections)


def test_no_float64_tensor_is_moved_to_a_device_without_float64(monkeypatch):
    """Apple's GPUs refuse float64. The scores are then sums of float32."""
    dtype = widest_float(torch.device("mps"))
    held = [SampleScores(4, dtype), SeriesStore(data().read(H).train, H), forecaster()]
    for module in held:
        kinds = []
        module._apply(lambda tensor, kinds=kinds: kinds.append(tensor.dtype) or tensor)
        assert torch.float64 not in kinds
        assert kinds
    scores = held[0]
    scores.update(torch.randn(3, 9, 4), torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool), torch.ones(3))
    assert {value.dtype for value in scores.compute().values()} == {torch.float32}
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda")) == torch.float64


def test_deepar_configs_exist_and_their_network_sizes_fit_their_data():
    names = {path.stem for path in (ROOT / "configs").glob("deepar*.yaml")}
    assert names == {
        "deepar_synthetic",
        "deepar_exchange_rate",
        "deepar_m4_hourly",
        "deepar_gru_m4_hourly",
        "deepar_ett_hourly",
        "deepar_electricity",
    }
    for name in names:
        config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        network, given = config["model"]["init_args"]["network"]["init_args"], config["data"]["init_args"]
        frequency, longest = Frequency.parse(given["frequency"]), config["model"]["init_args"].get("longest_lag", 10**9)
        assert network["lags"] == sum(lag <= longest for lag in frequency.lags)
        assert network["features"] == len(frequency.cycles) + 1 + (name == "deepar_synthetic")
        assert network["parameters"] == 3
        assert bool(network.get("cardinality")) == (given.get("own_category", False) or name == "deepar_synthetic")
        assert network.get("cell", "lstm") == ("gru" if "gru" in name else "lstm")


def test_a_forecast_does_not_depend_on_the_categories_of_other_series():
    task = forecaster(cardinality=(5,))
    window = window_of(torch.ones(2, 10), categories=1)._replace(categories=torch.tensor([[0], [4]]))
    alone = task.paths(Window(*(part[1:] for part in window[:5])))
    torch.testing.assert_close(task.paths(window)[1:], alone, rtol=1e-4, atol=1e-5)


def test_quantiles_are_named_as_requested(runner):
    asked = {
        "instances": [instance()],
        "configuration": {"quantiles": ["0.9", "0.1", np.arange(0.1, 1, 0.1)[2], 0.1**2]},
    }
    found = runner(asked)["predictions"][0]["quantiles"]
    assert list(found) == ["0.9", "0.1", "0.30000000000000004", "0.010000000000000002"]
    assert all(high > low for high, low in zip(found["0.9"], found["0.1"], strict=True))


def test_windows_are_long_enough_for_the_seasonal_baseline(tmp_path):
    (tmp_path / "a.csv").write_text("\n".join(str(i % 7) for i in range(3000)))
    module = WideSeries(str(tmp_path / "a.csv"), START, **SIZES | {"frequency": "min"})
    module.setup()
    assert next(iter(module.test_dataloader())).values.shape[1] - 4 >= Frequency.parse("min").season == 1440


def test_a_windows_truth_covers_the_forecast_times():
    module = data(count=2, val_windows=1)
    module.setup()
    split = module.splits["test"]
    torch.testing.assert_close(split[torch.tensor([1])].truth[0], split.store.truth[796:800])


def test_counts_are_declared_as_whole_numbers_and_counts_and_beta_draws_as_discrete_outputs():
    for distribution, jumps, whole in (
        (StudentT(), (), False),
        (Gaussian(), (), False),
        (NegativeBinomial(), ("value",), True),
        (Beta(), ("value",), False),
    ):
        served = forecaster(distribution).deployable(window_of(torch.rand(2, 10)))
        assert served.graphs["step"].discrete == jumps
        assert served.metadata["whole_numbers"] is whole


def test_the_step_graph_declares_one_call_per_forecast_time():
    assert forecaster().deployable(window_of(torch.rand(2, 10))).graphs["step"].calls == 4


def judging(fn, *judged):
    """Return a forecaster that can judge windows without a trainer."""
    task = forecaster()
    task.trainer, task.log = SimpleNamespace(state=SimpleNamespace(fn=fn)), lambda *_, **__: None
    task.scores = nn.ModuleDict({name: SampleScores(4) for name in judged})
    return task


@torch.no_grad()
def test_baselines_are_given_only_values_before_the_forecast(monkeypatch):
    seen = []
    monkeypatch.setitem(BASELINES, "last_value", lambda *known: seen.append(known) or last_value(*known))
    window = window_of(torch.rand(2, 10))
    judging("test", OWN, *BASELINES).judge("test", window)
    ((values, *_),) = seen
    assert torch.equal(values, window.values[:, :-4])


@torch.no_grad()
def test_baseline_scores_ignore_missing_values():
    window, found = window_of(torch.rand(2, 10), [[True] * 8 + [False, True], [True] * 10]), []
    for missing in (0.0, 1e6):  # the fill value at the missing point must not matter
        values = window.values.clone()
        values[0, -2] = missing
        task = judging("test", OWN, *BASELINES)
        torch.manual_seed(0)
        task.judge("test", window._replace(values=values))
        found.append({name: task.scores[name].compute()["wql"].item() for name in BASELINES})
    assert found[0] == found[1]


@torch.no_grad()
def test_the_loss_of_a_split_is_the_mean_over_its_points():
    task = judging("fit", OWN)
    windows = [window_of(torch.rand(2, 10)), window_of(9 * torch.rand(1, 10), [[False] * 8 + [True] * 2])]
    means, counts = zip(*map(task.loss, windows), strict=True)
    for window in windows:
        task.judge("val", window)
    torch.testing.assert_close(task.mean_loss.compute(), sum(map(torch.mul, means, counts)) / sum(counts))


@torch.no_grad()
def test_scores_are_reset_between_evaluations():
    task, found = judging("fit", OWN), []
    one, other = window_of(torch.rand(2, 10)), window_of(9 * torch.rand(2, 10))
    for window in (one, other, one):
        task.judge("val", window)
        found.append(task.scored("val")["val/wql"])
    assert found[0] == found[2] != found[1]


def test_series_outside_the_distributions_support_are_refused(tmp_path):
    for name, value in (("train", 2), ("test", -3)):
        lines = [json.dumps({"start": START, "target": [1, 2, value] * 200})]
        (tmp_path / f"{name}.json").write_text("\n".join(lines) + "\n")
    sizes = {"frequency": "H", "prediction_length": 4, "context_length": 6, "batches": 2}
    counts = SageMakerSeries(str(tmp_path / "train.json"), str(tmp_path / "test.json"), **sizes)
    task = Forecaster(NegativeBinomial(), network=DeepAR(len(H.lags), 5, parameters=2, num_cells=4), optimizer=sgd)
    (tmp_path / "future.json").write_text(json.dumps({"start": START, "target": [1.5] * 20}) + "\n")
    known = SageMakerSeries(str(tmp_path / "train.json"), predict=str(tmp_path / "future.json"), **sizes)
    fit(tmp_path, task, known)  # series to predict are neither trained on nor scored, so they need no likelihood
    with pytest.raises(UserError, match=r"^test: target: values that NegativeBinomial assigns no likelihood to"):
        fit(tmp_path, task, counts)


def own_series(**changes):
    """Return three series of 200 hours, made without a reader."""
    start = np.datetime64("2024-01-01", "s")
    return to_series([Record(f"s{i}", start, np.arange(200, dtype=np.float32)) for i in range(3)])._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"offsets": np.array([0, 200, 400])},
            "train: offsets: int64 [3]; expected an array for 3 names, as in Series",
        ),
        ({"offsets": np.array([0, 200, 400, 500])}, "train: offsets: [0, 200, 400, 500]; expected them to rise from 0"),
        ({"offsets": np.array([0, 400, 200, 600])}, "train: offsets: [0, 400, 200, 600]; expected them to rise from 0"),
        ({"offsets": np.array([1, 200, 400, 600])}, "train: offsets: [1, 200, 400, 600]; expected them to rise from 0"),
        ({"dynamic": np.ones((600, 1))}, "train: dynamic_offsets: [0, 0, 0, 0]; expected them to rise from 0 to 600"),
        ({"target": [1.0] * 600}, "train: target: list; expected an array for 3 names"),
        ({"start": ["2024-01-01"] * 3}, "train: start: list; expected an array for 3 names"),
        ({"start": np.array(["NaT"] * 3, "datetime64[s]")}, "s0: start: no time; expected one"),
        ({"names": ["s0", "s1"]}, "train: offsets: int64 [4]; expected an array for 2 names"),
        ({"names": [0, 1, 2]}, "train: names [0, 1, 2]; expected texts"),
        ({"cat": np.arange(3)}, "train: cat: int64 [3]; expected an array for 3 names"),
        ({"cat": np.arange(3.0)[:, None]}, "train: cat: float64 [3, 1]; expected an array for 3 names"),
        ({"cat": np.arange(3)[:, None] - 1}, "s0: cat[0]: -1; expected 0 to 999999"),
        ({"cat": np.full((3, 1), 10**6)}, "s0: cat[0]: 1000000; expected 0 to 999999"),
        ({"static": np.ones((2, 1))}, "train: static: float64 [2, 1]; expected an array for 3 names"),
        ({"names": []}, "train: no series; expected some"),
    ],
)
def test_series_of_ones_own_whose_arrays_do_not_fit_together_are_refused(changes, message):
    class Own(ForecastingData):
        def read(self, frequency):
            return Channels(own_series(**changes), own_series(**changes))

    assert error_of(Own("1H", 6, 12).setup).startswith(message)


def test_a_series_of_ones_own_that_starts_at_a_weekend_is_refused_for_business_days():
    start = np.array(["2024-01-05", "2024-01-06", "2024-01-05"], "datetime64[s]")

    class Own(ForecastingData):
        def read(self, frequency):
            return Channels(*2 * [own_series(start=start)])

    message = "s1: start: 2024-01-06 00:00:00 is a weekend; expected a business day"
    assert error_of(Own("1B", 6, 12).setup) == message
    Own("1D", 6, 12).setup()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ((own_series(), own_series()), "the series read: tuple; expected Channels of train and test"),
        (Channels(own_series(), None), "test: NoneType; expected a Series"),
        (Channels(own_series(), own_series(), truth=np.ones((600, 3))), "truth: [600, 3]; expected [600, 9]"),
    ],
)
def test_channels_of_ones_own_of_another_kind_are_refused(found, message):
    class Own(ForecastingData):
        def read(self, frequency):
            return found

    assert error_of(Own("1H", 6, 12).setup).startswith(message)


def test_training_series_of_ones_own_to_forecast_need_dynamic_features_that_reach_beyond_their_ends():
    features = {"dynamic": np.ones((600, 1), np.float32), "dynamic_offsets": np.arange(4) * 200}

    class Own(ForecastingData):
        def read(self, frequency):
            return Channels(*3 * [own_series(**features)])

    message = "s0: dynamic_feat: 200 values; expected 206, as many as target and 6 more"
    assert error_of(Own("1H", 6, 12).setup) == message


def test_series_of_ones_own_without_categories_may_have_an_empty_array_of_any_type():
    class Own(ForecastingData):
        def read(self, frequency):
            return Channels(series := own_series(cat=np.empty((3, 0))), series)

    data = Own("1H", 6, 12)
    data.setup()
    assert data.cardinality == []
