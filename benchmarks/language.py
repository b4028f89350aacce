"""GPT beside `transformers`' GPT-2: `python -m benchmarks.language`, with the extra [bench].

Both networks have the same sizes and the same weights. Training: forward, cross entropy, backward, clipping, AdamW, on
the same random tokens, in float32 and by bfloat16 autocast. Generation: one prompt, token by token, the likeliest each
time: `transformers`' own generate with its cache, and dlref's runner over PyTorch, over the graph as a bundle opens it,
and over its int8 form. Then what a token costs where much has been read, and how it is that a past is not copied: the
attention of one token, by ONNX's Attention with a past that it puts together (opset 23), with one written in place
(opset 24), and by the two products of dlref's graph. They all take turns.

On a GPU instead: training of GPT-2 small, as configs/gpt2_124m.yaml has it, with the share of what a matrix product
reaches there in the same run.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch.nn import functional as F

from benchmarks.turns import in_turns
from dlref.export.convert import Plan, convert
from dlref.export.graph import write_onnx
from dlref.export.measure import processor
from dlref.export.targets import TARGETS
from dlref.models import GPT
from dlref.runtime import make_runner
from dlref.runtime.bundle import OnnxGraph, cores
from dlref.tasks import LanguageModel, MuonAdamW
from dlref.tasks.cross_entropy import linear_cross_entropy

TRAINED = {
    "vocabulary": 4096,
    "context_length": 256,
    "n_layer": 3,
    "n_head": 3,
    "n_embd": 192,
}  # configs/gpt_python.yaml
BATCH, STEPS = 16, 2
GENERATING = {
    "gpt_python, 2.2 million": TRAINED | {"context_length": 1024},
    "gpt_shakespeare_char, 10.7 million": {"vocabulary": 128, "n_layer": 6, "n_head": 6, "n_embd": 384},
    "GPT-2, 124 million": {"vocabulary": 50257},
}
TOKENS = 100
PLACES = (32, 900)
SMALL = {"vocabulary": 50304, "context_length": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
FLOAT32, INT8 = TARGETS["cpu"], TARGETS["x86-64"]


def both(**sizes):
    """Our network and theirs with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = GPT(**{"context_length": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768} | sizes)
    config = GPT2Config(
        vocab_size=sizes["vocabulary"],
        n_positions=ours.context_length,
        n_embd=ours.wte.embedding_dim,
        n_layer=len(ours.h),
        n_head=ours.n_head,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        bos_token_id=3,
        eos_token_id=3,
    )
    theirs = GPT2LMHeadModel(config)
    ours.load_state_dict(ours.of_base(theirs.state_dict()))
    tokens = torch.randint(sizes["vocabulary"], (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(ours.eval()(tokens)[0]), theirs.eval()(tokens).logits, rtol=1e-3, atol=1e-3
        )
    return ours, theirs


def our_loss(network: GPT, batch: torch.Tensor) -> torch.Tensor:
    """As `LanguageModel` has it."""
    hidden, _, _ = network(batch[:, :-1])
    return linear_cross_entropy(hidden.flatten(0, 1), network.output, batch[:, 1:].flatten())


def their_loss(network: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Of their logits."""
    return F.cross_entropy(network(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


def trainer(network: torch.nn.Module, half: bool, loss_of: Callable) -> Callable[[], None]:
    """A few steps of training on random tokens."""
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


def training() -> None:
    """A table of tokens a second."""
    print("\n| training | transformers, tokens/s | dlref, tokens/s | dlref is faster |\n|---|---|---|---|")
    for half in (False, True):
        ours, theirs = both(**TRAINED)
        calls = {
            "transformers": trainer(theirs, half, their_loss),
            "dlref": trainer(ours, half, our_loss),
        }
        tokens = STEPS * BATCH * TRAINED["context_length"]
        row("bfloat16" if half else "float32", in_turns("training", calls, "cpu"), tokens)


def row(title: str, seconds: dict[str, list[float]], tokens: int, own: str = "dlref") -> None:
    """Tokens a second of `transformers` and of `own`, and the ratio of their pairs."""
    rates = {name: [tokens / s for s in seconds[name]] for name in ("transformers", own)}
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    middle = [statistics.median(rate) for rate in rates.values()]
    print(
        f"| {title} | {middle[0]:.0f} | {middle[1]:.0f} | {statistics.median(ratios):.2f}× "
        f"({min(ratios):.2f} to {max(ratios):.2f}) |"
    )


def served(network: GPT, folder: Path, precision: str | None = None):
    """The runner over a network in PyTorch, or over its graph in a precision."""
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
    runner = make_runner(deployable.kind, graphs, deployable.metadata)
    runner.tokenizer.end = -1  # no end: as many tokens as are asked for
    return runner


def written(runner, prompt: list[int]) -> list[int]:
    """The likeliest tokens after a prompt, as the runner goes on."""
    from dlref.runtime.generation import Settings, Writing

    text = Writing(prompt, Settings(max_new_tokens=TOKENS, temperature=0), runner.tokenizer)
    for _ in runner.write([text]):
        pass
    return text.tokens[len(prompt) :]


def generation(folder: Path) -> None:
    """A table of tokens a second for each size, and what a token costs early and late."""
    heads = ["one text, token by token", "transformers", "dlref in PyTorch", "float32", "int8"]
    print(f"\n| {' | '.join(heads)} | float32 is faster | int8 is faster |\n|{'---|' * 7}")
    late = []
    for number, (title, sizes) in enumerate(GENERATING.items()):
        ours, theirs = both(**sizes)
        place = folder / str(number)
        place.mkdir()
        runners = {"dlref in PyTorch": served(ours, place)}
        runners |= {precision: served(ours, place, precision) for precision in ("float32", "int8")}
        prompt = torch.randint(4, sizes["vocabulary"], (1, 16))
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 3}

        def generate(theirs=theirs, prompt=prompt, options=options) -> list[int]:
            with torch.inference_mode():
                found = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            return found[0, prompt.shape[1] :].tolist()

        calls = {"transformers": generate}
        calls |= {
            name: lambda one=one, prompt=prompt: written(one, prompt[0].tolist()) for name, one in runners.items()
        }
        same = written(runners["dlref in PyTorch"], prompt[0].tolist()) == written(
            runners["float32"], prompt[0].tolist()
        )
        seconds = in_turns(title, calls, "cpu", turns=5)
        rates = {name: statistics.median(TOKENS / s for s in known) for name, known in seconds.items()}
        ratios = [
            statistics.median(a / b for a, b in zip(seconds["transformers"], seconds[name], strict=True))
            for name in ("float32", "int8")
        ]
        print(
            f"| {title} parameters | {' | '.join(f'{rate:.0f}' for rate in rates.values())} | {ratios[0]:.1f}× | "
            f"{ratios[1]:.1f}× |" + ("" if same else " the texts of PyTorch and of float32 differ")
        )
        late.append((title, {name: costs(runners[name]) for name in ("float32", "int8")}))
    print(f"\n| a token, ms | {' | '.join(f'{name}, after {n}' for name in ('float32', 'int8') for n in PLACES)} |")
    print(f"|{'---|' * 5}")
    for title, known in late:
        print(f"| {title} parameters | {' | '.join(f'{ms:.2f}' for pair in known.values() for ms in pair)} |")


def costs(runner) -> list[float]:
    """Milliseconds of a token after so many, the cache's growth and the choice of the token included."""
    from dlref.runtime.generation import Settings, Writing

    found = []
    for place in PLACES:
        text = Writing(list(np.arange(place) % 50 + 4), Settings(max_new_tokens=80, temperature=0), runner.tokenizer)
        stamps = [time.perf_counter() for _ in runner.write([text])]
        found.append(1e3 * statistics.mean(np.diff(stamps)))  # the mean, for the cache does not grow at each of them
    return found


def cache() -> None:
    """A table of microseconds of one token's attention: 12 heads of 64, room for 1,024 tokens, by three graphs."""
    print("\n| attention of one token, µs | after 32 | after 900 |\n|---|---|---|")
    known: dict[str, list[float]] = {name: [] for name in GRAPHS}
    for place in PLACES:
        calls = {name: make(place) for name, make in GRAPHS.items()}
        for name, seconds in in_turns("attention", calls, "cpu").items():
            known[name].append(1e6 * statistics.median(seconds) / CALLS)
    for name, times in known.items():
        print(f"| {name} | {times[0]:.0f} | {times[1]:.0f} |")


HEADS, WIDTH, ROOM, CALLS = 12, 64, 1024, 50
NEW = {name: [1, HEADS, 1, WIDTH] for name in ("query", "key", "value")}


def repeated(
    nodes: list, shapes: dict, outputs: list[str], opset: int, feeds: dict, kept: dict, constants=()
) -> Callable:
    """CALLS calls of a graph, whose outputs in `kept` are written into the inputs they name."""
    kinds = {name: TensorProto.INT64 if name in ("at", "there") else TensorProto.FLOAT for name in shapes}
    inputs = [helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in shapes.items()]
    found = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "attention", inputs, found, list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    values = {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items() if name not in feeds}
    held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in (values | feeds).items()}
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        if name in kept:
            binding.bind_ortvalue_output(name, held[kept[name]])
        else:
            binding.bind_output(name, "cpu")

    def call() -> None:
        for _ in range(CALLS):
            session.run_with_iobinding(binding)

    return call


def put_together(place: int) -> Callable:
    """ONNX's Attention that answers the past with the new token behind."""
    past = {name: [1, HEADS, place, WIDTH] for name in ("past_key", "past_value")}
    node = helper.make_node(
        "Attention", ["query", "key", "value", "", "past_key", "past_value"], ["y", "keys", "values"]
    )
    return repeated([node], NEW | past, ["y", "keys", "values"], 23, {}, {})


def in_place(place: int) -> Callable:
    """ONNX's Attention over a past with room, into which TensorScatter writes."""
    past = {name: [1, HEADS, ROOM, WIDTH] for name in ("past_key", "past_value")}
    nodes = [
        helper.make_node("TensorScatter", [f"past_{name}", name, "at"], [f"{name}s"], axis=2)
        for name in ("key", "value")
    ]
    nodes.append(helper.make_node("Attention", ["query", "keys", "values", "", "", "", "there"], ["y"]))
    feeds = {"at": np.array([place]), "there": np.array([place + 1])}
    shapes = NEW | past | {"at": [1], "there": [1]}
    kept = {"keys": "past_key", "values": "past_value"}
    return repeated(nodes, shapes, ["y", "keys", "values"], 24, feeds, kept)


def two_products(place: int) -> Callable:
    """What dlref's graph does: scores over the past and the new token side by side, and two weighted sums."""
    past = {name: [1, HEADS, place, WIDTH] for name in ("past_key", "past_value")}
    make = helper.make_node
    nodes = [
        make("Transpose", ["past_key"], ["past_turned"], perm=[0, 1, 3, 2]),
        make("Transpose", ["key"], ["turned"], perm=[0, 1, 3, 2]),
        make("MatMul", ["query", "past_turned"], ["before"]),
        make("MatMul", ["query", "turned"], ["now"]),
        make("Concat", ["before", "now"], ["scores"], axis=3),
        make("Softmax", ["scores"], ["weights"]),
        make("Slice", ["weights", "zero", "cut", "axis"], ["of_past"]),
        make("Slice", ["weights", "cut", "end", "axis"], ["of_new"]),
        make("MatMul", ["of_past", "past_value"], ["a"]),
        make("MatMul", ["of_new", "value"], ["b"]),
        make("Add", ["a", "b"], ["y"]),
    ]
    numbers = {"zero": 0, "cut": place, "end": place + 1, "axis": 3}
    constants = [helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in numbers.items()]
    return repeated(nodes, NEW | past, ["y"], 20, {}, {}, constants)


GRAPHS = {
    "Attention, past and new put together (opset 23)": put_together,
    "TensorScatter in place, Attention (opset 24)": in_place,
    "two products, as dlref's graph (opset 20)": two_products,
}


def on_gpu() -> None:
    """Tokens a second of GPT-2 small, and the share of a matrix product's rate: 6 operations a parameter and token."""
    device = torch.device("cuda")
    network = GPT(**SMALL, positions="rotary", bias=False, qk_norm=True).to(device)
    network.compile()
    task = LanguageModel(network=network, optimizer=None)
    optimizer = MuonAdamW(task.parameter_groups(list(network.parameters())), lr=1e-3)
    batch = torch.randint(SMALL["vocabulary"], (64, 1025), device=device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = our_loss(network, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    side = 8192
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    seconds = in_turns("GPT-2 small", {"step": step, "product": lambda: left @ right}, "cuda", turns=20)
    rate = batch[:, 1:].numel() / statistics.median(seconds["step"])
    peak = 2 * side**3 / statistics.median(seconds["product"])
    attention = 12 * SMALL["n_layer"] * SMALL["n_embd"] * SMALL["context_length"]
    used = rate * (6 * sum(p.numel() for p in network.parameters()) + attention)
    print(f"{torch.cuda.get_device_name()}: {rate:.0f} tokens/s, {used / peak:.0%} of {peak / 1e12:.0f} TFLOP/s")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"training": training, "generation": generation, "cache": cache}
    parser.add_argument("--only", choices=parts, help="one of the tables")
    asked = parser.parse_args().only
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnx", "onnxruntime"))
    print(f"{processor()}, {cores()} threads, Python {platform.python_version()}, {packages}")
    if torch.cuda.is_available():
        on_gpu()
        return
    torch.manual_seed(0)
    for name, part in parts.items():
        if asked in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                part(Path(folder)) if part is generation else part()


if __name__ == "__main__":
    main()
