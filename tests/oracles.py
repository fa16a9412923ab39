"""Torch references for tests: state dicts of diffusers models under the names and layouts of our parameters."""

import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

_UNET_RULES = [
    (r"^(down|up)_blocks\.(\d+)\.", r"\1_\2/"),
    (r"^mid_block\.", "mid/"),
    (r"resnets\.(\d+)\.", r"res_\1/"),
    (r"attentions\.(\d+)\.", r"attn_\1/"),
    (r"(down|up)samplers\.0\.(conv\.)?", r"\1sample."),
    (r"^time_embedding\.", "time/"),
    (r"^conv_norm_out", "norm_out"),
    (r"(res_\d+/)(norm|conv)(\d)", r"\1\2_\3"),
    (r"time_emb_proj", "time"),
    (r"conv_shortcut", "skip"),
    (r"transformer_blocks\.0\.", ""),
    (r"attn1\.to_", "self/"),
    (r"attn2\.to_", "prompt/"),
    (r"out\.0\.", "out."),
    (r"/norm1", "/self_norm"),
    (r"/norm2", "/prompt_norm"),
    (r"/norm3", "/ff_norm"),
    (r"ff\.net\.0\.proj", "ff/proj"),
    (r"ff\.net\.2", "ff/out"),
]
_TEXT_RULES = [(r"^conv_(in|out)", r"linear_\1"), (r"(res_\d+)/conv_", r"\1/fc_")]


def _leaf(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """weight -> kernel or scale, Linear (o, i) -> (i, o), 1x1 convolution -> Dense, 3x3 OIHW -> HWIO."""
    stem, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return f"{stem}/bias", tensor
    if tensor.ndim == 1:
        return f"{stem}/scale", tensor
    if tensor.ndim == 4 and tensor.shape[2:] != (1, 1):
        return f"{stem}/kernel", tensor.permute(2, 3, 1, 0)
    return f"{stem}/kernel", tensor.reshape(tensor.shape[:2]).T


def _renamed(tensors: dict[str, torch.Tensor], rules: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    out = {}
    for key, tensor in tensors.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        name, tensor = _leaf(name, tensor)
        assert name not in out, f"{key} and another tensor both give {name}"
        out[name] = tensor
    return out


def unet_params(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' UNet2DConditionModel -> flat names of `UNet`."""
    return _renamed(state_dict, _UNET_RULES)


def text_unet_params(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' UNetFlatConditionModel -> flat names of `TextUNet`."""
    return _renamed(state_dict, _UNET_RULES + _TEXT_RULES)


def shapes(tree) -> dict[str, tuple[int, ...]]:
    """Flat name -> shape, of flax variables ({"params": ...}) or of a flat dict of torch tensors."""
    flat = flatten_dict(tree["params"], sep="/") if "params" in tree else tree
    return {name: tuple(leaf.shape) for name, leaf in flat.items()}


def variables(flat: dict[str, torch.Tensor]) -> dict:
    """What `apply` takes; empties `flat`, so that of a large model only one tensor is there twice."""
    gc.collect()
    return {"params": nested({name: jnp.asarray(flat.pop(name).detach().numpy()) for name in list(flat)})}


def nested(flat: dict) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}."""
    return unflatten_dict(flat, sep="/")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of every parameter, under torch's names."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def scramble(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter off its initial value: a norm's scale of 1 or a bias of 0 hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim == 1 else 0.02))
    return model.eval()


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Seeded values everywhere, so that no bias is zero and no norm the identity, and activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            table = re.search(r"embeddings|wte|wpe", name)
            std = 0.1 if p.ndim == 1 else 0.5 if table else p[0].numel() ** -0.5
            p.normal_(0, std, generator=generator)
            if p.ndim == 1 and name.endswith("weight"):  # of a norm
                p += 1
    return model.eval()


def at_both_sizes(tiny, full, seeds: int = 2):
    """Run a test with `size, seed` as tiny, 0 and, marked `full`, with the published size and several seeds."""
    large = (pytest.param(full, seed, marks=pytest.mark.full, id=f"full-{seed}") for seed in range(seeds))
    return pytest.mark.parametrize("size, seed", [pytest.param(tiny, 0, id="tiny"), *large])


def random_variables(module, *args, seed: int = 0, **kwargs) -> dict:
    """Parameters of one of our modules at random, without compiling its `init`."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25
        return jnp.asarray(rng.normal(scale=fan_in**-0.5, size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs))


def fast_jit(function):
    """jit for tests, where compiling takes far longer than running."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def relative_error(ours, theirs) -> float:
    """|ours - theirs| / |theirs|, Euclidean norms."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
