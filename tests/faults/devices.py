"""The same run with one process and with two: losses, scores and file writes; SIGTERM, torchrun and FSDP.

    python -m tests.faults.devices [FAMILY...]

Each family runs its own commands on the same batches. Augmentation and dropout, which draw random numbers per device,
are switched off, and batch norm, whose statistics differ by device, is frozen. The losses of all steps must then equal
those of one process within a relative 1e-4 (sums are taken in another order), the test scores of a checkpoint must be
equal on one and on two devices within 1e-5 (each sample counts once), and only the first process may open a file of
the run for writing.
"""

import argparse
import csv
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import Progress

from tests.faults.families import FAMILIES, QUIET, ROOT, equal, known_family, state_of, words, write_text_file

LOSS, SCORE = 1e-4, 1e-5  # relative
PLAIN = {
    "image classification": {
        "data.init_args.pad_crop": 0,
        "data.init_args.cutout": 0,
        "model.init_args.mixup": 0,
    },
    "object detection": {
        "data.init_args": '{"train": 26, "held_out": 18, "batch_size": 4, "photometric": false, "crop": false, '
        '"zoom_out": 1}',
        "model.init_args.freeze": r".*(bn\d|downsample\.1|extra\.\d\.[14])\.",
    },
    "semantic segmentation": {
        "data.init_args": '{"train": 26, "held_out": 5, "batch_size": 4, "image_size": 32}',
        "model.init_args.network": '{"class_path": "dlref.models.FCNVGG16", "init_args": {"num_classes": 11, '
        '"stride": 32, "dropout": 0}}',
        "model.init_args.optimizer": '{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.001}}',
        "model.init_args.channels_last": "false",
    },
    "forecasting": {"model.init_args.network.init_args.dropout": 0},
    "translation": {
        "model.init_args.network.init_args.dropout": 0,
        "model.init_args.scheduled_sampling": 0,
    },
    "language modelling": {
        "model.init_args.network.init_args.dropout": 0,
        "trainer.accumulate_grad_batches": 1,
    },
}
BATCH = {"translation": 300, "language modelling": 2, "forecasting": 8}
TWO = {"trainer.devices": 2, "trainer.accelerator": "cpu", "trainer.strategy": "ddp"}

# Runs in every Python process started here and records which processes open a file of the run for writing.
WATCH = """
import os, sys
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and os.environ["WATCHED"] in os.path.abspath(arguments[0]):
        if isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            with open(os.environ["WRITERS"], "a") as file:
                file.write(os.environ.get("LOCAL_RANK", "0") + "\\n")
sys.addaudithook(watch)
"""


def arguments(family: str, run: Path, devices: int) -> list[str]:
    """Return the arguments of a fit; the size of the whole batch does not depend on the number of devices."""
    config, options = FAMILIES[family]
    options = {**options, **PLAIN[family], **QUIET, "run": run}
    options.pop("trainer.callbacks+", None)
    options |= {"trainer.max_epochs": 2, "trainer.limit_train_batches": 4}
    options |= {"data.init_args.batch_size": BATCH.get(family, 4) * (3 - devices), "trainer.log_every_n_steps": 1}
    options |= TWO if devices == 2 else {"trainer.accelerator": "cpu"}
    return ["fit", "--config", str(ROOT / "configs" / f"{config}.yaml"), *words(options), "--final_test", "false"]


def environment(folder: Path) -> dict[str, str]:
    """Return an environment with one thread per process and the watch in each process."""
    (folder / "sitecustomize.py").write_text(WATCH)
    watched = {"WATCHED": str(folder / "two"), "WRITERS": str(folder / "writers")}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{ROOT}", **watched}


def run(folder: Path, *command: str) -> None:
    """Run train.py with the arguments of a user; raise RuntimeError if it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *command],
        cwd=folder, env=environment(folder), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command}: {done.returncode}\n{done.stderr[-3000:]}")


def losses(folder: Path) -> list[float]:
    """Return the loss of each step."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def furthest(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference between two lists of numbers."""
    if len(one) != len(other):
        return math.inf
    return max(abs(a - b) / max(abs(a), abs(b), 1e-3) for a, b in zip(one, other, strict=True))


