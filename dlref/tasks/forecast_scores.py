"""Scores of probabilistic forecasts, summed over batches and devices, and the baselines they are compared with.

B windows, T time steps of context, S sample paths, H time steps to forecast, Q quantile levels.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from dlref.runtime.runners.forecasting import LEVELS

INTERVAL = 0.05  # share of the values that may lie outside the interval of MSIS


class QuantileScores(Metric):
    """Quantile loss, weighted by the values' size, and coverage, by level and time ahead.

    Args:
        horizon: H.
        dtype: dtype of the sums.
    """

    full_state_update = False

    def __init__(self, horizon: int, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.register_buffer("levels", torch.tensor(LEVELS, dtype=dtype), persistent=False)
        for name in ("pinball", "covered"):
            self.add_state(name, torch.zeros(horizon, len(LEVELS), dtype=dtype), dist_reduce_fx="sum")
        for name in ("size", "points"):
            self.add_state(name, torch.zeros(horizon, dtype=dtype), dist_reduce_fx="sum")

    def update(
        self, quantiles: Float[Tensor, "B H Q"], target: Float[Tensor, "B H"], observed: Bool[Tensor, "B H"]
    ) -> None:
        """Add the observed points."""
        above = (target[..., None] - quantiles).to(self.levels)
        loss = torch.maximum(self.levels * above, (self.levels - 1) * above)
        self.pinball += loss.where(observed[..., None], 0).sum(0)
        self.covered += ((above <= 0) & observed[..., None]).sum(0)
        self.size += target.to(self.levels).abs().where(observed, 0).sum(0)
        self.points += observed.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Return `wql`, the mean over the levels of twice the loss over the sum of |values|, and other scores.

        `nd` is that of the median alone, `coverage` (Q,) the share of values at or below each quantile, and `by_time`
        (H,) the `wql` of each time ahead.
        """
        by_level = 2 * self.pinball.sum(0) / self.size.sum()
        return {
            "wql": by_level.mean(),
            "nd": by_level[len(LEVELS) // 2],
            "coverage": self.covered.sum(0) / self.points.sum(),
            "by_time": 2 * self.pinball.mean(1) / self.size,
        }


class SampleScores(QuantileScores):
    """Scores of sample paths: those of their quantiles, root mean squared error of the mean, MSIS and CRPS."""

    def __init__(self, horizon: int, dtype: torch.dtype = torch.float64):
        super().__init__(horizon, dtype)
        for name in ("squared", "crps", "msis", "windows"):
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(
        self,
        paths: Float[Tensor, "B S H"],
        target: Float[Tensor, "B H"],
        observed: Bool[Tensor, "B H"],
        seasonal_error: Float[Tensor, "B"],
    ) -> None:
        """Add the observed points. A window without a seasonal error, or without points, has no MSIS."""
        super().update(quantiles_of(paths), target, observed)
        paths, values = paths.to(self.levels), target.to(self.levels)
        self.squared += (paths.mean(1) - values).square().where(observed, 0).sum()
        self.crps += crps(paths, values).where(observed, 0).sum()
        low, high = torch.quantile(paths, torch.tensor([INTERVAL / 2, 1 - INTERVAL / 2]).to(paths), dim=1)
        outside = (low - values).clamp(min=0) + (values - high).clamp(min=0)
        points = observed.sum(1)
        score = (high - low + 2 / INTERVAL * outside).where(observed, 0).sum(1) / points / seasonal_error
        judged = (points > 0) & (seasonal_error > 0)
        self.msis += score.where(judged, 0).sum()
        self.windows += judged.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the quantile scores, `rmse` in the units of the series, `crps` over the sum of |values|, and `msis`.

        `msis` is as in M4, except that for daily and weekly series M4 uses a season of 1, but `Frequency.season` is 7
        and 52.
        """
        return {
            **super().compute(),
            "rmse": (self.squared / self.points.sum()).sqrt(),
            "crps": self.crps / self.size.sum(),
            "msis": self.msis / self.windows,
        }


def quantiles_of(paths: Float[Tensor, "B S H"]) -> Float[Tensor, "B H Q"]:
    """Return the quantiles at LEVELS, interpolated linearly between samples as in NumPy."""
    return torch.quantile(paths, torch.tensor(LEVELS).to(paths), dim=1).permute(1, 2, 0)


def crps(paths: Float[Tensor, "B S H"], target: Float[Tensor, "B H"]) -> Float[Tensor, "B H"]:
    """Return E|X - y| - E|X - X'| / 2 over the samples (T. Gneiting and A. E. Raftery, 2007, equation 21)."""
    samples = paths.shape[1]
    rank = 2 * torch.arange(1, samples + 1, device=paths.device) - samples - 1
    spread = (rank[:, None] * paths.sort(dim=1).values).sum(1) / samples**2
    return (paths - target[:, None]).abs().mean(1) - spread


def seasonal_naive(
    values: Float[Tensor, "B T"], known: Int[Tensor, "B"], horizon: int, season: int
) -> Float[Tensor, "B H"]:
    """Repeat the last known season; where the series is shorter than a season, use the last value.

    Args:
        values: the values before the forecast; a missing one is the last before it.
        known: number of times from the first observed value of the series to the forecast.
        horizon: H.
        season: number of times in a season.
    """
    begun = torch.arange(-values.shape[1], 0, device=values.device) >= -known[:, None]
    last = values.where(begun, values[:, -1:])[:, -season:]
    return last[:, torch.arange(horizon, device=values.device) % season]


def last_value(
    values: Float[Tensor, "B T"], known: Int[Tensor, "B"], horizon: int, season: int
) -> Float[Tensor, "B H"]:
    """Repeat the last known value."""
    return values[:, -1:].expand(-1, horizon)


BASELINES = {"seasonal_naive": seasonal_naive, "last_value": last_value}
