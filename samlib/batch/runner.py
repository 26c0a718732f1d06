"""What a study still has to do, and the doing of it: notebooks executed by papermill, each a task of a Dask cluster."""

import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from samlib import PROJECT
from samlib.config import RunConfig, UserError
from samlib.batch.execute import execute, failed_notebook
from samlib.runs import Run
from samlib.study import NOTEBOOKS, Study, relative

TRAIN = "01_train"
NOTEBOOK_SECONDS = 1.0  # start of a forked kernel; the first of a worker takes 4
# Training and test images; known, so that nothing is downloaded only to be counted.
SIZES = {
    "digits": (1005, 792),
    "fashion-mnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}


@dataclass(frozen=True)
class Task:
    """One notebook to execute: into `output` when it succeeds, into `failed` beside it when it does not."""

    name: str
    notebook: str
    output: Path
    parameters: dict[str, Any]

    @property
    def failed(self) -> Path:
        return failed_notebook(self.output)


def training_task(config: RunConfig, root: Path) -> Task:
    parameters = {"config": config.changed(), "root": relative(root)}
    return Task(config.run_id, TRAIN, root / config.run_id / "train.ipynb", parameters)


def unfinished(configs: Iterable[RunConfig], root: Path) -> list[RunConfig]:
    """The runs that are not done, or whose executed notebook is not there; the longest first."""
    todo = [c for c in configs if not (Run(c, root).done and training_task(c, root).output.exists())]
    return sorted(todo, key=lambda c: -c.epochs * c.data_fraction * c.passes)


def stale_analyses(study: Study, root: Path, figures: Path) -> list[Task]:
    """The analysis notebooks never executed, or before something they read: a run, the study, the notebook itself."""
    tasks = []
    for analysis in study.notebooks:
        output = root / study.name / f"{analysis.notebook}.ipynb"
        configs = study.read_by(analysis)
        source = NOTEBOOKS / f"{analysis.notebook}.ipynb"
        read = [study.path, source, *(root / c.run_id / "summary.json" for c in configs)]
        newest = max(path.stat().st_mtime for path in read if path.exists())
        if unfinished(configs, root) or not output.exists() or output.stat().st_mtime < newest:
            parameters = study.parameters(analysis, root, figures)
            tasks.append(Task(f"{study.name}/{analysis.notebook}", analysis.notebook, output, parameters))
    return tasks


def workers_by_default(configs: list[RunConfig]) -> int:
    """As many as the cores can serve; one where the runs share a GPU."""
    import torch
    from dask.system import CPU_COUNT

    if any(config.device != "cpu" for config in configs) and torch.cuda.is_available():
        return 1
    return max(1, CPU_COUNT // max((config.threads for config in configs), default=1))


def _local_cluster(workers: int, **address: str) -> Any:
    from distributed import LocalCluster

    options = {"threads_per_worker": 1, "processes": True, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    try:
        return LocalCluster(workers, **options, **address)
    except AssertionError:  # its event loop's thread got no turn within its 10 seconds: a stalled machine
        return LocalCluster(workers, **options, **address)


@contextmanager
def dask_client(workers: int, scheduler: str | None) -> Iterator[Any]:
    """A client of the cluster at an address, or of a local one that only this machine can reach."""
    import dask
    from distributed import Client

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if scheduler:
        try:
            client = Client(scheduler, timeout=20)
            client.wait_for_workers(1, timeout=60)
        except (OSError, ValueError, TypeError) as error:  # TimeoutError is an OSError
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"--scheduler: no Dask cluster with workers answers at {scheduler!r} ({reason})") from None
        with client:
            yield client
        return
    settings = {
        "distributed.scheduler.worker-saturation": 1.0,  # one task a worker, so that a dying one is charged to its own
        "distributed.scheduler.allowed-failures": 3,
    }
    address = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with (
        dask.config.set(settings),
        _local_cluster(workers, **address) as cluster,
        Client(cluster) as client,
    ):
        yield client


def execute_tasks(client: Any, tasks: list[Task], bar: tqdm) -> list[tuple[Task, str]]:
    """Executes the tasks, in this order as workers are free; returns those that failed, with their errors.

    A task whose kernel or worker dies is tried again, three times at most; one that raises is not: it would again.
    """
    from distributed import as_completed

    waiting = {}
    for task in tasks:
        source = str(NOTEBOOKS / f"{task.notebook}.ipynb")
        arguments = (source, str(task.output), task.parameters, str(PROJECT))
        waiting[client.submit(execute, *arguments, key=f"{task.name}-{os.getpid()}", retries=3, pure=False)] = task
    failures = []
    for future in as_completed(waiting):
        task = waiting[future]
        if future.status == "finished":
            error = future.result()
        elif future.status == "error":
            exception = future.exception()
            first = (str(exception).strip().splitlines() or [""])[0]
            error = f"{type(exception).__name__}: {first}"
        else:
            error = "the cluster lost it"
        if error:
            failures.append((task, error))
        bar.update()
    return failures


def run_all(
    configs: list[RunConfig],
    root: Path,
    study: Study | None = None,
    figures: Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    notebooks: bool = True,
) -> list[tuple[Task, str]]:
    """Trains what is not done, then executes the analysis notebooks that this makes stale; returns what failed.

    With nothing to do it starts no cluster. Where runs fail, the others and the notebooks are executed all the same.
    """
    todo = unfinished(configs, root)
    analyses = stale_analyses(study, root, figures) if study and notebooks else []
    if not todo and not analyses:
        return []
    total = len(configs) + (len(study.notebooks) if study and notebooks else 0)
    workers = min(workers or workers_by_default(todo), max(len(todo), len(analyses)))
    with dask_client(workers, scheduler) as client:
        initial = total - len(todo) - len(analyses)
        with tqdm(
            total=total, initial=initial, mininterval=1.0, unit="notebook", desc="study" if study else "run"
        ) as bar:
            bar.refresh()
            failures = execute_tasks(client, [training_task(config, root) for config in todo], bar)
            return failures + execute_tasks(client, analyses, bar)


def end_children() -> None:
    """Kills every process that this one started, and theirs: workers first stand still, so that none starts another."""
    import psutil

    def signal_all(processes: list[psutil.Process], name: str) -> None:
        for process in processes:
            try:
                getattr(process, name)()
            except psutil.NoSuchProcess:
                pass

    me = psutil.Process()
    signal_all(me.children(), "suspend")
    signal_all(me.children(recursive=True), "kill")


def estimated_seconds(configs: list[RunConfig]) -> tuple[float, list[str]]:
    """Worker-seconds that runs would take here, from a few timed steps of each kind; and what could not be estimated.

    Counts training steps, evaluations (a third of a pass an image) and kernel starts; not the probes and measures.
    """
    from samlib.data import load_source
    from samlib.train import seconds_per_step

    seconds, notes = 0.0, {}
    steps: dict[str, float | None] = {}
    sizes: dict[str, tuple[int, int] | None] = {}
    for config in configs:
        kept = (
            "dataset",
            "root",
            "image_size",
            "model",
            "stem",
            "width",
            "batch_size",
            "precision",
            "compile",
            "threads",
        )
        kind = repr([getattr(config, name) for name in (*kept, "device", "graph")] + [config.passes])
        place = f"{config.dataset} in {config.root}"
        try:
            if kind not in steps:
                steps[kind] = None
                steps[kind] = seconds_per_step(config)
            if place not in sizes:
                sizes[place] = SIZES.get(config.dataset)
                if not sizes[place]:
                    source = load_source(config)
                    sizes[place] = (len(source.labels), len(source.test_labels))
        except UserError as error:
            notes[str(error)] = None
        if steps.get(kind) is None or sizes.get(place) is None:
            continue
        train, test = sizes[place][0] * config.data_fraction, sizes[place][1]
        evaluations = math.ceil(config.epochs / config.eval_every)
        image = steps[kind] / config.batch_size
        seconds += config.epochs * math.ceil(train / config.batch_size) * steps[kind]
        seconds += evaluations * (train + test) * image / config.passes / 3 + NOTEBOOK_SECONDS
    return seconds, list(notes)


def publish(study: Study, root: Path, figures: Path, project: Path = PROJECT) -> list[RunConfig]:
    """Copies what a study stands on to runs/published and figures/<study>; returns the runs that are not done."""
    published = project / "runs" / "published"
    missing = study.missing(root)
    for config in study.configs():
        if config in missing:
            continue
        source, target = root / config.run_id, published / config.run_id
        target.mkdir(parents=True, exist_ok=True)
        for path in (
            source / "config.json",
            *sorted(source.glob("*.csv")),
            source / "train.ipynb",
            source / "summary.json",
        ):
            if path.exists():
                shutil.copy2(path, target)
    for analysis in study.notebooks:
        path = root / study.name / f"{analysis.notebook}.ipynb"
        if path.exists():
            (published / study.name).mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, published / study.name)
    drawn = figures / study.name
    if drawn.is_dir():
        shutil.copytree(drawn, project / "figures" / study.name, dirs_exist_ok=True)
    return missing
