"""Malicious files, given to the commands that a user types.

    python -m tests.faults.untrusted [WORD]

The files are checkpoints, weights, configs, tokenisers, bundles and inputs. Each attack tries to run code that touches
a canary, to read a secret or to write outside its own folder. WORD runs only the attacks that have it in their names.
The exit code is 1 if an attack succeeds, or if the watch misses a violation made on purpose.

An audit hook sees what Python does. Native code raises no audit events: a read of the secret shows in its access time
and in the output or the files written.
"""

# ruff: noqa: E402 (three imports come after the path on which they are)

import contextlib
import ctypes
import functools
import importlib
import io
import json
import operator
import os
import pickle
import re
import shutil
import signal
import site
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import traceback
import unicodedata
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
import yaml
from onnx import TensorProto, helper
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from safetensors.torch import save_file

from dlref.cli import train
from dlref.models import LeNet5
from dlref.runtime.__main__ import main as runtime
from dlref.runtime.text import SPECIAL

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # found however this module is started

from handmade import LABELS, METADATA, make_bundle, write_manifest
from test_damaged_bundles import DAMAGE
from test_pairs import packed, recordio

import export

SECRET, ESCAPE = "canary-5f1c0a7e", "\x1b]0;owned\x07"  # must not leave its file; must not reach a terminal
MODULE = "dlref_canary"  # importable like an installed package; importing it runs code
SHORT = {
    **{"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 2},
    **{"trainer.enable_progress_bar": False, "trainer.enable_model_summary": False, "final_test": False},
}
CONFIG = ROOT / "configs" / "lenet5_digits.yaml"


# What an attack is


class Place(NamedTuple):
    """The place of an attack: its own `folder`, with a `run` to poison, and a folder `outside` of it."""

    folder: Path
    run: Path
    outside: Path

    @property
    def canary(self) -> Path:
        """The file touched by every payload."""
        return self.outside / "canary"

    @property
    def secret(self) -> Path:
        """A file that is valid as YAML and as text."""
        return self.outside / "secret.yaml"


class Attack(NamedTuple):
    """An attack. `make` prepares its files and returns the command and its arguments.

    `expected` is "refused" (in one line, with the exit code 2) or "harmless" (the malicious part is ignored).
    """

    group: str
    name: str
    make: Callable[[Place], list[str]]
    expected: str = "refused"


class Outcome(NamedTuple):
    """The outcome of an attack: how it ended, and each problem as (kind, description)."""

    ended: str
    problems: list[tuple[str, str]]


KINDS = {
    "executed": "code executed",
    "read": "read outside",
    "written": "written outside",
    "other": "another end",
}


# The watch

LIBRARIES = {  # may be read: Python, its packages, the system's settings, fonts and devices
    *(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *map(os.path.realpath, [*site.getsitepackages(), ROOT, "/proc", "/sys", "/dev", "/etc", "/usr/share", "/usr/lib"]),
    *(os.path.realpath(path) for path in sys.path if path.endswith(".zip")),  # a zipped standard library
}
RUNS_CODE = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class"}
# jsonargparse's reader of type stubs asks Python for its path this way; nothing in it comes from a config.
ASKS_WHERE = [sys.executable, "-c", "import sys, json; print(json.dumps(sys.path))"]
NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"}
CHANGES = {  # events, and which of their arguments are paths
    **dict.fromkeys(("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime"), (0,)),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), (0, 1)),
    **dict.fromkeys(("shutil.rmtree",), (0,)),
    **dict.fromkeys(("shutil.move", "shutil.copyfile", "shutil.copytree"), (1,)),
}


class Watch:
    """An audit hook that records what Python does outside of the permitted folders during `on`."""

    def __init__(self):
        self.own: Path | None = None  # the one folder that may be changed; None: not watching
        self.problems: list[tuple[str, str]] = []
        sys.addaudithook(self)  # permanent: audit hooks cannot be removed

    @contextlib.contextmanager
    def on(self, own: Path) -> Iterator[list[tuple[str, str]]]:
        """Watch within this context; yield the list of problems."""
        self.problems, self.own = [], own
        try:
            yield self.problems
        finally:
            self.own = None

    def __call__(self, event: str, arguments: tuple) -> None:
        own, self.own = self.own, None  # ignore events of the check itself
        try:
            if own and (problem := judged(event, arguments, own)):
                self.problems.append(problem)
        finally:
            self.own = own


def judged(event: str, arguments: tuple, own: Path) -> tuple[str, str] | None:
    """Return the kind and description of the problem that an event is, or None if it is harmless."""
    if event in RUNS_CODE and arguments[1:2] != (ASKS_WHERE,):
        return "executed", f"{event} {arguments[:2]}"
    named = event == "compile" and "canary" in str(arguments[0])
    if named and not below(arguments[1] or "", LIBRARIES):  # rich knows the flag of the Canary Islands
        return "executed", f"compile {arguments[0]!r}"
    if event == "ctypes.dlopen" and os.sep in str(arguments[0]) and not below(arguments[0], LIBRARIES):  # a file
        return "executed", f"ctypes.dlopen {arguments[0]}"
    if event in NETWORK:
        return "written", f"{event} {arguments[:2]}"
    if event in CHANGES:
        changed = [arguments[i] for i in CHANGES[event] if not below(arguments[i], {str(own)})]
        return ("written", f"{event} {changed[0]}") if changed else None
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) or set(mode or "") & set("wax+"):
            return None if below(path, {str(own), os.devnull}) else ("written", f"open {path} to write")
        return None if below(path, {str(own), *LIBRARIES}) else ("read", f"open {path}")
    return None


def below(path: object, folders: set[str]) -> bool:
    """Return whether a path is one of the folders or in one; a descriptor was checked when it was opened."""
    if isinstance(path, int):
        return True
    real = os.path.realpath(os.fsdecode(path))
    return any(real == folder or real.startswith(f"{folder}{os.sep}") for folder in folders)


WATCH = Watch()


# An attack, from its files to its outcome

SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "1"}
SLURM |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1"}


def queued() -> int:
    """Run train.py as a SLURM job."""
    with mock.patch.dict(os.environ, SLURM):
        return train(sys.argv[1:])


DOORS = {"export": export.main, "runtime": lambda: runtime(sys.argv[1:]), "slurm": queued}


def typed(words: list[str]) -> int:
    """Run a command (export, runtime, or a subcommand of train.py) and return its exit code."""
    handler = signal.getsignal(signal.SIGTERM)  # export.py sets its own
    try:
        with mock.patch.object(sys, "argv", [words[0], *(words[1:] if words[0] in DOORS else [])]):
            return DOORS[words[0]]() if words[0] in DOORS else train(words)
    except SystemExit as error:
        return error.code or 0
    finally:
        signal.signal(signal.SIGTERM, handler)


