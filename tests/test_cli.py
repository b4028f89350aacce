"""The command line: mistakes end in one line and write nothing; runs are kept, replaced and resumed."""

import csv
import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import yaml
from conftest import ROOT
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.callbacks.timer import Interval

import dlref.cli
from dlref.cli import TrainCLI, build, load_run, train
from dlref.config import enums_as_text, for_configs, whole_numbers_first
from dlref.models import LeNet5
from dlref.runtime import UserError
from dlref.tasks import ImageClassifier
from dlref.training.checkpoints import Interrupted
from dlref.training.run_folder import Claim

DIGITS = str(ROOT / "configs" / "lenet5_digits.yaml")
SHORT = [
    "--trainer.max_epochs",
    "2",
    "--trainer.limit_train_batches",
    "3",
    "--trainer.enable_progress_bar",
    "false",
]


@pytest.fixture(autouse=True)
def _undrawn(elsewhere, monkeypatch):
    def blank(figure, path):  # figures are drawn and checked in the tests of their families
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr("dlref.tasks.figures._save", blank)


def fit(*arguments):
    return train(["fit", "--config", DIGITS, *SHORT, *arguments])


@pytest.mark.parametrize(("command", "written"), [("test", "test.json"), ("predict", "predictions.jsonl")])
def test_a_checkpoint_is_evaluated_into_another_folder(command, written, capsys):
    assert fit("--run", "r", "--final_test", "false", "--trainer.max_epochs", "1") == 0
    known = [command, "--config", "r/config.yaml", "--ckpt_path", "r/checkpoints/last.ckpt", "--run"]
    assert train([*known, "new/place"]) == 0
    assert Path("new/place", written).is_file()
    assert not Path("r", written).exists()
    capsys.readouterr()
    assert train([*known, "r/config.yaml/place"]) == 2
    assert "r/config.yaml/place: not writable; expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize("config", [["--config", DIGITS], [f"--config={DIGITS}"], ["-c", DIGITS], [f"-c{DIGITS}"]])
def test_options_typed_before_a_config_are_not_replaced_by_it(config):
    before = ["--trainer.max_epochs", "1", "--data.init_args.batch_size", "9", "--seed_everything=3"]
    assert train(["fit", *before, *config, *SHORT[2:], "--run", "r", "--final_test", "false"]) == 0
    written = yaml.safe_load(Path("r/config.yaml").read_text())
    assert (written["trainer"]["max_epochs"], written["seed_everything"]) == (1, 3)
    assert written["data"]["init_args"]["batch_size"] == 9


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


