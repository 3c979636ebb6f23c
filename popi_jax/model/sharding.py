"""The mesh (data, fsdp, tensor) and the table that maps logical axes to its axes."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from popi_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Rows are split over data and fsdp; weights over tensor and fsdp (gather, weight_stays).
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "few": ("data",),  # Rows that all devices of a replica hold, each for its own piece of a weight.
    "length": (),
    "activation": (),  # An activation's model width: not split, unlike a weight's.
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "lora_rank": (),
    "norm": (),
    "layers": (),
}


# The most rows that are sent to a weight's pieces, since a device then holds the product of all of them; logits are not
# computed for more rows at a time either (scoring.score).
_MOST_FEW = 1024


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh; a size of -1 takes the remaining devices.

    Without a -1, a single process may use only the first of its devices.

    Args:
        data: number of replicas, each with its own rows.
        fsdp: number of devices that rows and weights are split over.
        tensor: number of devices that heads, MLP and vocabulary are split over.
        devices: all devices if None.

    Raises:
        UserError: a size is neither -1 nor positive, several are -1, or the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    shown = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == -1]
    if any(size < 1 and size != -1 for size in sizes.values()) or len(open_axes) > 1:
        raise UserError(f"{shown}: every size must be at least 1; one may be -1, which takes the remaining devices")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % taken:
        raise UserError(f"{shown}: {len(devices)} devices cannot be divided evenly by {taken}")
    if open_axes:
        sizes[open_axes[0]] = len(devices) // taken
    elif taken < len(devices) and jax.process_count() > 1:
        raise UserError(f"{shown}: uses {taken} of {len(devices)} devices; set one size to -1 to use all hosts")
    # Auto: with Explicit axes (jax's default) a product over an fsdp-sharded dimension is an error, not a gather.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh, name: str) -> PartitionSpec:
    """Returns the partition of an array with these logical axes.

    Args:
        axes: one logical axis per dimension.
        shape: the array's shape.
        mesh: the mesh to divide over.
        name: the array's name, for messages.

    Raises:
        UserError: two dimensions use the same mesh axis, or a dimension is not divisible.
    """
    taken: dict[str, str] = {}
    parts: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = RULES[axis]
        for mesh_axis in mesh_axes:
            if mesh_axis in taken:
                raise UserError(f"{name}: {taken[mesh_axis]!r} and {axis!r} both lie on mesh axis {mesh_axis!r}")
            taken[mesh_axis] = axis
        pieces = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if size % pieces:
            along = " x ".join(f"mesh.{mesh_axis}={mesh.shape[mesh_axis]}" for mesh_axis in mesh_axes)
            raise UserError(f"{name}: {axis!r} of size {size} does not divide over {along}")
        parts.append(mesh_axes or None)
    return PartitionSpec(*parts)


def param_shardings(logical_axes: Any, abstract: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every weight.

    Args:
        logical_axes: a tree whose leaves are tuples of logical axis names.
        abstract: the same tree, whose leaves have a shape.
        mesh: from make_mesh.

    Raises:
        UserError: see spec; the message names the weight.
    """

    def one(path: Any, leaf: Any, axes: tuple[str, ...]) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(axes, leaf.shape, mesh, name))

    return jax.tree_util.tree_map_with_path(one, abstract, logical_axes)


