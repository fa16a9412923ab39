import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from medm2g_jax.errors import UserError
from medm2g_jax.nn.attention import context
from medm2g_jax.nn.clip import CLIPText, CLIPVision
from medm2g_jax.nn.context import ImageContext
from medm2g_jax.nn.image_vae import ImageVAE
from medm2g_jax.nn.text_unet import TextUNet
from medm2g_jax.nn.text_vae import TextVAE
from medm2g_jax.nn.unet import UNet
from medm2g_jax.train import results
from medm2g_jax.train.sharding import (
    FSDP_MIN_ELEMENTS,
    RULES,
    batch_sharding,
    check_batch,
    make_mesh,
    param_sharding,
    param_spec,
    put_batch,
    replicated,
)


def mesh_of(data=-1, fsdp=1, tensor=1):
    return make_mesh(ConfigDict(dict(data=data, fsdp=fsdp, tensor=tensor)))


@pytest.fixture(scope="module")
def shapes():
    """Name -> shape of the parameters of one network of each class."""
    b, ids, t = context(jnp.zeros((1, 2, 32))), jnp.zeros((1, 8), jnp.int32), jnp.zeros((1,), jnp.int32)
    unet = dict(channels=(32, 64), attention=(True, True), layers=1, heads=4, groups=8, width=32)
    clip = dict(width=32, layers=1, heads=4, ff=64, projection=32)
    bert = dict(width=32, layers=1, heads=4, ff=64, latent=32)
    networks = {
        "ct/unet": (UNet(**unet), jnp.zeros((1, 8, 8, 4)), t, b, b),
        "text/unet": (TextUNet(**unet, positions=4, latent=32), jnp.zeros((1, 32)), t, b, b),
        "image/vae": (ImageVAE(channels=(32, 64), layers=1, groups=8), jnp.zeros((1, 16, 16, 3))),
        "text/vae": (TextVAE(bert_vocab=50, gpt2_vocab=50, **bert), ids, ids),
        "text/clip": (CLIPText(vocab=50, length=8, **clip), ids),
        "ct/clip": (CLIPVision(patch=8, image=16, **clip), jnp.zeros((1, 16, 16, 3))),
        "ct/context": (ImageContext(32, 4, (32, 64), 2), jnp.zeros((1, 8, 8, 4)), t, jnp.zeros((4, 32))),
    }
    out = {}
    for prefix, (module, *args) in networks.items():
        tree = jax.eval_shape(lambda key, m=module, a=args: m.init(key, *a), jax.random.key(0))["params"]
        out |= {f"{prefix}/{name}": x.shape for name, x in flatten_dict(tree, sep="/").items()}
    return out


def test_mesh_takes_what_the_other_axes_leave():
    fits = {(-1, 1, 1): (8, 1, 1), (2, -1, 1): (2, 4, 1), (2, 2, 2): (2, 2, 2), (1, 2, -1): (1, 2, 4)}
    for asked, sizes in fits.items():
        mesh = mesh_of(*asked)
        assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        assert set(mesh.devices.flat) == set(jax.devices())
    assert dict(make_mesh(dict(data=-1, fsdp=1, tensor=1), jax.devices()[:1]).shape) == dict(data=1, fsdp=1, tensor=1)


@pytest.mark.parametrize("data", (3, 0, -2, 16, 2))
def test_a_mesh_that_does_not_fit(data):
    with pytest.raises(UserError, match=f"config.mesh: data={data}, fsdp=2, tensor=1 does not fit 8 devices"):
        mesh_of(data, 2, 1)


@pytest.mark.parametrize("asked", ((-1, 3, 1), (-1, -1, 1), (-1, -1, -1), (8, 8, -1), (2, 2, 1)))
def test_other_meshes_that_do_not_fit(asked):
    with pytest.raises(UserError, match="the product must be 8"):
        mesh_of(*asked)


def test_placements():
    mesh = mesh_of(2, 2, 2)
    for name, shape, spec in (
        ("ct/unet/mid/attn_0/prompt/q/kernel", (128, 64), P("fsdp", "tensor")),
        ("ct/unet/mid/attn_0/guide/out/kernel", (64, 128), P("tensor", "fsdp")),
        ("ct/unet/mid/attn_0/ff/proj/kernel", (64, 512), P("fsdp", "tensor")),
        ("text/unet/mid/res_0/fc_1/kernel", (128, 64), P("fsdp", "tensor")),
        ("text/unet/mid/res_0/fc_2/kernel", (64, 128), P("tensor", "fsdp")),
        ("ct/unet/mid/res_0/conv_1/kernel", (3, 3, 64, 32), P(None, None, "fsdp", "tensor")),
        ("ct/unet/mid/res_0/conv_2/kernel", (3, 3, 32, 64), P(None, None, "tensor", "fsdp")),
        # No rule: the largest dimension, of equals the last.
        ("ct/unet/down_0/downsample/kernel", (3, 3, 64, 64), P(None, None, None, "fsdp")),
        ("text/vae/decoder/wte/embedding", (5000, 64), P("fsdp", None)),
        # An odd dimension goes to no axis, a small array to no fsdp.
        ("ct/unet/mid/attn_0/prompt/q/kernel", (129, 63), P(None, None)),
        ("text/vae/decoder/wte/embedding", (5001, 64), P(None, "fsdp")),
        ("ct/unet/mid/attn_0/prompt/q/kernel", (8, 8), P(None, "tensor")),
        ("ct/unet/mid/attn_0/prompt/out/bias", (64,), P(None)),
        ("pair/text_ct/log_scale", (), P()),
    ):
        assert param_spec(name, shape, mesh) == spec, name
    assert param_spec("x/fc_1/kernel", (1, FSDP_MIN_ELEMENTS), mesh_of(4, 2)) == P(None, "fsdp")
    assert param_spec("x/fc_1/kernel", (128, 128), mesh_of()) == P(None, None)


