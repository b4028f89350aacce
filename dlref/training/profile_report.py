"""The report of a profile: the parts of a step, the bottleneck of the run, and advice."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

PARTS = ("data", "forward", "backward", "optimiser", "callbacks", "logging", "loop")

# Shares of a step above which a part, rather than the device's arithmetic, is reported to bound the run.
DATA = 0.2  # waiting for data takes almost no time if the workers keep up
AROUND = 0.3  # callbacks, logging and the loop together
CHECKPOINT = 0.1  # on top of the steps of an epoch
BUSY = 0.7  # below this share the GPU waits for kernels to be launched

ADVICE = {
    "data": "Waiting for data bounds the run. Try more data.init_args.num_workers, smaller files to decode, or data "
    "that is kept in memory.",
    "callbacks": "Callbacks bound the run. Try to run them less often, for example with EMA's update_every_n_steps.",
    "logging": "Logging bounds the run. Try a larger trainer.log_every_n_steps, or trainer.enable_progress_bar false.",
    "loop": "Lightning's loop around the steps bounds the run: they are short. Try a larger batch, for fewer of them.",
    "launches": "Python and the launches of kernels bound the run: the GPU waits for them. Try "
    "model.init_args.compile_network true, or a larger batch.",
    "checkpoint": "Checkpoints bound the run. Try fewer validations: a larger trainer.check_val_every_n_epoch.",
    "arithmetic": "The device's arithmetic (forward, backward, optimiser) bounds the run, as it should. Try "
    "model.init_args.compile_network true, trainer.precision bf16-mixed on a GPU, a smaller network or another device.",
}


@dataclass(frozen=True)
class Findings:
    """The findings of a profile. Times are in seconds.

    Attributes:
        parts: mean time of each part of a step, by name; the parts add up to the step.
        steps: times of the steps that were timed part by part.
        free: times of the steps in which nothing waited for the GPU; on a CPU the same as `steps`.
        checkpoint: median time to write a checkpoint.
        checkpoints: the largest number of checkpoints in an epoch.
        epoch: the number of steps in an epoch.
        busy: the share of a step for which the GPU computes, or None without a GPU.
    """

    parts: dict[str, float]
    steps: Sequence[float]
    free: Sequence[float]
    checkpoint: float
    checkpoints: float
    epoch: int
    busy: float | None

    @property
    def rows(self) -> dict[str, tuple[float, float]]:
        """Seconds per step and share of a step, by part. Checkpoints are spread over an epoch and come on top."""
        step = sum(self.parts.values())
        free = statistics.fmean(self.free)
        written = self.checkpoint * self.checkpoints / self.epoch
        parts = {name: (self.parts[name], self.parts[name] / step) for name in PARTS}
        return parts | {"step": (step, 1.0), "checkpoint": (written, written / free)}

    @property
    def bound(self) -> str:
        """The bottleneck of the run, a key of ADVICE."""
        return bound({name: share for name, (_, share) in self.rows.items()}, self.busy)

    def lines(self) -> list[str]:
        """Return the text below the table."""
        mean, median = statistics.fmean(self.free), statistics.median(self.free)
        said = [f"A step takes {milli(mean)} on average, {milli(median)} in the median, over {len(self.free)} steps."]
        if self.free != self.steps:
            said.append(
                f"In the table a step takes {milli(statistics.fmean(self.steps))}: there each part waits for the GPU, "
                "so that its time can be told from the others'."
            )
        if self.busy is not None:
            said.append(f"The GPU is busy for {self.busy:.0%} of a step.")
        said += [
            f"A checkpoint takes {milli(self.checkpoint)}. At most {self.checkpoints:.2g} are written in an epoch of "
            f"{self.epoch} steps: two after each validation, one every --checkpoint_minutes."
        ]
        return [" ".join(said), ADVICE[self.bound]]

    def markdown(self, where: list[str]) -> str:
        """Return the report as a Markdown page; `where` describes the machine and the files."""
        rows = [f"| {name} | {1000 * one:.3f} | {share:.1%} |" for name, (one, share) in self.rows.items()]
        table = "\n".join(["| part | ms a step | share |", "|---|---:|---:|", *rows])
        return "\n\n".join(["# Where the time of a step goes", table, *self.lines(), *where]) + "\n"

    def print(self, where: list[str]) -> None:
        """Print the report on the terminal, with the bottleneck in bold."""
        table = Table("part", title="where the time of a step goes", title_justify="left")
        for title in ("ms a step", "share"):
            table.add_column(title, justify="right")
        for name, (seconds, share) in self.rows.items():
            table.add_row(name, f"{1000 * seconds:.3f}", f"{share:.1%}", style="bold" if name == self.bound else "")
        console = Console()
        console.print(table)
        for line in [*self.lines(), *where]:
            console.print(line, soft_wrap=True, highlight=False)


def bound(shares: dict[str, float], busy: float | None) -> str:
    """Return the bottleneck of a run, a key of ADVICE.

    Args:
        shares: the share of a step's time by part; the share of checkpoints comes on top.
        busy: the share of a step for which the GPU computes, or None without a GPU.
    """
    around = {name: shares[name] for name in ("callbacks", "logging", "loop")}
    found = {
        "data": (shares["data"], DATA),
        max(around, key=around.get): (sum(around.values()), AROUND),
        "checkpoint": (shares["checkpoint"], CHECKPOINT),
    }
    large = {name: share for name, (share, limit) in found.items() if share > limit}
    if large:
        return max(large, key=large.get)
    return "launches" if busy is not None and busy < BUSY else "arithmetic"


def milli(seconds: float) -> str:
    """Format a time for people."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
