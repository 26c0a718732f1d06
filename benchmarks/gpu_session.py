"""Runs on a machine with a GPU that has no Jupyter: `python -m benchmarks.gpu_session --out FOLDER --minutes 25`.

In this order: whether the captured step is the eager one, the GPU's benchmark (FOLDER/gpu.md, written anew with each
row), the first document's grid, the ablation with its controls; of a grid, one seed after the other, and no worker
waits for another grid's end. What fails is told, and the rest goes on. Finished runs, without weights and states, are
in FOLDER/runs.tar.gz, written anew every two minutes: `tar xzf` it in runs/local. When the time is over, what is
running is stopped; the same command goes on from there. Beside torch it needs numpy, pandas, filelock, pydantic,
PyYAML, tqdm and for the datasets torchvision, and the images where the study looks for them (--set root=...).
"""

import argparse
import io
import multiprocessing
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks import gpu
from samlib import PROJECT
from samlib.config import RunConfig, UserError
from samlib.runs import write_atomic
from samlib.study import Study, read_fields
from samlib.train import train

ARCHIVE_SECONDS = 120
PARTS = (
    "equality",
    "benchmark",
    "studies/paper/data-regimes.yaml:regimes",
    "studies/paper/checkpoint-ablation.yaml:controls",
)


def equality(_: str) -> str:
    return "; ".join(f"{row.what}: {row.median:.2g}" for row in gpu.losses(50))


def benchmark(out: str) -> str:
    gpu.measure_all(quick=False, short=(2, 4), folder=Path(out))
    return f"gpu.md is in {out}"


ALONE = {"equality": equality, "benchmark": benchmark}


def training(job: tuple[RunConfig, Path]) -> str:
    summary = train(*job, progress=False).summary
    accuracy = "" if summary["test_accuracy"] is None else f", test accuracy {summary['test_accuracy']:.2%}"
    return f"{job[0].run_id}: {summary['status']}, {summary['seconds']:.0f} s{accuracy}"


def attempt(work: tuple[Callable, object]) -> tuple[bool, str]:
    """Whether it went well, and what it says of itself or of its error."""
    function, argument = work
    try:
        return True, function(argument)
    except Exception as error:
        what = f"{argument[0].run_id}: " if function is training else ""
        return False, f"{what}{type(error).__name__}: {error}"


def results(function: Callable, jobs: Iterable, workers: int, deadline: float) -> Iterator[tuple[bool, str] | None]:
    """Of each job, as they finish in processes of their own; None where there is no news for a second. When the time
    is over, those that are running are killed."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        waiting = pool.imap_unordered(attempt, [(function, job) for job in jobs])
        while time.monotonic() < deadline:
            try:
                yield waiting.next(timeout=1)
            except multiprocessing.TimeoutError:
                yield None
            except StopIteration:
                pool.close()
                pool.join()
                return


def archive(root: Path, out: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for summary in sorted(root.glob("*/summary.json")):
            for path in sorted(summary.parent.iterdir()):
                if path.suffix != ".pt" and not path.name.startswith("."):
                    tar.add(path, f"{path.parent.name}/{path.name}")
    write_atomic(out / "runs.tar.gz", content.getvalue())


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when all was done, 1 when something failed or time ran out, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=PARTS, help="equality, benchmark, STUDY.yaml:GRID; all by default")
    parser.add_argument("--out", type=Path, required=True, help="the folder that is brought back")
    parser.add_argument("--root", type=Path, default=PROJECT / "runs/local", help="the runs (default: runs/local)")
    parser.add_argument("--minutes", type=float, default=25, help="the time limit (default: 25)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--finished", type=Path, help="runs that are finished in this folder are not trained again")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields above the studies' base")
    args = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, RunConfig] = {}  # by id, in their order: grids share some
    try:
        fields = read_fields(args.set)
        for part in args.parts:
            if part not in ALONE:
                path, _, grid = part.partition(":")
                configs = Study.load(path, fields).configs(grid or None)
                seeds = list(dict.fromkeys(config.seed for config in configs))
                runs |= {c.run_id: c for c in sorted(configs, key=lambda c: seeds.index(c.seed))}
        if args.finished and not args.finished.is_dir():
            raise UserError(f"--finished: {str(args.finished)!r} is not a folder of runs")
    except UserError as error:
        print(f"gpu_session: {error}", file=sys.stderr)
        return 2
    if args.finished:
        runs = {name: config for name, config in runs.items() if not (args.finished / name / "summary.json").exists()}
    work = [(part, ALONE[part], [str(args.out)]) for part in args.parts if part in ALONE]
    work += [("runs", training, [(config, args.root) for config in runs.values()])] if runs else []
    complete, archived = True, time.monotonic()
    for part, function, jobs in work:
        done = failed = 0
        for news in results(function, jobs, min(args.workers, len(jobs)), deadline):
            if news:
                print(f"{part}: {'' if news[0] else 'FAILED: '}{news[1]}", flush=True)
                done, failed = done + news[0], failed + (not news[0])
            if time.monotonic() - archived > ARCHIVE_SECONDS:
                archive(args.root, args.out)
                archived = time.monotonic()
        left = len(jobs) - done - failed
        print(f"{part}: {done} of {len(jobs)} done, {failed} failed, {left} left when time was over", flush=True)
        complete &= done == len(jobs)
    archive(args.root, args.out)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
