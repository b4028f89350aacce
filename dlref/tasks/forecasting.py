"""Forecasting: a recurrent network predicts the parameters of the distribution of the next values of many series.

Legend of shapes: B windows, T time steps of context, H time steps to forecast, L lags, F features, G categories, S
sample paths, P parameters of the distribution, U uniform numbers of a draw, Y rows of the state, D cells, Q quantile
levels, N values of all series.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dlref.runtime import UserError
from dlref.runtime.calendar import Frequency
from dlref.runtime.runners.forecasting import LEVELS, SAMPLES, Past, Runner, prediction
from dlref.runtime.series import lag_indices
from dlref.tasks.deployable import Deployable, Graph
from dlref.tasks.distributions import Distribution
from dlref.tasks.forecast_scores import BASELINES, QuantileScores, SampleScores, quantiles_of
from dlref.tasks.losses import or_one
from dlref.tasks.task import PROBED, Task, increase, unlike
from dlref.training.devices import widest_float

SHOWN = 8  # series in the figure of forecasts
OWN = "this_model"  # name of the model's scores, next to those of the baselines
TRAINED = ("val/wql", "val/nd", "val/rmse", "val/crps")  # logged by validation during training
EXAMPLES = 2  # series of the example inputs


class Forecaster(Task):
    """Negative log-likelihood of the observed points (Salinas et al. 2017, equation 2, but including the context, as in
    GluonTS), and forecasts by sampling.

    The network returns parameters (B, T, P) and a state, like `DeepAR`. A batch is a window (values, observed,
    features, categories) of history, context and prediction; in training, the network reads context and prediction in
    one call.

    Args:
        distribution: distribution of the values, given the network's output.
        longest_lag: leave out lags of the frequency beyond this many steps, which short series rarely have.
        difference: forecast the change from each step to the next and add the changes up: for prices and similar
            series, whose last value is the most informative.
        task: arguments of every `Task`: network, optimizer, lr_scheduler, weights, freeze, ...
    """

    fact_names = (
        "frequency",
        "context_length",
        "prediction_length",
        "cardinality",
        "unseen",
        "category_names",
        "dynamic_features",
        "static_features",
    )
    row_facts: ClassVar = {"category_names": "embeddings"}
    metric = "wql"

    def __init__(self, distribution: Distribution, longest_lag: int | None = None, difference: bool = False, **task):
        super().__init__(**task)
        self.distribution, self.longest_lag, self.difference = distribution, longest_lag, difference
        self.register_buffer("typical_scale", torch.ones(()))  # of the training series

    def check(self) -> None:
        """Run windows through the network: one for other series, or that looks ahead, is refused before training."""
        cardinality = self.facts["cardinality"]
        features = len(self.frequency.cycles) + 1 + self.facts["static_features"] + self.facts["dynamic_features"]
        lags, parameters = len(self.lags), self.distribution.parameters
        if not lags:
            raise UserError(f"longest_lag: {self.longest_lag}; expected at least 1")
        expected = (
            f"expected model.init_args.network.init_args of lags: {lags}, features: {features}, "
            f"cardinality: {cardinality}, parameters: {parameters}"
        )
        numbers = torch.ones(PROBED, 3, max(lags, features), device=self.network_device)
        numbers[0, :2] = 0
        largest = torch.tensor([cardinality] * PROBED, device=self.network_device).reshape(PROBED, -1).long() - 1
        window = numbers[..., :lags], numbers[..., :features], largest, torch.ones_like(numbers[:, 0, 0])
        with self.probing("windows of this data", expected):
            answers = self.network(*window)
        state = state_in(answers)
        with self.probing("its own state", expected):
            answer, _ = self.network(*window, state)
        if answer.shape[-1] != parameters:
            raise UserError(f"network returns {answer.shape[-1]} parameters; {expected}")
        self.check_past(window, answers[0])

    def check_past(self, window: tuple[Tensor, ...], parameters: Float[Tensor, "B T P"]) -> None:
        """Run the first of the windows alone, its last time from a state. Raises UserError if its parameters differ."""
        first, last = (
            [part[:1, steps] if part.ndim == 3 else part[:1] for part in window] for steps in (slice(2), slice(2, None))
        )
        expected = "expected them to depend on the times before, in the window or the state, and on no other series"
        with self.probing("its own state of one series", expected):
            before, state = self.network(*first)
            after, _ = self.network(*last, state)
        if unlike(torch.cat([before, after], dim=1), parameters[:1]):
            raise UserError(f"network's parameters change with later times, other series or a state; {expected}")

    def setup(self, stage: str) -> None:
        """Check the series and create their scores, once they are known."""
        super().setup(stage)
        if stage == "fit":
            self.typical_scale.fill_(self.trainer.datamodule.splits["train"].typical(self.difference))
        if stage != "predict":
            checked = set()  # validation and test may use the series of training, or their own
            for name, split in self.trainer.datamodule.splits.items():
                if name != "predict" and split.store not in checked:
                    checked.add(split.store)
                    values, observed = split.store.outcomes(self.difference)
                    self.check_outcomes(name, values[observed])
        dtype = widest_float(self.trainer.strategy.root_device)
        self.scores = nn.ModuleDict({name: SampleScores(self.horizon, dtype) for name in (OWN, *BASELINES)})
        if any(split.store.truth is not None for split in self.trainer.datamodule.splits.values()):
            self.scores["oracle"] = QuantileScores(self.horizon, dtype)

    def check_outcomes(self, split: str, outcomes: Float[Tensor, "N"]) -> None:
        """Raise UserError if there is nothing to learn from or to evaluate on, or if a value has no likelihood."""
        if not len(outcomes):  # possible for changes only: of values there is always at least one
            raise UserError(f"{split}: target: no two consecutive values; expected some, or difference false")
        if not self.distribution.supports(outcomes):
            what, name = "changes" if self.difference else "values", type(self.distribution).__name__
            expected = self.distribution.support
            raise UserError(f"{split}: target: {what} that {name} assigns no likelihood to; expected {expected}")

    # Windows

    @property
    def context(self) -> int:
        """Number of time steps before a forecast that the network reads."""
        return self.facts["context_length"]

    @property
    def horizon(self) -> int:
        """Number of time steps of a forecast."""
        return self.facts["prediction_length"]

    @property
    def frequency(self) -> Frequency:
        """The time from one value to the next."""
        return Frequency.parse(self.facts["frequency"])

    @property
    def lags(self) -> list[int]:
        """Lags that the network reads, in steps."""
        return [lag for lag in self.frequency.lags if self.longest_lag is None or lag <= self.longest_lag]

    def modelled(self, window):
        """Return the window with the quantity to forecast: its values, or their changes."""
        if not self.difference:
            return window
        both = window.observed[:, 1:] & window.observed[:, :-1]
        return window._replace(values=window.values.diff().where(both, 0), observed=both)

    def forward(self, window) -> tuple[Tensor, ...]:
        """Return the parameters (B, T + H), in their domains, of a modelled window's context and prediction."""
        context, times = self.context, self.context + self.horizon
        values, observed = window.values[:, -times:], window.observed[:, -times:]
        scale = scale_of(values[:, :context], observed[:, :context], self.typical_scale)[:, None]
        history = window.values[:, -times - max(self.lags) :] / scale
        device, places = history.device, torch.from_numpy(lag_indices(self.lags, times))
        places = places.to(device, non_blocking=device.type != "mps")  # as in `dlref.data.loader.sent`
        # The same as history[:, places], which takes six times as long on a CPU.
        lagged = history.index_select(1, places.flatten()).unflatten(1, places.shape)
        raw, _ = self.network(lagged, window.features, window.categories, scale[:, 0])
        return self.distribution.domain(raw.float(), scale.expand(-1, times))

    def loss(self, window) -> tuple[Tensor, Tensor]:
        """Return the mean negative log-likelihood of the observed points of context and prediction, and their number.

        It is 0 if nothing is observed.
        """
        window = self.modelled(window)
        parameters = self(window)
        times = parameters[0].shape[1]
        values, observed = window.values[:, -times:], window.observed[:, -times:]
        likelihood = self.distribution.log_prob(values, parameters).where(observed, 0)
        count = observed.sum()
        return -likelihood.sum() / or_one(count), count

    def past(self, window) -> Past:
        """Return the inputs of a runner for these windows, without the values to forecast."""
        context, horizon = self.context, self.horizon
        last, window = window.values[:, -horizon - 1].float(), self.modelled(window)
        values = window.values[:, :-horizon][:, -max(self.lags) - context :].float()
        observed = window.observed[:, :-horizon][:, -context:]
        parts = values, observed, window.features.float(), window.categories, last
        return Past(*(part.cpu().numpy() for part in parts))

    def paths(self, window) -> Float[Tensor, "B S H"]:
        """Draw sample paths with the runner that a device uses."""
        return torch.from_numpy(self.deployable(window).runner().paths(self.past(window))).to(self.device)

    # Lightning's steps

    def training_step(self, batch, batch_index: int) -> Tensor:
        """Return the negative log-likelihood."""
        return self.log_train_loss(*self.loss(batch))

    def validation_step(self, batch, batch_index: int) -> None:
        """Update the scores."""
        self.judge("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores; during training, only some of the model's own."""
        values = self.scored("val")
        if self.trainer.state.fn == "fit":
            for name in TRAINED:
                self.log(name, values[name], prog_bar=name in TRAINED[:2])
        else:
            self.log_dict(finite(values))

    def on_test_start(self) -> None:
        """Clear the forecasts kept for the figure."""
        self.forecasts: list[tuple[Tensor, Tensor, Tensor]] = []

    def test_step(self, batch, batch_index: int) -> None:
        """Update the scores, and keep some forecasts from all over the split for the figure."""
        paths, (target, observed) = self.judge("test", batch), self.outcome(batch)
        horizon, shown = self.horizon, self.context + self.horizon
        for row in self.shown(batch_index, len(target), SHOWN):
            past = batch.values[row, -shown:-horizon].where(batch.observed[row, -shown:-horizon], torch.nan)
            after = target[row].where(observed[row], torch.nan)
            self.forecasts.append(tuple(part.cpu() for part in (past, after, paths[row])))

    def on_test_epoch_end(self) -> None:
        """Log the scores; the rest is only for the figures."""
        self.log_dict(finite(self.scored("test")))

    def judge(self, stage: str, batch) -> Float[Tensor, "B S H"]:
        """Add a batch to the loss and to the scores of the model and the baselines; return the sample paths."""
        self.log_eval_loss(stage, *self.loss(batch))
        paths, (target, observed) = self.paths(batch), self.outcome(batch)
        self.scores[OWN].update(paths, target, observed, batch.seasonal_error)
        horizon, season = self.horizon, self.frequency.season
        for name in self.judged[1:]:
            if name in BASELINES:
                forecast = BASELINES[name](batch.values[:, :-horizon], batch.known, horizon, season)
                self.scores[name].update(forecast[:, None], target, observed, batch.seasonal_error)
            elif batch.truth is not None:
                self.scores[name].update(batch.truth, target, observed)
        return paths

    @property
    def judged(self) -> list[str]:
        """Names of the forecasts that are scored: during training only the model's, as the others do not change."""
        return [OWN] if self.trainer.state.fn == "fit" else list(self.scores)

    def scored(self, stage: str) -> dict[str, Tensor]:
        """Return the scores by their names in the log and reset them; keep the rest for the figures."""
        found, self.by_time = {}, {}
        for name in self.judged:
            scores = self.scores[name]
            values = scores.compute()  # even without points here: other devices may have some, and wait for this one
            scores.reset()
            coverage = values.pop("coverage")
            # torchmetrics returns a scalar for a single time ahead.
            self.by_time[name.replace("_", " ")] = values.pop("by_time").cpu().reshape(self.horizon)
            values |= {f"coverage_{level}": share for level, share in zip(LEVELS, coverage, strict=True)}
            before = "" if name == OWN else f"{name}_"
            found |= {f"{stage}/{before}{key}": value.float() for key, value in values.items()}
            if name == OWN:
                self.calibration = coverage.cpu()
        return found

    def predict_step(self, batch, batch_index: int) -> list[dict]:
        """Return predictions as the bundle's runner does."""
        return [prediction(paths) for paths in self.paths(batch).cpu().numpy()]

    def outcome(self, window) -> tuple[Float[Tensor, "B H"], Bool[Tensor, "B H"]]:
        """Return the actual values of the prediction, and which of them are observed."""
        return window.values[:, -self.horizon :], window.observed[:, -self.horizon :]

    # The contract with the export step

    def deployable(self, batch) -> Deployable:
        """Return the graphs: `encode` reads the context; `step` draws the next value of all paths from given noise."""
        past = Past(*(torch.from_numpy(part[:EXAMPLES]) for part in self.past(batch)))
        encode = self.encode_graph(past)
        metadata = {
            **{name: self.facts[name] for name in self.fact_names},
            "lags": self.lags,
            "uniforms": self.distribution.uniforms,
            "differenced": self.difference,
            "whole_numbers": self.distribution.whole_numbers,
        }
        return Deployable("forecasting", {"encode": encode, "step": self.step_graph(past, encode)}, metadata)

    def encode_graph(self, past: Past) -> Graph:
        """Return the graph from the context of each series to its scale and the network's state."""
        context = self.context
        inputs = {
            "target": past.values[:, -context:],
            "observed": past.observed,
            "lagged": past.values[:, lag_indices(self.lags, context)],
            "features": past.features[:, :context],
            "categories": past.categories,
        }
        axes = {name: {0: "batch", 1: "context"} for name in inputs} | {"categories": {0: "batch"}}
        sizes = {"batch": (1, 2, 7), "context": (context, context + 5, max(1, context // 2))}
        encode = _Encode(self.network, self.typical_scale)
        return Graph(encode, inputs, ["scale", "state"], axes, sizes, unbounded=("lagged", "features"))

    def step_graph(self, past: Past, encode: Graph) -> Graph:
        """Return the graph from earlier values of each path and noise to its next value and state."""
        encoded = encode(**{name: tensor.numpy() for name, tensor in encode.inputs.items()})
        scale, state = torch.from_numpy(encoded["scale"]), torch.from_numpy(encoded["state"])
        last = encode.inputs["lagged"][:, -1:] / scale[:, None, None]
        seeded, paths = torch.Generator().manual_seed(0), {0: "batch", 1: "sample"}
        inputs = {
            "lagged": last.repeat(1, SAMPLES, 1),
            "features": past.features[:, self.context],
            "categories": past.categories,
            "scale": scale,
            "state": state[:, :, None].repeat(1, 1, SAMPLES, 1),
            "noise": torch.rand(len(scale), SAMPLES, self.distribution.uniforms, generator=seeded),
        }
        return Graph(
            _Step(self.network, self.distribution),
            inputs,
            ["value", "next_state"],
            {name: {0: "batch"} for name in inputs}
            | {"state": {1: "batch", 2: "sample"}, "lagged": paths, "noise": paths},
            {"batch": (1, 2, 7), "sample": (SAMPLES, 1, 33)},
            calls=self.horizon,
            tolerance=1e-4,  # values are divided by the scale, and rare ones are large
            discrete=() if self.distribution.smooth else ("value",),
            unbounded=("lagged", "features"),
        )

    def evaluate(self, runner: Runner, batches: Iterable) -> float:
        """Return the weighted quantile loss of a runner's paths over `batches`."""
        scores = QuantileScores(self.horizon)
        for window in batches:
            paths = torch.from_numpy(runner.paths(self.past(window)))
            scores.update(quantiles_of(paths), *self.outcome(window))
        return scores.compute()[self.metric].item()

    def degradation(self, reference: float, score: float) -> float:
        """Return the increase in percent, as the metric has no bound."""
        return increase(reference, score)

    def draw(self, folder: Path) -> None:
        """Draw forecasts over history, nominal against observed coverage, and the loss by time ahead."""
        from dlref.tasks import figures  # matplotlib is slow to import, and only needed here

        figures.forecasts(folder / "forecasts.png", self.forecasts)
        figures.calibration(folder / "calibration.png", LEVELS, self.calibration)
        figures.by_time(folder / "by_time.png", self.by_time)


def state_in(answers: object) -> Tensor:
    """Return the state (Y, B, D) in a network's output for `PROBED` windows of three steps. Raises UserError."""
    parts = answers if isinstance(answers, tuple) else (answers,)
    good = len(parts) == 2 and all(isinstance(part, Tensor) and part.ndim == 3 for part in parts)
    if not good or parts[0].shape[:2] != (PROBED, 3) or parts[1].shape[1] != PROBED:
        found = ", ".join(str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
        wanted = f"parameters (B, T, P) and a state (Y, B, D) for B = {PROBED}, T = 3"
        raise UserError(f"network returns {found}; expected {wanted}")
    return parts[1]


class _Encode(nn.Module):
    """The graph that reads the context, from which sampling starts."""

    def __init__(self, network: nn.Module, typical_scale: Float[Tensor, ""]):
        super().__init__()
        self.network = network
        self.register_buffer("typical_scale", typical_scale)

    def forward(
        self,
        target: Float[Tensor, "B T"],
        observed: Bool[Tensor, "B T"],
        lagged: Float[Tensor, "B T L"],
        features: Float[Tensor, "B T F"],
        categories: Int[Tensor, "B G"],
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "Y B D"]]:
        scale = scale_of(target, observed, self.typical_scale)
        _, state = self.network(lagged / scale[:, None, None], features, categories, scale)
        return scale, state.float()


class _Step(nn.Module):
    """The graph that draws the next value of each path, given earlier ones; values are divided by the scale."""

    def __init__(self, network: nn.Module, distribution: Distribution):
        super().__init__()
        self.network, self.distribution = network, distribution

    def forward(
        self,
        lagged: Float[Tensor, "B S L"],
        features: Float[Tensor, "B F"],
        categories: Int[Tensor, "B G"],
        scale: Float[Tensor, "B"],
        state: Float[Tensor, "Y B S D"],
        noise: Float[Tensor, "B S U"],
    ) -> tuple[Float[Tensor, "B S"], Float[Tensor, "Y B S D"]]:
        batch, samples = lagged.shape[:2]

        def rows(known: Tensor) -> Tensor:
            """Repeat the rows of each series for each of its paths."""
            return known[:, None].expand(batch, samples, *known.shape[1:]).flatten(0, 1)

        scales = scale[:, None].expand(batch, samples)
        lagged, features, state = lagged.flatten(0, 1)[:, None], rows(features)[:, None], state.flatten(1, 2)
        raw, after = self.network(lagged, features, rows(categories), scales.flatten(), state)
        parameters = self.distribution.domain(raw[:, 0].float().unflatten(0, (batch, samples)), scales)
        value = self.distribution.sample(parameters, noise) / scales
        return value, after.float().unflatten(1, (batch, samples))


def finite(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep finite values only: if all targets are 0, losses weighted by their size are undefined."""
    return {name: value for name, value in values.items() if value.isfinite()}


def scale_of(
    target: Float[Tensor, "B T"], observed: Bool[Tensor, "B T"], typical: Float[Tensor, ""]
) -> Float[Tensor, "B"]:
    """Return the mean absolute value of the observed context, or of the last value if there is none.

    If that is 0, it is `typical`, which has the unit of the values, as 1 would not. This is GluonTS's scale except in
    the last two cases: there it has the batch's mean scale if nothing is observed, and 1e-10 instead of 0. The paper's
    is 1 + the mean (section 3.3), which can be 0 if values are negative.
    """
    mean = target.abs().where(observed, 0).sum(1) / observed.sum(1).clamp(min=1)
    mean = mean.where(observed.any(1), target[:, -1].abs())  # missing values repeat the last one
    return mean.where(mean > 0, typical)
