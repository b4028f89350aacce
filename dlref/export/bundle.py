"""Turn a trained task into a verified bundle for one target: export, convert, verify, measure, write."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dlref.export.attempts import Attempts
from dlref.export.measure import CONTENDERS, provider
from dlref.export.targets import Target
from dlref.runtime import UserError, load
from dlref.runtime.bundle import check_provider, read_manifest
from dlref.runtime.errors import FULL

BUNDLE = "bundle"
BEFORE = "before"  # holds the earlier bundle until the new one has taken its place


def export(task, data, target: Target, output: Path, contenders: tuple[str, ...] = CONTENDERS) -> dict:
    """Write the bundle of a trained `task` to the folder `output` and return its manifest.

    `data` is the task's data module; it supplies real inputs, calibration data and the splits that the metric is
    computed on. `contenders` names the contenders to measure. The folder appears complete or not at all. Raises
    UserError, and its subclass Refused if the bundle's outputs differ from PyTorch's.
    """
    check_provider(f"target {target.name}", target.provider)
    data.prepare_data()
    data.setup("validate")
    data.setup("test")
    task.take_facts(data)
    task.check()  # now that it is trained: layers that start from zeros hide what comes before them
    batch = next(iter(data.val_dataloader()), None)
    if batch is None:
        raise UserError("no validation data; expected some, to verify the bundle on")
    deployable = task.deployable(batch).checked()
    with staged(output) as place:
        attempts = Attempts(task, data, deployable, target, place)
        chosen = attempts.find_best()
        verification = attempts.verification(chosen)
        measurement = attempts.contenders.measurement(chosen.folder, contenders)
        manifest = attempts.complete(chosen.plan, verification=verification, measurement=measurement)
        load(chosen.folder, provider=provider(target))  # opens the written files as a device will
        chosen.folder.rename(place / BUNDLE)
    return manifest


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a working folder beside `output`. In the end its subfolder BUNDLE becomes `output`; the rest is removed."""
    output = Path(os.path.realpath(output))  # Path's methods raise for inaccessible paths before Python 3.14
    if os.path.islink(output):
        raise UserError(f"{output}: a link to itself; expected a folder for the bundle")
    if os.path.ismount(output):
        raise UserError(f"{output}: a mount point, which cannot be replaced; expected a folder inside it")
    nearest = next(path for path in (output, *output.parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise UserError(f"{nearest}: a file; expected a folder for the bundle")
    if outer := next(filter(is_bundle, output.parents), None):
        raise UserError(f"{output}: inside the bundle {outer}, which holds only its own files; expected another place")
    try:
        if nearest == output and any(output.iterdir()) and not is_bundle(output):
            raise UserError(f"{output}: holds other files; expected a new folder, an empty one or an earlier bundle")
        beside = output.parent if nearest == output else nearest
        for path in (output, *(beside / name for name in output.relative_to(beside).parts)):  # one may be too long
            with suppress(FileNotFoundError):
                os.lstat(path)
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=beside))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); expected a folder for the bundle") from None
    try:
        yield part
        output.parent.mkdir(parents=True, exist_ok=True)
        replace(part / BUNDLE, output, part / BEFORE)
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = f"cannot be written ({error.strerror}); expected free space for several times the bundle"
        raise UserError(f"{output}: {reason}") from error
    finally:
        if output.exists() or not (part / BEFORE).exists():
            shutil.rmtree(part, ignore_errors=True)


def replace(made: Path, output: Path, aside: Path) -> None:
    """Move `made` to `output`, and an existing `output` to `aside` first; undo that on failure. Raises UserError."""
    try:
        if output.exists():
            output.rename(aside)
        made.rename(output)
    except BaseException as error:  # Ctrl-C too
        with suppress(OSError):
            if aside.exists() and not output.exists():
                aside.rename(output)
        if isinstance(error, OSError):
            left = f", the earlier bundle is now {aside}" if aside.exists() else ""
            reason = f"cannot be replaced ({error.strerror}{left})"
            raise UserError(f"{output}: {reason}; expected a folder for the bundle") from None
        raise


def is_bundle(folder: Path) -> bool:
    """Return whether a folder is a bundle and holds nothing else: only such a folder may be replaced."""
    try:
        read_manifest(folder)
    except UserError:
        return False
    return True
