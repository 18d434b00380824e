"""The page in a real browser: it renders, it answers clicks, and no text of a prompt runs.

Screenshots are kept in $MOE_TOOLS_SCREENSHOTS, where that is set.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from tokenizers import pre_tokenizers

from moe_tools.experts.conversion import Conversion
from moe_tools.experts.intervene import intervene
from moe_tools.inspection import inspect, inspecting
from moe_tools.inspection.page import render, write_page
from tests.cli.test_verbs import build_tokenizer
from tests.families import build, randomize, routed
from tests.report.test_report import ROW

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HOSTILE = (
    "<script>document.title='pwned'</script>",
    "<img/src=x/onerror=document.title='pwned'>",
    "</script><script>document.title='pwned'</script>",
    "{{7*7}}",
    "\u2028</textarea>&amp;\"'",
    "@layer{0}$index",
)
PLAIN = tuple(f"w{index}" for index in range(20))
LIMIT = 5_000_000
"""Bytes."""
PLOTS = ("tokens", "experts", "loads", "margins", "sparsity", "similarity", "pareto")


def tokenizer_of(words: tuple[str, ...]) -> Any:
    tokenizer = build_tokenizer(list(words))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return tokenizer


def tiny(family: str = "llama") -> Any:
    model, _ = routed(
        build(family), Conversion("d", 4, "sigmoid", {"kind": "threshold", "tau": 0.5})
    )
    randomize(model)
    return model


SWEEP = [
    replace(
        ROW, model="out", series="", ffn_flops=share * ROW.ffn_dense_flops, perplexity=20 / share
    )
    for share in (0.3, 0.5, 0.8)
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hostile prompt, a dead expert (0, 2) and one that is always on (0, 1)."""
    torch.manual_seed(0)
    words, model = HOSTILE + PLAIN, tiny()
    with intervene(model, on={0: [1]}, off={0: [2]}):
        found = inspect(model, " ".join(words), tokenizer=tokenizer_of(words))
    file = tmp_path_factory.mktemp("page") / "report.html"
    return write_page(found, file, title="a <b>model</b>", sweep=SWEEP)


def test_a_page_is_one_small_file(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.stat().st_size < LIMIT
    assert "a &lt;b&gt;model&lt;/b&gt;" in text
    for hostile in HOSTILE[:3]:
        assert hostile not in text


def test_names_cannot_end_a_script(tmp_path: Path) -> None:
    """Nor begin a comment in it, in which its end would be none."""
    hostile = "<!--<script>\ud800</script>\u202e"
    found = inspect(tiny(), torch.randint(64, (1, 6)))
    sweep = [replace(row, series=hostile, model=hostile) for row in SWEEP]
    page = write_page(found, tmp_path / "page.html", title=hostile, sweep=sweep)
    text = page.read_text(encoding="utf-8")
    parsed = Scripts()
    parsed.feed(text)
    assert len(parsed.scripts) == 4 and parsed.title == hostile.replace("\ud800", "?")
    _, data, figures, own = parsed.scripts
    for script in (data, figures):
        assert "<!--" not in script and "<script" not in script.lower()
    assert own.rstrip().endswith("})();") and text.rstrip().endswith("</html>")


class Scripts(HTMLParser):
    """The scripts and the title of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.title = ""

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and data.strip():
            self.scripts.append(data)
        if self.lasttag == "title" and data.strip():
            self.title = data


@pytest.mark.slow
def test_a_page_stays_small_however_wide_the_model_is() -> None:
    conversion = Conversion("d", 1, "sigmoid", {"kind": "threshold", "tau": 0.5})
    model, _ = routed(build("llama", intermediate_size=11008, num_hidden_layers=12), conversion)
    found = inspect(model, torch.randint(64, (1, 200)), norms=False)
    assert len(render(found, title="wide").encode()) < LIMIT


def test_what_is_there_stays_and_nothing_seen_is_no_page(tmp_path: Path) -> None:
    model, file = tiny(), tmp_path / "report.html"
    with inspecting(model) as nothing:
        pass
    with pytest.raises(ValueError, match="no token was inspected"):
        write_page(nothing, file, title="t")
    file.write_text("mine")
    found = inspect(model, torch.randint(64, (1, 6)))
    with pytest.raises(ValueError, match=r"report.html exists: choose another name"):
        write_page(found, file, title="t")
    assert file.read_text() == "mine"


@pytest.fixture(scope="module")
def open_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Opens a file in a headless Chromium: width in pixels, light or dark."""
    if CHROMIUM is None or CHROMEDRIVER is None:
        assert not os.environ.get("CI"), "CI has to install chromium and chromium-driver"
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))

    def visit(file: Path, *, width: int = 1280, scheme: str = "light") -> Any:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(file.as_uri())
        ready = "return document.documentElement.dataset.ready && Bokeh.documents[0].is_idle"
        WebDriverWait(driver, 60).until(lambda d: d.execute_script(ready))
        return driver

    try:
        yield visit
    finally:
        driver.quit()


