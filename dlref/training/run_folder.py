"""A run's folder: where it is, which files a fit may replace, and how a refused fit is undone."""

import csv
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dlref.runtime import UserError
from dlref.runtime.machine import comparable
from dlref.training.seal import damage, replacing

OWN = (
    "checkpoints",
    "figures",
    "config.yaml",
    "hparams.yaml",
    "metrics.csv",
    "test.json",
    "profile.md",
    "trace.json.gz",
    "predictions",
    "predictions.jsonl",
    "not_finite.pt",
)
LOCK = ".lock"  # reserves a folder for a fit, and shows later that there was a fit
# A fit that ended before its first checkpoint leaves none of these: that is no run yet, and the next fit starts anew.
RESULTS = set(OWN) - {"config.yaml", "hparams.yaml", "metrics.csv", "not_finite.pt"}


def run_folder(options) -> Path:
    """Return --run, or the folder of a run's own config.yaml, or runs/NAME for configs/NAME.yaml."""
    if options.run:
        return Path(options.run)
    if not options.config:
        raise UserError("no --config and no --run; expected one of them to name the run")
    config = Path(str(options.config[-1]))
    return config.parent if config.name == "config.yaml" else Path("runs") / config.stem


def checkpoint_of(run: Path, asked: str | None) -> Path:
    """Return the path of the requested checkpoint: a file, "last", or by default the run's best. Raises UserError."""
    named = asked in (None, "best", "last")
    path = run / "checkpoints" / f"{asked or 'best'}.ckpt" if named else Path(asked)
    if asked == "last":
        path = intact(path, path.with_name("previous.ckpt"))
    if not os.path.isfile(path):  # Path's methods raise for inaccessible paths before Python 3.14
        if path.name == "best.ckpt" and os.path.isfile(path.with_name("last.ckpt")):
            raise UserError(
                f"{path}: not found, only last.ckpt, as in a run killed before its first validation; "
                "expected a finished run"
            )
        raise UserError(f"{path}: no checkpoint there; expected the folder of a trained run")
    return path


def intact(last: Path, previous: Path) -> Path:
    """Return the last checkpoint, or the one before it, with a printed line, if only that one is intact."""
    wrong = damage(last) if os.path.isfile(last) else "not found"
    if wrong is None or not os.path.isfile(previous) or damage(previous):
        return last
    if rank_zero_only.rank == 0:
        print(f"{last}: {wrong}; using {previous.name}, the intact checkpoint before it", file=sys.stderr)
    return previous


