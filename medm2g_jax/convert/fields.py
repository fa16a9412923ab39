"""What the config.json files beside published weights say, field by field: taken, equal to ours, or refused by name.

Weights of one shape are many networks: another activation, epsilon, number of heads, noise schedule or latent scale
changes no tensor. So each field that diffusers' and transformers' classes know stands in a table here:

    fixed    our network computes one thing; a value that means another is refused
    taken    goes into convert.json, and back out with `export`
    told     the tensors tell it as well; a file that says otherwise is refused
    free     changes nothing of what a network computes: training, caches, names, how somebody sampled

A field that is absent has the library's default, which stands in the tables too. A field that no table has is said.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medm2g_jax.convert.files import read_json
from medm2g_jax.errors import UserError


class Fields(NamedTuple):
    """One class of config.

    fixed: field -> (the library's default, values that mean what our network computes).
    taken: field -> the library's default.
    """

    library: str
    fixed: Mapping[str, tuple[Any, tuple[Any, ...]]]
    taken: Mapping[str, Any]
    told: tuple[str, ...]
    free: tuple[str, ...]


def _only(*values: Any) -> tuple[Any, tuple[Any, ...]]:
    """The library's default is ours; the others mean the same."""
    return values[0], values


_SIZES = ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "in_channels", "out_channels")
UNET = Fields(
    "UNet2DConditionModel",
    dict(
        act_fn=_only("silu", "swish"),
        addition_embed_type=_only(None),
        addition_time_embed_dim=_only(None),
        attention_type=_only("default"),
        center_input_sample=_only(False),
        class_embed_type=_only(None),
        class_embeddings_concat=_only(False),
        conv_in_kernel=_only(3),
        conv_out_kernel=_only(3),
        cross_attention_norm=_only(None),
        downsample_padding=_only(1),
        dual_cross_attention=_only(False),
        encoder_hid_dim=_only(None),
        encoder_hid_dim_type=_only(None),
        flip_sin_to_cos=_only(True),
        freq_shift=_only(0),
        mid_block_only_cross_attention=_only(None, False),
        mid_block_scale_factor=_only(1),
        mid_block_type=_only("UNetMidBlock2DCrossAttn", "UNetMidBlockFlatCrossAttn"),
        norm_eps=_only(1e-5),
        num_class_embeds=_only(None),
        only_cross_attention=_only(False),
        projection_class_embeddings_input_dim=_only(None),
        resnet_out_scale_factor=_only(1.0),
        resnet_skip_time_act=_only(False),
        resnet_time_scale_shift=_only("default"),
        reverse_transformer_layers_per_block=_only(None, 1),
        time_cond_proj_dim=_only(None),
        time_embedding_act_fn=_only(None),
        time_embedding_type=_only("positional"),
        timestep_post_act=_only(None),
        transformer_layers_per_block=_only(1),
        use_linear_projection=_only(False),
    ),
    # attention_head_dim is the number of heads: diffusers keeps the name for the sake of old files.
    dict(attention_head_dim=8, num_attention_heads=None, norm_num_groups=32, sample_size=None),
    (*_SIZES, "cross_attention_dim", "time_embedding_dim"),
    ("addition_embed_type_num_heads", "dropout", "upcast_attention"),
)
VAE = Fields(
    "AutoencoderKL",
    dict(
        act_fn=_only("silu", "swish"),
        latents_mean=_only(None),
        latents_std=_only(None),
        mid_block_add_attention=_only(True),
        shift_factor=_only(None, 0),
        use_post_quant_conv=_only(True),
        use_quant_conv=_only(True),
    ),
    dict(norm_num_groups=32, scaling_factor=0.18215),
    (*_SIZES, "latent_channels"),
    ("force_upcast", "sample_size"),
)

# --- schedulers: the process that a network was trained for, and how somebody sampled it -----------------------------

