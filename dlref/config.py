"""Parse configs, and refuse in one line any config whose objects are not safe to build.

A class named in a config is code that runs, so a config may name only a few classes, and nothing but classes.
"""

import codecs
import inspect
import locale
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from pydoc import locate
from types import NoneType
from typing import Any, get_args

from jsonargparse import Namespace, _optionals, set_parsing_settings
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.enums import LightningEnum
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import ModelParallelStrategy

from dlref.runtime import UserError

ALLOWED_CLASS_PATHS = [
    "dlref.data",
    "dlref.models",
    "dlref.tasks",
    "torch.nn",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
]
PREFIXES = tuple(f"{path}." for path in ALLOWED_CLASS_PATHS)
ALLOWED = ", ".join(ALLOWED_CLASS_PATHS)
PRECISIONS = ("None", "32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")
LENGTHS = ("total_steps", "total_iters", "T_max", "T_0")  # schedules' names for the number of steps
RESERVED = ("best", "last", "previous")  # names of checkpoints that a run writes itself
# Fields allowed in a checkpoint's filename. Others are unsafe: {step:c} inserts a character by its number, such as /.
FIELD = re.compile(r"\{([\w/]+)(:[.\d]{0,3}[defg]?)?\}")
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=ALLOWED_CLASS_PATHS)
set_parsing_settings(config_read_mode_fsspec_enabled=False)  # Lightning allows configs from servers


def whole_numbers_first(annotations: dict[str, object]) -> None:
    """Read 1 as one batch and 1.0 as all batches, as Lightning intends.

    Python's typing caches the first of two equal unions: if another package has written "float or int" before,
    Lightning's "int or float" becomes the same, and every 1 would be read as 1.0.
    """
    for name, kind in annotations.items():
        for whole_first in (int | float, int | float | None):
            if kind == whole_first:
                annotations[name] = whole_first


whole_numbers_first(Trainer.__init__.__annotations__)


@contextmanager
def no_other_configs() -> Iterator[None]:
    """Keep jsonargparse from reading a file wherever a config has text for a class or a group.

    Only the command line may name config files. jsonargparse has no public switch for this.
    """
    mode, _optionals._config_read_mode = _optionals._config_read_mode, "fF"  # a file and not a file: no path matches
    try:
        yield
    finally:
        _optionals._config_read_mode = mode


def parts_of(value: object) -> Iterator[object]:
    """Yield a config and everything in it, with namespaces as dicts."""
    value = vars(value) if isinstance(value, Namespace) else value
    yield value
    within = value.values() if isinstance(value, dict) else value
    for part in within if isinstance(value, dict | list | tuple) else ():
        yield from parts_of(part)


def check_parts(config: Namespace) -> None:
    """Raise UserError for parts that a config must not name although their module is allowed.

    A function would be called with the config's arguments while objects are built, and some functions write files.
    An object with a folder of its own would write outside the run's folder.
    """
    for part in parts_of(config):
        if inspect.isroutine(part):
            raise UserError(f"{part.__module__}.{part.__qualname__}: a function; expected a class of {ALLOWED}")
        if isinstance(part, dict):
            check_part(part)


def enums_as_text(config: Namespace) -> None:
    """Replace Lightning's enums, defaults of its callbacks, with their text: jsonargparse cannot write enums."""
    for part in list(parts_of(config)):
        if isinstance(part, dict):
            part |= {key: value.value for key, value in part.items() if isinstance(value, LightningEnum)}


def for_configs(path: str) -> bool:
    """Return whether `path` is a class for configs.

    Classes of this project must be exported. SpikeDetection is excluded, since it can write anywhere.
    """
    named = locate(path) if path.startswith(PREFIXES) else None
    if not inspect.isclass(named) or named is SpikeDetection:
        return False
    package = locate(".".join(path.split(".")[:2]))
    return not path.startswith("dlref.") or getattr(package, named.__name__, None) is named