def at(folder: Path, base: Path | None) -> Place:
    """Make a place with only a copy of the run in `base`, a secret and a module that touches the canary."""
    place = Place(folder / "own", folder / "own" / "run", folder / "outside")
    place.folder.mkdir(parents=True)
    place.outside.mkdir()
    if base:
        shutil.copytree(base / "run", place.run)
    place.secret.write_text(f"secret: {SECRET}\n")
    (place.outside / f"{MODULE}.py").write_text(f"open({str(place.canary)!r}, 'w')\n")
    return place


def watched(place: Place, command: Callable[[], object]) -> tuple[str, list[tuple[str, str]]]:
    """Run a command in its place; return what it printed to both streams, and the problems."""
    before = files(place.folder)
    os.utime(place.secret, ns=(0, place.secret.stat().st_mtime_ns))  # reading the file changes its access time
    outside = {path: path.stat().st_mtime_ns for path in place.outside.iterdir()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(place.folder))
        stack.enter_context(mock.patch.object(tempfile, "tempdir", str(place.folder)))
        stack.enter_context(mock.patch.object(sys, "path", [*sys.path, str(place.outside)]))
        stack.enter_context(mock.patch.object(sys, "dont_write_bytecode", True))
        stack.enter_context(mock.patch.dict(os.environ, {"DLREF_SECRET": SECRET}))
        printed = stack.enter_context(shown())
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        problems = stack.enter_context(WATCH.on(place.folder.resolve()))
        command()
    sys.modules.pop(MODULE, None)
    if place.canary.exists():
        problems.append(("executed", "the canary was touched"))
        outside[place.canary] = place.canary.stat().st_mtime_ns
    if place.secret.stat().st_atime:
        problems.append(("read", "the secret's time of access moved"))
    if {path: path.stat().st_mtime_ns for path in place.outside.iterdir()} != outside:
        problems.append(("written", f"outside changed: {', '.join(path.name for path in place.outside.iterdir())}"))
    made = b"".join(path.read_bytes() for path, seen in files(place.folder).items() if before.get(path) != seen)
    if SECRET in printed[0] or SECRET.encode() in made:
        problems.append(("read", "the secret was printed, or copied into a file"))
    return printed[0], problems


@contextlib.contextmanager
def shown() -> Iterator[list[str]]:
    """Yield a list that at the end holds the text for the terminal: of Python, its loggers and native code."""
    text: list[str] = []
    streams, kept = {1: sys.stdout, 2: sys.stderr}, {}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", newline="") as file:
        for number, stream in streams.items():
            stream.flush()
            kept[number] = os.dup(number)
            os.dup2(file.fileno(), number)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield text
        finally:
            for number, stream in streams.items():
                stream.flush()
                os.dup2(kept[number], number)
                os.close(kept[number])
            file.flush()
            file.seek(0)
            text.append(file.read())


def files(folder: Path) -> dict[Path, int]:
    """Return every file in a folder with its time of modification."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def attacked(attack: Attack, folder: Path, base: Path) -> Outcome:
    """Make the files of an attack, run it and return the outcome."""
    place = at(folder, base)
    with warnings.catch_warnings(action="ignore"):  # about outdated formats
        command, ended = attack.make(place), {}

    def run() -> None:
        try:
            ended["code"] = typed(command)
        except Exception:
            ended["code"] = traceback.format_exc(limit=-2)

    printed, problems = watched(place, run)
    code, errors = ended["code"], [line for line in printed.splitlines() if line.startswith("error: ")]
    uncoloured = re.sub(r"\x1b\[[\d;]*m", "", printed)  # onnxruntime's log is coloured
    if any(unicodedata.category(letter) == "Cc" and letter not in "\n\r\t" for letter in uncoloured):
        problems.append(("other", "a control character reached the terminal"))
    if code == 2 and len(errors) == 1 and "Traceback" not in printed:
        how = "refused"
    else:
        how = "harmless" if code == 0 else "otherwise"
    if how != attack.expected:
        said = str(code) if isinstance(code, str) else " ".join(errors) or f"exit code {code}"
        problems.append(("other", f"expected {attack.expected}, not {how}: {' '.join(said.split())[-300:]}"))
    return Outcome(how, list(dict.fromkeys(problems)))


# Checkpoints: code in a pickle, in every possible place

CHECKPOINTS = Path("run", "checkpoints")
TEST = ["test", "--config", "run/config.yaml"]
PREDICT = ["predict", "--config", "run/config.yaml"]
VALIDATE = ["validate", "--config", "run/config.yaml"]
RESUME = ["fit", "--config", "run/config.yaml", "--trainer.max_epochs", "2", "--ckpt_path", "last"]
EXPORT = ["export", "run", "--target", "cpu", "--output", "bundle"]
SHORTLY = [word for key, value in SHORT.items() for word in (f"--{key}", str(value).lower())]
FIT = ["fit", "--config", str(CONFIG), "--run", "new", *SHORTLY]


class Bomb:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touches(place: Place) -> Bomb:
    """Return the payload of most attacks."""
    return Bomb(os.system, f"touch {place.canary}")


def opens(place: Place) -> str:
    """Return the payload as Python code."""
    return f"open({str(place.canary)!r}, 'w')"


GADGETS: dict[str, Callable[[Place], object]] = {
    "os.system": touches,
    "subprocess.Popen": lambda place: Bomb(subprocess.Popen, ["touch", str(place.canary)]),
    "eval": lambda place: Bomb(eval, opens(place)),
    "exec": lambda place: Bomb(exec, opens(place)),
    "a method by operator": lambda place: Bomb(operator.methodcaller("touch"), place.canary),
    "functools.partial": lambda place: Bomb(functools.partial(os.system, f"touch {place.canary}")),
    "functools.reduce": lambda place: Bomb(functools.reduce, os.system, [f"touch {place.canary}"], ""),
    "a pickle in a pickle": lambda place: Bomb(pickle.loads, pickle.dumps(touches(place))),
    "a module": lambda place: Bomb(importlib.import_module, MODULE),
    "torch.load": lambda place: Bomb(
        torch.load, io.BytesIO(pickle.dumps(touches(place))), None, Bomb(importlib.import_module, "pickle")
    ),
    "torch.storage._load_from_bytes": lambda place: Bomb(torch.storage._load_from_bytes, saved(touches(place))),
    "torch.hub.load": lambda place: Bomb(torch.hub.load, str(place.outside), MODULE, "local"),
    "ctypes.CDLL": lambda place: Bomb(ctypes.CDLL, str(place.secret)),
    "numpy's objects": lambda place: np.array([touches(place)], dtype=object),
    "numpy.load": lambda place: Bomb(np.load, str(place.outside / "a.npy"), None, True),
    "a parameter's state": lambda place: Bomb(
        torch._utils._rebuild_parameter_with_state, torch.zeros(1), False, {}, {"x": touches(place)}
    ),
    "a whole module": lambda place: torch.nn.Sequential(torch.nn.Linear(1, 1)),
    "a file to read": lambda place: Bomb(open, str(place.secret)),
    "a tensor from a file": lambda place: Bomb(torch.from_file, str(place.secret), True, 4),
}


def saved(value: object) -> bytes:
    """Return the bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def nested(bomb: object) -> list:
    """Hide a bomb deep in permitted containers."""
    return [OrderedDict(a=({"b": [torch.Size([1]), bomb]},))]


