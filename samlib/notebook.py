"""What a notebook is told: its parameters, edited in its own cell or injected by papermill, checked."""

import ast
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from samlib import PROJECT
from samlib.config import RunConfig, UserError
from samlib.study import relative


def parameters(namespace: dict[str, Any], also: Collection[str] = ()) -> tuple[set[str], set[str]]:
    """The names of a notebook's parameters, and those of them that were injected.

    namespace: the notebook's `globals()`, whose `In` holds the cells executed so far. Parameters are the annotated
    names of the last cell that declares `root`, as every notebook's does; `also`: what may be injected beside them.
    Raises UserError for any other injected name, of which papermill only warns.
    """
    injected: set[str] = set()
    for source in reversed(namespace["In"]):
        if source.startswith("# Parameters\n"):  # the cell that papermill puts after the notebook's own
            injected |= {name.id for line in ast.parse(source).body for name in line.targets}
        names = _annotated(source)
        if "root" not in names:
            continue
        if unknown := sorted(injected - names - set(also)):
            raise UserError(f"{unknown[0]}: the notebook has no such parameter; it has {', '.join(sorted(names))}")
        return names, injected
    raise UserError("the cell of the parameters was not executed: run the notebook from its top")


def _annotated(source: str) -> set[str]:
    try:
        lines = ast.parse(source).body
    except SyntaxError:  # a cell that failed, of which Jupyter keeps the text too
        return set()
    return {line.target.id for line in lines if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)}


def run_config(namespace: dict[str, Any]) -> RunConfig:
    """The run that a notebook's `globals()` describe: its parameters but `root` are fields of RunConfig, `data` is the
    field `root`, and `config` holds more of them. Where `config` is injected, only what is injected beside it counts,
    and stands above it.

    Raises UserError for a field that is none, has no possible value, or stands in the notebook's cell and in `config`.
    """
    names, injected = parameters(namespace, also=RunConfig.model_fields)
    config = namespace["config"]
    if not isinstance(config, dict):
        return RunConfig.parse(config)  # which says what it should be
    fields = (injected if "config" in injected else names | injected) - {"config", "root"}
    if "config" not in injected and (twice := sorted(fields & config.keys())):
        raise UserError(f"config: {twice[0]} is a parameter of the notebook: set it there, and leave it out of config")
    values = config | {name: namespace[name] for name in fields}
    where = str(values.pop("data", "")) or values.get("root")
    if isinstance(where, str):  # as `python -m samlib run --set` takes it, or the project's where it is there alone
        elsewhere = not os.path.exists(where) and (PROJECT / where).exists()
        values["root"] = relative(PROJECT / where if elsewhere else os.path.abspath(where))
    return RunConfig.parse(values)


def folder(named: str, default: str) -> Path:
    """The folder that a parameter names, from where the notebook is executed; the project's where it names none."""
    return Path(str(named)) if named != "" else PROJECT / default  # str: papermill reads 2024 as a number
