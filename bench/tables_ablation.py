"""Every switch of the method by itself, on both models: the table of docs/accuracy.md."""

from __future__ import annotations

from mixrank_bench import ablation
from mixrank_bench.ablation_variants import BASE, VARIANTS
from mixrank_bench.environment import read
from mixrank_bench.markdown import conditions, table

MODELS = {"vit_b16": "ViT-B/16", "fashion": "ViT-tiny"}
NO_RUN = "No run has been recorded yet.\n"


def switches() -> str:
    """One line for each variant: the divergence on both models, relative to the reference's, and the agreement."""
    rows = read(ablation.OUT)
    if not rows:
        return NO_RUN
    latest = {(row["model"], row["switch"], row["value"]): row for row in rows}
    present = [name for name in MODELS if any(model == name for model, *_ in latest)]
    order = sorted({variant.switch: None for variant in VARIANTS}, key=_first)
    lines = []
    for variant in sorted(VARIANTS, key=lambda one: order.index(one.switch)):
        found = {name: latest.get((name, variant.switch, variant.value)) for name in present}
        if any(found.values()):
            cells = (cell for name in present for cell in _cells(found[name], latest[name, BASE.switch, ""]))
            lines.append((variant.switch, variant.value, *cells))
    header = ["switch", "set to"]
    for name in present:
        keep = latest[name, BASE.switch, ""]["keep"]
        header += [f"{MODELS[name]}, keep {keep}: KL, nats", "times the reference's", "agreement, %"]
    last = {row["model"]: row for row in rows}
    return table(header, lines) + "\n" + "\n".join(f"{MODELS[name]}: {conditions(last[name])}" for name in present)


def by_heart() -> str:
    """The divergence on images that the factors were made from beside that on others, by the number of the former."""
    rows = [row for row in read(ablation.OUT) if "kl_seen" in row]
    latest = {(row["model"], row["calibration"]): row for row in rows}
    lines = [
        (
            MODELS[model],
            str(row["keep"]),
            str(count),
            f"{row['kl_seen']:.3g}",
            f"{row['kl']:.3g}",
            f"{row['agreement']:.1f}",
        )
        for (model, count), row in sorted(latest.items(), key=lambda item: (list(MODELS).index(item[0][0]), item[0][1]))
    ]
    if not lines:
        return NO_RUN
    header = ["model", "keep", "images", "KL on these, nats", "KL on others, nats", "agreement on others, %"]
    return table(header, lines) + "\n" + conditions(rows[-1])


def _first(switch: str) -> int:
    return next(i for i, variant in enumerate(VARIANTS) if variant.switch == switch)


def _cells(row: dict | None, base: dict) -> tuple[str, str, str]:
    if row is None:
        return ("not measured", "", "")
    return (f"{row['kl']:.3g}", f"{row['kl'] / base['kl']:.2f}", f"{row['agreement']:.1f}")
