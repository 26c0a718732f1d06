"""What the machine changes: the same runs, trained on another. `python -m benchmarks.machines FOLDER [PUBLISHED]`

A seed fixes subset, flipped labels, initial weights and batches everywhere, but not the last bits of a sum, from which
two trainings soon part. How far they end apart is told beside how far the seeds are apart on each machine.
"""

import sys

import pandas as pd

from benchmarks import measure
from benchmarks.measure import Row
from samlib import PROJECT
from samlib.analysis.results import REGIME, SEEDS, configurations, mix_name, setting_name
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
    """By setting and value: there minus here of each seed, in points; in the note how far the seeds are apart."""
    made = []
    for _, part in both.groupby(configurations(both, {*SEEDS}), sort=False):
        of = part.iloc[0]
        where = setting_name(*of[[*REGIME]], None if of.mix == "sgd" else of.rho)
        for value, name in VALUES.items():
            ends = 100 * part[[f"{value}_here", value]].astype(float).dropna()
            note = f"standard deviation between seeds, here and there: {' and '.join(f'{s:.1f}' for s in ends.std())}"
            if len(ends):
                differences = (ends[value] - ends[f"{value}_here"]).tolist()
                what = f"{where}, {of.epochs} epochs: {mix_name(of.mix)}, {name}"
                made.append(Row(what, differences, "points", note=note))
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
    print(measure.report("machines", "The same seeds on two machines", devices, rows(both), notes))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]) if sys.argv[1:] else __doc__)
