"""The metrics of a split are those of all its samples, however it is cut into batches."""

import pytest
from lightning import Trainer, seed_everything

from dlref.cli import build
from tests.faults.families import FAMILIES, ROOT, words, write_text_file

SMALLEST = {"translation": 64}  # tokens of a batch, which must hold the longest sentence; elsewhere samples


def scores(family: str, size: int) -> dict[str, float]:
    """Return the test metrics of an untrained network, computed in batches of a size."""
    config, options = FAMILIES[family]
    options = {key: value for key, value in options.items() if not key.startswith("trainer.")}
    seed_everything(0, verbose=False)
    task, data = build(ROOT / "configs" / f"{config}.yaml", words({**options, "data.init_args.batch_size": size}))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", use_distributed_sampler=False, enable_model_summary=False, **quiet)
    return trainer.test(task, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_do_not_depend_on_the_batch_size(family, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    write_text_file(tmp_path)
    size = SMALLEST.get(family, 1)
    assert scores(family, size) == pytest.approx(scores(family, 5 * size), rel=1e-5, abs=1e-6)
