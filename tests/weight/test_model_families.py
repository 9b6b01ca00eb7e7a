"""Every family against transformers' own forward pass, on small random models."""

import pytest

torch = pytest.importorskip("torch")
from flume_weight.model import LocalAttention, load_model  # noqa: E402
from flume_weight.model.linear import Linear  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config  # noqa: E402

SIZES = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied embeddings": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, llama3 rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama, linear rope": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama, own head size": LlamaConfig(**SIZES, head_dim=24),
    "llama, every bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, no grouped heads": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama, one KV head": LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "llama, wider than 1024": LlamaConfig(**SIZES | {"intermediate_size": 1100}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, a window as long as the context": MistralConfig(**SIZES, sliding_window=128),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, tied embeddings": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "qwen3, attention bias": Qwen3Config(**SIZES, head_dim=16, attention_bias=True),
}


@pytest.fixture(scope="module", params=FAMILIES, ids=FAMILIES)
def pair(request, save_random):
    """(our model, transformers' model) of one family in float32."""
    directory, theirs = save_random(FAMILIES[request.param])
    return load_model(directory, torch.float32), theirs


def prompt(length, seed=0):
    return torch.randint(0, 211, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def wanted(theirs, token_ids):
    return theirs(token_ids[None]).logits[0].float()


def run(ours, attention, packed):
    """packed: (sequence, token ids) to append in one pass -> logits of all rows."""
    starts = [attention.length(sequence) for sequence, _ in packed]
    attention.next_pass([(sequence, len(ids)) for sequence, ids in packed])
    positions = [start + torch.arange(len(ids)) for start, (_, ids) in zip(starts, packed, strict=True)]
    token_ids = torch.cat([ids for _, ids in packed])
    return ours.forward(token_ids, torch.cat(positions), attention, torch.arange(len(token_ids)))


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_a_prefill_gives_the_logits_of_transformers(pair):
    ours, theirs = pair
    ids = prompt(100)
    close(run(ours, LocalAttention(3), [("s", ids)]), wanted(theirs, ids))


def test_token_by_token_gives_the_same_logits_as_at_once(pair):
    ours, theirs = pair
    ids, attention = prompt(40), LocalAttention(3)
    got = torch.cat([run(ours, attention, [("s", ids[i : i + 1])]) for i in range(40)])
    close(got, wanted(theirs, ids))


def test_chunks_of_any_size_give_the_same_logits(pair):
    ours, theirs = pair
    ids, attention = prompt(60), LocalAttention(3)
    got = torch.cat([run(ours, attention, [("s", chunk)]) for chunk in ids.split([7, 1, 30, 22])])
    close(got, wanted(theirs, ids))


def test_sequences_packed_into_one_pass_do_not_see_each_other(pair):
    ours, theirs = pair
    a, b, c = prompt(30, 1), prompt(17, 2), prompt(1, 3)
    attention = LocalAttention(3)
    first = run(ours, attention, [("a", a[:20]), ("b", b)])
    second = run(ours, attention, [("c", c), ("a", a[20:])])
    close(torch.cat([first[:20], second[1:]]), wanted(theirs, a))
    close(first[20:], wanted(theirs, b))
    close(second[:1], wanted(theirs, c))


def test_only_the_asked_rows_get_logits_in_the_asked_order(pair):
    ours, theirs = pair
    ids, attention = prompt(12), LocalAttention(3)
    attention.next_pass([("s", 12)])
    got = ours.forward(ids, torch.arange(12), attention, torch.tensor([11, 3]))
    assert got.dtype == torch.float32
    close(got, wanted(theirs, ids)[[11, 3]])


def test_no_rows_asked_is_no_logits(pair):
    ours, _ = pair
    attention = LocalAttention(3)
    attention.next_pass([("s", 5)])
    got = ours.forward(prompt(5), torch.arange(5), attention, torch.tensor([], dtype=torch.int64))
    assert got.shape == (0, 211)
    assert attention.length("s") == 5


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama, llama3 rope", "qwen2", "qwen3"])
def test_bfloat16_stays_near_transformers_in_bfloat16(family, stored, save_random):
    directory, theirs = save_random(FAMILIES[family], dtype=stored)
    ours = load_model(directory, torch.bfloat16)
    rounded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    ids = prompt(50)
    got, want = run(ours, LocalAttention(3), [("s", ids)]), wanted(rounded, ids)
    exact = wanted(theirs, ids)
    # bfloat16 itself is off by this much; we may not be further from float32 than transformers is.
    assert (got - exact).abs().mean() <= 1.1 * (want - exact).abs().mean()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_weights_stored_in_half_precision_compute_in_float32(stored, save_random):
    directory, theirs = save_random(FAMILIES["llama"], dtype=stored)
    ours, ids = load_model(directory, torch.float32), prompt(20)
    close(run(ours, LocalAttention(3), [("s", ids)]), wanted(theirs, ids))


def test_a_sharded_checkpoint_is_the_same_model(save_random):
    directory, theirs = save_random(FAMILIES["qwen3"], max_shard_size="50KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    ids = prompt(20)
    close(run(load_model(directory, torch.float32), LocalAttention(3), [("s", ids)]), wanted(theirs, ids))


def test_attention_is_asked_layer_by_layer_in_the_promised_shapes(pair):
    ours, _ = pair
    config, calls = ours.config, []

    class Recorder:
        def query(self, layer, q):
            calls.append(("query", layer, q))

        def attend(self, layer, q, k, v):
            calls.append(("attend", layer, q, k, v))
            return q.reshape(q.shape[0], -1)

    ours.forward(prompt(6), torch.arange(6), Recorder(), torch.tensor([5]))
    assert [call[:2] for call in calls] == [(k, layer) for layer in range(3) for k in ("query", "attend")]
    for asked, answered in zip(calls[::2], calls[1::2], strict=True):
        assert asked[2] is answered[2]
        assert asked[2].is_contiguous()
        assert asked[2].shape == (6, config.num_query_heads, config.head_dim)
        assert answered[3].shape == answered[4].shape == (6, config.num_kv_heads, config.head_dim)


def test_q_leaves_before_k_and_v_are_computed(save_random, monkeypatch):
    ours, events = load_model(save_random(FAMILIES["llama"])[0], torch.float32), []
    project = Linear.__call__

    def recorded(linear, x):
        events.append("kv" if any(linear is layer.kv for layer in ours._weights.layers) else "other")
        return project(linear, x)

    class Recorder:
        def query(self, layer, q):
            events.append("query leaves")

        def attend(self, layer, q, k, v):
            return q.reshape(q.shape[0], -1)

    monkeypatch.setattr(Linear, "__call__", recorded)
    ours.forward(prompt(2), torch.arange(2), Recorder(), torch.tensor([1]))
    assert [event for event in events if event != "other"] == ["query leaves", "kv"] * 3


def test_the_layout_is_the_configs(pair):
    ours, theirs = pair
    layout = ours.layout(32)
    assert layout.num_layers == 3
    assert layout.num_query_heads == theirs.config.num_attention_heads
    assert layout.num_kv_heads == theirs.config.num_key_value_heads
    assert layout.head_dim == getattr(theirs.config, "head_dim", None) or 16
    assert (layout.dtype, layout.block_tokens) == ("float32", 32)


def test_a_position_outside_the_context_is_an_error(pair):
    ours, _ = pair
    attention = LocalAttention(3)
    attention.next_pass([("s", 1)])
    with pytest.raises(IndexError):
        ours.forward(prompt(1), torch.tensor([128]), attention, torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama, wider than 1024", "qwen3"])
def test_what_else_is_in_the_batch_changes_no_bit_of_a_rows_logits(family, dtype, save_random):
    ours = load_model(save_random(FAMILIES[family])[0], dtype)
    ids, others = prompt(20), [prompt(n, n) for n in (3, 50, 1, 7)]
    alone, crowd = LocalAttention(3), LocalAttention(3)
    want = run(ours, alone, [("s", ids)])
    got = run(ours, crowd, [*enumerate(others), ("s", ids)])[-20:]
    assert torch.equal(got, want)
    want = run(ours, alone, [("s", ids[:1])])
    got = run(ours, crowd, [("s", ids[:1]), *((n, other[:1]) for n, other in enumerate(others))])[:1]
    assert torch.equal(got, want)