# name -> a function of a checkpoint (a dict) and a bomb that returns the object to save, and the command that loads it
PLACES: dict[str, tuple[Callable[[dict, object], object], list[str]]] = {
    "the top": (lambda state, bomb: bomb, TEST),
    "a weight": (lambda state, bomb: state | {"state_dict": state["state_dict"] | {"network.c1.weight": bomb}}, EXPORT),
    "the weights": (lambda state, bomb: state | {"state_dict": bomb}, PREDICT),
    "a weight's name": (lambda state, bomb: state | {"state_dict": {bomb: torch.zeros(1)}}, VALIDATE),
    "the facts": (lambda state, bomb: state | {"facts": bomb}, EXPORT),
    "a label": (lambda state, bomb: state | {"facts": state["facts"] | {"labels": [bomb]}}, TEST),
    "the optimiser": (lambda state, bomb: state | {"optimizer_states": [bomb]}, RESUME),
    "the schedule": (lambda state, bomb: state | {"lr_schedulers": [bomb]}, RESUME),
    "a callback": (lambda state, bomb: state | {"callbacks": {"BestCheckpoint": bomb}}, RESUME),
    "the loops": (lambda state, bomb: state | {"loops": {"fit_loop": bomb}}, RESUME),
    "hyper-parameters": (lambda state, bomb: state | {"hyper_parameters": bomb}, TEST),
    "the hyper-parameters' class": (lambda state, bomb: state | {"hparams_type": bomb}, VALIDATE),
    "Lightning's version": (lambda state, bomb: state | {"pytorch-lightning_version": bomb}, RESUME),
    "containers": (lambda state, bomb: state | {"more": nested(bomb)}, EXPORT),
    "a key": (lambda state, bomb: state | {bomb: 1}, PREDICT),
}


def legacy(state: object, path: Path) -> None:
    """Save in the format before torch 1.6."""
    torch.save(state, path, _use_new_zipfile_serialization=False)


def plain(state: object, path: Path) -> None:
    """Save a bare pickle."""
    path.write_bytes(pickle.dumps(state))


def ancient(state: object, path: Path) -> None:
    """Save as the tar archive before torch 0.2, each part of it a pickle (CVE-2025-32434)."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            content = pickle.dumps(state)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def replaced(state: object, path: Path, more: str = "") -> None:
    """Save a valid archive with its data.pkl replaced and, with `more`, an additional file of that name."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    entries[next(name for name in entries if name.endswith("/data.pkl"))] = pickle.dumps(state)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in (entries | ({more: b"x"} if more else {})).items():
            new.writestr(name, content)


def scripted(state: object, path: Path) -> None:
    """Save TorchScript, which is a program."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)


def objects(state: object, path: Path) -> None:
    """Save NumPy's format with a pickle in it."""
    with path.open("wb") as file:
        np.save(file, np.array([state], dtype=object), allow_pickle=True)


FORMATS: dict[str, Callable[[object, Path], None]] = {
    "legacy": legacy,
    "plain": plain,
    "of tar": ancient,
    "with another data.pkl": replaced,
    "with a member above the folder": functools.partial(replaced, more="../../outside/new"),
    "of TorchScript": scripted,
    "of NumPy": objects,
}


def poisoned(
    place: Place, bomb: object, into: str = "best", put: Callable = PLACES["the top"][0], save: Callable = torch.save
) -> Path:
    """Put a bomb into a checkpoint of the run and return its path."""
    path = place.folder / CHECKPOINTS / f"{into}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = torch.load(path, weights_only=True) if path.exists() else {}
    save(put(state, bomb), path)
    return path


def checkpoint(command: list[str], bomb: Callable[[Place], object] = touches, **how: Any) -> Callable:
    """Return a maker that poisons the checkpoint read by a command."""

    def make(place: Place) -> list[str]:
        poisoned(place, bomb(place), into="last" if command is RESUME else "best", **how)
        return command

    return make


def by_slurm(place: Place) -> list[str]:
    """Poison the checkpoint that Lightning itself looks for in the run's folder when SLURM restarts a job."""
    poisoned(place, touches(place)).replace(place.run / "hpc_ckpt_1.ckpt")
    return ["slurm", *FIT, "--run", "run", "--overwrite", "true"]


def huge(place: Place) -> Bomb:
    """Return a tensor of a trillion numbers in a storage of one number."""
    storage = torch.zeros(1).untyped_storage()
    typed_storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    return Bomb(torch._utils._rebuild_tensor_v2, typed_storage, 0, (1 << 40,), (1,), False, OrderedDict())


def merged(change: dict, state: dict, bomb: object) -> dict:
    """Return a checkpoint without a bomb but with changed parts."""
    return state | change


def weight(state: dict, value: object) -> dict:
    """Return a checkpoint with another first weight."""
    return PLACES["a weight"][0](state, value)


def removing(state: dict, path: str) -> dict:
    """Return a checkpoint that names `path` as its best one, to be removed when a better one is saved."""
    (known,) = (kept for name, kept in state["callbacks"].items() if name.startswith("BestCheckpoint"))
    worst = torch.tensor(-1.0)
    known |= {"best_k_models": {path: worst}, "best_model_path": path, "kth_best_model_path": path, "kth_value": worst}
    known["best_model_score"] = worst
    del known["dirpath"]  # else Lightning checks whether the run has moved
    return state


def module_outside(place: Place) -> str:
    """Return a path outside that begins with the folder of checkpoints."""
    return f"{place.folder.resolve() / CHECKPOINTS}/../../../outside/{MODULE}.py"


TWO = {"batches": torch.tensor([1, 2]), "accumulated": 1, "validated": True, "seed": 0}

# Values that are neither code nor valid in a checkpoint.
MALFORMED: dict[str, tuple[dict[str, object], list[str]]] = {
    "facts that are a list": ({"facts": [1]}, TEST),
    "weights that are a list": ({"state_dict": [1]}, TEST),
    "a weight that is a text": ({"state_dict": {"network.c1.weight": "os.system"}}, EXPORT),
    "a weight's name that is a number": ({"state_dict": {1: torch.zeros(1)}}, TEST),
    "a step that is a text": ({"global_step": "os.system"}, RESUME),
    "loops that are a list": ({"loops": [1]}, RESUME),
    "an optimiser that is a text": ({"optimizer_states": "os.system"}, RESUME),
    "what was asked of an optimiser as a list": ({"optimizer": [1]}, RESUME),
    "callbacks that are a list": ({"callbacks": [1]}, RESUME),
    "a place in the epoch that is none": ({"callbacks": {"Last": {}}}, RESUME),
    "a place in the epoch that is two": ({"callbacks": {"Last": TWO}}, RESUME),
    "a version that is a list": ({"pytorch-lightning_version": [1]}, RESUME),
}


