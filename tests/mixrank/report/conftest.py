"""Results as the commands write them with ``--json``, made without running these."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from mixrank.allocate import allocate
from mixrank.compress import layer_reports
from mixrank.decompose import decompose

STRATEGIES = ("svd", "svd-uniform", "aware", "aware-pivoted", "sensitivity", "default")


class Blocks(nn.Module):
    """Linear layers with the names of a vision transformer."""

    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        sizes = {"qkv": (32, 96), "proj": (32, 32), "fc1": (32, 64), "fc2": (64, 32)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(depth)
        )


def summary(parameters: int, top1: float | None, rate: float | None) -> dict[str, Any]:
    return {
        "top1": top1,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "macs": 50 * parameters,
        "images_per_second": rate,
    }


def compressed(keep: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Blocks()
    factorisations = decompose(model, factors="svd")
    plan = allocate(model, factorisations, keep=keep, step=4)
    layers = [
        report.__dict__
        | {"relative_error": 0.1, "held_out_error": 0.1234, "output_energy_kept": report.weight_energy_kept}
        for report in layer_reports(plan, factorisations)
    ]
    return {
        "compressed": summary(plan.parameters_after, 80.0 + keep, 150.0),
        "plan": plan.to_json(),
        "layers": layers,
    }


@pytest.fixture(scope="session")
def single() -> dict[str, Any]:
    made = compressed(0.6)
    return {
        "command": "compress",
        "model": {"architecture": "some_vit", "args": {"img_size": 28}},
        "dense": summary(made["plan"]["parameters_before"], 82.5, 100.0),
        **made,
        "options": {"model": "some_vit", "images": "a folder", "keep": 0.6, "centre": False, "strict": False}
        | {"sensitivity_images": 48, "model_args": '{"img_size":28,"patch_size":4,"embed_dim":64,"num_heads":4}'},
        "versions": {"torch": "2.11"},
        "times": {"calibrate": 1.234},
        "left_alone": [{"name": "patch_embed.proj", "parameters": 3136, "reason": "it is a Conv2d"}],
        "images": {"calibration": 12, "calibration_skipped": ["x.png: truncated"]},
        "speed": {
            name: {"images_per_second": rate, "low": rate - 5, "high": rate + 5, "rounds": 5, "batch": 8, "threads": 2}
            for name, rate in (("dense", 100.0), ("compressed", 150.0))
        },
    }


@pytest.fixture(scope="session")
def several(single: dict[str, Any]) -> dict[str, Any]:
    results = [compressed(keep) | {"label": f"keep {keep:g}"} for keep in (0.7, 0.6, 0.5)]
    return {key: value for key, value in single.items() if key not in ("compressed", "plan", "layers")} | {
        "command": "demo",
        "results": results,
    }


@pytest.fixture(scope="session")
def swept(single: dict[str, Any]) -> dict[str, Any]:
    """Strategies at two budgets, as a sweep writes them."""
    rows = []
    for number, strategy in enumerate(STRATEGIES):
        for keep in (0.6, 0.5):
            made = compressed(keep)
            rows.append(
                {
                    "strategy": strategy,
                    "keep": keep,
                    "options": {},
                    "compressed": made["compressed"] | {"images_per_second": None},
                    "fidelity": {"divergence": 0.1 + number / 10, "agreement": 70 + 100 * keep / 3, "images": 9},
                    "plan": made["plan"],
                    "seconds": {"calibrate": 1.0, "evaluate": 2.0},
                    "compressing": 1.0,
                }
            )
    return {key: single[key] for key in ("model", "versions", "times")} | {
        "command": "sweep",
        "dense": single["dense"] | {"images_per_second": None},
        "rows": rows,
        "options": {"model": "some_vit", "keep": [0.6, 0.5], "strategy": None},
        "images": {"calibration": 12, "evaluation": 9, "calibration_skipped": [], "evaluation_skipped": []},
    }


@pytest.fixture(scope="session")
def trained(single: dict[str, Any]) -> dict[str, Any]:
    """A training of six steps with three looks, the second of which was the best."""
    looks = [(2, 0.5, 60.0), (4, 0.25, 80.0), (6, 0.3, 70.0)]
    history = [{"step": step, "divergence": kl, "agreement": same, "loss": 1.0} for step, kl, same in looks]
    fidelity = {"before": (1.0, 40.0), "after": (0.25, 80.0)}
    result = {name: {"divergence": kl, "agreement": same, "images": 5} for name, (kl, same) in fidelity.items()} | {
        "history": history,
        "steps": 6,
        "best_step": 4,
    }
    data = {key: value for key, value in single.items() if key not in ("layers", "speed")}
    return data | {"command": "compensate", "options": {"file": "a.safetensors", "steps": 6}, "compensation": result}


@pytest.fixture(scope="session")
def pruned(single: dict[str, Any]) -> dict[str, Any]:
    """A search of sixty updates in twelve blocks, one of which went, and a training, as ``mixrank uvc`` writes them."""
    history = [
        {
            "step": step,
            "target": max(0.5, 1 - step / 80),
            "remaining": 0.5 + 0.5 * math.exp(-step / 25),
            "pressure": step / 60,
            "multipliers": {"heads": [step / 90] * 12, "columns": [step / 70] * 12, "neurons": [step / 110] * 12},
            "keep": [1 - (block == 7) * step / 60 - 0.01 * block * (step > 30) for block in range(12)],
        }
        for step in range(60)
    ]
    result = {
        "macs_before": 4_600_000,
        "macs_after": 2_300_000,
        "removed": {"blocks": 400_000, "heads": 300_000, "columns": 500_000, "neurons": 1_100_000},
        "before": 80.0,
        "landed": 61.5,
        "after": 78.25,
        "history": history,
        "blocks": [{"index": block, "columns": [12] * 4, "neurons": 96} for block in range(12) if block != 7],
    }
    kept = {key: single[key] for key in ("model", "dense", "versions", "times", "images", "left_alone", "speed")}
    options = {"model": "some_vit", "images": "a folder", "budget": 0.5, "epochs": 30}
    return kept | {
        "command": "uvc",
        "compressed": summary(single["dense"]["parameters"] // 2, 78.25, 170.0),
        "options": options,
        "result": result,
    }
