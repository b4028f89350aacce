"""Forecasting: the distribution of what comes next in many series, by a recurrent network that answers its parameters.

Legend of shapes: B windows, T times of context, H times to forecast, L lags, F features, G categories, S sample paths,
P parameters of the distribution, U uniform numbers of a draw, Y rows of the state, D cells, Q quantile levels,
N values of all series.
"""

import math
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
from dlref.tasks.task import Task
from dlref.training.devices import widest_float

SHOWN = 8  # series in the figure of forecasts
OWN = "this_model"  # the name of its scores, beside those of the baselines
TRAINED = ("val/wql", "val/nd", "val/rmse", "val/crps")  # what validation logs while a network trains
EXAMPLES = 2  # series of the example inputs


class Forecaster(Task):
    """Negative log-likelihood of the observed points (Salinas et al. 2017, equation 2, but of the context, too, as
    GluonTS has it), and forecasts by sampling.

    The network answers parameters (B, T, P) and a state, as `DeepAR` does. A batch is a window (values, observed,
    features, categories) of history, context and prediction; in training the network sees context and prediction in one
    call.

    Args:
        distribution: of the values, given the network's answer.
        longest_lag: leave out the frequency's lags beyond so many steps, which short series rarely have.
        difference: forecast the change from each time to the next, and add them up: for prices and the like, of which
            the last value says more than any other.
        task: what every `Task` takes: network, optimizer, lr_scheduler, weights, freeze, ...
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

    def check(self) -> None:
        """One window of zeros through the network, so that one made for other series is refused before it trains."""
        cardinality = self.facts["cardinality"]
        features = len(self.frequency.cycles) + 1 + self.facts["static_features"] + self.facts["dynamic_features"]
        lags, parameters = len(self.lags), self.distribution.parameters
        if not lags:
            raise UserError(f"longest_lag: {self.longest_lag}; expected at least 1")
        expected = (
            f"expected model.init_args.network.init_args of lags: {lags}, features: {features}, "
            f"cardinality: {cardinality}, parameters: {parameters}"
        )
        zeros = torch.zeros(1, 1, max(lags, features), device=self.network_device)
        largest = torch.tensor([cardinality], device=self.network_device).reshape(1, -1).long() - 1
        window = zeros[..., :lags], zeros[..., :features], largest, zeros[0, 0, :1] + 1
        with self.probing("a window of this data", expected):
            answers = self.network(*window)
        state = state_in(answers)
        with self.probing("its own state", expected):
            answer, _ = self.network(*window, state)
        if answer.shape[-1] != parameters:
            raise UserError(f"network answers {answer.shape[-1]} parameters; {expected}")

    def setup(self, stage: str) -> None:
        """Once the series are known, what counts over them."""
        super().setup(stage)
        if stage != "predict":
            checked = set()  # validation and testing may be of training's series, or of their own
            for name, split in self.trainer.datamodule.splits.items():
                if name != "predict" and split.store not in checked:
                    checked.add(split.store)
                    self.check_outcomes(name, split.store.outcomes(self.difference))
        dtype = widest_float(self.trainer.strategy.root_device)
        self.scores = nn.ModuleDict({name: SampleScores(self.horizon, dtype) for name in (OWN, *BASELINES)})
        if any(split.store.truth is not None for split in self.trainer.datamodule.splits.values()):
            self.scores["oracle"] = QuantileScores(self.horizon, dtype)

    def check_outcomes(self, split: str, outcomes: Float[Tensor, "N"]) -> None:
        """Raise UserError where there is nothing to learn from or to judge by, or what has no likelihood."""
        if not len(outcomes):  # of values there are always some
            raise UserError(
                f"{split}: target: no two values that follow each other; expected some, or difference false"
            )
        if not self.distribution.supports(outcomes):
            what, name = "changes" if self.difference else "values", type(self.distribution).__name__
            expected = self.distribution.support
            raise UserError(f"{split}: target: {what} that {name} gives no likelihood; expected {expected}")

    # Windows

    @property
    def context(self) -> int:
        """Times before a forecast that the network reads."""
        return self.facts["context_length"]

    @property
    def horizon(self) -> int:
        """Times of a forecast."""
        return self.facts["prediction_length"]

    @property
    def frequency(self) -> Frequency:
        """The time from one value to the next."""
        return Frequency.parse(self.facts["frequency"])

    @property
    def lags(self) -> list[int]:
        """Steps back that the network sees."""
        return [lag for lag in self.frequency.lags if self.longest_lag is None or lag <= self.longest_lag]

    def modelled(self, window):
        """A window with what is forecast: its values as they are, or their changes."""
        if not self.difference:
            return window
        both = window.observed[:, 1:] & window.observed[:, :-1]
        return window._replace(values=window.values.diff().where(both, 0), observed=both)

    def forward(self, window) -> tuple[Tensor, ...]:
        """A modelled window -> the parameters (B, T + H) of each time of context and prediction, in their domains."""
        context, times = self.context, self.context + self.horizon
        values, observed = window.values[:, -times:], window.observed[:, -times:]
        scale = scale_of(values[:, :context], observed[:, :context])[:, None]
        history = window.values[:, -times - max(self.lags) :] / scale
        places = torch.from_numpy(lag_indices(self.lags, times)).to(history.device, non_blocking=True)
        # history[:, places], which takes six times as long on a processor
        lagged = history.index_select(1, places.flatten()).unflatten(1, places.shape)
        raw, _ = self.network(lagged, window.features, window.categories, scale[:, 0])
        return self.distribution.domain(raw.float(), scale.expand(-1, times))

    def nll(self, window) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of all observed points of context and prediction, and their number, at least 1."""
        window = self.modelled(window)
        parameters = self(window)
        times = parameters[0].shape[1]
        values, observed = window.values[:, -times:], window.observed[:, -times:]
        likelihood = self.distribution.log_prob(values, parameters).where(observed, 0)
        return -likelihood.sum(), observed.sum().clamp(min=1)

    def loss(self, window) -> Tensor:
        """Negative log-likelihood of an observed point, on average over context and prediction."""
        total, count = self.nll(window)
        return total / count

    def past(self, window) -> Past:
        """What a runner knows of windows: no value that it is to forecast."""
        context, horizon = self.context, self.horizon
        last, window = window.values[:, -horizon - 1].float(), self.modelled(window)
        values = window.values[:, :-horizon][:, -max(self.lags) - context :].float()
        observed = window.observed[:, :-horizon][:, -context:]
        parts = values, observed, window.features.float(), window.categories, last
        return Past(*(part.cpu().numpy() for part in parts))

    def paths(self, window) -> Float[Tensor, "B S H"]:
        """Sample paths, drawn by the runner that a device uses."""
        return torch.from_numpy(self.deployable(window).runner().paths(self.past(window))).to(self.device)

    # Lightning's steps

    def training_step(self, batch, batch_index: int) -> Tensor:
        """Negative log-likelihood."""
        total, count = self.nll(batch)
        return self.log_train_loss(total / count, count)

    def validation_step(self, batch, batch_index: int) -> None:
        """Every score, beside the baselines."""
        self.judge("val", batch)

    def on_validation_epoch_end(self) -> None:
        """While a network trains, some of its own."""
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
        """Every score, beside the baselines; some forecasts from all over the split for the figure."""
        paths, (target, observed) = self.judge("test", batch), self.outcome(batch)
        horizon, shown = self.horizon, self.context + self.horizon
        for row in self.shown(batch_index, len(target), SHOWN):
            past = batch.values[row, -shown:-horizon].where(batch.observed[row, -shown:-horizon], torch.nan)
            after = target[row].where(observed[row], torch.nan)
            self.forecasts.append(tuple(part.cpu() for part in (past, after, paths[row])))

    def on_test_epoch_end(self) -> None:
        """Numbers go to the log; the rest is for the figures alone."""
        self.log_dict(finite(self.scored("test")))

    def judge(self, stage: str, batch) -> Float[Tensor, "B S H"]:
        """Count the loss, the forecasts and the baselines of a batch; answer the sample paths."""
        total, count = self.nll(batch)
        self.log_eval_loss(stage, total / count, count)
        paths, (target, observed) = self.paths(batch), self.outcome(batch)
        self.scores[OWN].update(paths, target, observed, batch.seasonal_error)
        horizon, season = self.horizon, self.frequency.season
        for name in self.judged[1:]:
            if name in BASELINES:
                forecast = BASELINES[name](batch.values[:, :-horizon], batch.observed[:, :-horizon], horizon, season)
                self.scores[name].update(forecast[:, None], target, observed, batch.seasonal_error)
            elif batch.truth is not None:
                self.scores[name].update(batch.truth, target, observed)
        return paths

    @property
    def judged(self) -> list[str]:
        """Whose scores count; while a network trains its own alone, for the others stay what they are."""
        return [OWN] if self.trainer.state.fn == "fit" else list(self.scores)

    def scored(self, stage: str) -> dict[str, Tensor]:
        """What was counted, by the names of the log, and from the start again; the rest is kept for the figures."""
        found, self.by_time = {}, {}
        for name in self.judged:
            scores = self.scores[name]
            values = scores.compute()  # even of no points here: other devices may have some, and wait for this one
            scores.reset()
            coverage = values.pop("coverage")
            # torchmetrics makes a number of one time ahead.
            self.by_time[name.replace("_", " ")] = values.pop("by_time").cpu().reshape(self.horizon)
            values |= {f"coverage_{level}": share for level, share in zip(LEVELS, coverage, strict=True)}
            before = "" if name == OWN else f"{name}_"
            found |= {f"{stage}/{before}{key}": value.float() for key, value in values.items()}
            if name == OWN:
                self.calibration = coverage.cpu()
        return found

    def predict_step(self, batch, batch_index: int) -> list[dict]:
        """The answers that the bundle's runner gives."""
        return [prediction(paths) for paths in self.paths(batch).cpu().numpy()]

    def outcome(self, window) -> tuple[Float[Tensor, "B H"], Bool[Tensor, "B H"]]:
        """What came, and which of it is observed."""
        return window.values[:, -self.horizon :], window.observed[:, -self.horizon :]

    # The contract with the export step

    def deployable(self, batch) -> Deployable:
        """`encode` reads the context; `step` draws one time of all paths, from noise that it is given."""
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
        """The context of each series -> its scale, and the network's state after it."""
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
        return Graph(_Encode(self.network), inputs, ["scale", "state"], axes, sizes, unbounded=("lagged", "features"))

    def step_graph(self, past: Past, encode: Graph) -> Graph:
        """What each path was before, and noise -> its next value, and the state after it."""
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
            tolerance=1e-4,  # of values in scales of the series, whose rare ones lie far out
            discrete=() if self.distribution.smooth else ("value",),
            unbounded=("lagged", "features"),
        )

    def evaluate(self, runner: Runner, batches: Iterable) -> float:
        """Weighted quantile loss of a runner's paths over `batches`."""
        scores = QuantileScores(self.horizon)
        for window in batches:
            paths = torch.from_numpy(runner.paths(self.past(window)))
            scores.update(quantiles_of(paths), *self.outcome(window))
        return scores.compute()[self.metric].item()

    def degradation(self, reference: float, score: float) -> float:
        """Hundredths of the reference, for the metric has no bound; of one that is 0 anything is too much."""
        if not reference:
            return math.inf if score else 0.0
        return 100 * (score / reference - 1)

    def draw(self, folder: Path) -> None:
        """Forecasts over history, nominal against observed coverage, and the loss by time ahead."""
        from dlref.tasks import figures  # matplotlib takes its time, and only this needs it

        figures.forecasts(folder / "forecasts.png", self.forecasts)
        figures.calibration(folder / "calibration.png", LEVELS, self.calibration)
        figures.by_time(folder / "by_time.png", self.by_time)


