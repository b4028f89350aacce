"""The benchmarks' arithmetic, page and command; that both sides of the overhead do the same; that headers are true."""

import itertools
import json
import math
import re
import runpy
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    configs,
    edge,
    forecasting,
    gpu,
    measure,
    nanogpt_loss,
    overhead,
    pictures,
    techniques,
    translation,
)
from benchmarks.page import Record, Where, figure, page, read, spread, within, write
from benchmarks.rows import NotHere, Row, in_turns, needs
from dlref.data.tokens import Windows

ROOT = Path(__file__).parent.parent
WHERE = Where("a machine", "torch 1", "2026-01-01")


def recorded(*own: float, peer: tuple[float, ...] = (), **options) -> Record:
    return Record("classification", {"what": Row(list(own), list(peer), **options)}, where=WHERE)


# Rows


def test_a_ratio_says_how_many_times_better():
    assert Row([2.0, 3.0], [4.0, 9.0], "s").values == [2.0, 3.0]  # half the seconds
    assert Row([2.0, 3.0], [4.0, 9.0], "MB").values == [2.0, 3.0]
    assert Row([4.0, 9.0], [2.0, 3.0], "images/s").values == [2.0, 3.0]  # twice the rate
    assert Row([4.0, 9.0], [], "s").values == [4.0, 9.0]


def test_a_row_beside_a_peer_has_a_unit():
    with pytest.raises(ValueError, match="without a unit"):
        Row([1.0], [2.0])


def test_a_ratio_is_of_pairs():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        _ = Row([1.0], [1.0, 2.0], "s").values
    assert Row([1.0, 10.0, 1.0], [2.0, 20.0, 2.0], "s").median == 2  # whatever a turn did to both


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row([1.0], [5.0], "s", goal=">= 5"), True),
        (Row([1.0], [4.9], "s", goal=">= 5"), False),
        (Row([0.9], [], "s", goal="<= 1"), True),
        (Row([1.1], [], "s", goal="<= 1"), False),
        (Row([1.1], [], "s"), None),
    ],
)
def test_goals(row, met):
    assert row.met is met


