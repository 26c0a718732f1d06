"""python -m samlib run, status, publish, report, bench."""

import argparse
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from samlib import PROJECT  # and nothing that imports torch: `--help` is there at once

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this process without a traceback; later `stop` below


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when all is well, 1 when a run or notebook failed, 2 for bad input, 130 after Ctrl-C."""
    args = parser().parse_args(arguments)
    from samlib.config import UserError
    from samlib.study import Study, read_fields, resolved

    try:
        if "study" in args:
            args.root = resolved(args.root)
            args.fields = read_fields([item for items in args.set or [] for item in items])
            args.study = args.study and Study.load(args.study, args.fields)
            if args.grid and not args.study:
                raise UserError("--grid: it is of a study; name the study's file")
            args.study = args.study.only(args.grid) if args.grid else args.study
        return args.command(args)
    except UserError as error:
        print(f"samlib: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"samlib: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m samlib", description="Run and read studies of SAM.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str, nargs: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("study", nargs=nargs, metavar="STUDY", help="a file such as studies/quick.yaml")
        given = "fields above the study's base: dataset=cifar10 root=data ..."
        sub.add_argument("--set", nargs="+", action="append", metavar="FIELD=VALUE", help=given)
        sub.add_argument("--grid", nargs="+", metavar="NAME", help="only these grids of the study")
        sub.add_argument("--root", type=Path, default=PROJECT / "runs/local", help="the runs (default: runs/local)")
        return sub

    text = "Do what a study still lacks: its runs, then its analysis notebooks; without a study, the one run of --set."
    sub = add("run", run, text, "?")
    sub.add_argument("--workers", type=positive, help="runs at a time (default: by the cores; 1 on a GPU)")
    sub.add_argument("--scheduler", help="the address of a Dask cluster, tcp://host:port (default: a local one)")
    sub.add_argument("--dry-run", action="store_true", help="only show what it would do, and the hours it would take")
    parts = sub.add_mutually_exclusive_group()
    parts.add_argument("--no-notebooks", action="store_true", help="train only")
    parts.add_argument("--no-training", action="store_true", help="notebooks only, of the runs that are finished")
    add("status", status, "What of a study is done.")
    add("publish", publish, "Copy what a study stands on to runs/published and figures.")
    sub = add("report", report, "A study's tables, as markdown.")
    sub.add_argument("--html", action="store_true", help="one page with the notebooks, instead; says where it is")
    sub.add_argument("--out", type=Path, metavar="FILE", help="where that page goes (default: beside the notebooks)")
    text = "Measure the speed here, beside other implementations."
    sub = commands.add_parser("bench", help=text, description=text)
    sub.set_defaults(command=bench)
    sub.add_argument("what", nargs="?", choices=["cpu", "gpu"], default="cpu")
    sub.add_argument("--quick", action="store_true", help="few repeats, to see that it works; the table is not kept")
    return top


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"found {text!r:.50}; it is a number from 1 to 1024")
    return int(text)


def figures_of(root: Path) -> Path:
    """figures/local for runs/local; for runs that are kept elsewhere, beside them."""
    return PROJECT / "figures" / root.name if root.parent == PROJECT / "runs" else root / "figures"


def run(args: argparse.Namespace) -> int:
    from samlib.batch import kernels, runner
    from samlib.config import RunConfig, UserError
    from samlib.runs import Run

    study, root, scheduler = args.study, args.root, args.scheduler
    if not (study or args.fields):
        raise UserError("run: name a study file, or one run by --set field=value ...")
    if scheduler is not None and not scheduler.strip():
        raise UserError("--scheduler: it is empty; give tcp://host:port, or leave it out for a cluster of this machine")
    configs = study.configs() if study else [RunConfig.parse(args.fields, "--set: ")]
    if args.dry_run and args.no_training:
        raise UserError("--dry-run: it tells of what would be trained; leave --no-training out")
    if args.dry_run:
        return dry_run(configs, root, args.workers)
    figures = figures_of(root)

    def stopped() -> None:
        command = " ".join(["python -m samlib", *sys.argv[1:]])
        print(f"\nStopped. Finished runs are kept and started ones resume: {command}", file=sys.stderr, flush=True)
        kernels.stop()
        os._exit(130)  # Dask's own way out would wait for its workers

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not scheduler:
            stopped()
        raise KeyboardInterrupt  # the runner stops what a cluster elsewhere is at

    before = signal.signal(signal.SIGINT, stop)
    try:
        parts = {"notebooks": not args.no_notebooks, "training": not args.no_training}
        failures = runner.run_all(configs, root, study, figures, args.workers, scheduler, **parts)
    except KeyboardInterrupt:
        stopped()
    finally:
        signal.signal(signal.SIGINT, before)

    for task, error in failures:
        notebook = f" (see {here(task.failed)})" if task.failed.exists() else ""
        print(f"failed: {task.name}: {error}{notebook}", file=sys.stderr)
    runs = [Run(config, root) for config in configs]
    show_done(runs)
    look = [root / run.id / "train.ipynb" for run in runs if run.done]
    if study:
        look = [root / "<run>" / "train.ipynb"] if look else []
        executed = [root / study.name / f"{analysis.notebook}.ipynb" for analysis in study.notebooks]
        look += [path for path in executed if path.exists() and path not in [task.output for task, _ in failures]]
        look += filter(Path.is_dir, [figures / study.name])
    if look:
        print("Where to look:", *map(here, look), sep="\n  ")
    return 1 if failures else 0


UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


def here(path: Path) -> str:
    """The path from the folder of the caller where it lies inside, absolute elsewhere."""
    from samlib.study import relative

    return relative(path, Path.cwd())


def show_done(runs: list, of: str = "") -> None:
    diverged = [run.id for run in runs if run.done and run.summary["status"] == "diverged"]
    count = f"{sum(run.done for run in runs)} of {len(runs)}"
    print(f"{of}runs done: {count}" + (f", diverged: {len(diverged)}" if diverged else ""))
    for name in diverged:
        print(f"  diverged: {name}")


def dry_run(configs: list, root: Path, workers: int | None) -> int:
    from samlib.batch import estimate, runner

    todo = runner.unfinished(configs, root)
    for config in configs:
        print(f"{'to do' if config in todo else 'done '}  {config.run_id}")
    print(f"runs: {len(configs)}, done: {len(configs) - len(todo)}, to do: {len(todo)}")
    if todo:
        workers = min(workers or runner.workers_by_default(todo), len(todo))
        seconds, notes = estimate.estimated_seconds(todo)
        for note in notes:
            print(f"not estimated: {note}")
        took = seconds / workers
        spoken = next(f"{took / s:.2g} {unit}" for s, unit in UNITS if took >= 1.5 * s or s == 1)
        print(f"time on this machine: about {spoken}, workers: {workers} (from a few timed steps)")
        print("probes, measures and analysis notebooks come on top")
    return 0


def status(args: argparse.Namespace) -> int:
    from samlib.batch.execute import failed_notebook
    from samlib.runs import Run

    for grid in args.study.grids:
        runs = [Run(config, args.root) for config in args.study.configs(grid)]
        show_done(runs, f"{grid}: ")
        for run in runs:
            if not run.done:
                print(f"  missing: {run.id}")
    for analysis in args.study.notebooks:
        path = args.root / args.study.name / f"{analysis.notebook}.ipynb"
        failed = failed_notebook(path)
        state = f"failed, see {failed.name}" if failed.exists() else "executed" if path.exists() else "not executed yet"
        print(f"{here(path)}: {state}")
    return 0


def publish(args: argparse.Namespace) -> int:
    from samlib.analysis.report import write_readme
    from samlib.batch.publish import publish as publish_study

    study, published = args.study, PROJECT / "runs/published"
    missing, stale = publish_study(study, args.root, figures_of(args.root))
    write_readme()
    for config in missing:
        print(f"missing: {config.run_id}")
    for notebook in stale:
        print(f"stale: {notebook} is missing or older than what it reads; `run` executes it again, then publish again")
    count = len(study.configs())
    print(f"runs published: {count - len(missing)} of {count}; notebooks in {here(published / study.name)}")
    return 0


def report(args: argparse.Namespace) -> int:
    from samlib.analysis import report as reports

    page = args.out or args.root / args.study.name / "report.html"
    print(reports.write_html(args.study, args.root, page) if args.html else reports.report(args.study, args.root))
    return 0


def bench(args: argparse.Namespace) -> int:
    from samlib.config import UserError

    sys.path.insert(0, str(PROJECT))
    try:
        from benchmarks.bench import bench as measure
    except ImportError as error:
        raise UserError(f"bench: {error.name} is not installed here; use `make bench`") from None
    return measure(args.what, args.quick)


class Terminal:
    """stdout or stderr that may be full or gone, as in `... | head`: what is written then is lost, and nothing else."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()  # at once: nothing is left that could fail later
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_terminal() -> None:
    """Makes stdout and stderr fit for anything: closed, full, of an encoding that lacks a name's characters."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # one that is closed: else a socket would get its number
        setattr(sys, ("stdin", "stdout", "stderr")[number], open(number, "r" if number == 0 else "w", closefd=False))
    os.close(number)
    for name in ("stdout", "stderr"):
        getattr(sys, name).reconfigure(errors="backslashreplace")
        setattr(sys, name, Terminal(getattr(sys, name)))


if __name__ == "__main__":
    open_terminal()
    warnings.simplefilter("ignore")  # PYTHONWARNINGS=error is for those who develop what is imported here
    sys.exit(main())
