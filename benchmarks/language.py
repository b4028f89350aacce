"""GPT compared with `transformers`' GPT-2.

Both networks have the same sizes and the same weights. Training: forward, cross entropy, backward, clipping and AdamW
on random tokens, in float32 and with bfloat16 autocast. Generation: one prompt is continued token by token, always with
the likeliest token, by `transformers`' own generate with its cache, and by dlref's runner over PyTorch, over the graph
as a bundle opens it, and over its int8 form. `transformers` is measured with its default GELU, which is made of several
operations, and with its fused GELU. Training with the fused GELU also does without the cache that `transformers` fills
by default. Further rows give the time of a token after few and after many others. The last rows show the gain from not
copying the past. They compare the attention of one token in three graphs: dlref's, whose runner writes into the past;
ONNX's Attention, which concatenates past and new token (opset 23); and Attention over a past that is written in place
(opset 24). All sides take turns.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional as F

from benchmarks.rows import Row, Rows, figures_in_turns, in_turns, needs, rest, run
from dlref.export.convert import Plan, convert
from dlref.export.graph import write_onnx
from dlref.export.targets import TARGETS
from dlref.models import GPT
from dlref.models.gpt import Past, attend, causal_mask
from dlref.runtime.bundle import OnnxGraph
from dlref.runtime.generation import Settings, Writing
from dlref.runtime.runners.language import GROWTH
from dlref.tasks import LanguageModel
from dlref.tasks.cross_entropy import linear_cross_entropy
from dlref.tasks.deployable import Graph

TRAINED = {
    "vocabulary": 4096,
    "context_length": 256,
    "n_layer": 3,
    "n_head": 3,
    "n_embd": 192,
}  # configs/gpt_python.yaml
BATCH, STEPS = 16, 2
GENERATING = {
    "2.2 million parameters": TRAINED | {"context_length": 1024},
    "10.7 million parameters": {"vocabulary": 128, "n_layer": 6, "n_head": 6, "n_embd": 384},
    "GPT-2's 124 million parameters": {"vocabulary": 50257},
}  # configs/gpt_python.yaml, configs/gpt_shakespeare_char.yaml
TOKENS, AFTER = 100, 64  # tokens to generate; tokens timed after few or many others
GENERATED, LATE = 5, 15  # turns of these two benchmarks; a turn of the second can take as little as 20 ms
PLACES = (32, 900)
FLOAT32, INT8 = TARGETS["cpu"], TARGETS["x86-64"]
DEFAULTS, FUSED = "transformers, defaults", "transformers, fused GELU"


def all_of(**sizes) -> tuple[GPT, dict[str, nn.Module]]:
    """Return our network, and transformers' with its default and with its fused GELU, with the same weights."""
    needs("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = GPT(**{"context_length": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768} | sizes)
    options = {
        "vocab_size": sizes["vocabulary"],
        "n_positions": ours.context_length,
        "n_embd": ours.wte.embedding_dim,
        "n_layer": len(ours.h),
        "n_head": ours.n_head,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), None),  # always as many tokens as requested
    }
    theirs = {
        DEFAULTS: GPT2LMHeadModel(GPT2Config(**options)),
        FUSED: GPT2LMHeadModel(GPT2Config(**options, activation_function="gelu_pytorch_tanh")),
    }
    weights = theirs[DEFAULTS].state_dict()
    ours.load_state_dict(ours.of_base(weights))
    tokens = torch.randint(sizes["vocabulary"], (2, 16))
    for network in theirs.values():
        network.load_state_dict(weights)
        with torch.no_grad():
            logits = ours.logits(ours.eval()(tokens)[0])
            torch.testing.assert_close(logits, network.eval()(tokens).logits, rtol=1e-3, atol=1e-3)
    return ours, theirs


def our_loss(network: GPT, batch: torch.Tensor) -> torch.Tensor:
    """Return the loss as `LanguageModel` computes it."""
    hidden, _, _ = network(batch[:, :-1])
    return linear_cross_entropy(hidden.flatten(0, 1), network.output, batch[:, 1:].flatten())