def state_in(answers: object) -> Tensor:
    """The state (Y, 1, D) of what a network answers to one window. Raises UserError where there is none."""
    parts = answers if isinstance(answers, tuple) else (answers,)
    good = len(parts) == 2 and all(isinstance(part, Tensor) and part.ndim == 3 for part in parts)
    if not good or parts[1].shape[1] != 1:
        found = ", ".join(str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
        raise UserError(f"network answers {found}; expected parameters (B, T, P) and a state (Y, B, D), with B = 1")
    return parts[1]


class _Encode(nn.Module):
    """The graph that reads the context: what sampling starts from."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(
        self,
        target: Float[Tensor, "B T"],
        observed: Bool[Tensor, "B T"],
        lagged: Float[Tensor, "B T L"],
        features: Float[Tensor, "B T F"],
        categories: Int[Tensor, "B G"],
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "Y B D"]]:
        scale = scale_of(target, observed)
        _, state = self.network(lagged / scale[:, None, None], features, categories, scale)
        return scale, state.float()


class _Step(nn.Module):
    """The graph that draws a value of each path, given those before it; values are divided by the scale."""

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
            """Of each series -> of each of its paths."""
            return known[:, None].expand(batch, samples, *known.shape[1:]).flatten(0, 1)

        scales = scale[:, None].expand(batch, samples)
        lagged, features, state = lagged.flatten(0, 1)[:, None], rows(features)[:, None], state.flatten(1, 2)
        raw, after = self.network(lagged, features, rows(categories), scales.flatten(), state)
        parameters = self.distribution.domain(raw[:, 0].float().unflatten(0, (batch, samples)), scales)
        value = self.distribution.sample(parameters, noise) / scales
        return value, after.float().unflatten(1, (batch, samples))


def finite(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Only finite values: where all targets are 0, losses weighted by their size are undefined."""
    return {name: value for name, value in values.items() if value.isfinite()}


def scale_of(target: Float[Tensor, "B T"], observed: Bool[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """Mean absolute value of what is observed of the context; of nothing, the last value before it; 1 where that is 0.

    GluonTS's scale; the paper's is 1 + the mean (section 3.3), which negative values can bring to 0.
    """
    mean = target.abs().where(observed, 0).sum(1) / observed.sum(1).clamp(min=1)
    mean = mean.where(observed.any(1), target[:, -1].abs())  # to which missing values are carried
    return mean.where(mean > 0, 1)
