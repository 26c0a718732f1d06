import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from samlib import PROJECT

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def direct() -> list[Requirement]:
    project = PYPROJECT["project"]
    return [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]]


def lock() -> dict[str, Requirement]:
    lines = [line for line in (PROJECT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def pinned(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, f"{requirement} is no pin"
    return specifier.version


def test_every_direct_dependency_is_pinned_in_the_lock_at_a_version_it_allows():
    pins = lock()
    for requirement in direct() + [Requirement(line) for line in PYPROJECT["build-system"]["requires"]]:
        version = pinned(pins[canonicalize_name(requirement.name)])
        assert requirement.specifier.contains(version), f"{requirement}: the lock has {version}"


def test_the_lock_is_closed_under_what_its_packages_need():
    pins, open_ends = lock(), []
    for name in pins:
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # another platform's
        for requirement in map(Requirement, needed):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            if name == "torch" and re.match(r"nvidia|cuda|triton", requirement.name):
                continue  # a CUDA build of torch pins these itself
            if canonicalize_name(requirement.name) not in pins:
                open_ends.append(f"{name} needs {requirement.name}")
    assert not open_ends


def test_the_pins_are_the_ones_the_study_was_measured_with():
    pins = lock()
    assert pinned(pins["torch"]) == "2.13.0" and pinned(pins["torchvision"]) == "0.28.0"
    torch = next(requirement for requirement in direct() if requirement.name == "torch")
    assert torch.specifier.contains("2.11.0")


def test_the_bench_extra_is_pinned_and_in_nobody_elses_environment():
    for requirement in map(Requirement, PYPROJECT["project"]["optional-dependencies"]["bench"]):
        pinned(requirement)
        assert canonicalize_name(requirement.name) not in lock()


def test_conda_users_get_the_same_environment_from_the_same_pins():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    plain = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    python = Requirement(next(line for line in plain if line.startswith("python=")).replace("=", "==", 1))
    assert PYPROJECT["project"]["requires-python"] == ">=" + pinned(python)
    assert [line.split("=")[0] for line in plain] == ["python", "pip"]  # every other package comes from the lock


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(PROJECT / name, folder)
    return folder


def make(folder, *arguments: str) -> subprocess.CompletedProcess:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=plain, capture_output=True, text=True)


def script(path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


OLD = 'case "$*" in *version_info*) exit 1;; -V) echo Python 3.9.2;; esac\n'
WITHOUT_VENV = 'case "$*" in *ensurepip*) exit 1;; esac\n'


@pytest.mark.parametrize(
    "python, words",
    [
        (OLD, "Python 3.9.2, but Python 3.11 or newer"),
        (WITHOUT_VENV, "lacks the venv module"),
        (None, "No Python found"),
    ],
)
def test_an_unfit_python_is_refused_in_one_sentence(checkout, tmp_path, python, words):
    path = script(tmp_path / "python", python) if python else str(tmp_path / "nowhere")
    result = make(checkout, "install", f"PYTHON={path}")
    assert result.returncode != 0 and words in result.stderr
    assert not (checkout / ".venv").exists()


def fake_environment(checkout, pip: str) -> None:
    (checkout / ".venv/bin").mkdir(parents=True)
    script(checkout / ".venv/bin/python", f'echo "$@" >>.venv/log\n{pip}')


def test_a_failed_installation_is_tried_again_and_a_finished_one_is_not(checkout):
    fake_environment(checkout, 'case "$*" in *"-e ."*) exit 1;; esac\n')
    assert make(checkout, "install").returncode != 0
    assert not (checkout / ".venv/installed").exists()
    script(checkout / ".venv/bin/python", 'echo "$@" >>.venv/log\n')
    assert make(checkout, "install").returncode == 0
    calls = (checkout / ".venv/log").read_text()
    assert make(checkout, "install").returncode == 0
    assert (checkout / ".venv/log").read_text() == calls


def test_make_study_runs_the_study_named(checkout):
    fake_environment(checkout, "")
    assert make(checkout, "study").returncode == 0
    assert (checkout / ".venv/log").read_text().splitlines()[-1] == "-m samlib run studies/quick.yaml"
    assert make(checkout, "study", "STUDY=studies/other.yaml").returncode == 0
    assert (checkout / ".venv/log").read_text().splitlines()[-1] == "-m samlib run studies/other.yaml"


def test_no_tests_with_faults_is_no_failure_but_a_failed_one_is(checkout):
    fake_environment(checkout, 'case "$*" in *faults*) exit 5;; esac\n')
    assert make(checkout, "test-faults").returncode == 0
    script(checkout / ".venv/bin/python", 'case "$*" in *faults*) exit 1;; esac\n')
    assert make(checkout, "test-faults").returncode != 0
