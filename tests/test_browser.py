"""Tests of MLflow's pages in a browser: the real program runs a sweep, and a real server shows it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]
selenium = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed: pip install -c constraints.txt '.[browser]'"
)

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
TIMEOUT = 120
"""Seconds after which a page counts as broken, even on a busy machine."""
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1200",
)
SETTINGS = [
    "sample.steps=1",
    "evaluation.images=2",
    "hardware=cpu",
    "dataset.pairs=8",
    "dataset.held_out=2",
    "batch=4",
    "steps=4",
    "evaluation.every=2",
    "optimizer.lr=1e-4,3e-2",
    "method.rank=1,4",
]


class Page:
    """The page in the browser. The `wait` methods fail the test after `TIMEOUT`."""

    def __init__(self, driver: selenium.Chrome):
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get("about:blank")  # a URL that differs after the # only would load nothing
        self.driver.get(url)

    def find(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def run_script(self, text: str) -> Any:
        return self.driver.execute_script(text)

    @property
    def text(self) -> str:
        return self.driver.find_element("tag name", "body").text

    def wait(self, condition: Callable[[], Any], name: str) -> Any:
        """Waits until the condition returns something true and returns that."""
        from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            waiting = WebDriverWait(self.driver, TIMEOUT, 0.5, (StaleElementReferenceException,))
            return waiting.until(lambda _: condition())
        except TimeoutException:
            pytest.fail(f"{name}: not found on the page {self.driver.current_url} with the text\n{self.text[:3000]}")

    def wait_for_text(self, *texts: str) -> None:
        self.wait(lambda: all(text in self.text for text in texts), repr(texts))

    def wait_for_images(self, count: int) -> list[str]:
        """Waits for at least `count` images of runs and returns their URLs."""
        loaded = "i.src.includes('artifact') && i.naturalWidth > 100"
        script = f"return [...document.images].filter(i => {loaded}).map(i => i.src)"
        self.wait(lambda: len(self.run_script(script)) >= count, f"{count} images")
        return self.run_script(script)

    def scroll_to(self, text: str) -> None:
        self.wait(lambda: text in self.text, text)
        self.run_script(
            f"[...document.querySelectorAll('*')].filter(e => e.textContent.trim() === '{text}').pop().scrollIntoView()"
        )

    def appear_in_order(self, texts: list[str]) -> bool:
        places = [self.text.index(text) for text in texts]
        return places == sorted(places)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Runs a sweep and returns its `out` folder and what it printed."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    out = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", "-m", f"out={out}", *SETTINGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def ui_url(sweep: tuple[Path, str]) -> Iterator[str]:
    """Starts the server of `make ui` and yields the URL that it prints."""
    command = [sys.executable, "-m", "trainer", "ui", "--out", str(sweep[0]), "--port", "5700"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().split()[2]
    process.send_signal(signal.SIGINT)
    process.wait(30)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, ui_url: str) -> Iterator[Page]:
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    # MLflow's assistant opens beside the first page that a browser visits.
    driver.get(f"{ui_url.partition('#')[0]}health")
    driver.execute_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="module")
def links(sweep: tuple[Path, str], ui_url: str) -> dict[str, str]:
    """Returns the links that the sweep printed, title -> URL, at the address of the test server."""
    found = printed_links(sweep[1], ui_url)
    assert set(found) == {"summary", "curves and pictures", "comparison"}
    return found


@pytest.fixture(scope="module")
def run_links(sweep: tuple[Path, str], ui_url: str) -> dict[str, str]:
    """Returns the links that the first run of the sweep printed."""
    (log,) = sweep[0].glob("sweeps/*/1.log")
    found = printed_links(log.read_text(), ui_url)
    assert set(found) == {"images and curves", "all runs"}
    return found


def printed_links(text: str, ui_url: str) -> dict[str, str]:
    found = re.findall(r"^(\w[\w ]*): http://[^/]*(/#.*)$", text, re.MULTILINE)
    return {title: ui_url.partition("/#")[0] + rest for title, rest in found}


@pytest.fixture(scope="module")
def ranking(sweep: tuple[Path, str]) -> list[str]:
    """Returns the names of the runs in MLflow, best first."""
    table = next(sweep[0].glob("sweeps/*/ranking.csv")).read_text().splitlines()
    rows = [dict(zip(table[0].split(","), line.split(","), strict=True)) for line in table[1:]]
    return [f"lr={row['optimizer.lr']} rank={row['method.rank']}" for row in rows]


def test_ui_link_opens_the_runs_with_losses_and_settings(page: Page, ui_url: str):
    page.open(ui_url)
    columns = ("val/loss", "val/psnr", "optimizer.lr", "method.rank")
    page.wait_for_text("sweep lr=0.0001,0.03 rank=1,4", "5 matching runs", *columns)


def test_summary_of_a_sweep_shows_the_best_run_heat_map_images_and_children(
    page: Page, links: dict[str, str], ranking: list[str]
):
    page.open(links["summary"])
    page.wait_for_text(f"Best: {ranking[0]}", "Child runs", *ranking)
    (button,) = page.wait(lambda: [button for button in page.find("button") if button.text == "Show more"], "Show more")
    button.click()
    images = page.wait_for_images(2)
    assert "path=heat_map.png" in images[0] and "path=samples.png" in images[1]
    assert any("#/compare-runs?" in link.get_attribute("href") for link in page.find("a"))


def test_children_of_a_sweep_are_ranked_with_curves_above_images(page: Page, links: dict[str, str], ranking: list[str]):
    page.open(links["curves and pictures"])
    page.wait_for_text("4 matching runs", *ranking)
    assert page.appear_in_order(ranking)
    # MLflow draws a chart when it becomes visible.
    page.wait_for_text(*(f"(val/{name})" for name in ("loss", "psnr")))
    assert all(re.search(rf"{re.escape(name)} .*\(val/loss\)", page.text) for name in ranking)
    lines = "return document.querySelector('.js-plotly-plot').querySelectorAll('.scatterlayer .trace').length"
    page.wait(lambda: page.run_script(lines) >= 4, "four curves")
    sections = [f"\n{name}\n(" for name in ("val", "samples", "train")]
    assert page.appear_in_order(sections)
    assert page.appear_in_order(["\nval/loss\n", "\nval/psnr\n", sections[1]])
    page.scroll_to("samples")
    page.wait_for_images(4)
    assert "optimizer.weight_decay=" not in page.text  # the params of a run do not push its image out of sight


def test_table_of_a_sweep_shows_the_varied_settings(page: Page, links: dict[str, str]):
    page.open(links["curves and pictures"].replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
    page.wait_for_text("4 matching runs", "val/loss", "val/psnr", "optimizer.lr", "method.rank")


def test_comparison_of_a_sweep_shows_its_runs_in_order(page: Page, links: dict[str, str], ranking: list[str]):
    page.open(links["comparison"])
    rows = ("optimizer.lr", "method.rank", "val/loss")
    page.wait_for_text("Comparing 4 Runs from 1 Experiment", "Show diff only", *rows, *ranking)
    assert page.appear_in_order(ranking)


def test_page_of_a_run_has_grouped_curves_and_images_with_a_step_slider(
    page: Page, links: dict[str, str], ranking: list[str]
):
    page.open(links["summary"])
    page.wait_for_text(ranking[0])
    url = next(link for link in page.find("a") if link.text.startswith(ranking[0])).get_attribute("href")
    page.open(f"{url.partition('?')[0]}/model-metrics?workflowType=machine_learning")
    page.wait_for_text("perf", "samples", "train", "val", "samples/1_make_it_night")
    page.scroll_to("samples/1_make_it_night")
    (slider, *_) = page.wait(lambda: page.find("[role=slider]"), "a slider")
    assert [slider.get_attribute(f"aria-value{name}") for name in ("min", "max")] == ["0", "4"]
    assert "step%2B0%2B" in page.wait_for_images(2)[0]
    slider.send_keys("\ue014")  # the right arrow key selects the next step with images
    page.wait(lambda: any("step%2B2%2B" in url for url in page.wait_for_images(2)), "the image of step 2")
    page.scroll_to("val")
    page.wait(lambda: page.find(".js-plotly-plot .scatterlayer .trace"), "a curve")


def test_link_of_a_run_opens_its_curves_above_its_last_images(page: Page, run_links: dict[str, str]):
    page.open(run_links["images and curves"])
    page.wait_for_text("(val/loss)", "(val/psnr)", "samples/1_make_it_night", "samples/2_make_it_night")
    assert page.appear_in_order([f"\n{name}\n(" for name in ("val", "samples", "train", "perf")])
    assert len(page.find(".js-plotly-plot")) and "optimizer.weight_decay" not in page.text
    page.scroll_to("samples")
    images = page.wait_for_images(2)
    assert len(images) == 2 and all("step%2B4%2B" in url for url in images)
    assert [slider.get_attribute("aria-valuenow") for slider in page.find("[role=slider]")[:2]] == ["4", "4"]
    page.find(".rc-image")[0].click()
    enlarged = "return [...document.images].filter(i => i.src.includes('artifact') && i.naturalWidth > 380).length"
    page.wait(lambda: page.run_script(enlarged), "the enlarged image")


def test_run_opened_from_a_list_shows_its_images_and_leads_to_its_curves(page: Page, run_links: dict[str, str]):
    address, _, query = run_links["images and curves"].partition("?")
    (run_id,) = re.findall(r"viewStateShareKey=(\w+)", query)
    page.open(f"{address}/{run_id}")  # the lists of MLflow link runs like this
    page.wait_for_text("Images and curves", "before training", "val/psnr", "Evaluation runs")
    (button,) = page.wait(lambda: [button for button in page.find("button") if button.text == "Show more"], "Show more")
    button.click()
    assert len(page.wait_for_images(2)) == 2
    (link,) = (link for link in page.find("a") if link.text == "Images and curves")
    assert link.get_attribute("href") == run_links["images and curves"]
    # The description tells how to leave the pages for chat applications for good.
    (switch,) = (button for button in page.find("[role=button]") if button.text == "Model training")
    switch.click()
    page.wait(lambda: "Evaluation runs" not in page.text, "the page of the experiment")
    page.open(f"{address}/{run_id}")
    page.wait_for_text("Images and curves", "Model registry")
    assert "Evaluation runs" not in page.text
