"""Translation: an encoder and a decoder predict the tokens of a text from those of another.

Legend of shapes: B sentences, S source tokens, T target tokens, K hypotheses per sentence, V size of the target
vocabulary, W best next tokens of a hypothesis, D hidden size, Y rows of the decoder's state.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from dlref.models.seq2seq import Memory
from dlref.runtime import UserError
from dlref.runtime.decoding import Hypothesis
from dlref.runtime.runner import plain
from dlref.runtime.runners.translation import Runner, Sentence
from dlref.runtime.text import BEGIN, END, PAD, make_tokenizer
from dlref.tasks.deployable import Deployable, Graph
from dlref.tasks.task import PROBED, Task, unlike
from dlref.training.devices import gather_objects

WIDEST = 16  # next tokens that a step returns, so the widest beam
EXAMPLES = 2  # sentences of the example inputs
SHOWN = 6  # attention maps
LARGEST_MAP = 30  # tokens of a sentence whose attention is drawn
SAMPLES = 50  # in the table


class Translated(NamedTuple):
    """A source, its reference and its translation."""

    source: str
    reference: str
    found: Hypothesis
    text: str
    tokens: list[int]


class Translator(Task):
    """Cross entropy of each token given the true tokens before it, and texts by beam search.

    The network must have `encode` and `step` like `Seq2Seq`. A batch is a `Batch`: source, target and, in evaluation,
    both as text.

    Args:
        label_smoothing: share of the target's probability that is spread evenly over all tokens (Szegedy et al. 2016).
        scheduled_sampling: probability that an input token of the decoder is replaced by the network's own most likely
            token (Bengio et al. 2015). It rises linearly from 0 to this value over the run. A first pass predicts the
            own tokens of all positions at once, a second one trains on the mixture (Duckworth et al. 2019).
        beam: number of hypotheses that a test and a bundle keep; validation is greedy.
        length_penalty: see `beam_search`.
        metric: metric by which a bundle is judged.
        task: arguments of every `Task`: network, optimizer, lr_scheduler, weights, freeze, ...
    """

    needs = ("encode", "step")
    fact_names = ("source_vocabulary", "target_vocabulary", "longest", "longest_answer")
    row_facts: ClassVar = {"source_vocabulary": "embed_source", "target_vocabulary": "embed_target"}

    def __init__(
        self,
        label_smoothing: float = 0.1,
        scheduled_sampling: float = 0.0,
        beam: int = 5,
        length_penalty: float = 1.0,
        metric: Literal["bleu", "chrf", "exact_match"] = "bleu",
        **task,
    ):
        super().__init__(**task)
        self.label_smoothing, self.scheduled_sampling = label_smoothing, scheduled_sampling
        self.beam, self.length_penalty, self.metric = beam, length_penalty, metric
        self.nll, self.accuracy = MeanMetric(), MeanMetric()
        self.translated: list[Translated] = []

    @cached_property
    def tokenizers(self) -> dict:
        """The tokenisers of the data, for "source" and "target"."""
        return {side: make_tokenizer(self.facts[f"{side}_vocabulary"]) for side in ("source", "target")}

    def take_facts(self, datamodule) -> None:
        """Also take `too_long`, which does not concern the weights, so that a test may choose another value."""
        super().take_facts(datamodule)
        self.too_long = datamodule.too_long

    def check(self) -> None:
        """Run the largest tokens through the network: one that is too small would fail in the middle of an epoch."""
        source, target = map(len, self.tokenizers.values())
        if not 1 <= self.beam <= min(WIDEST, target - 2):
            raise UserError(f"beam: {self.beam}; expected 1 to {min(WIDEST, target - 2)}")
        if not 0 <= self.length_penalty <= 10:
            raise UserError(f"length_penalty: {self.length_penalty}; expected 0 to 10")
        for name in ("label_smoothing", "scheduled_sampling"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: {getattr(self, name)}; expected a share, 0 to 1")
        longest, longest_answer = self.longest_verified(), self.facts["longest_answer"]
        expected = (
            f"expected model.init_args.network.init_args of at least source_vocabulary: {source}, target_vocabulary: "
            f"{target}, and room for {longest} and {longest_answer} tokens"
        )
        one = torch.ones(1, 1, dtype=torch.long, device=self.network_device)
        sentence, before = (one * (source - 1)).repeat(1, longest), (one * (target - 1)).repeat(1, longest_answer)
        with self.probing("the tokens of this data", expected):
            self.network(sentence, one[0] * longest, before[:, :1])  # not both at once: attention would fill the memory
            logits = self.network(sentence[:, :1], one[0], before)
        if not isinstance(logits, Tensor):
            raise UserError(f"network returns {type(logits).__name__}; expected logits (B, T, V)")
        if logits.shape[-1] < target:
            raise UserError(f"network returns {logits.shape[-1]} tokens; {expected}")
        self.check_padding(source - 1, target - 1)
        self.check_step(one.repeat(PROBED, 4), target)

    def check_padding(self, source: int, target: int) -> None:
        """Run a sentence alone, and padded among others: one that looks ahead has a loss near 0. Raises UserError."""
        expected = "expected them to depend on the source and the target tokens before, and on no other sentence"
        sources = torch.full((PROBED, 2), source, device=self.network_device)
        before = torch.full_like(sources, target)
        sources[0, 1], before[0, 0] = PAD, BEGIN
        with self.probing("a padded sentence", expected):
            alone = self.network(sources[:1, :1], torch.ones_like(sources[0, :1]), before[:1, :1])
            among = self.network(sources, (sources != PAD).sum(1), before)
        if among.ndim != 3 or among.shape[:2] != before.shape:
            raise UserError(f"network returns {list(among.shape)}; expected logits (B, T, V)")
        if unlike(among[:1, :1], alone):
            raise UserError(f"network's logits change with padding, later tokens or other sentences; {expected}")

    def check_step(self, source: Int[Tensor, "B S"], target: int) -> None:
        """Run one step of three hypotheses of each source: a wrong layout would fail only when texts are translated."""
        wanted = "expected encode and step as docs/translation.md describes them"
        with self.probing("a step of three hypotheses", wanted):
            values, keys, state = _Encode(self.network)(source)
            before = state[:, :, None].repeat(1, 1, 3, 1)
            step = _Step(self.network, target)
            best, _, after, attention = step(source[:, :3], before, values, keys, source)
        found = [list(part.shape) for part in (best, after, attention)]
        shapes = [[PROBED, 3, step.widest], list(before.shape), [*before.shape[1:3], source.shape[1]]]
        if found != shapes or state.shape[1] != PROBED:
            raise UserError(f"network's state, {list(state.shape)}, next state and attention have other axes; {wanted}")

    def longest_verified(self) -> int:
        """Return the longest source, in tokens, at which export verifies the graphs; none is traced at this length."""
        return 2 * self.facts["longest"] + 3

    def configure_optimizers(self):
        """Extend `Task`'s method. Raises UserError if the share of the network's own tokens would never rise."""
        if self.scheduled_sampling and not math.isfinite(self.trainer.estimated_stepping_batches):
            raise UserError("scheduled_sampling needs a run of known length; expected trainer.max_epochs or max_steps")
        return super().configure_optimizers()

    # Sentences

    def forward(self, batch, before: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return the logits of the next token at each position, without those that pad the vocabulary."""
        lengths = (batch.source != PAD).sum(1)
        return self.network(batch.source, lengths, before)[..., : len(self.tokenizers["target"])]

    def mixed(self, batch, before: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """Return `before` with some tokens replaced by the network's own predictions."""
        share = self.scheduled_sampling * self.trainer.global_step / self.trainer.estimated_stepping_batches
        with torch.no_grad():
            own = self(batch, before)[:, :-1].argmax(2)
        swapped = (torch.rand(own.shape, device=own.device) < share) & (before[:, 1:] != PAD)
        return torch.cat([before[:, :1], torch.where(swapped, own, before[:, 1:])], dim=1)

    def runner(self, batch, beam: int) -> Runner:
        """Return the runner that a device uses, over this network."""
        runner = self.deployable(batch).runner()
        runner.beam = beam
        return runner

    def translate(self, runner: Runner, batch) -> list[Translated]:
        """Return a runner's translations of a batch."""
        tokens = [[token for token in row if token != PAD] for row in batch.source.tolist()]
        decode, found = self.tokenizers["target"].decode, runner.search(tokens)
        texts = [decode(one.tokens) for one in found]
        rows = zip(batch.sources, batch.references, found, texts, tokens, strict=True)
        return [Translated(*known) for known in rows]

    # Lightning's steps

    def training_step(self, batch, batch_index: int) -> Tensor:
        """Return the cross entropy with smoothed labels, over tokens that are not padding."""
        before, after = batch.target[:, :-1], batch.target[:, 1:]
        if self.scheduled_sampling:
            before = self.mixed(batch, before)
        logits = self(batch, before).flatten(0, 1)
        loss = F.cross_entropy(logits, after.flatten(), ignore_index=PAD, label_smoothing=self.label_smoothing)
        return self.log_train_loss(loss, (after != PAD).sum())

    def judge(self, batch, beam: int) -> None:
        """Score the likelihood and accuracy of the true tokens, and translate without them."""
        logits, after = self(batch, batch.target[:, :-1]).float(), batch.target[:, 1:]
        real = after != PAD
        nll = F.cross_entropy(logits.transpose(1, 2), after, reduction="none")
        self.nll.update(nll, real.float())
        self.accuracy.update((logits.argmax(2) == after).float(), real.float())
        self.translated += self.translate(self.runner(batch, beam), batch)

    def log_evaluation(self, stage: str) -> None:
        """Log all scores, over all devices."""
        loss = self.nll.compute()
        everything = [one for part in gather_objects(self.translated) for one in part]
        texts, references = [one.text for one in everything], [one.reference for one in everything]
        values = {"loss": loss, "perplexity": loss.exp(), "accuracy": self.accuracy.compute()}
        values |= {name: score(texts, references) for name, score in SCORES.items()}
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=stage == "val")
        self.nll.reset()
        self.accuracy.reset()

    def on_validation_epoch_start(self) -> None:
        """Clear the translations of the epoch."""
        self.translated = []

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch, batch_index: int) -> None:
        """Translate greedily."""
        self.judge(batch, beam=1)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the epoch."""
        self.log_evaluation("val")

    def test_step(self, batch, batch_index: int) -> None:
        """Translate by beam search."""
        self.judge(batch, self.beam)

    def on_test_epoch_end(self) -> None:
        """Log the scores of the split."""
        self.log_evaluation("test")

    def predict_step(self, batch, batch_index: int) -> list[dict]:
        """Return predictions as the bundle's runner does, of the data's own tokens."""
        runner, longest, answers = self.runner(batch, self.beam), self.facts["longest"], []
        for one in self.translate(runner, batch):
            cut = len(one.tokens) == longest <= len(runner.source.encode(one.source))  # with END, only these can be
            answers.append(plain(runner.prediction(Sentence(one.tokens, cut), one.found)))
        return answers

    # The contract with the export step

    def deployable(self, batch) -> Deployable:
        """Return the graphs: `encode` reads a source; `step` extends each of its hypotheses by one token."""
        encode = self.encode_graph(batch.source[:EXAMPLES])
        step = self.step_graph(batch, encode)
        metadata = {
            "source": self.facts["source_vocabulary"],
            "target": self.facts["target_vocabulary"],
            **{name: self.facts[name] for name in ("longest", "longest_answer")},
            "too_long": self.too_long,
            "beam": self.beam,
            "widest": step.module.widest,
            "length_penalty": float(self.length_penalty),
        }
        return Deployable("translation", {"encode": encode, "step": step}, metadata)

    def encode_graph(self, source: Int[Tensor, "B S"]) -> Graph:
        """Return the graph from sources to the values, keys and initial state of the decoder."""
        # A target with fixed shapes gets the first length, so every source must fit.
        lengths = (self.facts["longest"], 1, source.shape[1], self.longest_verified())
        return Graph(
            _Encode(self.network),
            {"source": source},
            ["values", "keys", "state"],
            {"source": {0: "batch", 1: "source"}},
            {"batch": (1, 2, 7), "source": lengths},
            tolerance=1e-4,
        )

    def step_graph(self, batch, encode: Graph) -> Graph:
        """Return the graph from the last token and state of each hypothesis to its most likely next tokens."""
        source, sentences = encode.inputs["source"], encode.dynamic_axes["source"]
        with torch.inference_mode():
            values, keys, state = encode.module(source)
        token = torch.full((len(source), self.beam), BEGIN, device=source.device)
        token[:, 1:] = batch.target[:EXAMPLES, 1:2]
        return Graph(
            _Step(self.network, len(self.tokenizers["target"])),
            {
                "token": token,
                "state": state[:, :, None].repeat(1, 1, self.beam, 1),
                "values": values,
                "keys": keys,
                "source": source,
            },
            ["log_probability", "next_token", "next_state", "attention"],
            {
                "token": {0: "batch", 1: "beam"},
                "state": {1: "batch", 2: "beam"},
                **dict.fromkeys(("values", "keys", "source"), sentences),
            },
            {"batch": (1, 2, 7), "beam": (self.beam, 1, 3), "source": encode.sizes["source"]},
            tolerance=1e-3,  # if two keys have similar scores, PyTorch's own float32 is 2e-4 off float64
            discrete=("next_token",),
            calls=max(1, round((batch.target != PAD).sum().item() / len(batch.target))),
        )

    def evaluate(self, runner: Runner, batches: Iterable) -> float:
        """Return the metric of a runner's texts over `batches`."""
        texts, references = [], []
        decode = self.tokenizers["target"].decode
        for batch in batches:
            if not batch.references:  # training batches, which only calibrate
                batch = batch._replace(
                    sources=[""] * len(batch.source), references=list(map(decode, batch.target.tolist()))
                )
            for one in self.translate(runner, batch):
                texts.append(one.text)
                references.append(one.reference)
        return SCORES[self.metric](texts, references)

    def degradation(self, reference: float, score: float) -> float:
        """Return the decrease in points of BLEU or chrF, or in percentage points of exact matches."""
        return (reference - score) * (100 if self.metric == "exact_match" else 1)

    def draw(self, folder: Path) -> None:
        """Draw attention maps and BLEU by the length of the source, and write a table of samples."""
        from dlref.tasks import figures  # matplotlib is slow to import, and only needed here

        everything = self.translated
        pieces = [tokenizer.pieces for tokenizer in self.tokenizers.values()]
        short = [one for one in everything if len(one.tokens) <= LARGEST_MAP]
        maps = []
        for one in spread(short, SHOWN):
            answer = [*one.found.tokens, *[END] * one.found.ended]
            weights = one.found.attention[:, : len(one.tokens)]
            maps.append((weights, pieces[0](one.tokens), pieces[1](answer)))
        if any(weights.any() for weights, _, _ in maps):
            figures.attention(folder / "attention.png", maps)
        lengths = [len(one.tokens) for one in everything]
        texts, references = [one.text for one in everything], [one.reference for one in everything]
        figures.by_length(folder / "by_length.png", lengths, texts, references, bleu)
        samples = [(one.source, one.reference, one.text) for one in spread(everything, SAMPLES)]
        figures.samples(folder / "samples.md", samples, signatures(texts, references))


