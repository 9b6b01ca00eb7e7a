"""Every field of a config.json, in one of three lists: used, harmless, refused.

The families' own fields are those of transformers' config classes, versions 4 and 5; refused are also the
fields by which related families change the arithmetic, since configs are often copied and edited.
"""

from __future__ import annotations

from collections.abc import Mapping

from flume_weight.model.field_lists import FieldLists, Only, names

_USED = names(
    "architectures attention_multiplier eos_token_id head_dim hidden_act hidden_size intermediate_size "
    "layer_types max_position_embeddings model_type num_attention_heads num_hidden_layers "
    "num_key_value_heads original_max_position_embeddings partial_rotary_factor quantization_config "
    "query_pre_attn_scalar rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings "
    "vocab_size"
)
_USED_BY: Mapping[str, frozenset[str]] = {
    "llama": frozenset({"attention_bias", "mlp_bias", "sliding_window"}),
    "mistral": frozenset({"sliding_window"}),
    "qwen2": frozenset({"sliding_window", "use_sliding_window", "max_window_layers"}),
    "qwen3": frozenset({"attention_bias", "sliding_window", "use_sliding_window", "max_window_layers"}),
}


def _because(reason: str, fields: str) -> dict[str, str]:
    return dict.fromkeys(fields.split(), reason)


_HARMLESS = {
    **_because(
        "says who made the model, with what, or what it is called",
        "transformers_version _name_or_path name_or_path _commit_hash _auto_class tokenizer_class prefix "
        "finetuning_task task_specific_params problem_type id2label label2id num_labels unsloth_* "
        "transformers.js_config model_name language license base_model",
    ),
    **_because("the flag --dtype decides", "dtype torch_dtype use_bfloat16 bf16 fp16"),
    **_because(
        "how transformers runs a model, not what it computes",
        "use_cache output_hidden_states output_attentions output_scores return_dict return_dict_in_generate "
        "torchscript chunk_size_feed_forward gradient_checkpointing attn_implementation "
        "_attn_implementation* _experts_implementation* _flash_attn_2_enabled use_flash_attn "
        "use_flash_attention keys_to_ignore_at_inference attribute_map base_config_key base_model_ep_plan "
        "base_model_fsdp_plan base_model_pp_plan base_model_tp_plan extra_files extra_config_files "
        "sub_configs_defaults is_decoder",
    ),
    "auto_map": "code beside a model is never run: the family of model_type is computed, as transformers "
    "does unless it is told to trust remote code",
    **_because(
        "used in training only",
        "initializer_range initializer_factor attention_dropout hidden_dropout resid_dropout embd_pdrop "
        "attn_pdrop resid_pdrop embedding_dropout dropout classifier_dropout mlp_dropout "
        "router_aux_loss_coef output_router_logits loss_type z_loss",
    ),
    "pretraining_tp": "cuts products into pieces and adds them up: the same result",
    **_because(
        "the tokenizer's files say what is added",
        "bos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id mask_token_id",
    ),
    **_because(
        "suggests how to sample; requests say how to",
        "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff do_sample num_beams "
        "num_beam_groups num_return_sequences max_length max_new_tokens min_length min_new_tokens max_time "
        "early_stopping stop_strings length_penalty repetition_penalty encoder_repetition_penalty "
        "diversity_penalty penalty_alpha no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
        "force_words_ids constraints renormalize_logits forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
        "sequence_bias token_healing guidance_scale watermarking_config output_logits is_assistant "
        "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold "
        "prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind "
        "target_lookbehind assistant_ensemble_weight speculation_type use_mtp cache_implementation "
        "cache_config max_cache_len compile_config disable_compile continuous_batching_config low_memory "
        "dola_layers prefill_chunk_size _from_model_config",
    ),
    **_because(
        "max_position_embeddings is the length that counts",
        "max_sequence_length model_max_length seq_length max_seq_len n_ctx",
    ),
    **_because(
        "a bias is a tensor: one without a place is refused, and so is a place without one",
        "bias use_bias qkv_bias use_qkv_bias attention_qkv_bias attention_out_bias o_bias lm_head_bias",
    ),
    **_because(
        "only with experts, which are refused",
        "num_experts_per_tok num_experts_per_token moe_intermediate_size shared_expert_intermediate_size "
        "decoder_sparse_step mlp_only_layers norm_topk_prob moe_layer_freq topk_method n_group topk_group",
    ),
}
_HARMLESS_FOR: Mapping[str, Mapping[str, str]] = {
    "llama": {"max_window_layers": "only with use_sliding_window, which is refused"},
    "mistral": _because(
        "this class has no biases, and a window in every layer",
        "attention_bias mlp_bias max_window_layers use_sliding_window",
    ),
    "qwen2": _because("this class has biases of Q, K and V, and no others", "attention_bias mlp_bias"),
    "qwen3": _because("this class has no bias in its MLP", "mlp_bias"),
}


