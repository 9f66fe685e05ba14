"""What a model costs: its parameters, the bytes of its tensors, its multiply-accumulate operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixrank.errors import InputError, first_line
from mixrank.models import preprocessing
from mixrank.nn_int8_sparse import Int8SparseLinear
from mixrank.nn_sparse import SparseLinear


def count_parameters(model: nn.Module) -> int:
    """Return the number of all parameters, shared ones once.

    Where the entries of a :class:`mixrank.SparseLinear` stand has to be stored too: its mask, which is a buffer, counts
    as the numbers of 32 bits that it takes, ``ceil(N ceil(K / 8) / 4)``, whatever the entries are stored in.
    """
    sparse = (layer for layer in model.modules() if isinstance(layer, SparseLinear | Int8SparseLinear))
    masks = {id(layer.mask): layer.places for layer in sparse}
    return sum(parameter.numel() for parameter in model.parameters()) + sum(masks.values())


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and persistent buffers, shared ones once: the tensors of a checkpoint."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def count_macs(model: nn.Module) -> int:
    """Return the multiply-accumulate operations of one image, without running the model.

    Counted are matrix products and convolutions: linear layers (factored ones as ``M * R * (K + N)``, and M for each
    entry of a sparse one), patch embedding, and the two products of attention. Not counted are biases, normalisation,
    softmax, activations, sums.

    Raises:
        InputError: the forward pass cannot be traced on a zero image of the model's input size.
    """
    from mixrank_kernels.flops import FlopCounterMode

    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    # Tensors without memory: fast for any size of model, and attention is always counted, since the formula of
    # the fused kernel that a real device would pick is missing for some devices.
    hollow = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    dtype = next((tensor.dtype for tensor in hollow.values() if tensor.is_floating_point()), torch.float32)
    image = torch.zeros(1, *preprocessing(model)["input_size"], device="meta", dtype=dtype)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.func.functional_call(model, hollow, (image,))
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise InputError(f"the operations of {type(model).__name__} cannot be counted: {first_line(error)}") from error
    finally:
        for module, mode in training.items():
            module.training = mode
    return counter.get_total_flops() // 2


def tokens_per_layer(model: nn.Module) -> dict[str, int]:
    """How many rows one image sends through every linear layer, found by one forward pass over an empty image."""
    rows: dict[str, int] = {}

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
            rows[name] = rows.get(name, 0) + arguments[0].numel() // arguments[0].shape[-1]

        return hook

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_hook(count(name)) for name, module in linears.items()]
    training = model.training
    parameter = next(model.parameters())
    try:
        with torch.inference_mode():
            size = preprocessing(model)["input_size"]
            model.eval()(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: rows.get(name, 0) for name in linears}
