"""The benchmarks' arithmetic, page and command; equal work on both sides of a row; scores in config headers."""

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
from benchmarks.page import Record, Where, figure, near, page, read, spread, write
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


def test_a_row_with_a_peer_needs_a_unit():
    with pytest.raises(ValueError, match="without a unit"):
        Row([1.0], [2.0])


def test_ratios_are_computed_from_the_two_figures_of_each_turn():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        _ = Row([1.0], [1.0, 2.0], "s").values
    assert Row([1.0, 10.0, 1.0], [2.0, 20.0, 2.0], "s").median == 2  # a slow turn slows both


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
def test_met_compares_a_row_with_its_goal(row, met):
    assert row.met is met


def test_the_first_turn_is_not_counted():
    seen = []
    seconds = in_turns("turns", {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, turns=2)
    assert seen == ["a", "b"] * 3
    assert [len(found) for found in seconds.values()] == [2, 2]


def test_needs_raises_not_here_for_a_missing_package():
    needs("torch")
    with pytest.raises(NotHere, match="no_such_package is not installed"):
        needs("no_such_package")


# The page


def test_figures_have_three_significant_digits_or_are_whole_numbers():
    assert [figure(value, "s") for value in (0.00123, 0.5, 1.5, 12345.0)] == ["1.23 ms", "500 ms", "1.5 s", "12,345 s"]
    assert spread([2.0, 1.0, 3.0], "×") == "2× (1 to 3)"
    assert spread([0.4, 0.3, 2.0], "s") == "400 ms (300 to 2,000)"
    assert spread([0.98765], "") == "0.988"


def test_records_are_read_back_as_written_and_appear_on_the_page(tmp_path):
    records = {"edge-lenet5": recorded(1.0, 2.0, peer=(3.0, 8.0), unit="s", beside="PyTorch", goal=">= 2")}
    records["gpu-resnet50"] = Record("gpu", not_run="it needs a GPU")
    write(tmp_path, records)
    assert read(tmp_path) == records
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| `edge-lenet5` | what | PyTorch | 5.5 s | 1.5 s | **3.5× (3 to 4)** | ≥ 2: met | [1] |" in text
    assert "- `gpu-resnet50`: not run, it needs a GPU" in text
    assert "- [1] a machine; torch 1; 2026-01-01" in text


def test_the_chart_of_bundles_shows_the_known_figures_and_leaves_gaps(tmp_path):
    """A float32 bundle is also its own float32 graph; a figure that could not be measured leaves a gap."""
    rows = {
        "an answer, beside PyTorch eager": Row([1.0, 3.0], [4.0, 4.0], "s", "PyTorch eager (bundle: float32)", ">= 2"),
        "an answer, beside PyTorch compiled": Row([1.0, 3.0], [3.0, 3.0], "s", "PyTorch compiled (bundle: float32)"),
    }
    known = Record("edge", rows, where=WHERE)
    times = [pictures.middle(known, "an answer", contender) for contender in pictures.CONTENDERS]
    assert math.isnan(times.pop(1))  # PyTorch's CPU wheel was not measured
    assert times == [4, 3, 2, 2]
    assert all(math.isnan(pictures.middle(known, "peak memory", contender)) for contender in pictures.CONTENDERS)
    pictures.draw(tmp_path, {"edge-lenet5": known})
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["edge.png"]


def test_a_float32_bundle_is_not_compared_with_itself(monkeypatch):
    figures = dict.fromkeys(edge.FIGURES, 1.0)
    contenders = dict.fromkeys(("bundle", *edge.PEERS), figures)
    for precision, rows in (("float32", 5 + 3 + 3), ("int8", 5 + 3 + 3 + 4)):
        monkeypatch.setattr(edge, "measured", lambda *_, kept=precision: (kept, contenders))
        assert len(edge.bundle("edge-lenet5", lambda: ())) == rows


@pytest.mark.parametrize(("now", "inside"), [(1.5, True), (0.96, True), (2.09, True), (0.94, False), (2.11, False)])
def test_a_figure_reproduces_within_the_recorded_spread_and_a_margin_of_5_percent(now, inside):
    assert near(Row([1.0, 2.0, 1.7], unit="s"), now) is inside


@pytest.mark.parametrize(
    ("scores", "now", "inside"),
    [
        ([0.997, 0.992], 0.988, True),
        ([0.997, 0.992], 0.98, False),  # within 5%, but with several times as many mistakes
        ([0.0073], 0.0076, True),
        ([0.0073], 0.0078, False),
    ],
)
def test_a_score_reproduces_within_a_relative_and_an_absolute_margin(scores, now, inside):
    assert near(Row(scores), now) is inside


@pytest.mark.parametrize(("now", "inside"), [(-0.57, True), (-0.6, False)])
def test_the_margin_widens_a_spread_below_zero(now, inside):
    assert near(Row([-0.556, 1.0], unit="s"), now) is inside


def test_the_benchmarks_page_matches_the_recorded_figures():
    records = read(ROOT / "docs")
    assert page(records) == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert set(records) <= set(measure.modules())


# The command


@pytest.fixture
def answers(monkeypatch):
    """The records that benchmarks return, by name."""
    found = {}
    monkeypatch.setattr(command, "measured", found.get)
    return found


def run(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["benchmarks", *map(str, words)])
    status = command.main()
    return status, *capsys.readouterr()


def test_benchmark_names_are_unique_across_modules():
    names = [name for module in measure.MODULES for name in import_module(f"benchmarks.{module}").BENCHMARKS]
    assert len(names) == len(set(names))


def test_a_new_record_is_kept_with_the_earlier_ones(tmp_path, monkeypatch, capsys, answers):
    answers |= {"edge-lenet5": recorded(1.0, peer=(2.0,), unit="s", goal=">= 2"), "edge-resnet18": recorded(2.0)}
    assert run(monkeypatch, capsys, "--docs", tmp_path, "edge-lenet5")[0] == 0
    assert run(monkeypatch, capsys, "--docs", tmp_path, "edge-resnet18")[0] == 0
    assert list(read(tmp_path)) == ["edge-lenet5", "edge-resnet18"]
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["benchmarks.png"]


def test_a_module_run_by_itself_runs_the_named_benchmarks_or_all_of_its_own(tmp_path, monkeypatch, answers):
    names = list(import_module("benchmarks.segmentation").BENCHMARKS)
    answers |= dict.fromkeys(names, recorded(1.0))
    for asked in (names[1:], names):
        words = asked if asked != names else []
        monkeypatch.setattr("sys.argv", ["segmentation.py", "--docs", str(tmp_path), *words])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / "benchmarks" / "segmentation.py"), run_name="__main__")
        assert list(read(tmp_path)) == asked


