"""MLflow's pages as a person sees them: a sweep of the real program, the real server, a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]
selenium = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed: pip install -c constraints.txt '.[browser]'"
)

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
PATIENCE = 120
"""Seconds until a page counts as broken, on a machine shared with others."""
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
SMALL = [
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
    """What a person sees of a page, and waits for."""

    def __init__(self, driver: selenium.Chrome):
        self.driver = driver

    def open(self, link: str) -> None:
        self.driver.get("about:blank")  # a change behind the # alone would load nothing
        self.driver.get(link)

    def find(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def script(self, text: str):
        return self.driver.execute_script(text)

    @property
    def text(self) -> str:
        return self.driver.find_element("tag name", "body").text

    def wait(self, until: Callable[[], object], what: str):
        """What `until` gives, once that is true."""
        from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            waiting = WebDriverWait(self.driver, PATIENCE, 0.5, (StaleElementReferenceException,))
            return waiting.until(lambda _: until())
        except TimeoutException:
            pytest.fail(f"{what}: not on the page {self.driver.current_url}, which says\n{self.text[:3000]}")

    def says(self, *words: str) -> None:
        self.wait(lambda: all(word in self.text for word in words), repr(words))

    def sees_pictures(self, count: int) -> list[str]:
        """The addresses of at least so many pictures of runs, when they have arrived."""
        shown = "return [...document.images].filter(i => i.src.includes('artifact') && i.naturalWidth > 100).map(i => i.src)"
        self.wait(lambda: len(self.script(shown)) >= count, f"{count} pictures")
        return self.script(shown)

    def scroll_to(self, text: str) -> None:
        self.wait(lambda: text in self.text, text)
        self.script(
            f"[...document.querySelectorAll('*')].filter(e => e.textContent.trim() === '{text}').pop().scrollIntoView()"
        )


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a sweep's runs and what it printed."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium with its chromedriver is installed: apt-get install chromium chromium-driver")
    out = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", "-m", f"out={out}", *SMALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def landing(sweep: tuple[Path, str]) -> Iterator[str]:
    """The link that `make ui` prints."""
    command = [sys.executable, "-m", "trainer.tracking.ui", "--out", str(sweep[0]), "--port", "5700"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().split()[2]
    process.send_signal(signal.SIGINT)
    process.wait(30)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, landing: str) -> Iterator[Page]:
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    # MLflow's assistant opens beside the first page that a browser sees.
    driver.get(f"{landing.partition('#')[0]}health")
    driver.execute_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="module")
def printed(sweep: tuple[Path, str], landing: str) -> dict[str, str]:
    """The links that the sweep printed, by title, at the address of this server."""
    found = re.findall(r"^(\w[\w ]*): http://[^/]*(/#.*)$", sweep[1], re.MULTILINE)
    assert {title for title, _ in found} == {"summary", "curves and pictures", "comparison"}
    return {title: landing.partition("/#")[0] + rest for title, rest in found}


@pytest.fixture(scope="module")
def ranking(sweep: tuple[Path, str]) -> list[str]:
    """How MLflow calls the runs, the best first."""
    table = next(sweep[0].glob("sweeps/*/ranking.csv")).read_text().splitlines()
    rows = [dict(zip(table[0].split(","), line.split(","), strict=True)) for line in table[1:]]
    return [f"lr={row['optimizer.lr']} rank={row['method.rank']}" for row in rows]


def test_the_link_of_make_ui_lands_on_the_runs_with_their_losses_and_what_was_set(page: Page, landing: str):
    page.open(landing)
    page.says("sweep lr=0.0001,0.03 rank=1,4", "val/loss", "val/psnr", "optimizer.lr", "method.rank", "5 matching runs")


def test_the_summary_of_a_sweep_names_the_best_and_shows_map_pictures_and_members(
    page: Page, printed: dict[str, str], ranking: list[str]
):
    page.open(printed["summary"])
    page.says(f"Best: {ranking[0]}", "Child runs", *ranking)
    (more,) = page.wait(lambda: [button for button in page.find("button") if button.text == "Show more"], "Show more")
    more.click()
    pictures = page.sees_pictures(2)
    assert "path=heat_map.png" in pictures[0] and "path=samples.png" in pictures[1]
    assert any("#/compare-runs?" in link.get_attribute("href") for link in page.find("a"))


def test_the_runs_of_a_sweep_stand_from_best_to_worst_with_curves_first_and_pictures_after(
    page: Page, printed: dict[str, str], ranking: list[str]
):
    page.open(printed["curves and pictures"])
    page.says("4 matching runs", *ranking)
    places = [page.text.index(name) for name in ranking]
    assert places == sorted(places)
    # A chart is drawn when it comes into sight.
    page.says(*(f"(val/{name})" for name in ("loss", "psnr")))
    assert all(re.search(rf"{re.escape(name)} .*\(val/loss\)", page.text) for name in ranking)
    lines = "return document.querySelector('.js-plotly-plot').querySelectorAll('.scatterlayer .trace').length"
    page.wait(lambda: page.script(lines) >= 4, "four curves")
    headings = [page.text.index(f"\n{name}\n(") for name in ("val", "samples", "train")]
    assert (
        headings == sorted(headings) and page.text.index("\nval/loss\n") < page.text.index("\nval/psnr\n") < headings[1]
    )
    page.scroll_to("samples")
    page.sees_pictures(4)
    assert "optimizer.weight_decay=" not in page.text  # the settings of a run do not stand in front of its picture


def test_the_table_of_a_sweep_shows_what_varies(page: Page, printed: dict[str, str], ranking: list[str]):
    page.open(printed["curves and pictures"].replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
    page.says("4 matching runs", "val/loss", "val/psnr", "optimizer.lr", "method.rank")


def test_the_comparison_of_a_sweep_has_its_runs_from_best_to_worst(
    page: Page, printed: dict[str, str], ranking: list[str]
):
    page.open(printed["comparison"])
    page.says(
        "Comparing 4 Runs from 1 Experiment", "Show diff only", "optimizer.lr", "method.rank", "val/loss", *ranking
    )
    places = [page.text.index(name) for name in ranking]
    assert places == sorted(places)


def test_a_run_has_its_curves_in_groups_and_its_pictures_with_a_step_slider(
    page: Page, printed: dict[str, str], ranking: list[str]
):
    page.open(printed["summary"])
    page.says(ranking[0])
    link = next(link for link in page.find("a") if link.text.startswith(ranking[0])).get_attribute("href")
    page.open(f"{link.partition('?')[0]}/model-metrics?workflowType=machine_learning")
    page.says("perf", "samples", "train", "val", "samples/1_make_it_night")
    page.scroll_to("samples/1_make_it_night")
    (first, *_) = page.wait(lambda: page.find("[role=slider]"), "a slider")
    assert [first.get_attribute(f"aria-value{name}") for name in ("min", "max")] == ["0", "4"]
    assert "step%2B0%2B" in page.sees_pictures(2)[0]
    first.send_keys("\ue014")  # the right arrow key: to the next step with pictures
    page.wait(lambda: any("step%2B2%2B" in picture for picture in page.sees_pictures(2)), "the picture of step 2")
    page.scroll_to("val")
    page.wait(lambda: page.find(".js-plotly-plot .scatterlayer .trace"), "a curve")
