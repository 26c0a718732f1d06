import ast

import nbformat
import numpy as np
import pandas as pd
import pytest
from fake_runs import write_run, write_study
from matplotlib.collections import LineCollection
from scipy import stats

from samlib import PROJECT
from samlib.analysis import ablation, claims_ablation, figures_ablation
from samlib.analysis.claim import claims
from samlib.analysis.figures import faults
from samlib.analysis.results import SHARPNESS, NotMeasured, load
from samlib.study import Study

MIXES = ["sgd", "sam", "checkpoint1", "checkpoint2", "shuffled-checkpoint1", "magnitude", "direction", "scale2x0.5"]
GRIDS = {
    "ablation": {"mix": MIXES, "rho": 0.4, "seed": [0, 1, 2]},
    "rho": {"mix": ["sam", "scale2x0.5"], "rho": [0.1, 0.2, 0.4], "seed": [0, 1, 2]},
}
PANELS = (("test_accuracy", "memorized", "eval_train_accuracy"), SHARPNESS)
BASE = {"noise_fraction": 0.4, "probe_rho": 0.1, "sharpness_every": 1000}
GAIN = {"sam": 0.1, "checkpoint1": 0.095, "checkpoint2": 0.01, "magnitude": 0.098, "direction": 0.001}
SHARP = {"sgd": 1.0, "sam": 0.5, "checkpoint1": 0.55}


def number(config, gain=GAIN) -> float:
    """By hand: SGD 0.6 and less by seed; a mix's gain, more by seed, most at ρ = 0.2."""
    spread = 0.001 * config.seed * (config.mix != "sgd")
    return 0.6 - 0.02 * config.seed + gain.get(config.mix, 0.0) + spread - 0.1 * abs(config.rho - 0.2)


def sharpness(config, level: float) -> list[dict]:
    """The last epoch's rows; an ascent's value depends on its radius, and an earlier epoch says something else."""
    rows = []
    for epoch in (1, 2):
        head = {"epoch": epoch, "labels": "trained", "std": 0.0, "n": 1}
        for logits in ("raw", "normalized"):
            value = level + 0.001 * config.seed + 10 * (epoch == 1)
            rows.append(head | {"measure": "random", "logits": logits, "setting": 0.05, "value": value})
            for radius in config.radii:
                row = head | {"measure": "ascent", "logits": logits, "setting": radius}
                rows.append(row | {"value": value + 5 * (radius != 0.1)})
        rows.append(rows[0] | {"epoch": epoch, "labels": "true", "value": -1.0})
    return rows


def written(folder, grids=GRIDS, base=BASE, sharp=SHARP, only=lambda config: True, gain=GAIN):
    study = Study.load(write_study(folder / "s.yaml", grids, base))
    for config in filter(only, study.configs()):
        accuracy = number(config, gain)
        facts = {"test_accuracy": accuracy, "eval_train_accuracy": 0.9, "validation_accuracy": accuracy}
        facts |= {"flipped": 100 * (config.noise_fraction > 0), "memorized_chance": 0.1}
        facts |= {"memorized": 0.5 - accuracy / 2}
        tables = {"sharpness": sharpness(config, sharp.get(config.mix, 1.2))}
        write_run(folder / "runs", config, tables, **facts)
    return load(study, folder / "runs")


@pytest.fixture
def results(tmp_path):
    return written(tmp_path)


def test_a_difference_is_the_paired_t_test_over_the_seeds_at_one_rho(results):
    runs = results.runs("ablation").drop_duplicates(["mix", "seed"]).set_index(["mix", "seed"]).test_accuracy
    for baseline in ("sgd", "sam"):
        table = ablation.differences(results, "test_accuracy", "ablation", baseline)
        for (mix, rho), e in table.items():
            values = [runs[mix, seed] - runs[baseline, seed] for seed in (0, 1, 2)]
            low = stats.ttest_1samp(values, 0).confidence_interval(0.95).low
            assert (e.value, e.n, rho) == (pytest.approx(np.mean(values)), 3, 0.4)
            assert e.low == pytest.approx(min(low, np.mean(values) - 0.001))  # never narrower than one image
        assert set(table.index.get_level_values("mix")) == set(MIXES) - {"sgd", baseline}
    rows = ablation.table(results, "ablation").index.get_level_values("mix")
    assert list(rows)[:4] == ["sgd", "sam", "scale2x0.5", "checkpoint1"]


