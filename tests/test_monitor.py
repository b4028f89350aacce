"""The monitor: each rule on a faulty and on a healthy network, its cost, and its use from the command line."""

import math
import shlex
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_tasks import Pixels, classifier, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dlref.cli import train
from dlref.tasks import monitor
from dlref.tasks.monitor import (
    LOOKS,
    RULES,
    Monitor,
    Seen,
    dead_relu,
    exploding_gradient,
    loss_not_decreasing,
    overfitting,
    saturated_outputs,
    silent_units,
    vanishing_gradient,
)

STEPS = 45  # 15 epochs of 3 batches


class Stack(nn.Module):
    """Linear layers with an activation after all but the last."""

    class_layers = ("fc",)

    def __init__(self, activation=nn.ReLU, depth=1, width=16):
        super().__init__()
        widths = [1024] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.act = nn.ModuleList(activation() for _ in range(depth))
        self.fc = nn.Linear(width, 3)
        self.listened = []

    def forward(self, x):
        x = x.flatten(1)
        for layer, act in zip(self.hidden, self.act, strict=True):
            x = act(layer(x))
        self.listened += [any(act._forward_hooks for act in self.act)] * self.training
        return self.fc(x)


def with_(network, **changes):
    """Set the first layer's parameters to numbers, or multiply its weight by `times`; return the network."""
    with torch.no_grad():
        for name, value in changes.items():
            parameter = network.hidden[0].weight if name == "times" else getattr(network.hidden[0], name)
            parameter.mul_(value) if name == "times" else parameter.fill_(value)
    return network


class Bright(Pixels):
    """Images whose brightness is their class, in batches large enough for `ENOUGH`."""

    def __init__(self):
        super().__init__(n=96)

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=32)

    val_dataloader = train_dataloader


class Chance(Bright):
    """Twenty noise images with random labels, and other random labels for validation: there is nothing to learn."""

    def __init__(self):
        super().__init__()
        images = torch.randint(0, 256, (20, 1, 32, 32), dtype=torch.uint8)
        self.set, self.again = (TensorDataset(images, torch.randint(0, 3, (20,))) for _ in range(2))

    def val_dataloader(self):
        return DataLoader(self.again, batch_size=20)


def fitted(tmp_path, network=None, lr=0.01, data=None, stop=(), every=1, max_epochs=15, **options):
    """Run a trainer; return it and its monitor."""
    task = classifier(network or Stack(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr))
    watch = Monitor(every, stop)
    done = trainer(tmp_path, max_epochs=max_epochs, callbacks=[watch], num_sanity_val_steps=1, **options)
    done.fit(task, datamodule=data or Bright())
    return done, watch


def told(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("monitor: ")]


TROUBLES = {
    "vanishing_gradient": (lambda: {"network": Stack(nn.Sigmoid, depth=14)}, "network.hidden."),
    "exploding_gradient": (lambda: {"network": Stack(depth=6), "lr": 100.0}, "network."),
    "dead_relu": (lambda: {"network": with_(Stack(), bias=-100.0)}, "network.act.0: 100% of the units"),
    "saturated_activation": (lambda: {"network": with_(Stack(nn.Tanh), times=1000)}, "network.act.0: "),
    "loss_not_decreasing": (lambda: {"lr": 0.0}, "training loss"),
    "overfitting": (lambda: {"lr": 0.1, "data": Chance()}, "validation loss"),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_fires_on_its_fault_and_stops_the_run_if_listed_in_stop(rule, tmp_path, capsys):
    make, words = TROUBLES[rule]
    whole, _ = fitted(tmp_path, **make())
    assert whole.current_epoch == 15
    first = next(line for line in told(capsys) if f": {rule}: " in line)
    assert f": {rule}: {words}" in first
    torch.manual_seed(0)
    ended, _ = fitted(tmp_path, **make(), stop=[rule])
    assert f"{first}; the run ends" in told(capsys)
    assert first.startswith(f"monitor: step {ended.global_step}: ")
    assert ended.global_step < whole.global_step


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid])
def test_no_rule_fires_on_a_healthy_network(activation, tmp_path, capsys):
    done, watch = fitted(tmp_path, Stack(activation, depth=2), lr=0.05, every=3, stop=list(RULES), max_epochs=40)
    assert told(capsys) == []
    assert done.global_step == 120
    assert len(watch.seen.losses) == 40
    assert len(watch.seen.validations) == 40
    assert watch.seen.gradients.keys() == {f"network.{name}.weight" for name in ("hidden.0", "hidden.1", "fc")}
    shares = watch.seen.silent if activation is nn.ReLU else watch.seen.saturated
    assert shares.keys() == {"network.act.0", "network.act.1"}


