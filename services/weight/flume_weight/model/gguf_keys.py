"""Every metadata key of a GGUF file, in one of three lists: used, harmless, refused.

The keys are those of the gguf package; `ARCHITECTURE_KEYS` are without the architecture's prefix. The
tokenizer's keys are judged by the router, who reads them.
"""

from __future__ import annotations

from flume_weight.model.field_lists import FieldLists, Only, names


def _because(reason: str, fields: str) -> dict[str, str]:
    return dict.fromkeys(fields.split(), reason)


def _only(values: tuple[object, ...], supported: str, fields: str) -> dict[str, Only]:
    return dict.fromkeys(fields.split(), Only(values, supported))


_NO_EXPERTS = "dense models"
_NO_WINDOW = "only with windows, which are refused"
_NOT_BY_SCALE = "a factor of 1"

ARCHITECTURE_KEYS = FieldLists(
    used=names(
        "attention.head_count attention.head_count_kv attention.key_length attention.scale "
        "attention.layer_norm_rms_epsilon attention.sliding_window attention.value_length block_count "
        "context_length embedding_length embedding_length_out feed_forward_length rope.dimension_count "
        "rope.freq_base rope.scale_linear rope.scaling.attn_factor rope.scaling.factor "
        "rope.scaling.original_context_length rope.scaling.type rope.scaling.yarn_attn_factor "
        "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor vocab_size"
    ),
    harmless={
        "rope.scaling.finetuned": "says how the model was trained",
        "attention.layer_norm_epsilon": "of LayerNorm; the RMSNorm of these models has a key of its own",
        **_because(
            _NO_WINDOW,
            "attention.sliding_window_pattern attention.key_length_swa attention.value_length_swa "
            "rope.dimension_count_swa rope.freq_base_swa",
        ),
        **_because(
            "only with experts, which are refused",
            "expert_used_count expert_feed_forward_length expert_shared_feed_forward_length "
            "expert_chunk_feed_forward_length expert_weights_scale expert_weights_norm expert_gating_func "
            "expert_group_count expert_group_used_count expert_group_scale experts_per_group "
            "moe_latent_size moe_every_n_layers interleave_moe_layer_step",
        ),
        "decoder_start_token_id": "of models with an encoder",
        "attention.group_norm_epsilon": "only with groups, which are refused",
    },
    refused={
        **_only(
            (0,), "no soft cap", "attn_logit_softcapping final_logit_softcapping router_logit_softcapping"
        ),
        **_only((0,), "no clamp", "attention.clamp_kqv swiglu_clamp_exp swiglu_clamp_shexp"),
        **_only((0,), "rotary positions only", "attention.max_alibi_bias attention.relative_buckets_count"),
        "attention.causal": Only((True,), "causal attention"),
        **_only((0, 1), _NOT_BY_SCALE, "logit_scale embedding_scale residual_scale attention.output_scale"),
        **_only((0, 1), _NOT_BY_SCALE, "rope.scaling.alpha activation_sparsity_scale"),
        **_only(
            (0,), "attention without temperatures", "attention.temperature_length attention.temperature_scale"
        ),
        **_only((0,), "attn_factor and yarn_attn_factor in its place", "rope.scaling.yarn_log_multiplier"),
        **_only(([], [0, 0, 0, 0]), "one position per token", "rope.dimension_sections"),
        **_only((0,), _NO_EXPERTS, "expert_count expert_shared_count leading_dense_block_count"),
        **_only((0,), "models without layers that predict further tokens", "nextn_predict_layers"),
        "use_parallel_residual": Only((False,), "norm, attention, norm, MLP in turn"),
        "tensor_data_layout": Only(("reference", "Meta AI original pth"), "reference"),
        "pooling_type": Only((0,), "models that generate text, not embeddings"),
        **_only(
            (0,),
            "heads as in Llama",
            "attention.q_lora_rank attention.kv_lora_rank attention.decay_lora_rank "
            "attention.iclr_lora_rank attention.value_residual_mix_lora_rank attention.gate_lora_rank "
            "attention.key_length_mla attention.value_length_mla attention.indexer.head_count "
            "attention.indexer.key_length attention.indexer.top_k",
        ),
        **_only((0,), "layers that have their own K and V", "attention.shared_kv_layers"),
        **_only((0, 1), "attention in every layer", "full_attention_interval"),
        **_only((0,), "RMSNorm", "attention.group_norm_groups"),
        **_only(
            (0,),
            "decoders of the Llama family",
            "features_length decoder_block_count rescale_every_n_layers time_mix_extra_dim "
            "time_decay_extra_dim token_shift_count altup.active_idx altup.num_inputs n_deepstack_layers "
            "embedding_length_per_layer_input ssm.* kda.* wkv.* posnet.* convnext.* shortconv.* *_feat_in "
            "*_feat_out",
        ),
        "swin_norm": Only((False,), "norms before attention and MLP"),
        "classifier.output_labels": Only(([],), "models that generate text"),
    },
)

OTHER_KEYS = FieldLists(
    used=names(
        "general.architecture general.alignment split.no split.count split.tensors.count "
        "tokenizer.ggml.tokens tokenizer.ggml.eos_token_id tokenizer.ggml.eot_token_id "
        "tokenizer.ggml.eom_token_id"
    ),
    harmless={
        **_because(
            "says who made the model, from what, or what it is called",
            "general.name general.author general.version general.organization general.finetune "
            "general.basename general.description general.quantized_by general.size_label general.license "
            "general.license.* general.url general.doi general.uuid general.repo_url general.source.* "
            "general.base_model.* general.dataset.* general.datasets general.tags general.languages",
        ),
        "general.file_type": "each tensor says how it is stored",
        "quantize.*": "says how the file was quantised",
        "general.sampling.*": "suggests how to sample; requests say how to",
        "tokenizer.*": "read by the router",
    },
    refused={
        "general.type": Only(("model",), "model"),
        "general.quantization_version": Only((2,), "2"),
        **_only((), "models, not adapters to one", "adapter.*"),
        **_only((), "models, not importance matrices", "imatrix.*"),
        **_only((), "models of text alone", "clip.*"),
        **_only((), "decoders of the Llama family", "diffusion.* xielu.*"),
    },
)
