"""Kernels for notebooks executed in batch: one executes many, one after another, and starts each as a new one would.

The start of Python, Jupyter's kernel and torch costs seconds; what `samlib.batch.fresh` puts back costs none. Kernels
are spoken to over sockets in a folder that only this user can enter, and end when the process that started them does.
"""

import atexit
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from uuid import uuid4

import nbformat
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

START = 600  # seconds at most, on a machine that is busy
REMEMBER = "from samlib.batch.fresh import remember; get_ipython().restore = remember(get_ipython())\n"
RESTORE = "get_ipython().restore()"

_lock = threading.RLock()
_kernels: list["Kernel"] = []
_stopped: set[str | None] = set()  # batches that get no kernel any more


@cache
def folder() -> str:
    """A folder of this process, and of this user alone, that goes when the process ends or calls `stop`."""
    short = tempfile.gettempdir() if len(tempfile.gettempdir()) < 70 else "/tmp"  # a socket's path has 107 bytes
    atexit.register(stop)
    return tempfile.mkdtemp(prefix="samlib-", dir=short)


class Manager(KernelManager):
    """Jupyter's, with the client that it made last, which nbclient leaves open."""

    opened: Any = None

    def client(self, **options: Any) -> Any:
        self.opened = super().client(**options)
        return self.opened


class Kernel:
    """A kernel's process, and Jupyter's manager of it, for papermill."""

    def __init__(self, cwd: str) -> None:
        self.cwd = cwd
        self.batch: str | None = None  # that it executes a notebook of
        self.code = REMEMBER + RESTORE
        self.manager = Manager(
            connection_file=os.path.join(folder(), f"{uuid4().hex[:8]}.json"),
            transport="ipc",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # so that it is this very Python
            client_class="jupyter_client.asynchronous.AsyncKernelClient",  # as nbclient wants it
        )
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
        environment["TMPDIR"] = folder()
        environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else the debugger warns in every kernel
        for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # torch's are the run's to set
            environment.setdefault(threads, "1")
        quiet = ["--IPKernelApp.log_level=50", "--HistoryManager.hist_file=:memory:"]
        self.manager.start_kernel(cwd=cwd, env=environment, extra_arguments=quiet)
        self.process = self.manager.provisioner.process
        _kernels.append(self)

    def renew(self) -> None:
        cell = nbformat.v4.new_code_cell(self.code)
        client = NotebookClient(nbformat.v4.new_notebook(cells=[cell]), km=self.manager, startup_timeout=START)
        with client.setup_kernel():
            client.execute_cell(cell, 0, store_history=False)
        self.manager.opened.stop_channels()
        self.code = RESTORE

    def kill(self) -> None:
        """At once, with whatever it started."""
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self in _kernels:
            _kernels.remove(self)


@contextmanager
def borrowed(cwd: str, batch: str) -> Iterator[Any]:
    """The manager of a kernel whose state is a new one's. It is kept for the next where nothing is raised inside.

    Raises RuntimeError where it dies, InterruptedError where the batch has been stopped.
    """
    with _lock:
        if batch in _stopped:
            raise InterruptedError("stopped")
        kernel = next((k for k in _kernels if k.batch is None and k.cwd == cwd), None) or Kernel(cwd)
        kernel.batch = batch
    try:
        kernel.renew()
        yield kernel.manager
        kernel.batch = None
    except BaseException:
        with _lock:
            kernel.kill()
        kernel.manager.cleanup_resources()
        raise
    finally:
        if kernel.manager.opened is not None:
            kernel.manager.opened.stop_channels()


def stop(batch: str | None = None) -> None:
    """Kills the kernels of a batch, which gets no other; without one, all of this process, and removes its folder."""
    with _lock:
        for kernel in [k for k in _kernels if batch in (None, k.batch)]:
            _stopped.add(kernel.batch)
            kernel.kill()
        _stopped.add(batch)
        if batch is None and folder.cache_info().currsize:
            shutil.rmtree(folder(), ignore_errors=True)
            folder.cache_clear()
            atexit.unregister(stop)
