"""Compressed models for other runtimes: a ``torch.export`` program, ONNX, or the weights of the plain timm model.

Every file is loaded again and compared with the model before it gets its name.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mixrank.errors import InputError, is_out_of_memory
from mixrank.files import write_tensors
from mixrank.models import meta_model, model_spec, preprocessing
from mixrank.plain import merged, plain
from mixrank.uvc.shrink import remaining_blocks

_EXAMPLES = 2  # an exported batch of one image would be taken for a constant
_MAX_ONNX = 2 * 10**9  # bytes that one protocol buffer can hold


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: the file, and what it reads beside it.
        bytes: of all of them.
        error: the largest difference of a logit from the model's, on random images of the model's size; None where it
            could not be run here.
        scale: the largest logit of the model on these.
    """

    files: tuple[Path, ...]
    bytes: int
    error: float | None
    scale: float


def export_torch(
    model: nn.Module, path: Path | str, *, batch: int | None = None, keep_operators: bool = False
) -> Exported:
    """Write a ``torch.export`` program (``.pt2``), which ``torch.export.load`` reads without this library.

    Args:
        model: of timm, compressed or not, on the CPU; it is not changed.
        path: the file to write.
        batch: images of every call; None: any number.
        keep_operators: keep the operators of ``mixrank_kernels``, which has to be imported then, but is faster than the
            products of PyTorch.

    Raises:
        InputError: the model cannot be exported, the file cannot be written, or gives other outputs than the model.
    """
    path = Path(path)
    program = _program(model if keep_operators else plain(model), _images(model, batch), batch)
    with _placed(path) as temporary:
        torch.export.save(program, temporary)
        found = torch.export.load(temporary).module()
        error, scale = _compare(model, found, batch)
    return Exported((path,), path.stat().st_size, error, scale)


def export_onnx(model: nn.Module, path: Path | str, *, batch: int | None = None) -> Exported:
    """Write an ONNX file with standard operators only; above 2 GB with the weights in ``PATH.data`` beside it.

    Args:
        model: of timm, compressed or not, on the CPU; it is not changed.
        path: the file to write.
        batch: images of every call; None: any number.

    Raises:
        InputError: onnx and onnxscript are not installed, the model cannot be exported, the file cannot be written, or
            gives other outputs in ONNX Runtime, where that is installed, than the model.
    """
    path = Path(path)
    try:
        import onnx  # noqa: F401 (its absence is told here)
        import onnxscript  # noqa: F401
    except ImportError as absent:
        raise InputError(f"ONNX needs the package {absent.name}: pip install onnx onnxscript") from absent
    images = _images(model, batch)
    program = _program(plain(model), images, batch)
    apart = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values()) > _MAX_ONNX
    with _told("ONNX"), torch.no_grad():
        made = torch.onnx.export(program, (images,), dynamo=True, verbose=False)
    assert made is not None  # with dynamo
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # which module it was made from: more bytes than a node's weights of 8 bits
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        with _written(path):
            made.save(temporary, external_data=apart)
        error, scale = _compare(model, _onnx_runtime(temporary), batch)
        files = tuple(path.with_name(file.name) for file in sorted(Path(folder).iterdir(), reverse=True))
        for file in files:  # the weights first: the file that is asked for is there when all is
            os.replace(Path(folder) / file.name, file)
    return Exported(files, sum(file.stat().st_size for file in files), error, scale)


def export_dense(model: nn.Module, path: Path | str) -> Exported:
    """Write the weights of the plain timm model, factors multiplied out, a ``checkpoint_path`` for timm.

    Args:
        model: of timm, compressed or not; it is not changed.
        path: the safetensors file to write.

    Raises:
        InputError: blocks, heads, columns or neurons were removed, so that timm has no such model, or the file cannot
            be written.
    """
    path, spec = Path(path), model_spec(model)
    if remaining_blocks(model) is not None:
        raise InputError("the model was pruned: timm has no architecture of its shapes, so export it as ONNX or torch")
    dense = merged(model)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in dense.state_dict().items()}
    expected = meta_model(spec).state_dict()
    other = sorted(state.keys() ^ expected.keys())
    if other:
        raise InputError(f"the weights are not those of {spec.architecture}: {other[0]} is in one of them only")
    write_tensors(path, state, {"format": "pt", "architecture": spec.architecture})
    images = _images(model, None)
    found, wanted = _run(dense, images), _run(model, images)
    return Exported((path,), path.stat().st_size, (found - wanted).abs().max().item(), wanted.abs().max().item())


def _program(model: nn.Module, images: Tensor, batch: int | None) -> torch.export.ExportedProgram:
    """The program, without the lines of code behind each operation, which name folders of this machine."""
    shapes = ({0: torch.export.Dim("batch")} if batch is None else None,)
    with _told("torch.export"), torch.no_grad():
        program = torch.export.export(model.eval(), (images,), dynamic_shapes=shapes)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _images(model: nn.Module, batch: int | None, seed: int = 0) -> Tensor:
    size = preprocessing(model)["input_size"]
    return torch.randn(batch or _EXAMPLES, *size, generator=torch.Generator().manual_seed(seed))


def _run(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def _compare(
    model: nn.Module, found: Callable[[Tensor], Tensor] | None, batch: int | None
) -> tuple[float | None, float]:
    """Largest difference and largest value, on other images, and another number of them where that is free.

    Raises:
        InputError: they differ by more than rounding.
    """
    images = _images(model, batch or 3, seed=1)
    training = model.training
    wanted = _run(model.eval(), images)
    model.train(training)
    scale = wanted.abs().max().item()
    if found is None:
        return None, scale
    error = (_run(found, images) - wanted).abs().max().item()
    if not error <= 1e-2 * scale:  # roundings of 8-bit activations may differ; a wrong graph differs by more
        raise InputError(
            f"the exported model gives other outputs: they differ by {error:.3g}, the largest is {scale:.3g}"
        )
    return error, scale


def _onnx_runtime(path: Path) -> Callable[[Tensor], Tensor] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What an exporter trips over, in a sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # exporters raise what they like
        if is_out_of_memory(error):
            raise
        first = str(error).strip().splitlines()
        raise InputError(f"{what} cannot export the model: {first[0] if first else type(error).__name__}") from error


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place when all went well."""
    with _written(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)