def test_every_rule_names_a_layer_that_there_is(shapes):
    for regex, dim in RULES:
        words = re.search(r"\((.*)\)", regex).group(1).split("|")
        for word in words:
            found = [n for n in shapes if re.match(regex.replace("|".join(words), word), n)]
            assert found, f"no parameter of any network matches {word}"
            assert all(len(shapes[n]) in (2, 4) for n in found) and dim in (-1, -2)


def test_what_splits_its_output_meets_what_splits_its_input(shapes):
    """Pairs of layers share the dimension between them, so that the partitioner need not gather it."""
    mesh = mesh_of(2, 2, 2)
    pairs = {"conv_1": "conv_2", "fc_1": "fc_2", "linear_1": "linear_2", "c_fc": "c_proj", "proj": "out", "v": "out"}
    met = set()
    for name in shapes:
        layer = name.split("/")[-2]
        partner = name.replace(f"/{layer}/kernel", f"/{pairs.get(layer)}/kernel")
        if name.endswith("kernel") and layer in pairs and partner in shapes:
            assert param_spec(name, shapes[name], mesh)[-1] == "tensor", name
            assert param_spec(partner, shapes[partner], mesh)[-2] == "tensor", partner
            met.add(layer)
    assert met == set(pairs)


def bytes_per_device(shapes, mesh):
    count = 0
    for name, shape in shapes.items():
        x = jax.device_put(np.zeros(shape, np.float32), param_sharding(name, shape, mesh))
        count += x.addressable_shards[0].data.nbytes
    return count


def test_bytes_per_device_fall(shapes):
    some = {name: shape for name, shape in shapes.items() if name.startswith(("ct/unet/", "text/unet/"))}
    whole = 4 * sum(int(np.prod(s)) for s in some.values())
    assert bytes_per_device(some, mesh_of()) == whole
    # The small networks of a test have many arrays below FSDP_MIN_ELEMENTS; a published size divides all but evenly.
    assert bytes_per_device(some, mesh_of(1, 8)) < 0.25 * whole
    assert bytes_per_device(some, mesh_of(2, 2, 2)) < 0.4 * whole
    assert bytes_per_device(some, mesh_of(1, 1, 8)) < 0.6 * whole


def test_a_sharded_product_is_the_product():
    mesh, rng = mesh_of(2, 2, 2), np.random.default_rng(0)
    x, w1, w2 = (rng.normal(size=s).astype(np.float32) for s in ((8, 64), (64, 256), (256, 64)))
    params = {
        name: jax.device_put(w, param_sharding(name, w.shape, mesh))
        for name, w in (("ct/clip/layer_0/fc_1/kernel", w1), ("ct/clip/layer_0/fc_2/kernel", w2))
    }
    out = jax.jit(lambda x, p: jax.nn.relu(x @ p["ct/clip/layer_0/fc_1/kernel"]) @ p["ct/clip/layer_0/fc_2/kernel"])(
        put_batch(x, mesh), params
    )
    np.testing.assert_allclose(out, np.maximum(x @ w1, 0) @ w2, rtol=1e-4, atol=1e-3)


def test_a_batch_is_split_by_rows():
    mesh = mesh_of(2, 2, 2)
    images = np.arange(8 * 4 * 4, dtype=np.float32).reshape(8, 4, 4, 1)
    batch = {"ct": images, "present": {"text": np.arange(8) % 2 == 0}}
    placed = put_batch(batch, mesh)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b) and a.dtype == b.dtype, placed, batch))
    for x in jax.tree.leaves(placed):
        assert x.sharding == batch_sharding(mesh)
        rows = sorted({s.index[0].indices(8)[:2] for s in x.addressable_shards})
        assert rows == [(0, 2), (2, 4), (4, 6), (6, 8)]  # over data x fsdp; both of a tensor pair hold the same
    assert len(jax.device_put(batch["ct"], replicated(mesh)).addressable_shards[0].data) == 8


def test_check_batch_names_the_nearest():
    mesh = mesh_of(2, 2, 2)
    for good in (4, 8, 256):
        check_batch(good, mesh)
    for bad, near in ((5, 4), (7, 8), (1, 4), (0, 4), (-3, 4), (1023, 1024)):
        with pytest.raises(UserError, match=rf"config.batch={bad} .*2 x 2 devices.*config.batch={near}$"):
            check_batch(bad, mesh)
    with pytest.raises(UserError, match="config.eval_rows=3 .*config.eval_rows=4$"):
        check_batch(3, mesh, "config.eval_rows")


def test_accelerators_get_the_values_that_a_cpu_draws(monkeypatch):
    def init(key):
        a, b = jax.random.split(key)
        return {"a/kernel": jax.random.normal(a, (64, 128)), "b/bias": jax.random.normal(b, (3,)), "c": jnp.zeros(9)}

    mesh = mesh_of(fsdp=8)
    placed = {name: param_sharding(name, shape, mesh) for name, shape in (("a/kernel", (64, 128)), ("b/bias", (3,)))}
    one = {name: jax.sharding.SingleDeviceSharding(jax.devices()[0]) for name in placed}
    expected = results.fresh_params(init, jax.random.key(3), one, jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    made = results.fresh_params(init, jax.random.key(3), placed, jnp.bfloat16)
    assert made.keys() == placed.keys() and made["a/kernel"].sharding.spec == P(None, "fsdp")
    for name, values in made.items():
        assert values.dtype == jnp.bfloat16 and values.sharding == placed[name]
        np.testing.assert_array_equal(values, expected[name])
