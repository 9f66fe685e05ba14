"""Checkpoints: one safetensors file whose header says how to build the model, so that loading needs no pickle."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixrank.apply import restructure_
from mixrank.attributes import note_
from mixrank.errors import InputError
from mixrank.files import write_tensors
from mixrank.models import (
    ModelSpec,
    check_shapes,
    check_spec,
    create_model,
    expose_qkv_,
    meta_model,
    model_spec,
    preprocessing,
)
from mixrank.nn_int8 import Int8PivotedLinear
from mixrank.nn_int8_sparse import Int8SparseLinear
from mixrank.nn_pivoted import PivotedLinear, check_index
from mixrank.nn_sparse import SparseLinear, check_mask
from mixrank.plan import Plan
from mixrank.prepare import check_preprocessing
from mixrank.quantize import quantized_layers, restructure_quantized_
from mixrank.uvc.shrink import RemainingBlock, remaining_blocks, restructure_pruned_
from mixrank_kernels import __version__

FORMAT = 4
"""The newest format that is read. Format 2 has quantised layers, format 3 pruned blocks, format 4 sparse layers; a file
without them is of the oldest format that can hold it."""
_KEY = "mixrank"
_MAX_HEADER_BYTES = 64 * 2**20
_MAX_PRUNED_DEPTH = 512
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_DTYPES |= {"BOOL": torch.bool}


class TensorInfo(NamedTuple):
    """What the header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself.

    Attributes:
        format: version of the file format.
        library_version: version of the library that wrote the file.
        architecture: timm's name.
        args: further arguments of ``timm.create_model``.
        preprocessing: see :func:`mixrank.models.preprocessing`.
        plan: the ranks, or None for a model that was not compressed.
        metadata: whatever :func:`save` was given.
        exposed_qkv: whether :func:`mixrank.models.expose_qkv_` was applied.
        buffer_dtypes: floating dtypes, other than fp32, of buffers that are not in the file but computed.
        quantization: the layers of 8-bit weights by name, and whether their input is quantised too.
        blocks: what pruning left of the blocks, or None where they are as they were built.
        tensors: dtype and shape by name.
    """

    format: int
    library_version: str
    architecture: str
    args: dict
    preprocessing: dict
    plan: Plan | None
    metadata: dict
    exposed_qkv: bool
    buffer_dtypes: dict[str, torch.dtype]
    quantization: dict[str, bool]
    blocks: tuple[RemainingBlock, ...] | None
    tensors: dict[str, TensorInfo]


def save(model: nn.Module, path: Path | str, *, plan: Plan | None = None, metadata: dict | None = None) -> None:
    """Write a model, compressed or not, to one file; equal models give equal bytes.

    The file appears whole or not at all, and an older file at the same place stays until then. What was written can
    be loaded: the header is checked against the model first. Tensors that share memory are written once for each name.

    Args:
        model: a timm model, with layers replaced as ``plan`` says; on any device.
        path: the file; its folder must exist.
        plan: default ``model.mixrank_plan``, which :func:`mixrank.apply_` sets.
        metadata: anything in terms of JSON.

    Raises:
        InputError: how to build the model is not known, it was changed in other ways than the plan says, the metadata
            is not JSON, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> model = create_model("vit_tiny_patch16_224", args={"img_size": 32, "depth": 1})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/model.safetensors")
        ...     print(read_header(f"{folder}/model.safetensors").plan)
        None
    """
    path = Path(path)
    plan = getattr(model, "mixrank_plan", None) if plan is None else plan
    spec = model_spec(model)
    state = model.state_dict()
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    quantization, blocks = quantized_layers(model), remaining_blocks(model)
    is_sparse = any(isinstance(module, SparseLinear | Int8SparseLinear) for module in model.modules())
    content = {
        "format": 4 if is_sparse else 3 if blocks is not None else 2 if quantization else 1,
        "library_version": __version__,
        "architecture": spec.architecture,
        "args": spec.args,
        "preprocessing": preprocessing(model),
        "plan": None if plan is None else plan.to_json(),
        "metadata": metadata or {},
        "exposed_qkv": _has_exposed_qkv(model),
        "buffer_dtypes": {
            name: str(buffer.dtype).removeprefix("torch.")
            for name, buffer in computed.items()
            if buffer.is_floating_point() and buffer.dtype != torch.float32
        },
    }
    if quantization:
        content["quantization"] = quantization
    if blocks is not None:
        content["blocks"] = [block.to_json() for block in blocks]
    try:
        text = json.dumps(content, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metadata and plan must be in terms of JSON: {error}") from error
    tensors = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    unknown = [name for name, info in tensors.items() if info.dtype not in _DTYPES.values()]
    if unknown:
        raise InputError(f"{unknown[0]} is {tensors[unknown[0]].dtype}, which a checkpoint cannot hold")
    _skeleton(_parse(text, tensors, path), "the model")
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: the folder {path.parent} does not exist")
    write_tensors(path, _unshared(state), {_KEY: text})


def _has_exposed_qkv(model: nn.Module) -> bool:
    return any(getattr(module, "qkv_bias_separate", False) for module in model.modules())


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and without shared memory, which safetensors does not write."""
    owners, tensors = set(), {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in owners or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        owners.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def load(path: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Read a checkpoint: a model in eval mode, in the dtypes that were saved, with every tensor as it was, bit for bit.

    So are the outputs, where the tensors that were saved were contiguous.

    Nothing of the file is executed, and memory for the model is taken only after its header fits the architecture
    in every tensor. The model carries ``mixrank_spec``, ``mixrank_plan`` and ``mixrank_preprocessing``.

    Args:
        path: what :func:`save` wrote.
        device: where the model goes.

    Returns:
        The model, with the layers that its plan gives it.

    Raises:
        InputError: there is no such file, it is broken or not a checkpoint, it was written by a newer version, it does
            not fit what it says it is, or there is no such device.

    Example:
        >>> import tempfile
        >>> model = create_model("vit_tiny_patch16_224", args={"img_size": 32, "depth": 1})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/model.safetensors")
        ...     same = load(f"{folder}/model.safetensors")
        >>> same.mixrank_spec == model.mixrank_spec
        True
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    header = read_header(path)
    _skeleton(header, f"{path}")
    with torch.random.fork_rng(devices=[]):  # the initial values are about to be replaced
        model = create_model(header.architecture, args=header.args)
        _prepare(model, header)
    buffers = dict(model.named_buffers())
    for name, dtype in header.buffer_dtypes.items():
        buffers[name].data = buffers[name].data.to(dtype)
    try:
        with safe_open(path, "pt") as file:
            for name, tensor in model.state_dict(keep_vars=True).items():
                # A copy, since the tensor is a view of the file, which someone may overwrite.
                tensor.data = file.get_tensor(name).clone()
        for name, module in model.named_modules():
            _check_places(module, name, path)
        return model.to(device).eval()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is broken: {error}") from error
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the model cannot be put on the device {device!r}: {error}") from error


def _check_places(layer: nn.Module, name: str, path: Path) -> None:
    """Raise InputError where a layer's index or mask, whose contents the header does not tell, is none."""
    try:
        if isinstance(layer, PivotedLinear | Int8PivotedLinear):
            check_index(layer.index, layer.rank)
        elif isinstance(layer, SparseLinear | Int8SparseLinear):
            check_mask(layer.mask, layer.in_features, layer.entries)
    except InputError as error:
        raise InputError(f"{path} is broken: layer {name}: {error}") from error


def read_header(path: Path | str) -> Header:
    """Read what a checkpoint says of itself, without its tensors.

    Raises:
        InputError: as :func:`load`, except for what shows only when the model is built.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} {'is a folder: name a file' if path.is_dir() else 'does not exist'}")
    try:
        with path.open("rb") as file:
            size, actual = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if actual < 8 + size or not 2 <= size <= _MAX_HEADER_BYTES:
                raise InputError(f"{path} is cut off or not a safetensors file")
            entries = json.loads(file.read(size))
            own = entries.pop("__metadata__", {})
            tensors = {name: _tensor_info(entry, actual - 8 - size) for name, entry in entries.items()}
            text = own.get(_KEY)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not text'}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is cut off or not a safetensors file") from error
    if not isinstance(text, str):
        raise InputError(f"{path} was not written by mixrank: its header has no {_KEY!r} entry")
    return _parse(text, tensors, path)


def _tensor_info(entry: dict, available: int) -> TensorInfo:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    whole = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
    if not whole or end > available or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError
    return TensorInfo(dtype, shape)


def _parse(text: str, tensors: dict[str, TensorInfo], path: Path) -> Header:
    """Check every field of the header by itself."""
    try:
        content = json.loads(text)
        version = content["format"]
        if type(version) is not int or version < 1:
            raise ValueError("its format is not a version number")
        if version > FORMAT:
            raise InputError(f"it has format {version}, newer than the {FORMAT} that this version of mixrank reads")
        header = Header(
            format=version,
            library_version=_typed(content, "library_version", str),
            architecture=_typed(content, "architecture", str),
            args=_typed(content, "args", dict),
            preprocessing=check_preprocessing(_typed(content, "preprocessing", dict)),
            plan=None if content["plan"] is None else Plan.from_json(_typed(content, "plan", dict)),
            metadata=_typed(content, "metadata", dict),
            exposed_qkv=_typed(content, "exposed_qkv", bool),
            buffer_dtypes={
                name: {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
                for name, dtype in _typed(content, "buffer_dtypes", dict).items()
            },
            quantization=_quantization(content) if version >= 2 else {},
            blocks=_blocks(content) if version == 3 or (version > 3 and "blocks" in content) else None,
            tensors=tensors,
        )
        check_spec(ModelSpec(header.architecture, header.args))
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} has a header that is not mixrank's: {error!r}") from error
    depths = [header.args.get("depth"), *_as_list(header.args.get("depths"))]
    # Each block has tensors of its own, unless it was removed; many more only keep the reader busy for ever.
    deepest = max((depth for depth in depths if isinstance(depth, int)), default=0)
    if deepest > max(len(tensors), 0 if header.blocks is None else _MAX_PRUNED_DEPTH):
        raise InputError(f"{path} does not fit {header.architecture}: {deepest} blocks, but {len(tensors)} tensors")
    return header


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _quantization(content: dict) -> dict[str, bool]:
    layers = _typed(content, "quantization", dict) if "quantization" in content else {}
    if not all(type(dynamic) is bool for dynamic in layers.values()):
        raise ValueError("quantization does not say for each layer whether its input is quantised")
    return layers


def _blocks(content: dict) -> tuple[RemainingBlock, ...]:
    return tuple(RemainingBlock.from_json(block) for block in _typed(content, "blocks", list))


def _typed(content: dict, key: str, kind: type) -> Any:
    if not isinstance(content[key], kind):
        raise ValueError(f"{key} is not a {kind.__name__}")
    return content[key]


def _skeleton(header: Header, source: str) -> None:
    """Raise InputError unless the header's model, built without memory, has exactly the header's tensors."""
    target = f"{header.architecture} with its plan" if header.plan is not None else header.architecture
    model = meta_model(ModelSpec(header.architecture, header.args))
    try:
        _prepare(model, header)
    except InputError as error:
        what = f"plan of {source} does" if header.blocks is None else f"blocks of {source} do"
        raise InputError(f"the {what} not fit {header.architecture}: {error}") from error
    state = model.state_dict()
    check_shapes(
        {name: info.shape for name, info in header.tensors.items()},
        {name: tensor.shape for name, tensor in state.items()},
        source,
        target,
    )
    # A scale of 8-bit codes is fp32, whatever the dtype of the rest.
    scales = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in header.quantization}
    for name, info in header.tensors.items():
        if name in scales and info.dtype != state[name].dtype:
            raise InputError(f"{source} does not fit {target}: {name} is {info.dtype} instead of {state[name].dtype}")
        fits = info.dtype.is_floating_point if state[name].is_floating_point() else info.dtype == state[name].dtype
        if not fits:
            raise InputError(f"{source} does not fit {target}: {name} is {info.dtype} instead of {state[name].dtype}")
    computed = {name for name, buffer in model.named_buffers() if name not in state and buffer.is_floating_point()}
    for name in header.buffer_dtypes:
        if name not in computed:
            raise InputError(f"{source} does not fit {target}: there is no computed buffer {name}")


def _prepare(model: nn.Module, header: Header) -> None:
    if header.exposed_qkv:
        expose_qkv_(model)
    if header.blocks is not None:
        restructure_pruned_(model, header.blocks)
    if header.plan is not None:
        restructure_(model, header.plan)
    if header.quantization:
        restructure_quantized_(model, header.quantization)
    note_(model, "mixrank_plan", header.plan)
    note_(model, "mixrank_preprocessing", header.preprocessing)
