import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from samlib.analysis import claims, geometry
from samlib.config import RunConfig, UserError
from samlib.probes import BINS, CHECKPOINTS


def overlap_row(reference: np.ndarray, later: np.ndarray, active: int) -> dict:
    both = {"reference_size": reference.sum(), "size": later.sum(), "overlap": (reference & later).sum()}
    return {"reference_step": 0, "step": 1, **both, "active": active, "parameters": len(reference)}


def test_two_independent_sets_have_lift_1_and_a_set_with_itself_one_over_its_share():
    generator = np.random.default_rng(0)
    active = np.arange(100_000) < 40_000
    a, b = (active & (generator.random(100_000) < 0.7) for _ in range(2))
    table = geometry.persistence(pd.DataFrame([overlap_row(a, b, 40_000), overlap_row(a, a, 40_000)]))
    assert table["lift"][0] == pytest.approx(1, abs=0.02)  # counted over all parameters it would be 2.5
    assert table["lift"][1] == pytest.approx(40_000 / a.sum())
    assert table.share[1] == 1
    assert table.expected_share[0] == pytest.approx(b.sum() / 40_000)
    assert table.share_of_all[0] == pytest.approx((a & b).sum() / 100_000)


def test_independent_sets_of_one_share_leave_p_to_the_k():
    rows = [
        {"reference_step": 5, "step": 5 + k, "steps": k + 1, "size": 600, "intersection": 0, "active": 1000}
        for k in range(4)
    ]
    table = geometry.running_intersection(pd.DataFrame(rows))
    assert table.expected_share.tolist() == pytest.approx([0.6**k for k in range(4)])


def test_layers_that_differ_in_their_shares_make_a_lift_by_themselves():
    # Shares 0.9 and 0.1 in two equal layers: (0.81 + 0.01) / 2 against 0.5^2, a lift of 1.64.
    rows = [
        {"step": step, "epoch": step, "layer": layer, "kind": "convolution", "parameters": 1200, "inactive": 200}
        | {"checkpoint1": size, "checkpoint2": 1000 - size, "checkpoint3": 0, "checkpoint4": 0}
        for step in (0, 10)
        for layer, size in (("a", 900), ("b", 100))
    ]
    table = geometry.lift_of_layers(pd.DataFrame(rows), [0])
    assert table["lift"].tolist() == pytest.approx([1.64])
    kinds = geometry.by_kind(pd.DataFrame(rows))
    assert kinds.checkpoint1.tolist() == pytest.approx([0.5, 0.5])
    assert kinds.inactive.tolist() == pytest.approx([1 / 6, 1 / 6])


def test_the_threshold_keeps_a_random_set_at_chance():
    generator, k = np.random.default_rng(1), 6_000
    sizes, members = generator.random(20_000), generator.permutation(20_000) < k
    above = (sizes[members] >= np.sort(sizes)[-k]).sum()
    row = {"epoch": 1, "threshold": 0.7, "checkpoint1": k, "above": above, "active": 20_000, "parameters": 40_000}
    table = geometry.thresholds_with_chance(pd.DataFrame([row]))
    assert table["lift"][0] == pytest.approx(1, abs=0.05)
    assert (table.chance[0], table.chance_of_all[0]) == (0.3, 0.15)


def scan(member: np.ndarray, rhos: list[float]) -> pd.DataFrame:
    """The table `scan` of one layer from who is in checkpoint 1: bool (rhos, parameters)."""
    still = np.logical_and.accumulate(member)
    return pd.DataFrame(
        {"epoch": 1, "rho": rhos, "layer": "a", "kind": "linear", "parameters": member.shape[1], "inactive": 0}
        | {"checkpoint1": member.sum(1), "still": still.sum(1)}
    )


def test_parameters_with_thresholds_of_their_own_only_leave_and_leave_at_them():
    rhos = [0.1 * k for k in range(1, 11)]
    thresholds = np.array([0.25] * 50 + [0.55] * 40 + [9.0] * 10)
    table = geometry.leaving(scan(np.array([rho < thresholds for rho in rhos]), rhos)).query("kind == 'all'")
    assert table.newcomers.dropna().eq(0).all()
    assert table.left.iloc[2] == pytest.approx(0.5) and table.left.iloc[5] == pytest.approx(0.4)
    quantiles = geometry.leaving_quantiles(table).iloc[0]
    assert quantiles[0.1] == quantiles[0.5] == rhos[2] and quantiles[0.9] == rhos[5]
    assert [claim.verdict for claim in claims.scan_claims(table, 0.4)] == ["holds", "holds"]