def test_a_machine_that_cannot_run_a_benchmark_keeps_the_earlier_figures(tmp_path, monkeypatch, capsys, answers):
    answers["gpu-resnet50"] = recorded(1.0)
    run(monkeypatch, capsys, "--docs", tmp_path, "gpu-resnet50")
    answers["gpu-resnet50"] = Record("gpu", not_run="it needs a GPU")
    status, told, _ = run(monkeypatch, capsys, "--docs", tmp_path, "gpu-resnet50")
    assert status == 0
    assert "it needs a GPU" in told
    assert read(tmp_path)["gpu-resnet50"].rows["what"].own == [1.0]


def test_a_failing_benchmark_sets_the_exit_status(tmp_path, monkeypatch, capsys, answers):
    answers |= {"edge-lenet5": Record("edge", not_run="it failed with status 1"), "edge-resnet18": recorded(2.0)}
    assert run(monkeypatch, capsys, "--docs", tmp_path, "edge-lenet5", "edge-resnet18")[0] == 1
    assert read(tmp_path)["edge-resnet18"].rows


@pytest.mark.parametrize(("now", "status", "word"), [(1.5, 0, "within"), (3.0, 1, "OUTSIDE")])
def test_reproduce_reports_whether_figures_are_within_and_changes_no_file(
    tmp_path, monkeypatch, capsys, answers, now, status, word
):
    write(tmp_path, {"edge-lenet5": recorded(1.0, 2.0)})
    before = (tmp_path / "benchmarks.json").read_bytes()
    answers["edge-lenet5"] = recorded(now)
    found, told, _ = run(monkeypatch, capsys, "--docs", tmp_path, "reproduce", "edge-lenet5")
    assert (found, word in told) == (status, True)
    assert (tmp_path / "benchmarks.json").read_bytes() == before


def test_a_row_that_cannot_be_measured_again_is_not_compared(tmp_path, monkeypatch, capsys, answers):
    stated = recorded(1.0)
    stated.rows["beside the CPU wheel"] = Row([2.0])
    write(tmp_path, {"edge-lenet5": stated})
    answers["edge-lenet5"] = recorded(1.0)
    status, told, wrong = run(monkeypatch, capsys, "--docs", tmp_path, "reproduce", "edge-lenet5")
    assert (status, "within" in told, "OUTSIDE" in told) == (2, True, False)
    assert "error: edge-lenet5: beside the CPU wheel: not measured this time" in wrong


def test_removed_rows_are_told(tmp_path, monkeypatch, capsys, answers):
    answers["edge-lenet5"] = recorded(1.0)
    answers["edge-lenet5"].rows["beside the CPU wheel"] = Row([2.0])
    assert "removed" not in run(monkeypatch, capsys, "--docs", tmp_path, "edge-lenet5")[2]
    answers["edge-lenet5"] = recorded(1.0)
    told = run(monkeypatch, capsys, "--docs", tmp_path, "edge-lenet5")[2]
    assert "edge-lenet5: beside the CPU wheel: removed, as it was not measured this time" in told


@pytest.mark.parametrize("words", [["no-such"], ["reproduce", "edge-lenet5"], ["reproduce", "no-such"]])
def test_unknown_benchmark_names_are_refused(tmp_path, monkeypatch, capsys, words):
    status, _, told = run(monkeypatch, capsys, "--docs", tmp_path, *words)
    assert status == 2
    assert told.count("error: ") == 1


