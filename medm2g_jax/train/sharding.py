"""Where arrays live: a mesh of (data, fsdp, tensor) from the config, and rules from names to placements.

Rows of a batch are split over data x fsdp. A parameter follows the first rule whose regex matches its name: "tensor"
splits the output (or input) features of projections over the tensor axis, then its largest free dimension goes to the
fsdp axis where that divides it. The partitioner of `jax.jit` does the rest (what pjit was).
"""

import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from medm2g_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
FSDP_MIN_ELEMENTS = 4096  # below this a shard costs more in latency than it saves

# (regex on the parameter's name, dimension counted from the right that the tensor axis splits)
RULES = (
    (r".*/(q|k|v|c_attn|c_fc|proj|fc_1|conv_1|linear_1)/kernel$", -1),
    (r".*/(out|c_proj|fc_2|conv_2|linear_2)/kernel$", -2),
)


def mesh_sizes(shape: Mapping[str, int] | ConfigDict, count: int) -> list[int]:
    """Devices along each axis of a config's {"data": -1, "fsdp": 1, "tensor": 1}; one -1 takes what the others leave.

    Raises:
      UserError: the axes do not divide the devices.
    """
    sizes = [int(shape[axis]) for axis in AXES]
    fixed = int(np.prod([s for s in sizes if s != -1]))
    if (
        sizes.count(-1) > 1
        or min((s for s in sizes if s != -1), default=1) < 1
        or count % fixed
        or (-1 not in sizes and fixed != count)
    ):
        asked = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
        raise UserError(
            f"config.mesh: {asked} does not fit {count} device{'s' * (count > 1)}; the product must be "
            f"{count} (one axis may be -1), as in data=-1, fsdp=1, tensor=1"
        )
    return [count // fixed if s == -1 else s for s in sizes]


def make_mesh(shape: Mapping[str, int] | ConfigDict, devices=None) -> Mesh:
    """The mesh of a config's `mesh` on these devices, by default all there are."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(shape, len(devices))
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def param_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The placement of one parameter."""
    axes: list[str | None] = [None] * len(shape)
    for regex, dim in RULES:
        if re.match(regex, name) and len(shape) >= 2:
            if mesh.shape["tensor"] > 1 and shape[dim] % mesh.shape["tensor"] == 0:
                axes[dim] = "tensor"
            break
    n = mesh.shape["fsdp"]
    if n > 1 and int(np.prod(shape)) >= FSDP_MIN_ELEMENTS:
        free = [d for d in range(len(shape)) if axes[d] is None and shape[d] % n == 0]
        if free:
            axes[max(free, key=lambda d: (shape[d], d))] = "fsdp"
    return P(*axes)


def param_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, param_spec(name, shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data x fsdp."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def check_batch(batch: int, mesh: Mesh | AbstractMesh, field: str = "config.batch") -> None:
    """Raises UserError, naming the nearest batch that fits, where rows do not divide over data x fsdp."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch < 1 or batch % rows:
        near = max(rows, round(batch / rows) * rows)
        raise UserError(
            f"{field}={batch} does not divide over data x fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']} devices; "
            f"the nearest that fits is {field}={near}"
        )


def put_batch(batch, mesh: Mesh):
    """This host's rows of a batch -> global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
