"""Compare a run's loss by nanoGPT's estimate with that of the whole split: `python -m benchmarks.nanogpt_loss RUN`.

nanoGPT's `estimate_loss` is the mean over batches of random windows (200 of them; 20 in its recipe for a CPU), so it
changes from one call to the next. The output has its mean, least and greatest value over several calls. A window begins
anywhere in the validation split, whereas `train.py validate` puts one after the other.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rows import watched
from dlref.cli import load_run
from dlref.data.language import LanguageData
from dlref.runtime import UserError
from dlref.runtime.arguments import Parser, exit_code, positive
from dlref.tasks import LanguageModel
from dlref.tasks.language_modelling import IGNORE

CALLS = 10


@torch.inference_mode()
def loss(task: LanguageModel, batches: Iterable[Tensor]) -> float:
    """Return the nats per token of all batches together."""
    nats = count = 0
    for batch in batches:
        after = batch[:, 1:].flatten()
        logits = task(batch[:, :-1].clamp(min=0)).float().flatten(0, 1)
        nats += F.cross_entropy(logits, after, ignore_index=IGNORE, reduction="sum").item()
        count += (after != IGNORE).sum().item()
    return nats / count


def estimates(task: LanguageModel, data: LanguageData, eval_iters: int, generator: torch.Generator) -> list[float]:
    """Return the results of several calls of `estimate_loss` on the validation split."""
    windows = data.splits["val"]
    places = len(windows.tokens) - data.context_length
    if places < 1:
        raise UserError(f"val: {len(windows.tokens)} tokens; expected more than a window, {data.context_length}")
    starts = torch.randint(places, (CALLS, eval_iters, data.batch_size), generator=generator)
    return [loss(task, (windows[batch] for batch in call)) for call in watched(starts, "estimating")]


def main() -> int:
    """Evaluate both ways and print a line each. Return the exit code."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--eval-iters", type=positive, default=200, help="batches of one estimate")
    return exit_code(lambda: report(*parser.parse_known_args()))


def report(options: argparse.Namespace, overrides: list[str]) -> None:
    """Print both losses of a run. Raises UserError."""
    task, data = load_run(options.run, overrides)
    data.setup("validate")
    task.take_facts(data)
    found = estimates(task, data, options.eval_iters, torch.Generator().manual_seed(0))
    estimated = f"{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})"
    calls = f"{CALLS} calls, each of {options.eval_iters} batches of {data.batch_size} windows"
    print(f"{options.run.name}: validation loss {loss(task, data.val_dataloader()):.4f} over the whole split")
    print(f"by nanoGPT's estimator {estimated}: {calls}")


if __name__ == "__main__":
    sys.exit(main())
