"""The plan: which layer gets which rank. It describes itself before it is applied and round-trips through JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from mixrank.errors import InputError

FORMS = ("factors", "pivoted")


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one linear layer.

    Attributes:
        name: the layer's name in the model.
        in_features: K.
        out_features: N.
        rank: R, or None where the layer stays dense.
        bias: whether the layer has a bias in the compressed model (a factored layer may gain one: the mean correction).
        parameters_before: weight and bias of the original layer.
        parameters_after: weight or factors, and bias, in the compressed model.
        form: how a layer with a rank is held, as ``"factors"`` (:class:`mixrank.MixedRankLinear`) or ``"pivoted"``
            (:class:`mixrank.PivotedLinear`); of no meaning where the layer stays dense.
    """

    name: str
    in_features: int
    out_features: int
    rank: int | None
    bias: bool
    parameters_before: int
    parameters_after: int
    form: str = "factors"


@dataclass(frozen=True)
class Plan:
    """Ranks for a whole model.

    Attributes:
        layers: one entry for each compressible layer, in the order of the model.
        parameters_before: all parameters of the original model.
        parameters_after: all parameters of the compressed model.
        split: names of fused layers that are held in parts, named ``{name}.parts.{i}``.
        options: how the plan was made (budget, strategy), for the record.
    """

    layers: tuple[LayerPlan, ...]
    parameters_before: int
    parameters_after: int
    split: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)

    @property
    def keep(self) -> float:
        """The share of all parameters that remain."""
        return self.parameters_after / self.parameters_before

    def ranks(self) -> dict[str, int]:
        """The rank of each layer that gets one, by name."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def describe(self) -> str:
        """Return the plan as a table in plain text, one line a layer, totals last."""
        width = max([len(layer.name) for layer in self.layers], default=5)
        lines = [
            f"{'layer':<{width}}  {'K':>5}  {'N':>5}  {'rank':>5}  {'form':>7}  {'before':>10}  {'after':>10}  "
            f"{'kept':>6}"
        ]
        for layer in self.layers:
            rank, form = ("dense", "") if layer.rank is None else (layer.rank, layer.form)
            kept = layer.parameters_after / layer.parameters_before
            lines.append(
                f"{layer.name:<{width}}  {layer.in_features:>5}  {layer.out_features:>5}  {rank:>5}  {form:>7}  "
                f"{layer.parameters_before:>10}  {layer.parameters_after:>10}  {kept:>6.1%}"
            )
        lines.append(f"all parameters: {self.parameters_before} -> {self.parameters_after} ({self.keep:.1%} kept)")
        return "\n".join(lines)

    def to_json(self) -> dict:
        """Return the plan in terms of JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "split": list(self.split),
            "options": self.options,
        }

    @classmethod
    def from_json(cls, data: dict) -> Plan:
        """Read what :meth:`to_json` wrote.

        Args:
            data: what it returned, through JSON or not.

        Raises:
            InputError: a field is missing, unknown or of the wrong type.
        """
        try:
            layers = tuple(LayerPlan(**layer) for layer in data["layers"])
            plan = cls(
                layers, data["parameters_before"], data["parameters_after"], tuple(data["split"]), dict(data["options"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the plan is not one that this version wrote: {error!r}") from error
        for layer in layers:
            sizes = (layer.in_features, layer.out_features, layer.parameters_before, layer.parameters_after)
            whole = all(type(size) is int and size > 0 for size in sizes)
            ranked = layer.rank is None or (type(layer.rank) is int and layer.rank > 0)
            known = type(layer.bias) is bool and layer.form in FORMS
            if type(layer.name) is not str or not whole or not ranked or not known:
                raise InputError(f"the plan's entry for layer {layer.name!r} has a field of the wrong type or range")
        if not all(type(name) is str for name in plan.split):
            raise InputError("the plan's list of split layers must hold names")
        return plan