def checkpoints() -> Iterator[Attack]:
    """Yield an attack for each gadget, place and format."""
    doors = (TEST, EXPORT, RESUME, PREDICT, VALIDATE)
    for i, (name, gadget) in enumerate(GADGETS.items()):
        put = PLACES["containers"][0]
        yield Attack("checkpoint", f"calls {name}", checkpoint(doors[i % len(doors)], gadget, put=put))
    for name, (put, command) in PLACES.items():
        yield Attack("checkpoint", f"code in {name}", checkpoint(command, put=put))
    for i, (name, save) in enumerate(FORMATS.items()):
        yield Attack("checkpoint", f"a file {name}", checkpoint(doors[i % len(doors)], save=save))
    yield Attack("checkpoint", "by --ckpt_path", checkpoint([*TEST, "--ckpt_path", str(CHECKPOINTS / "best.ckpt")]))
    yield Attack("checkpoint", "of SLURM's", by_slurm)
    elsewhere = checkpoint(RESUME, module_outside, put=removing)
    yield Attack("checkpoint", "whose best one is outside", elsewhere, "harmless")
    yield Attack("checkpoint", "a trillion numbers", checkpoint(TEST, huge, put=weight))
    endless = torch.zeros(1).expand(1 << 40)
    yield Attack("checkpoint", "one number a trillion times", checkpoint(TEST, lambda place: endless, put=weight))
    escapes = {"facts": {"labels": ESCAPE}}
    yield Attack("checkpoint", "facts with an escape", checkpoint(TEST, put=functools.partial(merged, escapes)))
    named = {"state_dict": {ESCAPE: torch.zeros(1)}}
    yield Attack("checkpoint", "names with an escape", checkpoint(TEST, put=functools.partial(merged, named)))
    for name, (change, command) in MALFORMED.items():
        yield Attack("checkpoint", name, checkpoint(command, put=functools.partial(merged, change)))


# Weights


def weights(name: str, write: Callable[[Place, Path], object]) -> Callable[[Place], list[str]]:
    """Return a maker of a fit that starts from a file of weights."""

    def make(place: Place) -> list[str]:
        write(place, place.folder / name)
        return [*FIT, "--model.init_args.weights", name]

    return make


def tensors(header: object, data: bytes = bytes(64), length: int | None = None) -> Callable[[Place, Path], object]:
    """Return a writer of a safetensors file, which may be malformed."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(text) if length is None else length) + text + data
    return lambda place, path: path.write_bytes(content)


def tensor(shape: list[int], start: int, end: int, kind: str = "F32") -> dict:
    """Return an entry of a safetensors header."""
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


def inflated(place: Place, path: Path) -> None:
    """Write an archive that inflates to a thousand times its size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(64 << 20))
        file.writestr("archive/version", "3\n")


def poisoned_run(place: Place) -> list[str]:
    """Poison a run and fit with weights from its folder."""
    poisoned(place, touches(place))
    return [*FIT, "--model.init_args.weights", "run"]


HEADERS: dict[str, Callable[[Place, Path], object]] = {
    "whose header is an exabyte": tensors({}, length=1 << 60),
    "whose header is no JSON": tensors(b"\x80\x04cos\nsystem\n"),
    "whose header is nested": tensors(b'{"a":' + b"[" * 100_000),
    "with bytes beyond its end": tensors({"c1.weight": tensor([16], 0, 1 << 40)}),
    "with bytes before its start": tensors({"c1.weight": tensor([16], -64, 0)}),
    "with bytes that overlap": tensors({"a": tensor([16], 0, 64), "b": tensor([8], 32, 64)}),
    "of a trillion numbers": tensors({"c1.weight": tensor([1 << 40], 0, 64)}),
    "of more numbers than there are": tensors({"c1.weight": tensor([1 << 62, 1 << 62], 0, 64)}),
    "of an unknown type": tensors({"c1.weight": tensor([16], 0, 64, "os.system")}),
    "with an escape in a name": tensors({ESCAPE: tensor([16], 0, 64)}),
    "that is a pickle": lambda place, path: plain(touches(place), path),
}


def weight_files() -> Iterator[Attack]:
    """Yield attacks for each format of weights."""
    for suffix in ("pt", "pth", "bin"):
        yield Attack(
            "weights",
            f"code in a .{suffix}",
            weights(f"a.{suffix}", lambda place, path: torch.save({"c1.weight": touches(place)}, path)),
        )
    for name, save in FORMATS.items():
        yield Attack(
            "weights",
            f"a .pt {name}",
            weights("a.pt", lambda place, path, save=save: save({"c1.weight": touches(place)}, path)),
        )
    for name, write in HEADERS.items():
        yield Attack("weights", f"a .safetensors {name}", weights("a.safetensors", write))
    yield Attack("weights", "an archive that inflates", weights("a.pt", inflated))
    for name, value in {"names that are numbers": {1: torch.zeros(1)}, "a list": [torch.zeros(1)]}.items():
        yield Attack("weights", name, weights("a.pt", lambda place, path, value=value: torch.save(value, path)))
    yield Attack("weights", "code in a run's checkpoint", poisoned_run)
    for url in ("http://127.0.0.1:9/a.pt", "hf://a/b.safetensors", "s3://a/b.pt", "file:///dev/zero"):
        yield Attack("weights", f"{url.split(':')[0]} in the place of a file", lambda place, url=url: [*FIT, *of(url)])


def of(url: str) -> list[str]:
    """Return the option that names the weights."""
    return ["--model.init_args.weights", url]


# Configs


def put(config: dict, key: str, value: object) -> None:
    """Set a key such as model.init_args.weights."""
    *above, last = key.split(".")
    for part in above:
        config = config.setdefault(part, {})
    config[last] = value


def filled(text: str, place: Place) -> str:
    """Fill in the placeholders of an attack."""
    return text.replace("@OUTSIDE@", str(place.outside)).replace("@CANARY@", opens(place))


def config(changes: dict[str, object], first: str = "") -> Callable[[Place], list[str]]:
    """Return a maker of a config with some keys changed and with `first` as YAML at the top."""

    def make(place: Place) -> list[str]:
        changed = yaml.safe_load(CONFIG.read_text())
        for key, value in (SHORT | changes).items():
            put(changed, key, value)
        (place.folder / "attack.yaml").write_text(filled(first + yaml.safe_dump(changed), place))
        return ["fit", "--config", "attack.yaml"]

    return make


def config_of_a_run(command: list[str], key: str, value: object) -> Callable[[Place], list[str]]:
    """Return a maker that changes a key in the config of a run."""

    def make(place: Place) -> list[str]:
        path = place.run / "config.yaml"
        changed = yaml.safe_load(path.read_text())
        put(changed, key, value)
        path.write_text(filled(yaml.safe_dump(changed), place))
        return command

    return make


def nested_config_of_a_run(place: Place) -> list[str]:
    """Put deeply nested brackets into the config of a run."""
    (place.run / "config.yaml").write_text(f"model: {'[' * 5000}{']' * 5000}\n")
    return EXPORT


def named(path: str, /, **arguments: object) -> dict:
    """Return a class and its arguments as in a config."""
    return {"class_path": path, "init_args": arguments}


