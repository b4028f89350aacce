"""The search for hyper-parameters that docs/tuning.md shows."""

import csv
import re
import subprocess
import sys

from conftest import ROOT


def test_the_documented_search_finds_the_best_trial_and_can_continue(tmp_path):
    (script,) = re.findall("```python\n(.*?)```", (ROOT / "docs/tuning.md").read_text(), re.DOTALL)
    short = script.replace("EPOCHS, TRIALS = 10, 20", "EPOCHS, TRIALS = 1, 1")
    assert short != script
    (tmp_path / "search.py").write_text(short)
    for name in ("train.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    search, scores = [sys.executable, "search.py"], []
    for trial in (0, 1):
        done = subprocess.run(search, cwd=tmp_path, capture_output=True, text=True, check=True)
        with open(tmp_path / f"runs/search/lenet5_digits/{trial}/metrics.csv") as file:
            scores += [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
        assert float(done.stdout.splitlines()[-1].split()[0]) == max(scores)
    assert len(set(scores)) == 2  # a continued search tries other values
