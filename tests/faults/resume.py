"""Kill a fit with SIGKILL at random places, resume it and compare it with an uninterrupted run, bit for bit.

    python -m tests.faults.resume [--kills 20] [FAMILY...]

Each family runs for a few steps (`families`), with augmentation, dropout, averaged weights, accumulated gradients or
worker processes. Half of the runs save last.ckpt after every step, the others only after validation. The weights,
averaged weights, optimiser and schedule of last.ckpt and best.ckpt must be equal, and the rows of metrics.csv.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from rich.progress import track

from tests.faults.families import FAMILIES, at, differing, fit_words, in_a_process, known_family, write_text_file

HOOKS = (
    "on_train_batch_start",
    "on_after_backward",
    "on_train_batch_end",
    "on_validation_batch_end",
    "on_save_checkpoint",
)


def killed(family: str, folder: Path, chance: random.Random, every_step: bool) -> str:
    """Kill a run at a random place, resume it and return the outcome."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    more = {"checkpoint_minutes": 0 if every_step else 10}
    hook = chance.choice(HOOKS)
    number = chance.randint(1, 18)
    status = in_a_process(fit_words(family, run, **more), folder, lambda: at(hook, number, signal.SIGKILL))
    if status == 0:
        return "ended before"  # the hook is called fewer times than `number`
    if status != -signal.SIGKILL:
        return f"status {status}"
    resumes = (run / "checkpoints" / "last.ckpt").exists()
    more |= {"ckpt_path": "last"} if resumes else {"overwrite": "true"}
    if status := in_a_process(fit_words(family, run, **more), folder):
        return f"{hook} {number}: status {status} when resumed"
    if found := differing(run, folder / "whole"):
        return f"{hook} {number}{' of all steps' * every_step}: {', '.join(found)}"
    return "equal" if resumes else "before the first checkpoint"


def tally(family: str, kills: int, seed: int = 0) -> Counter:
    """Return the number of kills with each outcome."""
    counts, chance = Counter(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text_file(folder)
        if status := in_a_process(fit_words(family, folder / "whole"), folder):
            raise SystemExit(f"{family}: status {status}\n{(folder / 'output.txt').read_text()}")
        for i in track(range(kills), family, transient=True):
            outcome = "ended before"
            while outcome in ("ended before", "before the first checkpoint"):
                outcome = killed(family, folder, chance, every_step=i % 2 == 0)
            counts[outcome] += 1
            if outcome != "equal":
                print((folder / "output.txt").read_text()[-3000:], file=sys.stderr)
    return counts


def main() -> int:
    """Return 0 if every resumed run equals the uninterrupted one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", type=known_family, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts = {family: tally(family, options.kills) for family in options.families}
    for family, count in counts.items():
        print(f"{family:24}", ", ".join(f"{number} {outcome}" for outcome, number in count.most_common()))
    return int(any(count["equal"] < options.kills for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