def _only(values: tuple[object, ...], supported: str, fields: str) -> dict[str, Only]:
    return dict.fromkeys(fields.split(), Only(values, supported))


_REFUSED = {
    **_only(
        (0,),
        "no soft cap",
        "attn_logit_softcapping final_logit_softcapping attn_logit_softcap final_logit_softcap "
        "logit_softcapping logits_soft_cap attention_logit_cap",
    ),
    **_only((0,), "no clamp", "clip_qkv clamp_qkv qkv_clip swiglu_limit swiglu_clamp"),
    **_only((True,), "causal attention", "is_causal causal"),
    **_only(
        (False,),
        "causal attention",
        "use_bidirectional_attention bidirectional use_prefix_lm is_encoder_decoder add_cross_attention "
        "tie_encoder_decoder",
    ),
    "cross_attention_hidden_size": Only((0,), "no cross attention"),
    **_only((False, 0), "rotary positions only", "alibi use_alibi max_alibi_bias alibi_bias_max"),
    **_only(("rope", "rotary"), "rope", "position_embedding_type pos_emb pos_embd_type"),
    **_only((True,), "rope in every layer", "use_rope use_rotary rope use_rotary_embedding"),
    **_only(
        ([], 0, False),
        "rope in every layer",
        "no_rope_layers no_rope_layer_interval nope_layer_interval rope_skip_layers",
    ),
    **_only(
        (False,), "pairs of RoPE half a head apart", "rope_interleaved rope_interleave rotary_interleaved"
    ),
    **_only((1,), "RoPE of whole heads", "rotary_pct rope_pct rotary_percent"),
    **_only((1,), "rope_theta", "rope_ratio"),
    **_only((), "rope_theta", "rotary_emb_base rope_base rotary_base rope_local_base_freq rotary_dim"),
    **_only((False, []), "one position per token", "use_mrope mrope_section mrope_interleaved"),
    **_only(
        (False, 0),
        "rope_parameters",
        "use_dynamic_ntk use_logn_attn attn_temperature_tuning temperature_tuning floor_scale attn_scale",
    ),
    **_only(
        (1,),
        "a factor of 1",
        "logit_scale logits_scale logits_scaling lm_head_multiplier embedding_multiplier embedding_scale "
        "input_scale scale_emb residual_multiplier residual_scale attention_in_multiplier "
        "attention_out_multiplier key_multiplier mlp_multipliers width_multiplier output_multiplier_scale",
    ),
    **_only((), "models without muP scales", "scale_depth dim_model_base mup_*"),
    **_only(
        (False,),
        "attention scaled by head_dim^-0.5",
        "scale_attn_by_inverse_layer_idx reorder_and_upcast_attn scale_embedding scale_embeddings",
    ),
    "scale_attn_weights": Only((True,), "attention scaled by head_dim^-0.5"),
    **_only(
        (0,),
        "dense models",
        "num_experts num_local_experts n_routed_experts n_shared_experts moe_num_experts "
        "num_shared_experts num_moe_experts ffn_num_experts",
    ),
    **_only(
        (False,), "norm, attention, norm, MLP in turn", "use_parallel_residual parallel_attn parallel_block"
    ),
    **_only((False,), "norms before attention and MLP", "post_norm use_post_norm sandwich_norm"),
    **_only(("rmsnorm", "rms_norm", "RMSNorm", "rms"), "RMSNorm", "norm_type normalization_type norm_class"),
    **_only((False,), "attention without a gate or sinks", "attn_output_gate attention_sink use_sink"),
    **_only((0,), "attention without sinks", "num_sink_tokens num_attention_sinks"),
    **_only((0,), "attention to all tokens", "attention_chunk_size sliding_window_size attention_window"),
    **_only(("silu", "swish"), "silu", "hidden_activation activation_function mlp_act activation"),
    **_only(({}, []), "layers that are alike", "per_layer_config block_configs layer_config ff_multipliers"),
    **_only((0,), "layers that have their own K and V", "num_kv_shared_layers kv_sharing_layers"),
    **_only((0,), "heads as in Llama", "kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim"),
    "pruned_heads": Only(({}, []), "models without pruned heads"),
    **_only((0,), "models without layers that predict further tokens", "num_nextn_predict_layers"),
    **_only(
        (), "models of text alone", "text_config vision_config audio_config vision_tower mm_vision_tower"
    ),
    **_only((), "weights in float32, float16, bfloat16", "compression_config"),
}
_ONLY_QK_NORM = "use_qk_norm qk_norm qk_layernorm"
_REFUSED_FOR: Mapping[str, Mapping[str, Only]] = {
    "llama": {
        **_only((False,), "no norm of Q and K in this family", _ONLY_QK_NORM),
        "use_sliding_window": Only((False,), "full attention"),
    },
    "mistral": _only((False,), "no norm of Q and K in this family", _ONLY_QK_NORM),
    "qwen2": _only((False,), "no norm of Q and K in this family", _ONLY_QK_NORM),
    "qwen3": _only((True,), "norms of Q and K, as this family has them", _ONLY_QK_NORM),
}
CONFIG_FIELDS: Mapping[str, FieldLists] = {
    family: FieldLists(
        _USED | used, {**_HARMLESS, **_HARMLESS_FOR[family]}, {**_REFUSED, **_REFUSED_FOR[family]}
    )
    for family, used in _USED_BY.items()
}
"""Family -> lists for the fields of config.json."""

