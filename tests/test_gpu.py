"""What only a CUDA GPU can show: the fused kernels against torch's attention in float64.

    MEDM2G_TEST_PLATFORM=cuda python -m pytest -n 0 -s -m gpu

The networks against torch's are meant to run there too, with `-m full` and the files named (tests/test_unet.py); not
done yet.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch

from medm2g_jax.nn.attention import attend, concat, context

pytestmark = pytest.mark.gpu
KERNEL = "__cudnn$fmha"

# queries, keys of each source, heads, head dim, causal, fused: Stable Diffusion's sites, CLIP-L's, GPT-2's.
SITES = {
    "self 64x64": (4096, (4096,), 8, 40, False, True),
    "self 32x32": (1024, (1024,), 8, 80, False, True),
    "self 16x16": (256, (256,), 8, 160, False, False),
    "prompt": (1024, (77,), 8, 80, False, True),
    "prompts": (1024, (77, 257), 8, 80, False, True),
    "guides": (4096, (4, 256), 8, 40, False, True),
    "CLIP text": (77, (77,), 12, 64, True, True),
    "CLIP image": (257, (257,), 16, 64, False, True),
    "GPT-2": (193, (193,), 12, 64, True, True),
}


@pytest.fixture(autouse=True, scope="module")
def _gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no CUDA GPU")


@pytest.mark.parametrize("site", SITES)
def test_attention_and_its_gradients_equal_torch(site):
    n, sources, heads, e, causal, fused = SITES[site]
    rng = np.random.default_rng(0)
    m = sum(sources)
    q, k, v, up = (jnp.asarray(rng.normal(size=(2, length, heads, e)), jnp.bfloat16) for length in (n, m, m, n))
    biased = None if causal else concat([context(jnp.zeros((2, some, 1))) for some in sources]).bias

    def ours(q, k, v):
        out = attend(q, k, v, biased, causal)
        return jnp.sum(out.astype(jnp.float32) * up), out

    run = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True)).lower(q, k, v).compile()
    assert (KERNEL in run.as_text()) == fused
    (_, out), grads = run(q, k, v)

    theirs = [torch.tensor(np.asarray(x, np.float64)).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    mask = None if biased is None else torch.tensor(np.asarray(biased, np.float64))[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(*theirs, attn_mask=mask, is_causal=causal)
    (expected * torch.tensor(np.asarray(up, np.float64)).transpose(1, 2)).sum().backward()
    pairs = zip((out, *grads), (expected, *(x.grad for x in theirs)), strict=True)
    errors = [oracles.relative_error(np.asarray(a, np.float64), b.transpose(1, 2)) for a, b in pairs]
    print(f"\n{site}: relative error of output, dq, dk, dv " + ", ".join(f"{error:.1e}" for error in errors))
    assert max(errors) < 2e-2