def compared(family: str, folder: Path) -> dict[str, object]:
    """Compare a run on one device with a run on two."""
    for devices, name in ((1, "one"), (2, "two")):
        run(folder, *arguments(family, folder / name, devices))
    scores = []
    for options in ({"trainer.devices": 1, "trainer.strategy": "auto"}, TWO):
        run(folder, "test", "--config", str(folder / "two" / "config.yaml"), *words(options))
        scores.append(json.loads((folder / "two" / "test.json").read_text()))
    writers = set((folder / "writers").read_text().split())
    steps = losses(folder / "one")
    return {
        "steps": len(steps),
        "loss": furthest(steps, losses(folder / "two")),
        "score": furthest(*([score[name] for name in sorted(scores[0])] for score in scores)),
        "writers": writers,
    }


# SIGTERM, and two machines


def told(folder: Path) -> str:
    """Send SIGTERM to the first of two processes; both must end, and the resumed run must end identically."""
    words_of = arguments("language modelling", folder / "two", 2)
    long = ["--trainer.limit_train_batches", "6", "--data.init_args.batches", "6", "--trainer.max_epochs", "60"]
    run(folder, *words_of, *long)
    (folder / "two").rename(folder / "whole")
    started = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words_of, *long], cwd=folder, env=environment(folder),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (folder / "two" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    if (status := started.wait(timeout=120)) != os.EX_TEMPFAIL:
        return f"status {status}"
    step = state_of(folder / "two")["global_step"]
    run(folder, *words_of, *long, "--ckpt_path", "last")
    same = equal(state_of(folder / "two"), state_of(folder / "whole"))
    return f"told in step {step} of 360, resumed, {'equal' if same else 'NOT EQUAL'}"


def two_machines(folder: Path) -> str:
    """Run torchrun twice, as on two machines with a process each; the weights must equal those of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words_of = arguments("language modelling", folder / "two", 2)
    run(folder, *words_of)
    (folder / "two").rename(folder / "whole")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = ["--trainer.devices", "1", "--trainer.num_nodes", "2"]
    machines = [
        subprocess.Popen(
            [*launch, "--node_rank", str(rank), "--", str(ROOT / "train.py"), *words_of, *nodes],
            cwd=folder, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for machine in machines:
        _, errors = machine.communicate(timeout=300)
        if machine.returncode:
            return f"status {machine.returncode}: {errors[-1500:]}"
    same = equal(state_of(folder / "two"), state_of(folder / "whole"))
    return f"weights {'equal' if same else 'NOT EQUAL'} to two processes of one machine"


def sharded(folder: Path) -> str:
    """Run FSDP with half of every parameter per process, and resume; losses must equal those of one process."""
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}}  # Muon multiplies whole matrices
    parts = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    strategy = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": parts}
    options = ["--data.init_args.batches", "4", "--model.init_args.optimizer", json.dumps(adamw)]
    options += ["--model.init_args.lr_scheduler", "null"]  # it would depend on the number of steps
    shard = ["--trainer.strategy", json.dumps(strategy)]
    run(folder, *arguments("language modelling", folder / "one", 1), *options)
    run(folder, *arguments("language modelling", folder / "two", 2), *options, *shard, "--trainer.max_steps", "5")
    run(folder, *arguments("language modelling", folder / "two", 2), *options, *shard, "--ckpt_path", "last")
    apart = furthest(losses(folder / "one"), losses(folder / "two"))
    return f"{'' if apart <= LOSS else 'NOT '}{len(losses(folder / 'one'))} losses within {apart:.1e}, resumed after 5"


def main() -> int:
    """Return 0 if the number of devices makes no difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", type=known_family, default=list(FAMILIES), metavar="FAMILY")
    families, failed = parser.parse_args().families, False
    with Progress(transient=True) as progress:
        task = progress.add_task("families", total=len(families) + 3)
        for family in families:
            with tempfile.TemporaryDirectory() as name:
                write_text_file(Path(name))
                found = compared(family, Path(name))
            failed |= not (found["loss"] <= LOSS and found["score"] <= SCORE and found["writers"] == {"0"})
            progress.console.print(
                f"{family:24}{found['steps']} losses within {found['loss']:.1e}, test scores on 1 and 2 devices within "
                f"{found['score']:.1e}; files written by process {', '.join(sorted(found['writers']))}"
            )
            progress.advance(task)
        for what, shown in (("SIGTERM", told), ("torchrun, two groups", two_machines), ("FSDP", sharded)):
            with tempfile.TemporaryDirectory() as name:
                write_text_file(Path(name))
                outcome = shown(Path(name))
            failed |= "NOT" in outcome or "status" in outcome
            progress.console.print(f"{what:24}{outcome}")
            progress.advance(task)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
