"""Test only: torch state dicts of diffusers and transformers -> our parameters. Minimal; the two-way converter of the
package comes with medm2g_jax.convert."""

import re

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

IMAGE_VAE = [  # diffusers AutoencoderKL
    (r"(down|up)_blocks\.(\d)", r"\1_\2"),
    (r"mid_block", "mid"),
    (r"resnets\.(\d)", r"res_\1"),
    (r"(norm|conv)(\d)", r"\1_\2"),
    (r"conv_shortcut", "skip"),
    (r"(down|up)samplers\.0\.conv", r"\1sample"),
    (r"conv_norm_out", "norm_out"),
    (r"attentions\.0", "attn"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "out"),
    (r"to_([qkv])", r"\1"),
    (r"(post_)?quant_conv", r"\1quant"),
]
BERT = [  # transformers BertModel
    (r"(word|position|token_type)_embeddings", r"\1"),
    (r"embeddings\.LayerNorm", "embeddings.norm"),
    (r"encoder\.layer\.", "layer_"),
    (r"attention\.self\.([qkv])\w+", r"attn.\1"),
    (r"attention\.output\.dense", "attn.out"),
    (r"attention\.output\.LayerNorm", "attn_norm"),
    (r"intermediate\.dense", "fc_1"),
    (r"output\.dense", "fc_2"),
    (r"output\.LayerNorm", "ff_norm"),
    (r"pooler\.dense", "pooler"),
]
GPT2 = [(r"^transformer\.", ""), (r"^h\.", "h_")]  # transformers GPT2LMHeadModel
CLIP = [  # transformers CLIPTextModelWithProjection, CLIPVisionModelWithProjection
    (r"^(text|vision)_model\.", ""),
    (r"embeddings\.(token|position|patch)_embedding", r"\1"),
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"encoder\.layers\.", "layer_"),
    (r"self_attn\.([qkv])_proj", r"attn.\1"),
    (r"self_attn\.out_proj", "attn.out"),
    (r"layer_norm(\d)", r"norm_\1"),
    (r"mlp\.fc(\d)", r"fc_\1"),
    (r"final_layer_norm|post_layernorm", "norm"),
    (r"pre_layrnorm", "pre_norm"),
    (r"(text|visual)_projection", "projection"),
]
EMBEDDINGS = ("word", "position", "token_type", "token", "wte", "wpe")


def convert(state_dict, rules, conv1d=False):
    """Flat parameters: every substitution of `rules` on each name, then the layout: (out, in) -> (in, out) unless
    conv1d (GPT-2 stores in, out); OIHW -> HWIO, a 1x1 convolution to a Dense; weights of one axis are scales."""
    flat = {}
    for name, tensor in state_dict.items():
        if name.endswith(("position_ids", "lm_head.weight", ".attn.bias", "masked_bias")):
            continue  # buffers, and GPT-2's tied output layer
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        path, _, leaf = name.replace(".", "/").rpartition("/")
        value = tensor.detach().float().numpy()
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "embedding" if path.split("/")[-1] in EMBEDDINGS else "kernel"
        if leaf == "kernel" and value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
            value = value[0, 0] if value.shape[:2] == (1, 1) else value
        elif leaf == "kernel" and not conv1d:
            value = value.T
        flat[f"{path}/{leaf}" if path else leaf] = np.ascontiguousarray(value)
    return flat


def fill(module, flat, *args):
    """{"params": flat, nested}, after checking that these are exactly the names and shapes that module.init makes."""
    own = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *args)["params"], sep="/")
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in flat.items()}
    return {"params": unflatten_dict(flat, sep="/")}
