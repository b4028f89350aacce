"""The facts of a run's data, saved with its weights, and the check that other weights agree with them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dlref.runtime import UserError
from dlref.runtime.errors import shortened
from dlref.runtime.text import make_tokenizer
from dlref.training.weights import read

Facts = dict[str, object]


def read_facts(path: Path) -> Facts:
    """Read the facts of a run from its folder or a checkpoint; other weights have none. Raises UserError."""
    state = read(path)
    return state["facts"] if isinstance(state, dict) and isinstance(state.get("facts"), dict) else {}


def check_rows(layers: Mapping[str, str], known: Facts, weights: Path, fresh: list[str]) -> None:
    """Refuse weights of a run whose embedding rows stand for other tokens or categories than this data's.

    Args:
        layers: name of a fact -> name of the layer whose rows stand for its entries (`Task.row_facts`).
        known: the facts of this data.
        weights: the run's folder or checkpoint.
        fresh: names of the tensors that were not loaded, such as those of layers for another number of tokens.
    """
    facts = read_facts(weights) if layers else {}
    for name, layer in layers.items():
        theirs, own = facts.get(name, known[name]), known[name]
        if theirs == own:
            continue
        others = type(theirs) is type(own) and number_of(theirs) != number_of(own)
        if not (others and any(tensor.startswith(f"{layer}.") for tensor in fresh)):
            raise UserError(
                f"weights {weights}: {name} of that run and of the data differ: {shortened(theirs)} and "
                f"{shortened(own)}; expected the same (for texts, set data.init_args.tokenizer to the run's folder), "
                f"or a different number of them, with which the network's {layer} is new"
            )


def number_of(fact: dict | Sequence) -> int:
    """Return the number of tokens of a tokeniser, or of names in a list."""
    return len(make_tokenizer(fact) if isinstance(fact, dict) else fact)
