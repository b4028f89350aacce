"""Load weights into a network, from published state dicts and from runs of this project."""

import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dlref.runtime import UserError
from dlref.runtime.errors import one_line
from dlref.training.seal import damage, seal_of

log = logging.getLogger(__name__)

SHOWN = 3  # tensors listed in an error

# Parts of a checkpoint to resume from. The keys are Lightning's, except for those of `Task.on_save_checkpoint`.
PARTS = {
    "state_dict": (dict, OrderedDict),
    "facts": (dict,),
    "optimizer": (dict,),
    "global_step": (int,),
    "loops": (dict,),
    "callbacks": (dict,),
    "optimizer_states": (list,),
    "lr_schedulers": (list,),
    "pytorch-lightning_version": (str,),
}


def read(path: Path) -> object:
    """Read a PyTorch or safetensors file, or the best checkpoint of a run's folder, without unpickling code.

    Raises UserError.
    """
    if path.is_dir():
        path = path / "checkpoints" / "best.ckpt"
    if not path.is_file():
        raise UserError(f"{path}: not found; expected a .safetensors or .pt state dict, or the folder of a run")
    if seal_of(path) and (wrong := damage(path)):
        raise UserError(f"{path}: damaged ({wrong}); expected the file as it was written")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message advises loading it anyway
        raise UserError(f"{path}: unreadable, or holds code; expected tensors and plain values") from None
    except Exception as error:  # safetensors and zipfile each raise their own errors
        raise UserError(f"{path}: unreadable ({one_line(error)}); expected tensors and plain values") from None


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint of this project. Raises UserError."""
    state = read(path)
    parts = isinstance(state, dict) and all(type(state.get(key)) in kinds for key, kinds in PARTS.items())
    if not (parts and all(isinstance(name, str) for name in state["state_dict"])):
        raise UserError(
            f"{path}: not a checkpoint of this version of dlref; expected one that train.py wrote, or "
            "model.init_args.weights for a new run that starts from the weights"
        )
    return state


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a network from a .safetensors or .pt/.pth file, a checkpoint or a run's folder.

    Raises UserError.
    """
    state = read(path)
    prefix = ""
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        prefix = "network." if "facts" in state else ""  # in a checkpoint of this project the task holds the network
        state = state["state_dict"]
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict; expected names and tensors")
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def check_tied(path: Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise UserError if two tensors of `state` differ but are tied in the network: one of them would be lost."""
    first: dict[int, str] = {}
    for key in (key for key, value in own.items() if key in state and value.numel()):
        other = first.setdefault(own[key].data_ptr(), key)
        if other != key and not torch.equal(state[key], state[other]):
            words = "but this network ties them; expected equal tensors"
            raise UserError(f"{path}: {key} and {other} differ, {words}")


def load_weights(network: nn.Module, path: Path) -> list[str]:
    """Load `path` into `network` and return the names of the tensors left as initialised.

    Layers listed in `network.class_layers` keep their fresh weights if shapes differ or the file lacks them. Given a
    published classifier, only the backbone (`network.base`) is loaded. Both are logged. Raises UserError
    for any other mismatch.
    """
    own = network.state_dict()
    state, of_base = _state_for(network, read_state_dict(path), own)
    fresh, problems = _compare(network, state, own, of_base)
    if problems:
        named = [f"{key} {shape_of(state, key)}, here {shape_of(own, key)}" for key in problems[:SHOWN]]
        if len(problems) > SHOWN:
            named.append("...")
        raise UserError(
            f"{path}: {len(problems)} tensors do not fit {type(network).__name__} ({'; '.join(named)}); "
            "expected the weights of this architecture"
        )
    taken = {key: value for key, value in state.items() if key not in fresh}
    check_tied(path, taken, own)
    network.load_state_dict(own | taken)
    if of_base:
        log.warning("%s: loaded into the base; %d of %d tensors are new", path, len(fresh), len(own))
    else:
        log.warning("%s: loaded; new head for other classes: %s", path, ", ".join(fresh) or "none needed")
    return fresh


def _state_for(network: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors to load, and whether they are a published classifier's, renamed for the backbone.

    Of tensors that do not fit under either name, return those with more names in common and fewer others: they say what
    differs.
    """
    fits = all(key in own and value.shape == own[key].shape for key, value in state.items())
    if hasattr(network, "of_base") and not fits:
        renamed = network.of_base(state)
        if renamed and renamed.keys() <= own.keys():
            return renamed, True
        state = max(state, renamed or state, key=lambda named: (len(named.keys() & own.keys()), -len(named)))
    return state, False


def _compare(
    network: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor], of_base: bool
) -> tuple[list[str], list[str]]:
    """Return the names of the network's tensors that keep their fresh weights, and of tensors that do not fit."""
    of_classes = tuple(f"{layer}." for layer in getattr(network, "class_layers", ()))
    differing = {key for key in state.keys() & own.keys() if state[key].shape != own[key].shape}
    replaced = {key for key in differing if key.startswith(of_classes)}
    # Older files, such as published ResNets, lack these counters.
    missing = {key for key in own.keys() - state.keys() if not key.endswith("num_batches_tracked")}
    if of_base:
        needed = {key for key in missing if key.startswith(network.base)}
    else:
        needed = {key for key in missing if not key.startswith(of_classes)}
    problems = (state.keys() - own.keys()) | needed | (differing - replaced)
    return sorted(missing | replaced), sorted(problems)


def shape_of(state: Mapping[str, Tensor], key: str) -> str:
    """Format the shape of a tensor, or return "missing"."""
    return f"({', '.join(map(str, state[key].shape))})" if key in state else "missing"


def freeze(network: nn.Module, pattern: str) -> None:
    """Freeze every parameter whose name matches `pattern` from its start.

    A module whose own parameters are all frozen is set to evaluation mode unless it is recurrent, so that frozen batch
    norms keep their statistics. Raises UserError if `pattern` is not a regular expression or matches nothing.
    """
    try:
        matches = re.compile(pattern).match
    except re.error as error:
        raise UserError(f"freeze {pattern!r}: {error}; expected a regular expression") from None
    named = network.named_parameters(remove_duplicate=False)  # a tied weight has two names
    frozen = [p for name, p in named if matches(name)]
    if not frozen:
        example = next(name for name, _ in network.named_parameters())
        raise UserError(f"freeze {pattern!r} matches no parameter; expected names such as {example}")
    for parameter in frozen:
        parameter.requires_grad_(False)
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        # cuDNN differentiates recurrent layers only in training mode; they have no statistics.
        if own and not any(p.requires_grad for p in own) and not isinstance(module, nn.RNNBase):
            module.training = False  # not eval(): the module's children may train