MISTAKES = {
    "an unknown key": (
        ["--model.init_args.learning_rte", "1"],
        "model: 'learning_rte' is unknown; expected an argument of the class",
    ),
    "an argument of a schedule that takes no number of steps": (
        [
            *("--model.init_args.lr_scheduler", "torch.optim.lr_scheduler.StepLR"),
            *("--model.init_args.lr_scheduler.init_args.step_size", "5"),
        ],
        "lr_scheduler: 'step_size' is unknown, or stands where the run passes its number of steps; expected another",
    ),
    "an unknown key of the network": (["--model.init_args.network.init_args.depht", "1"], "depht"),
    "an unknown top-level key": (["--frobnicate", "1"], "unrecognized arguments: --frobnicate"),
    "another choice": (["--best.mode", "most"], "best.mode: Expected one of ['min', 'max']. Got value: most"),
    "the beginning of a key": (["--trainer.max_epo", "3"], "unrecognized arguments: --trainer.max_epo"),
    "a function outside the allow-list": (
        ["--model.init_args.network", "os.system"],
        "'os.system' is not allowed",
    ),
    "torch.hub": (
        ["--model.init_args.network.class_path", "torch.hub.load"],
        "'torch.hub.load' is not allowed",
    ),
    "a class that is not there": (["--model.init_args.network.class_path", "dlref.models.LeNet6"], "LeNet6"),
    "a class of another kind": (
        ["--model.class_path", "dlref.models.LeNet5"],
        "not correspond to a subclass of Task",
    ),
    "a value of another type": (["--trainer.max_epochs", "many"], "trainer.max_epochs: Expected a int"),
    "a constructor's refusal": (
        ["--model.init_args.preprocess.init_args.std", "[1, 2]"],
        "mean has 1 channels",
    ),
    "a device that is not there": (["--trainer.accelerator", "abacus"], "abacus"),
    "other classes than the data's": (
        ["--model.init_args.network.init_args.num_classes", "7"],
        "num_classes to be 10",
    ),
    "an image that does not fit": (["--model.init_args.preprocess.init_args.size", "28"], "28×28"),
    "class weights of another length": (["--model.init_args.class_weights", "[1, 2]"], "class_weights has 2"),
    "a batch of nothing": (["--data.init_args.batch_size", "0"], "batch_size: 0"),
    "freezing nothing": (["--model.init_args.freeze", "zz"], "matches no parameter"),
    "freezing everything": (["--model.init_args.freeze", ".*"], "leaves no parameter"),
    "no regular expression": (["--model.init_args.freeze", "("], "regular expression"),
    "weights that are not there": (["--model.init_args.weights", "gone.pt"], "gone.pt: not found"),
    "files that are not there": (["--data", "dlref.data.MNIST", "--data.root", "gone"], "gone/train-images"),
    "a checkpoint that is not there": (["--ckpt_path", "gone.ckpt"], "gone.ckpt"),
    "a metric that is not logged": (
        ["--best.metric", "val/acurracy"],
        "expected one of val/accuracy, val/f1, val/loss",
    ),
    "no validation": (["--trainer.limit_val_batches", "0"], "split, and trainer.limit_val_batches above 0"),
    "a rate below zero": (["--model.init_args.optimizer.init_args.lr", "-1"], "Invalid learning rate"),
    "too much smoothing": (["--model.init_args.label_smoothing", "3"], "label_smoothing 3"),
    "a blend below zero": (["--model.init_args.mixup", "-1"], "mixup -1"),
    "a callback outside the allow-list": (["--trainer.callbacks+", "shutil.rmtree"], "'shutil.rmtree' is not allowed"),
    "a logger of one's own": (["--trainer.logger", "false"], "trainer.logger: a run logs into its own folder"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_with_status_2_and_writes_nothing(mistake, tmp_path, capsys):
    arguments, message = MISTAKES[mistake]
    assert fit(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "NestedArg" not in lines[0]
    assert "NoneType" not in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--debug"], "--debug: True; expected it with fit only"),
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run: True; expected it with fit only"),
    ],
)
def test_a_few_batches_are_not_evaluated_in_place_of_a_split(command, arguments, message, capsys):
    assert train([command, "--config", DIGITS, "--run", "mine", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_error_is_written_at_once(monkeypatch):
    """Other processes may write the same line."""
    pieces = []
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=pieces.append, flush=lambda: None))
    assert train(["predict", "--config", "missing/config.yaml"]) == 2
    (piece,) = pieces
    assert piece.startswith("error: ")
    assert piece.endswith("\n")


def test_validating_nothing_is_refused(capsys):
    assert fit("--run", "mine", "--trainer.max_epochs", "1", "--final_test", "false") == 0
    known = ["validate", "--config", "mine/config.yaml"]
    assert train(known) == 0
    assert "val/accuracy" in capsys.readouterr().out
    assert train([*known, "--trainer.limit_val_batches", "0"]) == 2
    assert "error: nothing to validate on" in capsys.readouterr().err


def test_a_refused_fit_leaves_an_empty_folder_and_an_earlier_run_unchanged(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert fit("--run", "empty", "--model.init_args.weights", "gone.pt") == 2
    assert list((tmp_path / "empty").iterdir()) == []
    assert fit("--run", "mine") == 0
    (tmp_path / "mine" / ".lock").unlink()  # only matters while a fit runs
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert fit("--run", "mine", "--overwrite", "true", "--model.init_args.weights", "gone.pt") == 2
    assert {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()} == before
    resumed = ["--ckpt_path", "last", "--data.init_args.batch_size", "0", "--trainer.max_epochs", "5"]
    assert fit("--run", "mine", *resumed) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]


def test_unusable_run_folders_configs_and_checkpoints_are_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert fit("--run", "file/run") == 2
    assert "file: a file; expected a folder" in capsys.readouterr().err
    (tmp_path / "latin.yaml").write_bytes(b"best: \xe9")
    assert train(["fit", "--config", "latin.yaml"]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    torch.save(torch.nn.Linear(1, 1), tmp_path / "code.ckpt")  # a pickle that names a class
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    for name, message in (("code", "unreadable"), ("junk", "unreadable"), ("other", "not a checkpoint of")):
        assert fit("--ckpt_path", f"{name}.ckpt") == 2
        assert message in capsys.readouterr().err


def test_the_current_folder_can_be_the_run_folder(tmp_path):
    assert fit("--run", ".", "--final_test", "false") == 0
    assert fit("--run", ".", "--overwrite", "true", "--final_test", "false") == 0
    assert (tmp_path / "checkpoints/best.ckpt").is_file()
    assert not list(tmp_path.glob(".earlier*"))


def test_a_dry_run_does_not_block_a_later_fit_in_the_same_folder(tmp_path):
    assert fit("--run", "mine", "--trainer.fast_dev_run", "true") == 0
    assert not (tmp_path / "mine/checkpoints").exists()
    assert fit("--run", "mine", "--final_test", "false") == 0


AVERAGE = '{"class_path": "dlref.tasks.EMA", "init_args": {"decay": 0.9}}'


def test_fit_and_the_test_command_test_the_same_checkpoint(tmp_path):
    """Both test the averaged weights of best.ckpt, here the one with the largest loss, and not last.ckpt."""
    worst = ["--best.metric", "val/loss", "--best.mode", "max", "--trainer.callbacks+", AVERAGE]
    worst += ["--data.init_args.batch_size", "32", "--trainer.limit_train_batches", "20"]
    assert fit("--run", "mine", *worst) == 0
    by_fit = json.loads((tmp_path / "mine/test.json").read_text())
    assert train(["test", "--config", "mine/config.yaml"]) == 0
    assert json.loads((tmp_path / "mine/test.json").read_text()) == by_fit
    epochs = {
        name: torch.load(tmp_path / f"mine/checkpoints/{name}.ckpt", weights_only=True)["epoch"]
        for name in ("best", "last")
    }
    assert epochs == {"best": 0, "last": 1}
    assert train(["test", "--config", "mine/config.yaml", "--ckpt_path", "last"]) == 0
    assert json.loads((tmp_path / "mine/test.json").read_text()) != by_fit


def test_a_resumed_run_can_be_moved_and_still_tests_its_best_checkpoint(tmp_path):
    torch.save(LeNet5(10, activation="relu").state_dict(), tmp_path / "start.pt")
    start = ["--model.init_args.weights", "start.pt"]
    assert fit("--run", "mine", "--final_test", "false", *start) == 0
    (tmp_path / "start.pt").unlink()  # needed only at the start
    assert fit("--run", "mine", "--ckpt_path", "last", "--trainer.max_epochs", "3", *start) == 0
    by_fit = json.loads((tmp_path / "mine/test.json").read_text())
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert "ckpt_path: null" in (tmp_path / "moved/config.yaml").read_text()
    assert train(["test", "--config", "moved/config.yaml"]) == 0
    assert json.loads((tmp_path / "moved/test.json").read_text()) == by_fit


def test_a_moved_run_keeps_its_best_checkpoint_when_resumed(tmp_path):
    """Here the best checkpoint has the largest loss, which further training does not reach again."""
    largest = ["--best.metric", "val/loss", "--best.mode", "max", "--final_test", "false"]
    assert fit("--run", "mine", *largest) == 0
    (tmp_path / "mine").rename(tmp_path / "moved")
    best = tmp_path / "moved/checkpoints/best.ckpt"
    first = torch.load(best, weights_only=True)["epoch"]
    resumed = ["--run", "moved", "--ckpt_path", "last", *largest]
    assert fit(*resumed, "--trainer.max_epochs", "3") == 0
    assert torch.load(best, weights_only=True)["epoch"] == first == 0
    other = ["--run", "other", "--ckpt_path", "moved/checkpoints/last.ckpt", *largest]
    assert fit(*other, "--trainer.max_epochs", "4") == 0  # a new run has no best checkpoint yet
    assert torch.load(tmp_path / "other/checkpoints/best.ckpt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([math.nan, math.nan, math.nan], 3),
        ([math.inf, 0.5, math.nan], 2),
        ([0.5, math.nan, 0.7], 1),
        ([0.5, -math.inf, 0.7], 1),
    ],
)
def test_best_ckpt_is_the_newest_checkpoint_until_a_score_is_finite(scores, kept, tmp_path, monkeypatch):
    values = iter(scores[:1] + scores)  # one more for the check before training
    monkeypatch.setattr(ImageClassifier, "on_validation_epoch_end", lambda self: self.log("val/told", next(values)))
    best = ["--best.metric", "val/told", "--best.mode", "min", "--final_test", "false"]
    with pytest.warns(UserWarning, match=r"^val/told is (nan|-?inf); expected a number, to choose best\.ckpt by$"):
        assert fit("--run", "mine", *best, "--trainer.max_epochs", "3") == 0
    assert torch.load(tmp_path / "mine/checkpoints/best.ckpt", weights_only=True)["epoch"] + 1 == kept


def test_a_nan_score_is_null_in_test_json(tmp_path, monkeypatch):
    ends = ImageClassifier.on_test_epoch_end
    monkeypatch.setattr(
        ImageClassifier, "on_test_epoch_end", lambda self: (ends(self), self.log("test/told", math.nan))
    )
    assert fit("--run", "mine") == 0
    assert json.loads((tmp_path / "mine/test.json").read_text(), parse_constant=pytest.fail)["told"] is None


def test_a_missing_config_or_checkpoint_is_refused(capsys, tmp_path):
    assert train(["fit", "--config", "gone.yaml"]) == 2
    assert capsys.readouterr().err.strip().endswith(f"File does not exist: '{tmp_path}/gone.yaml'")
    assert train(["test", "--config", DIGITS]) == 2
    assert "runs/lenet5_digits/checkpoints/best.ckpt: no checkpoint" in capsys.readouterr().err


def test_best_ckpt_is_a_copy_of_last_ckpt_until_the_first_validation(tmp_path, capsys):
    best, last = (tmp_path / "mine/checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    coarse = ["--run", "mine", "--trainer.check_val_every_n_epoch", "3"]
    for end in (["--trainer.max_steps", "2"], ["--ckpt_path", "last", "--final_test", "false"]):
        assert fit(*coarse, *end) == 0
        assert "training ended before its first validation: best.ckpt is a copy of last.ckpt" in capsys.readouterr().err
        assert best.read_bytes() == last.read_bytes()
        assert (tmp_path / "mine/test.json").is_file()
    assert fit(*coarse, "--ckpt_path", "last", "--trainer.max_epochs", "4") == 0
    printed = capsys.readouterr().err
    assert "before its first validation" not in printed
    assert printed.count("the last steps were not validated: best.ckpt is of an earlier step than last.ckpt (12)") == 1
    steps = [torch.load(path, weights_only=True)["global_step"] for path in (best, last)]
    assert steps == [9, 12]  # a validated checkpoint replaces the copy
    assert fit(*coarse, "--ckpt_path", "last", "--trainer.max_epochs", "5", "--final_test", "false") == 0
    assert torch.load(best, weights_only=True)["global_step"] == 9  # the run remembers that it was validated


def test_best_ckpt_is_not_one_of_another_run_that_this_one_continues(tmp_path, capsys):
    assert fit("--run", "other", "--trainer.max_epochs", "1") == 0
    more = ["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "3"]
    assert fit("--run", "mine", "--ckpt_path", "other/checkpoints/last.ckpt", *more) == 0
    assert "training ended before its first validation: best.ckpt is a copy of last.ckpt" in capsys.readouterr().err
    assert (tmp_path / "mine/test.json").is_file()
    # Lightning would train one more batch of the epoch whose validation this run does not have.
    assert torch.load(tmp_path / "mine/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


def test_testing_a_run_killed_before_its_first_validation_is_refused(tmp_path, capsys):
    assert fit("--run", "mine", "--final_test", "false") == 0
    (tmp_path / "mine/checkpoints/best.ckpt").unlink()
    assert train(["test", "--config", "mine/config.yaml"]) == 2
    assert (
        "only last.ckpt, as in a run killed before its first validation; expected a finished run"
        in capsys.readouterr().err
    )


def test_a_moved_run_has_all_its_files_and_test_and_validate_reproduce_its_scores(tmp_path, capsys):
    assert fit("--model.init_args.network.init_args.activation", "tanh") == 0
    run = tmp_path / "runs" / "lenet5_digits"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if "tfevents" not in path.name}
    assert names >= {
        "config.yaml", "metrics.csv", "test.json",
        "checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/previous.ckpt",
        "figures/curves.png", "figures/confusion.png", "figures/roc.png", "figures/mistakes.png",
    }  # fmt: skip
    assert list(run.glob("events.out.tfevents.*"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["network"]["init_args"]["activation"] == "tanh"

    first = json.loads((run / "test.json").read_text())
    assert first.keys() >= {"accuracy", "top5_accuracy", "f1", "roc_auc"}
    (run / "test.json").unlink()
    moved = run.rename(tmp_path / "moved")  # a run consists of its folder alone
    assert train(["test", "--config", str(moved / "config.yaml")]) == 0
    assert json.loads((moved / "test.json").read_text()) == first

    assert train(["predict", "--config", str(moved / "config.yaml")]) == 0
    answers = [json.loads(line) for line in (moved / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 360
    assert answers[7].keys() == {"input", "label", "probability", "top"}
    assert answers[7]["input"] == "7"
    few = ["--trainer.limit_predict_batches", "1"]
    assert train(["predict", "--config", str(moved / "config.yaml"), *few]) == 2
    assert "of 360 inputs; expected no trainer.limit_predict_batches" in capsys.readouterr().err
    assert train(["validate", "--config", str(moved / "config.yaml")]) == 0
    shown = float(re.search(r"val/accuracy +│ +(\S+)", capsys.readouterr().out)[1])
    logged = [float(row["val/accuracy"]) for row in rows(moved / "metrics.csv") if row["val/accuracy"]]
    assert shown == pytest.approx(max(logged))


def test_a_refused_fit_reports_the_reason_even_if_its_lock_cannot_be_removed(tmp_path, monkeypatch, capsys):
    """On Windows a held lock cannot be removed; filelock removes it there."""
    unlink = Path.unlink

    def held(path, **options):
        if path.name == ".lock":
            raise PermissionError(13, "used by another process", str(path))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", held)
    assert train(["fit", "--config", DIGITS, "--run", str(tmp_path / "mine"), "--best.metric", "val/nonsense"]) == 2
    assert "val/nonsense" in capsys.readouterr().err


def test_a_package_missing_for_a_callback_is_reported_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("dlref.cli.TrainCLI", lambda _: importlib.import_module("no_such_package"))
    assert train([]) == 2
    assert capsys.readouterr().err == "error: No module named 'no_such_package'\n"


def test_a_system_with_a_text_encoding_other_than_utf8_is_refused(tmp_path, monkeypatch, capsys):
    """Otherwise, configs would be read in that encoding and exported in another."""
    monkeypatch.setattr("locale.getpreferredencoding", lambda _: "cp1252")
    assert train(["fit", "--config", DIGITS, "--run", str(tmp_path / "mine")]) == 2
    assert capsys.readouterr().err == "error: this system's text encoding is cp1252; expected UTF-8: set PYTHONUTF8=1\n"
    assert not (tmp_path / "mine").exists()


def test_an_earlier_run_is_replaced_only_with_overwrite(tmp_path, capsys):
    assert fit("--run", "mine", "--final_test", "false") == 0
    weights = (tmp_path / "mine/checkpoints/last.ckpt").read_bytes()
    assert not (tmp_path / "mine/test.json").exists()
    assert fit("--run", "mine") == 2
    assert "mine already holds a run" in capsys.readouterr().err
    assert (tmp_path / "mine/checkpoints/last.ckpt").read_bytes() == weights
    (tmp_path / "mine/notes.txt").write_text("keep me")
    assert fit("--run", "mine", "--overwrite", "true", "--seed_everything", "1", "--final_test", "false") == 0
    assert (tmp_path / "mine/checkpoints/last.ckpt").read_bytes() != weights
    assert (tmp_path / "mine/notes.txt").exists()
    assert not yaml.safe_load((tmp_path / "mine/config.yaml").read_text())["overwrite"]


def test_numbers_of_batches_are_parsed_as_int_before_float_whatever_was_imported_before():
    """`typing` caches the first of two equal unions."""
    annotations = {"batches": float | int | None, "share": float | int, "name": str | None}
    whole_numbers_first(annotations)
    assert [get_args(annotations[name])[:2] for name in ("batches", "share")] == [(int, float)] * 2
    assert annotations["name"] == str | None
    known = Trainer.__init__.__annotations__
    assert {get_args(kind)[0] for name, kind in known.items() if name.startswith(("limit_", "overfit_"))} == {int}


def test_enums_in_a_config_become_text():
    """The callback Timer has such a default, and jsonargparse cannot write it to config.yaml."""
    timer = Namespace(class_path="lightning.pytorch.callbacks.Timer", init_args=Namespace(interval=Interval.step))
    enums_as_text(Namespace(trainer=Namespace(callbacks=[timer], max_epochs=2)))
    assert type(timer.init_args.interval) is str
    assert timer.init_args.interval == "step"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("torch.optim.SGD", True),
        ("dlref.tasks.EMA", True),
        ("dlref.tasks.averaging.Average", False),  # not exported
        ("dlref.data.download.Path", False),
        ("torch.nn.init.normal_", False),  # a function
        ("torch.optim", False),
        ("torch.serialization.Path", False),
        ("lightning.pytorch.callbacks.spike.SpikeDetection", False),
        ("own.Class", False),
    ],
)
def test_only_exported_classes_of_a_few_packages_are_for_configs(path, allowed, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("class Class:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert for_configs(path) is allowed
    assert "own" not in sys.modules  # importing it would run it


def test_a_folder_that_already_holds_figures_is_not_taken_over(tmp_path, capsys):
    (tmp_path / "mine/figures").mkdir(parents=True)
    (tmp_path / "mine/figures/thesis.png").touch()
    assert fit("--run", "mine") == 2
    assert "mine already holds a run (figures); expected --run with another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir() if path.name != ".lock"] == ["figures"]
    assert (tmp_path / "mine/figures/thesis.png").exists()


def test_replacing_a_run_removes_all_its_files_and_no_others(tmp_path):
    """Scores and predictions of the earlier weights would be mistaken for the new run's."""
    mine = ("config.yaml", "metrics.csv", "test.json", "predictions.jsonl", "profile.md", "events.out.tfevents.1")
    for name in ("notes.txt", *mine):
        (tmp_path / name).touch()
    for name in ("checkpoints", "figures", "predictions"):
        (tmp_path / name).mkdir()
    claim = Claim(tmp_path, resume=False, overwrite=True)
    claim.commit()
    left = {".lock", "notes.txt", "config.yaml"}  # config.yaml is written anew
    assert {path.name for path in tmp_path.iterdir()} == left
    claim.leave()


def test_a_folder_with_another_programs_tensorboard_log_is_not_taken_over(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/events.out.tfevents.1.mine").touch()
    assert fit("--run", "mine") == 2
    assert "mine already holds a run (events.out.tfevents.1.mine)" in capsys.readouterr().err
    assert (tmp_path / "mine/events.out.tfevents.1.mine").exists()


def test_a_fit_that_fails_before_training_restores_the_earlier_run(tmp_path, monkeypatch):
    assert fit("--run", "mine", "--final_test", "false") == 0
    (tmp_path / "mine/.lock").unlink()
    before = sorted(tmp_path.rglob("*"))

    def fails(*_, **__):
        raise LookupError("no such luck")

    monkeypatch.setattr("dlref.cli.TensorBoardLogger", fails)
    with pytest.raises(LookupError, match="no such luck"):
        fit("--run", "mine", "--overwrite", "true")
    assert sorted(tmp_path.rglob("*")) == before


def test_resuming_continues_the_metrics_and_the_step_count(tmp_path, monkeypatch):
    logger, purged = dlref.cli.TensorBoardLogger, []
    monkeypatch.setattr(
        "dlref.cli.TensorBoardLogger", lambda *a, **k: purged.append(k["purge_step"]) or logger(*a, **k)
    )
    assert fit("--run", "mine", "--final_test", "false") == 0
    before = rows(tmp_path / "mine/metrics.csv")
    bar = ["--trainer.enable_progress_bar", "true"]  # the bar has no loss to show before the first step
    assert fit("--run", "mine", "--ckpt_path", "last", "--trainer.max_epochs", "3", "--final_test", "false", *bar) == 0
    assert purged == [None, 6]  # events of steps that a resumed run repeats after a kill are not shown twice
    after = rows(tmp_path / "mine/metrics.csv")
    assert [row["step"] for row in after][: len(before)] == [row["step"] for row in before]
    assert len(after) > len(before)
    assert any(row["train/loss"] for row in before)  # also if an epoch is shorter than the logging interval
    state = torch.load(tmp_path / "mine/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 9


def test_a_package_missing_for_a_constructor_is_a_user_error_of_build(monkeypatch):
    def missing(self, options):
        raise ModuleNotFoundError("No module named 'tensorboardX'")

    monkeypatch.setattr("dlref.cli.Parser.instantiate", missing)
    with pytest.raises(UserError, match="No module named 'tensorboardX'"):
        build(Path(DIGITS), [])


@pytest.mark.parametrize(("local_rank", "status"), [(None, 75), ("0", 75), ("1", 0)])
def test_only_the_first_process_of_a_machine_exits_with_the_status_of_an_interrupted_run(
    local_rank, status, monkeypatch, tmp_path
):
    def told(*_, **__):
        raise Interrupted(tmp_path / "last.ckpt", 7)

    monkeypatch.setattr("dlref.cli.TrainCLI", told)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert train(["fit"]) == status


def test_one_config_may_hold_sections_for_several_commands(tmp_path):
    one = yaml.safe_load(Path(DIGITS).read_text())
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"fit": one, "test": one}))
    assert train(["--config", "both.yaml", "fit", "--run", "mine", "--trainer.fast_dev_run", "true"]) == 0


def test_the_same_seed_gives_the_same_weights(tmp_path):
    states = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert fit("--run", name, "--seed_everything", seed, "--final_test", "false") == 0
        states.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["network.c1.weight"], states[2]["network.c1.weight"])


def test_a_reloaded_run_holds_the_trained_weights_exactly(tmp_path):
    assert fit("--run", "mine", "--final_test", "false") == 0
    task, data = load_run(tmp_path / "mine", ["--data.init_args.batch_size", "7"])
    state = torch.load(tmp_path / "mine/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in task.state_dict().items())
    assert not task.training
    assert data.batch_size == 7


def test_options_of_the_default_optimiser_do_not_leak_into_another_optimiser(monkeypatch):
    seen = {}
    monkeypatch.setattr(TrainCLI, "_run_subcommand", lambda self, name: seen.update(task=self.model))
    config = yaml.safe_load(Path(DIGITS).read_text())
    config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    Path("sgd.yaml").write_text(yaml.safe_dump(config))
    assert train(["fit", "--config", "sgd.yaml"]) == 0
    optimizer = seen["task"].optimizer(seen["task"].parameters())
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["weight_decay"] == 0


@pytest.mark.parametrize(
    ("precision", "capability", "told"),
    [("bf16-mixed", "AVX2", True), ("bf16-mixed", "AVX512", False), ("32-true", "AVX2", False)],
)
def test_training_in_bfloat16_on_a_processor_without_it_prints_a_warning(
    precision, capability, told, monkeypatch, capsys
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    how = ["--trainer.precision", precision, "--trainer.accelerator", "cpu"]
    how += ["--final_test", "false", "--trainer.enable_model_summary", "false"]
    assert fit(*how, "--trainer.max_epochs", "1") == 0
    assert ("emulates bfloat16, which is many times slower than 32-true" in capsys.readouterr().err) is told


def test_fit_prints_the_networks_layers_and_the_number_of_frozen_parameters(capsys):
    how = ["--model.init_args.freeze", "c1", "--final_test", "false", "--trainer.max_epochs", "1"]
    assert fit(*how) == 0
    printed = capsys.readouterr().out
    for row in (r"c1 +│ Conv2d +│ +156 ", r"c3 +│ Conv2d +│ +2,416 ", r" +│ LeNet5 +│ +61,706 ", "156 of them frozen"):
        assert re.search(row, printed), row
    assert "metrics" not in printed
    assert "FLOPs" not in printed
    assert fit(*how, "--overwrite", "--trainer.enable_model_summary", "false") == 0
    assert "LeNet5" not in capsys.readouterr().out