def keep(driver: Any, name: str) -> None:
    """A picture of the whole page, for whoever looks at the run."""
    folder = os.environ.get("MOE_TOOLS_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        words = {"captureBeyondViewport": True}
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", words)["data"]
        Path(folder, f"{name}.png").write_bytes(base64.b64decode(shot))


def complaints(driver: Any) -> list[str]:
    """What the console says that is more than information."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] != "INFO"]


def text(driver: Any, where: str) -> str:
    return str(driver.find_element(By.CSS_SELECTOR, where).text)


def cell(driver: Any, plot: str, x: float, y: float) -> dict[str, float]:
    """Where a point of a plot is in the window, after scrolling there."""
    script = """
      const plot = Bokeh.documents[0].get_model_by_name(arguments[0]);
      const card = document.getElementById(`card-${arguments[0]}`);
      const place = card.querySelector("[data-root-id]").firstElementChild;
      place.scrollIntoView({block: "center", behavior: "instant"});
      const box = place.getBoundingClientRect(), {frame} = Bokeh.index.get_by_id(plot.id);
      return {x: box.x + frame.x_scale.compute(arguments[1]),
              y: box.y + frame.y_scale.compute(arguments[2])};
    """
    return dict(driver.execute_script(script, plot, x, y))


def mouse(driver: Any, kind: str, at: dict[str, float], **more: Any) -> None:
    driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, **at, **more})


def click(driver: Any, plot: str, x: float, y: float) -> None:
    at = cell(driver, plot, x, y)
    mouse(driver, "mouseMoved", at)
    for kind in ("mousePressed", "mouseReleased"):
        mouse(driver, kind, at, button="left", clickCount=1)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "dark")])
def test_it_renders_without_a_complaint(
    open_page: Callable[..., Any], page: Path, width: int, scheme: str
) -> None:
    driver = open_page(page, width=width, scheme=scheme)
    keep(driver, f"{scheme}-{width}")
    assert complaints(driver) == []
    assert driver.execute_script("return performance.getEntriesByType('resource')") == []
    for name in PLOTS:
        box = driver.execute_script(
            f"return document.querySelector('#card-{name} [data-root-id]').firstElementChild"
            ".getBoundingClientRect().toJSON()"
        )
        assert box["width"] > 200 and box["height"] > 150
        assert box["right"] <= width
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(15, 19, 24)") == (scheme == "dark")
    assert driver.find_elements(By.CSS_SELECTOR, ".facts div")
    assert text(driver, "#dead").startswith("Layer 0, ")


@pytest.mark.slow
def test_the_text_of_a_prompt_does_not_run(open_page: Callable[..., Any], page: Path) -> None:
    driver = open_page(page)
    shown = [
        button.text.strip() for button in driver.find_elements(By.CSS_SELECTOR, "#strip button")
    ]
    assert shown[: len(HOSTILE)] == [word.strip() for word in HOSTILE]
    assert driver.title == "a <b>model</b>" and not driver.find_elements(By.CSS_SELECTOR, "h1 b")
    for token in range(len(HOSTILE)):  # each is also in a readout, and in a tooltip
        driver.find_elements(By.CSS_SELECTOR, "#strip button")[token].click()
        mouse(driver, "mouseMoved", cell(driver, "tokens", token, 0))
        mouse(driver, "mouseMoved", cell(driver, "tokens", token, 1))
        WebDriverWait(driver, 10).until(lambda d, token=token: HOSTILE[token].strip() in tooltip(d))
    assert not driver.find_elements(By.CSS_SELECTOR, "main img, main script")
    assert driver.title == "a <b>model</b>"
    assert complaints(driver) == []


@pytest.mark.slow
def test_what_cannot_be_seen_is_spelled_out_and_what_is_long_is_cut(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("\u202edlrow", "nul\x00l", "\u2066x", "y" * 5000)
    found = inspect(tiny(), " ".join(words), tokenizer=tokenizer_of(words))
    driver = open_page(write_page(found, tmp_path / "page.html", title="t"))
    shown = [each.text for each in driver.find_elements(By.CSS_SELECTOR, "#strip button")]
    assert shown == ["<202E>dlrow", "nul<0000>l", "<2066>x", f"{'y' * 200}\u2026"]
    assert complaints(driver) == []


def tooltip(driver: Any) -> str:
    script = """return [...document.querySelectorAll(".bk-Tooltip")]
        .filter((tip) => tip.getBoundingClientRect().width)
        .map((tip) => tip.shadowRoot.querySelector(".bk-tooltip-content").innerText).join(" ")"""
    return str(driver.execute_script(script))


@pytest.mark.slow
def test_a_click_chooses_token_layer_and_expert(open_page: Callable[..., Any], page: Path) -> None:
    driver = open_page(page)
    driver.find_elements(By.CSS_SELECTOR, "#strip button")[7].click()
    assert text(driver, "#picked").startswith("Token 7 w1 in layer 0:")
    colour = "return document.querySelectorAll('#strip button')[7].style.background"
    before = driver.execute_script(colour)
    driver.find_element(By.ID, "up").click()
    assert text(driver, "#picked").startswith("Token 7 w1 in layer 1:")
    assert driver.find_element(By.ID, "name").get_attribute("value") == "1"
    assert driver.execute_script(colour) != before
    assert text(driver, "#card-experts b.layer") == "1"
    click(driver, "tokens", 9, 0)
    WebDriverWait(driver, 10).until(
        lambda d: text(d, "#picked").startswith("Token 9 w3 in layer 0:")
    )
    click(driver, "loads", 0, 0)  # the busiest expert: the one that is forced on
    WebDriverWait(driver, 10).until(lambda d: "Expert 1 of layer 0" in text(d, "#expert"))
    assert "always on" in text(driver, "#expert")
    next(b for b in driver.find_elements(By.CSS_SELECTOR, "#dead button") if b.text == "2").click()
    assert "Expert 2 of layer 0\ndead" in text(driver, "#expert")
    click(driver, "experts", 3, 11)  # the top row: the busiest again
    WebDriverWait(driver, 10).until(lambda d: "Expert 1 of layer 0" in text(d, "#expert"))
    assert text(driver, "#picked").startswith("Token 3 ")
    keep(driver, "clicked")
    assert complaints(driver) == []


@pytest.mark.slow
def test_the_figures_shown_are_those_of_the_records(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    found = inspect(tiny(), " ".join(PLAIN), tokenizer=tokenizer_of(PLAIN))
    driver = open_page(write_page(found, tmp_path / "page.html", title="figures"))
    for row in list(found.decisions)[:5]:
        driver.find_elements(By.CSS_SELECTOR, "#strip button")[row.token].click()
        on = f"{len(row.experts)} of 12 experts on ({100 * row.on:.1f} %)"
        assert on in text(driver, "#picked")
        assert f"was {abs(row.margin):.4f} from the threshold" in text(driver, "#picked")
        assert f"{100 * row.captured:.1f} % of the output mass" in text(driver, "#picked")
    scores = found.scores(0)
    nearest = scores.where(scores.column("expert") == 0)
    best = max(nearest, key=lambda row: row.score)
    assert text(driver, "#expert mark") == PLAIN[best.token]
    assert f"score {best.score:.3f}" in text(driver, "#expert")


@pytest.mark.slow
def test_an_moe_host_has_a_page_too(open_page: Callable[..., Any], tmp_path: Path) -> None:
    found = inspect(tiny("mixtral"), " ".join(PLAIN), tokenizer=tokenizer_of(PLAIN))
    driver = open_page(write_page(found, tmp_path / "moe.html", title="Mixtral"))
    keep(driver, "moe-host")
    assert complaints(driver) == []
    seen = {row.token for row in found.decisions if row.ffn == "model.layers.0.mlp.experts.0"}
    for token, button in enumerate(driver.find_elements(By.CSS_SELECTOR, "#strip button")):
        button.click()
        assert ("sent it to other experts" in text(driver, "#picked")) == (token not in seen)
