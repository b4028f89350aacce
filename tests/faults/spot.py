"""Faults of a spot instance (SIGTERM, damaged checkpoints, a full disk), after which each run resumes identically.

    python -m tests.faults.spot [--times 20]

Fits of every family get SIGTERM at random steps: last.ckpt must be of that step (or of the optimiser's next step, or of
the end of a validation that is due), the exit status 75, and the resumed run identical to an uninterrupted one, bit for
bit. A last.ckpt is truncated, emptied, removed or has one bit flipped: the previous checkpoint is used and one line
says so. The full disk is a small tmpfs in a separate namespace (`unshare`).
"""

import argparse
import contextlib
import ctypes
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track

from dlref.training.run_folder import checkpoint_of
from dlref.training.seal import damage
from tests.faults.families import FAMILIES, at, differing, fit_words, in_a_process, write_text_file

FAMILY = "image classification"  # used if one family is enough
STEPS = 6  # of an epoch, in all families


# SIGTERM


def told(family: str, folder: Path, number: int) -> str:
    """Send SIGTERM in a given step, resume the run and return the outcome."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    status = in_a_process(fit_words(family, run), folder, lambda: at("on_train_batch_start", number, signal.SIGTERM))
    if status != os.EX_TEMPFAIL:
        return f"step {number}: status {status}"
    kept = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    step = kept["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
    if step - number > (0 if number % STEPS and number % 2 == 0 else 1):
        return f"step {number}: kept in step {step}"
    if status := in_a_process(fit_words(family, run, ckpt_path="last"), folder):
        return f"step {number}: status {status} when resumed"
    found = differing(run, folder / "whole")
    return f"step {number}: {', '.join(found)}" if found else "equal"


def sigterm(folder: Path, times: int, chance: random.Random) -> Counter:
    """Interrupt each family `times` times and count the outcomes."""
    counts = Counter()
    for family in track(FAMILIES, "SIGTERM", transient=True):
        shutil.rmtree(folder / "whole", ignore_errors=True)
        in_a_process(fit_words(family, folder / "whole"), folder)
        for _ in range(times):
            counts[told(family, folder, chance.randint(1, 3 * STEPS))] += 1
    return counts


# Damage


def cut(path: Path, chance: random.Random) -> None:
    """Truncate a file at a random place."""
    os.truncate(path, chance.randrange(1, path.stat().st_size - 100))


def empty(path: Path, chance: random.Random) -> None:
    """Empty a file."""
    os.truncate(path, 0)


def turn(path: Path, chance: random.Random) -> None:
    """Flip one bit of the sealed content."""
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data) - 80)] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def remove(path: Path, chance: random.Random) -> None:
    """Remove a file, as if the process had been killed between two renames."""
    path.unlink()


def damaged(folder: Path, times: int, chance: random.Random) -> Counter:
    """Count how often each kind of damage is found; for each kind, resume one run."""
    whole, run = folder / "whole", folder / "run"
    shutil.rmtree(whole, ignore_errors=True)
    in_a_process(fit_words(FAMILY, whole), folder)
    stopped = folder / "stopped"
    in_a_process(
        fit_words(FAMILY, stopped, checkpoint_minutes=0), folder, lambda: at("on_train_batch_start", 11, signal.SIGKILL)
    )
    counts = Counter()
    for kind in track((cut, empty, turn, remove), "damage", transient=True):
        for i in range(times):
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(stopped, run)
            kind(run / "checkpoints" / "last.ckpt", chance)
            with contextlib.redirect_stderr(io.StringIO()):
                found = checkpoint_of(run, "last").name == "previous.ckpt"
            counts[f"{kind.__name__}: {'found' if found else 'NOT FOUND'}"] += 1
            if i == 0:
                counts[f"{kind.__name__}: {goes_on(run, whole, folder)}"] += 1
    return counts


def goes_on(run: Path, whole: Path, folder: Path) -> str:
    """Resume a run and return the outcome."""
    (folder / "output.txt").unlink()
    status = in_a_process(fit_words(FAMILY, run, checkpoint_minutes=0, ckpt_path="last"), folder)
    lines = [line for line in (folder / "output.txt").read_text().splitlines() if "using previous.ckpt" in line]
    found = differing(run, whole)
    return "resumed, equal" if (status, len(lines), found) == (0, 1, []) else f"{status}, {lines}, {found}"


# A full disk


def full(folder: Path, times: int, chance: random.Random) -> Counter:
    """Count the outcomes of fits on a disk that is too small, resumed after the disk has grown."""
    counts, disk = Counter(), folder / "disk"
    disk.mkdir()
    in_a_process(fit_words(FAMILY, folder / "whole"), folder)
    for _ in range(times):
        size = chance.randint(800, 3000)  # KB; the run needs four checkpoints of 750, including one being written
        mounted("-t", "tmpfs", "-o", f"size={size}k", "none", str(disk))
        (folder / "output.txt").unlink()
        status = in_a_process(fit_words(FAMILY, disk / "run", checkpoint_minutes=0), folder)
        lines = [x for x in (folder / "output.txt").read_text().splitlines() if x.startswith("error: ")]
        kept = sorted((disk / "run" / "checkpoints").glob("*"))
        parts, broken = [x for x in kept if x.suffix != ".ckpt"], [x for x in kept if damage(x)]
        mounted("-o", "remount,size=100m", str(disk))
        if (status, len(lines), parts, broken) != (2, 1, [], []):
            counts[f"{size} KB: {status}, {lines}, {parts}, {broken}"] += 1
        elif (disk / "run" / "checkpoints" / "last.ckpt").exists():
            more = {"checkpoint_minutes": 0, "ckpt_path": "last"}
            in_a_process(fit_words(FAMILY, disk / "run", **more), folder)
            counts[f"one line, whole, {differing(disk / 'run', folder / 'whole') or 'resumed, equal'}"] += 1
        else:
            counts["one line, nothing kept yet"] += 1
        subprocess.run(["umount", str(disk)], check=True)
    return counts


def mounted(*arguments: str) -> None:
    """Run `mount` with these arguments."""
    subprocess.run(["mount", *arguments], check=True)


def own_mounts() -> bool:
    """Enter a private namespace of mounts, if the system permits it; return whether it did."""
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        root = os.getuid() == 0
        private = 1 << 18 | 1 << 14  # MS_PRIVATE, MS_REC: mounts stay in this namespace
        return root and libc.unshare(0x00020000) == 0 and libc.mount(None, b"/", None, private, None) == 0
    return False


PARTS: dict[str, Callable[[Path, int, random.Random], Counter]] = {"SIGTERM": sigterm, "damage": damaged}


def main() -> int:
    """Return 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20, help="of each family, kind of damage, and size of disk")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = PARTS | ({"full disk": full} if own_mounts() else {})
    failed = False
    for part, tally in parts.items():
        with tempfile.TemporaryDirectory() as name:
            write_text_file(Path(name))
            counts = tally(Path(name), options.times, random.Random(0))
        print(part, *(f"  {number} {outcome}" for outcome, number in counts.items()), sep="\n")
        failed |= any(not outcome.endswith(("equal", "found", "yet")) for outcome in counts)
    if "full disk" not in parts:
        print("full disk\n  NOT RUN: needs root and name spaces of mounts")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
