"""Kernels for notebooks executed in batch: forked from a process that has their imports already.

The start of Python and Jupyter's kernel, and the import of torch, cost seconds a notebook; a fork costs none. The
process they are forked from belongs to the one that executes notebooks, a Dask worker, and ends when that ends, and
its kernels with it. Only on Linux: elsewhere libraries do not bear a fork.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any

import psutil
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

from samlib import PROJECT

NAME = "samlib-forked"
IMPORTS = ("ipykernel.kernelapp", "IPython.display", "matplotlib.pyplot", "PIL.Image", "samlib.train")
ORIGIN = ("-m", "samlib.batch.kernels")  # the process that kernels are forked from

_lock = threading.Lock()
_origin: subprocess.Popen | None = None


def fork_kernels() -> None:
    """From here on this process's kernels are forked, where they can be."""
    factory = KernelProvisionerFactory.instance()
    if sys.platform == "linux" and factory.default_provisioner_name == "local-provisioner":  # the user chose no other
        factory.provisioners[NAME] = EntryPoint(NAME, f"{__name__}:ForkedProvisioner", factory.GROUP_NAME)
        factory.default_provisioner_name = NAME


class ForkedProcess(psutil.Process):
    """What Jupyter asks of a kernel's process. No child of this one, so its exit status is not known."""

    stdin = stdout = stderr = None

    def poll(self) -> int | None:
        return None if self.is_running() else 0


class ForkedProvisioner(LocalProvisioner):
    """Starts kernels of this very Python as forks, and others, or where that fails, as Jupyter does."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        launcher = "ipykernel_launcher"
        if cmd[0] == sys.executable and launcher in cmd:
            try:
                pid = fork(cmd[cmd.index(launcher) + 1 :], kwargs["env"], kwargs.get("cwd") or os.getcwd())
                self.process = ForkedProcess(pid)
            except (OSError, psutil.NoSuchProcess):
                pass
            else:
                self.pid = self.pgid = pid
                return self.connection_info
        return await super().launch_kernel(cmd, **kwargs)


def fork(arguments: list[str], env: dict[str, str], cwd: str) -> int:
    """The process id of a new kernel. Raises OSError when it cannot be had."""
    global _origin
    with _lock:
        for _ in range(2):  # the origin may have been killed
            if _origin is None or _origin.poll() is not None:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                _origin = subprocess.Popen([sys.executable, *ORIGIN], cwd=PROJECT, start_new_session=True, **pipes)
            try:
                print(json.dumps([arguments, env, cwd]), file=_origin.stdin, flush=True)
                if answer := _origin.stdout.readline():
                    return int(answer)
            except BrokenPipeError:
                pass
            stop()
    raise OSError("the process that kernels are forked from does not answer")


def stop() -> None:
    """Ends the process that kernels are forked from, if there is one, and so those that are there."""
    if _origin is not None:
        _origin.kill()
        _origin.wait()


def next_kernel() -> tuple[list[str], dict[str, str], str]:
    """Forks for every line of the standard input and writes the process id; returns in the fork, with what the line
    says, and does not return in the process itself: it ends when the input does."""
    ids = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who has ended is gone, without being waited for
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            ids.close()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            return json.loads(line)
        print(pid, file=ids, flush=True)
    os._exit(0)


def main() -> None:
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as kernels do, before the import
    try:
        for name in IMPORTS:
            import_module(name)
    except Exception:  # the notebook, in a kernel of Jupyter's own, will say what is wrong
        sys.exit(1)
    gc.freeze()  # what is there already is shared with the forks: no reason to visit it
    arguments, env, cwd = next_kernel()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if sys.path[0] == str(PROJECT):  # as `python -m` had it
        del sys.path[0]
    from ipykernel import kernelapp

    # The parent that Jupyter names, and that a kernel ends with, is not the one of a fork.
    kernelapp.launch_new_instance(argv=[*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])
    atexit._run_exitfuncs()
    os._exit(0)  # Python's own end would visit, and so copy, all memory that is shared with the origin


if __name__ == "__main__":
    main()