def test_turns_leave_the_first_out():
    seen = []
    seconds = in_turns("turns", {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, turns=2)
    assert seen == ["a", "b"] * 3
    assert [len(found) for found in seconds.values()] == [2, 2]


def test_a_package_that_is_not_there():
    needs("torch")
    with pytest.raises(NotHere, match="no_such_package is not installed"):
        needs("no_such_package")


# The page


def test_figures_have_three_digits():
    assert [figure(value, "s") for value in (0.00123, 0.5, 1.5, 12345.0)] == ["1.23 ms", "500 ms", "1.5 s", "12,345 s"]
    assert spread([2.0, 1.0, 3.0], "×") == "2× (1 to 3)"
    assert spread([0.4, 0.3, 2.0], "s") == "400 ms (300 to 2,000)"
    assert spread([0.98765], "") == "0.988"


def test_what_was_measured_is_read_as_it_was_written(tmp_path):
    records = {"edge-lenet5": recorded(1.0, 2.0, peer=(3.0, 8.0), unit="s", beside="PyTorch", goal=">= 2")}
    records["gpu-resnet50"] = Record("gpu", not_run="it needs a GPU")
    write(tmp_path, records)
    assert read(tmp_path) == records
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| `edge-lenet5` | what | PyTorch | 5.5 s | 1.5 s | **3.5× (3 to 4)** | ≥ 2: met | [1] |" in text
    assert "- `gpu-resnet50`: not run, it needs a GPU" in text
    assert "- [1] a machine; torch 1; 2026-01-01" in text


def test_a_picture_of_bundles_has_what_is_known(tmp_path):
    """A bundle in float32 is its own float32 graph; what a machine could not measure leaves a gap, not an error."""
    rows = {
        "an answer, beside PyTorch eager": Row([1.0, 3.0], [4.0, 4.0], "s", "PyTorch eager (bundle: float32)", ">= 2"),
        "an answer, beside PyTorch compiled": Row([1.0, 3.0], [3.0, 3.0], "s", "PyTorch compiled (bundle: float32)"),
    }
    known = Record("edge", rows, where=WHERE)
    times = [pictures.middle(known, "an answer", contender) for contender in pictures.CONTENDERS]
    assert math.isnan(times.pop(1))  # of the other wheel
    assert times == [4, 3, 2, 2]
    assert all(math.isnan(pictures.middle(known, "peak memory", contender)) for contender in pictures.CONTENDERS)
    pictures.draw(tmp_path, {"edge-lenet5": known})
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["edge.png"]


def test_a_bundle_in_float32_is_not_beside_itself(monkeypatch):
    figures = dict.fromkeys(edge.FIGURES, 1.0)
    contenders = dict.fromkeys(("bundle", *edge.PEERS), figures)
    for precision, rows in (("float32", 5 + 3 + 3), ("int8", 5 + 3 + 3 + 4)):
        monkeypatch.setattr(edge, "measured", lambda *_, kept=precision: (kept, contenders))
        assert len(edge.bundle("edge-lenet5", lambda: ())) == rows


@pytest.mark.parametrize(("now", "inside"), [(1.5, True), (0.96, True), (2.09, True), (0.94, False), (2.11, False)])
def test_within_the_spread(now, inside):
    assert within(recorded(1.0, 2.0, 1.7, unit="s"), recorded(now, unit="s")) == {"what": inside}


@pytest.mark.parametrize(
    ("scores", "now", "inside"),
    [
        ([0.997, 0.992], 0.988, True),
        ([0.997, 0.992], 0.98, False),  # within 5%, and five times as many mistakes
        ([0.0073], 0.0076, True),
        ([0.0073], 0.0078, False),
    ],
)
def test_a_score_is_within_by_a_share_and_by_a_number(scores, now, inside):
    stated, found = (Record("configs", {"score": Row(values)}) for values in (scores, [now]))
    assert within(stated, found) == {"score": inside}


def test_a_row_that_is_gone_is_not_within():
    assert within(recorded(1.0), Record("edge", {}, where=WHERE)) == {"what": False}


def test_the_page_is_what_the_figures_say():
    records = read(ROOT / "docs")
    assert page(records) == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert set(records) <= set(measure.modules())


# The command


@pytest.fixture
def answers(monkeypatch):
    """What benchmarks are to find, by name."""
    found = {}
    monkeypatch.setattr(command, "measured", found.get)
    return found


def run(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["benchmarks", *map(str, words)])
    status = command.main()
    return status, *capsys.readouterr()


def test_names_are_of_one_module_each():
    names = [name for module in measure.MODULES for name in import_module(f"benchmarks.{module}").BENCHMARKS]
    assert len(names) == len(set(names))


def test_what_is_measured_is_kept_beside_the_rest(tmp_path, monkeypatch, capsys, answers):
    answers |= {"edge-lenet5": recorded(1.0, peer=(2.0,), unit="s", goal=">= 2"), "edge-resnet18": recorded(2.0)}
    assert run(monkeypatch, capsys, "--docs", tmp_path, "edge-lenet5")[0] == 0
    assert run(monkeypatch, capsys, "--docs", tmp_path, "edge-resnet18")[0] == 0
    assert list(read(tmp_path)) == ["edge-lenet5", "edge-resnet18"]
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["benchmarks.png"]


def test_a_module_by_itself_is_all_of_its_benchmarks(tmp_path, monkeypatch, answers):
    names = list(import_module("benchmarks.segmentation").BENCHMARKS)
    answers |= dict.fromkeys(names, recorded(1.0))
    for asked in (names[1:], names):
        words = asked if asked != names else []
        monkeypatch.setattr("sys.argv", ["segmentation.py", "--docs", str(tmp_path), *words])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / "benchmarks" / "segmentation.py"), run_name="__main__")
        assert list(read(tmp_path)) == asked


def test_a_machine_that_cannot_leaves_the_figures_of_one_that_could(tmp_path, monkeypatch, capsys, answers):
    answers["gpu-resnet50"] = recorded(1.0)
    run(monkeypatch, capsys, "--docs", tmp_path, "gpu-resnet50")
    answers["gpu-resnet50"] = Record("gpu", not_run="it needs a GPU")
    status, told, _ = run(monkeypatch, capsys, "--docs", tmp_path, "gpu-resnet50")
    assert status == 0
    assert "it needs a GPU" in told
    assert read(tmp_path)["gpu-resnet50"].rows["what"].own == [1.0]


def test_one_that_fails_is_told_by_the_status(tmp_path, monkeypatch, capsys, answers):
    answers |= {"edge-lenet5": Record("edge", not_run="it failed with status 1"), "edge-resnet18": recorded(2.0)}
    assert run(monkeypatch, capsys, "--docs", tmp_path, "edge-lenet5", "edge-resnet18")[0] == 1
    assert read(tmp_path)["edge-resnet18"].rows


@pytest.mark.parametrize(("now", "status", "word"), [(1.5, 0, "within"), (3.0, 1, "OUTSIDE")])
def test_reproduce(tmp_path, monkeypatch, capsys, answers, now, status, word):
    write(tmp_path, {"edge-lenet5": recorded(1.0, 2.0)})
    before = (tmp_path / "benchmarks.json").read_bytes()
    answers["edge-lenet5"] = recorded(now)
    found, told, _ = run(monkeypatch, capsys, "--docs", tmp_path, "reproduce", "edge-lenet5")
    assert (found, word in told) == (status, True)
    assert (tmp_path / "benchmarks.json").read_bytes() == before


