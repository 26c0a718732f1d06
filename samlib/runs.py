"""The run folder: its files, written whole or not at all; its lock; and finished runs as tables."""

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from numbers import Number
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch

from samlib import PROJECT
from samlib.config import RunConfig, UserError, first_line

STATE_FORMAT = 2
STATES = ("state.pt", "state.previous.pt")
DIGEST = hashlib.sha256().digest_size  # bytes at the end of a state file, of all that comes before
# What a run measures, one CSV a subject; a run has those that its configuration asks for.
TABLES = (
    "metrics", "probes", "layers", "overlaps", "intersections", "thresholds", "noise", "sharpness", "hessian",
    "diagonal", "prediction", "convergence", "scan",
)  # fmt: skip


def write_atomic(path: Path, content: bytes) -> None:
    """The file with this content, or as it was before: a temporary file beside it, flushed, then moved into place.

    Raises UserError that names the file, its size and what the system says, such as that the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{path}: its {len(content):,} bytes could not be written ({error.strerror}); make room and start again: "
            "what was finished is kept"
        ) from None


class Run:
    """One training on disk: `root/<run id>/`. It is done when, and only when, its summary.json is there."""

    def __init__(self, config: RunConfig, root: str | Path = "runs/local") -> None:
        self.config = config
        self.folder = Path(root) / config.run_id
        self.rows: dict[str, list[dict[str, Any]]] = {}  # of every table
        self.written: dict[str, int] = {}  # how many of them its file holds

    @property
    def id(self) -> str:
        return self.config.run_id

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json. Raises UserError where there is none, or it or config.json cannot be used."""
        _origin(self.folder)
        return _summary(self.folder)

    def table(self, name: str) -> pd.DataFrame:
        """The rows of `<name>.csv`; no rows where the run has no such table."""
        _origin(self.folder)
        path = self.folder / f"{name}.csv"
        return _read_table(path) if path.exists() else pd.DataFrame()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer a run folder: waits for another one, says for whom; dies with its process."""
        path = self.folder / "lock"
        lock = filelock.FileLock(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                holder = path.read_text().strip() or "another process"
                print(f"{self.folder} is being written by {holder}: waiting for it", file=sys.stderr, flush=True)
                lock.acquire()
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            raise UserError(f"{self.folder}: the run folder cannot be made or locked ({first_line(error)})") from None
        try:
            with suppress(OSError):  # on a full disk: what is written next says so
                path.write_text(f"process {os.getpid()} on {platform.node()}\n")
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
            yield
        finally:
            lock.release()

    def write_config(self, fingerprint: str) -> None:
        """config.json; fingerprint: of the data that the run is trained and tested on."""
        origin = {
            "run_id": self.id,
            "config": self.config.model_dump(mode="json"),
            "data": fingerprint,
            "git_commit": _git_commit(),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else [],
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        }
        write_atomic(self.folder / "config.json", json.dumps(origin, indent=1).encode())

    @property
    def described(self) -> bool:
        """Whether there is a config.json, and it is this run's."""
        try:
            return bool(_origin(self.folder))
        except UserError:
            return False

    def append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Rows for a table. Raises ValueError for a row of other columns than the rows before it."""
        table = self.rows.setdefault(name, [])
        for row in rows:
            if table and row.keys() != table[0].keys():
                raise ValueError(f"{name}: a row has the columns {list(row)}, the table {list(table[0])}")
            table.append(row)

    def write_tables(self) -> None:
        for name, rows in self.rows.items():
            if rows and self.written.get(name) != len(rows):
                write_atomic(self.folder / f"{name}.csv", pd.DataFrame(rows).to_csv(index=False).encode())
                self.written[name] = len(rows)

    def save_state(self, state: dict[str, Any]) -> None:
        """The state with the rows of all tables, and a digest after it; the state before is kept."""
        self.write_tables()
        buffer = io.BytesIO()
        torch.save({"format": STATE_FORMAT, "run_id": self.id, "rows": self.rows, **state}, buffer)
        newest, previous = (self.folder / name for name in STATES)
        incoming = self.folder / "state.incoming.pt"
        content = buffer.getvalue()
        write_atomic(incoming, content + hashlib.sha256(content).digest())
        if newest.exists():
            os.replace(newest, previous)
        os.replace(incoming, newest)

    def load_state(self, use: Callable[[dict[str, Any]], None], fingerprint: str, device: Any = "cpu") -> bool:
        """Calls `use` with the newest state that is whole and of these data; whether there was one.

        One that cannot be used, or that `use` does not take, is set aside, with a warning that says why. Afterwards the
        tables hold the rows of the state, and none where there was no state.
        """
        found = False
        self.rows, self.written = {}, {}
        for name in STATES:
            path = self.folder / name
            if not path.exists():
                continue
            found = True
            try:
                content = path.read_bytes()
                content, digest = content[:-DIGEST], content[-DIGEST:]
                if hashlib.sha256(content).digest() != digest:
                    raise ValueError("it is damaged, or of another version")
                state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
                if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
                    raise ValueError("it is of another version")
                if state.get("run_id") != self.id:
                    raise ValueError(f"it belongs to {state.get('run_id')}")
                if state.get("data") != fingerprint:
                    raise ValueError("the data have changed since the run was started")
                use(state)
            except Exception as error:  # torch raises whatever a broken pickle or archive provokes
                aside = path.with_suffix(".unusable")
                os.replace(path, aside)
                warnings.warn(
                    f"{path} cannot be used ({first_line(error)}); it is set aside as {aside.name}", stacklevel=2
                )
                continue
            self.rows = state["rows"]
            return True
        if found:
            warnings.warn(f"{self.folder} has no state left that can be used: the run starts anew", stacklevel=2)
        return False

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the tables, then summary.json, which makes the run done, and removes what only resuming needed."""
        self.write_tables()
        for name in TABLES:  # rows of an attempt whose state was lost
            if not self.rows.get(name):
                (self.folder / f"{name}.csv").unlink(missing_ok=True)
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=1).encode())
        self.clear_states()

    def clear_states(self) -> None:
        for name in (*STATES, "state.incoming.pt"):
            (self.folder / name).unlink(missing_ok=True)


