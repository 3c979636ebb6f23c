"""Checkpoints as hub folders (config.json + safetensors, in one file or in shards): load, save, fingerprint. No torch.

Loading reads one tensor at a time and, given a mesh, only the slices that this process's devices hold.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from popi_jax.errors import UserError, first_line
from popi_jax.model import folders, tokenizer_files
from popi_jax.model.config import ModelConfig
from popi_jax.model.policy import Policy

Params = dict[str, Any]

STYLEBOOK = pathlib.Path(__file__).resolve().parent.parent / "assets" / "stylebook"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_DOWNLOADED = (
    "config.json",
    _ADAPTER,
    "generation_config.json",
    "*.safetensors",
    _INDEX,
    "tokenizer*",
    "special*",
    "chat_template*",
)
_STORED_DTYPES = {"F32", "F16", "BF16"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_COMPARED_ROWS = 4096  # Of a stored head and the embedding, at a time.
# Buffers that older checkpoints store; their values are computed here.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


_VECTOR, _TABLE = ((0,),), ((0,), (1,))
_MATRIX = ((1,), (0,))  # Ours is [in, out], the hub's [out, in].
_HEADS_OUT = ((1, 2), (0,))  # Ours is [D, H, Dh], the hub's [H * Dh, D].
# Path in our tree -> hub tensor (within "model.layers.N." for "layers") and, for each of its axes, our axes that are
# flattened into it. Llama, Qwen 2.5 and Qwen 3 share these names.
_HUB_TENSORS: dict[tuple[str, ...], tuple[str, tuple[tuple[int, ...], ...]]] = {
    ("embed", "embedding"): (_EMBEDDING, _TABLE),
    ("layers", "attn_norm", "scale"): ("input_layernorm.weight", _VECTOR),
    ("layers", "q", "kernel"): ("self_attn.q_proj.weight", _HEADS_OUT),
    ("layers", "k", "kernel"): ("self_attn.k_proj.weight", _HEADS_OUT),
    ("layers", "v", "kernel"): ("self_attn.v_proj.weight", _HEADS_OUT),
    ("layers", "q", "bias"): ("self_attn.q_proj.bias", ((0, 1),)),
    ("layers", "k", "bias"): ("self_attn.k_proj.bias", ((0, 1),)),
    ("layers", "v", "bias"): ("self_attn.v_proj.bias", ((0, 1),)),
    ("layers", "o", "kernel"): ("self_attn.o_proj.weight", ((2,), (0, 1))),
    ("layers", "q_norm", "scale"): ("self_attn.q_norm.weight", _VECTOR),
    ("layers", "k_norm", "scale"): ("self_attn.k_norm.weight", _VECTOR),
    ("layers", "mlp_norm", "scale"): ("post_attention_layernorm.weight", _VECTOR),
    ("layers", "gate", "kernel"): ("mlp.gate_proj.weight", _MATRIX),
    ("layers", "up", "kernel"): ("mlp.up_proj.weight", _MATRIX),
    ("layers", "down", "kernel"): ("mlp.down_proj.weight", _MATRIX),
    ("final_norm", "scale"): ("model.norm.weight", _VECTOR),
    ("head", "kernel"): (_HEAD, _MATRIX),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded hub folder.

    Attributes:
        config: the model's shape.
        params: the parameter tree (every leaf of "layers" has a leading n_layers axis).
        tokenizer_path: the folder to give to Tokenizer.load.
        fingerprint: see fingerprint().
    """

    config: ModelConfig
    params: Params
    tokenizer_path: pathlib.Path
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one of our parameters is stored in hub tensors.

    Attributes:
        path: keys in the parameter tree.
        name: hub tensor; "{}" stands for the layer if there is one per layer.
        shape: our shape, without the layer axis.
        hub_axes: for each axis of the hub tensor, the axes of ours that are flattened into it.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    hub_axes: tuple[tuple[int, ...], ...]

    @property
    def stacked(self) -> bool:
        """Whether there is one hub tensor per layer."""
        return "{}" in self.name

    @property
    def hub_shape(self) -> tuple[int, ...]:
        """Shape of the hub tensor."""
        return tuple(math.prod(self.shape[axis] for axis in axes) for axes in self.hub_axes)

    @property
    def order(self) -> tuple[int, ...]:
        """Our axes in the hub tensor's order."""
        return tuple(axis for axes in self.hub_axes for axis in axes)

    def to_hub(self, value: np.ndarray) -> np.ndarray:
        """Converts one layer's parameter to the hub tensor."""
        return np.ascontiguousarray(value.transpose(self.order).reshape(self.hub_shape))

    def from_hub(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
        """Reads param[index] of one layer from a hub tensor that supports slicing.

        It reads nothing else, except that head_dim, the inner part of a flattened axis, is always read whole.
        """
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        hub_index, sizes = [], []
        for outer, *inner in self.hub_axes:
            width = math.prod(self.shape[axis] for axis in inner)
            start, stop = bounds[outer]
            hub_index.append(slice(start * width, stop * width))
            sizes += [stop - start, *(self.shape[axis] for axis in inner)]
        value = tensor[tuple(hub_index)].reshape(sizes).transpose(np.argsort(self.order))
        for _, *inner in self.hub_axes:
            for axis in inner:
                value = value[(slice(None),) * axis + (slice(*bounds[axis]),)]
        return value


def leaves(config: ModelConfig) -> list[Leaf]:
    """Lists every parameter that the decoder declares, with its hub tensors."""
    flat = jax.tree_util.tree_leaves_with_path(Policy(config).abstract_base())
    table = []
    for keys, value in flat:
        path = tuple(key.key for key in keys)
        name, hub_axes = _HUB_TENSORS[path]
        stacked = path[0] == "layers"
        shape = value.shape[1:] if stacked else value.shape
        table.append(Leaf(path, f"model.layers.{{}}.{name}" if stacked else name, shape, hub_axes))
    return table


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every hub tensor of the model."""
    return {name: leaf.hub_shape for leaf in leaves(config) for name in _names(leaf, config.n_layers)}


class _Weights:
    """The tensors of a folder's safetensors files, memory-mapped and read only as needed."""

    def __init__(self, folder: pathlib.Path, tied: bool):
        self.files, weight_map = _weight_files(folder)
        self._where = folder / (_INDEX if weight_map else _SINGLE)
        self._file_of = {name: folder / file for name, file in weight_map.items()}
        self._handles: dict[pathlib.Path, Any] = {}
        stored: dict[str, list[pathlib.Path]] = {}
        for path in self.files:
            try:
                self._handles[path] = safetensors.safe_open(path, framework="np")
                names = self._handles[path].keys()
            except Exception as error:  # Besides its own errors, safetensors raises those of its memory map.
                raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
            for name in names:
                stored.setdefault(name, []).append(path)
        for name, path in self._file_of.items():
            if path not in stored.get(name, ()):
                raise UserError(f"{path}: tensor {name} is missing; weight_map of {self._where} says that it is here")
        for name, paths in stored.items():
            if name not in self._file_of and len(paths) > 1:
                raise UserError(f"{paths[1]}: tensor {name} is also in {paths[0]}; weight_map of {_INDEX} has neither")
            self._file_of.setdefault(name, paths[0])
        self._stored_name: dict[str, str] = {}
        if tied and _HEAD in self._file_of and _EMBEDDING not in self._file_of:
            # The one matrix is stored under the head's name, which transformers 5 reads too.
            self._file_of[_EMBEDDING] = self._file_of.pop(_HEAD)
            self._stored_name[_EMBEDDING] = _HEAD

    def tensor(self, name: str) -> Any:
        """Returns a lazily read tensor: get_shape(), get_dtype(), slicing."""
        return self._handles[self._file_of[name]].get_slice(self._stored_name.get(name, name))

    def read(self, name: str, index: Callable[[Any], np.ndarray], dtype: np.dtype) -> np.ndarray:
        """Returns index(tensor), a part of a tensor, in this dtype; UserError if a value is NaN or infinite."""
        value = index(self.tensor(name)).astype(dtype)
        if not np.isfinite(value).all():
            raise UserError(
                f"{self._file_of[name]}: tensor {name} has values that are NaN or infinite as {dtype.name}; download or"
                " export the weights again"
            )
        return value

    def tied(self, config: ModelConfig) -> bool:
        """Returns whether the head is the embedding: config.json says so, and no other head is stored.

        Some tied checkpoints store the embedding twice. If the two differ, config.json is wrong, as in transformers 5.
        """
        if not config.tie_embeddings or not {_HEAD, _EMBEDDING} <= self._file_of.keys():
            return config.tie_embeddings
        head, embedding = self.tensor(_HEAD), self.tensor(_EMBEDDING)
        shape = embedding.get_shape()
        bounds = [slice(r, min(r + _COMPARED_ROWS, shape[0])) for r in range(0, shape[0], _COMPARED_ROWS)]
        if head.get_shape() == shape and all(
            np.array_equal(head[rows].astype(np.float32), embedding[rows].astype(np.float32)) for rows in bounds
        ):
            return True
        logging.warning(
            "%s: config.json ties the head to the embedding, but %s differs from it; the stored head is used",
            self._file_of[_HEAD],
            _HEAD,
        )
        return False

    def check(self, table: list[Leaf], config: ModelConfig) -> None:
        """Raises UserError unless the files hold all of the model's tensors and nothing else."""
        unknown = set(self._file_of)
        for leaf in table:
            for name in _names(leaf, config.n_layers):
                if name not in self._file_of:
                    raise UserError(f"{self._where}: tensor {name} is missing; config.json asks for it")
                unknown.discard(name)
                shape, dtype = tuple(self.tensor(name).get_shape()), self.tensor(name).get_dtype()
                if shape != leaf.hub_shape:
                    raise UserError(
                        f"{self._file_of[name]}: tensor {name} has shape {list(shape)}, config.json means"
                        f" {list(leaf.hub_shape)}"
                    )
                if dtype not in _STORED_DTYPES:
                    raise UserError(
                        f"{self._file_of[name]}: tensor {name} is stored as {dtype}, not as a float of 16 or 32"
                    )
        if config.tie_embeddings:  # See `tied`.
            unknown.discard(_HEAD)
        for name in sorted(unknown):
            if not name.endswith(_IGNORED_SUFFIXES):
                raise UserError(
                    f"{self._file_of[name]}: tensor {name} has no place in the model that config.json states"
                )


def _names(leaf: Leaf, n_layers: int) -> list[str]:
    return [leaf.name.format(layer) for layer in range(n_layers)] if leaf.stacked else [leaf.name]


def _weight_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Returns the weight files, and each tensor's file as the index says; {} if there is a single file."""
    files = [_SINGLE]
    weight_map: dict[str, str] = {}
    if (folder / _INDEX).is_file() and not (folder / _SINGLE).is_file():  # As in transformers, the single file wins.
        weight_map = _read_json(folder / _INDEX).get("weight_map") or {}
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / _INDEX}: weight_map is missing; it names the file of every tensor")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file.endswith(".safetensors") or pathlib.PurePath(file).name != file:
                raise UserError(
                    f"{folder / _INDEX}: weight_map gives tensor {name} the file {json.dumps(file)}; it must be the"
                    " name of a safetensors file in this folder"
                )
        files = sorted(set(weight_map.values()))
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"{folder / file}: no such file; weights are read from safetensors only")
    return [folder / file for file in files], weight_map


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; a checkpoint is a hub folder with config.json and weights") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def resolve(path_or_id: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder of a path, a hub id (downloaded, or taken from the hub's cache) or "stylebook".

    Raises:
        UserError: there is no such folder and the hub does not provide it.
    """
    if path_or_id == "stylebook":
        return STYLEBOOK
    folder = pathlib.Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(path_or_id), allow_patterns=list(_DOWNLOADED)))
    except Exception as error:  # Validation, HTTP, connection and cache errors have no common base.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model {path_or_id}: no such folder, and the hub did not provide it ({reason}); give a hub folder's path"
            " (make smollm2 makes checkpoints/SmolLM2-135M-Instruct)"
        ) from error


def read_config(path: pathlib.Path, **options: Any) -> ModelConfig:
    """Reads the model that a hub folder's config.json describes.

    Args:
        path: the file.
        options: see ModelConfig.from_hub.

    Raises:
        UserError: the file is missing or broken, or the model is not supported.
    """
    if (adapter := path.with_name(_ADAPTER)).exists():  # transformers would load it on top of its base.
        raise UserError(
            f"{adapter}: an adapter is not a model; give its base model, and start a role from the"
            " adapter with config.lora.init_generator or .init_inference"
        )
    return ModelConfig.from_hub(_read_json(path), str(path), **options)


def fingerprint(folder: pathlib.Path) -> str:
    """Returns a sha256 over what config.json means and the bytes of the weight files."""
    digest = hashlib.sha256(repr(read_config(folder / "config.json")).encode())
    for path in _weight_files(folder)[0]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load(path_or_id: str | os.PathLike[str], mesh: jax.sharding.Mesh | None = None, **options: Any) -> Checkpoint:
    """Loads a hub folder, a hub id or "stylebook" and casts the parameters to frozen_dtype.

    Args:
        path_or_id: see resolve().
        mesh: the mesh to place the parameters on, following sharding.RULES; each process reads only the slices of its
            own devices. None puts everything on the default device.
        options: see ModelConfig.from_hub.

    Raises:
        UserError: a file is missing or broken, the architecture is not supported, or a tensor is missing, unexpected,
            of the wrong shape, not finite, or of a dtype other than float32, float16 and bfloat16.
    """
    folder = resolve(path_or_id)
    config = read_config(folder / "config.json", **options)
    weights = _Weights(folder, config.tie_embeddings)
    config = dataclasses.replace(config, tie_embeddings=weights.tied(config))
    table = leaves(config)
    weights.check(table, config)
    params: Params = {}
    policy = Policy(config)
    placed = policy.abstract_base()
    if mesh is not None:
        placed = policy.base_shardings(mesh)
    for leaf in table:
        place = None if mesh is None else _get(placed, leaf.path)
        _set(params, leaf.path, _load_leaf(weights, leaf, config, place))
    return Checkpoint(config, params, folder, fingerprint(folder))


def _load_leaf(weights: _Weights, leaf: Leaf, config: ModelConfig, place: jax.sharding.Sharding | None) -> jax.Array:
    shape = (config.n_layers, *leaf.shape) if leaf.stacked else leaf.shape
    dtype = jnp.dtype(config.frozen_dtype)

    def read(index: Any) -> np.ndarray:
        if not leaf.stacked:
            return weights.read(leaf.name, lambda tensor: leaf.from_hub(tensor, index), dtype)
        names = _names(leaf, config.n_layers)[index[0]]
        return np.stack([weights.read(name, lambda tensor: leaf.from_hub(tensor, index[1:]), dtype) for name in names])

    if place is None:
        return jax.device_put(read((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, place, read)


def save(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    tokenizer_path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    shard_bytes: int = 4 * 2**30,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes a hub folder that load(), transformers 4 and 5 and vLLM read alike.

    Args:
        folder: the folder; see `folders.new`.
        config: the model's shape.
        params: the full parameter tree (fuse an adapter first).
        tokenizer_path: a folder whose tokenizer files are copied, see `tokenizer_files.save`.
        dtype: dtype of the weights on disk. With float32, saving and loading float32 parameters is exact to the bit.
        shard_bytes: larger weights are split into several files with an index; one file at a time is in memory.
        texts: the names and texts of other files for the folder.
    """
    with folders.new(pathlib.Path(folder), texts) as scratch:
        ids = tokenizer_files.save(scratch, tokenizer_path)
        description = {**config.to_hub(), **ids, "torch_dtype": dtype}
        (scratch / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        _save_weights(scratch, config, params, jnp.dtype(dtype), shard_bytes)


def _save_weights(folder: pathlib.Path, config: ModelConfig, params: Params, dtype: np.dtype, shard_bytes: int) -> None:
    table = leaves(config)
    sizes = {name: math.prod(leaf.shape) * dtype.itemsize for leaf in table for name in _names(leaf, config.n_layers)}
    shards = _shards(sizes, shard_bytes)
    tensors = _hub_tensors(table, config.n_layers, params, dtype)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, file))
        # transformers requires the "format" entry.
        content = dict(itertools.islice(tensors, len(shard)))
        safetensors.numpy.save_file(content, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _hub_tensors(table: list[Leaf], n_layers: int, params: Params, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    for leaf in table:
        value = jax.device_get(_get(params, leaf.path))
        for name, one in zip(_names(leaf, n_layers), value if leaf.stacked else [value], strict=True):
            yield name, leaf.to_hub(one.astype(dtype))


def _shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Splits tensor names, in order, into groups of at most shard_bytes; a larger tensor gets its own group."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _get(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: Params, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
