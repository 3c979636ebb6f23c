"""The mesh (data, fsdp, tensor) and the one table that says which logical axis lies on which of its axes."""

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

# Logical axis -> mesh axes. Rows are split over data and fsdp; weights over tensor, and fsdp (gather, weight_stays).
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "few": ("data",),  # Rows that every device of a replica has, for its own piece of a weight.
    "length": (),
    "activation": (),  # An activation's model width: whole on every device, unlike a weight's.
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


# More rows than this are not sent to a weight's pieces: a device would hold the product of all of them, and of logits
# no more are wanted at a time (scoring.score).
_MOST_FEW = 1024


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh; a size of -1 takes the devices that the others leave.

    Without a -1, a single process may use fewer devices than there are: the first ones.

    Args:
        data: replicas, each with its own rows.
        fsdp: rows and weights split.
        tensor: heads, MLP and vocabulary split.
        devices: all devices unless given.

    Raises:
        UserError: a size that is neither -1 nor positive, more than one -1, or sizes that the devices do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    shown = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == -1]
    if any(size < 1 and size != -1 for size in sizes.values()) or len(open_axes) > 1:
        raise UserError(f"{shown}: every size must be at least 1, but for one -1, which takes what is left")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % taken:
        raise UserError(f"{shown}: {taken} does not divide the {len(devices)} devices")
    if open_axes:
        sizes[open_axes[0]] = len(devices) // taken
    elif taken < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"{shown}: uses {taken} of {len(devices)} devices; set one size to -1 to use those of every host"
        )
    # Auto: with Explicit axes (jax's default) a product over an fsdp-sharded dimension is an error, not a gather.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh, name: str) -> PartitionSpec:
    """The partition of an array with these logical axes.

    Args:
        axes: one logical axis per dimension.
        shape: the array's shape.
        mesh: whose sizes count.
        name: the array's name, for messages.

    Raises:
        UserError: two dimensions want the same mesh axis, or a dimension is not divisible.
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
    """The sharding of every weight.

    Args:
        logical_axes: tree whose leaves are tuples of logical axis names.
        abstract: the same tree with leaves that have a shape.
        mesh: from make_mesh.

    Raises:
        UserError: see spec; the message names the weight.
    """

    def one(path: Any, leaf: Any, axes: tuple[str, ...]) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(axes, leaf.shape, mesh, name))

    return jax.tree_util.tree_map_with_path(one, abstract, logical_axes)


def optimizer_shardings(tx: optax.GradientTransformation, abstract: Any, shardings: Any, mesh: Mesh) -> Any:
    """The sharding of an optimizer's state: moments as their weights, counters on every device.

    jit(tx.init) alone would put every moment on one device: zeros do not depend on the weights' data.

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
    """Over how many devices the rows of a batch are split; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading dimension) split over data and fsdp; for arrays of any rank."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def stack_sharding(mesh: Mesh) -> NamedSharding:
    """For a stack of micro-batches, whose leading dimension counts them: the second is that of the rows."""
    return NamedSharding(mesh, PartitionSpec(None, RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def compiler_options(mesh: Mesh | None) -> dict[str, str]:
    """For jax.jit of every program that runs on this mesh."""
    if mesh is None or mesh.devices.flat[0].platform != "tpu":
        return {}
    # Else a weight that `gather` makes whole is taken apart again, piece by piece, with sums written after each: ten
    # times the memory traffic of a 3B model's forward pass, and twice its temporaries.
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def to_host(tree: Any) -> Any:
    """The whole of every array as numpy, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def constrain(x: jax.Array, axes: Sequence[str], mesh: Mesh | None) -> jax.Array:
    """Holds an activation to its logical axes on this mesh; does nothing without one.

    Otherwise the compiler may split activations like the weights, along the model width, instead of by rows.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh, "activation")))


def weight_stays(rows: int, into: int, out: int, *, mesh: Mesh | None) -> bool:
    """Whether `rows` rows are sent to the pieces of a weight [into, out] for their product, and not the pieces to them.

    What fsdp splits is gathered where there are many rows, as in training. The rows of one decoded token are far fewer
    numbers than the weight: every device of a replica then multiplies all of them with its own piece, which is read
    once and sent nowhere.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return False
    rows //= mesh.shape["data"]
    return rows <= _MOST_FEW and rows * (into + out) < into * out


def send_rows(multiply: Callable, into: str, out: str, mesh: Mesh | None) -> Callable:
    """`multiply`, for rows [R, E] and a weight [E, O] that stays on its devices.

    Args:
        multiply: the product of two such matrices.
        into: the weight's logical axis E.
        out: its logical axis O.
        mesh: the mesh that both lie on.

    Returns:
        The same function of whole arrays; its result lies by rows.
    """
    if "fsdp" in RULES[into]:
        # By hand: the compiler would give every device all of the sum, of which it needs its own rows. The parts are
        # added in the type that `multiply` returns: bfloat16 ones send half as much, each rounded once more.
        def add_up(x_RxE: jax.Array, kernel_ExO: jax.Array) -> jax.Array:
            return jax.lax.psum_scatter(multiply(x_RxE, kernel_ExO), "fsdp", scatter_dimension=0, tiled=True)

        few, batch, fsdp = RULES["few"], RULES["batch"], RULES[into]
        in_specs = (PartitionSpec(few, fsdp), PartitionSpec(fsdp, RULES[out]))
        # Unchecked: `multiply` may have a derivative of its own, which does not say over which axes it varies.
        out_specs = PartitionSpec(batch, RULES[out])
        return jax.shard_map(add_up, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if "fsdp" not in RULES[out]:
        return multiply

    def place(x_RxE: jax.Array, kernel_ExO: jax.Array) -> jax.Array:
        y_RxO = constrain(multiply(constrain(x_RxE, ("few", into), mesh), kernel_ExO), ("few", out), mesh)
        # In two moves: else the weight is made whole to have the rows in their place at once.
        return constrain(y_RxO, ("batch", "activation"), mesh)

    return place


def gather(weight: jax.Array, axes: Sequence[str], mesh: Mesh | None) -> jax.Array:
    """A weight for its use: whole along fsdp. Its gradient goes back to the pieces.

    Left to itself the compiler goes through the pieces one by one wherever a product uses them, and writes its sums to
    memory after each.
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
