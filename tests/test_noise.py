import numpy as np
import pytest
from fake_runs import write_run, write_study

from samlib.analysis import figures_ablation, figures_noise, noise
from samlib.analysis.claim import ledger
from samlib.analysis.figures import faults
from samlib.analysis.results import NotMeasured, load
from samlib.probes import NOISE_SUMS
from samlib.study import Study

SANER = "scale2x0.5"
GRIDS = {
    "ablation": {"mix": ["sgd", "sam", SANER, f"shuffled-{SANER}"], "rho": 0.4, "seed": [0, 1, 2]},
    "rho": {"mix": ["sam", SANER], "rho": [0.1, 0.2, 0.4], "seed": [0, 1, 2]},
}
BASE = {"noise_fraction": 0.4, "noise_every": 1}


def made_up(seed: int, epoch: int) -> list[dict]:
    """Positive sums at random, by checkpoint (0: inactive) and kind of layer."""
    draw = np.random.default_rng([seed, epoch])
    head = {"epoch": epoch, "batches": 4, "images": 200, "flipped": 70 + seed}
    rows = []
    for kind in ("convolution", "batchnorm"):
        for checkpoint in range(5):
            sums = dict(zip(NOISE_SUMS, draw.uniform(1, 9, len(NOISE_SUMS)), strict=True))
            rows.append(head | {"kind": kind, "checkpoint": checkpoint} | sums)
    return rows


def by_layer_alone(seed: int, epoch: int, more: float = 0.0) -> list[dict]:
    """Flips set the direction of 80 % of the convolutions' and 20 % of the other parameters, whatever the checkpoint,
    which is mostly 2 in convolutions; `more` of checkpoint 2's."""
    rows = made_up(seed, epoch)
    for row in rows:
        share = 0.8 if row["kind"] == "convolution" else 0.2
        row["parameters"] = 900.0 if (row["checkpoint"] == 2) == (row["kind"] == "convolution") else 100.0
        row["sets_direction"] = (share + more * (row["checkpoint"] == 2)) * row["parameters"]
        row["g_l1"] = 2 * row["parameters"]
        row["g_flipped"] = share * row["g_l1"]
    return rows


def written(folder, rows=made_up, memorized=lambda config: 0.5, accuracy=lambda config: 0.8, grids=GRIDS):
    folder.mkdir(exist_ok=True)
    study = Study.load(write_study(folder / "s.yaml", grids, BASE))
    for config in study.configs():
        facts = {"test_accuracy": accuracy(config), "memorized": memorized(config), "memorized_chance": 0.05}
        facts |= {
            "flipped": 400,
            "validation_accuracy": 0.8 - abs(config.rho - (0.4 if config.mix == "sam" else 0.2)) + (config.epochs == 5),
        }
        write_run(folder / "runs", config, {"noise": [r for e in (1, 2) for r in rows(config.seed, e)]}, **facts)
    return load(study, folder / "runs")


def test_shares_and_their_chance_levels_are_those_of_a_loop(tmp_path):
    found = noise.probe(written(tmp_path), "ablation").set_index(["mix", "seed", "epoch", "checkpoint"])
    assert len(found) == 2 * 3 * 2 * 5  # SAM and SGD
    for seed, epoch, code in ((0, 1, 2), (2, 2, 1), (1, 2, 0)):
        row, rows = found.loc[("sam", seed, epoch, code)], [r for r in made_up(seed, epoch) if r["checkpoint"]]
        mine = [r for r in rows if code in (0, r["checkpoint"])]
        assert row.images == (70 + seed) / 200
        assert row.share == pytest.approx(sum(r["parameters"] for r in mine) / sum(r["parameters"] for r in rows))
        for name, (above, below) in noise.RATIOS.items():
            ratio = sum(r[above] for r in mine) / sum(r[below] for r in mine)
            expected = {above: 0.0, below: 0.0}
            for r in mine:
                kind = [other for other in rows if other["kind"] == r["kind"]]
                part = r["parameters"] / sum(other["parameters"] for other in kind)
                for key in expected:
                    expected[key] += part * sum(other[key] for other in kind)
            assert (row[name], row[f"{name}_chance"]) == pytest.approx((ratio, expected[above] / expected[below]))
            if code == 0:
                assert row[name] == pytest.approx(row[f"{name}_chance"])


def test_flips_that_follow_the_layers_alone_are_not_beyond_chance(tmp_path):
    results = written(tmp_path, by_layer_alone)
    row = noise.probe(results).query("checkpoint == 2").iloc[0]
    assert row.sets == pytest.approx(0.74) and row.sets_chance == pytest.approx(row.sets)  # 90 % of it convolutions
    for name in ("sets", "of_g"):
        assert noise.beyond_chance(results, name, 2, "sam")[1.0, 0.4, 0.4].value == pytest.approx(0, abs=1e-12)
    table = noise.by_checkpoint(results, "ablation", ["kind"])
    assert table.loc[("sam", 0.4, "batchnorm", "all"), "flips set the direction"].value == pytest.approx(0.2)