def _git_commit() -> str | None:
    """The checkout's commit, with "+changes" where the work tree differs from it; None outside git."""
    try:
        ask = {"cwd": PROJECT, "capture_output": True, "text": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **ask)
        changes = subprocess.run(["git", "status", "--porcelain", "-uno", "samlib"], **ask)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "") if commit.returncode == 0 else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); remove its folder and run it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; remove its folder and run it again")
    return value


def _origin(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises UserError where the folder is not that of the run whose files it holds."""
    origin = _read_json(folder / "config.json")
    if not isinstance(origin.get("config"), dict):
        raise UserError(f"{folder} is not a run of this project; move it away, or remove it and run it again")
    if origin.get("run_id") != folder.name:
        raise UserError(f"{folder} holds the run {origin.get('run_id')!r:.200}; rename the folder so, or remove it")
    return origin


def _summary(folder: Path) -> dict[str, Any]:
    summary = _read_json(folder / "summary.json")
    texts = {"status", "device_name"}
    numbers = (value for name, value in summary.items() if name not in texts)
    if summary.get("status") not in ("done", "diverged") or not all(isinstance(v, Number | None) for v in numbers):
        raise UserError(f"{folder / 'summary.json'} is not the summary of a run; remove its folder and run it again")
    return summary


def _read_table(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, float_precision="round_trip")
        if not {"epoch", "step"} & set(frame.columns):
            raise ValueError("it is not a table of a run")
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path} cannot be read ({first_line(error)}); remove its folder and run it again") from None
    return frame


def finished(root: str | Path = "runs/local", ids: Iterable[str] | None = None) -> list[Path]:
    """The folders of the finished runs under a root, by name; ids: of these runs alone, in their order."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder of runs; `make study` makes runs/local, a clone brings runs/published")
    folders = {p.parent.name: p.parent for p in root.glob("*/summary.json")}
    return [folders[name] for name in (sorted(folders) if ids is None else ids) if name in folders]


def load_runs(root: str | Path = "runs/local", ids: Iterable[str] | None = None) -> pd.DataFrame:
    """One row a finished run, indexed by run id: its configuration, and its summary beside it.

    root: the folder of runs; ids: only these, in their order, leaving out what is not done. `status` is "done" or
    "diverged": a diverged run's final numbers are NaN. Raises UserError for a root that is not there or a file that is
    not what it should be.
    """
    default = RunConfig().model_dump(mode="json")
    rows = [{"run": f.name, **default, **_origin(f)["config"], **_summary(f)} for f in finished(root, ids)]
    return pd.DataFrame(rows, columns=None if rows else ["run", *default, "status"]).set_index("run")


def load_table(name: str, root: str | Path = "runs/local", ids: Iterable[str] | None = None) -> pd.DataFrame:
    """The rows of one table of many runs, with the column `run` first; empty where none has it.

    name: one of TABLES; ids: only these runs. Raises UserError for an unknown table or root.
    """
    if name not in TABLES:
        raise UserError(f"there is no table {name!r}; the tables are {', '.join(TABLES)}")
    paths = {folder.name: folder / f"{name}.csv" for folder in sorted(finished(root, ids)) if _origin(folder)}
    frames = {run: _read_table(path) for run, path in paths.items() if path.exists()}
    if not frames:
        return pd.DataFrame(columns=["run"])
    return pd.concat(frames, names=["run", None]).reset_index(level=0).reset_index(drop=True)
