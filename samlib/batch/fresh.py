"""In a kernel that executes one notebook after another: what a notebook could leave to the next, put back."""

import gc
import os
import sys
import warnings
from collections.abc import Callable

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import torch

from samlib import __name__ as OURS  # imported anew by every notebook, as it is on disk then


def remember(shell) -> Callable[[], None]:
    """Returns what puts this process back to where it is now.

    Settings of torch are not among it but for the threads: `samlib.train` computes the same bits whatever they are.
    """
    plt.close(plt.figure())  # which loads the backend, that hooks itself into the shell
    folder, path, environment = os.getcwd(), list(sys.path), dict(os.environ)
    filters, streams, threads = list(warnings.filters), (sys.stdout, sys.stderr), torch.get_num_threads()

    def restore() -> None:
        sys.stdout, sys.stderr = streams
        plt.close("all")
        matplotlib.rc_file_defaults()
        shell.reset(new_session=True)
        os.chdir(folder)
        sys.path[:] = path
        warnings.simplefilter("ignore")  # pandas warns of options that it will drop
        pd.reset_option("all")
        warnings.filters[:] = filters
        torch.set_num_threads(threads)
        for name in [name for name in sys.modules if name.partition(".")[0] == OURS]:
            del sys.modules[name]
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        os.environ.clear()
        os.environ.update(environment)

    return restore
