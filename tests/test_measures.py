"""What a run measures after an epoch and at single steps: on which images, when, and into which tables."""

import math

import pytest
import torch

from samlib import measures, probes
from samlib.config import RunConfig
from samlib.data import Batches, load_data
from samlib.measures import MEASURES, Moment, StepProbes, measured
from samlib.models import build_model
from samlib.runs import TABLES

FIELDS = {
    "dataset": "digits", "model": "resnet6", "stem": "cifar", "width": 2, "batch_size": 32, "data_fraction": 0.25,
    "noise_fraction": 0.3, "epochs": 4, "device": "cpu", "measure_samples": 20, "scan_rhos": (0.01, 0.1),
}  # fmt: skip


def moment(epoch=0, **fields) -> Moment:
    config = RunConfig(**FIELDS | fields)
    data = load_data(config, torch.device("cpu"))
    batches = Batches(data, config)
    model = build_model("resnet6", 2, "cifar", 1, 10, seed=0)
    momentum = [torch.full_like(p, 0.5) for p in model.parameters()]
    return Moment(config, model, data, batches, batches.epoch(epoch), momentum, lr=0.1)


def test_every_table_has_one_measure_and_a_field_that_says_how_often():
    tables = [measure.table for measure in MEASURES]
    by_step = {"metrics", "probes", "layers", "overlaps", "intersections"}
    assert len(tables) == len(set(tables)) and set(tables) | by_step == set(TABLES)
    assert all(RunConfig.model_fields[measure.every].default == 0 for measure in MEASURES)  # nothing unless asked


@pytest.mark.parametrize("every, due", [(0, []), (1, [1, 2, 3, 4]), (3, [3, 4]), (9, [4])])
def test_a_measure_is_made_after_every_so_many_epochs_and_after_the_last(every, due):
    at = moment(threshold_every=every)
    found = {epochs: list(measured(at, epochs)) for epochs in range(1, 5)}
    assert [epochs for epochs, tables in found.items() if tables] == due
    for epochs in due:
        ((table, (row,)),) = found[epochs]
        assert table == "thresholds" and row["epoch"] == epochs and list(row)[0] == "epoch"


def test_thresholds_scan_and_prediction_are_of_the_epochs_first_batch():
    at = moment(epoch=2, threshold_every=1, scan_every=1)
    x, y = at.batches.assemble(*at.batches.epoch(2)[0])
    assert torch.equal(at.batch[0], x) and torch.equal(at.batch[1], y)
    pair = probes.gradient_pair(at.model, x, y, at.config.rho)
    assert measures.thresholds(at) == [probes.threshold_row(pair)]
    assert measures.scan(at) == probes.scan_rows(at.model, x, y, at.config.scan_rhos)


def test_the_fixed_sample_is_the_same_for_every_run_of_one_subset_and_in_no_way_augmented():
    at, other = moment(seed=1, data_seed=5), moment(epoch=3, seed=2, data_seed=5)
    assert torch.equal(at.rows, other.rows) and len(set(at.rows.tolist())) == 20
    x, y = at.sample
    expected = (at.data.images[at.rows].float() - at.data.mean[:, None, None]) / at.data.std[:, None, None]
    torch.testing.assert_close(x, expected)
    assert torch.equal(y, at.data.labels[at.rows])


def test_the_noise_probe_is_told_of_each_image_whether_its_label_is_flipped(monkeypatch):
    at, seen = moment(epoch=1, noise_every=1), []
    monkeypatch.setattr(probes, "noise_rows", lambda model, batches, rho: seen.extend(batches) or [])
    measures.noise(at)
    assert len(seen) == 4
    for (x, y, flipped), (index, *rest) in zip(seen, at.plan, strict=False):
        assert torch.equal(x, at.batches.assemble(index, *rest)[0])
        assert torch.equal(y, at.data.labels[index])
        assert torch.equal(flipped, at.data.labels[index] != at.data.true_labels[index])
    assert 0 < sum(int(f.sum()) for *_, f in seen) < 128