NETWORK_KEY, OPTIMIZER, SCHEDULE = (f"model.init_args.{name}" for name in ("network", "optimizer", "lr_scheduler"))
TOUCH = {"command": "touch @OUTSIDE@/canary"}
BUILT = "lightning.pytorch."

# Places where a class or function can be named, each with one that is not in the allow-list.
CLASSES: dict[str, dict[str, object]] = {
    "os.system, the model": {"model": named("os.system", **TOUCH)},
    "os.system, the network": {NETWORK_KEY: named("os.system", **TOUCH)},
    "posix.system, the optimiser": {OPTIMIZER: named("posix.system", **TOUCH)},
    "subprocess.Popen, the schedule": {SCHEDULE: named("subprocess.Popen", args=["touch", "@OUTSIDE@/canary"])},
    "builtins.exec, the data": {"data": named("builtins.exec", source="@CANARY@")},
    "builtins.eval, a callback": {"trainer.callbacks": [named("builtins.eval", source="@CANARY@")]},
    "importlib.import_module, the profiler": {"trainer.profiler": named("importlib.import_module", name=MODULE)},
    "a class of another package, the strategy": {"trainer.strategy": f"{MODULE}.Strategy"},
    "runpy.run_path, a plugin": {"trainer.plugins": [named("runpy.run_path", path_name=f"@OUTSIDE@/{MODULE}.py")]},
    "torch.hub.load, the network": {NETWORK_KEY: named("torch.hub.load", repo_or_dir="@OUTSIDE@", model="a")},
    "torch.load, the network": {NETWORK_KEY: named("torch.load", f="@OUTSIDE@/secret.yaml", weights_only=False)},
    "pickle.loads, the preprocessing": {"model.init_args.preprocess": named("pickle.loads", data="x")},
    "shutil.rmtree, the accelerator": {"trainer.accelerator": named("shutil.rmtree", path="@OUTSIDE@")},
    "torch.ops.load_library, a callback": {"trainer.callbacks": [named("torch.ops.load_library", path="@OUTSIDE@/a")]},
    "torch.utils.cpp_extension.load, the network": {NETWORK_KEY: named("torch.utils.cpp_extension.load", name="a")},
    "this project's own commands": {NETWORK_KEY: named("dlref.cli.train", arguments=["fit"])},
    "Lightning's logger": {"trainer.logger": named(f"{BUILT}loggers.CSVLogger", save_dir="@OUTSIDE@")},
    "Lightning's checkpoint reader": {"trainer.plugins": [f"{BUILT}plugins.io.TorchCheckpointIO"]},
    "a class in an argument": {
        "trainer.strategy": named(f"{BUILT}strategies.SingleDeviceStrategy", checkpoint_io=f"{MODULE}.IO")
    },
    "a function in an argument": {
        SCHEDULE: named("torch.optim.lr_scheduler.LambdaLR", lr_lambda=named("os.system", **TOUCH))
    },
    "a function in a module": {NETWORK_KEY: named("torch.nn.TransformerEncoderLayer", activation="os.system")},
    "os through a module that is allowed": {NETWORK_KEY: named("dlref.data.language.os.system", **TOUCH)},
    "torch through torch.nn": {NETWORK_KEY: named("torch.nn.functional.torch.load", f="@OUTSIDE@/secret.yaml")},
    "torch.hub through torch.nn": {NETWORK_KEY: named("torch.nn.functional.torch.hub.load", repo_or_dir="@OUTSIDE@")},
    "torch.from_file through torch.nn": {
        NETWORK_KEY: named("torch.nn.functional.torch.from_file", filename="@OUTSIDE@/new", shared=True, size=9)
    },
    "functools.partial through torch.optim": {OPTIMIZER: named("torch.optim.optimizer.functools.partial")},
    "torch.load through the tasks": {NETWORK_KEY: named("dlref.tasks.task.torch.load", f="@OUTSIDE@/secret.yaml")},
    "pickle through the training": {NETWORK_KEY: named("dlref.training.weights.pickle.loads", data="x")},
    "shutil through Lightning": {
        "trainer.callbacks": [named(f"{BUILT}callbacks.model_checkpoint.shutil.rmtree", path="@OUTSIDE@")]
    },
    "numpy.load through the data": {"data": named("dlref.data.tokens.np.load", file="@OUTSIDE@/a", allow_pickle=True)},
    "a method of a class": {NETWORK_KEY: named("torch.nn.Module.load_state_dict")},
    "a name with letters of another alphabet": {NETWORK_KEY: named("ｏs.system", **TOUCH)},
}


def called(path: str, /, **arguments: object) -> dict[str, object]:
    """Return a config for a function that is called, with given arguments, while a callback is made."""
    return {"trainer.callbacks": [named(f"{BUILT}callbacks.LambdaCallback", on_fit_start=named(path, **arguments))]}


def callback(name: str, /, **arguments: object) -> dict[str, object]:
    """Return a config for a callback of Lightning."""
    return {"trainer.callbacks": [named(f"{BUILT}callbacks.{name}", **arguments)]}


# Classes and functions that are in the allow-list but can do harm.
FETCHED = {"urls": ["file://@OUTSIDE@/secret.yaml"], "path": "@OUTSIDE@/new", "md5": "0" * 32}
WITHIN: dict[str, dict[str, object]] = {
    "a download": called("dlref.data.download.fetch", **FETCHED),
    "a download, the distance of a loss": {
        NETWORK_KEY: named(
            "torch.nn.TripletMarginWithDistanceLoss", distance_function=named("dlref.data.download.fetch", **FETCHED)
        )
    },
    "a text that is written": called("dlref.tasks.figures.continuations", path="@OUTSIDE@/new", rows=[["a", "b"]]),
    "a table that is written": called("dlref.tasks.figures.samples", path="@OUTSIDE@/new", rows=[], notes=["a"]),
    "an import": called("torch.nn.attention._fa3._fa3_import_module", module_path=MODULE),
    "a function that is called later": callback("LambdaCallback", on_fit_start="torch.nn.functional.relu"),
    "a profile elsewhere": {
        "trainer.profiler": named(f"{BUILT}profilers.SimpleProfiler", dirpath="@OUTSIDE@", filename="new")
    },
    "statistics elsewhere": {
        "trainer.profiler": named(f"{BUILT}profilers.AdvancedProfiler", dirpath="@OUTSIDE@", dump_stats=True)
    },
    "a checkpoint elsewhere": callback("ModelCheckpoint", dirpath="@OUTSIDE@", every_n_train_steps=1),
    "a checkpoint above": callback("ModelCheckpoint", filename="../../../../outside/new", every_n_train_steps=1),
    "a checkpoint by its whole path": callback("ModelCheckpoint", filename="@OUTSIDE@/new", every_n_train_steps=1),
    "a checkpoint by the name of a field": callback("ModelCheckpoint", filename="..{/new}", every_n_train_steps=1),
    "a checkpoint by letters": callback(
        "ModelCheckpoint",
        filename="..{step:c}..{step:c}..{step:c}outside{step:c}new",
        auto_insert_metric_name=False,
        every_n_train_steps=ord("/"),
    )
    | {"trainer.limit_train_batches": 50, "data.init_args.batch_size": 16},
    "a checkpoint on a server": callback("ModelCheckpoint", dirpath="http://127.0.0.1:9/new", every_n_train_steps=1),
    "a checkpoint at an error": callback("OnExceptionCheckpoint", dirpath="@OUTSIDE@")
    | {"model.init_args.weights": "gone.pt"},
    "batches to pass over, elsewhere": callback(
        "spike.SpikeDetection", exclude_batches_path="@OUTSIDE@/new.json", rtol=0.0, mode="max"
    ),
    "a best checkpoint elsewhere": {
        "trainer.callbacks": [
            named("dlref.training.checkpoints.BestCheckpoint", folder="@OUTSIDE@", metric="val/loss", mode="min")
        ]
    },
    "the log of another program": {"trainer.default_root_dir": "@OUTSIDE@"},
}

