"""The table of a network's parts and their parameters, printed before training."""

from collections.abc import Iterable

from lightning import Callback, LightningModule, Trainer
from rich import get_console
from rich.table import Column, Table
from torch import nn


class NetworkSummary(Callback):
    """Prints the parts of the network with their parameters.

    Lightning's own table also has a row for each metric and a count of FLOPs, which is 0 unless a task has an
    `example_input_array`.
    """

    def on_fit_start(self, trainer: Trainer, task: LightningModule) -> None:
        """Print the table, in one process only."""
        if trainer.is_global_zero:
            get_console().print(network_table(task.network))


def network_table(network: nn.Module) -> Table:
    """Return a row for each part of `network`, and the total, in which a parameter shared by two parts counts once."""
    frozen = count(parameter for parameter in network.parameters() if not parameter.requires_grad)
    caption = f"{frozen:,} of them frozen" if frozen else None
    table = Table("Part", Column("Type", footer=type(network).__name__), caption=caption, show_footer=True)
    table.add_column("Parameters", f"{count(network.parameters()):,}", justify="right")
    for name, part in network.named_children():
        table.add_row(name, type(part).__name__, f"{count(part.parameters()):,}")
    return table


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Return the number of elements of all parameters."""
    return sum(parameter.numel() for parameter in parameters)
