"""The plan: which layer gets which rank. It describes itself before it is applied and round-trips through JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from mixrank.errors import InputError

LOW_RANK_FORMS = ("factors", "pivoted")
"""How a weight of low rank can be held."""

FORMS = (*LOW_RANK_FORMS, "sparse")
"""How a layer of a plan can be held."""


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one linear layer.

    Attributes:
        name: the layer's name in the model.
        in_features: K.
        out_features: N.
        rank: R, or None where the layer stays dense; of the form ``"sparse"`` 0 where it has no factors.
        bias: whether the layer has a bias in the compressed model (a factored layer may gain one: the mean correction).
        parameters_before: weight and bias of the original layer.
        parameters_after: weight or factors, and bias, in the compressed model; of the form ``"sparse"`` the entries and
            what their places take as well, see :func:`mixrank.nn_sparse.mask_places`.
        form: how a layer with a rank is held, as ``"factors"`` (:class:`mixrank.MixedRankLinear`), ``"pivoted"``
            (:class:`mixrank.PivotedLinear`) or ``"sparse"`` (:class:`mixrank.SparseLinear`); of no meaning where the
            layer stays dense.
        entries: of the form ``"sparse"``, how many entries are stored beside the factors; 0 for other forms.
    """

    name: str
    in_features: int
    out_features: int
    rank: int | None
    bias: bool
    parameters_before: int
    parameters_after: int
    form: str = "factors"
    entries: int = 0


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
        """The rank of each layer that gets one, by name; 0 is that of a sparse layer without factors."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def describe(self) -> str:
        """Return the plan as a table in plain text, one line a layer, totals last; entries where a layer is sparse."""
        width = max([len(layer.name) for layer in self.layers], default=5)
        is_sparse = any(layer.form == "sparse" and layer.rank is not None for layer in self.layers)
        entries = f"{'entries':>8}  " if is_sparse else ""
        lines = [
            f"{'layer':<{width}}  {'K':>5}  {'N':>5}  {'rank':>5}  {entries}{'form':>7}  "
            f"{'before':>10}  {'after':>10}  {'kept':>6}"
        ]
        for layer in self.layers:
            rank, form = ("dense", "") if layer.rank is None else (layer.rank, layer.form)
            entries = f"{layer.entries if form == 'sparse' else '':>8}  " if is_sparse else ""
            kept = layer.parameters_after / layer.parameters_before
            lines.append(
                f"{layer.name:<{width}}  {layer.in_features:>5}  {layer.out_features:>5}  {rank:>5}  {entries}"
                f"{form:>7}  {layer.parameters_before:>10}  {layer.parameters_after:>10}  {kept:>6.1%}"
            )
        lines.append(f"all parameters: {self.parameters_before} -> {self.parameters_after} ({self.keep:.1%} kept)")
        return "\n".join(lines)

    def to_json(self) -> dict:
        """Return the plan in terms of JSON; a plan without sparse layers as versions that know none read it."""
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            if not layer["entries"]:
                del layer["entries"]
        return {
            "layers": layers,
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
            known = type(layer.bias) is bool and layer.form in FORMS
            sparse = layer.form == "sparse" and layer.rank is not None
            ranked = layer.rank is None or (type(layer.rank) is int and layer.rank >= (0 if sparse else 1))
            stored = type(layer.entries) is int and (layer.entries >= 0 if sparse else layer.entries == 0)
            if type(layer.name) is not str or not whole or not ranked or not known or not stored:
                raise InputError(f"the plan's entry for layer {layer.name!r} has a field of the wrong type or range")
        if not all(type(name) is str for name in plan.split):
            raise InputError("the plan's list of split layers must hold names")
        return plan