def test_parameters_that_come_back_are_counted_as_newcomers():
    member = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=bool)
    table = geometry.leaving(scan(member, [0.1, 0.2, 0.4])).query("kind == 'linear'")
    assert table.newcomers.tolist() == [0, 0, 0.5]
    assert table.survival.tolist() == [1, 0.5, 0.5]
    assert np.isnan(geometry.leaving_quantiles(table).iloc[0][0.9])  # beyond the grid
    assert claims.scan_claims(geometry.leaving(scan(member, [0.1, 0.2, 0.4])), 0.4)[1].verdict == "does not hold"


@pytest.mark.parametrize("related", [0.0, 0.7])
def test_common_zeros_are_taken_out_of_a_rank_correlation(related):
    generator = np.random.default_rng(2)
    a = generator.random(20_000) + 0.01
    b = related * a + (1 - related) * generator.random(20_000) + 0.01
    a[:11_000] = b[:11_000] = 0
    r = stats.spearmanr(a, b).statistic
    within = stats.spearmanr(a[11_000:], b[11_000:]).statistic
    assert r > 0.85
    assert geometry.rank_correlation_of_active(r, 0.55) == pytest.approx(within, abs=1e-3)


def test_the_one_dimensional_codes_follow_the_definition_and_the_slope_is_the_derivative():
    table, rho, h = geometry.one_dimensional(np.linspace(-6, 6, 1201), 0.6), 0.6, 1e-6
    near = geometry.one_dimensional(table.w.to_numpy() + h, rho)
    assert np.abs((near.loss - table.loss) / h - table.g).max() < 1e-4
    for row in table.itertuples():
        slope = 0.2 * (x := row.w + (rho if row.g > 0 else -rho)) + 2 * np.sin(2 * x)
        if row.g == 0:
            assert row.code == 0
            continue
        assert row.g_sam == pytest.approx(slope)
        expected = 1 + (abs(row.g_sam) < abs(row.g)) + 2 * ((row.g_sam > 0) != (row.g > 0))
        assert row.code == expected
    assert set(table.code) == {0, 1, 2, 3, 4}


def test_the_share_at_rest_is_weighted_by_parameters_and_leaves_the_inactive_out():
    table = pd.DataFrame(
        {"epoch": 1, "lr": 0.1, "checkpoint": [0, 1, 2], "parameters": [500, 300, 100]}
        | {"moving": [1.0, 0.8, 0.0], "significant": [1.0, 0.05, 0.05]}
    )
    row = geometry.at_rest(table).iloc[0]
    assert (row.active, row.moving, row.not_at_zero) == (400, pytest.approx(0.6), pytest.approx(0))
    assert [c.verdict[:8] for c in claims.convergence_claims(geometry.at_rest(table))] == [
        "holds",
        "not show",
        "cannot b",
    ]


def test_the_correlation_within_rho_is_not_the_one_across():
    # Across rho accuracy falls with the share, within each rho it rises.
    table = pd.DataFrame(
        [(rho, s, rho + 0.01 * s, -rho + 0.01 * s) for rho in (0.1, 0.2, 0.3) for s in (0, 1, 2)],
        columns=["rho", "seed", "share", "test_accuracy"],
    )
    found = geometry.correlations(table, "share").set_index(["runs", "method"])
    assert found.r["within ρ", "Pearson"] == pytest.approx(1)
    assert found.r["across ρ", "Pearson"] == pytest.approx(-1) and found.n["across ρ", "Pearson"] == 3
    assert found.r["all runs", "Pearson"] < 0


def test_the_nearest_rho_the_reach_and_the_documents_row_are_found():
    prediction = pd.DataFrame({"epoch": 1, "rho": [0.1, 0.2, 0.4, 0.8], "right": [0.99, 0.95, 0.8, 0.95]})
    assert geometry.reach(prediction)[1] == 0.2  # not 0.8: right all the way up to it
    assert geometry.at_rho(prediction, 0.35).rho.tolist() == [0.4]
    reference = pd.DataFrame({"epoch": [5, 100, 200], "threshold": 1.0, "percent_of_checkpoint1_above": [63, 75, 59]})
    ours = pd.DataFrame({"epoch": [10, 20], "threshold": 2.0})
    assert geometry.beside_document(ours, reference).their_percent.tolist() == [75, 59]


