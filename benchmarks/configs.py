"""The configs as users run them: `train.py fit` with start-up, training, validation, test and figures.

Each config runs with two seeds, each run in a process of its own. The score is the metric by which the config chooses
its best checkpoint, on the test split. Configs that need data read it from the folder that DLREF_DATA names, laid out
as the header of the config describes.
"""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import yaml

from benchmarks.rows import NotHere, Row, Rows, data_file, run, watched

ROOT = Path(__file__).parents[1]
CONFIGS, RUNS = ROOT / "configs", ROOT / "runs" / "benchmarks"
SEEDS = (0, 1)
ON_A_CPU = (  # at most an hour on two cores; the others need a GPU
    "deepar_ett_hourly",
    "deepar_exchange_rate",
    "deepar_gru_m4_hourly",
    "deepar_m4_hourly",
    "deepar_synthetic",
    "fcn_digit_scenes",
    "gpt_python",
    "gpt_shakespeare_char_cpu",
    "lenet5_digits",
    "lenet5_fashion_mnist",
    "lenet5_mnist",
    "seq2seq_dates",
    "seq2seq_gru_multi30k_de_en",
    "seq2seq_multi30k_de_en",
    "seq2seq_multi30k_en_de",
    "ssd_digit_scenes",
)


def read(config: str) -> dict:
    """Load a config."""
    return yaml.safe_load((CONFIGS / f"{config}.yaml").read_text(encoding="utf-8"))


def roots(config: str) -> list[str]:
    """Return the arguments of `train.py` that say where a config's data is. Raises NotHere if the data is missing."""
    arguments, text = [], read(config)
    given = {
        (part, name): value for part in ("data", "model") for name, value in text[part].get("init_args", {}).items()
    }
    for (part, name), value in given.items():
        paths = value if isinstance(value, list) else [value]
        if not all(isinstance(path, str) and path.startswith("data/") for path in paths):
            continue
        moved = [str(data_file(path.removeprefix("data/"))) for path in paths]
        arguments += [f"--{part}.init_args.{name}", json.dumps(moved) if isinstance(value, list) else moved[0]]
    return arguments


def fit(config: str, seed: int) -> tuple[float, float]:
    """Return the seconds that the command takes, and its final score."""
    folder = RUNS / f"{config}-{seed}"
    command = [sys.executable, "train.py", "fit", "--config", f"configs/{config}.yaml", "--run", str(folder)]
    options = ["--overwrite", "--seed_everything", str(seed), "--trainer.enable_progress_bar", "false"]
    start = time.perf_counter()
    subprocess.run([*command, *options, *roots(config)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return seconds, json.loads((folder / "test.json").read_text(encoding="utf-8"))[metric(config)]


def metric(config: str) -> str:
    """Return the key in test.json of the metric by which a config chooses its best checkpoint."""
    return read(config)["best"]["metric"].removeprefix("val/")


def trained(config: str) -> Path:
    """Return the folder of a run of the first seed, which is trained now if there is none."""
    folder = RUNS / f"{config}-{SEEDS[0]}"
    if not (folder / "test.json").is_file():
        fit(config, SEEDS[0])
    return folder


def results(config: str) -> Rows:
    """Measure scores and seconds over the seeds."""
    if config not in ON_A_CPU and not torch.cuda.is_available():
        raise NotHere("it needs a GPU")
    roots(config)
    found = [fit(config, seed) for seed in watched(SEEDS, config)]
    seconds, scores = map(list, zip(*found, strict=True))
    return {f"{metric(config)} on the test split": Row(scores), "the command": Row(seconds, unit="s")}


BENCHMARKS = {path.stem: partial(results, path.stem) for path in sorted(CONFIGS.glob("*.yaml"))}


if __name__ == "__main__":
    run(BENCHMARKS)
