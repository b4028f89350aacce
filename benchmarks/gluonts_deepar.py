"""Train GluonTS's DeepAR on a run's data and score it like the run: `python -m benchmarks.gluonts_deepar RUN --seed 0`.

GluonTS trains on the same series (everything before the test windows, as it does not validate), with the same context
length and with as many windows in as many steps as the run's config. Everything else is its default: two LSTM layers of
40 cells and a learning rate of 0.001. Its 100 sample paths are scored by the same code as the run's. Needs the extra
`bench`.
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import yaml
from lightning.pytorch import seed_everything

from benchmarks.rows import QUIET
from dlref.cli import load_run
from dlref.data.forecasting import ForecastingData
from dlref.runtime.calendar import Frequency
from dlref.tasks.forecast_scores import SampleScores


def pasts(data: ForecastingData) -> list[dict]:
    """Return the past of each test window in GluonTS's format."""
    import pandas as pd

    windows, horizon, frequency = data.splits["test"], data.prediction_length, Frequency.parse(data.frequency)
    store = windows.store
    unit = {"M": "M", "W": "W", "D": "D", "B": "B", "H": "h", "min": "min"}[frequency.unit]
    values = store.values.where(store.observed, torch.nan).numpy()
    items, ends = windows.ends(torch.arange(len(windows)))
    listed = []
    for item, end in zip(items.tolist(), ends.tolist(), strict=True):
        first = store.begin[item].item()
        entry = {
            "start": pd.Period(str(data.starts[item]), freq=f"{frequency.count}{unit}"),
            "target": values[first : first + end - horizon],
        }
        listed.append(entry | ({"feat_static_cat": store.categories[item].tolist()} if data.cardinality else {}))
    return listed


def before_test(data: ForecastingData, listed: list[dict]) -> list[dict]:
    """Return the part of each series before its first test window, chosen from the pasts of all windows."""
    windows = data.splits["test"]
    items = windows.ends(torch.arange(len(windows)))[0].tolist()
    return list(dict(zip(items[::-1], listed[::-1], strict=True)).values())


def scored(data: ForecastingData, paths: torch.Tensor) -> dict[str, float]:
    """Return the scores of sample paths (N, S, H) for the windows of the test split."""
    horizon, place = data.prediction_length, 0
    scores = SampleScores(horizon)
    for window in data.test_dataloader():
        count = len(window.values)
        target, observed = window.values[:, -horizon:], window.observed[:, -horizon:]
        scores.update(paths[place : place + count], target, observed, window.seasonal_error)
        place += count
    return {name: round(value.item(), 5) for name, value in scores.compute().items() if not value.ndim}


def main() -> None:
    """Train, forecast and print the scores."""
    parser = argparse.ArgumentParser("python -m benchmarks.gluonts_deepar", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of a forecasting config")
    parser.add_argument("--seed", type=int, default=0)
    options, overrides = parser.parse_known_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from gluonts.torch.model.deepar import DeepAREstimator

    _, data = load_run(options.run, overrides)
    data.setup()
    trainer = yaml.safe_load((options.run / "config.yaml").read_text())["trainer"]
    categories = {"num_feat_static_cat": len(data.cardinality), "cardinality": data.cardinality}
    past = pasts(data)
    seed_everything(options.seed, verbose=False)
    estimator = DeepAREstimator(
        freq=str(past[0]["start"].freqstr),
        prediction_length=data.prediction_length,
        context_length=data.context_length,
        batch_size=data.batch_size,
        num_batches_per_epoch=data.batches,
        trainer_kwargs={**QUIET, "max_epochs": trainer["max_epochs"], "default_root_dir": tempfile.mkdtemp()},
        **(categories if data.cardinality else {}),
    )
    start = time.perf_counter()
    predictor = estimator.train(before_test(data, past), cache_data=True)
    trained = time.perf_counter()
    forecasts = predictor.predict(past, num_samples=100)
    paths = torch.from_numpy(np.stack([forecast.samples for forecast in forecasts]))
    ended = time.perf_counter()
    print(
        f"{options.run.name}, seed {options.seed}: {scored(data, paths)}, trained in {trained - start:.0f} s, "
        f"{len(paths)} forecasts in {ended - trained:.1f} s"
    )


if __name__ == "__main__":
    main()