def test_a_rho_is_shown_by_held_out_images_alone_and_sgd_is_the_partner_of_all(results):
    assert ablation.shown_rho(results, "ablation") == 0.4
    assert ablation.shown_rho(results, "rho") == 0.2
    table = ablation.rho_choice(results, ["ablation", "rho"])
    assert table.chosen.tolist() == ["0.2", "0.2"] and list(table.index) == ["sam", "scale2x0.5"]
    assert set(ablation.differences(results, "test_accuracy").xs("sam", level="mix").index) == {0.1, 0.2, 0.4}
    with pytest.raises(NotMeasured, match="at one ρ"):
        ablation.rho_choice(results, "ablation")


def test_sharpness_is_the_last_epochs_on_the_trained_labels_at_the_common_radius(results):
    for name in SHARPNESS:
        level = results.means(name, grid="ablation")
        assert level["sam", 0.4].value == pytest.approx(0.501) and str(level["sam", 0.4]).split()[3] == "nats"
        assert ablation.differences(results, name, grid="ablation")["sam", 0.4].value == pytest.approx(-0.5)
    assert ablation.table(results, "ablation", SHARPNESS).iloc[0]["ascent"].value == pytest.approx(1.001)


def test_an_ascent_is_compared_at_equal_radii_alone(tmp_path):
    base = {"noise_fraction": 0.4, "sharpness_every": 1000, "rho": 0.4}  # SGD's radius; none in common
    results = written(tmp_path, {"rho": [{"mix": "sgd", "seed": [0, 1, 2]}, GRIDS["rho"]]}, base)
    found = ablation.differences(results, "ascent")
    assert set(found.index.get_level_values("rho")) == {0.4} and found["sam", 0.4].value == pytest.approx(-0.5)


def test_an_update_that_has_one_rho_is_shown_at_its_own(tmp_path):
    own = {"mix": "scale2x0.5", "rho": 0.1, "seed": [0, 1, 2]}
    results = written(tmp_path, {"ablation": [{"mix": ["sgd", "sam"], "rho": 0.4, "seed": [0, 1, 2]}, own]})
    figure = figures_ablation.dots(results, ["test_accuracy"], "ablation")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["SGD", "SAM", "SANER, ρ = 0.1"]
    assert "ρ = 0.4 for SAM and 0.1 for SANER" in " ".join(figure.get_supxlabel().split())


def test_over_rho_of_sam_alone_there_is_nothing_below(tmp_path):
    arms = [{"mix": "sgd", "seed": [0, 1, 2]}, {"mix": "sam", "rho": [0.1, 0.2], "seed": [0, 1, 2]}]
    figure = figures_ablation.over_rho(written(tmp_path, {"rho": arms}), "rho", ["test_accuracy", "memorized"])
    assert [bool(axes.lines) for axes in figure.axes] == [True, True] and not faults(figure)


def found(results, name: str) -> list:
    return next(claim for claim in claims("06_checkpoint_ablation") if claim.name == name).findings(results)


def verdicts(results, name: str) -> dict[str, str]:
    return {finding.comparison.split(":")[0]: finding.verdict for finding in found(results, name)}


@pytest.mark.parametrize(("level", "verdict"), [(0.55, "holds"), (0.65, "contradicted")])
def test_flatness_is_maintained_within_a_fifth_of_what_sam_takes_off(tmp_path, level, verdict):
    judged = verdicts(written(tmp_path, sharp=SHARP | {"checkpoint1": level}), "checkpoint1_keeps_flatness")
    assert judged.pop("checkpoint 1 − SAM, test accuracy") == "holds"
    assert set(judged.values()) == {verdict} and len(judged) == 4


def test_where_sam_is_no_flatter_nothing_is_maintained(tmp_path):
    results = written(tmp_path, sharp=SHARP | {"sam": 1.0})
    judged = verdicts(results, "checkpoint1_keeps_flatness")
    assert [v for k, v in judged.items() if "margin" in k] == ["undecided"] * 4
    assert {f.note for f in found(results, "checkpoint1_keeps_flatness")} == {"", "SAM is not flatter than SGD here"}


