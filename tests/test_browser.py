"""What a person sees in JupyterLab, seen by a real browser. Needs chromium and chromedriver (Debian: apt-get install
chromium chromium-driver); without them it is skipped."""

import json
import os
import shutil
import signal
import subprocess
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
NOTEBOOKS = ("01_train",)  # Run All is tried on these
SECONDS = 120  # that anything is waited for

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
    folder: Path  # a clone, with the hooks installed
    url: str
    token: str

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def git(self, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=self.folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """`make lab` in a clone of the sources, as a user who has never started it; its runs stay in the clone."""
    folder, user = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("user")
    for name in ("Makefile", "pyproject.toml", "requirements.lock", ".gitattributes", ".pre-commit-config.yaml"):
        shutil.copy2(PROJECT / name, folder)
    shutil.copytree(PROJECT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    train = folder / "notebooks/01_train.ipynb"
    train.write_text(train.read_text().replace('root: str = \\"\\"', 'root: str = \\"../runs/mine\\"'))
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


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_run_all_shows_no_error_and_leaves_no_diff_in_git(lab, browser, notebook):
    path = lab.folder / f"notebooks/{notebook}.ipynb"
    browser.get(f"{lab.url}?token={lab.token}")
    click(browser, ".jp-DirListing-itemText", f"{notebook}.ipynb", twice=True)
    wait_for("the kernel", lambda: idle(lab, notebook))
    click(browser, ".lm-MenuBar-itemLabel", "Run")
    click(browser, "[data-command='runmenu:run-all']")

    def executed() -> list:
        if not idle(lab, notebook):
            return []
        click(browser, "[data-command='docmanager:save'], jp-button[title^='Save and create checkpoint']")
        time.sleep(1)
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        outputs = [output for cell in cells for output in cell.outputs]
        assert not [o for o in outputs if o.output_type == "error"]
        return outputs if all(cell.execution_count for cell in cells) else []

    outputs = wait_for("the last cell", executed)
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert browser.find_elements("css selector", ".jp-RenderedImage img")
    assert not browser.find_elements("css selector", "[data-mime-type='application/vnd.jupyter.stderr']")
    assert not lab.git("diff")