def check_part(part: dict) -> None:
    """Raise UserError for a class that is not for configs, and for a place to write."""
    path, folder, name, last = (part.get(key) for key in ("class_path", "dirpath", "filename", "save_last"))
    if isinstance(path, str):
        if not for_configs(path):
            raise UserError(f"{path}: not a class for configs; expected one exported by {ALLOWED}")
        check_values(path, part.get("init_args") or {})
    named = FIELD.sub(r"\1", name) if isinstance(name, str) else ""
    if last or os.path.normpath(named) in RESERVED:
        what = f"save_last {last}" if last else f"filename {name}"
        raise UserError(f"{what}: the run itself writes {', '.join(RESERVED)}.ckpt; expected another name")
    if folder is not None or Path(named).anchor or ".." in Path(named).parts or "{" in named:
        raise UserError(
            f"dirpath {folder}, filename {name}: a run writes into its own folder; expected none, see --run"
        )


def check_values(path: str, arguments: Namespace | dict) -> None:
    """Raise UserError for an argument without a value that needs one, such as `lr:`, which jsonargparse accepts."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in reversed(locate(path).__mro__):  # arguments may be passed on to a base class
        parameters |= inspect.signature(base.__init__).parameters
    for name, parameter in parameters.items():
        kind = parameter.annotation
        optional = parameter.default is None or isinstance(kind, str) or kind in (Any, object, parameter.empty)
        optional = optional or any(one in (None, NoneType) for one in get_args(kind))
        if not optional and name in arguments and arguments[name] is None:
            raise UserError(f"{path}: {name}: null; expected a value")


def check_schedule(path: str) -> None:
    """Raise UserError for a schedule whose second argument is not the run's number of steps, which is passed to it."""
    _, taken, *_ = inspect.signature(locate(path)).parameters
    if taken not in LENGTHS:
        words = "expected the number of steps, as in CosineAnnealingLR and the schedules of dlref.tasks"
        raise UserError(f"{path}: its first argument after the optimiser is {taken}; {words}")


def check_trainer(options) -> None:
    """Refuse options that a run sets itself, and strategies and precisions that do not work. Raises UserError."""
    for name in ("logger", "default_root_dir"):
        if options[name] is not None:
            raise UserError(f"trainer.{name}: a run logs into its own folder; expected none, see --run")
    method = getattr(options.strategy, "init_args", {}).get("start_method", options.strategy)
    copies = isinstance(method, str) and any(word in method for word in ("spawn", "fork", "notebook"))
    if copies:  # each copy of this process would hold the claim on its folder
        raise UserError(f"trainer.strategy: {method}; expected ddp, which starts new processes")
    if options.use_distributed_sampler:
        words = "expected false: the data modules share batches out between devices themselves"
        raise UserError(f"trainer.use_distributed_sampler: true; {words}")
    if options.barebones:
        raise UserError("trainer.barebones: true; expected false: a run logs, and has checkpoints")
    if str(options.precision) not in PRECISIONS:
        words = "expected 32-true, or bf16-mixed, which keeps weights, losses and metrics in float32"
        raise UserError(f"trainer.precision: {options.precision}; {words}")


def check_fit(options) -> None:
    """Refuse options with which a fit would train nothing, or something else. Raises UserError."""
    trainer = options.trainer
    for name in ("max_epochs", "max_steps", "limit_train_batches", "val_check_interval"):
        if trainer[name] == 0:
            raise UserError(f"trainer.{name}: 0; expected more")
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):  # Lightning accepts values below 0
        if trainer[name] is not None and trainer[name] < 1:
            raise UserError(f"trainer.{name}: {trainer[name]}; expected more")
    if (clip := trainer.gradient_clip_val) is not None and clip < 0:
        raise UserError(f"trainer.gradient_clip_val: {clip}; expected 0 or more")
    if trainer.overfit_batches:
        raise UserError(f"trainer.overfit_batches: {trainer.overfit_batches}; expected none, see --debug")
    if schedule := options.model.init_args.get("lr_scheduler"):
        check_schedule(schedule.class_path)


def check_sharding(options, records: bool) -> None:
    """Refuse parts of a fit that need the whole network, if each device holds a part of it. Raises UserError.

    A fit that records nothing has no final test and no checkpoints.
    """
    strategy = options.trainer.strategy
    if not isinstance(strategy, Namespace) or not issubclass(locate(strategy.class_path), ModelParallelStrategy):
        return
    task, callbacks = options.model.class_path, options.trainer.callbacks or []
    paths = [one.class_path for one in (callbacks if isinstance(callbacks, list) else [callbacks])]
    wrong = [
        *([task] if locate(task).configure_model is LightningModule.configure_model else []),
        *(path for path in paths if issubclass(locate(path), WeightAveraging)),
        *(["--final_test true"] if records and options.final_test else []),
        *(["save_distributed_checkpoint true"] if records and strategy.init_args.save_distributed_checkpoint else []),
    ]
    if wrong:
        raise UserError(
            f"trainer.strategy: {strategy.class_path} with {', '.join(wrong)}; expected a task that shards its network,"
            " no weight averaging, no final test, and checkpoints in one file (save_distributed_checkpoint false)"
        )