def test_experiment_1_is_judged_by_its_rules(results):
    assert set(verdicts(results, "others_end_sharper").values()) == {"holds"}
    judged = verdicts(results, "learning_rate_not_direction")
    assert judged == dict.fromkeys(
        ["SAM's sizes, SGD's signs − SAM, test accuracy", "SGD's sizes, SAM's signs − SGD, test accuracy"], "holds"
    )
    assert verdicts(results, "which_parameters_not_how_many") == {
        "checkpoint 1 − checkpoint 1, shuffled, test accuracy": "holds"
    }
    assert set(verdicts(results, "subsets_with_checkpoint1_beat_sam").values()) == {"not measured"}


def test_the_documents_numbers_are_those_of_its_table():
    cells = ablation.document()
    assert cells.loc["checkpoint3", 0.4] == pytest.approx((0.7904 + 0.7849) / 2) and np.isnan(cells.loc["sam", 0.8])
    singles = cells.loc[[f"checkpoint{k}" for k in (1, 2, 3, 4)]]
    assert (singles.idxmax() == "checkpoint1").all()
    subsets = cells.loc[list(claims_ablation.SUBSETS)] - cells.loc["sam"]
    for name, gain in (
        ("checkpoint1_contributes_most", cells.loc[["checkpoint1"]] - cells.loc["sgd"]),
        ("checkpoint1_keeps_flatness", cells.loc[["checkpoint1"]] - cells.loc["sam"]),
        ("subsets_with_checkpoint1_beat_sam", subsets),
    ):
        claim = next(c for c in claims("06_checkpoint_ablation") if c.name == name)
        low, high = (f"{100 * np.round(x, 4):+.1f}".replace("-", "−") for x in (np.nanmin(gain), np.nanmax(gain)))
        assert f"{low} to {high} points" in claim.documented


def test_ours_stand_beside_the_documents_and_its_column_14_beside_what_it_ran(results):
    table = ablation.beside_document(results, "ablation")
    assert table["as coded"][table["as coded"] != ""].to_dict() == {"checkpoint14": "checkpoint 2+3"}
    assert str(table.loc["checkpoint1", "document, ρ = 0.1"]) == "+1.7 points (n=1)"
    assert table.loc["checkpoint1", "here, ρ = 0.4"].value == pytest.approx(0.096)
    assert table.loc["checkpoint12", "here, ρ = 0.4"] == ""


def test_figures_are_readable_and_show_what_there_is(results):
    for values in PANELS:
        figure = figures_ablation.dots(results, values, "ablation", minus_sgd=True)
        assert faults(figure) == []
        names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert names[:3] == ["SAM", "SANER", "checkpoint 1"]
        assert "by chance alone" in figure._supxlabel.get_text()
    assert faults(figures_ablation.over_rho(results, ["ablation", "rho"])) == []


def test_each_seeds_own_value_stands_below_the_mean_of_its_update(results):
    axes, *_ = figures_ablation.dots(results, PANELS[0], "ablation", minus_sgd=True).axes
    pairs = results.pairs("checkpoint1", "sgd", "test_accuracy", "ablation")
    row = [label.get_text() for label in axes.get_yticklabels()].index("checkpoint 1")
    seeds, mean = ([line for line in axes.lines if set(line.get_ydata()) == {y}] for y in (row + 0.32, row))
    assert sorted(seeds[0].get_xdata()) == pytest.approx(sorted(100 * pairs.difference)) and len(pairs) == 3
    assert mean[0].get_xdata() == pytest.approx([100 * pairs.difference.mean()])


def test_an_interval_shows_at_a_point_whose_neighbours_have_one_run(tmp_path):
    rhos = {"rho": [{"mix": "sam", "rho": [0.1, 0.2, 0.4], "seed": [0, 1, 2]}]}
    results = written(tmp_path, rhos, only=lambda c: c.seed == 0 or c.rho == 0.2)
    axes = figures_ablation.over_rho(results, "rho", ["test_accuracy"]).axes[0]
    [bars] = [lines for lines in axes.collections if isinstance(lines, LineCollection)]
    e = results.means("test_accuracy", grid="rho")["sam", 0.2]
    drawn = [part for part in bars.get_segments() if len(part)]
    assert len(drawn) == 1 and drawn[0][:, 1] == pytest.approx([100 * e.low, 100 * e.high])


