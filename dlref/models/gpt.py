"""GPT: a decoder of masked multi-head self-attention.

A. Vaswani et al., "Attention Is All You Need", 2017: attention (section 3.2), sinusoidal positions (section 3.5).
A. Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018: the decoder alone, learned
positions. "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2): norms before each part and after the
last, and the initialisation (section 2.3). The parameters have the names and shapes of Hugging Face's `gpt2`.
J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021: rotary positions (section 3.4.2).
A. Henry et al., "Query-Key Normalization for Transformers", 2020.

Legend of shapes: B texts, T tokens, P tokens of the past, S tokens that are seen (P + T), V tokens of the vocabulary,
L layers, H heads, E width of the network, D width of a head (E / H), I and O width of what enters and leaves a layer.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Past(NamedTuple):
    """The keys and values of the tokens that a network has read.

    Attributes:
        keys: of each layer, (B, H, P, D).
        values: of each layer, (B, H, P, D).
        length: (B), how many of the P there are in each text; what is beyond is not looked at.
    """

    keys: Sequence[Float[Tensor, "B H P D"]]
    values: Sequence[Float[Tensor, "B H P D"]]
    length: Int[Tensor, "B"]


class GPT(nn.Module):
    """p(x_t | x_<t) = softmax(W_e norm(h_L)), h_l = block(h_l-1), h_0 = W_e x + W_p (Radford et al. 2018, equation 2).

    Args:
        vocabulary: V, tokens that it has room for.
        context_length: tokens that it reads at most, the past among them.
        n_layer: L.
        n_head: H.
        n_embd: E, a multiple of H; of 2 H with rotary positions.
        positions: `learned`, or fixed: `sinusoidal` ones that are added, `rotary` ones that rotate queries and keys.
        bias: whether linear layers and norms have one.
        qk_norm: bring queries and keys to a root mean square of 1 (Henry et al., without the learned scale).
        dropout: probability of dropping a unit of the embeddings, of the attention weights and of each part's output.

    Raises:
        ValueError: a choice is none of those listed, or sizes do not fit together.
    """

    class_layers = ()
    base = ""  # all of it: published weights leave nothing as initialised

    def __init__(
        self,
        vocabulary: int,
        context_length: int = 1024,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        positions: Literal["learned", "sinusoidal", "rotary"] = "learned",
        bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if positions not in ("learned", "sinusoidal", "rotary"):
            raise ValueError(f"no positions {positions!r}: expected learned, sinusoidal, rotary")
        even = 2 if positions == "rotary" else 1
        if n_embd % (n_head * even):
            raise ValueError(f"n_embd {n_embd}: expected a multiple of {n_head * even} for {n_head} heads")
        self.context_length, self.positions, self.n_head = context_length, positions, n_head
        self.wte = nn.Embedding(vocabulary, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(n_embd, n_head, bias, qk_norm, dropout) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd, bias=bias)
        if positions == "learned":
            self.wpe = nn.Embedding(context_length, n_embd)
        else:
            width = n_embd if positions == "sinusoidal" else n_embd // n_head
            self.register_buffer("sinusoids", sinusoids(context_length, width), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:  # GPT-2, section 2.3: what is added to the residual path grows with its depth
                added = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if added else 0.02)

    def forward(
        self, tokens: Int[Tensor, "B T"], past: Past | None = None
    ) -> tuple[Float[Tensor, "B T E"], list[Float[Tensor, "B H T D"]], list[Float[Tensor, "B H T D"]]]:
        """Read `tokens` after a `past` -> what `logits` takes, and the keys and values of these tokens in each layer.

        Appended to the past, they let the next call read on: the result is that of reading everything at once.
        """
        hidden, rotary = self.embed(tokens, past)
        if in_bfloat16(hidden):  # the residual stream is what is read and written most: half the bytes
            hidden = hidden.to(torch.bfloat16)
        mask = None if past is None else causal_mask(tokens, past)
        keys, values = [], []
        for i, block in enumerate(self.h):
            before = None if past is None else (past.keys[i], past.values[i], mask)
            hidden, key, value = block(hidden, rotary, before)
            keys.append(key)
            values.append(value)
        return self.ln_f(hidden), keys, values

    @property
    def output(self) -> Float[Tensor, "V E"]:
        """The weight of the output layer: the embedding."""
        return self.wte.weight

    def logits(self, hidden: Float[Tensor, "B T E"]) -> Float[Tensor, "B T V"]:
        """Logits of the token after each one that was read."""
        return F.linear(hidden, self.output)

    def embed(
        self, tokens: Int[Tensor, "B T"], past: Past | None = None
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "..."] | None]:
        """Token embeddings with their positions; of rotary ones, the sines and cosines that rotate queries and keys."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        if past is not None:
            # Padding of a row with fewer new tokens may lie beyond the context; its output is never read.
            place = (past.length[:, None] + place).clamp(max=self.context_length - 1)
        hidden = self.wte(tokens)
        if self.positions == "rotary":
            return self.drop(hidden), self.sinusoids[place].unsqueeze(-2)  # the same for each head
        if self.positions == "sinusoidal":
            return self.drop(hidden * math.sqrt(hidden.shape[2]) + self.sinusoids[place]), None
        return self.drop(hidden + self.wpe(place)), None

    def attention(self, tokens: Int[Tensor, "B T"]) -> list[Float[Tensor, "B H T T"]]:
        """The weights of each head in each layer: rows sum to one, over the tokens up to their own."""
        hidden, rotary = self.embed(tokens)
        weights = []
        for block in self.h:
            query, key, _ = block.attn.project(block.ln_1(hidden), rotary)
            weights.append(attention_weights(query, causal_mask(tokens), key))
            hidden, _, _ = block(hidden, rotary)
        return weights

    def of_base(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hugging Face's weights under these names; a smaller vocabulary is filled up, a longer context cut."""
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
        head, tied = state.get("lm_head.weight"), state.get("wte.weight")
        if head is not None and tied is not None and torch.equal(head, tied):
            del state["lm_head.weight"]
        state = {key: value for key, value in state.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}
        if "wpe.weight" in state:
            state["wpe.weight"] = state["wpe.weight"][: self.context_length]
        own, given = self.wte.weight.detach(), state.get("wte.weight")
        if given is not None and given.shape[1:] == own.shape[1:]:
            # Padding is as likely as the middle of all tokens: at zero it would be far likelier than any of GPT-2's.
            padding = given.mean(0, keepdim=True).expand(max(len(own) - len(given), 0), -1)
            state["wte.weight"] = torch.cat([given, padding])
        return state


class Block(nn.Module):
    """Self-attention, then a feed-forward network for each token, both added to what they read (GPT-2, section 2.3)."""

    def __init__(self, width: int, heads: int, bias: bool, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = Attention(width, heads, bias, qk_norm, dropout)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = FeedForward(width, bias, dropout)

    def forward(
        self, hidden: Float[Tensor, "B T E"], rotary: Tensor | None, before: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
        """Return the tokens after this layer, with their keys and values.

        `before` is the past of this layer, keys and values, and the mask over the past and the new tokens.
        """
        attended, key, value = self.attn(self.ln_1(hidden), rotary, before)
        hidden = hidden + attended
        return hidden + self.mlp(self.ln_2(hidden)), key, value


class Attention(nn.Module):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_H) W_O (Vaswani et al., section 3.2.2); no token looks ahead."""

    def __init__(self, width: int, heads: int, bias: bool, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.qk_norm, self.dropout = heads, qk_norm, dropout
        self.c_attn = Linear(width, 3 * width, bias)
        self.c_proj = Linear(width, width, bias)
        self.resid_dropout = nn.Dropout(dropout)

    def project(self, hidden: Float[Tensor, "B T E"], rotary: Tensor | None) -> tuple[Float[Tensor, "B H T D"], ...]:
        """Queries, keys and values of each head."""
        query, key, value = (part.unflatten(2, (self.heads, -1)) for part in self.c_attn(hidden).chunk(3, dim=2))
        if self.qk_norm:
            query, key = (F.rms_norm(x, x.shape[-1:]) for x in (query, key))
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        # Heads move before tokens only now, as a view: in memory all stays token by token, attention's output too.
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def forward(
        self, hidden: Float[Tensor, "B T E"], rotary: Tensor | None, before: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
        """Return what each token gathers from itself and those before it, its key and value; `before`: see `Block`."""
        query, key, value = self.project(hidden, rotary)
        if before is None:
            dropped = self.dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropped)
        else:
            attended = attend(query, key, value, *before)
        return self.resid_dropout(self.c_proj(attended.transpose(1, 2).flatten(2))), key, value


class FeedForward(nn.Module):
    """FFN(x) = W_2 GELU(W_1 x), four times as wide in between (Vaswani et al., section 3.3; Radford et al. 2018)."""

    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width, bias)
        self.c_proj = Linear(4 * width, width, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
        """Each token by itself."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(hidden), approximate="tanh")))


class Linear(nn.Module):
    """x W + b, with W (I, O) as GPT-2's published weights lie; PyTorch's own layer has its transpose."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, inputs: Float[Tensor, "B T I"]) -> Float[Tensor, "B T O"]:
        """Each token by itself."""
        return F.linear(inputs, self.weight.T, self.bias)


def attend(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B H T D"],
    value: Float[Tensor, "B H T D"],
    past_key: Float[Tensor, "B H P D"],
    past_value: Float[Tensor, "B H P D"],
    mask: Bool[Tensor, "B 1 T S"],
) -> Float[Tensor, "B H T D"]:
    """Attention of new tokens to a past and to themselves, where the mask is True.

    The past is read where it lies: to put it together with the new keys and values would copy all of it for each token,
    which on a device is most of what a token costs.
    """
    weights = attention_weights(query, mask, past_key, key)
    past = past_key.shape[2]
    return weights[..., :past] @ past_value + weights[..., past:] @ value


def causal_mask(tokens: Int[Tensor, "B T"], past: Past | None = None) -> Bool[Tensor, "B 1 T S"]:
    """Where each new token may look: its text's past, and the new tokens up to itself."""
    batch, new = tokens.shape
    place = torch.arange(new, device=tokens.device)
    mask = (place <= place[:, None]).expand(batch, -1, -1)
    if past is not None:
        there = torch.arange(past.keys[0].shape[2], device=tokens.device) < past.length[:, None, None]
        mask = torch.cat([there.expand(-1, new, -1), mask], dim=2)
    return mask[:, None]


def attention_weights(
    query: Float[Tensor, "B H T D"], mask: Bool[Tensor, "B 1 T S"], *keys: Float[Tensor, "B H _ D"]
) -> Float[Tensor, "B H T S"]:
    """softmax(Q K^T / sqrt(D)), equation 1 of Vaswani et al. written out: scores, mask, softmax.

    The weighted sum of the values completes it. Of several keys the scores are put side by side, not the keys.
    """
    scale = query.shape[3] ** -0.5
    scores = torch.cat([query @ key.transpose(2, 3) * scale for key in keys], dim=3)
    return torch.where(mask, scores, -math.inf).softmax(dim=3)


def in_bfloat16(hidden: Float[Tensor, "B T E"]) -> bool:
    """Whether autocast computes in bfloat16 on this device. In float16 the residual stream could overflow."""
    kind = hidden.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # the first knows no autocast
        return False
    return torch.get_autocast_dtype(kind) is torch.bfloat16


def sinusoids(places: int, width: int) -> Float[Tensor, "places width"]:
    """Sines, then cosines, of each place over 10000^(2i / width) (Vaswani et al., section 3.5, their order aside)."""
    rates = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(places)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def apply_rotary(vectors: Float[Tensor, "*B D"], rotary: Float[Tensor, "... D"]) -> Float[Tensor, "*B D"]:
    """Turn each pair (x_i, x_i+D/2) by the angle of its place (Su et al., equation 34, their order aside)."""
    sine, cosine = (part.unsqueeze(-2) for part in rotary.chunk(2, dim=-1))
    halves = vectors.unflatten(-1, (2, -1))
    sign = torch.arange(-1, 2, 2, device=vectors.device)[:, None]
    # Not a torch.cat of two halves: a compiled kernel would test for each element which half it belongs to.
    return (halves * cosine + halves.flip(-2) * (sign * sine)).flatten(-2)
