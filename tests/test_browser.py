"""What a person sees in JupyterLab, seen by a real browser. Needs chromium and chromedriver (Debian: apt-get install
chromium chromium-driver); without them it is skipped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

from samlib import PROJECT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000",
)  # fmt: skip
NOTEBOOKS = ("01_train", "02_geometry", "05_data_regimes", "08_label_noise")  # Run All is tried on these, and on 00
SECONDS = 240  # that anything is waited for
MIXES = {"mix": ["sgd", "sam", "scale2x0.5"]}
STUDY = {  # three runs of seconds, in whatever grid a notebook reads
    "title": "Three small runs",
    "base": {
        "dataset": "digits", "model": "resnet6", "stem": "cifar", "width": 4, "batch_size": 64, "augment": False,
        "data_fraction": 0.3, "noise_fraction": 0.4, "rho": 0.2, "epochs": 2, "eval_every": 1, "seed": 0,
        "probe_every": 1, "persistence_steps": [1], "noise_every": 1, "convergence_every": 2, "sharpness_every": 2,
        "measure_samples": 32,
    },
    "grids": {grid: MIXES for grid in ("regimes", "ablation", "geometry", "rho")},
    "notebooks": [{"notebook": "08_label_noise", "grid": "ablation"}],
}  # fmt: skip

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed here"),
]


def wait_for(what: str, found: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """What `found` returns once it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return value


