"""Real kills of real processes, and what is on disk after them."""

import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
from test_train import MIXES, PROBED, assert_same_run, config, trained
from tqdm import tqdm

import samlib.train
from samlib.config import RunConfig, UserError
from samlib.runs import Run, load_runs
from samlib.sam import SAM
from samlib.train import Training, train

SERVER = multiprocessing.get_context("forkserver")  # imports once; every process of a test is a fork of it
SERVER.set_forkserver_preload(["samlib.train", "samlib.sharpness", "torch._dynamo", "pytest"])


def settings(mix: str, **fields) -> RunConfig:
    """A state after every step, so that many kills fall into the writing of one; 7 steps an epoch."""
    return config(mix=mix, state_seconds=0.0, **PROBED, **fields)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The runs that were never interrupted, by configuration."""
    runs = {}

    def get(config: RunConfig) -> Run:
        if config.run_id not in runs:
            runs[config.run_id] = train(config, tmp_path_factory.mktemp("whole"), progress=False)
        return runs[config.run_id]

    return get


def assert_as_never_interrupted(whole: Run, root: Path) -> None:
    run = Run(whole.config, root)
    assert_same_run(whole, run)  # weights and tables to the last bit, so no row is there twice and none is missing
    left = {p.name for p in run.folder.iterdir()} - {"lock", "config.json", "summary.json", "weights.pt"}
    assert {name for name in left if not name.endswith(".csv")} == set()
    assert load_runs(root).index.tolist() == [run.id]


# What runs in a process of its own


def attempt(config: RunConfig, root: Path, fault: tuple[str, int] | None = None) -> None:
    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes, which a kill would leave behind
    resume = Training.resume

    def note(training):  # one line a process that really trains
        with open(root / "started", "a") as file:
            file.write(f"{os.getpid()}\n")
        resume(training)

    Training.resume = note
    if fault:
        plant(*fault)
    train(config, root, progress=False)


def plant(place: str, n: int) -> None:
    """SIGKILL from within the n-th call of a function; n < 0: after the call -n instead of before it."""
    owner, name = {
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "unlink": (Path, "unlink"),
        "update": (SAM, "_update"),
        "evaluate": (samlib.train, "evaluate"),
        "summary": (Run, "finish"),
        "clear": (Run, "clear_states"),
    }[place]
    original, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(0)
        if len(calls) == n:
            if place == "fsync":  # the kernel has got half of the file
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == -n:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def start(*args, target=attempt):
    process = SERVER.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def wait_for(condition, seconds: float = 1800.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def starts(root: Path) -> list[str]:
    return (root / "started").read_text().split() if (root / "started").exists() else []


def start_training(config: RunConfig, root: Path):
    """A process that has got to its training, or has ended."""
    before = len(starts(root))
    process = start(config, root)
    wait_for(lambda: len(starts(root)) > before or process.exitcode is not None)
    return process


def exit_code(process) -> int:
    process.join(1800)  # a machine may be slow, or asleep
    return process.exitcode


# Kills


def kill_in(place: str, calls, config: RunConfig, root: Path) -> int:
    """One process after another on the same run, each killed at another call of a place; how many were."""
    codes = [exit_code(start(config, root, (place, n))) for n in calls]
    assert set(codes) <= {0, -signal.SIGKILL}
    return codes.count(-signal.SIGKILL)


@pytest.mark.parametrize("place, calls", [("fsync", [1, 2, 6, 8]), ("replace", [3, 7, 8, 9, -6, -7, -8, 10])])
def test_a_kill_inside_a_state_write_costs_nothing(whole, tmp_path, place, calls):
    config = settings("checkpoint13")
    assert kill_in(place, calls, config, tmp_path) == len(calls)
    assert exit_code(start(config, tmp_path)) == 0
    assert_as_never_interrupted(whole(config), tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("place, sign", [("fsync", 1), ("replace", 1), ("replace", -1)])
def test_a_kill_at_any_file_of_a_state_write_costs_nothing(whole, tmp_path, place, sign):
    config = settings("checkpoint13")
    assert kill_in(place, [sign * n for n in range(1, 19)], config, tmp_path) >= 10
    assert exit_code(start(config, tmp_path)) == 0
    assert_as_never_interrupted(whole(config), tmp_path)


@pytest.mark.parametrize("mix", ["sgd", pytest.param("sam", marks=pytest.mark.faults), "checkpoint13"])
def test_a_kill_inside_the_last_step_of_an_epoch_costs_nothing(whole, tmp_path, mix):
    config = settings(mix)
    # Before and after the update of step 7 of 7; again; then in the evaluation after it, and in the very last step.
    for fault in [("update", 7), ("update", -1), ("evaluate", 1), ("evaluate", -2), ("update", 7), ("evaluate", 1)]:
        assert exit_code(start(config, tmp_path, fault)) == -signal.SIGKILL
    assert exit_code(start(config, tmp_path)) == 0
    assert_as_never_interrupted(whole(config), tmp_path)


@pytest.mark.parametrize("place, done", [("summary", False), ("clear", True)])
def test_a_kill_while_the_run_is_finished_costs_nothing(whole, tmp_path, place, done):
    config = settings("sgd")
    assert exit_code(start(config, tmp_path, (place, 1))) == -signal.SIGKILL
    assert Run(config, tmp_path).done == done
    assert exit_code(start(config, tmp_path)) == 0
    assert len(starts(tmp_path)) == 2 - done
    assert_as_never_interrupted(whole(config), tmp_path)


def killed_at_random(whole, root: Path, config: RunConfig, kills: int, draw: random.Random) -> None:
    """Runs from start to end, killed again and again, until so many kills have hit a process at work."""
    hit = attempts = 0
    while hit < kills:
        attempts += 1
        folder = root / str(attempts)
        folder.mkdir()
        here = 0
        while not Run(config, folder).done:
            process = start_training(config, folder)
            process.join(draw.uniform(0, 0.2) if here < 3 * kills else 1800)
            process.kill()
            code = exit_code(process)
            assert code in (0, -signal.SIGKILL)
            here += code != 0
        assert_as_never_interrupted(whole, folder)
        hit += here
    print(f"{config.mix}: {hit} kills of {attempts} runs")


@pytest.mark.parametrize("mix", MIXES)
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(whole, tmp_path, mix):
    config = settings(mix)
    killed_at_random(whole(config), tmp_path, config, 3, random.Random(mix))


@pytest.mark.faults
@pytest.mark.parametrize("mix", MIXES)
def test_a_run_killed_at_many_random_moments_ends_in_the_same_bits(whole, tmp_path, mix):
    config = settings(mix, epochs=10)
    killed_at_random(whole(config), tmp_path, config, 8, random.Random())


@pytest.mark.faults
def test_a_run_without_probes_and_with_a_state_now_and_then_is_resumed_too(whole, tmp_path):
    settings = config(mix="sam", epochs=4, state_seconds=0.02)
    killed_at_random(whole(settings), tmp_path, settings, 3, random.Random(0))


# Two processes


def test_two_processes_on_one_run_train_it_once(whole, tmp_path):
    config = settings("sam")
    both = [start(config, tmp_path), start(config, tmp_path)]
    assert [exit_code(process) for process in both] == [0, 0]
    assert len(starts(tmp_path)) == 1
    assert_as_never_interrupted(whole(config), tmp_path)


def test_the_run_of_a_killed_process_is_taken_over_by_the_one_that_waits(whole, tmp_path):
    config = settings("sam", epochs=4)
    first = start(config, tmp_path)
    wait_for(lambda: (Run(config, tmp_path).folder / "state.pt").exists())
    second = start(config, tmp_path)
    time.sleep(0.1)
    first.kill()
    assert exit_code(first) == -signal.SIGKILL and exit_code(second) == 0
    assert len(starts(tmp_path)) == 2
    assert_as_never_interrupted(whole(config), tmp_path)


# A full disk


def limited(config: RunConfig, root: Path, size: int, answer) -> None:
    """Trains where no file may be longer than so many bytes: the kernel refuses, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        train(config, root, progress=False)
        answer.send("it was not refused")
    except UserError as error:
        answer.send(str(error))
    except BaseException as error:
        answer.send(repr(error))


