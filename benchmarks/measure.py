"""Rows of a table of measurements: things measured in turn in one run, medians with their spread, the bar beside."""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from samlib.runs import write_atomic

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One measured quantity: the median of its values, and the bar that it is held to (None: told, not judged)."""

    what: str
    values: list[float]
    unit: str
    bar: float | None = None
    at_least: bool = False  # the bar is a least value, not a most
    note: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)  # what the values were made of

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.median >= self.bar if self.at_least else self.median <= self.bar

    def cells(self) -> list[str]:
        spread = f" ({min(self.values):.3g} to {max(self.values):.3g}, n={len(self.values)})" if self.values[1:] else ""
        bar = "" if self.bar is None else f"{'≥' if self.at_least else '≤'} {self.bar:g}"
        met = {None: "", True: "met", False: "**not met**"}[self.met]
        return [self.what, f"{self.median:.3g}{spread} {self.unit}".strip(), bar, met, self.note]


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def in_turn(functions: dict[str, Callable[[], object]], repeats: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each function, measured A B A B ...; a function may return the seconds that it counts itself."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round in range(warm + repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            own = function()
            spent = own if isinstance(own, float) else time.perf_counter() - begin
            if round >= warm:
                times[name].append(spent)
    return times


def ratios(times: dict[str, list[float]], above: str, below: str) -> list[float]:
    """Round by round: how many times longer one took than the other."""
    return [a / b for a, b in zip(times[above], times[below], strict=True)]


def machine() -> dict[str, str]:
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{name or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores used",
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f} before",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = (
            f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    return facts


def markdown(title: str, facts: dict[str, str], rows: list[Row], notes: Iterable[str]) -> str:
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    if rows:
        lines += ["", "| what | median (least to most) | bar | | |", "|---|---|---|---|---|"]
        lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join([*lines, "", *notes, ""])


def report(
    name: str, title: str, facts: dict[str, str], rows: list[Row], notes: list[str], folder: Path | None = RESULTS
) -> str:
    """The table as text, and in <name>.json and .md of a folder (None: nowhere)."""
    text = markdown(title, facts, rows, notes)
    if folder:
        folder.mkdir(exist_ok=True)
        content = [asdict(row) | {"median": row.median, "met": row.met} for row in rows]
        record = {"title": title, "machine": facts, "rows": content, "notes": notes}
        write_atomic(folder / f"{name}.json", f"{json.dumps(record, indent=1, ensure_ascii=False)}\n".encode())
        write_atomic(folder / f"{name}.md", text.encode())
    return text