@pytest.mark.parametrize("name", gpu.BENCHMARKS)
def test_gpu_benchmarks_are_not_run_without_a_gpu(name, monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(measure.logging, "disable", lambda level: None)
    assert measure.measure(name).not_run == "it needs a GPU"


def test_speed_leaves_out_the_warm_up_and_steps_after_the_last_turn(monkeypatch):
    """The fake clock advances by one at each of two readings per step."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "WARMUP", 2)
    ticks = iter(range(1000))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(ticks))
    speed, trainer = gpu.Speed(4, turns=2), SimpleNamespace(should_stop=False)
    for index in range(13):
        speed.on_train_batch_start(trainer, None, None, index)
        speed.on_train_batch_end(trainer, None, None, None, index)
        assert trainer.should_stop is (index >= 9)
    assert speed.seconds == [7 / 4, 7 / 4]  # from the reading before the first step of a turn to that after the fourth
    assert speed.without == [3 / 4, 3 / 4]
    assert speed.mean() == 7 / 4


def test_operations_counts_the_products_of_a_training_step(monkeypatch):
    """LeNet-5: forward, and twice as many backward, except for the gradient of the images."""
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


def test_the_bare_loop_trains_to_the_same_weights_as_the_trainer(unchecked):
    """Each alone and both in turns, across the ends of epochs."""
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


def test_rates_are_computed_over_parts_of_equal_length():
    clock = overhead.Clock()
    clock.seconds = [1.0, 3.0, 0.5, 0.5, 9.0]
    assert clock.rates(2) == [0.5, 2.0]


def test_rows_of_rates_have_dlref_on_the_own_side(monkeypatch):
    """dlref's rate is 6, its peers' are 1 and 2."""
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


def test_rows_of_techniques_have_the_technique_on_the_own_side(monkeypatch):
    """A step takes one second with the technique, two without; the Trainer adds one second, or three if `slow`."""

    def steps(task, data, count, said, clock):
        while True:
            clock.seconds.append(1.0 if task[-1] == "true" else 2.0)
            yield

    def both(config, turns, parts, overrides, changed, slow=False):
        assert (overrides[-1], changed) == ("32", {"log_every_n_steps": 30})
        return [1 / 9, *[1 / 4 if slow else 1 / 2] * (parts - 1)], [1.0] * parts

    monkeypatch.setattr(techniques, "made", lambda config, arguments: (arguments, None))
    monkeypatch.setattr(techniques, "bare_steps", steps)
    monkeypatch.setattr(techniques, "beside_a_bare_loop", both)
    (row,) = techniques.switch("fused", "--fused", "lenet5_digits").values()
    assert (row.own, row.peer, row.values) == ([1.0] * 7, [0.5] * 7, [2.0] * 7)
    (row,) = techniques.around_a_step("a bar", "another", slow=True).values()
    assert (row.own, row.peer, row.values) == ([1.0] * 7, [3.0] * 7, [3.0] * 7)


@pytest.mark.parametrize("benchmark", [techniques.averaging, techniques.searching])
def test_averaging_and_searching_run_both_sides_and_compare_their_times(benchmark, monkeypatch):
    """`averaging` itself checks that both sides compute the same average."""
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


def test_scores_in_config_headers_match_the_recorded_figures():
    """The first number after `Score:` is the score of the first seed, rounded to the digits given."""
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


def test_roots_finds_the_data_of_a_config_in_the_benchmarks_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DLREF_DATA", str(tmp_path))
    assert configs.roots("lenet5_digits") == []
    with pytest.raises(NotHere, match="mnist"):
        configs.roots("lenet5_mnist")
    (tmp_path / "mnist").mkdir()
    assert configs.roots("lenet5_mnist") == ["--data.init_args.root", str(tmp_path / "mnist")]


def test_rows_are_unchanged_by_json():
    row = Row([1.0], [2.0], "s", "x", ">= 1")
    assert Row(**json.loads(json.dumps(asdict(row)))) == row


# A loss by nanoGPT's estimator


def test_the_whole_loss_and_nanogpts_estimate_are_those_of_a_bigram_table():
    drawn = torch.Generator().manual_seed(0)
    tokens, table = torch.randint(5, (60,), generator=drawn), torch.randn(5, 5, generator=drawn)
    nats = -table.log_softmax(-1)[tokens[:-1], tokens[1:]]  # loss of each token, given the one before
    windows = Windows(tokens, 8)
    whole = nanogpt_loss.loss(table.__getitem__, [windows[torch.arange(len(windows)) * 8]])
    assert whole == pytest.approx(nats.mean().item(), rel=1e-5)
    data = SimpleNamespace(splits={"val": windows}, context_length=8, batch_size=4)
    found = nanogpt_loss.estimates(table.__getitem__, data, 500, drawn)
    anywhere = nats.unfold(0, 8, 1)  # windows that begin at every token
    assert sum(found) / len(found) == pytest.approx(anywhere.mean().item(), abs=0.01)
    assert len(set(found)) == len(found)