def test_an_update_far_from_all_others_is_a_number_at_the_edge(tmp_path):
    results = written(tmp_path, only=lambda c: c.mix != "checkpoint2")
    axes = figures_ablation.dots(results, PANELS[0], "ablation", True).axes[0]
    assert not axes.texts
    (tmp_path / "far").mkdir()
    one = {"only": lambda c: c.mix != "checkpoint2" or c.seed == 0}  # of fewer than a tenth of the runs
    far = written(tmp_path / "far", gain=GAIN | {"checkpoint2": -0.55}, **one)
    axes = figures_ablation.dots(far, PANELS[0], "ablation", True).axes[0]
    row = [label.get_text() for label in axes.get_yticklabels()].index("checkpoint 2 (n=1)")
    assert [(text.get_text(), text.get_position()[1]) for text in axes.texts] == [(" ← −55", row)]
    assert axes.get_xlim()[0] > -30


def test_an_update_with_fewer_runs_says_so(tmp_path):
    results = written(tmp_path, only=lambda c: c.seed < 2 or c.mix != "checkpoint2")
    labels = figures_ablation.dots(results, PANELS[0], "ablation", True).axes[0].get_yticklabels()
    assert [t.get_text() for t in labels if "n=" in t.get_text()] == ["checkpoint 2 (n=2)"]


def test_of_a_run_the_clean_labels_that_it_fits_are_what_its_accuracy_leaves_beside_the_flips(results):
    left, right = figures_ablation.labels_fitted(results, ["ablation", "rho"]).axes
    [sgd] = [line for line in right.lines if line.get_label() == "SGD"]
    run = results.runs("ablation").query("mix == 'sgd' and seed == 1").iloc[0]
    flipped, memorized = run.flipped / run.train_images, run.memorized
    at = np.isclose(sgd.get_xdata(), 100 * memorized)  # accuracy: flips as far as memorized, clean labels otherwise
    fits = sgd.get_ydata()[at].item() / 100
    assert flipped * memorized + (1 - flipped) * fits == pytest.approx(run.eval_train_accuracy)
    assert "SGD of fewer epochs" not in {line.get_label() for line in left.lines}  # there is none
    points = sum(len(line.get_xdata()) for line in left.lines)
    assert points == len(results.runs(["ablation", "rho"]).drop_duplicates(["mix", "rho", "seed"]))


def of_lengths(folder, found: dict[str, list[tuple[float, float, float]]]):
    """Runs of two seeds with memorized, fits and test accuracy, of each number of epochs in turn from 10 down."""
    grids = {
        "ablation": [
            {"mix": mix, "epochs": [10 - k for k in range(len(ends))], "rho": 0.4, "seed": [0, 1]}
            for mix, ends in found.items()
        ]
    }
    study = Study.load(write_study(folder / "s.yaml", grids, BASE))
    for config in study.configs():
        memorized, fits, test = found[config.mix][10 - config.epochs]
        memorized, fits, test = memorized * (1 - config.seed / 2), fits - 0.1 * config.seed, test - 0.01 * config.seed
        facts = {"flipped": 200, "train_images": 500, "memorized": memorized, "test_accuracy": test}
        facts |= {"eval_train_accuracy": 0.4 * memorized + 0.6 * fits}
        write_run(folder / "runs", config, **facts)
    return load(study, folder / "runs")


LENGTHS = [(1.0, 1.0, 0.2), (0.6, 0.9, 0.4), (0.2, 0.5, 0.3)]  # of SGD, the longest first