class Claim(AbstractContextManager):
    """Reserve a run's folder for a fit. Until training starts, `roll_back` restores it exactly.

    Args:
        run: the folder.
        resume: continue the run that is there.
        overwrite: replace the run that is there.

    Only the first of several processes touches the disk.
    """

    def __init__(self, run: Path, resume: bool, overwrite: bool):
        self.run, self.refusable = run, rank_zero_only.rank == 0
        if not self.refusable:
            return
        blocked = next(filter(os.path.exists, (run, *run.parents)), run)
        if os.path.exists(blocked) and not blocked.is_dir():
            raise UserError(f"{blocked}: a file; expected a folder for the run")
        self.created = [path for path in (run, *run.parents) if not os.path.exists(path)]
        self.first = not os.path.exists(run / LOCK)
        self.take()
        there = [path.name for path in self.own() if self.first or path.name in RESULTS]
        if there and not (resume or overwrite):
            self.leave()
            raise UserError(
                f"{run} already holds a run ({', '.join(there)}); expected --run with another folder, --ckpt_path last "
                "to resume it, or --overwrite to replace it"
            )
        self.staying = self.own() if resume else []
        rewritten = (run / "config.yaml", run / "metrics.csv")  # even before training starts
        self.before = {path: path.read_bytes() for path in rewritten if path in self.staying}
        self.aside = run / f".earlier.{os.getpid()}"
        for path in [] if resume else self.own():
            self.aside.mkdir(exist_ok=True)
            path.rename(self.aside / path.name)
        self.copy_config()

    def copy_config(self) -> None:
        """Copy back the config set aside: the machine's other processes start later and may be told to read it."""
        config = self.aside / "config.yaml"
        if not config.is_file():
            return
        try:
            with replacing(self.run / config.name) as part:
                shutil.copy(config, part)
        except OSError:
            self.roll_back()
            raise

    def take(self) -> None:
        """Reserve the folder for this process until it ends, however it ends. Raises UserError.

        Files set aside by a fit that was killed before it trained are put back.
        """
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.run / LOCK)
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.run}: another fit is writing there; expected --run with another folder") from None
        except OSError as error:
            raise UserError(f"{self.run}: {error.strerror}; expected a folder to write to") from None
        for aside in self.run.glob(".earlier.*"):
            if not (self.run / "checkpoints").exists():
                self.bring_back(aside)
            shutil.rmtree(aside)

    def bring_back(self, aside: Path) -> None:
        """Put back the files set aside, checkpoints last: their presence tells the next fit that all files are back."""
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "checkpoints"):
            remove([self.run / path.name])
            path.rename(self.run / path.name)

    def __exit__(self, *_: object) -> None:
        self.roll_back()
        if rank_zero_only.rank == 0:
            self.lock.release()

    def own(self) -> list[Path]:
        """Return the run's own files in the folder; others are left alone."""
        paths = (*map(self.run.joinpath, OWN), *self.run.glob("events.out.tfevents.*"))
        return [path for path in paths if path.exists()]

    def commit(self) -> None:
        """Replace the earlier run for good, as training starts."""
        if self.refusable:
            shutil.rmtree(self.aside, ignore_errors=True)
        self.refusable = False

    def roll_back(self) -> None:
        """Unless training has started, remove the fit's files and put back those set aside."""
        if not self.refusable:
            return
        remove(set(self.own()) - set(self.staying))
        for path, data in self.before.items():
            path.write_bytes(data)
        if self.aside.exists():
            self.bring_back(self.aside)
        self.leave()
        for folder in (self.aside, *self.created):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def leave(self) -> None:
        """Release the folder, and remove the lock file if there was none before."""
        if self.first:
            with suppress(PermissionError):  # Windows keeps open files; there the lock deletes its file on release
                (self.run / LOCK).unlink(missing_ok=True)
        self.lock.release()


def remove(paths: Iterable[Path]) -> None:
    """Remove files, and folders with their contents."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def metrics_file(run: Path, before: int) -> CSVLogger:
    """Return the logger of metrics.csv. A new CSVLogger deletes the file; a resumed run keeps rows `before` a step.

    Rows of later steps, logged by a process that was killed, are logged again.
    """
    logger = CSVLogger(run, name="", version="")
    if rank_zero_only.rank == 0:
        path = run / "metrics.csv"
        earlier = []
        if path.is_file():
            with path.open(newline="") as file:
                complete = [row for row in csv.DictReader(file) if None not in row.values()]  # the last may be cut off
            earlier = [row for row in complete if row.get("step", "").isdigit() and int(row["step"]) < before]
        with warnings.catch_warnings(action="ignore"):  # that the file is deleted: its rows are in `earlier`
            logger.experiment.metrics.extend(earlier)
        logger.save()
    return logger


def check_writable(run: Path) -> None:
    """Raise UserError if nothing can be written to the folder, or if it does not exist and cannot be made."""
    place = next((place for place in (run, *run.parents) if os.path.lexists(place)), run)
    if not (os.path.isdir(place) and os.access(place, os.W_OK)):
        raise UserError(f"{run}: not writable; expected a folder that results can be written to")


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all, in a folder that is made if there is none."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def written_pictures(folder: Path, names: list[str], pictures: Iterable) -> Iterator[None]:
    """Write a PNG for each input into `folder`, all or none; an earlier `folder` is replaced once the block succeeds.

    PNGs keep the paths of the inputs relative to the inputs' common folder. Raises UserError.
    """
    try:
        common = os.path.commonpath([Path(name).parent.resolve() for name in names])
    except ValueError:
        raise UserError(f"{folder}: inputs on several drives; expected them on one") from None
    places = [Path(name).parent.resolve() / Path(name).name for name in names]  # of a link, not its target
    files = [Path(os.path.relpath(place, common)).with_suffix(".png") for place in places]
    twice = next((file for file, count in Counter(map(comparable, files)).items() if count > 1), None)
    if twice:
        raise UserError(f"{folder}: two inputs would be written to {twice}; expected names that differ")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
    try:
        for file, picture in zip(files, pictures, strict=True):
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            picture.save(part / file)
        yield
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