@pytest.mark.parametrize(
    "batch_size, fraction, count", [(32, 0.25, 64), (128, 1.0, 64), (8, 1.0, None), (32, 0.03, None)]
)
def test_convergence_goes_over_the_whole_training_set_in_at_least_64_batches(monkeypatch, batch_size, fraction, count):
    at, seen = moment(batch_size=batch_size, data_fraction=fraction), {}

    def record(model, batches, pair, updates, weight_decay, steps):
        seen.update(batches=batches, updates=updates, steps=steps, decay=weight_decay)
        return []

    monkeypatch.setattr(probes, "convergence_rows", record)
    measures.convergence(at)
    sizes, n = [len(y) for _, y in seen["batches"]], len(at.data.images)
    assert sum(sizes) == n and max(sizes) - min(sizes) <= 1 and min(sizes) >= 2 and max(sizes) <= batch_size
    assert len(sizes) == (count or (math.ceil(n / 8) if batch_size == 8 else n // 2))
    images = torch.cat([x for x, _ in seen["batches"]]).flatten(1)
    assert sorted(map(tuple, images.tolist())) == sorted(
        map(tuple, at.data.normalized(at.data.images).flatten(1).tolist())
    )
    assert all(torch.equal(u, torch.full_like(u, 0.05)) for u in seen["updates"])  # lr x momentum
    assert (seen["steps"], seen["decay"]) == (at.batches.steps, 5e-4)


# Single steps


def step_probes(**fields):
    at = moment(probe_every=3, **fields)
    return at, StepProbes(at.config, at.model, at.batches)


def test_any_steps_batch_is_the_one_that_training_sees():
    at, of_steps = step_probes()
    for step in (0, at.batches.steps - 1, at.batches.steps, 2 * at.batches.steps + 1):
        x, y = at.batches.assemble(*at.batches.epoch(step // at.batches.steps)[step % at.batches.steps])
        assert all(torch.equal(a, b) for a, b in zip(of_steps.batch(step), (x, y), strict=True))


def test_a_step_is_probed_at_each_radius_and_layers_are_kept_once_an_epoch():
    at, of_steps = step_probes(rho=0.1, probe_rho=0.5)
    for step in range(2 * at.batches.steps):
        found = list(of_steps.tables(step, *of_steps.batch(step), 0.1))
        if step % 3:
            assert not found
            continue
        rows = [row for table, (row, *_) in found if table == "probes"]
        assert [row["rho"] for row in rows] == [0.1, 0.5]
        for row in rows:
            pair = probes.gradient_pair(at.model, *of_steps.batch(step), row["rho"])
            expected, layers = probes.probe_rows(pair, at.model)
            head = {"step": step, "epoch": step // at.batches.steps, "lr": 0.1, "rho": row["rho"]}
            assert row == head | expected
        kept = [rows for table, rows in found if table == "layers"]
        assert len(kept) == (step % at.batches.steps < 3)
        for rows in kept:
            assert [row["layer"] for row in rows] == [name for name, _ in at.model.named_parameters()]
            assert {row["epoch"] for row in rows} == {step // at.batches.steps}


def test_one_radius_twice_is_probed_once():
    _, of_steps = step_probes(rho=0.1, probe_rho=0.1)
    found = [table for table, _ in of_steps.tables(0, *of_steps.batch(0), 0.1)]
    assert found == ["probes", "layers"]


def test_persistence_on_the_same_batch_takes_the_reference_steps_images_at_the_present_weights():
    at, of_steps = step_probes(persistence_steps=(1,), persistence_lags=(4,), persistence_window=2)
    list(of_steps.tables(1, *of_steps.batch(1), 0.1))
    first = probes.gradient_pair(at.model, *of_steps.batch(1), at.config.rho).codes
    with torch.no_grad():
        for p in at.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    tables = dict(of_steps.tables(5, *of_steps.batch(5), 0.1))
    for row, step in zip(tables["overlaps"], (5, 1), strict=True):  # other, then same
        codes = probes.gradient_pair(at.model, *of_steps.batch(step), at.config.rho).codes
        assert row["batch"] == ("other" if step == 5 else "same")
        assert row["overlap"] == int(((codes == 1) & (first == 1)).sum()) and row["size"] == int((codes == 1).sum())
    assert not tables["intersections"]
