"""What a study still has to do, and the doing of it: notebooks executed by papermill, each a task of a Dask cluster."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from tqdm import tqdm

from samlib import PROJECT
from samlib.batch import kernels
from samlib.batch.execute import TOPIC, execute, failed_notebook, sees
from samlib.config import RunConfig, UserError
from samlib.runs import Run
from samlib.study import DATASETS, NOTEBOOKS, Study, relative

TRAIN = "01_train"
NOTEBOOK_SECONDS = 1.0  # of a notebook, in a kernel that is there
ANSWER = 10  # seconds that a Dask cluster elsewhere has for an answer, and as many for a worker
# Training and test images; known, so that nothing is downloaded only to be counted.
SIZES = {
    "digits": (1005, 792),
    "fashion-mnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}
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
    """The runs that are not done, or whose executed notebook is not there; the longest first."""
    todo = [c for c in configs if not (Run(c, root).done and training_task(c, root).output.exists())]
    return sorted(todo, key=lambda c: -c.epochs * c.data_fraction * c.passes)


def stale_analyses(study: Study, root: Path, figures: Path) -> list[Task]:
    """The analysis notebooks never executed, or before something they read: a run, the study, the notebook itself; and
    those whose figures are gone."""
    tasks = []
    for analysis in study.notebooks:
        output = root / study.name / f"{analysis.notebook}.ipynb"
        configs = study.read_by(analysis)
        source = NOTEBOOKS / f"{analysis.notebook}.ipynb"
        read = [study.path, source, *(root / c.run_id / "summary.json" for c in configs)]
        newest = max(path.stat().st_mtime for path in read if path.exists())
        if unfinished(configs, root) or not _is_whole(output, figures / study.name) or output.stat().st_mtime < newest:
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


def check_notebooks(study: Study) -> None:
    """Raises UserError where a notebook is not there, or lacks a parameter that it would be given."""
    import papermill

    for analysis in study.notebooks:
        path = NOTEBOOKS / f"{analysis.notebook}.ipynb"
        where = f"{relative(study.path)}: notebooks: {analysis.notebook}"
        if not path.is_file():
            there = ", ".join(sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb")))
            raise UserError(f"{where}: there is no such notebook; there are {there}")
        try:
            known = papermill.inspect_notebook(str(path).replace("{", "{{").replace("}", "}}"))
        except Exception as error:  # nbformat raises whatever a broken file provokes
            raise UserError(f"{where}: {relative(path)} cannot be read ({type(error).__name__})") from None
        for name in study.parameters(analysis, path, path):
            if name not in known:
                raise UserError(f"{where}: it has no parameter {name!r}; its parameters are {', '.join(known)}")


def check_data(configs: Iterable[RunConfig]) -> None:
    """Raises UserError where a dataset that is trained on cannot be read; what is downloaded or cached is so once."""
    from samlib.data import load_source

    with chdir(PROJECT):  # where the notebooks are executed
        for config in {(c.dataset, c.root, c.image_size): c for c in configs}.values():
            load_source(config)


def workers_by_default(configs: list[RunConfig]) -> int:
    """As many as the cores can serve; one where the runs share a GPU."""
    import torch

    with broken_dask():
        from dask.system import CPU_COUNT

    if any(config.device != "cpu" for config in configs) and torch.cuda.is_available():
        return 1
    return max(1, CPU_COUNT // max((config.threads for config in configs), default=1))


@contextmanager
def dask_client(workers: int, scheduler: str | None) -> Iterator[Any]:
    """A client of the cluster at an address, or of one inside this process: its workers are threads that wait for
    their kernels, and it listens on no socket that another user could give it work by."""
    with broken_dask():
        import dask
        from distributed import Client, LocalCluster

        logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=ANSWER)
        except Exception as error:  # whatever answers there
            raise UserError(f"--scheduler: no Dask scheduler answers at {scheduler!r} ({_line(error)})") from None
        with client:
            try:
                client.wait_for_workers(1, timeout=ANSWER)
            except TimeoutError:
                raise UserError(f"--scheduler: the scheduler at {scheduler!r} has no workers; start some") from None
            yield client
        return
    place = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
    options = {"threads_per_worker": 1, "processes": False, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    with dask.config.set({**DASK, "temporary-directory": kernels.folder()}):
        with broken_dask():
            cluster = LocalCluster(n_workers=workers, **place, **options)
        with cluster, Client(cluster) as client:
            yield client


@contextmanager
def broken_dask() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its configuration is code of others, and breaks as it likes
        where = "its settings are in ~/.config/dask, /etc/dask and variables DASK_*"
        raise UserError(f"Dask cannot be started ({type(error).__name__}: {_line(error)}); {where}") from None


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def check_workers(client: Any, scheduler: str, root: Path) -> None:
    """Raises UserError where a worker elsewhere lacks this project, or does not share the folder of the runs."""
    root.mkdir(parents=True, exist_ok=True)
    probe, text = root / f".{uuid4()}.tmp", str(uuid4())
    try:
        probe.write_text(text)
        answers = client.run(sees, str(probe), text, on_error="return")
    finally:
        probe.unlink(missing_ok=True)
    for worker, answer in answers.items():
        if isinstance(answer, Exception):
            what = f"cannot import samlib ({_line(answer)}): start it with this project's Python"
        elif not answer:
            what = f"does not see {root}: workers need this project and its runs at the same paths"
        else:
            continue
        raise UserError(f"--scheduler: the worker {worker} of {scheduler!r} {what}")


def execute_tasks(client: Any, tasks: list[Task], bar: tqdm, batch: str = "") -> list[tuple[Task, str]]:
    """Executes the tasks, in this order as workers are free; returns those that failed, with their errors.

    A task whose worker dies is executed by another, as often as the scheduler allows; one that raises is not.
    """
    from distributed import as_completed

    waiting = {}
    try:
        for task in tasks:
            source = str(NOTEBOOKS / f"{task.notebook}.ipynb")
            arguments = (source, str(task.output), task.parameters, str(PROJECT), batch)
            waiting[client.submit(execute, *arguments, key=f"{task.name}-{uuid4()}", pure=False)] = task
        failures = []
        for future in as_completed(waiting):
            task = waiting[future]
            if future.status == "finished":
                error = future.result()
            elif future.status == "error":
                exception = future.exception()
                error = f"{type(exception).__name__}: {_line(exception)}"
            else:
                error = "the cluster lost it"
            if error:
                failures.append((task, error))
            bar.update()
        return failures
    except KeyboardInterrupt:  # with a cluster elsewhere: it would go on
        client.cancel(list(waiting), force=True)
        client.run(kernels.stop, batch, on_error="ignore")
        raise


def run_all(
    configs: list[RunConfig],
    root: Path,
    study: Study | None = None,
    figures: Path | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    notebooks: bool = True,
    batch: str = "",
) -> list[tuple[Task, str]]:
    """Trains what is not done, then executes the analysis notebooks that this makes stale; returns what failed.

    With nothing to do it starts no cluster; with data missing, nothing. Where runs fail, the others and the notebooks
    are executed all the same.
    """
    todo = unfinished(configs, root)
    analyses = stale_analyses(study, root, figures) if study and notebooks else []
    if not todo and not analyses:
        return []
    check_data(config for config in todo if not Run(config, root).done)
    total = len(configs) + (len(study.notebooks) if study and notebooks else 0)
    workers = min(workers or workers_by_default(todo), max(len(todo), len(analyses)))
    with dask_client(workers, scheduler) as client:
        client.subscribe_topic(TOPIC, lambda event: tqdm.write(str(event[1]), file=sys.stderr))
        if scheduler is not None:  # the threads of a local cluster do not stop
            check_workers(client, scheduler, root)
            client.subscribe_topic("all", _tell_of_workers)
        initial = total - len(todo) - len(analyses)
        words = {"unit": "notebook", "desc": "study" if study else "run"}
        with tqdm(total=total, initial=initial, mininterval=1.0, **words) as bar:
            bar.refresh()
            failures = execute_tasks(client, [training_task(config, root) for config in todo], bar, batch)
            failures += execute_tasks(client, analyses, bar, batch)
        if scheduler is not None:
            client.unsubscribe_topic("all")  # or it would hear of its own end, when it is no longer there
        return failures


def _tell_of_workers(event: tuple[float, Any]) -> None:
    _, what = event
    if isinstance(what, dict) and what.get("action") == "remove-worker" and what.get("processing-tasks"):
        count = len(what["processing-tasks"])
        text = f"the worker {what.get('worker')} has stopped: another executes its {count} notebook(s) again"
        tqdm.write(text, file=sys.stderr)


def estimated_seconds(configs: list[RunConfig]) -> tuple[float, list[str]]:
    """Worker-seconds that runs would take here, from a few timed steps of each kind; and what could not be estimated.

    Counts training steps, evaluations (a third of a pass an image) and kernel starts; not the probes and measures.
    """
    from samlib.train import seconds_per_step

    seconds, notes = 0.0, {}
    steps: dict[str, float | None] = {}
    kept = "dataset root image_size model stem width batch_size precision threads device graph passes".split()
    for config in configs:
        kind = repr([getattr(config, name) for name in kept])
        try:
            train, test = _images(config)
            if kind not in steps:
                steps[kind] = None
                _check_memory(config)
                steps[kind] = seconds_per_step(config)
        except UserError as error:
            notes[str(error)] = None
            continue
        if steps[kind] is None:
            continue
        train *= config.data_fraction
        evaluations = math.ceil(config.epochs / config.eval_every)
        image = steps[kind] / config.batch_size
        seconds += config.epochs * math.ceil(train / config.batch_size) * steps[kind]
        seconds += evaluations * (train + test) * image / config.passes / 3 + NOTEBOOK_SECONDS
    return seconds, list(notes)


def _images(config: RunConfig) -> tuple[int, int]:
    """Training and test images, counted without reading them."""
    if config.dataset in SIZES:
        return SIZES[config.dataset]
    counts = [sum(len(files) for *_, files in os.walk(PROJECT / config.root / part)) for part in ("train", "test")]
    if not all(counts):
        raise UserError(f"root: {config.root!r} holds no train/<class>/<image> and test/<class>/<image>")
    return counts[0], counts[1]


def _check_memory(config: RunConfig) -> None:
    """Raises UserError where a step could need more than half of the memory that is free: it is not tried then."""
    import psutil
    import torch

    from samlib.models import build_model

    with torch.device("meta"):
        model = build_model(config.model, config.width, config.stem, 3, 100, 0)
    parameters = sum(p.numel() for p in model.parameters())
    size = config.image_size or DATASETS.get(config.dataset, ("", 32))[1]
    activations = config.batch_size * size**2 * config.width * (16 if config.stem == "cifar" else 4)
    need, free = 4 * (6 * parameters + activations), psutil.virtual_memory().available
    if need > free / 2:
        raise UserError(
            f"{config.model} of width {config.width} ({parameters:,} parameters) at batch_size {config.batch_size:,} "
            f"may need {need / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free: its steps are not timed"
        )
