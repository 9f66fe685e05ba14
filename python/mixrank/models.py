"""Everything that is known of timm: building its models, finding their linear layers."""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mixrank.attributes import class_count, note_
from mixrank.errors import InputError, first_line, is_out_of_memory
from mixrank.nn import LowRankLinear, SplitLinear
from mixrank.nn_int8 import Int8Layer

# Decided by this library, or a way for a file's header to reach the network, the disk or a pickle.
_RESERVED_ARGS = (
    "model_name",
    "pretrained",
    "pretrained_cfg",
    "checkpoint_path",
    "cache_dir",
    "device",
    "dtype",
    "features_only",
    "pruned",
)

CLASSIFIER = "it is the classifier"
"""Why :func:`skipped_linears` leaves a classifier alone, which quantisation does not."""

_REPLACEMENTS = (LowRankLinear, SplitLinear, Int8Layer)


@dataclass(frozen=True)
class ModelSpec:
    """How to build a model again: a timm architecture and the keyword arguments of ``timm.create_model``.

    Attributes:
        architecture: a name of timm's registry, with its pretrained tag or without.
        args: in terms of JSON.
    """

    architecture: str
    args: dict = field(default_factory=dict)


def create_model(
    architecture: str, *, pretrained: bool = False, weights: Path | str | None = None, args: dict | None = None
) -> nn.Module:
    """Build a timm model in eval mode, in fp32 on the CPU, and note its :class:`ModelSpec` in ``mixrank_spec``.

    Args:
        architecture: a name of timm's registry such as ``"deit_small_patch16_224"``.
        pretrained: let timm download the weights.
        weights: a state dict with timm's names, ``.safetensors`` or a ``torch.save`` file that holds only tensors
            (also under one key ``"model"`` or ``"state_dict"``).
        args: further arguments of ``timm.create_model`` in terms of JSON, such as ``{"num_classes": 10}``.

    Returns:
        The model; with random weights, where neither ``pretrained`` nor ``weights`` is given.

    Raises:
        InputError: the name is unknown, timm refuses the arguments, the download fails, or the file cannot be read
            or does not fit the model in every name and shape.

    Example:
        >>> create_model("vit_tiny_patch16_224", args={"img_size": 32, "depth": 1, "num_classes": 10}).num_classes
        10
    """
    spec = check_spec(ModelSpec(architecture, args or {}))
    if pretrained and weights is not None:
        raise InputError("pretrained and weights were both given, but the weights can come from one place only")
    if pretrained:
        meta_model(spec)  # so that what fails below is the download, not an argument
    model = _build(spec, pretrained)
    if weights is not None:
        state = _read_state(Path(weights))
        expected = model.state_dict()
        check_shapes(_shapes(state), _shapes(expected), f"{weights}", architecture)
        codes = [name for name in state if state[name].is_floating_point() != expected[name].is_floating_point()]
        if codes:
            raise InputError(f"{weights} holds {codes[0]} as {state[codes[0]].dtype}, not {expected[codes[0]].dtype}")
        model.load_state_dict(state)
    note_(model, "mixrank_spec", spec)
    return model.eval()


def meta_model(spec: ModelSpec) -> nn.Module:
    """Build the model without memory for its tensors: to look at names and shapes.

    Raises:
        InputError: as :func:`create_model`.
    """
    with torch.device("meta"):
        return _build(check_spec(spec), pretrained=False).eval()


def _build(spec: ModelSpec, pretrained: bool) -> nn.Module:
    import timm

    try:
        return timm.create_model(spec.architecture, pretrained=pretrained, **spec.args)
    except Exception as error:  # whatever the model's constructor or the download happens to trip over
        if is_out_of_memory(error):
            raise
        if pretrained:
            raise InputError(
                f"the pretrained weights of {spec.architecture} cannot be had ({first_line(error)}); "
                "give a file with weights (--weights FILE) instead"
            ) from error
        raise InputError(
            f"timm cannot build {spec.architecture} with the arguments {json.dumps(spec.args)}: {first_line(error)}"
        ) from error


