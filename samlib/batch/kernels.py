"""Kernels for notebooks executed in batch: one executes many, one after another, and starts each as a new one would.

The start of Python, Jupyter's kernel and torch costs seconds; what `samlib.batch.fresh` puts back costs none. Kernels
are spoken to over sockets in a folder that only this user can enter, and end when the process that started them does.
"""

import atexit
import itertools
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from jupyter_client import BlockingKernelClient, KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient.exceptions import DeadKernelError

START = 600  # seconds at most, on a machine that is busy
RESTORE = "get_ipython().fresh.restore()"
REMEMBER = f"from samlib.batch.fresh import Fresh; get_ipython().fresh = Fresh(get_ipython()); {RESTORE}"

_lock = threading.RLock()
_idle: list["Kernel"] = []
_busy: dict["Kernel", str] = {}  # and the batch of what it executes
_stopped: set[str] = set()  # batches that get no kernel any more
_numbers = itertools.count()


@cache
def folder() -> str:
    """A folder of this process, and of this user alone, that is gone when the process is, even after SIGKILL."""
    short = tempfile.gettempdir() if len(tempfile.gettempdir()) < 70 else "/tmp"  # a socket's path has 107 bytes
    path = tempfile.mkdtemp(prefix="samlib-", dir=short)
    wait_then_remove = ["sh", "-c", 'cat; sleep 2; exec rm -rf -- "$1"', "sh", path]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    folder.remover = subprocess.Popen(wait_then_remove, stdin=subprocess.PIPE, **quiet)
    atexit.register(stop)
    return path


class Manager(KernelManager):
    """Jupyter's, with the client that it made last, which nbclient leaves open."""

    opened: Any = None

    def client(self, **options: Any) -> Any:
        self.opened = super().client(**options)
        return self.opened


class Kernel:
    """A kernel's process: Jupyter's manager of it, for papermill, and a client that puts its state back."""

    def __init__(self, cwd: str) -> None:
        self.cwd = cwd
        name = os.path.join(folder(), f"{next(_numbers)}.json")
        specs = KernelSpecManager(kernel_dirs=[])  # so that it is this very Python
        as_nbclient_wants = "jupyter_client.asynchronous.AsyncKernelClient"
        options = {"transport": "ipc", "kernel_spec_manager": specs, "client_class": as_nbclient_wants}
        self.manager = Manager(connection_file=name, **options)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
        environment["TMPDIR"] = folder()
        environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else the debugger warns in every kernel
        for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # torch's are the run's to set
            environment.setdefault(threads, "1")
        quiet = ["--IPKernelApp.log_level=50", "--HistoryManager.hist_file=:memory:"]
        self.manager.start_kernel(cwd=cwd, env=environment, extra_arguments=quiet)
        self.process = self.manager.provisioner.process
        self.client: Any = None

    def renew(self) -> None:
        """Raises DeadKernelError where it is not alive, RuntimeError where its state cannot be put back."""
        code = RESTORE
        if self.client is None:
            code = REMEMBER
            self.client = BlockingKernelClient(parent=self.manager, connection_file=self.manager.connection_file)
            self.client.load_connection_file()
            self.client.start_channels()
            try:
                self.client.wait_for_ready(timeout=START)
            except RuntimeError as error:
                raise DeadKernelError(str(error)) from None
        asked = self.client.execute(code, silent=True)
        while True:
            try:
                reply = self.client.get_shell_msg(timeout=1)
            except queue.Empty:
                if not self.manager.is_alive():
                    raise DeadKernelError("Kernel died") from None
                continue
            if reply["parent_header"].get("msg_id") == asked:
                break
        if reply["content"]["status"] != "ok":
            raise RuntimeError(reply["content"].get("evalue", ""))

    def kill(self) -> None:
        """At once, with whatever it started."""
        with suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Removes its files and sockets."""
        if self.client is not None:
            self.client.stop_channels()
        self.manager.cleanup_resources()


@contextmanager
def borrowed(cwd: str, batch: str = "") -> Iterator[Any]:
    """The manager of a kernel whose state is a new one's. It is kept for the next where nothing is raised inside.

    Raises DeadKernelError where it dies, InterruptedError where the batch has been stopped.
    """
    with _lock:
        if batch in _stopped:
            raise InterruptedError("stopped")
        kernel = next((kernel for kernel in _idle if kernel.cwd == cwd), None) or Kernel(cwd)
        _idle[:] = [other for other in _idle if other is not kernel]
        _busy[kernel] = batch
    kept = True
    try:
        try:
            kernel.renew()
        except RuntimeError:  # an import fails: the notebook will say so
            kept = False
        yield kernel.manager
    except BaseException:
        kept = False
        raise
    finally:
        if kernel.manager.opened is not None:
            kernel.manager.opened.stop_channels()
        with _lock:
            del _busy[kernel]
            if kept:
                _idle.append(kernel)
        if not kept:
            kernel.kill()
            kernel.close()


def stop(batch: str | None = None) -> None:
    """Kills the kernels of a batch, which gets no other; of this process, all, and removes its folder."""
    with _lock:
        _stopped.update(_busy.values() if batch is None else [batch])
        for kernel in [*(k for k, of in _busy.items() if batch in (None, of)), *(_idle if batch is None else [])]:
            kernel.kill()
        if batch is None:
            _idle.clear()
    if batch is None and folder.cache_info().currsize:
        folder.remover.kill()
        folder.remover.wait()
        shutil.rmtree(folder(), ignore_errors=True)
        folder.cache_clear()
        atexit.unregister(stop)