def message(config: RunConfig, root: Path, size: int) -> str:
    here, there = SERVER.Pipe()
    process = start(config, root, size, there, target=limited)
    text = here.recv() if here.poll(1800) else ""
    process.join()
    return text


@pytest.mark.parametrize(
    "before, size, name",
    [
        (0, 100, "config.json"),
        (0, 20_000, "state.incoming.pt"),
        (5, 100, "probes.csv"),
        (5, 20_000, "state.incoming.pt"),
    ],
)
def test_a_full_disk_stops_a_run_with_the_file_and_its_size_and_it_resumes(whole, tmp_path, before, size, name):
    config = settings("checkpoint13")
    folder = Run(config, tmp_path).folder
    if before:
        assert exit_code(start(config, tmp_path, ("update", before))) == -signal.SIGKILL
    kept = {p.name: p.read_bytes() for p in folder.glob("state*.pt")}
    text = message(config, tmp_path, size)
    assert text.startswith(f"{folder / name}: its ") and "bytes could not be written (File too large" in text, text
    assert "make room and start again" in text and "\n" not in text
    assert not list(folder.glob(".*.tmp")) and not (folder / "summary.json").exists()
    assert {p.name: p.read_bytes() for p in folder.glob("state*.pt")} == kept
    assert exit_code(start(config, tmp_path)) == 0
    assert_as_never_interrupted(whole(config), tmp_path)


def test_a_full_disk_at_the_end_keeps_the_run_unfinished_and_the_weights_whole(whole, tmp_path):
    config = settings("sgd").model_copy(update={"state_seconds": 1e6})
    folder = Run(config, tmp_path).folder
    text = message(config, tmp_path, 10_000)
    assert text.startswith(f"{folder / 'weights.pt'}: its ")
    assert not (folder / "weights.pt").exists() and not Run(config, tmp_path).done
    assert exit_code(start(config, tmp_path)) == 0
    assert_as_never_interrupted(whole(config), tmp_path)


def test_the_processes_of_these_tests_train_as_this_one_does(tmp_path):
    here = trained(tmp_path / "here", mix="sam")
    (tmp_path / "there").mkdir()
    assert exit_code(start(here.config, tmp_path / "there")) == 0
    assert_same_run(here, Run(here.config, tmp_path / "there"))
