"""What the TPU compiler makes of self-attention of 4096 tokens and its gradients; for a Python that has libtpu.

python tests/tpu_attention.py       # prints {"blocks", "whole": arrays that hold 4096 x 4096 scores}
"""

import json
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from medm2g_jax import program  # noqa: E402
from medm2g_jax.nn import attention  # noqa: E402


def squares(many: int) -> list[str]:
    """Of the program that takes blocks of queries from so many scores on; rows over two chips."""
    attention.MANY = many
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x2", chips_per_host_bounds=[1, 2, 1])
    rows = NamedSharding(Mesh(np.asarray(chips.devices), ("data",)), PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((2, 4096, 2, 40), jnp.bfloat16, sharding=rows)
    loss = lambda *x: attention.attend(*x).astype(jnp.float32).sum()  # noqa: E731
    with attention.traced_for("tpu"):
        compiled = jax.jit(jax.grad(lambda *x: loss(*x), (0, 1, 2))).lower(x, x, x).compile()
    assert not program.collectives(compiled.as_text())  # no block moves between chips
    return program.square_scores(compiled.as_text(), 4096)


if __name__ == "__main__":
    print(json.dumps({"blocks": squares(attention.MANY), "whole": squares(2**40)}))
