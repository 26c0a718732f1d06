"""The run folder: its files, written whole or not at all; its lock; and finished runs as tables."""

import csv
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch

from samlib import PROJECT
from samlib.config import RunConfig, UserError

STATE_FORMAT = 1
STATES = ("state.pt", "state.previous.pt")
# What a run measures, one CSV a subject; a run has those that its configuration asks for.
TABLES = (
    "metrics",
    "probes",
    "layers",
    "overlaps",
    "intersections",
    "thresholds",
    "sharpness",
    "hessian",
    "diagonal",
    "prediction",
    "convergence",
    "scan",
)


def write_atomic(path: Path, content: bytes) -> None:
    """The file with this content, or as it was before: a temporary file beside it, flushed, then moved into place.

    Raises UserError that names the file and the room it needs when the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: its {len(content):,} bytes could not be written ({error.strerror}; "
            f"{_free(path):,} bytes are free there); make room and start again: what was finished is kept"
        ) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _free(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return 0


class Table:
    """Rows of one CSV file, all with the same columns; kept as the lines they are written as."""

    def __init__(self, lines: list[str] | None = None) -> None:
        self.header = lines[0] if lines else ""
        self.rows = lines[1:] if lines else []
        self.written = len(self.rows)

    def append(self, row: dict[str, Any]) -> None:
        header = _line(row)
        if self.header and header != self.header:
            raise ValueError(f"a row has the columns {header}, the table {self.header}")
        self.header = header
        self.rows.append(_line(row.values()))

    def content(self) -> bytes:
        return "".join(line + "\r\n" for line in [self.header, *self.rows]).encode()


def _line(cells: Iterable) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow([repr(c) if isinstance(c, float) else c for c in cells])
    return buffer.getvalue()[:-2]


class Run:
    """One training on disk: `root/<run id>/`. It is done when, and only when, its summary.json is there."""

    def __init__(self, config: RunConfig, root: str | Path = "runs/local") -> None:
        self.config = config
        self.root = Path(root)
        self.folder = self.root / config.run_id
        self.tables: dict[str, Table] = {}

    @property
    def id(self) -> str:
        return self.config.run_id

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json. Raises UserError where there is none or it cannot be read."""
        return _read_json(self.folder / "summary.json")

    def table(self, name: str) -> pd.DataFrame:
        """The rows of `<name>.csv`; no rows where the run has no such table."""
        path = self.folder / f"{name}.csv"
        return _read_table(path) if path.exists() else pd.DataFrame()

    @contextmanager
    def lock(self, timeout: float = -1) -> Iterator[None]:
        """One writer a run folder: waits (timeout in seconds, -1: no end), says for whom; dies with its process."""
        path = self.folder / "lock"
        lock = filelock.FileLock(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            holder = path.read_text().strip() or "another process"
            if timeout == 0:
                raise UserError(f"{self.folder} is being written by {holder}; wait for it, or stop it") from None
            print(f"{self.folder} is being written by {holder}: waiting for it", file=sys.stderr, flush=True)
            try:
                lock.acquire(timeout=timeout)
            except filelock.Timeout:
                raise UserError(
                    f"{self.folder} is still being written by {holder} after {timeout:g} s; wait for it, or stop it"
                ) from None
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            raise UserError(f"{self.folder}: the run folder cannot be made or locked ({_first_line(error)})") from None
        try:
            with suppress(OSError):  # on a full disk: what is written next says so
                path.write_text(f"process {os.getpid()} on {platform.node()}\n")
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
            yield
        finally:
            lock.release()

    def write_config(self) -> None:
        origin = {
            "run_id": self.id,
            "config": self.config.model_dump(mode="json"),
            "git_commit": _git_commit(),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else [],
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        }
        write_atomic(self.folder / "config.json", json.dumps(origin, indent=1).encode())

    def append(self, name: str, rows: dict[str, Any] | Iterable[dict[str, Any]]) -> None:
        table = self.tables.setdefault(name, Table())
        for row in [rows] if isinstance(rows, dict) else rows:
            table.append(row)

    def write_tables(self) -> None:
        for name, table in self.tables.items():
            if table.written != len(table.rows):
                write_atomic(self.folder / f"{name}.csv", table.content())
                table.written = len(table.rows)

    def save_state(self, state: dict[str, Any]) -> None:
        """Tables first, then the state, which says how many of their rows are its own; the state before is kept."""
        self.write_tables()
        rows = {name: len(table.rows) for name, table in self.tables.items()}
        buffer = io.BytesIO()
        torch.save({"format": STATE_FORMAT, "run_id": self.id, "rows": rows, **state}, buffer)
        newest, previous = (self.folder / name for name in STATES)
        incoming = self.folder / "state.incoming.pt"
        write_atomic(incoming, buffer.getvalue())
        if newest.exists():
            os.replace(newest, previous)
        os.replace(incoming, newest)

    def load_state(self, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest state that is whole, with the tables cut back to it; None where the run starts anew.

        One that cannot be used is set aside, with a warning that says why.
        """
        self.tables = {}
        found = False
        for name in STATES:
            path = self.folder / name
            if not path.exists():
                continue
            found = True
            try:
                state = torch.load(path, map_location=device, weights_only=True)
                if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
                    raise ValueError("it is of another version")
                if state.get("run_id") != self.id:
                    raise ValueError(f"it belongs to {state.get('run_id')}")
                tables = {table: self._cut_table(table, count) for table, count in state["rows"].items()}
            except Exception as error:  # torch.load raises whatever a broken pickle or archive provokes
                aside = path.with_suffix(".unusable")
                os.replace(path, aside)
                warnings.warn(
                    f"{path} cannot be used ({_first_line(error)}); it is set aside as {aside.name}", stacklevel=2
                )
                continue
            self.tables = tables
            return state
        if found:
            warnings.warn(f"{self.folder} has no state left that can be used: the run starts anew", stacklevel=2)
        return None

    def _cut_table(self, name: str, count: int) -> Table:
        if not count:  # none yet, so perhaps no file
            return Table()
        lines = (self.folder / f"{name}.csv").read_bytes().decode().split("\r\n")[:-1]  # whole ones
        if len(lines) < count + 1:
            raise ValueError(f"{name}.csv holds {len(lines) - 1} of its {count} rows")
        table = Table(lines[: count + 1])
        table.written = -1 if len(lines) != count + 1 else count
        return table

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes the tables, then summary.json, which makes the run done, and removes what only resuming needed."""
        self.write_tables()
        for name in TABLES:  # rows of an attempt whose state was lost
            if name not in self.tables:
                (self.folder / f"{name}.csv").unlink(missing_ok=True)
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=1).encode())
        self.clear_states()

    def clear_states(self) -> None:
        for name in (*STATES, "state.incoming.pt"):
            (self.folder / name).unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


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
        raise UserError(f"{path} cannot be read ({_first_line(error)}); remove its folder and run it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; remove its folder and run it again")
    return value