def test_n_counts_runs_and_not_probes(tmp_path):
    table = noise.by_checkpoint(written(tmp_path), "rho")
    assert {e.n for column in table for e in table[column]} == {3}
    each = noise.probe(written(tmp_path / "again"), "rho").query("checkpoint == 3 and rho == 0.1 and mix == 'sam'")
    assert table.loc[("sam", 0.1, 3), "flips' share of |g|"].value == pytest.approx(each.of_g.mean())
    thirds = noise.by_checkpoint(written(tmp_path / "thirds"), "rho", ["third"])
    assert set(thirds.index.get_level_values("third")) == {2, 3}  # epochs 1 and 2 of 2
    late = noise.probe(written(tmp_path / "late"), "rho").query("epoch == 2 and checkpoint == 3 and mix == 'sam'")
    assert thirds.loc[("sam", 0.1, 3, 3), "by chance"].value == pytest.approx(late.sets_chance.mean())


@pytest.mark.parametrize(("more", "verdict"), [(0.1, "holds"), (-0.1, "contradicted")])
def test_checkpoint_2_carries_the_flips_where_it_has_more_than_as_many_at_random(tmp_path, more, verdict):
    results = written(tmp_path, lambda s, e: by_layer_alone(s, e, more + 0.01 * s))
    rows = ledger(results, "08_label_noise").loc["checkpoint2_carries_the_flips"]
    sets = rows[rows.comparison.str.contains("set the direction")]
    assert set(sets.verdict) == {verdict} and len(sets) == 8  # SAM at three ρ, and SGD; all of it and the last third
    alone = ledger(results, "08_label_noise").loc["checkpoint2_alone_carries_the_flips"]
    assert set(alone.verdict) == {verdict} and len(alone) == 16  # 2 above chance and the others below, or the reverse


def test_saner_is_compared_at_one_rho_and_each_at_its_own(tmp_path):
    def memorized(config):
        return {"sam": 0.3, SANER: 0.1 + 0.3 * (config.rho == 0.4)}.get(config.mix, 0.15) + 0.001 * config.seed

    results = written(tmp_path, memorized=memorized)
    pairs = noise.at_own_rho(results, SANER, "sam", "memorized")
    assert pairs.rho.unique().tolist() == [0.2] and pairs.difference.tolist() == pytest.approx([-0.2] * 3)
    shorter = GRIDS | {"shorter": {"mix": "sam", "rho": [0.1, 0.2], "epochs": 5, "seed": [0, 1, 2]}}
    also = written(tmp_path / "also", accuracy=lambda config: config.rho, grids=shorter)
    pairs = noise.at_own_rho(also, SANER, "sam", "test_accuracy")
    assert pairs.difference.tolist() == pytest.approx([0.2 - 0.4] * 3)  # SAM's own ρ is that of as many epochs
    rows = ledger(results, "08_label_noise").loc["saner_memorizes_less"].set_index("comparison")
    assert rows.verdict[rows.index.str.startswith("SANER, at its own")].tolist() == ["holds"]
    assert rows.verdict[rows.index.str.contains("ρ = 0.4")].iloc[0] == "contradicted"
    rows = ledger(results, "08_label_noise").loc["saner_needs_checkpoint2"].set_index("comparison")
    assert rows.verdict.tolist() == ["contradicted", "undecided"]  # 0.4 against 0.15, and no difference at all


def test_figures_are_readable_and_name_saner(tmp_path):
    results = written(tmp_path)
    figure = figures_noise.probes(results, "ablation")
    assert faults(figure) == [] and figure.axes[3].get_title(loc="left").startswith("SAM: flips' share")
    figure = figures_ablation.dots(results, ("test_accuracy", "memorized"), "ablation")
    assert faults(figure) == []
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["SGD", "SAM", "SANER", "SANER, shuffled"]
    assert faults(figures_ablation.over_rho(results, ["ablation", "rho"], ("test_accuracy", "memorized"))) == []


def test_labels_without_flips_memorize_nothing(tmp_path):
    study = Study.load(write_study(tmp_path / "s.yaml", {"a": {"mix": ["sgd", "sam"], "seed": [0, 1, 2]}}))
    for config in study.configs():
        write_run(tmp_path / "runs", config, test_accuracy=0.5)
    results = load(study, tmp_path / "runs")
    with pytest.raises(NotMeasured):
        figures_noise.probes(results, "a")
    assert len(figures_ablation.dots(results, ("test_accuracy", "memorized"), "a").axes) == 1
    assert set(ledger(results, "08_label_noise").verdict) == {"not measured"}
