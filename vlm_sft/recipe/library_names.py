"""What is known of the arguments of the libraries' classes that a recipe's mappings are handed to: lists of names.

A name that stands on no list is refused, whoever wrote it: libraries grow, and some of their arguments import a module,
open a file or ask a server. `tests/recipe/test_library_names.py` counts the arguments of the installed versions against
these lists, so that a new one is judged before it can be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

# Values that say the same as nothing: what is off, and two defaults.
UNSAID: tuple[Any, ...] = (None, False, "", [], {}, "nll", "keep_start")


@dataclass(frozen=True)
class Takes:
    """What a setting may be.

    Attributes:
        words: How messages say it.
        type: The same for pydantic, which checks it strictly.
    """

    words: str
    type: Any


@dataclass(frozen=True)
class PassedOn:
    """The arguments of one library's class.

    Attributes:
        library: How messages call the class.
        plain: Numbers, switches and words.
        mappings: The same in a mapping: name → the keys that it may have; None: names of modules, and their numbers.
        own: Names that say where a file, a server or a piece of code is: name → what it says. Only the user's own
            recipe, or an override that the user typed, may have them.
        never: Name → why no recipe has it.
        ours: Names that we read ourselves; the library never sees them.
        types: What their values may be, where the library does not look itself; of a mapping's under `name.key`.
    """

    library: str
    plain: frozenset[str]
    mappings: Mapping[str, frozenset[str] | None] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=dict)
    never: Mapping[str, str] = field(default_factory=dict)
    ours: frozenset[str] = frozenset()
    types: Mapping[str, Takes] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Every name that was judged."""
        return {*self.plain, *self.mappings, *self.own, *self.never}


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_SHARED = "what the processes share out is told to `accelerate launch --config_file`, as in accelerate_configs/"
_PLAIN_LOSS = "the loss is the plain cross entropy of the answers"
_ANSWERS = "the loss is already on the answers only, as the chat template's generation markers say"
_ROUNDED = "an evaluation after the training would round the trained weights before they are saved"

SFT = PassedOn(
    "trl.SFTConfig",
    _words(
        "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type",
        "warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules",
        "gradient_accumulation_steps average_tokens_across_devices max_grad_norm bf16 fp16 tf32",
        "activation_checkpointing gradient_checkpointing torch_compile torch_compile_mode use_liger_kernel",
        "use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy",
        "logging_steps logging_first_step log_on_each_node logging_nan_inf_filter",
        "include_num_input_tokens_seen log_level log_level_replica disable_tqdm run_name project",
        "eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start",
        "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics",
        "batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit",
        "enable_jit_checkpoint load_best_model_at_end metric_for_best_model greater_is_better",
        "ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu",
        "dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers",
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order label_names",
        "train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb",
        "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug skip_memory_metrics do_train",
        "do_eval do_predict local_rank dataset_text_field dataset_num_proc eos_token max_length",
        "shuffle_dataset packing packing_strategy pad_to_multiple_of eval_packing activation_offloading pad_token",
    ),
    mappings={
        "lr_scheduler_kwargs": None,
        "activation_checkpointing_kwargs": _words("use_reentrant preserve_rng_state determinism_check debug"),
        "gradient_checkpointing_kwargs": _words("use_reentrant preserve_rng_state determinism_check debug"),
        "liger_kernel_config": None,
    },
    own={
        "report_to": "a server",
        "trackio_space_id": "a server",
        "trackio_bucket_id": "a server",
        "trackio_static_space_id": "a server",
        "hub_private_repo": "a place on the Hub",
        "hub_model_id": "a place on the Hub",
        "hub_strategy": "a place on the Hub",
        "hub_always_push": "a place on the Hub",
        "hub_revision": "a place on the Hub",
        "resume_from_checkpoint": "a folder",
        "accelerator_config": "a file",
        "fsdp_config": "a file",
        "torch_compile_backend": "code",
    },
    never={
        "padding_free": "rows that follow each other without padding are packs; write `packing: true`",
        "assistant_only_loss": _ANSWERS,
        "completion_only_loss": _ANSWERS,
        "label_smoothing_factor": _PLAIN_LOSS,
        "loss_type": _PLAIN_LOSS,
        "router_aux_loss_coef": _PLAIN_LOSS,
        "truncation_mode": "a row that is too long loses whole turns from its end",
        "bf16_full_eval": _ROUNDED,
        "fp16_full_eval": _ROUNDED,
        "chat_template_path": "the template is the recipe's own key `chat_template`",
        "model_init_kwargs": "how the parts are loaded is said in `stack`",
        "trust_remote_code": "code that a piece brings is allowed at that piece, in `stack`",
        "dataset_kwargs": "rows are read by the sources in `data`",
        "push_to_hub": "the bundle is pushed by the recipe's own key `hub`",
        "hub_token": "a token does not belong in a file that is saved and shared; set HF_TOKEN, or run `hf auth login`",
        "remove_unused_columns": "the collator needs the columns `messages` and `images`",
        "fsdp": _SHARED,
        "deepspeed": _SHARED,
        "parallelism_config": _SHARED,
    },
)

