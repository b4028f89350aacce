"""GPT: a decoder of masked multi-head self-attention.

A. Vaswani et al., "Attention Is All You Need", 2017: attention (section 3.2), sinusoidal positions (section 3.5).
A. Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018: decoder only, learned positions.
"Language Models are Unsupervised Multitask Learners", 2019 (GPT-2): layer norms before each sub-layer and after the
last block, and the initialisation (section 2.3). Parameters have the names and shapes of Hugging Face's `gpt2`.
J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021: rotary positions (section 3.4.2).
A. Henry et al., "Query-Key Normalization for Transformers", 2020.

Legend of shapes: B texts, T new tokens, P past tokens, S past and new tokens (P + T), V size of the vocabulary,
L layers, H heads, E width of the network, D width of a head (E / H), I and O input and output width of a layer.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Past(NamedTuple):
    """The keys and values of the tokens read so far.

    Attributes:
        keys: (B, H, P, D) for each layer.
        values: (B, H, P, D) for each layer.
        length: (B), number of past tokens of each text, at most P; later entries are masked.
    """

    keys: Sequence[Float[Tensor, "B H P D"]]
    values: Sequence[Float[Tensor, "B H P D"]]
    length: Int[Tensor, "B"]


class GPT(nn.Module):
    """p(x_t | x_<t) = softmax(W_e norm(h_L)), h_l = block(h_l-1), h_0 = W_e x + W_p (Radford et al. 2018, equation 2).

    Args:
        vocabulary: V, at least the size of the tokeniser's vocabulary.
        context_length: maximum number of tokens, past and new.
        n_layer: L.
        n_head: H.
        n_embd: E, a multiple of H, or of 2 H with rotary positions.
        positions: `learned` or fixed `sinusoidal` embeddings, added to those of the tokens, or `rotary`, which rotates
            queries and keys.
        bias: whether linear layers and layer norms have a bias.
        qk_norm: scale queries and keys to a root mean square of 1 (Henry et al., without the learned scale).
        dropout: dropout probability of the embeddings, the attention weights and the output of each sub-layer.

    Raises:
        ValueError: `positions` is not one of those listed, or `n_embd` does not fit `n_head`.
    """

    class_layers = ()
    base = ""  # the whole network: published weights must provide every parameter

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
            # GPT-2, section 2.3: the N = 2 n_layer sub-layers add to the residual path, each scaled by 1 / sqrt(N).
            if parameter.ndim > 1:
                added = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if added else 0.02)

    def forward(
        self, tokens: Int[Tensor, "B T"], past: Past | None = None
    ) -> tuple[Float[Tensor, "B T E"], list[Float[Tensor, "B H T D"]], list[Float[Tensor, "B H T D"]]]:
        """Return the hidden states that `logits` takes, and the keys and values of `tokens` in each layer.

        The next call continues from a past with these keys and values appended. The result equals that of reading all
        tokens at once.
        """
        hidden, rotary = self.embed(tokens, past)
        if in_bfloat16(hidden):  # the residual stream is most of the memory traffic: halve it
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
        """The weight of the output layer, which is that of the token embedding."""
        return self.wte.weight

    def logits(self, hidden: Float[Tensor, "B T E"]) -> Float[Tensor, "B T V"]:
        """Return the logits of the next token at each position."""
        return F.linear(hidden, self.output)

    def embed(
        self, tokens: Int[Tensor, "B T"], past: Past | None = None
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "..."] | None]:
        """Return the embeddings of `tokens`, and what rotates queries and keys.

        Learned and sinusoidal positions are added to the embeddings, and nothing rotates (None). Rotary positions are
        not added; the second result is their sines and cosines.
        """
        place = torch.arange(tokens.shape[1], device=tokens.device)
        if past is not None:
            # Rows with fewer new tokens are padded, possibly beyond the context; the padding's output is never read.
            place = (past.length[:, None] + place).clamp(max=self.context_length - 1)
        hidden = self.wte(tokens)
        if self.positions == "rotary":
            return self.drop(hidden), self.sinusoids[place].unsqueeze(-2)  # the same for each head
        if self.positions == "sinusoidal":
            return self.drop(hidden * math.sqrt(hidden.shape[2]) + self.sinusoids[place]), None
        return self.drop(hidden + self.wpe(place)), None

    def attention(self, tokens: Int[Tensor, "B T"]) -> list[Float[Tensor, "B H T T"]]:
        """Return each layer's attention weights; each row sums to one over the tokens up to its own."""
        hidden, rotary = self.embed(tokens)
        weights = []
        for block in self.h:
            query, key, _ = block.attn.project(block.ln_1(hidden), rotary)
            weights.append(attention_weights(query, causal_mask(tokens), key))
            hidden, _, _ = block(hidden, rotary)
        return weights

    def of_base(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename Hugging Face's weights to these keys; pad a smaller vocabulary and truncate a longer context."""
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
        head, tied = state.get("lm_head.weight"), state.get("wte.weight")
        if head is not None and tied is not None and torch.equal(head, tied):
            del state["lm_head.weight"]
        state = {key: value for key, value in state.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}
        if "wpe.weight" in state:
            state["wpe.weight"] = state["wpe.weight"][: self.context_length]
        own, given = self.wte.weight.detach(), state.get("wte.weight")
        if given is not None and given.shape[1:] == own.shape[1:]:
            # Padding gets the mean embedding, and so the mean logit. Zero would be far likelier than any GPT-2 token.
            padding = given.mean(0, keepdim=True).expand(max(len(own) - len(given), 0), -1)
            state["wte.weight"] = torch.cat([given, padding])
        return state


class Block(nn.Module):
    """Self-attention and a feed-forward network, each with pre-norm and a residual connection (GPT-2, section 2.3)."""

    def __init__(self, width: int, heads: int, bias: bool, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = Attention(width, heads, bias, qk_norm, dropout)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = FeedForward(width, bias, dropout)

    def forward(
        self, hidden: Float[Tensor, "B T E"], rotary: Tensor | None, before: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
        """Return the hidden states after this block, and the keys and values of the tokens.

        `before` holds this layer's past keys, its past values, and the mask over past and new tokens.
        """
        attended, key, value = self.attn(self.ln_1(hidden), rotary, before)
        hidden = hidden + attended
        return hidden + self.mlp(self.ln_2(hidden)), key, value


class Attention(nn.Module):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_H) W_O (Vaswani et al., section 3.2.2), causally masked."""

    def __init__(self, width: int, heads: int, bias: bool, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.qk_norm, self.dropout = heads, qk_norm, dropout
        self.c_attn = Linear(width, 3 * width, bias)
        self.c_proj = Linear(width, width, bias)
        self.resid_dropout = nn.Dropout(dropout)

    def project(self, hidden: Float[Tensor, "B T E"], rotary: Tensor | None) -> tuple[Float[Tensor, "B H T D"], ...]:
        """Return the queries, keys and values of each head."""
        query, key, value = (part.unflatten(2, (self.heads, -1)) for part in self.c_attn(hidden).chunk(3, dim=2))
        if self.qk_norm:
            query, key = (F.rms_norm(x, x.shape[-1:]) for x in (query, key))
        if rotary is not None:
            query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
        # Heads move before tokens only here, as a view. The memory layout stays token by token, also after attention.
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def forward(
        self, hidden: Float[Tensor, "B T E"], rotary: Tensor | None, before: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
        """Return the attention output, the keys and the values of the tokens; for `before`, see `Block`."""
        query, key, value = self.project(hidden, rotary)
        if before is None:
            dropped = self.dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropped)
        else:
            attended = attend(query, key, value, *before)
        return self.resid_dropout(self.c_proj(attended.transpose(1, 2).flatten(2))), key, value


class FeedForward(nn.Module):
    """FFN(x) = W_2 GELU(W_1 x), with a hidden width of 4 E (Vaswani et al., section 3.3; Radford et al. 2018)."""

    def __init__(self, width: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.c_fc = Linear(width, 4 * width, bias)
        self.c_proj = Linear(4 * width, width, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
        """Apply the network to each token separately."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(hidden), approximate="tanh")))


class Linear(nn.Module):
    """x W + b, with W stored as (I, O) like GPT-2's published weights; `nn.Linear` stores the transpose."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, inputs: Float[Tensor, "B T I"]) -> Float[Tensor, "B T O"]:
        """Apply the layer to each token separately."""
        return F.linear(inputs, self.weight.T, self.bias)


def attend(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B H T D"],
    value: Float[Tensor, "B H T D"],
    past_key: Float[Tensor, "B H P D"],
    past_value: Float[Tensor, "B H P D"],
    mask: Bool[Tensor, "B 1 T S"],
) -> Float[Tensor, "B H T D"]:
    """Attend from new tokens to the past and to the new tokens, where the mask is True.

    The past is read in place. Concatenating it with the new keys and values would copy all of it for each token, which
    would be most of a token's cost on a device.
    """
    weights = attention_weights(query, mask, past_key, key)
    past = past_key.shape[2]
    return weights[..., :past] @ past_value + weights[..., past:] @ value


def causal_mask(tokens: Int[Tensor, "B T"], past: Past | None = None) -> Bool[Tensor, "B 1 T S"]:
    """Return the mask of what each new token attends to: its text's past, and the new tokens up to itself."""
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
    """Return the masked softmax(Q K^T / sqrt(D)), equation 1 of Vaswani et al. without the weighted sum of values.

    Given several `keys`, their scores are concatenated, not the keys themselves.
    """
    scale = query.shape[3] ** -0.5
    scores = torch.cat([query @ key.transpose(2, 3) * scale for key in keys], dim=3)
    return torch.where(mask, scores, -math.inf).softmax(dim=3)


def in_bfloat16(hidden: Float[Tensor, "B T E"]) -> bool:
    """Return whether autocast uses bfloat16 on this device. In float16 the residual stream could overflow."""
    kind = hidden.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta has no autocast
        return False
    return torch.get_autocast_dtype(kind) is torch.bfloat16


def sinusoids(places: int, width: int) -> Float[Tensor, "places width"]:
    """Return sin, then cos, of position / 10000^(2i / width) (Vaswani et al., section 3.5, which interleaves them)."""
    rates = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(places)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


def apply_rotary(vectors: Float[Tensor, "*B D"], rotary: Float[Tensor, "... D"]) -> Float[Tensor, "*B D"]:
    """Rotate each pair (x_i, x_i+D/2) by its position's angle (Su et al., equation 34, which pairs neighbours)."""
    sine, cosine = (part.unsqueeze(-2) for part in rotary.chunk(2, dim=-1))
    halves = vectors.unflatten(-1, (2, -1))
    sign = torch.arange(-1, 2, 2, device=vectors.device)[:, None]
    # Not a torch.cat of two halves: a compiled kernel would test for each element which half it belongs to.
    return (halves * cosine + halves.flip(-2) * (sign * sine)).flatten(-2)