def check_spec(spec: ModelSpec) -> ModelSpec:
    """Return the spec with its arguments in terms of JSON.

    Raises:
        InputError: the architecture is not one of timm's (it says which names are close), or an argument is reserved
            or not JSON.
    """
    import timm

    known = isinstance(spec.architecture, str) and timm.is_model(spec.architecture.partition(".")[0])
    if not known:
        names = timm.list_models() if isinstance(spec.architecture, str) else []
        close = difflib.get_close_matches(str(spec.architecture), names, n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names those there are"
        raise InputError(f"{spec.architecture!r} is not an architecture of timm; {hint}")
    if not isinstance(spec.args, dict):
        raise InputError(f"the arguments of {spec.architecture} must be a JSON object, but were {spec.args!r}")
    for name in _RESERVED_ARGS:
        if name in spec.args:
            raise InputError(f"{name!r} cannot be among the arguments of {spec.architecture}: mixrank decides it")
    try:
        args = json.loads(json.dumps(spec.args, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the arguments of {spec.architecture} must be in terms of JSON: {error}") from error
    return ModelSpec(spec.architecture, args)


def model_spec(model: nn.Module) -> ModelSpec:
    """Return how to build the model again: ``model.mixrank_spec``, or what timm noted, checked against every shape.

    Raises:
        InputError: the model is not timm's, was built with arguments that JSON cannot hold, or was changed since.
    """
    noted = getattr(model, "mixrank_spec", None)
    if noted is not None:
        return noted
    advice = "create it with mixrank.models.create_model, or set model.mixrank_spec to its ModelSpec"
    cfg = getattr(model, "pretrained_cfg", None) or {}
    architecture = cfg.get("architecture")
    if not architecture:
        raise InputError(f"{type(model).__name__} does not say which timm architecture it is; {advice}")
    if cfg.get("tag"):
        architecture += f".{cfg['tag']}"
    args = getattr(model, "_model_args", {}) | _visible_args(model, cfg)
    try:
        spec = check_spec(ModelSpec(architecture, args))
        check_shapes(_merged_shapes(model), _merged_shapes(meta_model(spec)), "the model", architecture)
    except InputError as error:
        raise InputError(f"{architecture} with {args} does not build this model again ({error}); {advice}") from error
    return spec


def _visible_args(model: nn.Module, cfg: dict) -> dict:
    """Those of timm's arguments that can be read off a model, where they differ from the architecture's own."""
    channels, height, width = _input_size(model)
    found: dict[str, int | list[int]] = {}
    default = cfg.get("input_size", (3, 224, 224))
    if getattr(model, "num_classes", None) not in (None, cfg.get("num_classes", 1000)):
        found["num_classes"] = class_count(model)
    if channels != default[0]:
        found["in_chans"] = channels
    if (height, width) != tuple(default[1:]):
        found["img_size"] = height if height == width else [height, width]
    return found


def _merged_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The state dict's names and shapes as they were before layers were factored or split, without biases."""
    shapes = _shapes(model.state_dict())
    replaced: list[str] = []
    for name, module in model.named_modules():
        replaces = isinstance(module, _REPLACEMENTS)
        if replaces and not any(name.startswith(f"{n}.") for n in replaced):
            replaced.append(name)
            shapes = {key: shape for key, shape in shapes.items() if not key.startswith(f"{name}.")}
            shapes[f"{name}.weight"] = torch.Size([module.out_features, module.in_features])
    # A factored layer may have gained a bias, the correction of the mean, that the original does not have.
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {key: shape for key, shape in shapes.items() if key.removesuffix(".bias") not in linears}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def check_shapes(given: dict, expected: dict, source: str, target: str) -> None:
    """Raise InputError, with counts and the first misfit of each kind, unless names and shapes are the same."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    wrong = [name for name in expected if name in given and tuple(given[name]) != tuple(expected[name])]
    found = []
    if missing:
        found.append(f"{len(missing)} missing (first: {missing[0]})")
    if unexpected:
        found.append(f"{len(unexpected)} unexpected (first: {unexpected[0]})")
    if wrong:
        sizes = f"{list(given[wrong[0]])} instead of {list(expected[wrong[0]])}"
        found.append(f"{len(wrong)} of another shape (first: {wrong[0]}, {sizes})")
    if found:
        raise InputError(f"{source} does not fit {target}: of {len(expected)} tensors, {', '.join(found)}")


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"weights {path} {'is a folder' if path.is_dir() else 'does not exist'}: name a file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                if "mixrank" in (file.metadata() or {}):
                    raise InputError(f"{path} is a mixrank checkpoint: open it with mixrank.load")
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read as safetensors: {first_line(error)}") from error
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise InputError(f"weights {path} must end in .safetensors, .pth, .pt or .bin")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can fail in as many ways as there are bytes
        raise InputError(f"{path} cannot be read as a torch file that holds only tensors") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path} does not hold a state dict: tensors by name")
    return state


def twin(model: nn.Module) -> nn.Module:
    """A copy whose modules can be replaced, with the very parameters and buffers of the model."""
    return copy.deepcopy(model, {id(each): each for each in (*model.parameters(), *model.buffers())})


def compressible_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that can be replaced, by name and in the model's order: all but :func:`skipped_linears`.

    Layers that are already factored or sparse are not among them; dense parts of a :class:`mixrank.nn.SplitLinear` are.
    """
    skipped = skipped_linears(model)
    return {name: linear for name, linear in _linears(model).items() if name not in skipped}


def skipped_linears(model: nn.Module) -> dict[str, str]:
    """Return why each of the other linear layers is left alone, by name."""
    heads = getattr(model, "get_classifier", lambda: None)()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    in_heads = {module for head in heads if isinstance(head, nn.Module) for module in head.modules()}
    linears = _linears(model)
    uses: dict[int, int] = {}
    for linear in linears.values():
        uses[id(linear.weight)] = uses.get(id(linear.weight), 0) + 1
    reasons = {}
    for name, linear in linears.items():
        if linear in in_heads:
            reasons[name] = CLASSIFIER
        # A subclass promises more than a linear map: nn.MultiheadAttention reads its out_proj's weight directly.
        elif type(linear) is not nn.Linear:
            reasons[name] = f"it is a {type(linear).__name__}, not a plain nn.Linear"
        elif uses[id(linear.weight)] > 1:
            reasons[name] = "it shares its weight with another layer"
        elif name.rpartition(".")[2] == "qkv" and _hides_qkv(model.get_submodule(name.rpartition(".")[0])):
            reasons[name] = "its attention reads the weight directly (mixrank.models.expose_qkv_ changes that)"
    return reasons


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def _hides_qkv(attention: nn.Module) -> bool:
    """Whether a forward as in timm's BEiT, EVA and Swin v2 calls F.linear on the weight of qkv, not the module."""
    separate = getattr(attention, "qkv_bias_separate", True)
    return getattr(attention, "q_bias", None) is not None and not separate


def expose_qkv_(model: nn.Module) -> tuple[str, ...]:
    """Let the attention of BEiT, EVA and Swin v2 call its qkv layer and add the bias after, so that it can be replaced.

    The same function up to rounding; the names and shapes of the state dict stay.

    Returns:
        The names of the layers that can be replaced now and could not before.
    """
    exposed = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and _hides_qkv(module):
            note_(module, "qkv_bias_separate", True)
            exposed.append(f"{name}.qkv")
    return tuple(exposed)


def hide_qkv_(model: nn.Module, names: tuple[str, ...]) -> None:
    """Undo :func:`expose_qkv_` for the layers that it named."""
    for name in names:
        note_(model.get_submodule(name.rpartition(".")[0]), "qkv_bias_separate", False)


def split_qkv_(model: nn.Module) -> tuple[str, ...]:
    """Hold every replaceable fused ``qkv`` as three layers, in place, so that q, k and v get ranks of their own.

    Returns:
        The names of the layers that became :class:`mixrank.nn.SplitLinear`.
    """
    names = []
    for name, linear in compressible_linears(model).items():
        owner, _, last = name.rpartition(".")
        if last == "qkv" and linear.out_features % 3 == 0:
            setattr(model.get_submodule(owner), last, SplitLinear.from_linear(linear, 3))
            names.append(name)
    return tuple(names)


def preprocessing(model: nn.Module) -> dict:
    """Return how the model wants its images, in terms of JSON.

    Returns:
        ``input_size`` [C, H, W], ``interpolation``, ``mean`` and ``std`` (one number a channel), ``crop_pct`` and
        ``crop_mode``, as ``timm.data.create_transform`` takes them.

    Raises:
        InputError: the model does not carry timm's configuration.
    """
    noted = getattr(model, "mixrank_preprocessing", None)
    if noted is not None:
        return dict(noted)
    if not getattr(model, "pretrained_cfg", None):
        raise InputError(f"{type(model).__name__} does not say how its images are prepared, as models of timm do")
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    size = _input_size(model)
    for key in ("mean", "std"):
        values = [float(value) for value in config[key]]
        # timm keeps the colour statistics for grey models; their average is what a grey image of the same set has.
        config[key] = values if len(values) == size[0] else [sum(values) / len(values)] * size[0]
    keys = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {"input_size": list(size)} | {key: config[key] for key in keys}


def _input_size(model: nn.Module) -> tuple[int, ...]:
    """[C, H, W] of the model as it was built, where timm's configuration says how the architecture was trained."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    channels = next((first.in_channels for first in convolutions), channels)
    owners = (getattr(model, "patch_embed", None), getattr(model, "stem", None), model)
    sizes = (getattr(owner, "img_size", None) for owner in owners)
    return tuple(map(int, (channels, *next((size for size in sizes if size is not None), (height, width)))))
