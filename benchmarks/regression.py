"""What translation is measured against: the flow's own UNet as a regression (`medm2g_jax.evaluate.regression`).

    python -m benchmarks.regression --model RUN --given mri:t2 --make ct --steps 800

Same autoencoder, same records, same judge as `medm2g evaluate`; prints one line of JSON.
"""

import argparse
import json

from medm2g_jax import load
from medm2g_jax.data.open import source_of
from medm2g_jax.data.pipeline import of_streams
from medm2g_jax.evaluate.metrics import figures_of
from medm2g_jax.evaluate.regression import ALL, fit


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
    streams = (*args.given.split(","), args.make)
    held = load(args.model)
    source = source_of(held.meta["shared"])
    train = of_streams(source, streams, "train", ALL, args.seed)
    test = of_streams(source, streams, "test", args.rows, args.seed)
    found = fit(held, train, args.make, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)
    task = f"{args.given} -> {args.make}, regression"
    figures = figures_of("image", task, test[args.make], found.answer(test), seed=args.seed)
    values = {f.metric: [round(x, 4) for x in (f.value, *f.interval)] for f in figures}
    print(json.dumps(vars(args) | values | {"loss": found.loss, "seconds": round(found.seconds, 1)}))


if __name__ == "__main__":
    main()
