"""The report: whole in itself, complete, and safe with hostile names."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mixrank.errors import InputError
from mixrank.report import write_report
from mixrank.report_figures import compensation_figure, error_figure, kinds_of, sweep_figure

HOSTILE = "blocks.0.<script>alert(1)</script>.$\\frac{1$.\"&'qkv"


class Page(HTMLParser):
    """Tags, ids and references of a page."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.note(attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.note(attributes)

    def note(self, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def written(path: Path, data: dict[str, Any]) -> str:
    write_report(path, data)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["single", "several", "swept", "trained", "pruned"])
def test_page_needs_nothing_beside_it(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = written(tmp_path / "page.html", request.getfixturevalue(name))
    page = Page(text)
    assert page.open == []
    assert "http" not in text
    assert "@import" not in text
    assert not {"script", "link", "img", "iframe", "object", "metadata"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    references = {reference[1:] for reference in page.references} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert references <= set(page.ids)


@pytest.mark.parametrize("name", ["single", "several", "swept", "trained", "pruned"])
def test_every_colour_follows_the_page(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    text = written(tmp_path / "page.html", request.getfixturevalue(name))
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert drawn
    assert not re.findall(r"(?:fill|stroke): #\w+", drawn)
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert used <= set(re.findall(r"--([\w-]+):", text))


def test_single_result_has_every_figure(single: dict[str, Any], tmp_path: Path) -> None:
    text = written(tmp_path / "page.html", single)
    assert text.count("<svg") == 4
    for words in (
        "Energy kept against rank",
        "output energy kept (%)",
        "weight energy kept (%)",
        "Rank along the depth",
        "Parameters kept along the depth",
        "parameters (thousands)",
        "relative output error (%)",
        "10.000 %",
        "12.340 %",
        "layer of this kind, from the input",
        "mixrank compress --model some_vit --images &#39;a folder&#39; --keep 0.6 --no-centre",
        "x.png: truncated",
        "1.50×",
        "5 rounds of batches of 8 on 2 threads",
    ):
        assert words in text, words
    for layer in single["plan"]["layers"]:
        assert f"<td>{layer['name']}</td>" in text


def test_several_budgets_have_a_front(several: dict[str, Any], tmp_path: Path) -> None:
    text = written(tmp_path / "page.html", several)
    assert text.count("<svg") == 1 + 3 * 4
    for words in ("Accuracy against size", "parameters (millions)", "images per second", "keep 0.7", "keep 0.5"):
        assert words in text, words


def test_a_sweep_has_one_curve_for_each_strategy_with_a_point_for_each_budget(swept: dict[str, Any]) -> None:
    strategies = list(dict.fromkeys(row["strategy"] for row in swept["rows"]))
    axes = sweep_figure((swept["dense"], swept["rows"])).axes
    assert [axis.get_ylabel().split()[0] for axis in axes] == ["top-1", "agreement", "divergence"]
    for axis, curves in zip(axes, (len(strategies) + 1, len(strategies), len(strategies)), strict=True):
        assert len(axis.lines) == curves  # in the first also the dense model's accuracy
    for axis, key in ((axes[1], "agreement"), (axes[2], "divergence")):
        for line, strategy in zip(axis.lines, strategies, strict=True):
            rows = [row for row in swept["rows"] if row["strategy"] == strategy][::-1]
            assert line.get_label() == strategy
            assert list(line.get_xdata()) == [row["compressed"]["parameters"] / 1e6 for row in rows]
            assert list(line.get_ydata()) == [row["fidelity"][key] for row in rows]
    unlabelled = sweep_figure((swept["dense"] | {"top1": None}, swept["rows"])).axes
    assert [len(axis.lines) for axis in unlabelled] == [len(strategies)] * 2


def test_a_sweep_of_many_strategies_gives_each_a_look_of_its_own(swept: dict[str, Any]) -> None:
    rows = [swept["rows"][0] | {"strategy": f"number {number}"} for number in range(12)]
    lines = sweep_figure((swept["dense"] | {"top1": None}, rows)).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_a_sweep_shows_every_row_and_its_ranks(swept: dict[str, Any], tmp_path: Path) -> None:
    text = written(tmp_path / "page.html", swept)
    assert text.count("<svg") == 1 + len(swept["rows"])
    for words in (
        "12 compressed models by 6 strategies",
        "<td>aware-pivoted, keep 0.5</td>",
        "<td>86.67</td>",
        "<td>0.3</td>",
        "mixrank sweep --model some_vit --keep 0.6 --keep 0.5",
        "Rank along the depth",
    ):
        assert words in text, words
    assert "images/s" not in text
    assert "mathdefault" not in text


def test_a_training_is_drawn_from_its_start_with_the_best_step_ringed(trained: dict[str, Any], tmp_path: Path) -> None:
    divergence, agreement = compensation_figure(trained["compensation"]).axes
    for axis, expected in ((divergence, [1.0, 0.5, 0.25, 0.3]), (agreement, [40.0, 60.0, 80.0, 70.0])):
        curve, ring = axis.lines
        assert list(curve.get_xdata()) == [0, 2, 4, 6]
        assert list(curve.get_ydata()) == expected
        assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([4], [expected[2]])
    text = written(tmp_path / "page.html", trained)
    assert text.count("<svg") == 3
    for words in ("Error compensation", "from 1\nto 0.25 nats", "Held-out error along the training"):
        assert words in text, words


def test_legends_are_read_along_their_rows_and_have_a_column_for_each_kind(swept: dict, single: dict) -> None:
    figure = sweep_figure((swept["dense"], swept["rows"]))
    strategies = list(dict.fromkeys(row["strategy"] for row in swept["rows"]))
    # Matplotlib lays out columns: four, of two entries each but for the last.
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0::2] + texts[1::2] == [*strategies, "dense"]
    kinds = [text.get_text() for text in error_figure(single["layers"]).legends[0].get_texts()]
    assert kinds[:4] == ["qkv", "qkv, held out", "proj", "proj, held out"]


def test_sparse_layers_are_told_with_their_entries(single: dict[str, Any], tmp_path: Path) -> None:
    layer = single["plan"]["layers"][0] | {"form": "sparse", "rank": 0, "entries": 1234}
    plan = single["plan"] | {"layers": [layer, *single["plan"]["layers"][1:]]}
    text = written(tmp_path / "page.html", single | {"plan": plan})
    assert "<td>0 + 1,234 entries</td>" in text
    assert text.count(" entries</td>") == 1


def test_fidelity_is_shown_where_it_was_measured(single: dict[str, Any], tmp_path: Path) -> None:
    assert "divergence (nats)" not in written(tmp_path / "page.html", single)
    data = single | {"fidelity": {"divergence": 0.125, "agreement": 93.75, "images": 16}}
    text = written(tmp_path / "page.html", data)
    for words in ("divergence (nats)", "<td>0.125</td>", "<td>93.75</td>", "agreement with the dense model"):
        assert words in text, words


def test_without_curves_and_scores_the_rest_is_drawn(single: dict[str, Any], tmp_path: Path) -> None:
    """The JSON of ``evaluate`` has no curves, and a model without labelled images has no top-1."""
    data = {key: value for key, value in single.items() if key not in ("layers", "speed", "images")}
    data["dense"] = data["dense"] | {"top1": None, "images_per_second": None}
    text = written(tmp_path / "page.html", data)
    assert text.count("<svg") == 2
    assert "nan" not in text.lower()
    assert "None" not in text


def test_hostile_names_stay_text(single: dict[str, Any], tmp_path: Path) -> None:
    data = copy.deepcopy(single)
    data["plan"]["layers"][0]["name"] = data["layers"][0]["name"] = HOSTILE
    data["model"]["architecture"] = "</title><script>alert(2)</script>"
    data["options"]["images"] = "<img src=x onerror=alert(3)>"
    data["images"]["calibration_skipped"] = ["<b>bold</b>"]
    data["versions"]["cpu"] = "<i>"
    text = written(tmp_path / "page.html", data)
    page = Page(text)
    assert not {"script", "img", "b" * 2, "i"} & set(page.tags)
    assert page.references == [reference for reference in page.references if reference.startswith("#")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text


def test_hostile_strategies_stay_text(swept: dict[str, Any], tmp_path: Path) -> None:
    data = copy.deepcopy(swept)
    for row in data["rows"][:2]:
        row["strategy"] = HOSTILE
    page = Page(text := written(tmp_path / "page.html", data))
    assert "script" not in page.tags
    assert text.count("&lt;script&gt;alert(1)") > 2  # in the table, in the legend, at the ranks


def test_report_is_the_same_every_time(single: dict[str, Any], tmp_path: Path) -> None:
    assert written(tmp_path / "a.html", single) == written(tmp_path / "b.html", single)


@pytest.mark.parametrize("missing", ["model", "dense", "compressed", "plan"])
def test_foreign_data_is_refused(missing: str, single: dict[str, Any], tmp_path: Path) -> None:
    data = json.loads(json.dumps({key: value for key, value in single.items() if key != missing}))
    with pytest.raises(InputError, match=f"not a result of mixrank.*{missing}"):
        write_report(tmp_path / "page.html", data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("found", [{}, {"divergence": "near"}, {"divergence": {}}, {"divergence": [0.5]}], ids=repr)
def test_what_only_the_template_reads_is_refused_too(
    found: dict[str, Any], single: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"not a result of mixrank.*format"):
        write_report(tmp_path / "page.html", single | {"fidelity": {"agreement": 90.0, "images": 5} | found})
    assert not list(tmp_path.iterdir())


def test_kinds_are_the_last_words_of_names() -> None:
    names = ["blocks.0.attn.qkv", "blocks.0.attn.qkv.parts.2", "blocks.0.mlp.fc1", "layers.1.downsample.reduction", "3"]
    assert kinds_of(names) == ["qkv", "v", "fc1", "reduction", "3"]
    many = [f"kind{index}" for index in range(9)] + ["kind0"]
    assert kinds_of(many)[0] == "kind0"
    assert len(set(kinds_of(many))) == 6
    assert kinds_of(many)[8] == "other"
