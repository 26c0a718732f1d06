"""A study: a YAML file that names grids of runs, and the analysis notebooks that read them."""

import math
import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from samlib import PROJECT
from samlib.config import RunConfig, UserError
from samlib.runs import Run, load_runs

NOTEBOOKS = PROJECT / "notebooks"
MOST_RUNS = 10_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of a study, a grid, a notebook: they become file names
NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))(?:[eE]([-+]?\d+))?")


class _Loader(yaml.SafeLoader):
    """Safe YAML, without keys that are given twice or are not text, and without aliases, of which a few fill memory."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not used here: write the value out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r:.50} is not text", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, loaded safely. Raises UserError: `where`, the line, and what is wrong."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(f"{where}:{line} not a YAML file that can be used: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{where}: not a YAML file that can be used: {reason}") from None


def parse_config(values: dict[str, Any], where: str) -> RunConfig:
    """RunConfig.parse, with `where` before what is wrong, and numbers that YAML takes for text named as such."""
    for name, value in values.items():
        known = RunConfig.model_fields.get(name)
        if known is None or isinstance(known.default, str) or not isinstance(value, str):
            continue
        if number := NUMBER.fullmatch(value):
            mantissa, exponent = number.groups()
            better = mantissa if exponent is None else f"{float(mantissa)}e{int(exponent):+d}"
            raise UserError(f"{where}: {name}: YAML reads {value!r} as text: write {better}")
    try:
        return RunConfig.parse(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@dataclass(frozen=True)
class Analysis:
    """An analysis notebook of a study: its name without .ipynb, the grid it reads, and its own parameters."""

    notebook: str
    grid: str | None
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    path: Path
    name: str  # the path below studies/ without .yaml, "/" as "-"
    title: str
    dataset: str  # in words, for captions
    grids: dict[str, list[RunConfig]]
    notebooks: list[Analysis]

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Reads and checks a study file. Raises UserError that names the file, the grid and the field."""
        shown = str(path)
        try:
            path = Path(path).resolve()
            shown = relative(path)
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{shown}: not a text file; a study is a YAML file") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{shown}: cannot be read ({reason}); the studies are in {relative(PROJECT / 'studies')}/"
            ) from None
        content = read_yaml(text, shown)
        _check_mapping(content, shown, {"title", "dataset", "base", "grids", "notebooks"}, needed=("title", "grids"))
        studies = PROJECT / "studies"
        name = (path.relative_to(studies) if path.is_relative_to(studies) else Path(path.name)).with_suffix("")
        name = "-".join(name.parts)
        if not NAME.fullmatch(name):
            raise UserError(f"{shown}: the file's name becomes a folder's: use letters, digits, - and _ only")
        title, dataset = content["title"], content.get("dataset", "")
        for key, value in (("title", title), ("dataset", dataset)):
            if not isinstance(value, str):
                raise UserError(f"{shown}: {key}: found {value!r:.100}; it is a text")
        base = content.get("base", {})
        _check_mapping(base, f"{shown}: base")
        parse_config(base, f"{shown}: base")
        _check_mapping(content["grids"], f"{shown}: grids")
        if not content["grids"]:
            raise UserError(f"{shown}: grids: there is none; name at least one")
        grids = {
            grid: _expand(base, value, grid, f"{shown}: grid {grid!r}") for grid, value in content["grids"].items()
        }
        notebooks = _analyses(content.get("notebooks", []), grids, f"{shown}: notebooks")
        return cls(path, name, title, dataset or str(base.get("dataset", "cifar10")), grids, notebooks)

    def configs(self, grid: str | None = None) -> list[RunConfig]:
        """The runs of one grid, or of all, each once, in the file's order."""
        if grid is not None and grid not in self.grids:
            raise UserError(f"{relative(self.path)}: there is no grid {grid!r}; the grids are {', '.join(self.grids)}")
        chosen = self.grids.values() if grid is None else [self.grids[grid]]
        return list({config.run_id: config for configs in chosen for config in configs}.values())

    def runs(self, root: str | Path = "runs/local", grid: str | None = None) -> pd.DataFrame:
        """`load_runs` of the finished runs of a grid, or of all."""
        return load_runs(root, [config.run_id for config in self.configs(grid)])

    def missing(self, root: str | Path = "runs/local", grid: str | None = None) -> list[RunConfig]:
        return [config for config in self.configs(grid) if not Run(config, root).done]

    def read_by(self, analysis: Analysis) -> list[RunConfig]:
        """The runs that a notebook reads: of its grid and of those its parameters name; of all where it names none."""
        named = [v for v in (analysis.grid, *analysis.parameters.values()) if isinstance(v, str) and v in self.grids]
        return [config for grid in named or self.grids for config in self.grids[grid]]

    def parameters(self, analysis: Analysis, root: Path, figures: Path) -> dict[str, Any]:
        """What is injected into an analysis notebook: paths inside the checkout are relative, for readers elsewhere."""
        given = {"study": relative(self.path), "root": relative(root), "figures": relative(figures)}
        return {**given, **({"grid": analysis.grid} if analysis.grid else {}), **analysis.parameters}

    def check_notebooks(self) -> None:
        """Raises UserError where a notebook is not there, or lacks a parameter that it would be given."""
        import papermill

        for analysis in self.notebooks:
            path = NOTEBOOKS / f"{analysis.notebook}.ipynb"
            where = f"{relative(self.path)}: notebooks: {analysis.notebook}"
            if not path.is_file():
                there = ", ".join(sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")))
                raise UserError(f"{where}: there is no such notebook; there are {there}")
            try:
                known = papermill.inspect_notebook(str(path))
            except Exception as error:  # nbformat raises whatever a broken file provokes
                raise UserError(f"{where}: {relative(path)} cannot be read ({type(error).__name__})") from None
            for name in self.parameters(analysis, path, path):
                if name not in known:
                    raise UserError(f"{where}: it has no parameter {name!r}; its parameters are {', '.join(known)}")


def relative(path: str | Path) -> str:
    """The path as it is shown and published: from the checkout where it lies inside, absolute elsewhere."""
    path = Path(path)
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)