def their_loss(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the loss of transformers' logits."""
    return F.cross_entropy(network(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


def trainer(network: nn.Module, half: bool, loss_of: Callable) -> Callable[[], None]:
    """Return a function that makes a few training steps on random tokens."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    batch = torch.randint(TRAINED["vocabulary"], (BATCH, TRAINED["context_length"] + 1))

    def steps() -> None:
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = loss_of(network, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def training() -> Rows:
    """Compare tokens per second in training."""
    torch.manual_seed(0)
    tokens = STEPS * BATCH * TRAINED["context_length"]
    rows = {}
    for title, half in (("float32", False), ("bfloat16 autocast", True)):
        ours, theirs = all_of(**TRAINED)
        theirs[FUSED].config.use_cache = False
        calls = {name: trainer(network, half, their_loss) for name, network in theirs.items()}
        seconds = in_turns("training", calls | {"dlref": trainer(ours, half, our_loss)})
        rates = {name: [tokens / s for s in found] for name, found in seconds.items()}
        rows |= beside_transformers(f"training, 2.2 million parameters, {title}", rates, "dlref", ">= 1.2")
    return rows


def beside_transformers(title: str, rates: dict[str, list[float]], own: str, goal: str) -> Rows:
    """Return rows of tokens per second, compared with both of transformers' networks."""
    peers = {title: DEFAULTS, f"{title}, beside fused GELU": FUSED}
    return {title: Row(rates[own], rates[peer], "tokens/s", peer, goal) for title, peer in peers.items()}


def served(network: GPT, folder: Path, precision: str | None = None):
    """Return the runner over a network in PyTorch, or over its graph in a precision."""
    size = network.wte.num_embeddings
    task = LanguageModel(network=network, optimizer=None).eval()
    letters = ["<pad>", "<unk>", "<s>", "</s>", *(chr(256 + i) for i in range(size - 4))]
    vocabulary = {"kind": "character", "exact": True, "tokens": letters}
    task.remember({"vocabulary": vocabulary, "context_length": network.context_length})
    deployable = task.deployable(torch.randint(4, size, (2, 8)))
    graphs = deployable.graphs
    if precision:
        paths = {name: folder / name / "decode.onnx" for name in ("float32", precision)}
        for path in paths.values():
            path.parent.mkdir(exist_ok=True)
        if not paths["float32"].is_file():
            write_onnx(graphs["decode"], paths["float32"], FLOAT32)
        if precision == "int8":
            convert(paths["float32"], paths["int8"], INT8, Plan("int8"), [])
        graphs = {"decode": OnnxGraph(paths[precision], "CPUExecutionProvider")}
    runner = deployable.runner(graphs)
    runner.tokenizer.end = -1  # no end: always as many tokens as requested
    return runner


def written(runner, prompt: list[int]) -> list[int]:
    """Return the likeliest tokens after a prompt, generated by the runner."""
    text = Writing(prompt, Settings(max_new_tokens=TOKENS, temperature=0), runner.tokenizer)
    for _ in runner.write([text]):
        pass
    return text.tokens[len(prompt) :]


def generated(theirs: nn.Module, prompt: list[int]) -> list[int]:
    """Return the same, generated by `transformers`."""
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 3}
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        found = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return found[0, len(prompt) :].tolist()


def generation() -> Rows:
    """Compare tokens per second for each size. All texts except those of the int8 graphs must be equal."""
    torch.manual_seed(0)
    rows = {}
    for title, sizes in GENERATING.items():
        ours, theirs = all_of(**sizes)
        prompt = torch.randint(4, sizes["vocabulary"], (16,)).tolist()
        with tempfile.TemporaryDirectory() as folder:
            opened = {name: served(ours, Path(folder), name) for name in ("float32", "int8")}
            opened["PyTorch"] = served(ours, Path(folder))
            calls = {name: partial(written, runner, prompt) for name, runner in opened.items()}
            calls |= {name: partial(generated, network, prompt) for name, network in theirs.items()}
            texts = {name: call() for name, call in calls.items() if name != "int8"}
            for name, text in texts.items():
                assert text == texts["PyTorch"], f"the texts of {name} and of dlref in PyTorch differ ({title})"
            calls["rest"] = rest
            seconds = in_turns(title, calls, turns=GENERATED)
        rates = {name: [TOKENS / s for s in found] for name, found in seconds.items()}
        for name, shown, goal in (
            ("PyTorch", "PyTorch", ""),
            ("float32", "float32 graph", ">= 3"),
            ("int8", "int8 graph", ">= 3"),
        ):
            rows |= beside_transformers(f"one text token by token, {title}, {shown}", rates, name, goal)
    return rows


def late_tokens() -> Rows:
    """Compare the seconds of a token after `place` others between the int8 and the float32 graph."""
    torch.manual_seed(0)
    rows = {}
    for title, sizes in GENERATING.items():
        ours, _ = all_of(**sizes)
        with tempfile.TemporaryDirectory() as folder:
            opened = {name: served(ours, Path(folder), name) for name in ("float32", "int8")}
            for place in PLACES:
                costs = {name: partial(cost, runner, place) for name, runner in opened.items()}
                found = figures_in_turns(title, costs, LATE)
                row = Row(found["int8"], found["float32"], "s", "float32 graph")
                rows[f"a token after {place} others, {title}, int8 graph"] = row
    return rows


def cost(runner, place: int) -> float:
    """Return the seconds of a token after `place` others, including the cache's growth and the choice of the token."""
    known = list(np.arange(place) % 50 + 4)
    text = Writing(known, Settings(max_new_tokens=AFTER, temperature=0), runner.tokenizer)
    stamps = [time.perf_counter() for _ in runner.write([text])]
    return float(np.mean(np.diff(stamps)))  # the mean, as the cache grows only at some tokens


def attention() -> Rows:
    """Compare the seconds of one token's attention, 12 heads of 64, in three graphs."""
    rows = {}
    for place in PLACES:
        calls = {name: make(place) for name, make in GRAPHS.items()}
        found = in_turns("attention", calls)
        own, *peers = [[s / CALLS for s in seconds] for seconds in found.values()]
        for name, peer in zip(list(GRAPHS)[1:], peers, strict=True):
            rows[f"attention of one token after {place}, beside {name}"] = Row(own, peer, "s", name)
    return rows


HEADS, WIDTH, CALLS = 12, 64, 50
NEW = {name: [1, HEADS, 1, WIDTH] for name in ("query", "key", "value")}


def past_with(place: int) -> dict[str, list[int]]:
    """Return the shapes of a past of `place` tokens."""
    return {name: [1, HEADS, place, WIDTH] for name in ("past_key", "past_value")}


def room_for(place: int) -> int:
    """Return the capacity of the past when dlref's runner writes the token after `place` others."""
    return -(-(place + 1) // GROWTH) * GROWTH


def made_of(nodes: list, shapes: dict, outputs: list[str], opset: int) -> onnx.ModelProto:
    """Return a graph of ONNX's own operators."""
    kinds = {name: TensorProto.INT64 if name in ("at", "there") else TensorProto.FLOAT for name in shapes}
    inputs = [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in shapes.items()]
    found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "attention", inputs, found)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def repeated(
    model: onnx.ModelProto, shapes: dict, feeds: dict, kept: dict, after: Callable[[dict], None] = lambda values: None
) -> Callable:
    """Return CALLS calls of a graph, each followed by `after`. `kept` maps outputs to inputs they are written into."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    values = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items() if name not in feeds}
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in (values | feeds).items()}
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name in (output.name for output in session.get_outputs()):
        if name in kept:
            binding.bind_ortvalue_output(name, held[kept[name]])
        else:
            binding.bind_output(name, "cpu")

    def call() -> None:
        for _ in range(CALLS):
            session.run_with_iobinding(binding)
            after(values)

    return call


def put_together(place: int) -> Callable:
    """Return calls of ONNX's Attention that outputs the past concatenated with the new token."""
    shapes, outputs = NEW | past_with(place), ["y", "keys", "values"]
    node = helper.make_node("Attention", ["query", "key", "value", "", "past_key", "past_value"], outputs)
    return repeated(made_of([node], shapes, outputs, 23), shapes, {}, {})


def in_place(place: int) -> Callable:
    """Return calls of ONNX's Attention over a past with spare capacity, into which TensorScatter writes."""
    nodes = [
        helper.make_node("TensorScatter", [f"past_{name}", name, "at"], [f"{name}s"], axis=2)
        for name in ("key", "value")
    ]
    nodes.append(helper.make_node("Attention", ["query", "keys", "values", "", "", "", "there"], ["y"]))
    feeds = {"at": np.array([place]), "there": np.array([place + 1])}
    shapes = NEW | past_with(room_for(place)) | {"at": [1], "there": [1]}
    kept = {"keys": "past_key", "values": "past_value"}
    return repeated(made_of(nodes, shapes, ["y", "keys", "values"], 24), shapes, feeds, kept)


class Attend(nn.Module):
    """The attention of dlref's graph."""

    def forward(self, query, key, value, past_key, past_value, length) -> torch.Tensor:
        """Attend from one token of one text to a past of `length` tokens."""
        mask = causal_mask(length[:, None], Past([past_key], [past_value], length))
        return attend(query, key, value, past_key, past_value, mask)


def two_products(place: int) -> Callable:
    """Return calls of dlref's graph over a past of any capacity, into which its runner writes."""
    shapes = NEW | past_with(room := room_for(place))
    inputs = {name: torch.zeros(shape) for name, shape in shapes.items()} | {"length": torch.tensor([place])}
    free = {name: {2: "past"} for name in past_with(room)}
    graph = Graph(Attend(), inputs, ["y"], free, {"past": (room, 2 * room)})

    def write(values: dict) -> None:
        for name in ("key", "value"):
            values[f"past_{name}"][:, :, place] = values[name][:, :, 0]

    with tempfile.TemporaryDirectory() as folder:
        write_onnx(graph, Path(folder, "attention.onnx"), FLOAT32)
        model = onnx.load(Path(folder, "attention.onnx"))
    return repeated(model, shapes, {"length": np.array([place])}, {}, write)


GRAPHS = {
    "dlref's own (opset 20)": two_products,
    "Attention, past and new concatenated (opset 23)": put_together,
    "TensorScatter in place, Attention (opset 24)": in_place,
}
BENCHMARKS = {
    "language-training": training,
    "language-generation": generation,
    "language-late-tokens": late_tokens,
    "language-attention": attention,
}


if __name__ == "__main__":
    run(BENCHMARKS)
