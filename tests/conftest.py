"""Fixtures and settings shared by all tests, such as checks of shapes and one thread per worker."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores

from jaxtyping import install_import_hook

# Must precede their first import: checks the shapes in their signatures while the tests run.
SHAPED = ["distributions", "forecast_scores", "forecasting", "multibox", "optimizers", "preprocess"]
SHAPED += ["semantic_segmentation", "translation", "language_modelling", "cross_entropy"]
SHAPED += ["image_classification", "image_task", "object_detection"]
SHAPED = [f"dlref.tasks.{name}" for name in SHAPED]
SHAPED += ["dlref.data.pairs", "dlref.data.tokens", "dlref.data.windows"]
install_import_hook(["dlref.models", *SHAPED], "beartype.beartype")

import logging
import subprocess
import sys
from functools import cache
from pathlib import Path

import jaxtyping
import pytest
import torch
from handmade import make_bundle
from torch.onnx._internal.exporter._registration import ONNXRegistry

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
logging.getLogger("torch.__trace").propagate = False  # logs every export, which would hide the output of failures
logging.getLogger("lightning.pytorch").propagate = True  # to `caplog`, whichever module imported it first


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _measured_once():
    """Measure once: an export would repeat its measurements until the other worker leaves the machine idle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dlref.export.measure.TURNS", 1)
        yield


@pytest.fixture(scope="session", autouse=True)
def _translations_read_once():
    """Cache the translations to ONNX: parsing their sources takes most of the export of a small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture
def unchecked(monkeypatch):
    """Switch off the checks of annotations, as for users, so that the code's own checks are tested."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])  # else Lightning warns about pytest's arguments


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose prediction is known; see `handmade`."""
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def command():
    """Run a program of this checkout in a separate process, as a user would."""

    def run(*arguments, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        program = [str(argument) for argument in arguments]
        program[0] = str(ROOT / program[0]) if program[0].endswith(".py") else program[0]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, *program], cwd=cwd, capture_output=True, text=True, env=environment, check=False
        )

    return run