def probes(shares: dict[str, np.ndarray], inactive: float = 0.0) -> pd.DataFrame:
    table = pd.DataFrame(shares) * (1 - inactive)
    bins = {name: table.checkpoint1 / 7 for name in BINS}
    return table.assign(inactive=inactive, step=range(len(table)), **bins)


def test_the_documents_own_numbers_hold_and_too_few_probes_cannot_be_judged():
    shares = dict(zip(CHECKPOINTS[1:], ([0.65, 0.65], [0.4, 0.2], [0.03, 0.1], [0.03, 0.06]), strict=True))
    document = probes({name: np.linspace(*ends, 100) for name, ends in shares.items()})
    verdicts = [claim.verdict for claim in claims.fraction_claims(document, "all parameters")]
    assert verdicts == ["holds"] * 5
    assert {c.verdict for c in claims.fraction_claims(document.iloc[::10], "all parameters")} == {"cannot be judged"}
    backwards = document.iloc[::-1]
    assert claims.fraction_claims(backwards, "all parameters")[1].verdict == "does not hold"


def test_shares_of_the_active_parameters_do_not_depend_on_how_many_are_inactive():
    shares = {name: np.full(3, 0.25) for name in CHECKPOINTS[1:]}
    active = geometry.of_active(probes(shares, inactive=0.6))
    assert active.checkpoint1.tolist() == pytest.approx([0.25] * 3)
    assert active[list(BINS)].sum(axis=1).tolist() == pytest.approx([0.25] * 3)


@pytest.fixture
def study(tmp_path):
    """A study of one run with probes and without curvature, finished under tmp_path/runs."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "title: Small\ndataset: digits\nbase: {dataset: digits, mix: sam, epochs: 1}\n"
        "grids:\n  geometry: {probe_every: 4, seed: [1, 2]}\n  deep: {curvature_every: 1}\n"
    )
    config = RunConfig.parse({"dataset": "digits", "mix": "sam", "epochs": 1, "probe_every": 4, "seed": 1})
    folder = tmp_path / "runs" / config.run_id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    (folder / "summary.json").write_text(json.dumps({"status": "done", "test_accuracy": 0.9}))
    (folder / "probes.csv").write_text("step,checkpoint1\n0,0.5\n4,0.7\n")
    return path, tmp_path / "runs"


def test_a_run_or_a_table_that_is_missing_is_named_with_the_study_that_makes_it(study):
    path, root = study
    _, runs, tables = geometry.load(path, root, "geometry", ("probes",))
    assert len(runs) == 1 and len(tables["probes"]) == 2
    by_run = geometry.checkpoint1_by_run(runs, tables["probes"])
    assert (by_run["last"].iloc[0], by_run.last_quarter.iloc[0], by_run.probes.iloc[0]) == (0.7, 0.7, 1)
    with pytest.raises(UserError, match="lacks the run .* `python -m samlib run .*small.yaml` makes it"):
        geometry.load(path, root, "geometry", ("probes",), 1)
    with pytest.raises(UserError, match="no table 'hessian'.*curvature_every.*'deep' of .*small.yaml makes one"):
        geometry.load(path, root, "geometry", ("hessian",), 0)
    with pytest.raises(UserError, match="no table 'scan'.*scan_every.*'geometry' of studies/quick.yaml makes one"):
        geometry.load(path, root, "geometry", ("scan",), 0)
    with pytest.raises(UserError, match="run: found 2; .* has the runs 0 to 1"):
        geometry.load(path, root, "geometry", ("probes",), 2)
    with pytest.raises(UserError, match="there is no grid 'other'"):
        geometry.load(path, root, "other", ("probes",))


def test_a_reference_step_that_was_never_probed_is_named():
    table = pd.DataFrame({"reference_step": [172, 20, 172]})
    assert geometry.reference_steps(table, None, "a run") == [20, 172]
    assert geometry.reference_steps(table, 172, "a run") == [172]
    with pytest.raises(UserError, match=r"step 99 was no reference of a run, its references are \[20, 172\]"):
        geometry.reference_steps(table, 99, "a run")