@dataclass
class Lab:
    folder: Path  # a clone, with the hooks installed, and STUDY executed in it
    url: str
    token: str

    def get(self, path: str, method: str = "GET") -> Any:
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(self.url + path, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")

    def git(self, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=self.folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """`make lab` in a clone of the sources, as a user who has never started it; its runs stay in the clone."""
    folder, user = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("user")
    for name in ("Makefile", "pyproject.toml", "requirements.lock", ".gitattributes", ".pre-commit-config.yaml"):
        shutil.copy2(PROJECT / name, folder)
    shutil.copytree(PROJECT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (folder / "small.yaml").write_text(json.dumps(STUDY))
    command = ["run", "small.yaml", "--root", "runs/mine"]
    subprocess.run([sys.executable, "-m", "samlib", *command], cwd=folder, check=True, capture_output=True)
    for path in (folder / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        for name, value in {"study": "small.yaml", "root": "runs/mine", "figures": "figures"}.items():
            cell.source = re.sub(rf'^({name}: str = )"[^"]*"', rf'\1"{folder / value}"', cell.source, flags=re.M)
        nbformat.write(notebook, path)
    (folder / ".venv").symlink_to(PROJECT / ".venv")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "GIT_"))}
    environment = plain | {"HOME": str(user), "JUPYTER_RUNTIME_DIR": str(user / "runtime"), "GIT_CONFIG_NOSYSTEM": "1"}
    lab = Lab(folder, "", "")
    lab.git("init", "--quiet")
    subprocess.run(["make", "strip", "hooks"], cwd=folder, env=environment, check=True, capture_output=True)
    lab.git("add", "notebooks")
    command = ["make", "lab", "LAB=--no-browser --ServerApp.port=0"]
    log = open(user / "log", "w")
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        info = wait_for("JupyterLab", lambda: next(iter((user / "runtime").glob("jpserver-*.json")), None))
        about = wait_for("its address", lambda: json.loads(info.read_text() or "{}"))
        lab.url, lab.token = about["url"], about["token"]
        wait_for("its answer", lambda: _answers(lab))
        yield lab
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        log.close()


def _answers(lab: Lab) -> bool:
    try:
        return bool(lab.get("api/status"))
    except OSError:
        return False


@pytest.fixture
def browser(lab, tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
        errors = [entry["message"] for entry in driver.get_log("browser")]
        assert not errors
    finally:
        driver.quit()
        for session in lab.get("api/sessions"):
            lab.get(f"api/sessions/{session['id']}", "DELETE")


def click(browser, selector: str, text: str = "", twice: bool = False) -> None:
    """Clicks what the selector finds and holds the text, once it is there."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver import ActionChains

    def clicked() -> bool:
        try:
            for element in browser.find_elements("css selector", selector):
                if text in element.text and element.is_displayed():
                    chain = ActionChains(browser)
                    (chain.double_click(element) if twice else chain.click(element)).perform()
                    return True
        except WebDriverException:  # redrawn meanwhile
            pass
        return False

    wait_for(f"{selector} {text}", clicked)


def idle(lab: Lab, notebook: str) -> bool:
    kernels = [s["kernel"] for s in lab.get("api/sessions") if s["path"] == f"notebooks/{notebook}.ipynb"]
    return bool(kernels) and kernels[0]["execution_state"] == "idle"


def test_it_opens_in_the_projects_folder_with_the_notebooks_shown_and_asks_for_its_token(lab, browser):
    assert lab.url.startswith("http://127.0.0.1:") and lab.token
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(lab.url + "api/contents", timeout=30)
    browser.get(f"{lab.url}?token={lab.token}")
    names = {path.name for path in (lab.folder / "notebooks").glob("*.ipynb")}
    items = ".jp-DirListing-itemText"
    wait_for("the file list", lambda: names <= {e.text for e in browser.find_elements("css selector", items)})
    assert {"Makefile", "notebooks"} <= {item["name"] for item in lab.get("api/contents")["content"]}


def open_notebook(lab: Lab, browser, notebook: str) -> None:
    """As a user does, from the file list, with nothing else open."""
    browser.get(f"{lab.url}lab/tree/notebooks?reset&token={lab.token}")
    click(browser, ".jp-DirListing-itemText", f"{notebook}.ipynb", twice=True)
    wait_for("the kernel", lambda: idle(lab, notebook))


def save(browser) -> None:
    click(browser, "[data-command='docmanager:save'], jp-button[title^='Save and create checkpoint']")
    time.sleep(1)


def run_all(lab: Lab, browser, notebook: str) -> list:
    """Run All; the outputs as saved, once every cell is executed."""
    click(browser, ".lm-MenuBar-itemLabel", "Run")
    click(browser, "[data-command='runmenu:run-all']")

    def executed() -> list:
        if not idle(lab, notebook):
            return []
        save(browser)
        path = lab.folder / f"notebooks/{notebook}.ipynb"
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        assert not [o for o in outputs if o.output_type == "error"]
        return outputs if all(cell.execution_count for cell in cells) else []

    return wait_for("the last cell", executed)


def scrolled_to(browser, selector: str) -> Any:
    """The first element that is found on the way down the notebook, of which only what is near is in the page."""
    down = "const n = document.querySelector('.jp-NotebookPanel .jp-WindowedPanel-outer'); n.scrollTop = {};"
    browser.execute_script(down.format("0"))

    def found() -> Any:
        elements = browser.find_elements("css selector", selector)
        browser.execute_script("arguments[0].scrollIntoView()", elements[0]) if elements else browser.execute_script(
            down.format("n.scrollTop + 300")
        )
        return next(iter(elements), None)

    return wait_for(selector, found)


def test_every_other_notebook_opens_from_the_file_list_shows_its_title_and_is_saved_as_it_was(lab, browser):
    for path in sorted((lab.folder / "notebooks").glob("*.ipynb")):
        if path.stem in (*NOTEBOOKS, "00_explore"):
            continue
        open_notebook(lab, browser, path.stem)
        title = nbformat.read(path, 4).cells[0].source.partition("\n")[0].removeprefix("# ")
        assert title in scrolled_to(browser, ".jp-NotebookPanel h1").text
        save(browser)
    assert not lab.git("diff")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_run_all_shows_no_error_and_leaves_no_diff_in_git(lab, browser, notebook):
    open_notebook(lab, browser, notebook)
    outputs = run_all(lab, browser, notebook)
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert scrolled_to(browser, ".jp-RenderedImage img").get_property("naturalWidth") > 300
    assert not lab.git("diff")


def test_the_slider_of_rho_moves_and_the_figure_with_it(lab, browser):
    from selenium.webdriver import ActionChains, Keys

    open_notebook(lab, browser, "00_explore")
    outputs = run_all(lab, browser, "00_explore")
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) == 3
    picture = scrolled_to(browser, ".widget-html img")
    before = picture.get_attribute("src")
    assert "ρ = 0.4," in picture.get_attribute("alt") and picture.get_property("naturalWidth") > 300
    ActionChains(browser).click(scrolled_to(browser, ".widget-slider .noUi-handle")).send_keys(
        Keys.ARROW_RIGHT
    ).perform()

    def moved() -> bool:
        now = browser.find_element("css selector", ".widget-html img")
        return "ρ = 0.45," in now.get_attribute("alt") and now.get_attribute("src") != before

    wait_for("the figure of the next ρ", moved)
    assert not lab.git("diff")


def test_the_html_report_is_one_page_whose_figures_have_alternative_text_and_fit_a_phone(lab, browser, tmp_path):
    page = tmp_path / "report.html"
    command = ["report", "small.yaml", "--html", "--root", "runs/mine", "--out", str(page)]
    subprocess.run([sys.executable, "-m", "samlib", *command], cwd=lab.folder, check=True, capture_output=True)
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(page.as_uri())
    assert browser.find_element("css selector", "h1").text == STUDY["title"]
    pictures = browser.find_elements("css selector", "img")
    assert pictures and all(p.get_property("naturalWidth") > 300 and p.get_attribute("alt") for p in pictures)
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert not browser.find_elements("css selector", ".jp-InputArea-editor, .input_area")  # no sources
