import math

import numpy as np
import pandas as pd
import pytest

from samlib.analysis.ablation import (
    batch_difference,
    batch_learning,
    differences,
    document_cells,
    means,
    mix_order,
    pairs,
    pick,
    verdict,
    with_sharpness,
)
from samlib.config import RunConfig
from samlib.analysis.old_stats import Estimate, mean_interval


def frame(*rows: dict) -> pd.DataFrame:
    """Runs as load_runs gives them: every field, a status, a final accuracy (fraction) or NaN where diverged."""
    table = [
        {**RunConfig().model_dump(mode="json"), "run": f"run{i}", "test_accuracy": np.nan, **row}
        for i, row in enumerate(rows)
    ]
    table = pd.DataFrame(table).set_index("run")
    return table.assign(status=np.where(table.test_accuracy.isna(), "diverged", "done"))


def grid() -> pd.DataFrame:
    """SGD 0.60 and 0.70 by seed; at rho 0.1 and 0.4 SAM is 0.02 and 0.04 above it; checkpoint1 diverged once."""
    rows = [{"mix": "sgd", "rho": 0.1, "seed": s, "test_accuracy": 0.6 + 0.1 * s} for s in (0, 1)]
    for rho in (0.1, 0.4):
        for s in (0, 1):
            gain = 0.02 if rho == 0.1 else 0.04
            rows.append({"mix": "sam", "rho": rho, "seed": s, "test_accuracy": 0.6 + 0.1 * s + gain + 0.01 * s})
    rows += [{"mix": "checkpoint1", "rho": 0.4, "seed": 0, "test_accuracy": 0.62}]
    rows += [{"mix": "checkpoint1", "rho": 0.4, "seed": 1}]
    return frame(*rows)


def test_sgd_is_paired_by_seed_whatever_the_rho_it_was_configured_with():
    table = differences(grid(), baseline="sgd")
    for rho, gain in ((0.1, 0.02), (0.4, 0.04)):
        cell = pick(table, "sam", rho)
        assert cell[:3] == pytest.approx(mean_interval([gain, gain + 0.01])[:3]) and cell.n == 2
    assert set(table.mix) == {"sam", "checkpoint1"}


def test_sam_is_paired_at_the_same_rho_and_a_diverged_run_is_left_out():
    cell = pick(differences(grid(), baseline="sam"), "checkpoint1", 0.4)
    assert (cell.mean, cell.n, cell.left_out) == (pytest.approx(0.62 - 0.64), 1, 1)
    assert pick(differences(grid(), baseline="sam"), "checkpoint1", 0.1).n == 0


def test_runs_that_differ_in_another_field_are_no_pair():
    runs = grid()
    runs.loc[runs.mix == "sgd", "data_fraction"] = 0.5
    assert pairs(runs, baseline="sgd").difference.isna().all()
    assert differences(runs, baseline="sgd").n.eq(0).all()


def test_means_count_sgd_once_a_seed_and_diverged_runs_apart():
    runs = grid()
    again = runs[runs.mix == "sgd"].assign(rho=0.4)  # the same training under another run id
    table = means(pd.concat([runs, again.set_axis(["again0", "again1"])]))
    sgd = pick(table, "sgd", math.nan)
    assert (sgd.mean, sgd.n) == (pytest.approx(0.65), 2)
    assert (pick(table, "checkpoint1", 0.4).n, pick(table, "checkpoint1", 0.4).left_out) == (1, 1)


def test_no_runs_give_empty_tables():
    assert means(grid().iloc[:0]).empty and differences(grid().iloc[:0]).empty


def test_the_order_is_sgd_sam_subsets_by_size_then_rules():
    mixes = ["magnitude", "checkpoint12", "sam", "checkpoint4", "sgd", "checkpoint134", "checkpoint1"]
    ordered = ["sgd", "sam", "checkpoint1", "checkpoint4", "checkpoint12", "checkpoint134", "magnitude"]
    assert sorted(mixes, key=mix_order) == ordered


