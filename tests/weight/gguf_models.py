"""GGUF files of transformers' models, as llama.cpp's converter writes them."""

import gguf

NAMES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "q_norm": "attn_q_norm",
    "k_proj": "attn_k",
    "k_norm": "attn_k_norm",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def stored_name(name):
    """A checkpoint's tensor name as llama.cpp calls it."""
    if name in ("lm_head.weight", "model.norm.weight"):
        return {"lm_head.weight": "output.weight", "model.norm.weight": "output_norm.weight"}[name]
    parts = name.split(".")
    prefix = f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return f"{prefix}{NAMES[parts[-2]]}.{parts[-1]}"


def interleave(rows, heads):
    """What llama.cpp's converter does to the rows of Q and K of the llama architecture."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors_of(model):
    config, found = model.config, {}
    for name, values in model.state_dict().items():
        array = values.float().numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave(
                array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            )
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            found[stored_name(name)] = array
    return found


def add(writer, name, value):
    """One metadata field, in the type that fits the value."""
    match value:
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case list():
            writer.add_array(name, value)


def write(
    path,
    model,
    *,
    fields=(),
    drop=(),
    tensors=None,
    kind=None,
    architecture=None,
    other_fields=(),
    parts_of=0,
):
    """A GGUF of `model`: `fields` of its architecture and `other_fields` are added, None takes one away.

    `kind` quantises matrices; `parts_of` so many tensors go into one file each, NAME-00001-of-0000N.gguf.
    """
    config = model.config
    architecture = architecture or config.model_type
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": getattr(config, "head_dim", None) or 16,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        **dict(fields),
    }
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts_of)
    writer.add_token_list([f"token {number}" for number in range(config.vocab_size)])
    writer.add_eos_token_id(7)
    writer.add_eot_token_id(9)
    for name, value in {f"{architecture}.{name}": value for name, value in values.items()}.items():
        add(writer, name, value)
    for name, value in dict(other_fields).items():
        add(writer, name, value)
    for name, array in {**tensors_of(model), **(tensors or {})}.items():
        if name in drop:
            continue
        if kind and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
