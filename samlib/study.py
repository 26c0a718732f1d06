"""A study: a YAML file that names grids of runs, and the analysis notebooks that read them."""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from samlib import PROJECT
from samlib.config import RunConfig, UserError, describe, first_line
from samlib.runs import Run

NOTEBOOKS = PROJECT / "notebooks"
MOST_RUNS = 10_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of a study, a grid, a notebook: they become file names
GIVEN = ("study", "root", "grid", "figures", "overrides")  # parameters of a notebook that the study itself gives
LISTS = {name for name, f in RunConfig.model_fields.items() if get_origin(f.annotation) is tuple}


class Dataset(NamedTuple):
    name: str
    size: int  # pixels a side
    images: tuple[int, int]  # of training and test; known, so that nothing is downloaded only to be counted


DATASETS = {
    "digits": Dataset("scikit-learn digits", 8, (1005, 792)),
    "cifar10": Dataset("CIFAR-10", 32, (50_000, 10_000)),
    "cifar100": Dataset("CIFAR-100", 32, (50_000, 10_000)),
    "fashion-mnist": Dataset("Fashion-MNIST", 28, (60_000, 10_000)),
}


class Loader(yaml.SafeLoader):
    """Safe YAML in which only what JSON takes for a number, truth value or null is one: 010, 1:00, 1_000 and yes are
    text. No key is there twice; there are no tags, and no aliases, of which a few fill memory."""

    yaml_implicit_resolvers = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag:
            problem = "aliases and tags are not used here: write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            text = key.tag == "tag:yaml.org,2002:str"
            if not text or key.value in seen:
                problem = f"the key {key.value!r:.50} is {'there twice' if text else 'not text'}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern in (
    ("null", r"~|null|"),
    ("bool", r"[Tt]rue|[Ff]alse"),
    ("int", r"[-+]?(0|[1-9][0-9]*)"),
    ("float", r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


def read_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, loaded safely. Raises UserError: `where`, the line, and what is wrong."""
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(f"{where}:{line} not a YAML file that can be used: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a YAML file that can be used: {first_line(error)}") from None


def read_fields(items: list[str]) -> dict[str, Any]:
    """What `--set field=value ...` says. A relative `root` of the data means the caller's folder."""
    values = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or name in values:
            raise UserError(f"--set: found {item!r:.100}; give each field once, as field=value")
        values[name] = read_yaml(value, f"--set {name}")
    if isinstance(values.get("root"), str):
        values["root"] = relative(os.path.abspath(values["root"]))
    return values


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class Analysis(_Strict):
    """An analysis notebook of a study: its name without .ipynb, the grid it reads, and its own parameters."""

    notebook: Name
    grid: str | None = None
    parameters: dict[str, Any] = {}

    @field_validator("parameters")
    @classmethod
    def _not_given(cls, value: dict[str, Any]) -> dict[str, Any]:
        if given := [name for name in GIVEN if name in value]:
            raise ValueError(f"{given[0]!r} is given by the study itself; leave it out")
        return value


class _File(_Strict):
    title: str
    dataset: str = ""
    base: dict[str, Any] = {}
    grids: Annotated[dict[Name, Any], Field(min_length=1)]
    notebooks: list[Analysis] = []

    @field_validator("notebooks")
    @classmethod
    def _once(cls, value: list[Analysis], info: ValidationInfo) -> list[Analysis]:
        names, grids = [analysis.notebook for analysis in value], info.data.get("grids", {})
        for analysis in value:
            if names.count(analysis.notebook) > 1:
                raise ValueError(f"{analysis.notebook} is there twice, and would overwrite its own results")
            if analysis.grid is not None and analysis.grid not in grids:
                raise ValueError(f"there is no grid {analysis.grid!r:.100}; the grids are {', '.join(grids)}")
        return value


@dataclass(frozen=True)
class Study:
    path: Path
    name: str  # the path below studies/ without .yaml, "/" as "-"; with overrides, and a hash of them
    title: str
    dataset: str  # in words, for captions
    grids: dict[str, list[RunConfig]]
    notebooks: list[Analysis]
    overrides: dict[str, Any] = field(default_factory=dict)  # fields, as JSON values, that stand above the file's base

    @classmethod
    def load(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> "Study":
        """Reads and checks a study file; `overrides`, fields of RunConfig, stand above its base.

        Raises UserError that names the file, the grid and the field. An override of a field that a grid sets itself is
        refused. With overrides the study has another name, and so its own notebooks and figures.
        """
        path = resolved(path)
        shown = relative(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{shown}: not a text file; a study is a YAML file") from None
        except OSError as error:
            raise UserError(f"{shown}: cannot be read ({error.strerror}); the studies are in studies/") from None
        content = read_yaml(text, shown)
        if not isinstance(content, dict):
            raise UserError(f"{shown}: found no study; it is a mapping with title, base, grids and notebooks")
        try:
            file = _File.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{shown}: {describe(error, _File)}") from None
        studies = PROJECT / "studies"
        parts = path.relative_to(studies) if path.is_relative_to(studies) else Path(path.name)
        name = "-".join(parts.with_suffix("").parts)
        if not NAME.fullmatch(name):
            raise UserError(f"{shown}: the file's name becomes a folder's: use letters, digits, - and _ only")
        plain = RunConfig.parse(file.base, f"{shown}: base: ")
        base = RunConfig.parse({**file.base, **(overrides or {})}, f"{shown}: --set: ")
        json_values = base.model_dump(mode="json")
        overrides = {key: value for key, value in json_values.items() if getattr(base, key) != getattr(plain, key)}
        grids = {
            grid: _expand(file.base | overrides, value, f"{shown}: grid {grid!r}", overrides)
            for grid, value in file.grids.items()
        }
        set_data = overrides.keys() & {"dataset", "root", "image_size"}
        dataset = file.dataset if file.dataset and not set_data else name_of_data(base)
        if overrides:
            name += "-" + hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:8]
        return cls(path, name, file.title, dataset, grids, file.notebooks, overrides)

    def configs(self, grid: str | None = None) -> list[RunConfig]:
        """The runs of one grid, or of all, each once, in the file's order."""
        if grid is not None and grid not in self.grids:
            raise UserError(f"{relative(self.path)}: there is no grid {grid!r}; the grids are {', '.join(self.grids)}")
        chosen = self.grids.values() if grid is None else [self.grids[grid]]
        return list({config.run_id: config for configs in chosen for config in configs}.values())

    def missing(self, root: str | Path = "runs/local", grid: str | None = None) -> list[RunConfig]:
        return [config for config in self.configs(grid) if not Run(config, root).done]

    def only(self, grids: list[str]) -> "Study":
        """The study with these of its grids, and with the notebooks that read one of them."""
        kept = {grid: self.configs(grid) for grid in dict.fromkeys(grids)}
        reading = [analysis for analysis in self.notebooks if kept.keys() & self.grids_of(analysis)]
        return replace(self, grids=kept, notebooks=reading)

    def grids_of(self, analysis: Analysis) -> list[str]:
        """The grids that a notebook reads: its own and those its parameters name; all where it names none."""
        given = (analysis.grid, *analysis.parameters.values())
        return list(dict.fromkeys(v for v in given if isinstance(v, str) and v in self.grids)) or list(self.grids)

    def parameters(self, analysis: Analysis, root: Path, figures: Path) -> dict[str, Any]:
        """What is injected into an analysis notebook: paths inside the checkout are relative, for readers elsewhere."""
        given = {"study": relative(self.path), "root": relative(root), "figures": relative(figures)}
        given |= {"grid": analysis.grid} if analysis.grid else {}
        return given | ({"overrides": self.overrides} if self.overrides else {}) | analysis.parameters


def relative(path: str | Path, to: Path = PROJECT) -> str:
    """The path as it is published: from the checkout, or a folder, where it lies inside, absolute elsewhere."""
    path = Path(path)
    return str(path.relative_to(to)) if path.is_relative_to(to) else str(path)


def resolved(path: str | Path) -> Path:
    """The path, absolute and without links. Raises UserError where it leads in circles or is not UTF-8."""
    try:
        path = Path(path).resolve()
        str(path).encode()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a NUL, a name that is not UTF-8
        reason = "its name is not UTF-8" if isinstance(error, UnicodeError) else str(error)
        raise UserError(f"{path}: cannot be used as a path ({reason})") from None
    return path


def name_of_data(config: RunConfig) -> str:
    """The dataset in words, with the size that its images have in the run: "CIFAR-10, 16x16"."""
    known = DATASETS.get(config.dataset)
    name, size = (
        (known.name, config.image_size or known.size) if known else (f"images of {config.root}", config.image_size)
    )
    return f"{name}, {size}x{size}" if size else name


def _expand(base: dict[str, Any], grid: Any, where: str, overrides: dict[str, Any]) -> list[RunConfig]:
    """The runs of a grid: the product of its lists, or the union of several such products."""
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
            if both := sorted(overrides.keys() & values):
                raise UserError(f"{where}: {both[0]}: the grid sets it itself, so --set cannot; edit the study's file")
            config = RunConfig.parse({**base, **values}, f"{where}: ")
            configs[config.run_id] = config
    return list(configs.values())


def _factors(grid: Any, where: str) -> list[list[dict[str, Any]]]:
    """A factor for every key: its choices, each a mapping of the fields that it sets."""
    if not isinstance(grid, dict):
        raise UserError(f"{where}: found {'nothing' if grid is None else f'{grid!r:.100}'}; it is a mapping of fields")
    factors, setters = [], {}
    for key, value in grid.items():
        # A field that holds a list is written as a list; only a list of lists varies it.
        plain = key in LISTS and isinstance(value, list) and not any(isinstance(v, list | dict) for v in value)
        choices = value if isinstance(value, list) and not plain else [value]
        if not choices:
            raise UserError(f"{where}: {key}: the list is empty; give it at least one value")
        mappings = [isinstance(choice, dict) for choice in choices]
        if any(mappings) and not (choices is value and all(mappings)):
            raise UserError(f"{where}: {key}: a list holds either values or mappings of fields, not both")
        factor = choices if any(mappings) else [{key: choice} for choice in choices]
        for name in {name for choice in factor for name in choice}:
            if name in setters:
                raise UserError(f"{where}: {name}: it is set by both {setters[name]!r} and {key!r}; keep one")
            setters[name] = key
        factors.append(factor)
    return factors
