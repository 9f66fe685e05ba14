"""The families of timm that are tested from ``compress`` to a compiled checkpoint, and what of each can shrink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mixrank.counting import count_parameters
from mixrank.coverage import left_alone
from mixrank.models import ModelSpec, compressible_linears, expose_qkv_, meta_model
from mixrank_bench.markdown import table


@dataclass(frozen=True)
class Family:
    """Models of one kind.

    Attributes:
        architecture: the one of timm's that is tested.
        small: arguments that make it small enough for a test.
        args: arguments without which it has nothing to compress.
        whole_graph: whether a compressed one compiles without a break.
    """

    architecture: str
    small: Mapping[str, Any]
    args: Mapping[str, Any] = field(default_factory=dict)
    whole_graph: bool = True


NARROW = {"depth": 1, "embed_dim": 192, "num_heads": 3}
FAMILIES = {
    "ViT": Family("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    "DeiT, distilled": Family("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}),
    "DeiT-III": Family("deit3_small_patch16_224", {"img_size": 32, "depth": 1}),
    "Swin": Family("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": [1, 1], "num_heads": [3, 6]}),
    "Swin v2": Family("swinv2_tiny_window8_256", {"img_size": 64, "depths": [1, 1], "num_heads": [3, 6]}),
    "BEiT": Family("beit_base_patch16_224", {"img_size": 32, **NARROW}),
    "EVA-02": Family("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1}),
    "CaiT": Family("cait_xxs24_224", {"img_size": 32, "depth": 1}),
    "XCiT": Family("xcit_nano_12_p16_224", {"img_size": 32, "depth": 1}),
    "CLIP": Family("vit_base_patch16_clip_224", {"img_size": 32, **NARROW}),
    "SigLIP": Family("vit_base_patch16_siglip_224", {"img_size": 32, **NARROW}),
    "DINOv2": Family("vit_small_patch14_dinov2", {"img_size": 28, "depth": 1}),
    "DINOv2 giant's SwiGLU": Family("vit_giant_patch14_dinov2", {"img_size": 28, **NARROW}),
    "MaxViT": Family("maxvit_rmlp_pico_rw_256", {"img_size": 64}, whole_graph=False),
    "ConvNeXt": Family("convnext_atto", {"depths": [1, 1, 1, 1]}, {"conv_mlp": False}, whole_graph=False),
    "MLP-Mixer": Family("mixer_s32_224", {"img_size": 64}),
}
CLASSES = 1000


@cache
def families() -> str:
    """Each family as timm builds it: parameters, the share that can be compressed, and what stays, by its kind."""
    lines = []
    for name, family in FAMILIES.items():
        model = meta_model(ModelSpec(family.architecture, {"num_classes": CLASSES, **family.args}))
        expose_qkv_(model)
        layers, total = compressible_linears(model), count_parameters(model)
        stays: dict[str, list[int]] = {}
        for module in left_alone(model):
            kind = module.reason.removeprefix("it is ").removeprefix("a ")
            stays.setdefault(kind if module.name else "positions and tokens", []).append(module.parameters)
        kinds = sorted(stays.items(), key=lambda kind: -sum(kind[1]))
        told = ", ".join(f"{kind} ({len(each)}: {100 * sum(each) / total:.1f} %)" for kind, each in kinds)
        share = 100 * sum(layer.weight.numel() for layer in layers.values()) / total
        lines.append((name, f"`{family.architecture}`", f"{total / 1e6:.1f}", len(layers), f"{share:.1f}", told))
    header = ("family", "tested as", "million parameters", "layers", "their share, %", "what stays (modules: share)")
    return table(header, lines)