# What `sft.report_to` may name in anyone's recipe: nothing here asks a server.
HERE = {None, "none", "tensorboard"}

_OTHER_START = "it starts from weights that a bundle does not hold"
LORA = PassedOn(
    "peft.LoraConfig",
    _words(
        "task_type peft_type peft_version inference_mode r target_modules target_parameters exclude_modules lora_alpha",
        "lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform",
        "layers_pattern use_dora alora_invocation_tokens use_qalora qalora_group_size",
        "lora_bias ensure_weight_tying",
    ),
    mappings={
        "rank_pattern": None,
        "alpha_pattern": None,
        "trainable_token_indices": None,
        "runtime_config": _words("ephemeral_gpu_offload"),
        "velora_config": _words("num_groups scale init_type"),
        "monteclora_config": _words("num_samples use_entropy dirichlet_prior sample_scaler kl_loss_weight buffer_size"),
        "use_bdlora": _words("target_modules_bd_a target_modules_bd_b nblocks match_strict"),
        "kasa_config": _words("beta gamma"),
    },
    own={"base_model_name_or_path": "a folder or a place on the Hub", "revision": "a place on the Hub"},
    never={
        "auto_mapping": "it names a module to import",
        "megatron_config": "it names a module to import",
        "megatron_core": "it names a module to import",
        "arrow_config": "it names other adapters, which a bundle does not hold",
        "corda_config": _OTHER_START,
        "eva_config": _OTHER_START,
        "loftq_config": _OTHER_START,
        "lora_ga_config": _OTHER_START,
        "layer_replication": "it makes another language model, of which a bundle knows no piece",
    },
    ours=frozenset({"add_tokens"}),
)
# PEFT's default, which names the module that it would import if `megatron_config` were there.
DEFAULTS = {"megatron_core": "megatron.core"}

QUANTIZATION = PassedOn(
    "transformers.BitsAndBytesConfig",
    _words(
        "load_in_4bit load_in_8bit bnb_4bit_quant_type bnb_4bit_compute_dtype bnb_4bit_use_double_quant",
        "bnb_4bit_quant_storage llm_int8_threshold llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
    ),
)

# What `generate` may be told. It looks at few values itself, and at most of them when the model is in memory already;
# some would make it take any amount of memory (an n-gram is as many lists), others end in NaN or in an overflow.
# How many tokens and beams there may be is one of the limits, see `passed_on.flaw_of_answers`.
_LARGEST = 2**31 - 1
_Id = Annotated[int, Field(ge=0, le=_LARGEST)]
_OwnId = Annotated[int, Field(ge=-1, le=_LARGEST)]  # -1: a published file that knows none
_ANY_ROW = Strict(False)  # a tuple is as good as a list
_Ids = Annotated[list[_Id], _ANY_ROW]
_SomeIds = Annotated[_Ids, Field(min_length=1)]


def _whole(least: int, most: int = _LARGEST) -> Takes:
    words = f"a whole number from {least}" + (f" to {most}" if most != _LARGEST else "")
    return Takes(words, Annotated[int, Field(ge=least, le=most)])


def _number(least: float, most: float) -> Takes:
    words = f"a number from {least:g} to {most:,g}"
    return Takes(words, Annotated[float, Field(ge=least, le=most, allow_inf_nan=False)])


