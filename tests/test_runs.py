import hashlib
import json
import multiprocessing
import os
import random
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from samlib.config import RunConfig, UserError
from samlib.runs import DIGEST, TABLES, Run, finished, load_runs, load_table, write_atomic

CONFIG = RunConfig(dataset="digits", mix="sam", seed=3)
FORK = multiprocessing.get_context("fork")
DATA = "fingerprint of some data"


def a_run(root, seed=3, **summary) -> Run:
    """A finished run of two evaluations, without training one."""
    run = Run(CONFIG.model_copy(update={"seed": seed}), root)
    with run.lock():
        run.write_config(DATA)
        run.append("metrics", ({"epoch": e, "step": 10 * e, "test_accuracy": 0.5 + 0.1 * e} for e in (1, 2)))
        run.finish({"status": "done", "test_accuracy": 0.7} | summary)
    return run


def load(run: Run, data: str = DATA) -> dict | None:
    """The state that a run goes on from; None where it starts anew."""
    found = []
    return found[0] if run.load_state(found.append, data) else None


def digest(root: Path) -> str:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return hashlib.sha256(repr([(str(p), p.read_bytes()) for p in files]).encode()).hexdigest()


# Atomic files


def test_a_file_is_written_whole(tmp_path):
    write_atomic(tmp_path / "a", b"one")
    write_atomic(tmp_path / "a", b"two, longer")
    assert (tmp_path / "a").read_bytes() == b"two, longer" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step, error):
    write_atomic(tmp_path / "state.pt", b"old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        write_atomic(tmp_path / "state.pt", b"x" * 12345)
    assert (tmp_path / "state.pt").read_bytes() == b"old" and os.listdir(tmp_path) == ["state.pt"]
    if isinstance(error, OSError):
        text = str(raised.value)
        assert str(tmp_path / "state.pt") in text and "12,345 bytes" in text and "No space left on device" in text


def test_what_a_killed_write_left_is_removed_by_the_next_writer(tmp_path):
    run = Run(CONFIG, tmp_path)
    run.folder.mkdir()
    (run.folder / ".state.incoming.pt.4711.tmp").write_bytes(b"half")
    with run.lock():
        assert os.listdir(run.folder) == ["lock"]


# Tables


def test_a_table_comes_back_as_it_was_written_to_the_last_bit(tmp_path):
    rows = [
        {"step": 0, "value": 0.1 + 0.2, "layer": "layer1.0.conv1.weight", "note": 'a, "b"'},
        {"step": 1, "value": 1e-310, "layer": "fc.bias", "note": "plain"},
        {"step": 2, "value": float("nan"), "layer": "bn", "note": "ü"},
        {"step": 3, "value": float("inf"), "layer": "bn", "note": "x"},
    ]
    run = Run(CONFIG, tmp_path)
    with run.lock():
        run.write_config(DATA)
        run.append("layers", rows)
        run.write_tables()
    pd.testing.assert_frame_equal(run.table("layers"), pd.DataFrame(rows), check_exact=True, check_dtype=False)


def test_a_row_with_other_columns_is_an_error(tmp_path):
    run = Run(CONFIG, tmp_path)
    run.append("metrics", [{"a": 1, "b": 2}])
    for row in ({"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "c": 2}):
        with pytest.raises(ValueError, match="metrics: a row has the columns .*, the table \\['a', 'b'\\]"):
            run.append("metrics", [row])


def test_tables_of_a_resumed_run_have_the_bytes_of_one_that_never_stopped(tmp_path):
    rows = [
        {
            "epoch": k,
            "step": 7 * k,
            "value": 1 / (k + 1) if k % 3 else float("nan"),
            "name": f"layer, {k}",
            "ü": k % 2 == 0,
        }
        for k in range(6)
    ]
    files = []
    for stops in ((), (1, 2, 4)):
        run = Run(CONFIG, tmp_path / str(len(stops)))
        with run.lock():
            for k, row in enumerate(rows):
                run.append("layers", [row])
                run.save_state({"data": DATA})
                if k in stops:
                    run.append("layers", [row])  # lost with the process
                    run = Run(CONFIG, run.folder.parent)
                    assert load(run)
            run.finish({"status": "done"})
        files.append((run.folder / "layers.csv").read_bytes())
    assert files[0] == files[1] and files[0].count(b"\n") == 7


def test_a_run_without_a_table_has_no_rows_of_it(tmp_path):
    run = a_run(tmp_path)
    assert run.table("scan").empty and load_table("scan", tmp_path).empty
    assert list(load_table("scan", tmp_path).columns) == ["run"]


# States


def saved(root, *steps) -> Run:
    run = Run(CONFIG, root)
    with run.lock():
        for step in steps:
            run.append("metrics", [{"step": step, "loss": step / 3}])
            run.save_state({"step": step, "weights": torch.full((3,), float(step)), "data": DATA})
    return run


def test_a_state_comes_back_with_the_rows_that_were_there(tmp_path):
    saved(tmp_path, 1, 2, 3)
    again = Run(CONFIG, tmp_path)
    state = load(again)
    assert state["step"] == 3 and state["weights"].tolist() == [3.0] * 3
    assert again.rows == {"metrics": [{"step": k, "loss": k / 3} for k in (1, 2, 3)]}


def test_rows_that_are_younger_than_the_state_are_cut_off(tmp_path):
    run = saved(tmp_path, 1, 2)
    run.append("metrics", [{"step": 3, "loss": 1.0}])
    run.write_tables()
    again = Run(CONFIG, tmp_path)
    assert load(again)["step"] == 2
    again.write_tables()
    assert again.folder.joinpath("metrics.csv").read_text().splitlines()[1:] == ["1,0.3333333333333333", f"2,{2 / 3}"]


def test_a_table_that_was_lost_or_damaged_is_written_again_from_the_state(tmp_path):
    before = (saved(tmp_path, 1, 2).folder / "metrics.csv").read_bytes()
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(b"step\n"), lambda p: p.write_bytes(b"\xff" * 99)):
        damage(Run(CONFIG, tmp_path).folder / "metrics.csv")
        again = Run(CONFIG, tmp_path)
        load(again)
        again.write_tables()
        assert (again.folder / "metrics.csv").read_bytes() == before


def test_a_table_without_rows_yet_does_not_spoil_the_state(tmp_path):
    run = Run(CONFIG, tmp_path)
    with run.lock():
        run.append("overlaps", [])
        run.save_state({"step": 1, "data": DATA})
    assert load(Run(CONFIG, tmp_path))["step"] == 1 and not (run.folder / "overlaps.csv").exists()


def rewritten(path, **fields):
    """The state with other fields, and a digest that fits."""
    torch.save(torch.load(path, weights_only=True) | fields, path)
    signed(path)


def signed(path):
    path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())


def with_code(path):
    torch.save({"format": 2, "evil": Path("/")}, path)  # a class: weights_only refuses it
    signed(path)


UNUSABLE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-200]), "it is damaged"),
    "cut to its head": (lambda p: p.write_bytes(p.read_bytes()[:10]), "it is damaged"),
    "empty": (lambda p: p.write_bytes(b""), "it is damaged"),
    "text": (lambda p: p.write_text("no state"), "it is damaged"),
    "without a digest": (lambda p: p.write_bytes(p.read_bytes()[:-DIGEST]), "it is damaged, or of another version"),
    "another version": (lambda p: rewritten(p, format=999), "it is of another version"),
    "another run's": (lambda p: rewritten(p, run_id="another"), "it belongs to another"),
    "of other data": (lambda p: rewritten(p, data="other"), "the data have changed since the run was started"),
    "a pickle with code": (with_code, "eights"),  # torch's own words, of weights_only
    "a list": (lambda p: (torch.save([1, 2], p), signed(p)), "it is of another version"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "Is a directory"),
}