# References from a config to other files and settings, and features of YAML.
REFERENCES: dict[str, tuple[dict[str, object], str]] = {
    "a config in the place of the model": ({"model": "@OUTSIDE@/secret.yaml"}, ""),
    "a config in the place of the network": ({NETWORK_KEY: "@OUTSIDE@/secret.yaml"}, ""),
    "a config in the place of the data": ({"data": "../outside/secret.yaml"}, ""),
    "a config in the place of the trainer": ({"trainer": "@OUTSIDE@/secret.yaml"}, ""),
    "a config in the place of the best": ({"best": "@OUTSIDE@/secret.yaml"}, ""),
    "a config in a list": ({"trainer.callbacks": ["@OUTSIDE@/secret.yaml"]}, ""),
    "a config in a config": ({"config": "@OUTSIDE@/secret.yaml"}, ""),
    "a config from a server": ({"model": "http://127.0.0.1:9/model.yaml"}, ""),
    "the environment": ({"model.init_args.weights": "${oc.env:DLREF_SECRET}"}, ""),
    "the environment, as a shell has it": ({"model.init_args.weights": "$DLREF_SECRET"}, ""),
    "a file by @": ({"model.init_args.weights": "@@OUTSIDE@/secret.yaml"}, ""),
    "a tag that calls": ({}, "a: !!python/object/apply:os.system ['touch @OUTSIDE@/canary']\n"),
    "a tag that makes": ({}, f"a: !!python/object/new:{MODULE}.A []\n"),
    "a tag that imports": ({}, f"a: !!python/module:{MODULE}\n"),
    "a tag that includes": ({}, "a: !include @OUTSIDE@/secret.yaml\n"),
    "anchors that multiply": (
        {},
        "a: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 6)),
    ),
    "an anchor in itself": ({}, "a: &a [*a]\n"),
    "nesting": ({}, f"a: {'[' * 5000}{']' * 5000}\n"),
    "an escape in a key": ({ESCAPE: 1}, ""),
}


def configs() -> Iterator[Attack]:
    """Yield the attacks of the tables, and those on the config of a run."""
    for name, changes in (CLASSES | WITHIN).items():
        yield Attack("config", name, config(changes))
    for name, (changes, first) in REFERENCES.items():
        yield Attack("config", name, config(changes, first))
    for command, key in ((EXPORT, "model"), (EXPORT, "data"), (TEST, "model"), (PREDICT, "data")):
        bad = named("os.system", **TOUCH)
        yield Attack("config", f"of a run, the {key} of {command[0]}", config_of_a_run(command, key, bad))
    bad = named(
        "torch.nn.TripletMarginWithDistanceLoss", distance_function=named("dlref.data.download.fetch", **FETCHED)
    )
    yield Attack("config", "of a run, a download", config_of_a_run(EXPORT, NETWORK_KEY, bad))
    for name, key in {"model": "model", "network": NETWORK_KEY}.items():
        change = config_of_a_run(EXPORT, key, "@OUTSIDE@/secret.yaml")
        yield Attack("config", f"of a run, a config in the place of the {name}", change)
    tag = "!!python/object/apply:os.system"
    yield Attack("config", "of a run, a text that looks like a tag", config_of_a_run(EXPORT, "model", tag))
    yield Attack("config", "of a run, nesting", nested_config_of_a_run)


# Tokenisers and vocabularies

TEXTS = ROOT / "configs" / "gpt_shakespeare_char_cpu.yaml"
BPE = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None}
BPE |= {"decoder": None, "truncation": None, "padding": None}


def tokenizer(content: object) -> Callable[[Place], list[str]]:
    """Return a maker of a fit on texts whose tokeniser is read from a file."""

    def make(place: Place) -> list[str]:
        (place.folder / "text.txt").write_text("a text to train from\n" * 50)
        text = content(place) if callable(content) else json.dumps(content)
        (place.folder / "tokenizer.json").write_bytes(text if isinstance(text, bytes) else filled(text, place).encode())
        options = {"root": ".", "train": "text.txt", "tokenizer": "tokenizer.json", "context_length": 8}
        given = [word for key, value in options.items() for word in (f"--data.init_args.{key}", str(value))]
        small = ["--model.init_args.network.init_args.context_length", "8", *given, *SHORTLY]
        return ["fit", "--config", str(TEXTS), "--run", "new", *small]

    return make


def vocabulary(numbers: object) -> Callable[[Place], list[str]]:
    """Return a maker of a fit on SageMaker's tokens, whose vocabularies are read from files."""

    def make(place: Place) -> list[str]:
        for side in ("src", "trg"):
            (place.folder / f"vocab.{side}.json").write_text(json.dumps(numbers))
        (place.folder / "a.rec").write_bytes(recordio(packed([9], [9])))
        data = named("dlref.data.SageMakerTokens", train="a.rec", validation="a.rec", vocab=".")
        base = str(ROOT / "configs" / "seq2seq_dates.yaml")
        return ["fit", "--config", base, "--run", "new", *SHORTLY, "--data", json.dumps(data)]

    return make


FIRST = {token: number for number, token in enumerate(SPECIAL)}
CHARACTERS = {"kind": "character", "exact": True, "tokens": [*SPECIAL, *sorted(set("a text to train from\n"))]}
TOKENIZERS: dict[str, object] = {
    "a pickle": lambda place: pickle.dumps(touches(place)),
    "files in the place of a vocabulary": BPE
    | {"model": {"type": "BPE", "vocab": "@OUTSIDE@/secret.yaml", "merges": "@OUTSIDE@/secret.yaml"}},
    "merges of tokens that are not there": BPE | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}},
    "a number beyond all": BPE | {"model": {"type": "BPE", "vocab": {"</s>": 1 << 60}, "merges": []}},
    "a template with names that are not there": BPE
    | {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}},
    "an expression without end": BPE
    | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?=("}, "behavior": "Isolated", "invert": False}},
    "a replacement of everything": BPE
    | {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "x"},
        "model": {"type": "BPE", "vocab": FIRST, "merges": []},
    },
    "code in a class": {"kind": "bpe", "exact": True, "model": "os.system", "class_path": "os.system"},
    "an unknown kind": {"kind": "os.system", "exact": True},
    "tokens that are no texts": {"kind": "character", "exact": True, "tokens": [*SPECIAL, {"a": 1}]},
    "tokens that are a path": {"kind": "character", "exact": True, "tokens": "@OUTSIDE@/secret.yaml"},
    "half of a surrogate pair": {"kind": "character", "exact": True, "tokens": [*SPECIAL, "\ud800"]},
    "nesting": lambda place: b"[" * 200_000,
    "nesting in an object": lambda place: b'{"kind":' + b"[" * 200_000,
}