def optimizer_shardings(tx: optax.GradientTransformation, abstract: Any, shardings: Any, mesh: Mesh) -> Any:
    """Returns the sharding of an optimizer's state: moments like their weights, counters replicated.

    jit(tx.init) alone would put every moment on one device, because zeros do not depend on the weights' data.

    Args:
        tx: the optimizer.
        abstract: shapes and types of the weights that it updates.
        shardings: those weights' shardings.
        mesh: from make_mesh.
    """
    return optax.tree_utils.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, abstract),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def row_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Returns the number of devices that the rows of a batch are split over; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays of any rank whose leading dimension, the rows, is split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def stack_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a stack of micro-batches, whose second dimension is that of the rows."""
    return NamedSharding(mesh, PartitionSpec(None, RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def compiler_options(mesh: Mesh | None) -> dict[str, str]:
    """Returns the options of jax.jit for programs that run on this mesh."""
    if mesh is None or mesh.devices.flat[0].platform != "tpu":
        return {}
    # By default the compiler splits a weight that `gather` made whole into pieces again and writes partial sums after
    # each: ten times the memory traffic of a 3B model's forward pass, and twice its temporaries.
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def to_host(tree: Any) -> Any:
    """Returns every array, whole, as numpy on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def constrain(x: jax.Array, axes: Sequence[str], mesh: Mesh | None) -> jax.Array:
    """Constrains an activation to its logical axes on this mesh; does nothing without one.

    Otherwise the compiler may split activations along the model width, like weights, instead of by rows.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh, "activation")))


def weight_stays(rows: int, into: int, out: int, *, mesh: Mesh | None) -> bool:
    """Returns whether to send `rows` rows to the pieces of a weight [into, out] instead of gathering the weight.

    With many rows, as in training, weights that fsdp splits are gathered. The rows of one decoded token hold far fewer
    numbers than the weight: every device of a replica then multiplies all of them by its own piece, which is read once
    and not sent.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return False
    rows //= mesh.shape["data"]
    return rows <= _MOST_FEW and rows * (into + out) < into * out


def send_rows(multiply: Callable, into: str, out: str, mesh: Mesh | None) -> Callable:
    """Returns `multiply` for rows [R, In] and a weight [In, Out] that stays on its devices.

    Args:
        multiply: the product of two such matrices.
        into: the weight's logical axis In.
        out: its logical axis Out.
        mesh: the mesh of both.

    Returns:
        The same function of whole arrays; its result is split by rows.
    """
    if "fsdp" in RULES[into]:
        # Explicit, because the compiler would send every device the whole sum, not just its own rows. Partial sums are
        # added in the dtype that `multiply` returns: bfloat16 halves the bytes sent and rounds each once more.
        def add_up(x_RxIn: jax.Array, kernel_InxOut: jax.Array) -> jax.Array:
            return jax.lax.psum_scatter(multiply(x_RxIn, kernel_InxOut), "fsdp", scatter_dimension=0, tiled=True)

        few, batch, fsdp = RULES["few"], RULES["batch"], RULES[into]
        in_specs = (PartitionSpec(few, fsdp), PartitionSpec(fsdp, RULES[out]))
        # Unchecked: `multiply` may have a custom derivative, which does not declare over which axes it varies.
        out_specs = PartitionSpec(batch, RULES[out])
        return jax.shard_map(add_up, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if "fsdp" not in RULES[out]:
        return multiply

    def place(x_RxIn: jax.Array, kernel_InxOut: jax.Array) -> jax.Array:
        y_RxOut = constrain(multiply(constrain(x_RxIn, ("few", into), mesh), kernel_InxOut), ("few", out), mesh)
        # In two steps: in one, the compiler gathers the weight so that the rows are in place at once.
        return constrain(y_RxOut, ("batch", "activation"), mesh)

    return place


def gather(weight: jax.Array, axes: Sequence[str], mesh: Mesh | None) -> jax.Array:
    """Returns a weight for use in a product: whole along fsdp. Its gradient is split like the weight again.

    Otherwise the compiler processes the pieces one by one in every product and writes partial sums to memory after
    each.
    """
    return weight if mesh is None else _gathered(tuple(axes), mesh, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(axes: tuple[str, ...], mesh: Mesh, weight: jax.Array) -> jax.Array:
    pieces = spec(axes, weight.shape, mesh, "weight")
    whole = PartitionSpec(*(None if part == ("fsdp",) else part for part in pieces))
    return jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, whole))


def _gathered_forward(axes: tuple[str, ...], mesh: Mesh, weight: jax.Array) -> tuple[jax.Array, None]:
    return _gathered(axes, mesh, weight), None


def _gathered_backward(axes: tuple[str, ...], mesh: Mesh, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(gradient, axes, mesh),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