# Classes of diffusers that sample the process of Eq. 1-2, and where their defaults differ from most.
_KARRAS, _LCM = dict(beta_start=0.00085, beta_end=0.012), dict(beta_start=0.00085, beta_end=0.012)
_LCM["beta_schedule"] = "scaled_linear"
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMInverseScheduler": {},
    "DDIMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSDEScheduler": _KARRAS,
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": _KARRAS,
    "LCMScheduler": _LCM,
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": _LCM,
    "UniPCMultistepScheduler": {},
}
SCHEDULER = Fields(
    "DDIMScheduler",
    dict(
        beta_end=(0.02, (0.012,)),
        beta_schedule=("linear", ("scaled_linear",)),  # linear in sqrt(beta)
        beta_start=(0.0001, (0.00085,)),
        # DDIM's and DDPM's own default is True, for pixels; StableDiffusionPipeline switches it off.
        clip_sample=_only(False),
        num_train_timesteps=_only(1000),
        prediction_type=_only("epsilon"),
        rescale_betas_zero_snr=_only(False),
        thresholding=_only(False),
        timestep_type=_only("discrete"),
        trained_betas=_only(None),
        use_flow_sigmas=_only(False),
    ),
    {},
    (),
    (
        *("algorithm_type", "clip_sample_range", "corrector_order", "disable_corrector", "dynamic_thresholding_ratio"),
        *("euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type", "kwargs", "lambda_min_clipped"),
        *("lower_order_final", "noise_sampler_seed", "original_inference_steps", "predict_x0", "predictor_order"),
        *("sample_max_value", "set_alpha_to_one", "shift_terminal", "sigma_max", "sigma_min", "skip_prk_steps"),
        *("solver_order", "solver_p", "solver_type", "steps_offset", "tau_func", "time_shift_type", "timestep_scaling"),
        *("timestep_spacing", "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_lu_lambdas"),
        *("use_karras_sigmas", "variance_type"),
    ),
)

# --- transformers ---------------------------------------------------------------------------------------------------

