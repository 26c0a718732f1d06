"""The task that Dask's workers do: one notebook, executed by papermill. Imports nothing that imports torch."""

import os
import warnings
from pathlib import Path
from typing import Any


def failed_notebook(output: Path) -> Path:
    return output.with_name(f"{output.stem}.failed.ipynb")


def execute(notebook: str, output: str, parameters: dict[str, Any], folder: str) -> str | None:
    """Executes a notebook, in `folder`; returns its error's last line, or None. What its kernel dies of is raised.

    The output appears whole or not at all; that of a notebook with an error is kept as `<name>.failed.ipynb`.
    """
    import papermill

    from samlib.batch.kernels import fork_kernels

    fork_kernels()
    final = Path(output)
    failed = failed_notebook(final)
    partial = final.with_name(f".{final.stem}.{os.getpid()}.ipynb")
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else the debugger warns in every kernel
    options = {"start_timeout": 600, "extra_arguments": ["--IPKernelApp.log_level=50"]}
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(
                notebook, str(partial), parameters, cwd=folder, progress_bar=False, log_output=False, **options
            )
        os.replace(partial, final)
        for leftover in (failed, *final.parent.glob(f".{final.stem}.*.ipynb")):  # of workers that were killed
            leftover.unlink(missing_ok=True)
    except papermill.PapermillExecutionError as error:
        os.replace(partial, failed)
        last = (str(error.evalue).strip().splitlines() or [""])[-1][:1000]
        return last if error.ename == "UserError" else f"{error.ename}: {last}"
    finally:
        partial.unlink(missing_ok=True)
    return None