def test_a_verdict_follows_the_interval():
    above, across, one = Estimate(1, 0.5, 1.5, 3), Estimate(1, -1, 3, 3), Estimate(1, np.nan, np.nan, 1)
    assert [verdict(above), verdict(above, -1), verdict(across), verdict(one)] == [
        "holds",
        "contradicted",
        "undecided",
        "undecided",
    ]
    assert verdict(Estimate(np.nan, np.nan, np.nan, 0)) == "not measured"


def test_the_documents_open_cells_stay_open_and_its_double_cells_keep_both_values():
    rows = [(0.4, "sgd", 77.36), (0.4, "checkpoint3", 79.04), (0.4, "checkpoint3", 78.49), (0.4, "checkpoint4", None)]
    cells = document_cells(pd.DataFrame(rows, columns=["rho", "update", "test_accuracy_percent"])).set_index("mix")
    assert cells["values"]["checkpoint3"] == pytest.approx((0.7904, 0.7849))
    assert cells.to_sgd["checkpoint3"] == pytest.approx((0.7904 + 0.7849) / 2 - 0.7736)
    assert cells["values"]["checkpoint4"] == () and math.isnan(cells.to_sgd["checkpoint4"])


def test_sharpness_is_compared_only_where_it_was_measured_alike_and_at_the_end():
    runs = grid()
    rows = [
        (run, epoch, "ascent", "trained", rho, epoch * (1 + rho)) for run, rho in runs.rho.items() for epoch in (1, 2)
    ]
    sharp = with_sharpness(runs, pd.DataFrame(rows, columns=["run", "epoch", "measure", "labels", "setting", "value"]))
    assert len(sharp) == (runs.status == "done").sum() and sharp.sharpness.min() == pytest.approx(2.2)
    table = differences(sharp, "sharpness", "sgd")
    assert pick(table, "sam", 0.1).n == 2  # SGD's was measured at rho 0.1 ...
    assert pick(table, "sam", 0.4).n == 0  # ... and says nothing at 0.4
    assert with_sharpness(runs, pd.DataFrame(columns=["run"])).empty


def test_batch_sizes_are_paired_by_seed_though_probed_at_other_steps():
    rows = [
        {"batch_size": size, "probe_every": 1024 // size, "seed": s, "test_accuracy": 0.6 + 0.1 * s + gain}
        for size, gain in ((256, 0.03), (1024, 0.0))
        for s in (0, 1)
    ]
    cell = batch_difference(frame(*rows), "test_accuracy", (1024, 0.1), (256, 0.1))
    assert (cell.mean, cell.n) == (pytest.approx(-0.03), 2)


def test_learning_is_compared_over_the_epochs_and_the_updates_that_runs_share():
    runs = frame(*[{"batch_size": b, "test_accuracy": 0.6} for b in (256, 1024)], {"batch_size": 512})
    probes = pd.DataFrame(
        [("run0", 0, 10.0), ("run0", 4, 0.1), ("run1", 0, 1.0), ("run1", 1, 0.01), ("run2", 0, 5.0)],
        columns=["run", "step", "grad_norm"],
    )
    # The loss falls from 1e4 to 1: for run 0 in 40 updates, for run 1 in 10; for both in 4 epochs.
    metrics = pd.DataFrame(
        [(f"run{i}", e, e * (10, 2.5)[i], 10 ** (4.0 - e)) for i in (0, 1) for e in range(5)],
        columns=["run", "epoch", "step", "eval_train_loss"],
    )
    learned = batch_learning(runs, probes, metrics)
    assert learned.first_norm.tolist()[:2] == pytest.approx([1, 0]) and math.isnan(learned.first_norm["run2"])
    assert learned.mean_norm.tolist()[:2] == pytest.approx([0, -1])
    assert learned.log_loss_by_epoch.tolist()[:2] == pytest.approx([2, 2])
    assert learned.log_loss_by_step.tolist()[:2] == pytest.approx([3.5, 2])  # over updates 0 to 10
    linear = np.interp(np.linspace(0, 4, 101), range(5), [10 ** (4.0 - e) for e in range(5)]).mean()
    assert learned.loss_by_epoch.tolist()[:2] == pytest.approx([linear, linear])