# Of every config; the second half are defaults of generation that older versions wrote into each file.
_ANY = (
    *("architectures", "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "dtype", "finetuning_task"),
    *("gradient_checkpointing", "id2label", "initializer_factor", "initializer_range", "is_encoder_decoder"),
    *("label2id", "model_type", "num_labels", "output_attentions", "output_hidden_states", "output_past", "prefix"),
    *("problem_type", "return_dict", "sep_token_id", "task_specific_params", "tie_encoder_decoder", "use_cache"),
    *("tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16"),
    *("bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size", "decoder_start_token_id", "do_sample"),
    *("diversity_penalty", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty"),
    *("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length", "num_beams"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_return_sequences", "output_scores", "remove_invalid_values"),
    *("pruned_heads", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature"),
    *("tf_legacy_loss", "top_k", "top_p", "typical_p", "xla_device"),
)
_DECODES = dict(add_cross_attention=_only(False), is_decoder=_only(False))
_TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers")
CLIP = Fields(
    "CLIPConfig",
    {},
    {},
    ("projection_dim",),
    (*_ANY, "logit_scale_init_value", "text_config", "text_config_dict", "vision_config", "vision_config_dict"),
)
CLIP_TEXT = Fields(
    "CLIPTextConfig",
    dict(hidden_act=_only("quick_gelu"), layer_norm_eps=_only(1e-5), **_DECODES),
    dict(num_attention_heads=8),
    (*_TOWER, "max_position_embeddings", "vocab_size", "eos_token_id"),
    # A tower's own projection_dim is not read: the model's is.
    (*_ANY, "attention_dropout", "dropout", "pad_token_id", "projection_dim"),
)
CLIP_VISION = Fields(
    "CLIPVisionConfig",
    dict(hidden_act=_only("quick_gelu"), layer_norm_eps=_only(1e-5), num_channels=_only(3), **_DECODES),
    dict(num_attention_heads=12),
    (*_TOWER, "image_size", "patch_size"),
    (*_ANY, "attention_dropout", "dropout", "eos_token_id", "pad_token_id", "projection_dim"),
)
BERT = Fields(
    "BertConfig",
    dict(
        hidden_act=_only("gelu", "gelu_python"),
        layer_norm_eps=_only(1e-12),
        pad_token_id=_only(0),
        position_embedding_type=_only("absolute"),
        type_vocab_size=_only(2),
        **_DECODES,
    ),
    dict(num_attention_heads=12),
    (*_TOWER, "max_position_embeddings", "vocab_size"),
    (
        *_ANY,
        *(
            "attention_probs_dropout_prob",
            "classifier_dropout",
            "directionality",
            "eos_token_id",
            "hidden_dropout_prob",
        ),
        *(
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        ),
    ),
)
GPT2 = Fields(
    "GPT2Config",
    dict(
        activation_function=_only("gelu_new", "gelu_pytorch_tanh"),
        add_cross_attention=_only(False),
        layer_norm_epsilon=_only(1e-5),
        scale_attn_by_inverse_layer_idx=_only(False),
        scale_attn_weights=_only(True),
    ),
    dict(n_head=12),
    # The last four are transformers' other names of the first.
    (
        *("n_embd", "n_inner", "n_layer", "n_positions", "n_ctx", "vocab_size"),
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    ),
    (
        *_ANY,
        *("attn_pdrop", "embd_pdrop", "eos_token_id", "is_decoder", "pad_token_id", "reorder_and_upcast_attn"),
        *("resid_pdrop", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
        *("summary_use_proj",),
    ),
)

# --- reading --------------------------------------------------------------------------------------------------------


def read(config: Mapping[str, Any], fields: Fields, what: str, notes: list[str]) -> dict[str, Any]:
    """What is taken from a config, with the library's defaults where it is silent.

    Args:
      what: said in errors: the file, and the part of it.
      notes: gets a line on fields that no table has.

    Raises:
      UserError: a field says what our network does not compute; names it.
    """
    for field, (default, ours) in fields.fixed.items():
        value = config[field] if field in config else default
        if not any(_same(value, good) for good in ours):
            silent = "" if field in config else f", {fields.library}'s default,"
            raise UserError(
                f"{what}: {field} {value!r}{silent}, expected {ours[0]!r}: another network or noise schedule than "
                "ours; bring weights that were trained with it"
            )
    known = {*fields.fixed, *fields.taken, *fields.told, *fields.free}
    others = {k: v for k, v in config.items() if k not in known and not k.startswith("_") and v not in (None, False)}
    if others:
        shown = ", ".join(f"{k}={_short(v)}" for k, v in others.items())
        notes.append(f"{what}: {shown}: no field of {fields.library} that we know; not taken")
    return {field: config[field] if field in config else default for field, default in fields.taken.items()}


def compare(config: Mapping[str, Any], told: Mapping[str, Sequence[Any]], what: str) -> None:
    """Does a config say what the tensors beside it say?

    Args:
      told: field -> the values that fit them. Fields that are absent or null are the tensors' to tell.

    Raises:
      UserError: it does not; names the field.
    """
    for field, good in told.items():
        value = config[field] if field in config else None
        if value is not None and not any(_same(value, g) for g in good):
            fits = " or ".join(repr(_plain(g)) for g in good)
            raise UserError(f"{what}: {field} {_short(value)}, where the tensors beside it say {fits}; not one model")


def count(taken: Mapping[str, Any], field: str, what: str, width: int | None = None) -> int:
    """A number of heads or groups among what was taken, which divides the width.

    Raises:
      UserError: no such number, one that differs by level (Stable Diffusion 2.x), or one that does not divide.
    """
    value = taken[field]
    if isinstance(value, list) and len({repr(v) for v in value}) > 1:
        raise UserError(f"{what}: {field} {value} differs by level: a Stable Diffusion 2.x model; expected 1.5")
    value = value[0] if isinstance(value, list) and value else value
    if type(value) is not int or value < 1:
        raise UserError(f"{what}: {field} {value!r}, expected a whole number above 0")
    if width is not None and width % value:
        raise UserError(f"{what}: {field} {value} does not divide {width}, the width of the tensors beside it")
    return value


def scheduler(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """The config of a folder's scheduler, which is that of Stable Diffusion 1.5; None where there is none.

    Raises:
      UserError: the weights were trained for another process; names the field.
    """
    if not path.is_file():
        notes.append(f"{path}: not there; Stable Diffusion 1.5's noise schedule is assumed")
        return None
    config = read_json(path)
    kind = config["_class_name"] if "_class_name" in config else SCHEDULER.library
    if kind not in SCHEDULERS:
        raise UserError(
            f"{path}: _class_name {kind!r}: another process than Stable Diffusion 1.5's; expected one of its samplers, "
            f"as {SCHEDULER.library}"
        )
    read({**SCHEDULERS[kind], **config}, SCHEDULER, str(path), notes)
    other = [
        f"{field} {config[field]!r}"
        for field, ours in (("timestep_spacing", "leading"), ("steps_offset", 1))
        if field in config and config[field] != ours
    ]
    if other:
        notes.append(f"{path}: {', '.join(other)}: kept for exports; here config.sample says how to sample")
    return config


def _same(value: Any, other: Any) -> bool:
    value, other = _plain(value), _plain(other)
    if isinstance(value, list) and value and not isinstance(other, list) and all(v == value[0] for v in value):
        value = value[0]  # the same at each level
    numbers = [type(v) in (int, float) for v in (value, other)]
    if all(numbers):
        return math.isclose(value, other, rel_tol=1e-6)
    return type(value) is type(other) and value == other


def _plain(x: Any) -> Any:
    return [_plain(v) for v in x] if isinstance(x, (list, tuple)) else x


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
