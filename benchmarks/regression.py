"""What translation is measured against: the flow's own UNet as a regression, on the same latents.

    python -m benchmarks.regression --model RUN --given mri:t2 --make ct --steps 800

No noise and one answer: the UNet reads the sources on its input channels and is trained, from fresh weights, to say
the target's latents in the mean square. Same autoencoder, same records, same judge as `medm2g evaluate`; prints one
line of JSON.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medm2g_jax import load
from medm2g_jax.data.open import source_of
from medm2g_jax.data.pipeline import of_streams
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.metrics import figures_of
from medm2g_jax.evaluate.samples import CHUNK
from medm2g_jax.modality import split_stream
from medm2g_jax.model import OnGrid, init, null_context
from medm2g_jax.nn.attention import context

ALL = 2**30


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a run whose flow of --make reads --given on its grid")
    parser.add_argument("--given", required=True, metavar="STREAM[,STREAM]")
    parser.add_argument("--make", required=True, metavar="STREAM")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--rows", type=int, default=200, help="test subjects")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    given, target = tuple(args.given.split(",")), split_stream(args.make)[0]
    held = load(args.model)
    model, flow, source = held.model, held.model.flows[target], source_of(held.meta["shared"])
    if not flow.slots:
        raise UserError(f"{args.model}: its flow of {target} reads nothing on its grid")
    train = of_streams(source, (*given, args.make), "train", ALL, args.seed)
    test = of_streams(source, (*given, args.make), "test", args.rows, args.seed)
    encode = {m: jax.jit(lambda x, m=m: model.encode(held.params, m, x)) for m in model.flows}

    def latents(x: np.ndarray, stream: str) -> np.ndarray:
        m = split_stream(stream)[0]
        return np.concatenate([np.asarray(encode[m](x[i : i + CHUNK])) for i in range(0, len(x), CHUNK)])

    def near(z: dict) -> jax.Array:
        ones = jnp.ones((len(z[given[0]]),), bool)
        return flow.on_grid(
            OnGrid(m, z[s], ones[:, None, None, None].astype(jnp.float32), jnp.full(len(ones), index, jnp.int32), ones)
            for s in given
            for m, index in [split_stream(s)]
        )

    train, of_test = ({s: latents(x, s) for s, x in some.items()} for some in (train, test))
    empty = held.ids([""]) if held.tokenizers else {}
    frozen = {**held.params, **model.null(held.params, empty)}
    number = split_stream(args.make)[1]

    def answer(params: dict, z: dict) -> jax.Array:
        """Of no noise at all: the UNet sees its sources and a blank."""
        rows = len(z[given[0]])
        blank, at = jnp.zeros((rows, *flow.family.latent_shape)), jnp.full((rows,), number, jnp.int32)
        prompt = null_context(flow.null(frozen), rows)
        return flow.predict({**frozen, **params}, blank, jnp.zeros_like(at), prompt, None, at, near(z))

    one = {s: z[:1] for s, z in train.items()}
    z, at, token = jnp.zeros((1, *flow.family.latent_shape)), jnp.zeros((1,), jnp.int32), jnp.zeros((1, 2, model.width))
    stream = at if flow.modality.contrasts else None
    key = jax.random.key(args.seed)
    params = init(flow.unet, f"{target}/unet", key, z, at, context(token), None, stream, near(one))
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.lr, args.steps // 20, args.steps, args.lr / 50)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))
    opt = tx.init(params)

    @jax.jit
    def step(params, opt, z):
        def loss(p):
            return jnp.mean(jnp.square(answer(p, z) - z[args.make]))

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    rng, began = np.random.default_rng(args.seed), time.time()
    for _ in range(args.steps):
        rows = rng.choice(len(train[args.make]), args.batch, replace=False)
        params, opt, value = step(params, opt, {s: z[rows] for s, z in train.items()})
    value.block_until_ready()
    seconds = time.time() - began
    made = []
    decode = jax.jit(lambda p, z: model.decode(held.params, target, answer(p, z)))
    for i in range(0, args.rows, CHUNK):
        made.append(np.asarray(decode(params, {s: z[i : i + CHUNK] for s, z in of_test.items()})))
    task = f"{args.given} -> {args.make}, regression"
    figures = figures_of("image", task, test[args.make], np.concatenate(made), seed=args.seed)
    found = {f.metric: [round(x, 4) for x in (f.value, *f.interval)] for f in figures}
    print(json.dumps(vars(args) | found | {"loss": float(value), "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