def test_an_update_is_compared_with_sgd_that_memorizes_as_much(tmp_path):
    alone = {"checkpoint1": [(0.6, 0.9, 0.4)], "checkpoint2": [(0.1, 0.9, 0.9)]}
    ends = {"sgd": LENGTHS, "sam": [(0.3, 0.8, 0.5)]} | alone
    results = of_lengths(tmp_path, ends)
    between = {"fits_at_equal": 0.5 + 0.4 / 4, "test_at_equal": 0.3 + 0.1 / 4}  # SGD at 0.3, by hand
    for (value, sgd), own in zip(between.items(), (0.8, 0.5), strict=True):
        found = ablation.differences(results, value, "ablation")
        assert (found["sam", 0.4].value, found["sam", 0.4].n) == (pytest.approx(own - sgd), 2)
        assert found["sam", 0.4].unit == "points"
        assert found["checkpoint1", 0.4].value == pytest.approx(0, abs=1e-9)  # it is SGD of fewer epochs
        assert found["checkpoint2", 0.4].n == 0  # no SGD memorizes as little
        rows = ablation.at_equal(results).query("mix == 'sgd' and epochs == 10")
        assert rows[value].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert [mix for mix, _ in ablation.at_equal_table(results).index] == ["sam", "checkpoint1"]
    labels = figures_ablation.dots(results, list(ablation.TITLES), "ablation", True).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["SAM", "checkpoint 1"]


def test_sgd_of_two_lengths_that_memorizes_as_much_is_its_mean_there(tmp_path):
    lengths = [(0.8, 1.0, 0.2), (0.8, 0.9, 0.4), (0.2, 0.5, 0.3)]
    results = of_lengths(tmp_path, {"sgd": lengths, "sam": [(0.8, 1.0, 0.5)], "checkpoint1": [(0.5, 1.0, 0.5)]})
    rows = ablation.at_equal(results).query("seed == 0 and epochs == 10").set_index("mix").test_at_equal
    assert (rows["sam"], rows["checkpoint1"]) == (pytest.approx(0.5 - 0.3), pytest.approx(0.5 - 0.35))


def test_where_short_trainings_memorize_less_with_more_epochs_the_longest_two_are_compared_with(tmp_path):
    lengths = [
        (0.9, 1.0, 0.2),
        (0.1, 0.8, 0.6),
        (0.15, 0.5, 0.3),
    ]  # of the shortest two none is the less, then the more
    results = of_lengths(tmp_path, {"sgd": lengths, "sam": [(0.12, 1.0, 0.7)], "checkpoint1": [(0.05, 1.0, 0.5)]})
    rows = ablation.at_equal(results).query("seed == 0 and epochs == 10").set_index("mix").test_at_equal
    assert rows["sam"] == pytest.approx(0.7 - (0.6 - 0.4 * 0.02 / 0.8)) and np.isnan(rows["checkpoint1"])
    assert rows["sgd"] == 0


def test_a_line_of_sgds_lengths_joins_runs_of_one_setting(tmp_path):
    grids = {"ablation": [{"noise_fraction": noise, "mix": "sgd", "epochs": [10, 5]} for noise in (0.2, 0.4)]}
    study = Study.load(write_study(tmp_path / "s.yaml", grids, BASE))
    for config in study.configs():
        numbers = {"memorized": config.noise_fraction * config.epochs / 10, "test_accuracy": 0.5}
        write_run(tmp_path / "runs", config, **numbers, flipped=100, eval_train_accuracy=0.9)
    left, _ = figures_ablation.labels_fitted(load(study, tmp_path / "runs"), "ablation").axes
    lines = [line.get_xdata().tolist() for line in left.lines if line.get_label() == "SGD of fewer epochs"]
    assert sorted(lines) == [pytest.approx([10, 20]), pytest.approx([20, 40])]


def test_sgd_of_more_epochs_is_no_partner_at_equal_memorization(tmp_path):
    ends = {"sgd": LENGTHS, "sam": [(0.5, 0.9, 0.5)] * 2}  # of 10 epochs, and of 9
    rows = ablation.at_equal(of_lengths(tmp_path, ends)).query("mix == 'sam' and seed == 0").set_index("epochs")
    assert rows.test_at_equal[10] == rows.test_at_equal[9] == pytest.approx(0.5 - 0.375)
    (tmp_path / "late").mkdir()
    late = ablation.at_equal(of_lengths(tmp_path / "late", {"sgd": LENGTHS, "sam": [(0.9, 1.0, 0.5)] * 2}))
    late = late.query("mix == 'sam' and seed == 0").set_index("epochs").test_at_equal
    assert late[10] == pytest.approx(0.5 - 0.25) and np.isnan(late[9])