class _Encode(nn.Module):
    """The graph that reads a source."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(
        self, source: Int[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B S D"], Float[Tensor, "Y B D"]]:
        memory = self.network.encode(source, (source != PAD).sum(1))
        return memory.values.float(), memory.keys.float(), memory.state.float()


class _Step(nn.Module):
    """The graph that predicts the next token of each hypothesis."""

    def __init__(self, network: nn.Module, vocabulary: int):
        super().__init__()
        self.network, self.vocabulary = network, vocabulary
        self.widest = min(WIDEST, vocabulary - 2)
        never = torch.zeros(vocabulary, device=next(network.parameters()).device)
        never[[PAD, BEGIN]] = -torch.inf
        self.register_buffer("never", never, persistent=False)

    def forward(
        self,
        token: Int[Tensor, "B K"],
        state: Float[Tensor, "Y B K D"],
        values: Float[Tensor, "B S D"],
        keys: Float[Tensor, "B S D"],
        source: Int[Tensor, "B S"],
    ) -> tuple[Float[Tensor, "B K W"], Int[Tensor, "B K W"], Float[Tensor, "Y B K D"], Float[Tensor, "B K S"]]:
        memory = Memory(values, keys, source != PAD, None)  # the first state is known to `encode` alone
        logits, after, attention = self.network.step(token, state, memory)
        scores = logits[..., : self.vocabulary].float().log_softmax(2) + self.never
        best, which = scores.topk(self.widest, dim=2)
        return best, which, after.float(), attention.float()


# Scores of texts


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Return the BLEU of a corpus, 0 to 100, as sacrebleu defines it."""
    from sacrebleu import corpus_bleu

    return corpus_bleu(texts, [references]).score


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """Return the F-score of character n-grams of a corpus, 0 to 100, as sacrebleu defines it."""
    from sacrebleu import corpus_chrf

    return corpus_chrf(texts, [references]).score


def exact_match(texts: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of texts that equal their reference."""
    return sum(text == reference for text, reference in zip(texts, references, strict=True)) / len(texts)


SCORES = {"bleu": bleu, "chrf": chrf, "exact_match": exact_match}


def signatures(texts: Sequence[str], references: Sequence[str]) -> list[str]:
    """Return sacrebleu's scores and signatures, so that others can reproduce them."""
    from sacrebleu import BLEU, CHRF

    lines = []
    for metric in (BLEU(), CHRF()):
        score = metric.corpus_score(texts, [references])
        lines.append(f"{score.name} {score.score:.2f}, {metric.get_signature()}")
    return lines


def spread(items: list, count: int) -> list:
    """Return at most `count` items, spread evenly over a list."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items