def tokenizers() -> Iterator[Attack]:
    """Yield the attacks by tokenisers and vocabularies."""
    for name, content in TOKENIZERS.items():
        yield Attack("tokeniser", name, tokenizer(content))
    ways = CHARACTERS | {"tokens": [*CHARACTERS["tokens"], ESCAPE, "../../outside/new"]}
    yield Attack("tokeniser", "tokens that are escapes and paths", tokenizer(ways), "harmless")
    for name, numbers in {
        "numbers that leave some out": FIRST | {"a": 1 << 60},
        "numbers below zero": FIRST | {"a": -1},
        "numbers that are texts": FIRST | {"a": "os.system"},
        "names that are paths, without the records' tokens": FIRST | {"../../outside/new": 4},
    }.items():
        yield Attack("tokeniser", f"a vocabulary with {name}", vocabulary(numbers))


# Bundles and their inputs


def bundle(change: Callable[[Path], object], *more: str) -> Callable[[Place], list[str]]:
    """Return a maker of a changed bundle that gets a picture; see `handmade`."""

    def make(place: Place) -> list[str]:
        change(make_bundle(place.folder / "bundle"))
        Image.fromarray(np.zeros((4, 6), np.uint8)).save(place.folder / "picture.png")
        return ["runtime", "bundle", "picture.png", *more]

    return make


