"""Compiled programs: what is read from their text, and what the trainer's own hold."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from micro import micro_stage

from medm2g_jax import program
from medm2g_jax.program import Collective
from medm2g_jax.train import abstract, sharding

VOCAB = dict(clip=700, bert=300, gpt2=450)
TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%fused_computation.1 (param_0: bf16[64,32]) -> f32[8,32] {
  %param_0 = bf16[64,32]{1,0:T(8,128)} parameter(0)
  %convert.9 = f32[64,32]{1,0} convert(%param_0)
  ROOT %r = f32[8,32]{1,0:T(8,128)} reduce(%convert.9, %c), dimensions={0}, to_apply=%add
}

ENTRY %main.4 (w.1: bf16[64,32], x: f32[16,64]) -> f32[16] {
  %w.1 = bf16[64,32]{1,0:T(8,128)} parameter(0), metadata={op_name="w"}
  %fusion.1 = f32[8,32]{1,0:T(8,128)S(1)} fusion(%w.1), kind=kLoop, calls=%fused_computation.1
  %copy.2 = f32[32,64]{0,1:T(8,128)} copy(%convert), metadata={op_name="jit(f)/x"}
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%fusion.1), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %ag = (bf16[2,32]{1,0}, bf16[16,32]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %agd = bf16[16,32]{1,0} all-gather-done(%ag)
  ROOT %t = (f32[16]{0}, f32[4,4096,4096]{2,1,0}) custom-call(%ag, %copy.2), custom_call_target="x"
}
"""


def test_a_text_is_read():
    found = [(d, dims) for d, dims, _ in program.arrays(TEXT)]
    assert ("f32", (64, 32)) not in found and ("f32", (8, 32)) in found  # inside a fusion there is no array
    assert program.largest(TEXT) == (4 * 4 * 4096**2, "f32[4,4096,4096] custom-call")
    assert program.square_scores(TEXT, 4096) and not program.square_scores(TEXT, 1024)
    # A copy of the transpose is a copy; not where a parameter of these dimensions trains.
    weights = {"w": [(64, 32), (64, 8)], "v": [(64, 33)]}
    assert program.wide_copies(TEXT, weights) == {"w": True, "v": False}
    assert program.wide_copies(TEXT, weights, [(1, 32, 64)]) == {"v": False}
    reduced, gathered = Collective("all-reduce", 16 * 8 * 4, 4), Collective("all-gather", 2 * 16 * 32, 8)
    assert program.collectives(TEXT) == {reduced: 1, gathered: 1}
    assert reduced.moved == 2 * 3 / 4 * 512 and gathered.moved == 7 / 8 * 1024


def test_exchanges_of_a_product_are_those_of_the_book():
    """Rows over 8 devices: each weight's gradient is summed once. Weights over 8: each is gathered."""
    mesh = sharding.make_mesh(dict(data=8, fsdp=1, tensor=1))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=sharding.batch_sharding(mesh))

    def exchanged(spec):
        w = jax.ShapeDtypeStruct((128, 256), jnp.float32, sharding=NamedSharding(mesh, spec))
        loss = lambda w, x: jnp.sum(jnp.square(x @ w))  # noqa: E731
        grad = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, spec))
        return program.traffic(program.collectives(grad.lower(w, x).compile().as_text()))

    whole = 128 * 256 * 4
    assert exchanged(P()) == {"all-reduce": {"count": 1, "bytes": 2 * 7 / 8 * whole}}
    split = exchanged(P("data"))
    assert split["all-gather"] == {"count": 1, "bytes": 7 / 8 * whole}


def test_what_loops_do_again_is_counted():
    def f(x, w):
        turn = jax.checkpoint(lambda x, _: (jnp.tanh(x @ w), None))
        x, _ = jax.lax.scan(turn, x, length=5)
        image = jax.lax.conv_general_dilated(
            x.reshape(1, 4, 4, 8), jnp.ones((3, 3, 8, 6)), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return image.sum()

    jaxpr = jax.make_jaxpr(f)(jnp.ones((16, 8)), jnp.ones((8, 8))).jaxpr
    product, convolution = 2 * 16 * 8 * 8, 2 * 16 * 6 * 9 * 8
    assert program.products(jaxpr) == (5 * product + convolution, 4 * product)


@pytest.mark.parametrize("fsdp", [1, 8])
def test_a_sharded_train_step_exchanges_what_its_parameters_weigh(fsdp):
    """Gradients once, each in float32; parameters that are split are gathered besides. Nothing of the images is."""
    config = micro_stage("image_vae")
    config.mesh.data, config.mesh.fsdp = 8 // fsdp, fsdp
    mesh = sharding.make_mesh(config.mesh)
    made, arguments = abstract.abstract_stage(config, VOCAB, mesh, "cpu")
    step = jax.jit(made.train_step, out_shardings=(made.layout, None), donate_argnums=0)
    found = program.collectives(step.lower(*arguments).compile().as_text())
    moved = program.traffic(found)
    weights = arguments[0].trainable
    trained = sum(4 * x.size for x in weights.values())
    split = sum(4 * x.size for x in weights.values() if x.sharding.shard_shape(x.shape) != x.shape)
    once = 7 / 8 * trained
    assert 2 * once <= moved["all-reduce"]["bytes"] < 2.1 * once, moved
    assert moved.keys() == ({"all-reduce"} if fsdp == 1 else {"all-reduce", "all-gather"}), moved
    if split:
        assert 7 / 8 * split <= moved["all-gather"]["bytes"] <= 3.1 * 7 / 8 * split, moved
