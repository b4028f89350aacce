"""A run's folder: where it is, what may be replaced, and what is left when a fit is refused."""

import csv
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dlref.runtime import UserError

OWN = (
    "checkpoints",
    "figures",
    "config.yaml",
    "hparams.yaml",
    "metrics.csv",
    "test.json",
    "predictions",
    "predictions.jsonl",
)


def run_folder(options) -> Path:
    """--run, or the folder that a run's own config.yaml lies in, or runs/NAME for configs/NAME.yaml."""
    if options.run:
        return Path(options.run)
    if not options.config:
        raise UserError("no --config and no --run; expected one of them to name the run")
    config = Path(str(options.config[-1]))
    return config.parent if config.name == "config.yaml" else Path("runs") / config.stem


def checkpoint_of(run: Path, asked: str | None) -> Path:
    """The checkpoint asked for: a file, "last", or by default the run's best. Raises UserError."""
    named = asked in (None, "best", "last")
    path = run / "checkpoints" / f"{asked or 'best'}.ckpt" if named else Path(asked)
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint there; expected the folder of a run that was trained")
    return path


class Claim:
    """Hold a folder for a fit until it trains: a fit that is refused leaves everything as it was.

    Args:
        run: the folder.
        resume: continue the run that is there.
        overwrite: replace the run that is there.

    Of several processes only the first touches the disk.
    """

    def __init__(self, run: Path, resume: bool, overwrite: bool):
        self.run, self.refusable = run, rank_zero_only.rank == 0
        if not self.refusable:
            return
        blocked = next((path for path in (run, *run.parents) if path.exists()), run)
        if blocked.exists() and not blocked.is_dir():
            raise UserError(f"{blocked}: a file; expected a folder for the run")
        if (run / "checkpoints").exists() and not (resume or overwrite):
            raise UserError(
                f"{run} already holds a run; expected --run with another folder, --ckpt_path last to resume it, or "
                "--overwrite true to replace it"
            )
        self.created = [path for path in (run, *run.parents) if not path.exists()]
        self.there = self.own() if resume else []
        self.config = (run / "config.yaml").read_bytes() if run / "config.yaml" in self.there else None
        self.aside = run / f".earlier.{os.getpid()}"
        for path in [] if resume else self.own():
            self.aside.mkdir(exist_ok=True)
            path.rename(self.aside / path.name)

    def own(self) -> list[Path]:
        """What of the folder belongs to a run; other files in it are nobody's to touch."""
        paths = (*map(self.run.joinpath, OWN), *self.run.glob("events.out.tfevents.*"))
        return [path for path in paths if path.exists()]

    def keep(self) -> None:
        """Training starts: the earlier run is replaced for good."""
        if self.refusable:
            shutil.rmtree(self.aside, ignore_errors=True)
        self.refusable = False

    def give_back(self) -> None:
        """Unless training has started: remove what the fit wrote, bring back what was set aside."""
        if not self.refusable:
            return
        for path in set(self.own()) - set(self.there):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.config is not None:
            (self.run / "config.yaml").write_bytes(self.config)
        for path in self.aside.iterdir() if self.aside.exists() else []:
            path.rename(self.run / path.name)
        for folder in (self.aside, *self.created):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def metrics_file(run: Path, resume: bool) -> CSVLogger:
    """The logger of metrics.csv. A fresh CSVLogger deletes the file; a resumed run keeps its rows."""
    logger = CSVLogger(run, name="", version="")
    if rank_zero_only.rank == 0 and run.exists():
        path = run / "metrics.csv"
        earlier = []
        if resume and path.is_file():
            with path.open(newline="") as file:
                earlier = list(csv.DictReader(file))
        with warnings.catch_warnings(action="ignore"):  # of the file being deleted: its rows are in `earlier`
            logger.experiment.metrics.extend(earlier)
        logger.save()
    return logger


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_pictures(folder: Path, names: list[str], pictures: Iterable) -> None:
    """Write a PNG for each input into `folder`, all or none; what was there before goes.

    They lie in it as the inputs lie in the folder that is common to them. Raises UserError.
    """
    common = os.path.commonpath([Path(name).parent.resolve() for name in names])
    files = [Path(os.path.relpath(Path(name).resolve(), common)).with_suffix(".png") for name in names]
    twice = next((file for file, count in Counter(files).items() if count > 1), None)
    if twice:
        raise UserError(f"{folder}: two inputs would become {twice}; expected names that differ")
    part = folder.with_name(f"{folder.name}.part")
    try:
        for file, picture in zip(files, pictures, strict=True):
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            picture.save(part / file)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
