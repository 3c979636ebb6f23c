"""Adapters as PEFT folders (adapter_config.json, adapter_model.safetensors): written for PEFT, and read from it.

An adapter of PEFT may give each module its own rank and alpha. Ours have one rank r and one scale alpha / r. So a
module of a smaller rank is padded, and its scale is multiplied into b: the function is the same.
"""

import hashlib
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from popi_jax.errors import UserError, first_line
from popi_jax.model import folders, tokenizer_files
from popi_jax.model.config import LORA_TARGETS, LoraConfig
from popi_jax.model.weights import Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULES = {name: f"{'mlp' if name in ('gate', 'up', 'down') else 'self_attn'}.{name}_proj" for name in LORA_TARGETS}
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MODULE = re.compile(r"model\.layers\.(\d+)\.(.+)")
_READ = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "peft_type")
# Settings that do not change what a trained adapter computes, or whose work is in its tensors.
_ASIDE = (
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config"
    " inference_mode layers_pattern loftq_config lora_dropout megatron_core peft_version"
    " qalora_group_size revision runtime_config task_type"
).split()
# The initializations that leave the base model's weights as they are. Others, such as PiSSA, change them, and their
# adapter belongs to weights that it does not have.
_INIT = (True, False, None, "gaussian", "orthogonal", "eva")


def save(
    folder: pathlib.Path,
    delta: Tree,
    settings: LoraConfig,
    base: str,
    tokenizer_path: str,
    texts: Mapping[str, str],
) -> None:
    """Writes an adapter as a folder that PEFT loads on top of its base model.

    Args:
        folder: see `folders.new`.
        delta: the adapter: a [layers, *in, r] and b [layers, r, *out] of each target.
        settings: its rank, alpha and targets.
        base: the path or hub id of the base model, for PEFT to find it.
        tokenizer_path: a folder whose tokenizer files are copied.
        texts: the names and texts of other files for the folder.
    """
    alpha = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(f"{name}_proj" for name in settings.targets),
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    tensors: dict[str, np.ndarray] = {}
    for target, adapter in delta["layers"].items():
        a, b = (np.asarray(jax.device_get(adapter[name]), np.float32) for name in "ab")
        for layer in range(len(a)):
            path = f"base_model.model.model.layers.{layer}.{_MODULES[target]}"
            # Copied, since safetensors writes a transposed view in its old order.
            tensors[f"{path}.lora_A.weight"] = a[layer].reshape(-1, settings.rank).T.copy()
            tensors[f"{path}.lora_B.weight"] = b[layer].reshape(settings.rank, -1).T.copy()
    with folders.new(folder, texts) as scratch:
        tokenizer_files.save(scratch, tokenizer_path)
        (scratch / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        safetensors.numpy.save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})