def check_evaluation(options) -> None:
    """Refuse options for a short fit: a result of a few batches would pass for that of a split. Raises UserError."""
    for name, value in (("--debug", options.debug), ("trainer.fast_dev_run", options.trainer.fast_dev_run)):
        if value:
            raise UserError(f"{name}: {value}; expected it with fit only")


class Parser(LightningArgumentParser):
    """A parser that raises errors as one line instead of printing a page of usage, and allows no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        encoding = locale.getpreferredencoding(False)  # for reading configs and for Lightning's metrics.csv
        if codecs.lookup(encoding).name != "utf-8":
            raise UserError(f"this system's text encoding is {encoding}; expected UTF-8: set PYTHONUTF8=1")

    def error(self, message: str, ex: Exception | None = None):
        """Raise UserError with the parser's message on one readable line."""
        raise UserError(readable(message)) from ex

    def parse_args(self, args: list[str] | None = None, *others, **kwargs):
        """Parse a command, whose options take precedence over its configs also where they are typed before them."""
        return super().parse_args(configs_first(sys.argv[1:] if args is None else args), *others, **kwargs)

    def parse_path(self, path, *args, **kwargs):
        """Parse a config file, which is named in any error."""
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason}); expected YAML") from None
        except UserError as error:
            hint = "" if "; expected" in str(error) else "; expected YAML as in configs/"
            raise UserError(f"{path}: {error}{hint}") from None

    def parse_string(self, *args, **kwargs):
        """Parse the text of a config; files that it names are not read as configs."""
        with no_other_configs():
            return super().parse_string(*args, **kwargs)


def configs_first(words: list[str]) -> list[str]:
    """Move the configs of a command to its front: jsonargparse lets each replace the values typed before it."""
    if not words or words[0].startswith("-"):  # without a subcommand, or with options before it: as typed
        return words
    configs, others, following = [], [], iter(words[1:])
    for word in following:
        if word in ("--config", "-c"):
            configs += [word, *islice(following, 1)]
        else:
            joined = word.startswith("--config=") or re.match(r"-c[^-]", word)
            (configs if joined else others).append(word)
    return [words[0], *configs, *others]


def readable(message: str) -> str:
    """Rewrite jsonargparse's multi-line errors as one line, in the user's terms."""
    message = " ".join(message.split())
    for pattern, replacement in (
        (r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: (- )?", ""),
        (r" - Expected a <class 'NoneType'>", ""),
        (r" - Expected a path but \S+ either not accessible or invalid", ""),
        (r" Given value type: <class '[^']*'>", ""),
        (r" Given value: Namespace\(.*", ""),
        (r" - Importing", " Importing"),
        (r" Subclass types expect one of.*", ""),
        (r" Given value: NestedArg\(key='(.*?)', val=(.*)\)", r" (\1 = \2)"),
        (r" Given value:", "; got"),
        (r".*module '(dlref(?:\.\w+)+)' has no attribute '(\w+)'.*", r"\1 has no \2; expected a class that it exports"),
        (r"<class '([^']*)'>", r"\1"),
        (r"Option ('[^']*') is not accepted", r"\1 is unknown; expected an argument of the class"),
        (  # StepLR's step_size, for example: jsonargparse hides the arguments that the run passes itself
            r"(lr_scheduler: '[^']*' is unknown); expected an argument of the class",
            r"\1, or stands where the run passes its number of steps; expected another argument, or a schedule such as "
            "CosineAnnealingLR and those of dlref.tasks",
        ),
        (
            r"(Importing '\S+' is not allowed), denied by .* to allow it\.",
            rf"\1; expected a class of {ALLOWED}",
        ),
        (r'Parser key "([^"]*)":', r"\1:"),
        (r"Problem with given class_path '[^']*': ", ""),
        (r"a typing\.Literal", "one of "),
    ):
        message = re.sub(pattern, replacement, message)
    return message