def graph(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    """Return a function that changes the graph and writes a matching manifest."""

    def damage(folder: Path) -> None:
        model = onnx.load(folder / "classify.onnx")
        change(model)
        onnx.save(model, folder / "classify.onnx")
        write_manifest(folder)

    return damage


def hard_link(folder: Path) -> None:
    """Add a file for a weight that is a hard link to the secret (CVE-2026-34446)."""
    os.link(folder.parent.parent / "outside" / "secret.yaml", folder / "weights.bin")


def external(location: str) -> Callable[[onnx.ModelProto], object]:
    """Return a function that stores the bytes of a weight in another file."""

    def change(model: onnx.ModelProto) -> None:
        white = next(tensor for tensor in model.graph.initializer if tensor.name == "white")
        white.ClearField("float_data")
        white.data_location = TensorProto.EXTERNAL
        white.external_data.add(key="location", value=location)

    return change


def strange_operator(model: onnx.ModelProto) -> None:
    """Give an operator an escape as its name, which an error of onnxruntime repeats."""
    model.graph.node[0].op_type = model.graph.node[0].name = ESCAPE


def strange_output(model: onnx.ModelProto) -> None:
    """Give an output an escape as its name, which an error of dlref repeats."""
    model.graph.node[-1].output[0] = model.graph.output[0].name = ESCAPE


def labelled(*labels: str) -> Callable[[Path], object]:
    """Return a function that renames the classes."""
    return lambda folder: write_manifest(folder, metadata=METADATA | {"labels": list(labels)})


def language_bundle(place: Place, tokens: list[str]) -> None:
    """Write a bundle of a language model that generates the first token after the special ones, repeatedly."""
    shapes = {"tokens": ["b", "t"], "back": ["b", "w"], "length": ["b"]}
    past = {"key_0": ["b", 1, "p", 1], "value_0": ["b", 1, "p", 1]}
    outputs = {"logits": ["b", "w", len(tokens)], "present": [1, 2, "b", 1, "t", 1]}
    nodes = [
        helper.make_node("Shape", ["back"], ["asked"]),
        helper.make_node("Concat", ["asked", "many"], ["wide"], axis=0),
        helper.make_node("Expand", ["row", "wide"], ["logits"]),
        helper.make_node("Shape", ["tokens"], ["rows"], end=1),
        helper.make_node("Shape", ["tokens"], ["columns"], start=1),
        helper.make_node("Concat", ["pair", "rows", "one", "columns", "one"], ["size"], axis=0),
        helper.make_node("ConstantOfShape", ["size"], ["present"]),
    ]
    row = [float(number == len(SPECIAL)) for number in range(len(tokens))]
    constants = [
        helper.make_tensor("many", TensorProto.INT64, [1], [len(tokens)]),
        helper.make_tensor("row", TensorProto.FLOAT, [len(tokens)], row),
        helper.make_tensor("pair", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in shapes.items()]
    values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in past.items()]
    answers = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "decode", values, answers, constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    folder = make_bundle(place.folder / "bundle")
    onnx.save(model, folder / "classify.onnx")
    described = {"file": "classify.onnx", "inputs": [{"name": name} for name in shapes | past]}
    write_manifest(
        folder,
        kind="language",
        graphs={"decode": described | {"outputs": [{"name": name} for name in outputs]}},
        metadata={"context_length": 64, "tokenizer": {"kind": "character", "exact": True, "tokens": tokens}},
    )


def told(tokens: list[str], *asked: str) -> Callable[[Place], list[str]]:
    """Return a maker of a language bundle with these tokens and its command line."""

    def make(place: Place) -> list[str]:
        language_bundle(place, [*SPECIAL, *tokens])
        (place.folder / "request.json").write_text(json.dumps({"inputs": str(place.secret)}))
        return ["runtime", "bundle", "--max-new-tokens", "3", *asked]

    return make


def picture(content: bytes, name: str = "input.png") -> Callable[[Place], list[str]]:
    """Return a maker of a bundle that gets a malicious file as its input."""

    def make(place: Place) -> list[str]:
        make_bundle(place.folder / "bundle")
        (place.folder / name).write_bytes(content)
        return ["runtime", "bundle", name]

    return make


def listed(name: str) -> Callable[[Place], list[str]]:
    """Return a maker of a fit on a manifest that names a picture elsewhere."""

    def make(place: Place) -> list[str]:
        (place.folder / "a.manifest").write_text(json.dumps({"source-ref": name, "class": 1}) + "\n")
        data = named("dlref.data.ImageManifest", train="a.manifest", val="a.manifest")
        return [*FIT, "--data", json.dumps(data)]

    return make


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bundles() -> Iterator[Attack]:
    """Yield the damaged bundles of test_damaged_bundles, and others."""
    for name, (damage, _) in DAMAGE.items():
        yield Attack("bundle", name, bundle(damage))
    for name, change in {
        "a hard link to a file outside": hard_link,
        "weights by a hard link": lambda folder: (hard_link(folder), graph(external("weights.bin"))(folder)),
        "weights two folders above": graph(external("bundle/../../outside/secret.yaml")),
        "an escape in an operator": graph(strange_operator),
        "an escape in an output": graph(strange_output),
        "an escape in the kind": lambda folder: write_manifest(folder, kind=ESCAPE),
        "an escape in a file's name": lambda folder: (folder / ESCAPE).touch(),
        "a hidden file": lambda folder: (folder / ".secret").touch(),
        "a folder": lambda folder: (folder / "more").mkdir(),
    }.items():
        yield Attack("bundle", name, bundle(change))
    for name, labels in {
        "labels that are escapes": (ESCAPE, "\x9b31m"),
        "labels that are paths": ("../../outside/new", "/etc/passwd"),
    }.items():
        yield Attack("bundle", name, bundle(labelled(*labels)), "harmless")
    inside = bundle(labelled(*LABELS), "--output", "bundle/new.png")
    yield Attack("bundle", "an answer into the bundle", inside)
    yield Attack("bundle", "a text that is an escape", told([ESCAPE], "--prompt", "a"), "harmless")
    yield Attack("bundle", "a text that is an escape, as a record", told([ESCAPE], "a"), "harmless")


def inputs() -> Iterator[Attack]:
    """Yield malicious inputs for a device, and lists that name pictures elsewhere."""
    yield Attack("input", "a request whose text is a file's name", told(["a"], "request.json"), "harmless")
    yield Attack("input", "PostScript", picture(POSTSCRIPT, "input.eps"))
    yield Attack("input", "PostScript that is called a PNG", picture(POSTSCRIPT))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    yield Attack("input", "a picture of gigabytes", picture(PNG + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")))
    yield Attack("input", "a picture that is a pickle", picture(pickle.dumps(Bomb(os.system, "true"))))
    for url in ("s3://bucket/a.png", "http://127.0.0.1:9/a.png", "file:///etc/passwd"):
        yield Attack("input", f"a list that names a picture by {url.split(':')[0]}", listed(url))


def honest() -> Iterator[Attack]:
    """Yield harmless files: if these were refused, refusing the malicious ones would prove nothing."""
    yield Attack("honest", "a checkpoint", lambda place: VALIDATE, "harmless")
    yield Attack("honest", "a checkpoint to go on from", lambda place: RESUME, "harmless")
    yield Attack("honest", "weights", weights("a.pt", in_torch), "harmless")
    yield Attack("honest", "weights of safetensors", weights("a.safetensors", in_safetensors), "harmless")
    yield Attack("honest", "a config", config({}), "harmless")
    yield Attack("honest", "a tokeniser", tokenizer(CHARACTERS), "harmless")
    yield Attack("honest", "a bundle", bundle(lambda folder: None), "harmless")
    yield Attack("honest", "a language model", told(["a"], "a"), "harmless")


def in_torch(place: Place, path: Path) -> None:
    """Save weights with torch.save."""
    torch.save(LeNet5(10, activation="relu").state_dict(), path)


def in_safetensors(place: Place, path: Path) -> None:
    """Save weights as safetensors."""
    save_file(LeNet5(10, activation="relu").state_dict(), path)


ATTACKS = {
    f"{attack.group}: {attack.name}": attack
    for attack in (*checkpoints(), *weight_files(), *configs(), *tokenizers(), *bundles(), *inputs(), *honest())
}


# The control: violations made on purpose must be detected


def make_base(folder: Path) -> Path:
    """Train the run that the attacks poison. This also fills the libraries' caches, so that attacks do not."""
    (folder / "cache").mkdir(parents=True)
    os.environ["MPLCONFIGDIR"] = str(folder / "cache")
    with shown():
        code = typed(["fit", "--config", str(CONFIG), "--run", str(folder / "run"), *SHORTLY])
    if code:
        raise RuntimeError("the run that is to be attacked could not be trained")
    return folder


def controls(place: Place) -> dict[str, tuple[str, Callable[[], object]]]:
    """Return violations that must be detected: name -> the kind of problem, and a function that causes it."""
    return {
        "a checkpoint that is unpickled": (
            "executed",
            lambda: torch.load(poisoned(place, touches(place)), weights_only=False),
        ),
        "a command": ("executed", lambda: os.system("true")),
        "code in a text": ("executed", lambda: eval("'canary'")),
        "the canary": ("executed", place.canary.touch),
        "a module": ("executed", lambda: __import__(MODULE)),
        "the secret": ("read", place.secret.read_text),
        "the secret, by native code": ("read", lambda: onnxruntime.InferenceSession(place.secret)),
        "the secret, printed": ("read", lambda: print(SECRET)),
        "a file outside": ("written", lambda: (place.outside / "new").write_text("")),
        "a file outside, gone": ("written", (place.outside / f"{MODULE}.py").unlink),
    }


def missed(folder: Path) -> list[str]:
    """Return the names of the deliberate violations that were not detected."""
    names = controls(at(folder / "names", None))
    unseen = []
    for number, name in enumerate(names):
        place = at(folder / str(number), None)
        kind, act = controls(place)[name]
        _, problems = watched(place, functools.partial(quietly, act))
        if kind not in dict(problems):
            unseen.append(name)
    return unseen


def quietly(act: Callable[[], object]) -> None:
    """Call a function and ignore its errors."""
    with contextlib.suppress(Exception):
        act()


# All of them


def main(word: str = "") -> int:
    """Return 0, or 1 if an attack succeeds or the watch misses a violation."""
    console, outcomes = Console(), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        base, unseen = make_base(folder / "base"), missed(folder / "controls")
        chosen = {name: attack for name, attack in ATTACKS.items() if word in name}
        for number, name in enumerate(track(chosen, "attacks", console=Console(stderr=True), auto_refresh=False)):
            outcomes[name] = attacked(chosen[name], folder / str(number), base)
            shutil.rmtree(folder / str(number))
    console.print(tally(outcomes))
    for name, outcome in outcomes.items():
        for kind, what in dict(reversed(outcome.problems)).items():  # only the first of each kind
            console.print(f"{name}: {KINDS[kind]}: {what!r}", markup=False, soft_wrap=True)
    console.print(f"done on purpose and not noticed: {', '.join(unseen) or 'nothing'}")
    return int(bool(unseen) or any(outcome.problems for outcome in outcomes.values()))


def tally(outcomes: dict[str, Outcome]) -> Table:
    """Return a table with a row for each group."""
    table = Table(
        Column("group", no_wrap=True),
        "attacks",
        "refused in one line",
        "harmless",
        *KINDS.values(),
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    groups = list(dict.fromkeys(ATTACKS[name].group for name in outcomes))
    for group in [*groups, "all attacks"]:
        members = {group} if group in groups else set(groups) - {"honest"}
        found = [outcome for name, outcome in outcomes.items() if ATTACKS[name].group in members]
        ended = [sum(outcome.ended == how for outcome in found) for how in ("refused", "harmless")]
        kinds = [sum(kind in dict(outcome.problems) for outcome in found) for kind in KINDS]
        table.add_row(group, *map(str, [len(found), *ended, *kinds]))
    return table


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
