"""In a kernel that executes one notebook after another: what a notebook could leave to the next, put back."""

import gc
import logging
import os
import random
import sys
import warnings
from contextlib import suppress

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

OURS = "samlib"  # imported anew by every notebook, as it is on disk then


class Fresh:
    """The state of a process as it is when this is made; `restore` puts it back.

    Not put back: what a notebook assigns inside of an installed package, and threads that it leaves running.
    """

    def __init__(self, shell) -> None:
        self.shell = shell
        plt.close(plt.figure())  # which loads the backend, that hooks itself into the shell
        self.events = {name: list(callbacks) for name, callbacks in shell.events.callbacks.items()}
        formatters = shell.display_formatter.formatters.values()
        self.printers = [(f, dict(f.type_printers), dict(f.deferred_printers)) for f in formatters]
        self.environment, self.folder, self.path = dict(os.environ), os.getcwd(), list(sys.path)
        self.filters, self.streams = list(warnings.filters), (sys.stdout, sys.stderr)
        self.logging = logging.root.level, list(logging.root.handlers)
        self.seed, self.threads = torch.initial_seed(), torch.get_num_threads()
        self.numerics = [(owner, name, getattr(owner, name)) for owner, name in (
            (torch.backends.cuda.matmul, "allow_tf32"),
            (torch.backends.cudnn, "allow_tf32"),
            (torch.backends.cudnn, "benchmark"),
            (torch.backends.mkldnn, "enabled"),
        )]  # fmt: skip

    def restore(self) -> None:
        sys.stdout, sys.stderr = self.streams
        plt.close("all")
        matplotlib.rc_file_defaults()
        self.shell.reset(new_session=True)
        for name, callbacks in self.shell.events.callbacks.items():
            callbacks[:] = self.events[name]
        for formatter, types, deferred in self.printers:
            formatter.type_printers, formatter.deferred_printers = dict(types), dict(deferred)
        os.chdir(self.folder)
        sys.path[:] = self.path
        level, handlers = self.logging
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        logging.disable(logging.NOTSET)
        random.seed()
        np.random.seed()
        np.seterr(all="warn", under="ignore")
        with warnings.catch_warnings(), suppress(Exception):  # options that are on their way out warn or raise
            warnings.simplefilter("ignore")
            pd.reset_option("all")
        torch.manual_seed(self.seed)
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
        for owner, name, value in self.numerics:
            setattr(owner, name, value)
        for name in [name for name in sys.modules if name.partition(".")[0] == OURS]:
            del sys.modules[name]
        gc.collect()
        os.environ.clear()  # these two last: what is imported on the way changes them
        os.environ.update(self.environment)
        warnings.resetwarnings()
        warnings.filters[:] = self.filters
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