_Word = Annotated[str, Field(min_length=1)]
_Bias = Annotated[tuple[_SomeIds, Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]], _ANY_ROW]
_SWITCH = Takes("true or false", bool)
_IDS = Takes("a list of ids of tokens", _Ids)
_ID_OR_IDS = Takes("an id of a token, or a list of them", _OwnId | Annotated[list[_OwnId], _ANY_ROW])
_PENALTY = _number(0.01, 100)
_ANSWER: dict[str, Takes] = {
    **dict.fromkeys(_words("max_new_tokens max_length max_cache_len num_beams prefill_chunk_size"), _whole(1)),
    **dict.fromkeys(_words("prompt_lookup_num_tokens max_matching_ngram_size"), _whole(1)),
    **dict.fromkeys(_words("min_length min_new_tokens top_k"), _whole(0)),
    **dict.fromkeys(_words("no_repeat_ngram_size encoder_no_repeat_ngram_size"), _whole(0)),
    **dict.fromkeys(_words("do_sample use_cache renormalize_logits remove_invalid_values"), _SWITCH),
    "disable_compile": _SWITCH,
    **dict.fromkeys(_words("top_p min_p epsilon_cutoff eta_cutoff"), _number(0, 1)),
    **dict.fromkeys(_words("top_h typical_p"), _number(0.001, 1)),
    **dict.fromkeys(_words("repetition_penalty encoder_repetition_penalty"), _PENALTY),
    **dict.fromkeys(_words("suppress_tokens begin_suppress_tokens"), _IDS),
    **dict.fromkeys(_words("pad_token_id bos_token_id eos_token_id decoder_start_token_id"), _ID_OR_IDS),
    "forced_bos_token_id": Takes("an id of a token", _Id),
    "forced_eos_token_id": Takes("an id of a token, or a list of them", _Id | _SomeIds),
    "temperature": Takes("0, or a number from 0.000001 to 1,000,000", Literal[0] | _number(1e-6, 1e6).type),
    "guidance_scale": _number(1, 100),
    "length_penalty": _number(-10, 10),
    "max_time": _number(1e-6, 1e9),
    "num_return_sequences": Takes("1: every question gets one answer", _whole(1, 1).type),
    "early_stopping": Takes("true, false or never", bool | Literal["never"]),
    "cache_implementation": Takes(
        "dynamic, static, offloaded, offloaded_static or quantized",
        Literal["dynamic", "static", "offloaded", "offloaded_static", "quantized"]
        | Literal["sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"],
    ),
    "stop_strings": Takes("a text or a list of texts, none of them empty", _Word | Annotated[list[_Word], _ANY_ROW]),
    "bad_words_ids": Takes(
        "a list of lists of ids of tokens", Annotated[list[_SomeIds], _ANY_ROW, Field(min_length=1)]
    ),
    "sequence_bias": Takes(
        "a list of pairs, each a list of ids of tokens and a number from -1,000 to 1,000",
        Annotated[list[_Bias], _ANY_ROW, Field(min_length=1)],
    ),
    "exponential_decay_length_penalty": Takes(
        "a whole number from 0 and a number from 0.01 to 10",
        Annotated[tuple[_Id, Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)]], _ANY_ROW],
    ),
    "cache_config.backend": Takes("quanto or hqq", Literal["quanto", "hqq"]),
    "cache_config.nbits": _whole(1, 8),
    "cache_config.axis_key": _whole(-1, 1),
    "cache_config.axis_value": _whole(-1, 1),
    "cache_config.q_group_size": _whole(1, 4096),
    "cache_config.residual_length": _whole(1, 2**20),
    "watermarking_config.greenlist_ratio": _number(0.001, 0.999),
    "watermarking_config.bias": _number(-1000, 1000),
    "watermarking_config.hashing_key": _whole(0),
    "watermarking_config.seeding_scheme": Takes("lefthash or selfhash", Literal["lefthash", "selfhash"]),
    "watermarking_config.context_width": _whole(1, 1000),
}

