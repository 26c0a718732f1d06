"""The benchmarks' own measures: what is left out of a share must be able to show, and what differs between machines."""

import time

import pandas as pd
import pytest

from benchmarks import cpu, machines
from samlib.config import RunConfig, UserError
from samlib.data import Batches


def test_the_share_outside_the_step_is_what_an_epoch_takes_beside_it(tmp_path, monkeypatch):
    config = RunConfig(
        dataset="digits", model="resnet6", stem="cifar", width=8, augment=False, data_fraction=0.3, epochs=2,
        eval_every=1, threads=1, device="cpu",
    )  # fmt: skip
    plain = cpu.outside(config, tmp_path / "plain")
    assert len(plain) == 3 and all(0 < share < 60 for share in plain[::2])  # two epochs, an evaluation between them
    assemble = Batches.assemble
    monkeypatch.setattr(Batches, "assemble", lambda *a: (time.sleep(0.05), assemble(*a))[1])
    slow = cpu.outside(config, tmp_path / "slow")
    assert all(share > 60 for share in slow[::2]) and slow[0] == pytest.approx(slow[2], abs=25)


def test_the_same_runs_on_two_machines_are_compared_seed_by_seed():
    about = {"mix": "sam", "rho": 0.1, "epochs": 5, "data_fraction": 1.0, "noise_fraction": 0.4}
    runs = pd.DataFrame(about | {"test_accuracy": [0.5, 0.7], "memorized": [1.0, None]}, index=["a", "b"])
    there = pd.DataFrame(about | {"test_accuracy": [0.6, 0.45], "memorized": 0.5}, index=["b", "a"])
    runs, there = (frame.assign(seed=range(2)) for frame in (runs, there.sort_index()))
    both = machines.pairs(runs, pd.concat([there, there.rename(index=lambda name: f"only-{name}")]))
    accuracy, memorized = machines.rows(both)
    assert sorted(accuracy.values) == pytest.approx([-10, -5]) and memorized.values == [-50]
    assert "ρ = 0.1, 5 epochs: SAM, test accuracy" in accuracy.what and accuracy.note.endswith("14.1 and 10.6")
    assert len(machines.rows(both.assign(epochs=[5, 6]))) == 3  # another number of epochs is another setting
    with pytest.raises(UserError, match="no run is finished in both"):
        machines.pairs(runs, runs.rename(index=str.upper))
