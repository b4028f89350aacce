"""GPT's network against Hugging Face's GPT-2, with and without a past, and against equations written out."""

import math
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from dlref.models import GPT
from dlref.models.gpt import Past, apply_rotary, attention_weights, causal_mask, sinusoids
from dlref.runtime import UserError
from dlref.training.weights import load_weights

POSITIONS = ("learned", "sinusoidal", "rotary")


def network(**options):
    sizes = {"vocabulary": 13, "context_length": 12, "n_layer": 3, "n_head": 2, "n_embd": 16}
    made = GPT(**sizes | options).eval()
    for parameter in made.parameters():  # initially, attention is almost uniform and biases are zero
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def answers(model, tokens):
    """Return for each token the logits of the next one."""
    return model.logits(model(tokens)[0])


def of_hugging_face(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**options)).eval()


def published(model):
    """Return the state dict in its published form: without a prefix, with the masks."""
    state = {key.removeprefix("transformer."): value for key, value in model.state_dict().items()}
    state.pop("lm_head.weight")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4).tril() for i in range(model.config.n_layer)}
    return {key: value.clone() for key, value in state.items()} | masks


def test_gpt2_matches_hugging_face_with_shared_weights(tmp_path):
    theirs = of_hugging_face()
    with torch.device("meta"):
        ours = GPT(50257).eval()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 124_439_808
    ours.to_empty(device="cpu")
    save_file(published(theirs), tmp_path / "model.safetensors")
    assert load_weights(ours, tmp_path / "model.safetensors") == []
    tokens = torch.randint(50257, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(answers(ours, tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


SMALL = {"vocab_size": 13, "n_positions": 12, "n_layer": 2, "n_head": 2, "n_embd": 16, "bos_token_id": 0}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_published_weights_fit_a_padded_vocabulary_and_a_shorter_context(tmp_path, prefix):
    theirs = of_hugging_face(**SMALL, eos_token_id=0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {prefix + key: value for key, value in published(theirs).items()}
    torch.save(state | {"lm_head.weight": theirs.lm_head.weight.detach()}, tmp_path / "gpt2.pt")
    ours = network(vocabulary=16, context_length=8, n_layer=2)
    load_weights(ours, tmp_path / "gpt2.pt")
    tokens = torch.randint(13, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(answers(ours, tokens)[..., :13], theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    torch.save(state | {"lm_head.weight": torch.randn(13, 16)}, tmp_path / "untied.pt")
    with pytest.raises(UserError, match=r"untied\.pt: \d+ tensors do not fit GPT "):
        load_weights(network(vocabulary=13, context_length=8, n_layer=2), tmp_path / "untied.pt")


def test_padding_rows_of_the_vocabulary_are_no_likelier_than_known_tokens(tmp_path):
    """GPT-2's logits lie far below zero, but logits of freshly initialised rows would be close to zero."""
    theirs = of_hugging_face(**SMALL, eos_token_id=0)
    with torch.no_grad():
        theirs.transformer.ln_f.bias.fill_(1.0)
        theirs.transformer.wte.weight.sub_(3.0)
    torch.save(published(theirs), tmp_path / "gpt2.pt")
    ours = network(vocabulary=16, n_layer=2)
    load_weights(ours, tmp_path / "gpt2.pt")
    with torch.no_grad():
        logits = answers(ours, torch.randint(13, (2, 8)))
    assert logits.max() < -10
    assert (logits.logsumexp(2) - logits[..., :13].logsumexp(2)).max() < math.log(16 / 13) + 0.01


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"vocabulary": 10}, "wte.weight"),
        ({"context_length": 20}, "wpe.weight"),
        ({"n_embd": 8}, "tensors do not fit GPT"),
        ({"n_layer": 3}, "h.2."),
        ({"bias": False}, "attn.c_attn.bias"),
        ({"positions": "rotary"}, "wpe.weight"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_published_weights_of_another_architecture_are_refused(tmp_path, options, complaint, prefix):
    state = published(of_hugging_face(**SMALL, eos_token_id=0))
    state |= {f"h.{i}.attn.{mask}": torch.ones(1, 1, 16, 16) for i in range(2) for mask in ("bias", "masked_bias")}
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "gpt2.pt")
    with pytest.raises(UserError, match=complaint) as caught:
        load_weights(network(**{"n_layer": 2} | options), tmp_path / "gpt2.pt")
    assert "attn.masked_bias" not in str(caught.value)


@pytest.mark.parametrize(("positions", "qk_norm", "bias"), list(product(POSITIONS, [False, True], [False, True])))
def test_logits_after_a_past_match_those_of_a_single_call(positions, qk_norm, bias):
    """At every position, in steps of several tokens, with arbitrary values beyond the end of the past."""
    model = network(positions=positions, qk_norm=qk_norm, bias=bias)
    tokens = torch.randint(13, (2, 12))
    with torch.no_grad():
        whole = answers(model, tokens)
        for cut in range(1, 12):
            _, keys, values = model(tokens[:, :cut])
            room = [[torch.cat([x, 50 * torch.randn(2, 2, 3, 8)], 2) for x in side] for side in (keys, values)]
            past = Past(*room, torch.tensor([cut, cut]))
            hidden, _, _ = model(tokens[:, cut:], past)
            torch.testing.assert_close(model.logits(hidden), whole[:, cut:], rtol=1e-4, atol=1e-4)


def test_pasts_of_different_lengths_can_be_batched():
    model = network(positions="rotary")
    tokens = torch.randint(13, (2, 12))
    with torch.no_grad():
        _, keys, values = model(tokens[:, :9])
        past = Past(keys, values, torch.tensor([9, 4]))
        hidden, _, _ = model(torch.stack([tokens[0, 9:11], tokens[1, 4:6]]), past)
        whole = answers(model, tokens)
    expected = torch.stack([whole[0, 9:11], whole[1, 4:6]])
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-4, atol=1e-4)


def test_padding_tokens_may_lie_beyond_the_context():
    """This happens to a text whose context is full in a batch with a text that has more new tokens."""
    model, tokens = network(context_length=4), torch.randint(13, (1, 5))
    _, keys, values = model(tokens[:, :3])
    hidden, _, _ = model(tokens[:, 3:], Past(keys, values, torch.tensor([3])))
    torch.testing.assert_close(model.logits(hidden)[:, 0], answers(model, tokens[:, :4])[:, 3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS)
def test_logits_depend_on_all_earlier_tokens_and_on_no_later_one(positions):
    model = network(positions=positions)
    tokens = torch.randint(13, (1, 12))
    with torch.no_grad():
        known = answers(model, tokens)
        for place in range(12):
            changed = tokens.clone()
            changed[0, place] = (changed[0, place] + 1) % 13
            found = answers(model, changed)
            torch.testing.assert_close(found[:, :place], known[:, :place], rtol=0, atol=0)
            assert (found[:, place:] - known[:, place:]).abs().amax(2).min() > 1e-4


def test_attention_weights_written_out_match_fused_attention():
    query, key, value = torch.randn(3, 2, 4, 7, 8)
    weights = attention_weights(query, causal_mask(torch.zeros(2, 7, dtype=torch.long)), key)
    fused = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(weights @ value, fused)
    scores = torch.einsum("bhtd,bhsd->bhts", query, key) / math.sqrt(8)
    row = torch.softmax(scores[1, 2, 4, :5], 0)
    torch.testing.assert_close(weights[1, 2, 4], torch.cat([row, torch.zeros(2)]))


def test_attention_returns_the_weights_used_in_the_forward_pass():
    model = network()
    tokens = torch.randint(13, (2, 6))
    weights = model.attention(tokens)
    assert [layer.shape for layer in weights] == [(2, 2, 6, 6)] * 3
    for layer in weights:
        torch.testing.assert_close(layer.sum(3), torch.ones(2, 2, 6))
        assert layer.triu(1).count_nonzero() == 0
    hidden, _ = model.embed(tokens)
    attn = model.h[0].attn
    _, _, value = attn.project(model.h[0].ln_1(hidden), None)
    mixed = (weights[0] @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attn.c_proj(mixed), attn(model.h[0].ln_1(hidden), None, None)[0])


def test_hidden_states_are_bfloat16_under_bfloat16_autocast():
    model, tokens = network(), torch.randint(13, (2, 6))
    exact, _, _ = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, _, _ = model(tokens)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.1)


def test_hidden_states_may_exceed_the_range_of_float16_under_float16_autocast():
    model, tokens = network(), torch.randint(13, (2, 6))
    for block in model.h[:2]:
        block.mlp.c_proj.bias.data[5] = 40_000.0
    exact, _, _ = model(tokens)
    with torch.autocast("cpu", torch.float16):
        found, _, _ = model(tokens)
    torch.testing.assert_close(found.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("enabled", [True, False])
def test_gpt_compiles_to_a_single_graph_with_and_without_autocast(enabled, unchecked):
    torch._dynamo.reset()  # other tests may have reached torch's limit of recompilations
    model, tokens = network(positions="rotary", qk_norm=True), torch.randint(13, (2, 6))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        torch.testing.assert_close(compiled(tokens)[0], model(tokens)[0])


def test_gpt_runs_on_a_device_without_autocast():
    with torch.device("meta"):
        hidden, _, _ = network()(torch.zeros(1, 4, dtype=torch.long))
    assert hidden.device.type == "meta"


def test_rotary_positions_match_llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    query, key = torch.randn(2, 2, 3, 9, 8)
    config = LlamaConfig(hidden_size=24, num_attention_heads=3, head_dim=8, max_position_embeddings=9)
    cosine, sine = LlamaRotaryEmbedding(config)(query, torch.arange(9)[None])
    for ours, theirs in zip((query, key), apply_rotary_pos_emb(query, key, cosine, sine), strict=True):
        torch.testing.assert_close(apply_rotary(ours, sinusoids(9, 8)), theirs)


def test_rotary_scores_depend_only_on_distances():
    query, key = torch.randn(2, 1, 1, 1, 8)
    turns = sinusoids(50, 8)
    scores = [
        (apply_rotary(query, turns[i : i + 1]) * apply_rotary(key, turns[j : j + 1])).sum()
        for i, j in ((5, 2), (33, 30), (49, 46))
    ]
    torch.testing.assert_close(scores, [scores[0]] * 3, rtol=1e-4, atol=1e-5)
    further = (apply_rotary(query, turns[5:6]) * apply_rotary(key, turns[3:4])).sum()
    assert (scores[0] - further).abs() > 1e-3


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoidal_positions_follow_the_paper(width):
    """Section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i / d)), PE(pos, 2i + 1) its cosine; here all sines come first."""
    found = sinusoids(20, width)
    for i in range(-(-width // 2)):
        angle = torch.arange(20.0) / 10_000 ** (2 * i / width)
        torch.testing.assert_close(found[:, i], angle.sin(), rtol=1e-4, atol=1e-5)
        if i < width // 2:
            torch.testing.assert_close(found[:, -(-width // 2) + i], angle.cos(), rtol=1e-4, atol=1e-5)


def test_initial_weights_follow_gpt2():
    made = GPT(500, 64, n_layer=8, n_head=4, n_embd=128).requires_grad_(False)
    assert made.h[0].attn.c_attn.weight.std() == pytest.approx(0.02, rel=0.05)
    for projection in (made.h[3].attn.c_proj, made.h[3].mlp.c_proj):
        assert projection.weight.std() == pytest.approx(0.02 / 4, rel=0.05)
        assert projection.bias.count_nonzero() == 0
    tokens = torch.randint(500, (2, 64))
    assert F.cross_entropy(answers(made, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) == pytest.approx(
        math.log(500), rel=0.05
    )


def test_only_dropout_differs_between_training_and_evaluation():
    model, tokens = network(dropout=0.5), torch.randint(13, (1, 6))
    assert torch.equal(answers(model, tokens), answers(model, tokens))
    assert not torch.equal(answers(model.train(), tokens), answers(model, tokens))
    plain = network(bias=False, dropout=0.0)
    assert torch.equal(answers(plain.train(), tokens), answers(plain.eval(), tokens))
    assert not [name for name, _ in plain.named_parameters() if "bias" in name]


@pytest.mark.parametrize("positions", POSITIONS)
def test_dropout_is_applied_to_embeddings(positions):
    model, tokens = network(positions=positions, dropout=0.5).train(), torch.randint(13, (1, 6))
    assert (model.embed(tokens)[0] == 0).float().mean() == pytest.approx(0.5, abs=0.2)


def test_dropout_is_applied_to_the_feed_forward_output():
    mlp = network(dropout=0.5).train().h[0].mlp
    assert (mlp(torch.randn(1, 6, 16)) == 0).float().mean() == pytest.approx(0.5, abs=0.2)


def test_sinusoids_are_added_to_embeddings_scaled_by_the_root_of_the_width():
    """Vaswani et al., section 3.4."""
    model, tokens = network(positions="sinusoidal"), torch.randint(13, (2, 6))
    torch.testing.assert_close(model.embed(tokens)[0], 4 * model.wte.weight[tokens] + sinusoids(6, 16))


@pytest.mark.parametrize("positions", POSITIONS)
def test_qk_norm_gives_queries_and_keys_a_root_mean_square_of_one(positions):
    model, tokens = network(positions=positions, qk_norm=True), torch.randint(13, (2, 6))
    hidden, rotary = model.embed(tokens)
    *pair, value = model.h[0].attn.project(model.h[0].ln_1(hidden), rotary)
    for vectors in pair:
        torch.testing.assert_close(vectors.square().mean(3).sqrt(), torch.ones(2, 2, 6), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(value.square().mean(3).sqrt(), torch.ones(2, 2, 6), rtol=1e-2)


@pytest.mark.parametrize(("other", "without"), [("resid_dropout", torch.nn.Identity()), ("dropout", 0.0)])
def test_dropout_is_applied_to_attention_weights_and_to_attention_outputs(other, without):
    attention = network(dropout=0.5).train().h[0].attn
    setattr(attention, other, without)
    hidden = torch.randn(1, 6, 16)
    assert not torch.equal(attention(hidden, None, None)[0], attention(hidden, None, None)[0])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"positions": "relative"}, "no positions 'relative': expected learned, sinusoidal, rotary"),
        ({"n_embd": 15}, "n_embd 15: expected a multiple of 2 for 2 heads"),
        ({"n_embd": 6, "positions": "rotary"}, "n_embd 6: expected a multiple of 4 for 2 heads"),
    ],
)
def test_invalid_options_of_gpt_are_refused(unchecked, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        network(**options)
