"""What the machine changes: the same runs, trained on another. `python -m benchmarks.machines FOLDER [PUBLISHED]`

A seed fixes subset, flipped labels, initial weights and batches everywhere, but not the last bits of a sum, from which
two trainings soon part. How far they end apart is beside how far seeds are apart: an interval over seeds holds both.
"""

import sys

import pandas as pd

from benchmarks import measure
from benchmarks.measure import Row
from samlib import PROJECT
from samlib.analysis.results import mix_name
from samlib.config import UserError
from samlib.runs import load_runs

VALUES = {"test_accuracy": "test accuracy", "memorized": "flipped labels memorized"}


def pairs(here: pd.DataFrame, there: pd.DataFrame) -> pd.DataFrame:
    """The runs of both, by run id, with the values of the first as `<value>_here`."""
    both = there.merge(here, left_index=True, right_index=True, suffixes=("", "_here"))
    if both.empty:
        raise UserError("benchmarks.machines: no run is finished in both folders")
    return both


def rows(both: pd.DataFrame) -> list[Row]:
    """By mix and value: there minus here of each seed, in points; in the note the spread of the seeds here."""
    made = []
    for (mix, rho), part in both.groupby(["mix", "rho"]):
        for value, name in VALUES.items():
            differences = 100 * (part[value] - part[f"{value}_here"])
            note = f"standard deviation between seeds here: {100 * part[f'{value}_here'].std():.1f}"
            what = f"{mix_name(mix)}{'' if mix == 'sgd' else f', ρ = {rho:g}'}: {name}"
            made.append(Row(what, differences.tolist(), "points", note=note))
    return made


def main(other: str, published: str = str(PROJECT / "runs/published")) -> int:
    try:
        both = pairs(load_runs(published), load_runs(other))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    ends = {"here": "_here", "there": ""}
    devices = {name: ", ".join(sorted(both[f"device_name{end}"].unique())) for name, end in ends.items()}
    notes = ["There minus here, for each seed, in points; the same configurations in fp32, last epoch."]
    measure.report("machines", "The same seeds on two machines", devices, rows(both), notes, keep=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
