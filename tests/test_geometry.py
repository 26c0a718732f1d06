import numpy as np
import pandas as pd
import pytest
from fake_runs import write_run, write_study
from scipy import stats

from samlib.analysis import claims_geometry, figures, figures_geometry, geometry
from samlib.analysis.claim import claims, ledger
from samlib.analysis.results import NotMeasured, load
from samlib.analysis.stats import correlation_over_seeds
from samlib.probes import BINS, CHECKPOINTS
from samlib.study import Study

DRAWN = (
    "shares", "kinds", "lifts", "running", "ratios", "thresholds", "predictions", "sweep", "leaving",
)  # fmt: skip
LAYERS = {"conv": ("convolution", 600), "fc": ("linear", 200)}
RADII = (0.01, 0.1, 0.3, 1.0)
STEPS = range(0, 40, 2)


def probe(random, step: int, radius: float) -> dict:
    counts = random.multinomial(800, [0.1, 0.5, 0.25, 0.1, 0.05]) / 800
    bins = counts[1] * random.dirichlet(np.ones(7))
    sizes = {"grad_norm": 1 + random.random(), "grad_norm_sam": 2.0, "cosine": 0.9}
    return (
        {"step": step, "epoch": step // 4, "rho": radius}
        | sizes
        | dict(zip((*CHECKPOINTS, *BINS), (*counts, *bins), strict=True))
    )


def sets(random, same: bool) -> np.ndarray:
    """Which of 800 parameters are in checkpoint 1 at each of 20 steps: independent within layers, or the same."""
    shares = np.repeat([0.8, 0.3], [600, 200])
    return np.repeat(random.random((1, 800)) < shares, 20, 0) if same else random.random((20, 800)) < shares


def persistence(random, same: bool) -> dict[str, list[dict]]:
    """Rows of both tables, by slow loops over the layers; all parameters are active."""
    members, rows = sets(random, same), {"overlaps": [], "intersections": []}
    for batch in ("same", "other"):
        running, share = np.ones(800, bool), [1.0, 1.0]
        for lag in range(20):
            chance = 0.0
            for k, part in enumerate((slice(0, 600), slice(600, 800))):
                here, there, room = members[0, part].sum(), members[lag, part].sum(), len(members[0, part])
                chance += here * there / room
                share[k] *= there / room
            running &= members[lag]
            head = {"reference_step": 0, "step": lag, "batch": batch}
            sizes = {"reference_size": members[0].sum(), "overlap": (members[0] & members[lag]).sum(), "chance": chance}
            if lag:
                rows["overlaps"].append(head | {"lag": lag} | sizes)
            left = {"steps": lag + 1, "intersection": running.sum(), "chance": 600 * share[0] + 200 * share[1]}
            rows["intersections"].append(head | left)
    return rows


def tables(config, same: bool = False) -> dict[str, list[dict]]:
    random = np.random.default_rng(config.seed + (7 if config.mix == "sgd" else 0))
    found = {"probes": [probe(random, step, radius) for step in STEPS for radius in {config.rho, 0.1}]}
    found |= persistence(random, same)
    found["layers"] = [
        {"step": 4 * e, "epoch": e, "layer": name, "kind": kind, "parameters": n}
        | dict(zip(CHECKPOINTS, random.multinomial(n, [0.1, 0.5, 0.2, 0.1, 0.1]), strict=True))
        for e in range(5) for name, (kind, n) in LAYERS.items()
    ]  # fmt: skip
    found["convergence"] = [
        {"epoch": e, "checkpoint": c, "parameters": 100 * (c + 1), "significant": 0.1 * c, "chance": 0.05,
         "moving": 0.2 * c, "gradient": 1e-3, "detectable": 2e-3, "lr": 0.1}
        for e in (1, 2) for c in range(5)
    ]  # fmt: skip
    found["thresholds"] = [
        {"epoch": e, "threshold": 1e-4 * e, "checkpoint1": 400, "above": 300 - e, "chance": 200.0, "active": 700,
         "parameters": 800}
        for e in range(1, 6)
    ]  # fmt: skip
    quantiles = dict(zip(("q05", "q25", "median", "q75", "q95"), (0.1, 0.2, 0.3, 0.5, 1), strict=True))
    found["diagonal"] = [
        {"epoch": 2, "checkpoint": c, "parameters": 10 * (c + 1), "mean": 0.1 + c, "spearman": 0.5} | quantiles
        for c in range(5)
    ]  # fmt: skip
    found["prediction"] = [
        {"epoch": 2, "rho": r, "activation": a, "right": 1 - r, "constant": 0.5, "parameters": 800}
        for r in (0.01, 0.1, 0.3) for a in ("relu", "softplus")
    ]  # fmt: skip
    found["scan"] = scan(random.integers(1, 5, (4, 800)))
    return found


def staying(config) -> dict[str, list[dict]]:
    return tables(config, same=True)


def scan(codes: np.ndarray) -> list[dict]:
    """codes: of 800 parameters at each of RADII (4, 800)."""
    rows, still = [], np.ones(800, bool)
    for radius, code in zip(RADII, codes, strict=True):
        still &= code == 1
        for name, part in (("conv", slice(0, 600)), ("fc", slice(600, 800))):
            counts = dict(zip(CHECKPOINTS, np.bincount(code[part], minlength=5), strict=True))
            head = {"epoch": 2, "rho": radius, "layer": name, "kind": LAYERS[name][0], "parameters": len(code[part])}
            rows.append(head | counts | {"still": still[part].sum()})
    return rows


def made(folder, grid: dict, only: tuple = (), rows=tables, **summary):
    """Results of a study of three seeds; only: these tables; summary: a function of the configuration each."""
    folder.mkdir(exist_ok=True)
    study = Study.load(write_study(folder / "s.yaml", {"main": {"seed": [0, 1, 2]} | grid}))
    for config in study.configs():
        held = {name: table for name, table in rows(config).items() if not only or name in only}
        numbers = {"test_accuracy": 0.8, "validation_accuracy": 0.7}
        write_run(folder / "runs", config, held, **numbers | {name: value(config) for name, value in summary.items()})
    return load(study, folder / "runs")


def found(results, name: str) -> list:
    return next(claim for claim in claims(subject="geometry") if claim.name == name).findings(results)


BOTH = {"mix": ["sam", "sgd"], "rho": 0.3}
SWEEP = {"mix": "sam", "rho": [0.1, 0.2, 0.3, 0.4]}


def test_a_settings_estimate_is_the_t_interval_over_its_runs_not_over_their_rows(tmp_path):
    frame = geometry.shares(made(tmp_path, BOTH, ("probes",)))
    found = geometry.by_setting(frame, "checkpoint2")
    assert list(found.index) == ["SGD, ρ = 0.3", "SAM, ρ = 0.3"]
    values = []
    for run in sorted(set(frame.run[frame.mix == "sam"])):
        rows = pd.read_csv(tmp_path / "runs" / run / "probes.csv").query("rho == 0.3")
        values.append(np.mean([row.checkpoint2 / (1 - row.inactive) for row in rows.itertuples()]))
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    e = found["SAM, ρ = 0.3"]
    assert (e.value, e.low, e.high, e.n) == pytest.approx((np.mean(values), reference.low, reference.high, 3))


def test_shares_of_active_parameters_and_of_checkpoint_1_sum_to_one(tmp_path):
    frame = geometry.shares(made(tmp_path, BOTH, ("probes",)))
    assert frame[list(geometry.DOCUMENT)].sum(axis=1).to_numpy() == pytest.approx(1)
    assert frame[list(BINS)].sum(axis=1).to_numpy() == pytest.approx(1)
    assert frame.of_all.to_numpy() == pytest.approx((frame.checkpoint1 * (1 - frame.inactive)).to_numpy())


def test_ends_are_the_tenths_of_the_steps_however_densely_they_are_probed(tmp_path):
    steps = [0, 1, 2, 3, 4, 10, 50, 89, 95, 100]
    dense = lambda config: {"probes": [probe(np.random.default_rng(s), s, config.rho) for s in steps]}  # noqa: E731
    frame = geometry.shares(made(tmp_path, {"mix": "sam", "rho": 0.3, "seed": 1}, rows=dense))
    assert frame.part.tolist() == ["first tenth"] * 6 + [""] * 2 + ["last tenth"] * 2
    first, last = frame.checkpoint1[:6].mean(), frame.checkpoint1[8:].mean()
    assert claims_geometry.rise("checkpoint1")(frame) == pytest.approx(last - first)


def test_independent_sets_have_lift_one_and_equal_sets_the_inverse_of_their_share(tmp_path):
    apart = geometry.lifts(made(tmp_path / "a", BOTH, ("overlaps",)))
    assert apart["lift"].mean() == pytest.approx(1, abs=0.01) and apart["lift"].std() > 0
    equal = geometry.lifts(made(tmp_path / "b", BOTH, ("overlaps",), rows=staying))
    assert equal["lift"].mean() == pytest.approx(540 / (0.8 * 480 + 0.3 * 60), abs=0.05) and (equal.share == 1).all()
    assert apart.about[apart.lag == 7].iloc[0] == 5 and apart.about[apart.lag == 8].iloc[0] == 10


@pytest.mark.parametrize(("rows", "verdict"), [(tables, "contradicted"), (staying, "holds")])
def test_the_claim_that_parameters_stay_needs_more_than_chance(tmp_path, rows, verdict):
    results = made(tmp_path, BOTH, ("overlaps", "intersections"), rows=rows)
    assert [f.verdict for f in found(results, "overlap_is_more_than_chance")] == [verdict]
    (few,) = found(results, "few_stay_for_five_steps")
    assert few.verdict == "contradicted" and "by chance" in few.note  # 0.8^5 is more than a tenth


def test_a_running_intersection_of_independent_sets_is_at_its_chance(tmp_path):
    frame = geometry.running(made(tmp_path, BOTH, ("intersections",)))
    first = frame[frame.later == 0]
    assert (first.share == 1).all()
    late = frame[frame.later == 3]
    assert late.share.mean() == pytest.approx(late.by_chance.mean(), rel=0.15)


def test_resting_weighs_the_checkpoints_by_their_parameters_and_takes_chance_off(tmp_path):
    frame = geometry.resting(made(tmp_path, BOTH, ("convergence",)))
    counts = {c: 100 * (c + 1) for c in range(1, 5)}
    significant = sum(n * 0.1 * c for c, n in counts.items()) / sum(counts.values())
    row = frame.iloc[0]
    assert row.significant == pytest.approx(significant)
    assert row.beyond == pytest.approx((significant - 0.05) / 0.95)
    assert row.moving == pytest.approx(2 * significant)


def test_a_threshold_stands_beside_the_documents_at_the_same_share_of_training(tmp_path):
    frame, theirs = geometry.thresholds(made(tmp_path, BOTH, ("thresholds",))), pd.read_csv(geometry.REFERENCE)
    for row in frame.itertuples():
        best = min(theirs.itertuples(), key=lambda other: abs(other.epoch / 200 - row.epoch / 5))
        assert (row.their_share, row.their_threshold) == (best.percent_of_checkpoint1_above / 100, best.threshold)
    assert frame["lift"].iloc[0] == pytest.approx(299 / 200) and frame.by_chance.iloc[0] == 0.5


def test_checkpoint_1_is_compared_with_the_mean_entry_of_the_others(tmp_path):
    frame = geometry.diagonals(made(tmp_path, BOTH, ("diagonal",)))
    entries = [0.1 + c for c in (2, 3, 4) for _ in range(10 * (c + 1))]
    assert frame.sharper.iloc[0] == pytest.approx(1.1 / np.mean(entries))
    assert frame.checkpoint.min() == 1


def test_the_prediction_is_read_at_the_radius_nearest_to_the_runs(tmp_path):
    frame = geometry.nearest(geometry.predictions(made(tmp_path, BOTH, ("prediction",))))
    assert set(frame.radius) == {0.3}
    assert frame.gain.to_numpy() == pytest.approx((0.7 - 0.5) / 0.5)


def test_newcomers_and_survivors_are_those_counted_one_by_one(tmp_path):
    codes = np.random.default_rng(3).integers(0, 5, (4, 800))
    frame = geometry.leaving(
        made(tmp_path, {"mix": "sam", "rho": 0.3, "seed": 1}, rows=lambda c: {"scan": scan(codes)})
    )
    for k, row in enumerate(frame.itertuples()):
        members = [i for i in range(800) if codes[k, i] == 1]
        loyal = [i for i in members if all(codes[j, i] == 1 for j in range(k))]
        assert row.share == pytest.approx(len(members) / sum(codes[k] != 0))
        assert row.newcomers == pytest.approx(1 - len(loyal) / len(members))
        assert row.survival == pytest.approx(len(loyal) / sum(codes[0] == 1))


def test_a_sweep_reads_checkpoint_1_at_the_runs_own_and_at_one_common_radius(tmp_path):
    frame = geometry.sweep(made(tmp_path, SWEEP, ("probes",), validation_accuracy=lambda c: 1 - abs(c.rho - 0.3)))
    assert len(frame) == 12 and set(frame.radius) == {0.1} and set(frame.rho[frame.chosen == "chosen"]) == {0.3}
    row = frame[frame.rho == 0.4].iloc[0]
    rows = pd.read_csv(tmp_path / "runs" / row.run / "probes.csv").query("step >= 0.75 * 38")
    for column, radius in (("own", 0.4), ("common", 0.1)):
        part = rows[rows.rho == radius]
        assert row[column] == pytest.approx(np.mean(part.checkpoint1 / (1 - part.inactive)))


def falling(config) -> dict[str, list[dict]]:
    """Checkpoint 1 falls with ρ, at any radius."""
    random = np.random.default_rng(config.seed)
    share = {"inactive": 0.0, "checkpoint1": 0.9 - config.rho}
    return {"probes": [probe(random, s, r) | share for s in STEPS for r in {config.rho, 0.1}]}


def test_a_correlation_holds_where_it_does_without_any_one_rho(tmp_path):
    results = made(
        tmp_path, SWEEP, rows=falling, test_accuracy=lambda c: 0.9 - c.rho + 0.01 * np.sin(9 * c.seed + 31 * c.rho)
    )
    assert [f.verdict for f in found(results, "checkpoint1_falls_with_rho")] == ["holds"]
    assert [f.verdict for f in found(results, "checkpoint1_goes_with_accuracy")] == ["holds"]


def test_a_correlation_that_one_failed_rho_carries_is_undecided(tmp_path):
    failed = lambda c: 0.1 if c.rho == 0.4 else 0.8 + 0.02 * np.sin(50 * c.rho * (1 + c.seed))  # noqa: E731
    results = made(tmp_path, SWEEP, rows=falling, test_accuracy=failed)
    whole = correlation_over_seeds(geometry.sweep(results), "own", "test_accuracy", over=None)
    (finding,) = found(results, "checkpoint1_goes_with_accuracy")
    assert whole.low > 0 > finding.measured.low
    assert [f.verdict for f in found(results, "checkpoint1_goes_with_accuracy")] == ["undecided"]


def test_three_rho_are_too_few_to_leave_one_out(tmp_path):
    results = made(tmp_path, SWEEP | {"rho": [0.1, 0.2, 0.3]}, rows=falling, test_accuracy=lambda c: 0.9 - c.rho)
    assert [f.verdict for f in found(results, "checkpoint1_falls_with_rho")] == ["undecided"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(
        tmp_path_factory.mktemp("whole"), {"mix": ["sam", "sgd"], "rho": [0.1, 0.3], "noise_fraction": [0.0, 0.4]}
    )


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_readable_and_described(whole, name):
    figure = getattr(figures_geometry, name)(whole)
    assert figures.faults(figure) == [] and len(figure.get_label()) > 40
    figures.plt.close(figure)


def test_the_checkpoints_of_one_weight_need_no_run():
    figure = figures_geometry.one_dimension()
    assert figures.faults(figure) == [] and len(figure.axes[0].lines) == 4
    figures.plt.close(figure)


def test_every_table_has_readable_columns(whole):
    for name in geometry.TABLES:
        found = geometry.table(whole, name)
        assert len(found) and not found.isna().all(axis=None)


def test_what_no_run_measured_is_said_and_is_no_error(tmp_path):
    results = made(tmp_path, {"mix": "sgd"}, ("metrics",))
    for name in DRAWN:
        with pytest.raises(NotMeasured, match="table"):
            getattr(figures_geometry, name)(results)
    for notebook in ("02_geometry", "03_flatness_thresholds", "04_rho_vs_checkpoint1"):
        assert set(ledger(results, notebook).verdict) == {"not measured"}


def test_runs_of_one_seed_that_differ_in_more_are_not_averaged(tmp_path):
    results = made(tmp_path, {"mix": "sam", "rho": 0.3, "batch_size": [64, 128]}, ("probes",))
    with pytest.raises(NotMeasured, match="read one grid"):
        geometry.shares(results)


def test_no_claim_of_one_run_has_a_verdict(tmp_path):
    study = Study.load(write_study(tmp_path / "s.yaml", {"main": {"mix": "sam", "rho": 0.3, "seed": 0}}))
    write_run(tmp_path / "runs", study.configs()[0], tables(study.configs()[0]))
    results = load(study, tmp_path / "runs")
    for notebook in ("02_geometry", "03_flatness_thresholds", "04_rho_vs_checkpoint1"):
        assert set(ledger(results, notebook).verdict) <= {"undecided", "not measured"}


def test_the_documents_claims_are_all_there():
    quotes = " ".join(c.quote for c in claims(subject="geometry"))
    for words in ("over 60 %", "40 %", "10 %", "ridge", "number of checkpoint1 parameters does not decrease", "10^6",
                  "5 steps", "200 epochs", "learning rate decay", "sharp region", "higher flatness", "threshold",
                  "ratio < 1.2", "ratio increase fast", "generalization", "attractor", "IRE", "H(w)"):  # fmt: skip
        assert words in quotes, words