_MOVED = "transformers fetches the code for it from the Hub"
_TEXT_ALONE = "an answer is text alone"
_ONE_MODEL = "one model writes an answer"
GENERATION = PassedOn(
    "transformers.GenerationConfig",
    frozenset(name for name in _ANSWER if "." not in name),
    types=_ANSWER | dict.fromkeys(("cache_config", "watermarking_config"), Takes("a mapping of its settings", dict)),
    mappings={
        "cache_config": _words("backend nbits axis_key axis_value q_group_size residual_length"),
        "watermarking_config": _words("greenlist_ratio bias hashing_key seeding_scheme context_width"),
    },
    never={
        **dict.fromkeys(_words("low_memory penalty_alpha dola_layers diversity_penalty num_beam_groups"), _MOVED),
        **dict.fromkeys(_words("constraints force_words_ids"), _MOVED),
        **dict.fromkeys(_words("output_attentions output_hidden_states output_scores output_logits"), _TEXT_ALONE),
        "return_dict_in_generate": _TEXT_ALONE,
        **dict.fromkeys(_words("is_assistant num_assistant_tokens num_assistant_tokens_schedule"), _ONE_MODEL),
        **dict.fromkeys(_words("assistant_confidence_threshold assistant_early_exit assistant_lookbehind"), _ONE_MODEL),
        **dict.fromkeys(_words("target_lookbehind assistant_ensemble_weight use_mtp speculation_type"), _ONE_MODEL),
        "token_healing": "it writes the end of the prompt anew, of which the images are a part",
        "compile_config": "it names code that compiles",
        "continuous_batching_config": "it belongs to a server",
        "transformers_version": "it is written by transformers",
        "_from_model_config": "it is written by transformers",
    },
)

_COUNTED = "the model itself is made for so many tokens of an image"

PROCESSOR = PassedOn(
    "a processor of transformers",
    _words(
        "crop_size default_to_square do_center_crop do_convert_rgb do_normalize do_pad do_rescale do_resize",
        "image_mean image_seq_length image_seq_len image_std pad_size resample rescale_factor size",
        "image_grid_pinpoints max_pixels min_pixels merge_size patch_size temporal_patch_size",
        "do_image_splitting max_image_size return_row_col_info crop_to_patches min_patches max_patches",
        "do_pan_and_scan pan_and_scan_max_num_crops pan_and_scan_min_crop_size",
        "pan_and_scan_min_ratio_to_activate padding_mode padding_value vision_feature_select_strategy",
        "num_additional_image_tokens image_token num_patch_index_tokens num_image_tokens vision_aspect_ratio",
        "video_token min_size high_res_resample high_res_image_mean high_res_image_std use_covering_area_grid",
        "max_soft_tokens pooling_kernel_size audio_seq_length audio_ms_per_token img_size downsample_factor",
        "start_of_img_token end_of_img_token img_patch_token img_line_break_token tile_token tile_global_token",
        "background_color max_slice_nums min_image_size scale_resolution slice_mode split_image tile_size fine_route",
        "dense_max_aspect dense_max_patches dense_max_scale dense_min_aspect max_image_tiles",
        "fake_image_token start_of_image_token end_of_image_token patch_token tile_x_separator_token",
        "tile_y_separator_token pixel_shuffle_ratio pooling_ratio image_use_col_tokens video_use_col_tokens",
        "use_frame_special_tokens use_single_crop_col_tokens use_single_crop_start_token",
    )
    - (_SIZES := _words("size crop_size pad_size max_image_size patch_size high_res_size")),
    mappings=dict.fromkeys(_SIZES, _words("height width shortest_edge longest_edge max_height max_width")),
    never={
        "use_default_system_prompt": "the template writes the system text",
        "use_image_id": "the template numbers the images",
        "return_legacy_image_output": "pictures have one name here",
        **dict.fromkeys(_words("cat_extra_token downsample_mode downsample_rate downsample_ratio"), _COUNTED),
        **dict.fromkeys(_words("size_conversion spatial_merge_size split_resolutions"), _COUNTED),
    },
)

PASSED_ON: dict[str, PassedOn] = {
    "sft": SFT,
    "lora": LORA,
    "quantization": QUANTIZATION,
    "generation": GENERATION,
    "model.processor": PROCESSOR,
}