def _check_mapping(value: Any, where: str, keys: set[str] | None = None, needed: tuple[str, ...] = ()) -> None:
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"{value!r:.100}"
        raise UserError(f"{where}: found {found}; it is a mapping of names to values")
    for key in value:
        if keys is not None and key not in keys:
            raise UserError(f"{where}: there is no key {key!r}; the keys are {', '.join(sorted(keys))}")
    for key in needed:
        if key not in value:
            raise UserError(f"{where}: the key {key!r} is missing")


def _expand(base: dict[str, Any], grid: Any, name: str, where: str) -> list[RunConfig]:
    """The runs of a grid: the product of its lists, or the union of several such products."""
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: use letters, digits, - and _ in a grid's name")
    products = grid if isinstance(grid, list) else [grid]
    if not products:
        raise UserError(f"{where}: it is empty; give it at least one run")
    factors = [_factors(item, where) for item in products]
    if (size := sum(math.prod(map(len, item)) for item in factors)) > MOST_RUNS:
        raise UserError(f"{where}: it has {size:,} runs; at most {MOST_RUNS:,} are allowed")
    configs = {}
    for item in factors:
        for combination in product(*item):
            values = {key: value for part in combination for key, value in part.items()}
            config = parse_config({**base, **values}, where)
            configs[config.run_id] = config
    return list(configs.values())


def _factors(grid: Any, where: str) -> list[list[dict[str, Any]]]:
    """A factor for every key: its choices, each a mapping of the fields that it sets."""
    _check_mapping(grid, where)
    factors = []
    setters: dict[str, str] = {}
    for key, value in grid.items():
        # A field that holds a list is written as a list; only a list of lists varies it.
        listed = isinstance(value, list)
        if listed and key in ("persistence_steps", "scan_rhos") and not any(isinstance(v, list | dict) for v in value):
            listed = False
        if listed and not value:
            raise UserError(f"{where}: {key}: the list is empty; give it at least one value")
        choices = value if listed else [value]
        if any(isinstance(choice, dict) for choice in choices):
            if not listed or not all(isinstance(choice, dict) for choice in choices):
                raise UserError(f"{where}: {key}: a list holds either values or mappings of fields, not both")
            factor = choices
        else:
            factor = [{key: choice} for choice in choices]
        for name in {name for choice in factor for name in choice}:
            if name in setters:
                raise UserError(f"{where}: {name}: it is set by both {setters[name]!r} and {key!r}; keep one")
            setters[name] = key
        factors.append(factor)
    return factors


def _analyses(value: Any, grids: dict[str, Any], where: str) -> list[Analysis]:
    if not isinstance(value, list):
        raise UserError(f"{where}: found {value!r:.100}; it is a list of mappings")
    analyses = []
    for item in value:
        _check_mapping(item, where, {"notebook", "grid", "parameters"}, needed=("notebook",))
        name, grid, parameters = item["notebook"], item.get("grid"), item.get("parameters", {})
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"{where}: notebook: found {name!r:.100}; it is a file of notebooks/, without .ipynb")
        if any(name == other.notebook for other in analyses):
            raise UserError(f"{where}: {name}: it is there twice, and would overwrite its own results")
        if grid is not None and (not isinstance(grid, str) or grid not in grids):
            raise UserError(f"{where}: {name}: there is no grid {grid!r:.100}; the grids are {', '.join(grids)}")
        _check_mapping(parameters, f"{where}: {name}: parameters")
        for key in parameters:
            if key in ("study", "root", "grid", "figures"):
                raise UserError(f"{where}: {name}: parameters: {key!r} is given by the study itself; leave it out")
        analyses.append(Analysis(name, grid, parameters))
    return analyses