@pytest.mark.parametrize("words", [["no-such"], ["reproduce", "edge-lenet5"], ["reproduce", "no-such"]])
def test_names_that_are_none(tmp_path, monkeypatch, capsys, words):
    status, _, told = run(monkeypatch, capsys, "--docs", tmp_path, *words)
    assert status == 2
    assert told.count("error: ") == 1


@pytest.mark.parametrize("name", gpu.BENCHMARKS)
def test_without_a_gpu_its_rows_say_so(name, monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(measure.logging, "disable", lambda level: None)
    assert measure.measure(name).not_run == "it needs a GPU"


def test_speed_is_of_the_steps_that_count(monkeypatch):
    """By a clock that goes on by one at each look, two a step; what comes after the last turn is not timed."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "WARMUP", 2)
    ticks = iter(range(1000))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(ticks))
    speed, trainer = gpu.Speed(4, turns=2), SimpleNamespace(should_stop=False)
    for index in range(13):
        speed.on_train_batch_start(trainer, None, None, index)
        speed.on_train_batch_end(trainer, None, None, None, index)
        assert trainer.should_stop is (index >= 9)
    assert speed.seconds == [7 / 4, 7 / 4]  # from the look before the first step of a turn to that after the fourth
    assert speed.without == [3 / 4, 3 / 4]
    assert speed.mean() == 7 / 4


def test_operations_of_a_step_are_those_of_its_products(monkeypatch):
    """LeNet-5's, forward and twice as many backward, but for the gradient of the pictures."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    facts = {"labels": list("0123456789"), "multi_label": False, "crop": None}
    found = gpu.operations("lenet5_mnist", lambda n: (torch.zeros(n, 1, 28, 28).byte(), torch.arange(n)), facts, 64)
    layers = [28 * 28 * 6 * 25, 10 * 10 * 16 * 6 * 25, 120 * 400, 84 * 120, 10 * 84]
    assert found == 64 * 2 * (3 * sum(layers) - layers[0])


# Both sides of a row


@pytest.mark.parametrize("compiled", ["true", "graphs"])
def test_the_bare_loop_compiles_as_the_trainer_does(compiled, monkeypatch, unchecked):
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: seen.append(options))
    task, data = overhead.made("lenet5_digits", ("--model.init_args.compile_network", compiled))
    next(overhead.bare_steps(task, data, 2, overhead.options("lenet5_digits"), overhead.Clock()))
    assert seen == [{"mode": "reduce-overhead" if compiled == "graphs" else None}]


def test_the_bare_loop_trains_to_the_trainer_s_weights(unchecked):
    """Each alone, and both in turns, over the ends of epochs."""
    said, clock, epoch = overhead.options("lenet5_digits"), overhead.Clock(), ("--data.init_args.batch_size", "200")
    alone, other, trained, bare = (overhead.made("lenet5_digits", epoch) for _ in range(4))
    list(itertools.islice(overhead.bare_steps(*alone, 12, said, overhead.Clock()), 12))
    overhead.under_trainer(*other, 9, said)
    in_turns = overhead.InTurns(overhead.bare_steps(*bare, 12, said, clock), 4)
    overhead.under_trainer(*trained, 9, said, clock=in_turns)
    assert len(clock.seconds) == len(in_turns.seconds) == 9  # all but the first of each of three epochs
    expected = alone[0].cpu().network.state_dict()
    for task in (other[0], trained[0], bare[0]):
        for name, value in task.cpu().network.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_rates_are_of_equal_parts():
    clock = overhead.Clock()
    clock.seconds = [1.0, 3.0, 0.5, 0.5, 9.0]
    assert clock.rates(2) == [0.5, 2.0]


def test_rows_have_dlref_on_its_own_side(monkeypatch):
    """Of rates, dlref's 6 beside 1 and 2."""
    rates = {"dlref": 6.0, "GluonTS, data cached": 2.0, "GluonTS, defaults": 1.0}
    rates |= {translation.DEFAULTS: 1.0, translation.WITHOUT: 2.0}
    monkeypatch.setattr(forecasting, "made", lambda make: None)
    monkeypatch.setattr(translation, "joeynmt_python", lambda: "python")
    monkeypatch.setattr(translation, "write_files", lambda folder: 1)
    for module in (forecasting, translation):
        monkeypatch.setattr(
            module, "figures_in_turns", lambda title, calls, turns: {call: [rates[call]] for call in calls}
        )
    for rows in (forecasting.training(forecasting.synthetic), translation.programs()):
        assert [row.values for row in rows.values()] == [[6], [3]]