_EVERY_ROPE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_ROPE_USED: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": names(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale "
        "mscale_all_dim truncate"
    ),
}
_ROPE_HARMLESS = {
    "finetuned": "says how the model was trained",
    "original_max_position_embeddings": "how far the model was trained; only llama3 and yarn compute with it",
    "max_position_embeddings": "max_position_embeddings of the whole config is the length that counts",
}


def _rope_refused(kind: str) -> dict[str, Only]:
    without = f"rope_type {kind} without it"
    return {
        **_only((1,), f"{without}, or 1", "factor attention_factor attn_factor extrapolation_factor mscale"),
        **_only(
            (),
            without,
            "low_freq_factor high_freq_factor beta_fast beta_slow mscale_all_dim truncate short_factor "
            "long_factor short_mscale long_mscale alpha mrope_section mrope_interleaved",
        ),
    }


ROPE_FIELDS: Mapping[str, FieldLists] = {
    kind: FieldLists(
        _EVERY_ROPE | used,
        {name: reason for name, reason in _ROPE_HARMLESS.items() if name not in used},
        {name: rule for name, rule in _rope_refused(kind).items() if name not in used},
    )
    for kind, used in _ROPE_USED.items()
}
"""rope_type -> lists for the fields of rope_parameters and rope_scaling."""