@pytest.mark.parametrize("how", UNUSABLE)
def test_an_unusable_state_is_set_aside_and_the_one_before_is_used(tmp_path, how):
    damage, words = UNUSABLE[how]
    run = saved(tmp_path, 1, 2, 3)
    damage(run.folder / "state.pt")
    again = Run(CONFIG, tmp_path)
    with pytest.warns(UserWarning, match=f"state.pt cannot be used .*{words}.* set aside as state.unusable"):
        state = load(again)
    assert state["step"] == 2 and [row["step"] for row in again.rows["metrics"]] == [1, 2]
    assert (run.folder / "state.unusable").exists() and not (run.folder / "state.pt").exists()


def flipped(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def zeroed(content: bytes, draw: random.Random) -> bytes:
    block = draw.choice([k for k in range(0, len(content), 4096) if any(content[k : k + 4096])])
    return content[:block] + bytes(len(content[block : block + 4096])) + content[block + 4096 :]


@pytest.mark.parametrize("damage, times", [(flipped, 40), (zeroed, 15)])
def test_a_state_with_a_flipped_bit_or_a_zeroed_block_is_never_used(tmp_path, damage, times):
    run = Run(CONFIG, tmp_path)
    with run.lock():
        for step in (1, 2):
            run.append("metrics", [{"step": step}])
            run.save_state({"step": step, "weights": torch.randn(20_000), "data": DATA})
    whole, before = ((run.folder / name).read_bytes() for name in ("state.pt", "state.previous.pt"))
    draw = random.Random(0)
    for _ in range(times):
        (run.folder / "state.pt").write_bytes(damage(whole, draw))
        with pytest.warns(UserWarning, match="it is damaged"):
            assert load(Run(CONFIG, tmp_path))["step"] == 1
        assert (run.folder / "state.previous.pt").read_bytes() == before


def test_a_state_that_its_user_does_not_take_is_set_aside_and_the_one_before_is_tried(tmp_path):
    saved(tmp_path, 1, 2)
    tried = []

    def use(state):
        tried.append(state["step"])
        if state["step"] == 2:
            raise KeyError("model")

    with pytest.warns(UserWarning, match="cannot be used .*model"):
        assert Run(CONFIG, tmp_path).load_state(use, DATA)
    assert tried == [2, 1]


def test_on_other_data_the_run_starts_anew_and_says_why(tmp_path):
    saved(tmp_path, 1, 2)
    again = Run(CONFIG, tmp_path)
    with pytest.warns(UserWarning) as warned:
        assert load(again, "other data") is None
    texts = [str(w.message) for w in warned]
    assert sum("the data have changed since the run was started" in text for text in texts) == 2
    assert "starts anew" in texts[-1] and not again.rows


def test_with_no_state_left_the_run_starts_anew_and_says_so(tmp_path):
    run = saved(tmp_path, 1, 2)
    for path in run.folder.glob("state*.pt"):
        path.write_bytes(b"")
    again = Run(CONFIG, tmp_path)
    with pytest.warns(UserWarning) as warned:
        assert load(again) is None
    assert "starts anew" in str(warned[-1].message) and len(warned) == 3 and not again.rows


def test_without_any_state_there_is_no_warning(tmp_path, recwarn):
    assert load(Run(CONFIG, tmp_path)) is None and not recwarn


def test_a_finished_run_keeps_no_state_and_no_table_of_a_lost_attempt(tmp_path):
    run = saved(tmp_path, 1, 2)
    (run.folder / "scan.csv").write_text("step\n1\n")
    with run.lock():
        run.finish({"status": "done"})
    assert sorted(os.listdir(run.folder)) == ["lock", "metrics.csv", "summary.json"]


# The lock


def hold(run, ready, seconds):
    with run.lock():
        ready.set()
        time.sleep(seconds)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a run, and the run."""
    run, ready = Run(CONFIG, tmp_path), FORK.Event()
    process = FORK.Process(target=hold, args=(run, ready, 60))
    process.start()
    assert ready.wait(20)
    yield process, run
    process.kill()
    process.join()


def test_a_lock_dies_with_its_process(holder, capsys):
    process, run = holder
    process.kill()
    process.join()
    with run.lock():
        assert (run.folder / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_second_writer_waits_and_says_for_whom(tmp_path, capsys):
    run, ready = Run(CONFIG, tmp_path), FORK.Event()
    process = FORK.Process(target=hold, args=(run, ready, 0.5))
    process.start()
    assert ready.wait(20)
    start = time.monotonic()
    with run.lock():
        assert time.monotonic() - start > 0.3
    process.join()
    assert f"being written by process {process.pid} on" in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*: the run folder cannot be made or locked"):
        with Run(CONFIG, tmp_path / "file").lock():
            pass


# Loading


def test_runs_are_loaded_with_their_configuration_and_their_summary(tmp_path):
    ids = [a_run(tmp_path, seed, test_accuracy=seed / 10).id for seed in (1, 2, 3)]
    frame = load_runs(tmp_path)
    assert sorted(frame.index) == sorted(ids) and frame.index.name == "run"
    assert frame.loc[ids[1], "seed"] == 2 and frame.loc[ids[1], "test_accuracy"] == 0.2
    assert frame.loc[ids[0], "mix"] == "sam" and frame.loc[ids[0], "weight_decay"] == 5e-4
    assert load_runs(tmp_path, [ids[2], "not-done", ids[0]]).index.tolist() == [ids[2], ids[0]]
    table = load_table("metrics", tmp_path, ids[:2])
    assert table.columns[0] == "run" and sorted(table.run.unique()) == sorted(ids[:2]) and len(table) == 4


def test_a_run_of_an_earlier_version_has_the_defaults_of_fields_added_since(tmp_path):
    run = a_run(tmp_path)
    origin = json.loads((run.folder / "config.json").read_text())
    del origin["config"]["precision"]
    (run.folder / "config.json").write_text(json.dumps(origin))
    assert load_runs(tmp_path).loc[run.id, "precision"] == "fp32"


def test_what_is_not_finished_is_not_loaded(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "a-study").mkdir()
    frame = load_runs(tmp_path)
    assert frame.empty and {"seed", "mix", "status"} <= set(frame.columns)
    assert load_table("metrics", tmp_path).empty and finished(tmp_path) == []


def write(name, content):
    return lambda run: (run.folder / name).write_bytes(content)


# What is done to a finished run among others, and the words that name it.
DAMAGED = {
    "summary empty": (write("summary.json", b""), "summary.json cannot be read"),
    "summary truncated": (write("summary.json", b'{"status": "do'), "summary.json cannot be read"),
    "summary binary": (write("summary.json", b"\x80\x81\xff"), "summary.json cannot be read"),
    "summary a list": (write("summary.json", b"[1]"), "summary.json does not hold a JSON object"),
    "summary nested without end": (write("summary.json", b"[" * 200_000), "summary.json cannot be read"),
    "summary of nothing": (write("summary.json", b"{}"), "summary.json is not the summary of a run"),
    "summary of another state": (write("summary.json", b'{"status": "started"}'), "is not the summary of a run"),
    "summary of words": (
        write("summary.json", b'{"status": "done", "test_accuracy": "high"}'),
        "is not the summary of a run",
    ),
    "summary with a list": (write("summary.json", b'{"status": "done", "steps": [3]}'), "is not the summary of a run"),
    "summary a folder": (
        lambda run: ((run.folder / "summary.json").unlink(), (run.folder / "summary.json").mkdir()),
        "summary.json cannot be read",
    ),
    "config missing": (lambda run: (run.folder / "config.json").unlink(), "config.json cannot be read"),
    "config empty": (write("config.json", b""), "config.json cannot be read"),
    "config of something else": (write("config.json", b'{"config": 3}'), "is not a run of this project"),
    "config of another run": (
        lambda run: (run.folder / "config.json").write_bytes(
            (run.folder / "config.json").read_bytes().replace(run.id.encode(), b"another-run")
        ),
        "holds the run 'another-run'; rename the folder so, or remove it",
    ),
    "config null": (write("config.json", b"null"), "config.json does not hold a JSON object"),
}
DAMAGED_TABLES = {
    "empty": (write("metrics.csv", b""), "metrics.csv cannot be read"),
    "binary": (write("metrics.csv", bytes(range(128, 256)) * 10), "metrics.csv cannot be read"),
    "of something else": (write("metrics.csv", b"name,age\r\nada,36\r\n"), "it is not a table of a run"),
    "ragged": (write("metrics.csv", b"epoch,step\r\n1,2\r\n1,2,3,4\r\n"), "metrics.csv cannot be read"),
    "a folder": (
        lambda run: ((run.folder / "metrics.csv").unlink(), (run.folder / "metrics.csv").mkdir()),
        "metrics.csv cannot be read",
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_run_is_named_with_what_to_do_and_the_others_are_left_alone(tmp_path, how):
    damage, words = DAMAGED[how]
    a_run(tmp_path, 1)
    damage(a_run(tmp_path, 2))
    before = digest(tmp_path)
    with pytest.raises(UserError) as refused:
        load_runs(tmp_path)
    text = str(refused.value)
    assert words in text and "-s2-" in text and "remove" in text and "\n" not in text
    assert digest(tmp_path) == before


@pytest.mark.parametrize("how", DAMAGED_TABLES)
def test_a_damaged_table_is_named_with_what_to_do(tmp_path, how):
    damage, words = DAMAGED_TABLES[how]
    a_run(tmp_path, 1)
    damage(a_run(tmp_path, 2))
    with pytest.raises(UserError) as refused:
        load_table("metrics", tmp_path)
    text = str(refused.value)
    assert words in text and "-s2-" in text and "remove" in text and "\n" not in text


@pytest.mark.parametrize("load", [load_runs, finished, lambda root: load_table("metrics", root)])
def test_a_root_that_is_not_there_or_no_folder_is_refused(tmp_path, load):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match=f"{root} is not a folder of runs"):
            load(root)


@pytest.mark.parametrize("name", ["metric", "", "../metrics", "metrics.csv"])
def test_an_unknown_table_is_refused_with_the_known_ones(tmp_path, name):
    with pytest.raises(UserError, match="the tables are metrics, probes, layers"):
        load_table(name, tmp_path)
    assert len(TABLES) == len(set(TABLES))


def test_the_summary_of_an_unfinished_run_is_refused(tmp_path):
    run = saved(tmp_path, 1)
    with pytest.raises(UserError, match="config.json cannot be read"):
        _ = run.summary
    run.write_config(DATA)
    with pytest.raises(UserError, match="summary.json cannot be read"):
        _ = run.summary


@pytest.mark.parametrize("read", [lambda run: run.summary, lambda run: run.table("metrics")])
@pytest.mark.parametrize("load", [load_runs, lambda root: load_table("metrics", root)])
def test_a_folder_with_the_files_of_another_run_is_refused_by_every_reader(tmp_path, read, load):
    run, other = a_run(tmp_path, 1), a_run(tmp_path / "elsewhere", 2)
    for name in ("config.json", "summary.json", "metrics.csv"):
        (run.folder / name).write_bytes((other.folder / name).read_bytes())
    for refuse in (lambda: read(run), lambda: load(tmp_path)):
        with pytest.raises(UserError, match=f"{run.folder} holds the run '{other.id}'"):
            refuse()
    assert not run.described and other.described


def test_a_thousand_runs_load_in_time_to_work_with(tmp_path):
    run = a_run(tmp_path)
    files = {name: (run.folder / name).read_bytes() for name in ("config.json", "summary.json", "metrics.csv")}
    for k in range(999):
        (folder := tmp_path / f"run-{k}").mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content.replace(run.id.encode(), folder.name.encode()))
    start = time.perf_counter()
    assert len(load_runs(tmp_path)) == 1000
    loaded = time.perf_counter()
    assert len(load_table("metrics", tmp_path)) == 2000
    print(f"1000 runs: {loaded - start:.2f} s, one table of each {time.perf_counter() - loaded:.2f} s")
