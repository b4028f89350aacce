"""Language modelling: predict each token of a text from those before it.

Legend of shapes: B texts, T tokens, U one more (T + 1), P past tokens, W tokens whose logits are requested, V size of
the vocabulary, L layers, H heads, D width of a head.
"""

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torchmetrics import Metric

from dlref.models.gpt import Past
from dlref.runtime import UserError
from dlref.runtime.runners.language import Runner
from dlref.runtime.text import make_tokenizer
from dlref.tasks.cross_entropy import linear_cross_entropy, nll_and_gradient
from dlref.tasks.deployable import Deployable, Graph
from dlref.tasks.task import PROBED, Task, increase, unlike

IGNORE = -1  # stands for tokens beyond the end of a split
NEW = 2  # tokens after the past in the example inputs
READ = 3  # past tokens of the second text in the example inputs
SAMPLE = 200  # tokens of a sample
SHOWN = 24  # tokens of the sentence whose attention is drawn
SAMPLES = 8  # in the table


class LanguageModel(Task):
    """Cross entropy of each token given those before it.

    The network must have `forward`, `output`, `logits`, `attention` and `context_length` like `GPT` and, to be sharded,
    its blocks in `h`. A batch holds (B, T + 1) tokens: the first T are read, the last T predicted.

    Args:
        prompt: start of the samples generated during training.
        decay_vectors: whether to apply weight decay to biases and norms, too.
        task: arguments of every `Task`: network, optimizer, lr_scheduler, weights, freeze, ...
    """

    needs = ("output", "logits", "attention", "context_length")
    fact_names = ("vocabulary", "context_length")
    row_facts: ClassVar = {"vocabulary": "wte"}
    metric = "bits_per_byte"

    def __init__(self, prompt: str = "", decay_vectors: bool = False, **task):
        super().__init__(decay_vectors=decay_vectors, **task)
        self.prompt = prompt
        self.nll: TokenNLL | None = None
        self.nll_and_gradient = nll_and_gradient
        self.sentence: list[int] = []

    def setup(self, stage: str) -> None:
        """Create the score once the vocabulary is known, and compile the loss."""
        super().setup(stage)
        if self.nll is None:
            if self.compile_network and self.trainer.strategy.root_device.type == "cuda":  # a CPU gains little
                self.nll_and_gradient = torch.compile(nll_and_gradient, dynamic=False)
            sizes = torch.tensor([len(spelling) for spelling in self.tokenizer.spelling])
            self.nll = TokenNLL(self.facts["context_length"], sizes).to(self.device)

    def check(self) -> None:
        """Run the last token through the network: one with too small a vocabulary would fail within an epoch."""
        vocabulary, length = len(self.tokenizer), self.facts["context_length"]
        expected = (
            f"expected model.init_args.network.init_args of at least vocabulary: {vocabulary}, context_length: {length}"
        )
        with self.probing("the tokens of this data", expected):
            last = torch.full((1, 1), vocabulary - 1, device=self.network_device)
            hidden = self.network(last)[0]
            hidden = torch.cat([0 * hidden, 1000 * hidden])  # a bias shows at zero, a bound far from it
            logits, linear = self.network.logits(hidden).float(), F.linear(hidden, self.network.output).float()
            linear = linear[..., : logits.shape[-1]]  # padding of the vocabulary may be cut off
            differing = (logits - linear).abs() > 0.01 * linear.abs().amax(-1, keepdim=True)
        if differing.any():
            raise UserError(
                "network's logits differ from its hidden states times output, as training computes them; "
                "expected logits without a bias, a scale or a bound"
            )
        room, context = logits.shape[-1], self.network.context_length
        if room < vocabulary or context < length:
            raise UserError(f"network has room for {room} tokens and a context of {context}; {expected}")
        if length > 1:
            self.check_past(min(length, 3), vocabulary - 1)

    def check_past(self, length: int, token: int) -> None:
        """Run texts of `length` tokens that differ in `token`: a network that looks ahead has a loss near 0.

        Raises UserError.
        """
        expected = "expected them to depend on the tokens before, in the text or the past, and on no other text"
        texts = torch.full((PROBED, length), token, device=self.network_device)
        texts[0, :-1] = 0
        with self.probing("a past of its own keys and values", expected):
            whole = self.network(texts)[0]
            before, keys, values = self.network(texts[:1, :-1])
            after = self.network(texts[:1, -1:], Past(keys, values, texts.new_tensor([length - 1])))[0]
        if whole.ndim != 3 or whole.shape[:2] != texts.shape:
            raise UserError(f"network returns {list(whole.shape)}; expected hidden states (B, T, E)")
        if unlike(torch.cat([before, after], dim=1), whole[:1]):
            raise UserError(f"network's hidden states change with later tokens, other texts or a past; {expected}")

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[dict]:
        """Return the groups of hidden matrices, of embedding tables and the output layer, and of vectors."""
        tables = {id(table.weight) for table in self.network.modules() if isinstance(table, nn.Embedding)}
        tables.add(id(self.network.output))  # a matrix of its own unless tied
        matrices = [p for p in parameters if p.ndim > 1]
        groups = [
            {"params": [p for p in matrices if id(p) not in tables], "hidden": True},
            {"params": [p for p in matrices if id(p) in tables]},
            {"params": [p for p in parameters if p.ndim <= 1]} | ({} if self.decay_vectors else {"weight_decay": 0.0}),
        ]
        return [group for group in groups if group["params"]]

    # Texts

    @cached_property
    def tokenizer(self):
        """The tokeniser of the data."""
        return make_tokenizer(self.facts["vocabulary"])

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of the next token at each position, without those that pad the vocabulary."""
        return self.network.logits(self.network(tokens)[0])[..., : len(self.tokenizer)]

    def runner(self) -> Runner:
        """Return the runner that a device uses, over this network."""
        return self.deployable(torch.zeros(1, READ + NEW, dtype=torch.long, device=self.device)).runner()

    # Lightning's steps

    def configure_model(self) -> None:
        """Shard the network block by block with FSDP if the strategy is Lightning's ModelParallelStrategy.

        Each device keeps a part of every parameter, its gradient and its moments; a block is whole while it computes.
        """
        if self.device_mesh is None or isinstance(self.network, FSDPModule):
            return
        for module in (*self.network.h, self.network):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Int[Tensor, "B U"], batch_index: int) -> Tensor:
        """Return the cross entropy over all tokens that the network has, including padding of the vocabulary."""
        before, after = batch[:, :-1], batch[:, 1:].flatten()
        if self.compile_network:  # keep the size static: evaluation with another size would make it dynamic
            torch._dynamo.mark_static(before, 0)
        hidden, _, _ = self.network(before)
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.network.output, after, self.nll_and_gradient)
        return self.log_train_loss(loss, len(after))

    def judge(self, batch: Int[Tensor, "B U"]) -> None:
        """Add the nats of every token of a batch."""
        after = batch[:, 1:]
        logits = self(batch[:, :-1].clamp(min=0)).float()
        nats = F.cross_entropy(logits.flatten(0, 1), after.flatten(), ignore_index=IGNORE, reduction="none")
        self.nll.update(nats.view_as(after), after)

    def log_evaluation(self, stage: str) -> None:
        """Log all scores, over all devices, and except during training, those of compression programs."""
        values = self.nll.compute()
        if self.trainer.state.fn != "fit":
            values |= self.trainer.datamodule.compressed(stage)
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=stage == "val")

    def on_validation_epoch_start(self) -> None:
        """Clear the scores of the epoch, and the sentence for the attention figure."""
        self.nll.reset()
        self.sentence = []

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Int[Tensor, "B U"], batch_index: int) -> None:
        """Score every token."""
        self.judge(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores and, in a fit, a text sample to TensorBoard, from the first device and unless sharded."""
        self.log_evaluation("val")
        samples = self.trainer.is_global_zero and self.device_mesh is None
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking and samples:
            runner = self.runner()
            runner.max_new_tokens = SAMPLE
            text = self.prompt + runner(self.prompt)["text"]
            for logger in self.loggers:
                if hasattr(logger.experiment, "add_text"):
                    indented = "".join(f"    {line}\n" for line in text.split("\n"))  # verbatim in Markdown
                    logger.experiment.add_text("sample", indented, self.global_step)

    def test_step(self, batch: Int[Tensor, "B U"], batch_index: int) -> None:
        """Score every token, and keep the first sentence for the attention figure."""
        self.judge(batch)
        self.sentence = self.sentence or batch[0, :-1][:SHOWN].clamp(min=0).tolist()

    def on_test_epoch_end(self) -> None:
        """Log the scores of the split."""
        self.log_evaluation("test")

    def predict_step(self, batch: str, batch_index: int) -> list[dict]:
        """Return the prediction of the bundle's runner for a prompt."""
        return [self.runner()(batch)]

    # The contract with the export step

    def deployable(self, batch: Int[Tensor, "B U"]) -> Deployable:
        """Return the graph `decode`, which reads tokens after a past and returns the requested logits."""
        context_length = self.facts["context_length"]
        tokens = batch[:2, :context_length].clamp(min=0)
        with torch.inference_mode():
            _, keys, values = self.network.forward(tokens[:, :-NEW])
        past = {}
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            past |= {f"key_{i}": key.float().clone(), f"value_{i}": value.float().clone()}
        # Valid tokens of the past: half a context (or all, if it is shorter), and READ for the second text.
        length = torch.tensor([context_length // 2, READ], device=tokens.device)[: len(tokens)]
        graph = Graph(
            _Decode(self.network, len(self.tokenizer)),
            {"tokens": tokens[:, -NEW:], "back": torch.zeros_like(tokens[:, :1]), "length": length, **past},
            ["logits", "present"],
            {
                "tokens": {0: "batch", 1: "new"},
                "back": {0: "batch", 1: "asked"},
                "length": {0: "batch"},
                **{name: {0: "batch", 2: "past"} for name in past},
            },
            # The first sizes are those of a single token with a full context, and of a target with fixed shapes.
            {"batch": (1, 2, 3), "new": (1, 2, 4), "asked": (1, 2, 4), "past": (context_length, 0, READ, 1, 33)},
            tolerance=1e-4,
        )
        metadata = {"tokenizer": self.facts["vocabulary"], "context_length": context_length}
        return Deployable("language", {"decode": graph}, metadata)

    def evaluate(self, runner: Runner, batches: Iterable) -> float:
        """Return the bits per byte of a runner over `batches`."""
        sizes = np.array([len(spelling) for spelling in runner.tokenizer.spelling])
        nats = size = 0.0
        for batch in batches:
            tokens = batch.cpu().numpy()
            real = tokens[:, 1:] != IGNORE
            nats += runner.nll(np.maximum(tokens, 0))[real].sum()
            size += sizes[tokens[:, 1:][real]].sum()
        return float(nats / math.log(2) / size)

    def degradation(self, reference: float, score: float) -> float:
        """Return the increase in percent, as the metric has no bound."""
        return increase(reference, score)

    def draw(self, folder: Path) -> None:
        """Draw the loss by position in the context and the attention of every head, and write samples."""
        from dlref.tasks import figures  # matplotlib is slow to import, and only needed here

        figures.by_position(folder / "by_position.png", self.nll.by_position())
        with torch.inference_mode():
            weights = self.network.eval().attention(torch.tensor([self.sentence], device=self.device))
        pieces = self.tokenizer.pieces(self.sentence)
        figures.heads(folder / "attention.png", [layer[0].float().cpu().numpy() for layer in weights], pieces)
        runner, prompts = self.runner(), list(self.trainer.datamodule.sources())[:SAMPLES]
        samples = [(prompt, answer["text"]) for prompt, answer in zip(prompts, runner(prompts), strict=True)]
        figures.continuations(folder / "samples.md", samples)


class TokenNLL(Metric):
    """Negative log-likelihood of a text: nats of each token, by its position in the context.

    Args:
        places: T.
        sizes: (V), bytes of each token.
    """

    full_state_update = False

    def __init__(self, places: int, sizes: Int[Tensor, "V"]):
        super().__init__()
        self.register_buffer("sizes", sizes, persistent=False)
        for name, zeros in (("nats", torch.zeros(places)), ("count", torch.zeros(places)), ("bytes", torch.tensor(0))):
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, nats: Float[Tensor, "B T"], tokens: Int[Tensor, "B T"]) -> None:
        """Add tokens and the nats of each, except for IGNORE."""
        real = tokens != IGNORE
        self.nats += nats.where(real, 0).sum(0)
        self.count += real.sum(0)
        self.bytes += self.sizes[tokens.clamp(min=0)].where(real, 0).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` (nats per token), `perplexity`, and `bits_per_byte`, which is comparable across tokenisers."""
        loss = self.nats.sum() / self.count.sum()
        bits = self.nats.sum() / math.log(2) / self.bytes
        return {"loss": loss, "perplexity": loss.exp(), "bits_per_byte": bits}

    def by_position(self) -> Float[Tensor, "T"]:
        """Return the mean nats of a token at each position that occurred."""
        return (self.nats / self.count)[self.count > 0].cpu()


class _Decode(nn.Module):
    """The exported graph: from tokens after a past to the requested logits, and what to append to the past."""

    def __init__(self, network: nn.Module, vocabulary: int):
        super().__init__()
        self.network, self.vocabulary = network, vocabulary

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        back: Int[Tensor, "B W"],
        length: Int[Tensor, "B"],
        *past: Float[Tensor, "B H P D"],
    ) -> tuple[Float[Tensor, "B W V"], Float[Tensor, "L 2 B H T D"]]:
        length = length.clamp(max=past[0].shape[2])  # verification cuts the past below the example's length
        # Not by calling the network, which may be compiled: samples in training would recompile it for every past.
        hidden, keys, values = self.network.forward(tokens, Past(past[::2], past[1::2], length))
        place = tokens.shape[1] - 1 - back
        asked = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[2]))
        logits = self.network.logits(asked)[..., : self.vocabulary]
        present = torch.stack([x for layer in zip(keys, values, strict=True) for x in layer]).unflatten(0, (-1, 2))
        return logits.float(), present.float()