def test_the_monitor_measures_only_at_multiples_of_every(tmp_path, monkeypatch):
    looks = []
    look = Monitor._look
    monkeypatch.setattr(
        Monitor, "_look", lambda self, **scaled: looks.append(len(self.measured)) or look(self, **scaled)
    )
    network = Stack()
    fitted(tmp_path, network, every=4)
    assert network.listened == [step % 4 == 0 for step in range(1, STEPS + 1)]
    assert looks == [2 * 2 + 1] * (STEPS // 4)  # two norms for each of two weights, and one share for a ReLU


def test_measurements_are_cleared_after_each_look():
    watch, silent = Monitor(), []
    watch.on_train_start(SimpleNamespace(global_step=0), SimpleNamespace(compile_network=False))
    watch.measured["silent", "act"] = torch.tensor(1.0)
    for _ in range(2):
        watch._look(scaled=False)
        silent.append(watch.seen.silent)
    assert silent == [{"act": 1.0}, {}]


def test_a_resumed_run_looks_at_the_same_steps_as_an_uninterrupted_one():
    monitor, trainer = Monitor(every=5), SimpleNamespace(global_step=7, is_global_zero=True)
    monitor.on_train_start(trainer, SimpleNamespace(compile_network=False))
    assert not monitor._due(trainer)
    trainer.global_step = 9
    assert monitor._due(trainer)


def test_accumulated_batches_count_as_one_step(tmp_path):
    network = Stack()
    done, watch = fitted(tmp_path, network, every=2, accumulate_grad_batches=3)
    assert done.global_step == 15
    assert network.listened == [(batch // 3 + 1) % 2 == 0 for batch in range(STEPS)]
    once, many = watch.seen.losses, fitted(tmp_path, Stack(), lr=0.0, every=3)[1].seen.losses
    assert len(once) == 7
    assert once[0] == pytest.approx(many[0], rel=0.2)  # and not a third of it


def test_steps_between_looks_fetch_nothing_from_the_device():
    """On the meta device there are no numbers, so fetching one fails."""
    watch = Monitor(every=3)
    with torch.device("meta"):
        task = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        batch = torch.ones(64, 4)
    task.compile_network = False
    at = SimpleNamespace(global_step=0, accumulate_grad_batches=1, precision_plugin=None, is_global_zero=True)
    watch.on_train_start(at, task)
    for step in range(3):
        at.global_step = step
        watch.on_train_batch_start(at, task, batch, step)
        loss = task(batch).mean()
        loss.backward()
        task.train_loss = loss.detach()
        watch.on_before_optimizer_step(at, task, None)
        assert len(watch.measured) == (3 if step == 2 else 0)
        at.global_step = step + 1
        if step < 2:
            watch.on_train_batch_end(at, task, {}, batch, step)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        watch.on_train_batch_end(at, task, {}, batch, step)


def test_a_rule_is_reported_again_only_after_it_has_cleared(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RULES, "dead_relu", lambda seen: "so" if len(seen.losses) in (2, 3, 4, 7, 8) else None)
    fitted(tmp_path, max_epochs=4)
    assert told(capsys) == [f"monitor: step {step}: dead_relu: so" for step in (2, 7)]


def test_a_compiled_network_gets_no_activation_hooks_and_a_notice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: None)
    network = with_(Stack(), bias=-100.0)
    task = classifier(network, compile_network=True)
    trainer(tmp_path, callbacks=[Monitor(1)]).fit(task, datamodule=Bright())
    assert told(capsys) == ["monitor: dead_relu and saturated_activation see nothing inside of a compiled network"]
    assert not any(network.listened)


def test_a_network_whose_biases_alone_train_has_no_gradients_to_judge(tmp_path):
    task = classifier(Stack(nn.ELU), freeze=r"hidden|fc\.weight")
    watch = Monitor(1)
    trainer(tmp_path, callbacks=[watch]).fit(task, datamodule=Bright())
    assert (watch.seen.gradients, len(watch.seen.losses)) == ({}, 3)


def test_the_monitor_refuses_every_of_zero():
    with pytest.raises(ValueError, match="every: 0; expected 1 or more"):
        Monitor(every=0)


# Thresholds of the rules


def test_gradient_rules_compare_gradient_norms_with_weight_norms():
    gradients = {"small": (1e-9, 1.0), "zero": (0.0, 1.0), "large": (1e3, 1.0), "unset": (5.0, 0.0)}
    assert vanishing_gradient(Seen(gradients)).startswith("small: gradient norm 1.0e-09, 1.0e-09 times")
    assert vanishing_gradient(Seen({"small": (1e-9, 1e-3), "zero": (0.0, 1.0)})) is None
    smaller = vanishing_gradient(Seen({"small": (1e-8, 1.0), "smallest": (2e-9, 1.0), "less": (1e-9, 0.1)}))
    assert smaller == "smallest: gradient norm 2.0e-09, 2.0e-09 times the weights'"
    assert exploding_gradient(Seen(gradients)) is None
    assert exploding_gradient(Seen({**gradients, "w": (2e5, 10.0)})).startswith("w: gradient norm 2.0e+05, 2.0e+04")
    assert exploding_gradient(Seen({**gradients, "w": (2e5, 100.0)})) is None
    assert exploding_gradient(Seen({**gradients, "w": (math.nan, 1.0)})).startswith("w: gradient norm nan")
    assert exploding_gradient(Seen()) is vanishing_gradient(Seen()) is dead_relu(Seen()) is None


def test_infinite_gradients_under_loss_scaling_are_ignored():
    watch = Monitor()
    for scaled in (True, False):
        watch.on_train_start(SimpleNamespace(global_step=0), SimpleNamespace(compile_network=False))
        watch.measured = {
            (kind, name): torch.tensor(number)
            for kind, name, number in [("gradient", "w", math.inf), ("weight", "w", 1.0), ("gradient", "v", 1e9)]
        } | {("weight", "v"): torch.tensor(1.0)}
        watch._look(scaled=scaled)
        assert watch.seen.gradients.keys() == ({"v"} if scaled else {"w", "v"})


def test_a_one_dimensional_output_has_no_units():
    assert silent_units(nn.ReLU(), torch.zeros(10_000)) is None


def test_the_loss_scale_is_divided_out_of_gradients_for_a_fused_optimiser():
    network = nn.Linear(3, 2)
    network(torch.ones(1, 3)).sum().mul(1024).backward()
    plugin = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 1024.0))
    trainer = SimpleNamespace(precision_plugin=plugin, global_step=0)
    monitor = Monitor(every=1)
    monitor.measured, monitor.looks = {}, 0
    for fused, times in ((True, 1), (False, 1024)):
        optimizer = torch.optim.AdamW(network.parameters(), fused=fused)
        monitor.on_before_optimizer_step(trainer, network, optimizer)
        assert monitor.measured["gradient", "weight"] == pytest.approx(times * 6**0.5)


