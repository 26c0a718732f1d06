"""The task that Dask's workers do: one notebook, executed by papermill."""

import io
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import nbformat
import papermill
from jupyter_core.utils import _loop
from nbclient.exceptions import CellExecutionError
from papermill.iorw import papermill_io

from samlib.batch import kernels
from samlib.config import UserError
from samlib.runs import write_atomic

ATTEMPTS = 3  # of a notebook whose kernel dies
TOPIC = "samlib"  # of Dask's events: what the terminal is told
logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what a notebook fails of is told once, by the runner


class Memory:
    """Where papermill writes what it has executed: a notebook is on disk whole, or not at all."""

    scheme = "samlib:"
    texts: dict[str, str] = {}

    def write(self, text: str, path: str) -> None:
        self.texts[path] = text

    def pretty_path(self, path: str) -> str:
        return path


papermill_io.register(Memory.scheme, Memory())


class Errors(io.TextIOBase):
    """A notebook's stderr. The terminal is told what a run says of its folder: that it waits, sets a state aside."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if self.folder in line:
                tell(line[line.index(self.folder) :])
        return len(text)


def tell(text: str) -> None:
    """A line for the terminal of whoever runs the study."""
    from distributed import get_worker

    try:
        get_worker().log_event(TOPIC, text)
    except ValueError:  # this is no worker
        print(text, file=sys.stderr, flush=True)


def failed_notebook(output: Path) -> Path:
    return output.with_name(f"{output.stem}.failed.ipynb")


def execute(notebook: str, output: str, parameters: dict[str, Any], folder: str, batch: str = "alone") -> str | None:
    """Executes a notebook, in `folder`; returns its error's last line, or None.

    A notebook whose kernel dies is executed again, three times at most. The output appears whole or not at all; that of
    a notebook with an error is kept as `<name>.failed.ipynb`. `batch`: what `kernels.stop` can stop.
    """
    if not Path(notebook).is_file():
        return f"{notebook} is not there on {platform.node()}: workers need this project and its runs at the same paths"
    final = Path(output)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _execute(notebook, final, parameters, folder, batch)
        except RuntimeError:  # DeadKernelError, or what else is said of a kernel that is dead before it answers
            tell(f"{final.parent.name}: the kernel of {final.name} died (attempt {attempt} of {ATTEMPTS})")
        except CellExecutionError as error:
            return f"its kernel cannot be prepared ({error.ename}: {error.evalue})"
        except (UserError, InterruptedError) as error:
            return str(error)
        except OSError as error:
            return f"{final}: it could not be executed ({error.filename or 'the system'}: {error.strerror or error})"
    return f"its kernel died {ATTEMPTS} times: killed, or out of memory"


def _execute(notebook: str, final: Path, parameters: dict[str, Any], folder: str, batch: str) -> str | None:
    failed, error = failed_notebook(final), None
    source = notebook.replace("{", "{{").replace("}", "}}")  # papermill formats paths
    held = f"{Memory.scheme}{uuid4()}.ipynb"
    final.parent.mkdir(parents=True, exist_ok=True)
    _loop.set(None)  # Jupyter's event loop: Dask hands a task the context of its client, and so that of another thread
    try:
        with kernels.borrowed(folder, batch) as manager:
            errors = Errors(f"{parameters.get('root', '')}/{final.parent.name}")
            quiet = {"progress_bar": False, "log_output": False, "request_save_on_cell_execute": False}
            options = {"start_timeout": kernels.START, "stderr_file": errors, "km": manager}
            papermill.execute_notebook(source, held, parameters, **quiet, **options)
    except papermill.PapermillExecutionError as raised:
        last = (str(raised.evalue).strip().splitlines() or [""])[-1][:1000]
        error = last if raised.ename == "UserError" else f"{raised.ename}: {last}"
    executed = nbformat.reads(Memory.texts.pop(held), as_version=4)
    about = executed.metadata.papermill
    about.input_path, about.output_path = Path(notebook).name, final.name  # no path of this machine
    if "figures" in parameters:
        drawn = Path(folder, parameters["figures"], final.parent.name).glob(f"{final.stem[:2]}_*")
        executed.metadata["figures"] = sorted(path.name for path in drawn)
    write_atomic(final if error is None else failed, nbformat.writes(executed).encode())
    if error is None:
        failed.unlink(missing_ok=True)
    return error


def sees(path: str) -> bool:
    """Whether this worker sees a file that was written just now: it shares the folder with who wrote it."""
    return os.path.exists(path)  # False, and not an error, where it may not look
