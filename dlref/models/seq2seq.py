"""Sequence to sequence: a recurrent encoder and decoder with attention.

I. Sutskever, O. Vinyals and Q. V. Le, "Sequence to Sequence Learning with Neural Networks", 2014: the network without
attention; unlike theirs (section 3.3), the source is not reversed.
D. Bahdanau, K. Cho and Y. Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015: the
bidirectional encoder, attention `mlp`.
M.-T. Luong, H. Pham and C. D. Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015:
attention `dot` and `general`, the attentional vector, input feeding.
J. Gehring, M. Auli, D. Grangier, D. Yarats and Y. N. Dauphin, "Convolutional Sequence to Sequence Learning", 2017: the
convolutional encoder.

As in Luong's paper, the decoder attends with its state after reading a token, for every score function. Without input
feeding, each layer therefore processes the whole target in one call. By default, a linear layer and tanh map the last
annotations to the initial state of all decoder layers; Sutskever et al. copy the encoder's states, and Bahdanau et al.
use only the backward direction.

Legend of shapes: B sentences, S source tokens, T target tokens, K hypotheses per sentence, V size of the target
vocabulary, D hidden size, I input size of a layer, Q attention queries, P positions to gather, Y rows of the decoder's
state: those of its layers and, with input feeding, the last attentional vector after them.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dlref.models.recurrent import CELLS, RecurrentLayers, run_layer


class Memory(NamedTuple):
    """An encoded source, as the decoder reads it.

    Attributes:
        values: (B, S, D), an annotation of each source token (Bahdanau et al., section 3.2).
        keys: (B, S, D), which queries are compared with; computed once per source, not per query.
        mask: (B, S), False for padding.
        state: (Y, B, D), initial state of the decoder; None in `step`, which gets the state of each hypothesis.
    """

    values: Float[Tensor, "B S D"]
    keys: Float[Tensor, "B S D"]
    mask: Bool[Tensor, "B S"]
    state: Float[Tensor, "Y B D"] | None


class Seq2Seq(nn.Module):
    """p(y_t | y_<t, x) = softmax(W_s tanh(W_c [c_t; h_t])) (Luong et al., equations 5 and 6).

    Args:
        source_vocabulary: at least the size of the source vocabulary.
        target_vocabulary: V, at least the size of the target vocabulary.
        cell: type of the recurrent layers.
        num_layers: number of layers of the encoder, and of the decoder.
        hidden_size: D; each direction of a bidirectional encoder has half of it.
        embedding_size: size of the source and target embeddings.
        encoder: `bidirectional` or `unidirectional` recurrent layers, or `convolutional` layers.
        attention: `mlp` (Bahdanau), `dot` or `general` (Luong), or `none`: the decoder has only its initial state.
        input_feeding: concatenate the last attentional vector to each input of the decoder (Luong et al., section 3.3);
            the decoder then processes the target step by step.
        initial: compute the decoder's initial state from the `last` annotation of each direction or the average of all
            annotations (`avg`), or start from `zero`.
        tied: use the target embedding as the weight of the output layer (Press and Wolf 2017).
        residual: add a layer's input to its output, from the second layer on (Wu et al. 2016, section 3.1).
        dropout: dropout probability of the embeddings, between layers, and of the attentional vector.

    Raises:
        ValueError: an option is not one of those listed, sizes do not fit together, or the decoder would get nothing of
            the source.
    """

    class_layers = ("embed_source", "embed_target", "output")

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        cell: Literal["lstm", "gru"] = "lstm",
        num_layers: int = 1,
        hidden_size: int = 512,
        embedding_size: int = 512,
        encoder: Literal["bidirectional", "unidirectional", "convolutional"] = "bidirectional",
        attention: Literal["mlp", "dot", "general", "none"] = "mlp",
        input_feeding: bool = False,
        initial: Literal["last", "avg", "zero"] = "last",
        tied: bool = False,
        residual: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("cell", cell, CELLS),
            ("encoder", encoder, ENCODERS),
            ("attention", attention, ("mlp", "dot", "general", "none")),
            ("initial", initial, ("last", "avg", "zero")),
        ):
            if value not in choices:
                raise ValueError(f"no {name} {value!r}: expected {', '.join(choices)}")
        if (attention, initial) == ("none", "zero"):
            raise ValueError("initial zero with attention none: expected one of them to give the source to the decoder")
        if tied and embedding_size != hidden_size:
            raise ValueError(f"embedding_size {embedding_size} with tied: expected hidden_size, {hidden_size}")
        if encoder == "bidirectional" and hidden_size % 2:
            raise ValueError(f"hidden_size {hidden_size} of a bidirectional encoder: expected an even number")
        self.input_feeding, self.initial = input_feeding, initial
        self.embed_source = nn.Embedding(source_vocabulary, embedding_size)
        self.embed_target = nn.Embedding(target_vocabulary, embedding_size)
        for table in (self.embed_source, self.embed_target):
            nn.init.normal_(table.weight, std=embedding_size**-0.5)
        self.encoder = ENCODERS[encoder](cell, embedding_size, hidden_size, num_layers, residual, dropout)
        fed = embedding_size + (hidden_size if input_feeding else 0)
        self.decoder = RecurrentLayers(cell, fed, hidden_size, num_layers, residual, dropout)
        self.bridge = None if initial == "zero" else nn.Linear(hidden_size, self.decoder.rows * hidden_size)
        self.attention = None if attention == "none" else Attention(attention, hidden_size)
        self.combine = None if attention == "none" else nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, target_vocabulary)
        if tied:
            self.output.weight = self.embed_target.weight

    def forward(
        self, source: Int[Tensor, "B S"], lengths: Int[Tensor, "B"], target: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of the next token at each position of `target`, given the tokens up to it."""
        return self.decode(target, self.encode(source, lengths))

    def encode(self, source: Int[Tensor, "B S"], lengths: Int[Tensor, "B"]) -> Memory:
        """Encode the source. Tokens beyond a sentence's length are padding and do not affect the result."""
        mask = torch.arange(source.shape[1], device=source.device) < lengths[:, None]
        values, last = self.encoder(self.dropout(self.embed_source(source)), lengths, mask)
        if self.initial == "avg":
            last = values.where(mask[..., None], 0).sum(1) / lengths[:, None]
        state = values.new_zeros(self.decoder.rows, source.shape[0], values.shape[2])
        if self.bridge is not None:
            state = torch.tanh(self.bridge(last)).unflatten(1, (self.decoder.rows, -1))
            state = state.transpose(0, 1).contiguous()  # cuDNN requires it
        if self.input_feeding:  # there is no attentional vector before the first token
            state = torch.cat([state, torch.zeros_like(state[:1])])
        keys = values if self.attention is None else self.attention.key(values)
        return Memory(values, keys, mask, state)

    def decode(self, target: Int[Tensor, "B T"], memory: Memory) -> Float[Tensor, "B T V"]:
        """Return the logits of the next token at each position of `target`."""
        embedded = self.dropout(self.embed_target(target))
        if self.input_feeding:
            state, parts = memory.state[:, :, None], []
            for one in embedded.split(1, dim=1):
                part, state, _ = self._advance(one, state, memory)
                parts.append(part)
            attentional = torch.cat(parts, dim=1)
        else:
            hidden, _ = self.decoder(embedded, memory.state)
            attentional, _ = self._attend(hidden, memory)
        return self.output(attentional)

    def step(
        self, token: Int[Tensor, "B K"], state: Float[Tensor, "Y B K D"], memory: Memory
    ) -> tuple[Float[Tensor, "B K V"], Float[Tensor, "Y B K D"], Float[Tensor, "B K S"]]:
        """Read one token of each hypothesis; return the next token's logits, the new state and the attention."""
        attentional, after, weights = self._advance(self.dropout(self.embed_target(token)), state, memory)
        return self.output(attentional), after, weights

    def _advance(self, embedded: Tensor, state: Tensor, memory: Memory) -> tuple[Tensor, ...]:
        """Read one embedded token per hypothesis (B, K, I); return attentional vectors (B, K, D), state, attention."""
        shape, rows = embedded.shape[:2], self.decoder.rows
        inputs = torch.cat([embedded, state[-1]], dim=2) if self.input_feeding else embedded
        hidden, after = self.decoder(inputs.flatten(0, 1)[:, None], state[:rows].flatten(1, 2))
        attentional, weights = self._attend(hidden[:, 0].unflatten(0, shape), memory)
        after = after.unflatten(1, shape)
        if self.input_feeding:
            after = torch.cat([after, attentional[None]])
        return attentional, after, weights

    def _attend(self, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return attentional vectors (Luong et al., equation 5) and attention (B, Q, S) of decoder states (B, Q, D)."""
        if self.attention is None:
            return self.dropout(hidden), hidden.new_zeros(*hidden.shape[:2], memory.mask.shape[1])
        context, weights = self.attention(hidden, memory)
        return self.dropout(torch.tanh(self.combine(torch.cat([context, hidden], dim=2)))), weights


class Attention(nn.Module):
    """Attention: weights of the source tokens from their scores against a query, and the weighted mean of the values.

    Args:
        score: `mlp`: v^T tanh(W q + U k) (Bahdanau et al., appendix A.1.2); `dot`: q^T k; `general`: q^T W k (Luong et
            al., section 3.1).
        size: D.
    """

    def __init__(self, score: Literal["mlp", "dot", "general"], size: int) -> None:
        super().__init__()
        self.key = nn.Identity() if score == "dot" else nn.Linear(size, size, bias=score == "mlp")
        self.query = nn.Linear(size, size, bias=False) if score == "mlp" else None
        self.score = nn.Linear(size, 1, bias=False) if score == "mlp" else None

    def forward(
        self, query: Float[Tensor, "B Q D"], memory: Memory
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q S"]]:
        """Return the context of each query and its weights, which sum to one over the tokens that are not padding."""
        if self.score is None:
            scores = query @ memory.keys.transpose(1, 2)
        else:
            scores = self.score(torch.tanh(self.query(query)[:, :, None] + memory.keys[:, None]))[..., 0]
        weights = scores.masked_fill(~memory.mask[:, None], -math.inf).softmax(dim=2)
        return weights @ memory.values, weights


class Bidirectional(nn.Module):
    """Pairs of layers that read the sentence forward and backward (Bahdanau et al., section 3.2).

    The backward layer reads each sentence reversed within its length, so neither layer sees padding before a token.
    Unlike packed sequences, this is the same in training and in a graph, and does not wait to copy lengths to the host.
    """

    def __init__(self, cell: str, inputs: int, size: int, num_layers: int, residual: bool, dropout: float) -> None:
        super().__init__()
        sizes = [inputs] + [size] * (num_layers - 1)
        self.ahead, self.back = (
            nn.ModuleList(CELLS[cell](width, size // 2, batch_first=True) for width in sizes) for _ in range(2)
        )
        self.residual, self.dropout = residual, nn.Dropout(dropout)

    def forward(
        self, inputs: Float[Tensor, "B S I"], lengths: Int[Tensor, "B"], mask: Bool[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B D"]]:
        """Return the annotations, and the last annotation of each direction."""
        place = torch.arange(inputs.shape[1], device=inputs.device)
        mirrored = torch.where(mask, lengths[:, None] - 1 - place, place)
        outputs = inputs
        for i, (ahead, back) in enumerate(zip(self.ahead, self.back, strict=True)):
            below = self.dropout(outputs) if i else outputs
            right, _ = run_layer(ahead, below)
            left = gather_rows(run_layer(back, gather_rows(below, mirrored))[0], mirrored)
            above = torch.cat([right, left], dim=2)
            outputs = above + outputs if i and self.residual else above
        right, left = outputs.chunk(2, dim=2)
        return outputs, torch.cat([gather_rows(right, lengths[:, None] - 1)[:, 0], left[:, 0]], dim=1)


class Unidirectional(nn.Module):
    """Layers that read the sentence from its start (Sutskever et al., section 2)."""

    def __init__(self, cell: str, inputs: int, size: int, num_layers: int, residual: bool, dropout: float) -> None:
        super().__init__()
        self.rnn = RecurrentLayers(cell, inputs, size, num_layers, residual, dropout)

    def forward(
        self, inputs: Float[Tensor, "B S I"], lengths: Int[Tensor, "B"], mask: Bool[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B D"]]:
        """Return the annotations, and the last annotation of each sentence."""
        outputs, _ = self.rnn(inputs)
        return outputs, gather_rows(outputs, lengths[:, None] - 1)[:, 0]


class Convolutional(nn.Module):
    """Convolutions with gated linear units and residuals (Gehring et al., section 3.2, scaled as in 3.4).

    Each layer extends the context by one token on either side. Padding is set to zero, as is the outside of the
    sentence. Unlike in the paper, there are no position embeddings, so only the zeros at either end indicate positions,
    and attention reads the outputs alone, not their sum with the embeddings (section 3.3).
    """

    def __init__(self, cell: str, inputs: int, size: int, num_layers: int, residual: bool, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, size)
        self.layers = nn.ModuleList(nn.Conv1d(size, 2 * size, 3, padding=1) for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, inputs: Float[Tensor, "B S I"], lengths: Int[Tensor, "B"], mask: Bool[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B D"]]:
        """Return the annotations, and the last annotation of each sentence."""
        outputs = self.project(inputs)
        for layer in self.layers:
            below = self.dropout(outputs.where(mask[..., None], 0))
            outputs = (outputs + F.glu(layer(below.transpose(1, 2)), dim=1).transpose(1, 2)) * 0.5**0.5
        return outputs, gather_rows(outputs, lengths[:, None] - 1)[:, 0]


def gather_rows(rows: Float[Tensor, "B S D"], places: Int[Tensor, "B P"]) -> Float[Tensor, "B P D"]:
    """Return the rows at `places` of each sentence."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2]))


ENCODERS = {"bidirectional": Bidirectional, "unidirectional": Unidirectional, "convolutional": Convolutional}
