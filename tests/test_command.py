"""`python -m samlib` as a process: interrupted, on a cluster elsewhere, in surroundings that are not in order."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from samlib import PROJECT
from samlib.runs import Run
from samlib.study import Study
from samlib.train import train

SMALL = "dataset: digits, model: resnet6, stem: cifar, width: 4, batch_size: 64, augment: false, state_seconds: 0.1"
COMMAND = [sys.executable, "-m", "samlib"]


def write_study(folder: Path, epochs: int, seeds: list[int]) -> Path:
    path = folder / "small.yaml"
    text = f"title: T\nbase: {{{SMALL}, epochs: {epochs}}}\ngrids: {{g: {{mix: sam, rho: 0.2, seed: {seeds}}}}}\n"
    path.write_text(text)
    return path


def wait_for(condition, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def below(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def kernels_below(process: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in below(process) if "ipykernel_launcher" in p.cmdline()]


@pytest.fixture
def start(tmp_path):
    """Starts processes with a temporary folder of their own, and ends them and what they started after the test."""
    processes = []

    def call(command: list[str], name: str = "err", cwd: Path = PROJECT, **environment: str) -> subprocess.Popen:
        (tmp_path / "tmp").mkdir(exist_ok=True)
        env = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": "", **environment}
        with open(tmp_path / name, "w") as file:
            process = subprocess.Popen(
                command, cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        processes.append(process)
        return process

    yield call
    for process in processes:
        if process.poll() is None:
            for leftover in [*below(process), process]:
                leftover.kill()
        process.wait()


def assert_as_trained_here(path: Path, root: Path, alone: Path) -> None:
    for config in Study.load(path).configs():
        resumed, whole = Run(config, root), train(config, alone, progress=False)
        a, b = (run.table("metrics").drop(columns="seconds") for run in (resumed, whole))
        assert a.equals(b)
        assert json.loads((resumed.folder / "summary.json").read_text())["status"] == "done"


def semaphores(processes: list[psutil.Process]) -> set[Path]:
    """Those between processes, as files, that these processes have open."""
    return {Path(m.path) for p in processes for m in p.memory_maps() if m.path.startswith("/dev/shm/")}


@pytest.mark.faults
@pytest.mark.parametrize("how", ["Ctrl-C", "Ctrl-C of this process alone", "SIGKILL", "its end"])
def test_a_study_that_ends_in_whatever_way_leaves_no_process_and_unless_it_is_killed_no_file(
    how, tmp_path, start, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", None)
    root, scratch = tmp_path / "runs", Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # a short path, for its sockets
    path = write_study(tmp_path, 2 if how == "its end" else 100_000, [0, 1, 2])
    runtime, shared = tmp_path / "jupyter", set()
    try:
        command = [*COMMAND, "run", str(path), "--root", str(root), "--workers", "2"]
        process = start(command, TMPDIR=str(scratch), JUPYTER_RUNTIME_DIR=str(runtime))
        wait_for(lambda: process.poll() is not None or len(list(root.glob("*/lock"))) >= 2)
        processes = [] if process.poll() is not None else below(process)
        if how != "its end":
            wait_for(lambda: len(list(root.glob("*/state.pt"))) == 2)
            processes = below(process)
            shared = semaphores([*processes, psutil.Process(process.pid)])
            assert len(kernels_below(process)) == 2 and list(scratch.iterdir())
        begin = time.monotonic()
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif how != "its end":
            process.send_signal(signal.SIGKILL if how == "SIGKILL" else signal.SIGINT)
        status = process.wait(240 if how == "its end" else 30)
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert not alive and (how == "its end" or time.monotonic() - begin < 30)  # 1 s on an idle machine
        error = (tmp_path / "err").read_text()
        assert "Traceback" not in error, error
        assert status == {"SIGKILL": -signal.SIGKILL, "its end": 0}.get(how, 130)
        if how.startswith("Ctrl-C"):
            assert "started ones resume: python -m samlib run" in error
        assert how == "SIGKILL" or not list(scratch.iterdir())
        assert not list(runtime.glob("*")) and not [path for path in shared if path.exists()]
        # A kernel killed in the middle of a write leaves a part of a file, which the run's next start removes.
        assert all(path.name.endswith(".tmp") for path in root.rglob(".*"))
    finally:
        shutil.rmtree(scratch)


@pytest.mark.faults
def test_two_commands_on_one_study_train_every_run_once_and_say_that_they_wait(tmp_path, start):
    root, path = tmp_path / "runs", write_study(tmp_path, 40, [0])
    command = [*COMMAND, "run", str(path), "--root", str(root), "--workers", "1"]
    both = [start(command, name) for name in ("one", "two")]
    assert [process.wait(400) for process in both] == [0, 0]
    (run,) = (Run(config, root) for config in Study.load(path).configs())
    assert run.table("metrics").epoch.is_unique and (run.folder / "train.ipynb").exists()
    said = (tmp_path / "one").read_text() + (tmp_path / "two").read_text()
    assert f"{run.folder} is being written by process" in said and "waiting for it" in said
    assert_as_trained_here(path, root, tmp_path / "alone")


@pytest.mark.faults
def test_a_state_that_is_set_aside_is_told_on_the_terminal(tmp_path, start):
    root, path = tmp_path / "runs", write_study(tmp_path, 3, [0])
    (config,) = Study.load(path).configs()
    folder = Run(config, root).folder
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"no state")
    assert start([*COMMAND, "run", str(path), "--root", str(root)]).wait(240) == 0
    said = (tmp_path / "err").read_text()
    assert f"{folder}/state.pt cannot be used" in said and "starts anew" in said


# A cluster elsewhere


class Cluster:
    """A Dask scheduler and its workers, started by hand on the loopback."""

    def __init__(self, start, folder: Path) -> None:
        self.start, self.folder = start, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        options = ["--host", "127.0.0.1", "--port", self.address.rpartition(":")[2], "--no-dashboard"]
        start([sys.executable, "-m", "distributed.cli.dask_scheduler", *options], "scheduler")
        wait_for(lambda: "Scheduler at" in (folder / "scheduler").read_text())

    def worker(self, name: str, cwd: Path = PROJECT, **environment: str) -> subprocess.Popen:
        options = ["--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1", "--no-nanny", "--name", name]
        scratch = ["--local-directory", str(self.folder / "tmp")]
        command = [sys.executable, "-m", "distributed.cli.dask_worker", self.address, *options, *scratch]
        process = self.start(command, name, cwd, **environment)
        wait_for(lambda: "Registered to" in (self.folder / name).read_text())
        return process


@pytest.fixture
def cluster(start, tmp_path):
    return Cluster(start, tmp_path)


def run_on(cluster: Cluster, path: Path, root: Path) -> list[str]:
    return [*COMMAND, "run", str(path), "--root", str(root), "--scheduler", cluster.address]


@pytest.mark.faults
def test_a_study_on_a_cluster_survives_a_killed_worker_and_gives_the_local_numbers(tmp_path, start, cluster):
    root, path = tmp_path / "runs", write_study(tmp_path, 30, [0, 1, 2])
    first, _ = cluster.worker("first"), cluster.worker("second")
    process = start(run_on(cluster, path, root))
    wait_for(lambda: len(list(root.glob("*/state.pt"))) == 2 and kernels_below(first))
    (kernel,) = kernels_below(first)
    first.kill()
    kernel.wait(10)
    assert process.wait(400) == 0
    said = (tmp_path / "err").read_text()
    assert "has stopped: another executes again" in said and "Traceback" not in said
    assert_as_trained_here(path, root, tmp_path / "alone")


@pytest.mark.faults
def test_ctrl_c_stops_the_kernels_of_a_cluster_and_leaves_its_workers(tmp_path, start, cluster):
    root, path = tmp_path / "runs", write_study(tmp_path, 100_000, [0, 1])
    workers = [cluster.worker("first"), cluster.worker("second")]
    process = start(run_on(cluster, path, root))
    wait_for(lambda: len(list(root.glob("*/state.pt"))) == 2)
    kernels = [kernel for worker in workers for kernel in kernels_below(worker)]
    assert len(kernels) == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    said = (tmp_path / "err").read_text()
    assert "Stopped." in said and "Traceback" not in said
    assert not psutil.wait_procs(kernels, timeout=30)[1] and all(worker.poll() is None for worker in workers)
    time.sleep(3)
    assert not [kernel for worker in workers for kernel in kernels_below(worker)]  # nor is one started again
    path = write_study(tmp_path, 2, [5])  # and they serve the next study
    assert start(run_on(cluster, path, root)).wait(240) == 0


def refused(command: list[str], start, tmp_path: Path) -> str:
    """The one sentence that a command ends with, status 2, within 30 s of its start and of imports."""
    begin = time.monotonic()
    assert start(command, "refused").wait(60) == 2
    assert time.monotonic() - begin < 45
    (line,) = (tmp_path / "refused").read_text().strip().splitlines()
    return line


@pytest.mark.faults
def test_what_is_no_cluster_or_cannot_run_the_study_is_refused_in_one_sentence(tmp_path, start, cluster):
    root, path = tmp_path / "runs", write_study(tmp_path, 1, [0])
    assert "has no workers; start some" in refused(run_on(cluster, path, root), start, tmp_path)

    broken = tmp_path / "broken" / "samlib"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('No module named samlib')")
    worker = cluster.worker("without", broken.parent)
    assert "cannot import samlib" in refused(run_on(cluster, path, root), start, tmp_path)
    worker.kill()
    worker.wait()

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        threading.Thread(target=lambda: [silent.accept() for _ in range(99)], daemon=True).start()
        for address in (f"tcp://127.0.0.1:{silent.getsockname()[1]}", "nonsense"):
            command = [*COMMAND, "run", str(path), "--root", str(root), "--scheduler", address]
            assert f"no Dask scheduler answers at {address!r}" in refused(command, start, tmp_path)


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="needs a folder that another user cannot see")
def test_a_worker_that_does_not_share_the_folder_is_named(tmp_path, start, cluster):
    hidden = Path(tempfile.mkdtemp(dir="/tmp"))  # of root alone
    try:
        path = write_study(tmp_path, 1, [0])
        code = "import os, samlib.batch.execute; from distributed.cli.dask_worker import main\n"
        code += "os.setgroups([]); os.setgid(65534); os.setuid(65534); os.environ['HOME'] = '/tmp'; os.chdir('/tmp')\n"
        code += "main()"
        options = [cluster.address, "--nthreads", "1", "--no-dashboard", "--no-nanny"]
        options += ["--host", "127.0.0.1", "--local-directory", "/tmp/samlib-nobody"]
        start([sys.executable, "-c", code, *options], "other")
        wait_for(lambda: "Registered to" in (tmp_path / "other").read_text())
        said = refused(run_on(cluster, path, hidden / "runs"), start, tmp_path)
        assert f"does not see {hidden}/runs" in said
    finally:
        shutil.rmtree(hidden)
        shutil.rmtree("/tmp/samlib-nobody", ignore_errors=True)


@pytest.mark.faults
def test_the_local_cluster_gives_nothing_to_another_user(tmp_path, start):
    """Whatever it listens on is the loopback's and answers every request with 404, or with a page that lacks bokeh."""
    root, path = tmp_path / "runs", write_study(tmp_path, 100_000, [0])
    process = start([*COMMAND, "run", str(path), "--root", str(root)])
    wait_for(lambda: list(root.glob("*/state.pt")))
    own = [c.laddr for c in psutil.Process(process.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert all(address.ip == "127.0.0.1" for address in own)
    for address in own:
        for page in ("/", "/status", "/info/main/workers.html", "/json/identity.json", "/metrics", "/api/v1"):
            with socket.create_connection(address) as caller:
                caller.sendall(f"GET {page} HTTP/1.0\r\n\r\n".encode())
                answer = caller.recv(4096)
                assert b" 404 " in answer[:20] or b"Location: status\r\n" in answer or b"bokeh" in answer, answer
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


# Surroundings


def shell(line: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    command = line.replace("samlib", f"{shlex.quote(sys.executable)} -m samlib")
    env = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", command], cwd=PROJECT, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.faults
@pytest.mark.parametrize("where", [">/dev/full 2>/dev/full", ">&- 2>&- <&-", "2>&1 | head -c 1"])
def test_a_terminal_that_is_closed_or_full_stops_no_study(where, tmp_path):
    root, path = tmp_path / "runs", write_study(tmp_path, 1, [0])
    done = shell(f"set -o pipefail; samlib run {path} --root {root} {where}", tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout
    assert not Study.load(path).missing(root) and list(root.glob("*/train.ipynb"))


def test_status_into_head_is_quiet(tmp_path):
    done = shell(f"set -o pipefail; samlib status studies/quick.yaml --root {tmp_path} | head -n 1", tmp_path)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 1


@pytest.mark.faults
def test_warnings_as_errors_and_odd_names_of_folders_run(tmp_path):
    path = write_study(tmp_path, 1, [0])
    root = tmp_path / "{config} {0} { größe"
    done = shell(f"samlib run {path} --root '{root}'", tmp_path, PYTHONWARNINGS="error", LANG="C", LC_ALL="C")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert not Study.load(path).missing(root)


def test_paths_that_lead_in_circles_or_are_not_utf8_are_one_sentence(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    path = write_study(tmp_path, 1, [0])
    for root in (f"{tmp_path}/circle", f"$'{tmp_path}/\\xff'"):
        done = shell(f"samlib status {path} --root {root}", tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    done = shell(f"samlib status {tmp_path}/circle", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.faults
@pytest.mark.parametrize("text", ["{", "distributed:\n  comm:\n    timeouts: soon"])
def test_a_broken_configuration_of_dask_is_one_sentence_or_does_not_matter(text, tmp_path):
    (tmp_path / "dask.yaml").write_text(text)
    path = write_study(tmp_path, 1, [0])
    done = shell(f"samlib run {path} --root {tmp_path}/runs", tmp_path, DASK_CONFIG=str(tmp_path))
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or (done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1), done.stderr