@pytest.mark.parametrize("shape", [(64, 4), (8, 4, 3, 3), (8, 8, 4)])
def test_a_unit_is_silent_if_it_is_zero_for_all_examples_and_positions(shape):
    output = torch.zeros(shape)
    units = output.movedim(2 if len(shape) == 3 else 1, 0)
    units[1].flatten()[0] = 1e-3
    units[1, 5] = 1e-3  # one example is enough
    assert silent_units(nn.ReLU(), output) == 0.75
    assert silent_units(nn.ReLU(), output[:2]) is None  # two examples are too few to judge
    assert dead_relu(Seen(silent={"a": 0.5, "b": 0.1})) is None
    assert dead_relu(Seen(silent={"a": 0.51, "b": 0.75})).startswith("b: 75% of the units")


def test_a_module_called_several_times_counts_by_its_worst_call():
    watch = Monitor()
    watch.on_train_start(SimpleNamespace(global_step=0), SimpleNamespace(compile_network=False))
    for output in (torch.ones(64, 4), torch.zeros(64, 4), torch.ones(64, 4)):
        watch._hear("silent", "act", silent_units, nn.ReLU(), None, output)
    assert watch.measured["silent", "act"] == 1


def test_an_output_is_saturated_where_its_derivative_is_below_two_thousandths():
    """An output is saturated if the derivative of tanh or sigmoid is below 0.2% of its maximum."""
    inputs = torch.linspace(-12, 12, 1001, requires_grad=True)
    for squashing, largest in ((nn.Tanh(), 1.0), (nn.Sigmoid(), 0.25)):
        outputs = squashing(inputs)
        (slope,) = torch.autograd.grad(outputs.sum(), inputs)
        expected = (slope < 0.002 * largest).float().mean()
        torch.testing.assert_close(saturated_outputs(squashing, outputs), expected, atol=0.003, rtol=0)


