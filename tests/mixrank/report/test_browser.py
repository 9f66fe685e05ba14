"""The report in a real browser: it asks for nothing, draws everything, and can be read on a screen and on a phone."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mixrank.report import write_report

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and its driver: apt-get install chromium chromium-driver"
)

SCREENSHOTS = Path(__file__).resolve().parents[3] / "build" / "screenshots"
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars"""
FIGURES = {"single": 4, "several": 13, "swept": 13, "trained": 3, "pruned": 1}
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
LEAST_TEXT, LEAST_GRAPHIC = 4.5, 3.0
"""Contrast that WCAG 2.1 asks for at level AA."""

# Everything folded is opened first. Places are in CSS pixels, from the upper left of the page.
MEASURE = """
document.querySelectorAll("details").forEach(part => { part.open = true; });
const place = element => { const r = element.getBoundingClientRect();
    return {left: r.left + scrollX, top: r.top + scrollY, right: r.right + scrollX, bottom: r.bottom + scrollY}; };
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
const light = colour => { const [r, g, b] = numbers(colour).slice(0, 3)
    .map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const contrast = (one, other) => { const [high, low] = [light(one), light(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05); };
const behind = element => { for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor; if (numbers(colour)[3] !== 0) return colour; } };
const words = [...document.querySelectorAll("main *")].filter(element => element.closest("svg") === null
    ? [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()) : element.tagName === "text");
const style = getComputedStyle(document.documentElement);
const resolved = name => { const probe = document.createElement("i"); probe.style.color = `var(${name})`;
    document.body.append(probe); const colour = getComputedStyle(probe).color; probe.remove(); return colour; };
return {
    width: document.documentElement.clientWidth,
    wide: document.documentElement.scrollWidth,
    beyond: [...document.querySelectorAll("main *")]
        .filter(e => !e.closest("figure svg, .wide table") && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 80)),
    scrolled: [...document.querySelectorAll(".wide")].map(e => e.scrollWidth - e.clientWidth),
    paper: getComputedStyle(document.body).backgroundColor,
    figures: [...document.querySelectorAll("svg")].map(svg => ({
        name: svg.getAttribute("aria-label"), place: place(svg), frame: place(svg.closest("figure")),
        room: svg.closest("figure").scrollWidth,
        shapes: [...svg.querySelectorAll("path, use")].filter(e => !e.closest("defs")).length,
        texts: [...svg.querySelectorAll("text")].map(e => ({text: e.textContent, ...place(e)}))})),
    faint: words.map(e => [e.textContent.trim().slice(0, 40),
        contrast(getComputedStyle(e)[e.tagName === "text" ? "fill" : "color"], behind(e))]),
    series: [0, 1, 2, 3, 4, 5].map(n => contrast(resolved(`--series-${n}`), resolved("--paper"))),
};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Chrome]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nscreenshots: {SCREENSHOTS}")


def looked_at(browser: Chrome, width: int, scheme: str, picture: str) -> dict[str, Any]:
    """What the page that is open looks like at this width in this scheme; a picture of all of it is kept."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferred = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
    seen = browser.execute_script(MEASURE)
    whole = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": whole["width"], "height": whole["height"], "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    (SCREENSHOTS / f"{picture}-{width}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
    return seen


def requests(browser: Chrome) -> list[str]:
    """The addresses that the browser asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def overlap(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two places share more than the empty edges of letters."""
    across = min(one["right"], other["right"]) - max(one["left"], other["left"])
    down = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
    return min(across, down) > 2.5


def check_figures(seen: dict[str, Any]) -> None:
    for figure in seen["figures"]:
        name, box, frame = figure["name"], figure["place"], figure["frame"]
        assert box["right"] - box["left"] >= 340, name
        assert box["bottom"] - box["top"] >= 100, name
        assert figure["shapes"] >= 10, name
        # On a phone a figure is scrolled in its own frame.
        assert frame["left"] - 1 <= box["left"], name
        assert box["right"] <= frame["left"] + figure["room"] + 1, name
        for text in figure["texts"]:
            assert text["right"] > text["left"], (name, text)
            assert text["left"] >= box["left"] - 1, (name, text)
            assert text["right"] <= box["right"] + 1, (name, text)
            assert text["top"] >= box["top"] - 1, (name, text)
            assert text["bottom"] <= box["bottom"] + 1, (name, text)
        for one, other in itertools.combinations(figure["texts"], 2):
            assert not overlap(one, other), (name, one, other)


@pytest.mark.parametrize("kind", FIGURES)
def test_a_report_is_whole_and_readable(
    kind: str, browser: Chrome, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "page.html"
    write_report(path, request.getfixturevalue(kind))
    requests(browser)
    browser.get(path.as_uri())
    papers = set()
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        seen = looked_at(browser, width, scheme, kind)
        assert (seen["width"], seen["wide"], seen["beyond"]) == (width, width, [])
        assert width < 1000 or max(seen["scrolled"]) == 0, "a table does not fit on a screen"
        assert len(seen["figures"]) == FIGURES[kind]
        check_figures(seen)
        assert [text for text in seen["faint"] if text[1] < LEAST_TEXT] == []
        assert min(seen["series"]) >= LEAST_GRAPHIC
        papers.add(seen["paper"])
    assert len(papers) == len(SCHEMES)
    assert requests(browser) == [path.as_uri()]
    assert browser.get_log("browser") == []


def test_the_checks_see_what_they_are_for(browser: Chrome, tmp_path: Path) -> None:
    """A request, an error, a word in no colour, a page that is too wide, and texts on one another."""
    path = tmp_path / "page.html"
    path.write_text(
        """<!doctype html><style>:root{--paper:#fff;--series-0:#eee}body{background:#fff}</style><main>
        <img src="missing.png"><p style="color:#eee">faint</p><p style="width:2000px">wide</p><div class="wide"></div>
        <figure><svg viewBox="0 0 100 50" width="400" height="200">
        <text x="90" y="9">one</text><text x="88" y="9">two</text></svg></figure>
        </main><script>undefinedFunction()</script>"""
    )
    requests(browser)
    browser.get(path.as_uri())
    seen = looked_at(browser, 1280, "light", "faulty")
    assert any(address.endswith("missing.png") for address in requests(browser))
    assert any("undefinedFunction" in entry["message"] for entry in browser.get_log("browser"))
    assert [text for text, ratio in seen["faint"] if ratio < LEAST_TEXT] == ["faint"]
    assert seen["series"][0] < LEAST_GRAPHIC
    assert seen["wide"] > seen["width"]
    assert seen["beyond"]
    assert overlap(*seen["figures"][0]["texts"])
    with pytest.raises(AssertionError):
        check_figures(seen)
