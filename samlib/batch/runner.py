"""What a study still has to do, and the doing of it: notebooks executed by papermill, each a task of a Dask cluster."""

import asyncio
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from tqdm.auto import tqdm

from samlib import PROJECT
from samlib.batch import kernels
from samlib.batch.execute import TOPIC, execute, failed_notebook, sees
from samlib.config import RunConfig, UserError, first_line
from samlib.runs import Run
from samlib.study import NOTEBOOKS, Study, relative

TRAIN = "01_train"
ANSWER = 10  # seconds that a Dask cluster elsewhere has for an answer, and as many for a worker
# Of the cluster inside this process: one task a worker, none lost while a laptop sleeps, no page over HTTP.
DASK = {
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.scheduler.worker-ttl": None,
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
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
    """The runs that are not done, or whose executed notebook is not there: seed by seed, so that what a study of hours
    has finished can be compared; of a seed the longest first."""
    todo = [c for c in configs if not (Run(c, root).done and training_task(c, root).output.exists())]
    return sorted(todo, key=lambda c: (c.seed, -c.epochs * c.data_fraction * c.passes))


def stale_analyses(study: Study, root: Path, figures: Path, training: bool = True) -> list[Task]:
    """The analysis notebooks never executed, or before something they read: a run, also one that is to be trained yet,
    the study, the notebook itself; and those whose figures are gone. training: whether it is going to be."""
    tasks = []
    for analysis in study.notebooks:
        output = root / study.name / f"{analysis.notebook}.ipynb"
        configs = [config for grid in study.grids_of(analysis) for config in study.grids[grid]]
        source = NOTEBOOKS / f"{analysis.notebook}.ipynb"
        read = [study.path, source, *(root / c.run_id / "summary.json" for c in configs)]
        newest = max(path.stat().st_mtime for path in read if path.exists())
        todo = [config for config in unfinished(configs, root) if training or Run(config, root).done]
        if todo or not _is_whole(output, figures / study.name) or output.stat().st_mtime < newest:
            parameters = study.parameters(analysis, root, figures)
            tasks.append(Task(f"{study.name}/{analysis.notebook}", analysis.notebook, output, parameters))
    return tasks


def _is_whole(output: Path, figures: Path) -> bool:
    """Whether an executed notebook is there, and the figures that it has drawn."""
    try:
        drawn = json.loads(output.read_bytes())["metadata"].get("figures", [])
        return all((figures / name).exists() for name in drawn)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def check_inputs(study: Study | None, configs: Iterable[RunConfig]) -> None:
    """Raises UserError where a notebook is not there, or a dataset that is trained on cannot be read; what is
    downloaded or cached is so once."""
    from samlib.data import load_source

    for name in [analysis.notebook for analysis in study.notebooks] if study else []:
        if not (NOTEBOOKS / f"{name}.ipynb").is_file():
            there = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
            raise UserError(f"{relative(study.path)}: notebooks: {name}: there is no such notebook; there are {there}")
    with chdir(PROJECT):  # where the notebooks are executed
        for config in {(c.dataset, c.root, c.image_size): c for c in configs}.values():
            load_source(config)


def workers_by_default(configs: list[RunConfig]) -> int:
    """As many as the cores can serve; one where the runs share a GPU."""
    import torch

    with broken_dask():
        from dask.system import CPU_COUNT  # which knows of a container's share

    if any(config.device != "cpu" for config in configs) and torch.cuda.is_available():
        return 1
    return max(1, CPU_COUNT // max((config.threads for config in configs), default=1))


@contextmanager
def broken_dask() -> Iterator[None]:
    """Raises UserError for whatever Dask raises of its configuration."""
    try:
        yield
    except Exception as error:
        where = "its settings are in ~/.config/dask, /etc/dask and variables DASK_*"
        raise UserError(f"Dask cannot be started ({type(error).__name__}: {first_line(error)}); {where}") from None


@contextmanager
def local_cluster(workers: int) -> Iterator[Any]:
    """A client of a cluster inside this process: its workers are threads that wait for their kernels, and it listens on
    no socket that another user could give it work by."""
    with broken_dask():
        import dask
        from distributed import Client, LocalCluster

        logging.getLogger("distributed").setLevel(logging.CRITICAL)
        dask.config.set({**DASK, "temporary-directory": kernels.folder()})
        place = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
        options = {"threads_per_worker": 1, "processes": False, "memory_limit": 0, "silence_logs": logging.CRITICAL}
        cluster = LocalCluster(n_workers=workers, **place, **options)
    with cluster, Client(cluster) as client:
        yield client


@contextmanager
def cluster_at(scheduler: str, root: Path) -> Iterator[Any]:
    """A client of a cluster elsewhere. Raises UserError where none answers, or a worker cannot do a run of `root`."""
    with broken_dask():
        from distributed import Client
        from distributed.comm import connect

        logging.getLogger("distributed").setLevel(logging.CRITICAL)

    async def greet() -> None:  # Client would wait for ever where something else answers
        (await asyncio.wait_for(connect(scheduler), ANSWER)).abort()

    try:
        asyncio.run(greet())
        client = Client(scheduler, timeout=ANSWER)
    except Exception as error:  # whatever answers there
        raise UserError(f"--scheduler: no Dask scheduler answers at {scheduler!r} ({first_line(error)})") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=ANSWER)
        except TimeoutError:
            raise UserError(f"--scheduler: the scheduler at {scheduler!r} has no workers; start some") from None
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".{uuid4()}.tmp"
        try:
            probe.touch()
            answers = client.run(sees, str(probe), on_error="return")
        finally:
            probe.unlink(missing_ok=True)
        for worker, answer in answers.items():
            if isinstance(answer, Exception):
                what = f"cannot import samlib ({first_line(answer)}): start it with this project's Python"
                raise UserError(f"--scheduler: the worker {worker} {what}")
            if not answer:
                what = f"does not see {root}: workers need this project and its runs at the same paths"
                raise UserError(f"--scheduler: the worker {worker} {what}")
        client.subscribe_topic("all", _tell_of_workers)
        yield client
        client.unsubscribe_topic("all")  # or it would hear of its own end, when it is no longer there


def _tell_of_workers(event: tuple[float, Any]) -> None:
    _, what = event
    if isinstance(what, dict) and what.get("action") == "remove-worker" and what.get("processing-tasks"):
        text = f"the worker {what.get('worker')} has stopped: another executes again what it was at"
        tqdm.write(text, file=sys.stderr)


def execute_tasks(client: Any, tasks: list[Task], bar: tqdm) -> list[tuple[Task, str]]:
    """Executes the tasks, in this order as workers are free; returns those that failed, with their errors.

    A task whose worker dies is executed by another, as often as the scheduler allows; one that raises is not.
    """
    from distributed import as_completed

    batch, waiting, failures = str(uuid4()), {}, []
    try:
        for task in tasks:
            source = str(NOTEBOOKS / f"{task.notebook}.ipynb")
            arguments = (source, str(task.output), task.parameters, str(PROJECT), batch)
            waiting[client.submit(execute, *arguments, key=f"{task.name}-{uuid4()}", pure=False)] = task
        for future in as_completed(waiting):
            error = (
                future.result()
                if future.status == "finished"
                else first_line(future.exception() or RuntimeError("the cluster lost it"))
            )
            if error:
                failures.append((waiting[future], error))
            bar.update()
    except KeyboardInterrupt:  # with a cluster elsewhere: it would go on
        client.cancel(list(waiting), force=True)
        client.run(kernels.stop, batch, on_error="ignore")
        raise
    return failures


def run_all(
    configs: list[RunConfig],
    root: Path,
    study: Study | None = None,
    figures: Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    notebooks: bool = True,
    training: bool = True,
) -> list[tuple[Task, str]]:
    """Trains what is not done, then executes the analysis notebooks that this makes stale; returns what failed.

    Without training, notebooks of what is finished alone: also of runs that were trained without one. With nothing to
    do it starts no cluster; with data missing, nothing. Where runs fail, the others and the notebooks are executed all
    the same.
    """
    study = study if notebooks else None
    configs = [config for config in configs if training or Run(config, root).done]
    check_inputs(study, [config for config in configs if not Run(config, root).done])
    trainings = [training_task(config, root) for config in unfinished(configs, root)]
    analyses = stale_analyses(study, root, figures, training) if study else []
    left, total = len(trainings) + len(analyses), len(configs) + (len(study.notebooks) if study else 0)
    if not left:
        return []
    workers = min(workers or workers_by_default(configs), max(len(trainings), len(analyses)))
    with cluster_at(scheduler, root) if scheduler is not None else local_cluster(workers) as client:
        client.subscribe_topic(TOPIC, lambda event: tqdm.write(str(event[1]), file=sys.stderr))
        with tqdm(total=total, initial=total - left, mininterval=1.0, unit="notebook") as bar:
            return execute_tasks(client, trainings, bar) + execute_tasks(client, analyses, bar)