def test_a_technique_is_on_dlref_s_side(monkeypatch):
    """A step takes a second with it, two without; the Trainer adds one second as it is, three when told otherwise."""

    def steps(task, data, count, said, clock):
        while True:
            clock.seconds.append(1.0 if task[-1] == "true" else 2.0)
            yield

    def both(config, turns, parts, slow=False):
        return [1 / 9, *[1 / 4 if slow else 1 / 2] * (parts - 1)], [1.0] * parts

    monkeypatch.setattr(techniques, "made", lambda config, arguments: (arguments, None))
    monkeypatch.setattr(techniques, "bare_steps", steps)
    monkeypatch.setattr(techniques, "beside_a_bare_loop", both)
    (row,) = techniques.switch("fused", "--fused", "lenet5_digits").values()
    assert (row.own, row.peer, row.values) == ([1.0] * 7, [0.5] * 7, [2.0] * 7)
    (row,) = techniques.around_a_step("a bar", "another", slow=True).values()
    assert (row.own, row.peer, row.values) == ([1.0] * 7, [3.0] * 7, [3.0] * 7)


@pytest.mark.parametrize("benchmark", [techniques.averaging, techniques.searching])
def test_both_sides_of_a_technique_come_to_the_same(benchmark, monkeypatch):
    """Of averages it is made sure."""
    monkeypatch.setattr(techniques, "DEVICE", "cpu")

    def once(title, calls, device="cpu"):
        for call in calls.values():
            call()
        return {"own": [1.0, 2.0], "peer": [4.0, 4.0]}

    monkeypatch.setattr(techniques, "in_turns", once)
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # restored: the benchmark changes it
    assert [row.values for row in benchmark().values()] == [[4, 2]]


def test_the_first_epoch_is_not_timed(monkeypatch):
    now, clock = [0.0], forecasting.Clock()
    monkeypatch.setattr(forecasting, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for epoch, seconds in enumerate((90.0, 1.0, 3.0)):
        clock.on_train_epoch_start(None, None)
        now[0] += seconds
        clock.on_train_epoch_end(SimpleNamespace(current_epoch=epoch), None)
    assert clock.rate == 2 * forecasting.BATCH * forecasting.BATCHES / 4


# Configs


def test_headers_say_what_was_measured():
    """The first figure of `Score:` is the first seed's, in as many digits as it has."""
    scores = 0
    for name, record in read(ROOT / "docs").items():
        if record.module != "configs" or not record.rows:
            continue
        header = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        stated = re.search(r"# Score:.*?(\d+\.\d+)", header).group(1)
        (row,) = (row for title, row in record.rows.items() if "on the test split" in title)
        digits = len(stated.split(".")[1])
        assert f"{row.own[0]:.{digits}f}" == stated, name
        scores += 1
    assert scores


def test_data_lies_in_the_folder_of_the_config_s_name(tmp_path, monkeypatch):
    monkeypatch.setenv("DLREF_DATA", str(tmp_path))
    assert configs.roots("lenet5_digits") == []
    with pytest.raises(NotHere, match="mnist"):
        configs.roots("lenet5_mnist")
    (tmp_path / "mnist").mkdir()
    assert configs.roots("lenet5_mnist") == ["--data.init_args.root", str(tmp_path / "mnist")]


def test_rows_survive_json():
    row = Row([1.0], [2.0], "s", "x", ">= 1")
    assert Row(**json.loads(json.dumps(asdict(row)))) == row


# A loss by nanoGPT's estimator


def test_both_losses_of_a_split_are_those_of_its_pairs_of_tokens():
    drawn = torch.Generator().manual_seed(0)
    tokens, table = torch.randint(5, (60,), generator=drawn), torch.randn(5, 5, generator=drawn)
    nats = -table.log_softmax(-1)[tokens[:-1], tokens[1:]]  # of each token by the one before
    windows = Windows(tokens, 8)
    whole = nanogpt_loss.loss(table.__getitem__, [windows[torch.arange(len(windows)) * 8]])
    assert whole == pytest.approx(nats.mean().item(), rel=1e-5)
    data = SimpleNamespace(splits={"val": windows}, context_length=8, batch_size=4)
    found = nanogpt_loss.estimates(table.__getitem__, data, 500, drawn)
    anywhere = nats.unfold(0, 8, 1)  # windows that begin at each place
    assert sum(found) / len(found) == pytest.approx(anywhere.mean().item(), abs=0.01)
    assert len(set(found)) == len(found)
