"""python -m samlib run, status, publish, report, bench."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from samlib import PROJECT  # and nothing that imports torch: Dask's workers import this module when they start

if __name__ in ("__main__", "__mp_main__"):
    # Ctrl-C ends this process without a traceback; a worker, which gets it too, leaves it to `stop` below.
    signal.signal(signal.SIGINT, signal.SIG_DFL if __name__ == "__main__" else signal.SIG_IGN)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when all is well, 1 when a run or notebook failed, 2 for bad input, 130 after Ctrl-C."""
    args = parser().parse_args(arguments)
    from samlib.config import UserError

    try:
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

    def add(name: str, command: Any, text: str, study: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        if study:
            sub.add_argument("study", metavar="STUDY", help="a file such as studies/quick.yaml")
            sub.add_argument("--root", type=Path, default=PROJECT / "runs/local", help="the runs (default: runs/local)")
        return sub

    sub = add(
        "run", run, "Do what a study still lacks: its runs, then its analysis notebooks; or one run, by --set.", False
    )
    sub.add_argument("study", nargs="?", metavar="STUDY", help="a file such as studies/quick.yaml")
    sub.add_argument("--set", nargs="+", metavar="FIELD=VALUE", help="one run: mix=sam data_fraction=0.1 ...")
    sub.add_argument("--root", type=Path, default=PROJECT / "runs/local", help="where runs go (default: runs/local)")
    sub.add_argument("--workers", type=positive, help="runs at a time (default: by the cores; 1 on a GPU)")
    sub.add_argument("--scheduler", help="the address of a Dask cluster, tcp://host:port (default: a local one)")
    sub.add_argument("--dry-run", action="store_true", help="only show what it would do, and the hours it would take")
    sub.add_argument("--no-notebooks", action="store_true", help="train only")
    add("status", status, "What of a study is done.")
    add("publish", publish, "Copy what a study stands on to runs/published and figures.")
    add("report", report, "A study's tables, as markdown.")
    sub = add("bench", bench, "Measure the speed here, beside other implementations.", study=False)
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
    from samlib.batch import runner
    from samlib.config import UserError
    from samlib.runs import Run
    from samlib.study import Study, parse_config, read_yaml, relative

    root = args.root.resolve()
    if (args.study is None) == (args.set is None):
        raise UserError("run: name either a study file or one run by --set field=value ...")
    study = None
    if args.study is not None:
        study = Study.load(args.study)
        study.check_notebooks()
        configs = study.configs()
    else:
        values = {}
        for item in args.set:
            name, equals, value = item.partition("=")
            if not equals or name in values:
                raise UserError(f"--set: found {item!r:.100}; give each field once, as field=value")
            values[name] = read_yaml(value, f"--set {name}")
        configs = [parse_config(values, "--set")]
    figures = figures_of(root)
    if args.dry_run:
        return dry_run(configs, root, args.workers)

    def stop(*_: Any) -> None:  # no exception: Dask's own way out would wait for its workers
        runner.end_children()
        command = " ".join(["python -m samlib", *sys.argv[1:]])
        print(f"\nStopped. Finished runs are kept and started ones resume: {command}", file=sys.stderr, flush=True)
        os._exit(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        failures = runner.run_all(configs, root, study, figures, args.workers, args.scheduler, not args.no_notebooks)
    finally:
        signal.signal(signal.SIGINT, before)

    for task, error in failures:
        notebook = f" (see {relative(task.failed)})" if task.failed.exists() else ""
        print(f"failed: {task.name}: {error}{notebook}", file=sys.stderr)
    finished = [c for c in configs if Run(c, root).done]
    diverged = [c for c in finished if Run(c, root).summary["status"] == "diverged"]
    print(
        f"{len(finished)} of {len(configs)} runs are done" + (f", {len(diverged)} of them diverged" if diverged else "")
    )
    for config in diverged:
        print(f"diverged: {config.run_id}")
    print("Where to look:")
    if study:
        for path in sorted((root / study.name).glob("[!.]*.ipynb")):
            print(f"  {relative(path)}")
        if (figures / study.name).is_dir():
            print(f"  {relative(figures / study.name)}/")
    if finished:
        print(f"  {relative(root)}/{finished[0].run_id if len(configs) == 1 else '<run>'}/train.ipynb")
    return 1 if failures else 0


def dry_run(configs: list, root: Path, workers: int | None) -> int:
    from samlib.batch import runner
    from samlib.runs import Run

    todo = runner.unfinished(configs, root)
    for config in configs:
        print(f"{'done ' if Run(config, root).done else 'to do'}  {config.run_id}")
    print(f"{len(configs)} runs: {len(configs) - len(todo)} done, {len(todo)} to do")
    if todo:
        workers = min(workers or runner.workers_by_default(todo), len(todo))
        seconds, notes = runner.estimated_seconds(todo)
        for note in notes:
            print(f"not estimated: {note}")
        print(
            f"about {seconds / workers / 3600:.2g} hours on this machine with {workers} worker(s), from a few timed "
            "steps; probes, measures and analysis notebooks come on top"
        )
    return 0


def status(args: argparse.Namespace) -> int:
    from samlib.runs import Run
    from samlib.study import Study, relative

    study, root = Study.load(args.study), args.root.resolve()
    for grid in study.grids:
        configs = study.configs(grid)
        runs = [Run(config, root) for config in configs]
        diverged = [run for run in runs if run.done and run.summary["status"] == "diverged"]
        print(f"{grid}: {sum(run.done for run in runs)} of {len(runs)} runs are done")
        for word, some in (("diverged", diverged), ("missing", [run for run in runs if not run.done])):
            for item in some:
                print(f"  {word}: {item.id}")
    for analysis in study.notebooks:
        path = root / study.name / f"{analysis.notebook}.ipynb"
        print(f"{relative(path)}: {'executed' if path.exists() else 'not executed yet'}")
    return 0


def publish(args: argparse.Namespace) -> int:
    from samlib.batch import runner
    from samlib.analysis.findings import write_findings
    from samlib.study import Study

    study, root = Study.load(args.study), args.root.resolve()
    missing = runner.publish(study, root, figures_of(root))
    write_findings()
    for config in missing:
        print(f"missing: {config.run_id}")
    count = len(study.configs())
    print(
        f"{count - len(missing)} of {count} runs published in runs/published; notebooks in runs/published/{study.name}"
    )
    return 0


def report(args: argparse.Namespace) -> int:
    from samlib.analysis.report import report as report_of
    from samlib.study import Study

    print(report_of(Study.load(args.study), args.root.resolve()))
    return 0


def bench(args: argparse.Namespace) -> int:
    from samlib.config import UserError

    sys.path.insert(0, str(PROJECT))
    try:
        from benchmarks.bench import bench as measure
    except ImportError as error:
        raise UserError(f"bench: {error.name} is not installed here; use `make bench`") from None
    return measure(args.what, args.quick)


if __name__ == "__main__":
    sys.exit(main())