def test_loss_not_decreasing_fires_after_ten_looks_without_a_lower_loss():
    falling = [1 - 0.01 * i for i in range(30)]
    assert loss_not_decreasing(Seen(losses=falling)) is None
    assert loss_not_decreasing(Seen(losses=[0.5] * LOOKS)) is None  # too early to tell
    assert loss_not_decreasing(Seen(losses=[0.5] * (LOOKS + 1)))
    assert loss_not_decreasing(Seen(losses=[-5.0] * (LOOKS + 1)))
    assert loss_not_decreasing(Seen(losses=[*falling, *[0.8] * (LOOKS - 1)])) is None
    assert loss_not_decreasing(Seen(losses=[*falling, *[0.8] * LOOKS]))
    assert loss_not_decreasing(Seen(losses=[-1 - loss for loss in falling]))  # a negative loss that rises
    assert loss_not_decreasing(Seen(losses=[-2 + loss for loss in falling])) is None
    assert loss_not_decreasing(Seen(losses=[0.5, *[math.nan] * LOOKS]))


def test_overfitting_needs_a_lasting_rise_of_the_validation_loss_while_training_falls():
    better = [(1.0, 1.2), (0.8, 1.0), (0.6, 0.9)]
    worse = [(0.5, 1.05), (0.4, 1.1), (0.3, 1.2)]
    assert overfitting(Seen(validations=better + worse))
    assert overfitting(Seen(validations=better + worse[:2])) is None
    assert overfitting(Seen(validations=[*better, *worse[:2], (0.3, 0.95)])) is None
    assert (
        overfitting(Seen(validations=better + [(0.7, loss) for _, loss in worse])) is None
    )  # both losses rise: no overfitting
    lately = [(0.5, 1.05), (0.7, 1.1), (0.3, 1.2)]
    assert overfitting(Seen(validations=better + lately))  # the last training loss is compared
    assert overfitting(Seen(validations=better + lately[::-1][:2] + [(0.7, 1.1)])) is None
    assert (
        overfitting(Seen(validations=better + [(loss, 0.91) for loss, _ in worse])) is None
    )  # a rise within the margin
    likelihoods = [(1.0, 2.0), (0.5, 1.0), (0.0, 0.0), (-0.1, 0.02), (-0.2, 0.02), (-0.3, 0.02)]
    assert (
        overfitting(Seen(validations=likelihoods)) is None
    )  # relative to a lowest loss of 0, any rise would be a tenth
    assert overfitting(Seen(validations=likelihoods + [(-0.3, 0.2)] * 3))


# The command line


COMMAND = shlex.split(monitor.Monitor.__doc__.partition("python train.py ")[2].partition("\n\n")[0])
SHORT = ["--trainer.max_epochs", "3", "--trainer.enable_progress_bar", "false", "--trainer.callbacks.every", "10"]


@pytest.mark.usefixtures("elsewhere")
def test_the_docstrings_command_stops_a_run_with_exploding_gradients(tmp_path, capsys):
    arguments = [str(ROOT / word) if word.startswith("configs/") else word for word in COMMAND]
    assert arguments[:2] == ["fit", "--config"]
    large = ["--model.init_args.optimizer.init_args.lr", "100"]
    large += ["--model.init_args.network.init_args.activation", "leaky_relu"]  # plain ReLUs would be dead
    assert train([*arguments, *SHORT, *large]) == 0
    (line,) = [line for line in told(capsys) if "exploding_gradient" in line]
    assert line.startswith("monitor: step 10: exploding_gradient: network.")
    assert line.endswith("; the run ends")
    run = tmp_path / "runs/lenet5_digits"
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 10
    assert (run / "checkpoints/best.ckpt").is_file()
    assert (run / "test.json").is_file()
    assert train(["validate", "--config", str(run / "config.yaml")]) == 0  # the config includes the monitor


@pytest.mark.usefixtures("elsewhere")
def test_the_command_line_refuses_unknown_rules_and_a_healthy_run_reports_nothing(tmp_path, capsys):
    digits = ["fit", "--config", str(ROOT / "configs/lenet5_digits.yaml"), "--trainer.callbacks+"]
    digits += ["dlref.tasks.Monitor", *SHORT, "--data.init_args.batch_size", "32"]
    digits += ["--final_test", "false", "--trainer.callbacks.stop"]
    assert train([*digits, "[exploding]"]) == 2
    assert "exploding_gradient" in capsys.readouterr().err
    assert train([*digits, "[exploding_gradient, vanishing_gradient]"]) == 0
    assert told(capsys) == []
    last = torch.load(tmp_path / "runs/lenet5_digits/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3 * 33  # the last, incomplete batch of the 1,077 digits is dropped


def test_the_monitor_does_not_undo_another_callbacks_stop():
    watch = monitor.Monitor()
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trained = SimpleNamespace(global_step=0, is_global_zero=True, should_stop=True, strategy=strategy)
    watch.on_train_start(trained, SimpleNamespace(compile_network=False))
    watch._judge(trained)
    assert trained.should_stop