def fingerprint(folder: pathlib.Path) -> str:
    """Returns a sha256 over the adapter's settings and weights; UserError if a file is missing."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:
            raise UserError(f"{folder / name}: {_missing(error)}") from None
    return digest.hexdigest()


def load(folder: pathlib.Path, delta: Tree, settings: LoraConfig) -> Tree:
    """Returns `delta` with a PEFT adapter in it, which then computes what the adapter computes.

    Args:
        folder: the adapter's folder.
        delta: a fresh adapter of the run, as from `Policy.init_delta`. It stays where the adapter has nothing.
        settings: its rank, alpha and targets.

    Returns:
        float32 arrays on the host.

    Raises:
        UserError: a file is missing or broken, the adapter is of a kind that is not read, or it does not fit `settings`
            or the model. The line names the file and the remedy.
    """
    where = folder / CONFIG
    described = _read_config(where)
    layers = {
        target: {name: np.array(jax.device_get(value), np.float32) for name, value in adapter.items()}
        for target, adapter in delta["layers"].items()
    }
    n_layers = len(next(iter(layers.values()))["a"])
    modules = {f"model.layers.{layer}.{path}" for path in _MODULES.values() for layer in range(n_layers)}
    found = _read_tensors(folder / WEIGHTS)
    targets = _target(described, where)
    for path in sorted(modules | found.keys()):
        aimed = targets(path)
        if path in found and not aimed:
            raise UserError(
                f"{folder / WEIGHTS}: has {path}, which target_modules of {CONFIG} does not name; add it there"
            )
        if not aimed:
            continue
        if path not in modules:
            raise UserError(
                f"{where}: target_modules name {path}; only q, k, v, o, gate, up and down of the model's"
                f" {n_layers} layers can have adapters here"
            )
        if path not in found:
            raise UserError(f"{folder / WEIGHTS}: has no adapter of {path}, which target_modules of {CONFIG} names")
        matched = _MODULE.fullmatch(path)
        assert matched is not None
        target = next(name for name, module in _MODULES.items() if module == matched[2])
        if target not in layers:
            raise UserError(f"{folder}: adapts {target}, which config.lora.targets lacks; add it")
        _insert(layers[target], int(matched[1]), found[path], path, described, settings, where)
    return {"layers": layers}


def _insert(
    own: Mapping[str, np.ndarray],
    layer: int,
    tensors: Mapping[str, np.ndarray],
    path: str,
    described: Mapping[str, Any],
    settings: LoraConfig,
    where: pathlib.Path,
) -> None:
    rank = _of_pattern(described, "rank_pattern", path, described["r"], where)
    alpha = _of_pattern(described, "alpha_pattern", path, described["lora_alpha"], where)
    scale = alpha / (math.sqrt(rank) if described["use_rslora"] else rank)
    if rank > settings.rank:
        raise UserError(f"{where}: {path} has rank {rank}, but config.lora.rank is {settings.rank}; raise it")
    a, b = own["a"][layer], own["b"][layer]
    into, out = a.size // settings.rank, b.size // settings.rank
    for name, shape in (("A", (rank, into)), ("B", (out, rank))):
        if tensors[name].shape != shape:
            raise UserError(
                f"{where.parent / WEIGHTS}: lora_{name} of {path} has shape {list(tensors[name].shape)}; rank {rank}"
                f" and this model mean {list(shape)}"
            )
    # Beyond the adapter's rank, a stays as drawn and b zero, so that training can use these dimensions, too.
    flat_a, flat_b = a.reshape(into, settings.rank), b.reshape(settings.rank, out)
    flat_a[:, :rank] = tensors["A"].T
    flat_b[:rank] = tensors["B"].T * (scale / settings.scale)


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    """Returns the settings of an adapter, with PEFT's defaults; UserError for a kind that is not read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {_missing(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({first_line(error)})") from None
    if not isinstance(value, dict) or value.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is not LORA; only LoRA adapters are read")
    init = value.get("init_lora_weights", True)
    if init not in _INIT:
        raise UserError(
            f"{path}: init_lora_weights is {json.dumps(init)[:60]}, whose adapter may belong to another base; convert"
            " it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, setting in value.items():
        off = setting in (None, False, [], {}, "none", 0)
        if key not in (*_READ, *_ASIDE, "init_lora_weights", "bias") and not off or key == "bias" and setting != "none":
            raise UserError(f"{path}: {key} is {json.dumps(setting)[:60]}; adapters with it are not read")
    described = {"r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}} | value
    for key, valid, kind in (
        ("r", type(described["r"]) is int and described["r"] > 0, "a whole number above 0"),
        ("lora_alpha", _is_number(described["lora_alpha"]), "a number"),
        ("use_rslora", isinstance(described["use_rslora"], bool), "true or false"),
    ):
        if not valid:
            raise UserError(f"{path}: {key} is {json.dumps(described[key])[:60]}; it must be {kind}")
    return described


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _of_pattern(described: Mapping[str, Any], key: str, path: str, default: Any, where: pathlib.Path) -> Any:
    """Returns the value of the first pattern that the module's path ends with, as PEFT does; else the default."""
    patterns = described[key] or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{where}: {key} must be an object")
    for pattern, value in patterns.items():
        if _matches(rf"(.*\.)?({pattern})$", path, key, where):
            if not _is_number(value) or value <= 0 or key == "rank_pattern" and type(value) is not int:
                raise UserError(f"{where}: {key} of {pattern!r} is {json.dumps(value)[:60]}; it must be above 0")
            return value
    return default


def _target(described: Mapping[str, Any], where: pathlib.Path) -> Any:
    """Returns the function that says whether target_modules names a module."""
    named = described.get("target_modules")
    if named == "all-linear":
        return lambda path: not path.endswith(("lm_head", "embed_tokens"))
    if isinstance(named, str):
        return lambda path: _matches(rf"(?:{named})\Z", path, "target_modules", where)
    if isinstance(named, Sequence) and named and all(isinstance(one, str) for one in named):
        return lambda path: any(path == one or path.endswith(f".{one}") for one in named)
    raise UserError(f"{where}: target_modules is {json.dumps(named)[:60]}; it must name the adapted modules")


def _matches(pattern: str, path: str, key: str, where: pathlib.Path) -> bool:
    try:
        return re.match(pattern, path) is not None
    except re.error as error:
        raise UserError(f"{where}: {key}: {first_line(error)}; correct the pattern") from None


def _read_tensors(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns A and B of each module, in float32."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in _tensors(path):
        matched = _TENSOR.fullmatch(name)
        if matched is None:
            raise UserError(f"{path}: tensor {name} is not an adapter's A or B; such adapters are not read")
        if (
            value.dtype.name not in ("float32", "float16", "bfloat16")
            or not np.isfinite(value.astype(np.float32)).all()
        ):
            raise UserError(f"{path}: tensor {name} is not of finite floats of 16 or 32 bits; save the adapter again")
        found.setdefault(matched[1], {})[matched[2]] = value.astype(np.float32)
    for module, tensors in found.items():
        if len(tensors) < 2:
            raise UserError(f"{path}: {module} has lora_{next(iter(tensors))} alone; save the adapter again")
    return found


def _tensors(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; adapters are read from safetensors only")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except UserError:
        raise
    except Exception as error:  # Besides its own errors, safetensors raises those of its memory map.
        raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def _missing(error: OSError) -> str:
    return f"{(error.strerror or 'cannot be read').lower()}; give the folder that PEFT's save_pretrained wrote"