def _read_table(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, float_precision="round_trip")
        if not {"epoch", "step"} & set(frame.columns):
            raise ValueError("it is not a table of a run")
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path} cannot be read ({_first_line(error)}); remove its folder and run it again") from None
    return frame


def finished(root: str | Path = "runs/local") -> list[Path]:
    """The folders of the finished runs under a root, by name."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder of runs; `make study` makes runs/local, a clone brings runs/published")
    return sorted(p.parent for p in root.glob("*/summary.json"))


def load_runs(root: str | Path = "runs/local", ids: Iterable[str] | None = None) -> pd.DataFrame:
    """One row a finished run, indexed by run id: its configuration, and its summary beside it.

    root: the folder of runs; ids: only these, in their order, leaving out what is not done. `status` is "done" or
    "diverged": a diverged run's final numbers are NaN. Raises UserError for a root that is not there or a file that is
    not what it should be.
    """
    folders = finished(root)
    if ids is not None:
        by_name = {folder.name: folder for folder in folders}
        folders = [by_name[name] for name in ids if name in by_name]
    default = RunConfig().model_dump(mode="json")
    rows = []
    for folder in folders:
        origin, summary = _read_json(folder / "config.json"), _read_json(folder / "summary.json")
        if not isinstance(origin.get("config"), dict) or "status" not in summary:
            raise UserError(f"{folder} is not a run of this project; move it away, or remove it and run it again")
        rows.append({"run": folder.name, **default, **origin["config"], **summary})
    frame = pd.DataFrame(rows, columns=None if rows else ["run", *default, "status"]).set_index("run")
    return frame


def load_table(name: str, root: str | Path = "runs/local", ids: Iterable[str] | None = None) -> pd.DataFrame:
    """The rows of one table of many runs, with the column `run` first; empty where none has it.

    name: one of TABLES; ids: only these runs. Raises UserError for an unknown table or root.
    """
    if name not in TABLES:
        raise UserError(f"there is no table {name!r}; the tables are {', '.join(TABLES)}")
    folders = finished(root)
    if ids is not None:
        wanted = set(ids)
        folders = [folder for folder in folders if folder.name in wanted]
    frames = {folder.name: _read_table(path) for folder in folders if (path := folder / f"{name}.csv").exists()}
    if not frames:
        return pd.DataFrame(columns=["run"])
    return pd.concat(frames, names=["run", None]).reset_index(level=0).reset_index(drop=True)