def test_an_update_of_fewer_epochs_is_none_of_those_compared_at_equal_memorization(tmp_path):
    results = of_lengths(tmp_path, {"sgd": LENGTHS, "sam": [(0.3, 0.8, 0.5), (0.3, 0.8, 0.9)]})
    pairs = ablation.pairs_at_equal(results, "sam", "sgd", "test_at_equal")
    assert pairs.epochs.tolist() == [10, 10]
    assert ablation.differences(results, "test_at_equal")["sam", 0.4].value == pytest.approx(0.5 - 0.325)
    (tmp_path / "other").mkdir()
    ends = [("sgd", 0.4, 10), ("sgd", 0.4, 5), ("sam", 0.4, 10), ("sam", 0.8, 5)]  # 0.8 has five epochs only
    arms = [{"mix": mix, "rho": rho, "epochs": epochs} for mix, rho, epochs in ends]
    study = Study.load(write_study(tmp_path / "other/s.yaml", {"ablation": {"seed": [0, 1], "arm": arms}}, BASE))
    for config in study.configs():
        facts = {"flipped": 200, "train_images": 500, "memorized": config.epochs / 10, "test_accuracy": 0.5}
        write_run(tmp_path / "other/runs", config, **facts)
    pairs = ablation.pairs_at_equal(load(study, tmp_path / "other/runs"), "sam", "sgd", "test_at_equal")
    assert set(pairs.rho) == {0.4}


def test_without_shorter_runs_there_is_nothing_to_compare_with_at_equal_memorization(results, tmp_path):
    with pytest.raises(NotMeasured):
        ablation.differences(results, "fits_at_equal", "ablation")
    (tmp_path / "clean").mkdir()
    with pytest.raises(NotMeasured):
        ablation.fitted(written(tmp_path / "clean", base=BASE | {"noise_fraction": 0.0}))


def test_without_partners_there_is_a_sentence_and_no_figure(tmp_path):
    results = written(tmp_path, only=lambda c: c.mix == "sgd")
    for values in PANELS:
        with pytest.raises(NotMeasured):
            figures_ablation.dots(results, values, "ablation", minus_sgd=True)
    with pytest.raises(NotMeasured):
        figures_ablation.over_rho(results, ["ablation", "rho"])


@pytest.mark.parametrize("name", ["06_checkpoint_ablation", "08_label_noise"])
@pytest.mark.parametrize("only", ["sgd", ""])
def test_the_notebook_reads_a_study_that_lacks_most_arms(tmp_path, monkeypatch, name, only):
    written(tmp_path, only=lambda c: only in ("", c.mix))
    notebook = nbformat.read(PROJECT / f"notebooks/{name}.ipynb", 4)
    given = {"study": str(tmp_path / "s.yaml"), "root": str(tmp_path / "runs"), "figures": str(tmp_path / "figures")}
    given |= {"probes": "ablation", "shorter": "ablation"} if name.startswith("08") else {}
    namespace: dict = {"In": [""], "display": lambda *shown: shown}
    monkeypatch.chdir(tmp_path)
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        namespace["In"].append(cell.source)
        lines = ast.parse(cell.source).body
        shown = ast.unparse(lines.pop()) if isinstance(lines[-1], ast.Expr) else None
        exec(compile(ast.Module(lines, []), name, "exec"), namespace)
        if "parameters" in cell.metadata.tags:
            namespace |= given
        assert shown is None or eval(shown, namespace) is not None
    drawn = {path.stem for path in (tmp_path / "figures").rglob("*.png")}
    of = {"06": {"06_accuracy", "06_sharpness", "06_over_rho"}, "08": {"08_memorized", "08_over_rho", "08_labels"}}
    assert drawn == of[name[:2]] & (of[name[:2]] if not only else {"08_memorized", "08_labels"})


def test_a_sharpness_that_no_run_has_is_not_measured(tmp_path):
    study = Study.load(write_study(tmp_path / "s.yaml", {"a": {"mix": ["sgd", "sam"], "seed": [0, 1, 2]}}))
    for config in study.configs():
        write_run(tmp_path / "runs", config, test_accuracy=0.5)
    results = load(study, tmp_path / "runs")
    assert verdicts(results, "others_end_sharper") == {"": "not measured"}
    assert isinstance(ablation.table(results), pd.DataFrame)
