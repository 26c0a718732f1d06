import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
from contextlib import ExitStack

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import samlib.train
from samlib import PROJECT
from samlib.config import RunConfig, UserError
from samlib.data import load_data
from samlib.models import build_model
from samlib.runs import TABLES, Run, load_runs
from samlib.step import EagerStep
from samlib.train import Training, train

SMALL = RunConfig(
    dataset="digits", model="resnet6", stem="cifar", width=4, batch_size=16, epochs=2, data_fraction=0.1,
    noise_fraction=0.2, eval_every=1, device="cpu", keep_weights=True, seed=1,
)  # fmt: skip
PROBED = {"probe_every": 2, "persistence_steps": (0, 5), "persistence_lags": (1,), "persistence_window": 3}
MEASURED = PROBED | {
    "threshold_every": 1, "sharpness_every": 1, "curvature_every": 2, "scan_every": 2, "scan_rhos": (0.01, 0.1),
    "noise_every": 1, "convergence_every": 2, "probe_rho": 0.2, "persistence_lags": (1, 3), "measure_samples": 32,
}  # fmt: skip
MIXES = ("sgd", "sam", "checkpoint13", "shuffled-checkpoint13")


def config(**fields) -> RunConfig:
    return RunConfig(**(SMALL.model_dump() | fields))


def trained(runs, **fields) -> Run:
    return train(config(**fields), runs, progress=False)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return torch.load(run.folder / "weights.pt", map_location="cpu", weights_only=True)


def tables(run: Run) -> dict[str, str]:
    """The text of every table but for the seconds, which differ from run to run."""
    found = {}
    for name in TABLES:
        path = run.folder / f"{name}.csv"
        if path.exists():
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
            found[name] = frame.drop(columns="seconds", errors="ignore").to_csv()
    return found


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].numpy().tobytes() == b[name].numpy().tobytes(), name


def assert_same_run(a: Run, b: Run) -> None:
    assert_same_bits(weights(a), weights(b))
    assert tables(a) == tables(b)
    assert {**a.summary, "seconds": 0} == {**b.summary, "seconds": 0}


# What the numbers are


def test_sgd_and_sam_of_one_seed_see_the_same_data_initial_weights_and_batches(tmp_path, monkeypatch):
    seen, step = [], EagerStep.__call__

    def record(self, x, y):
        if not seen[-1]:
            seen[-1] += [p.detach().clone() for p in self.model.parameters()]
        seen[-1] += [x.clone(), y.clone()]
        return step(self, x, y)

    monkeypatch.setattr(EagerStep, "__call__", record)
    for mix in MIXES:
        seen.append([])
        trained(tmp_path, mix=mix)
    for other in seen[1:]:
        assert len(seen[0]) == len(other) and all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_the_final_numbers_are_those_of_the_weights(tmp_path):
    run = trained(tmp_path, mix="sam", epochs=4)
    data = load_data(run.config)
    model = build_model("resnet6", 4, "cifar", 1, 10, 0)
    model.load_state_dict(weights(run))
    model.eval()

    def predict(images):
        with torch.no_grad():
            return model((images.float() - data.mean[:, None, None]) / data.std[:, None, None])

    test, fit = predict(data.test_images), predict(data.images)
    last = run.table("metrics").iloc[-1]
    assert last.test_accuracy == (test.argmax(1) == data.test_labels).double().mean().item()
    assert last.test_loss == pytest.approx(cross_entropy(test, data.test_labels).item(), rel=1e-5)
    assert last.eval_train_accuracy == (fit.argmax(1) == data.labels).double().mean().item()
    assert last.eval_train_loss == pytest.approx(cross_entropy(fit, data.labels).item(), rel=1e-5)
    wrong = data.flipped.nonzero().flatten().tolist()
    assert len(wrong) == run.summary["flipped"] == math.floor(0.2 * len(data.images))
    assert last.memorized == sum(int(fit[i].argmax() == data.labels[i]) for i in wrong) / len(wrong)
    assert last.corrected == sum(int(fit[i].argmax() == data.true_labels[i]) for i in wrong) / len(wrong)
    assert last.memorized_chance == pytest.approx((1 - last.corrected) / 9)
    metrics, summary = run.table("metrics"), run.summary
    for name in ("train_accuracy", "test_accuracy", "test_loss", "memorized", "corrected", "eval_train_accuracy"):
        assert summary[name] == last[name]
    assert summary["memorized_chance"] == last.memorized_chance
    assert metrics.lr.tolist() == [run.config.learning_rate(e) for e in range(4)]


def test_validation_images_are_kept_out_of_training_and_judged_by_the_weights(tmp_path, monkeypatch):
    seen, step = 0, EagerStep.__call__

    def record(self, x, y):
        nonlocal seen
        seen += len(y)
        return step(self, x, y)

    monkeypatch.setattr(EagerStep, "__call__", record)
    run = trained(tmp_path, mix="sam", data_fraction=0.3, validation_fraction=0.25, epochs=3)
    data, summary = load_data(run.config), run.summary
    assert seen == 3 * summary["train_images"] == 3 * len(data.images)
    assert summary["validation_images"] == len(data.validation_images) > 50
    model = build_model("resnet6", 4, "cifar", 1, 10, 0)
    model.load_state_dict(weights(run))
    model.eval()
    with torch.no_grad():
        logits = model((data.validation_images.float() - data.mean[:, None, None]) / data.std[:, None, None])
    assert summary["validation_accuracy"] == (logits.argmax(1) == data.validation_labels).double().mean().item()
    assert summary["validation_loss"] == pytest.approx(cross_entropy(logits, data.validation_labels).item(), rel=1e-5)
    rows = run.table("metrics")
    assert rows.validation_accuracy.iloc[-1] == summary["validation_accuracy"]
    stop = rows.sort_values(["validation_accuracy", "epoch"], ascending=[False, True]).iloc[0]
    assert (summary["stopped_epoch"], summary["stopped_test_accuracy"]) == (stop.epoch, stop.test_accuracy)


@pytest.mark.parametrize(
    "validation, epoch", [((0.1, 0.5, 0.4, 0.5), 2), ((0.9, 0.2, 0.2, 0.2), 1), ((0.1, 0.2, 0.3, 0.4), 4)]
)
def test_early_stopping_is_at_the_first_evaluation_that_is_best_on_validation(tmp_path, monkeypatch, validation, epoch):
    row = Training.metrics_row

    def made_up(self, epochs_done, lr):
        accuracies = {"validation_accuracy": validation[epochs_done - 1], "test_accuracy": epochs_done / 100}
        return row(self, epochs_done, lr) | accuracies

    monkeypatch.setattr(Training, "metrics_row", made_up)
    summary = trained(tmp_path, validation_fraction=0.25, epochs=4).summary
    assert (summary["stopped_epoch"], summary["stopped_test_accuracy"]) == (epoch, epoch / 100)


def test_without_validation_there_is_no_early_stopping(tmp_path):
    run = trained(tmp_path)
    assert run.summary["stopped_epoch"] is run.summary["stopped_test_accuracy"] is None
    assert run.summary["validation_accuracy"] is None and run.summary["validation_images"] == 0


def test_a_warm_up_trains_as_sam_at_first_and_then_with_the_share_of_its_epoch(tmp_path, monkeypatch):
    seen, step = [], EagerStep.__call__

    def record(self, x, y):
        seen.append(self.optimizer.param_groups[0]["mix_progress"])
        return step(self, x, y)

    monkeypatch.setattr(EagerStep, "__call__", record)
    warmed = trained(tmp_path, mix="scale2x0.5", mix_warmup=0.5, epochs=4)
    steps = warmed.summary["steps_per_epoch"]
    assert seen == [share for share in (0.0, 0.5, 1.0, 1.0) for _ in range(steps)]
    sam, saner = (trained(tmp_path, mix=mix, epochs=4) for mix in ("sam", "scale2x0.5"))
    losses = [run.table("metrics").test_loss.tolist() for run in (warmed, sam, saner)]
    assert losses[0][0] == losses[1][0] != losses[2][0] and losses[0][1] != losses[1][1]


def test_the_running_training_numbers_are_the_mean_over_the_images_of_the_epoch(tmp_path, monkeypatch):
    results, step = [], EagerStep.__call__

    def record(self, x, y):
        loss, right = step(self, x, y)
        results.append((loss.item() * len(y), right.item(), len(y)))
        return loss, right

    monkeypatch.setattr(EagerStep, "__call__", record)
    run = trained(tmp_path)
    for row, epoch in zip(run.table("metrics").itertuples(), np.split(np.array(results), 2), strict=True):
        losses, right, sizes = epoch.sum(0)
        assert row.train_loss == pytest.approx(losses / sizes, rel=1e-6) and row.train_accuracy == right / sizes
        assert sizes == run.summary["train_images"]


def test_the_summary_counts_steps_and_gradient_evaluations(any_whole):
    run, summary, passes = any_whole, any_whole.summary, 1 if any_whole.config.mix == "sgd" else 2
    assert summary["steps_per_epoch"] == math.ceil(summary["train_images"] / 16)
    assert summary["steps"] == 2 * summary["steps_per_epoch"]
    assert summary["gradient_evaluations"] == passes * summary["steps"]
    assert run.table("metrics").gradient_evaluations.tolist() == [
        passes * summary["steps_per_epoch"] * e for e in (1, 2)
    ]
    assert summary["status"] == "done" and summary["number_of_classes"] == 10 and summary["test_images"] == 792
    assert summary["parameters"] == sum(p.numel() for p in build_model("resnet6", 4, "cifar", 1, 10, 0).parameters())


def test_without_noise_there_is_nothing_memorized(tmp_path):
    run = trained(tmp_path, noise_fraction=0.0)
    assert run.summary["flipped"] == 0 and run.summary["memorized"] is None and run.summary["corrected"] is None
    assert run.table("metrics").memorized.isna().all()


def test_evaluations_are_made_when_due_and_after_the_last_epoch(tmp_path):
    assert trained(tmp_path, epochs=5, eval_every=2).table("metrics").epoch.tolist() == [2, 4, 5]
    assert trained(tmp_path, epochs=3, eval_every=100).table("metrics").epoch.tolist() == [3]


def test_the_configuration_is_recorded_before_the_first_step(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(EagerStep, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path)
    origin = json.loads((Run(SMALL, tmp_path).folder / "config.json").read_text())
    assert RunConfig.parse(origin["config"]) == SMALL and origin["run_id"] == SMALL.run_id
    assert origin["versions"]["torch"] == torch.__version__


# What changes nothing of the training


def test_a_run_with_probes_ends_in_the_same_weights_to_the_bit(any_whole, tmp_path):
    plain, probed = trained(tmp_path, mix=any_whole.config.mix), any_whole
    assert_same_bits(weights(plain), weights(probed))
    assert tables(plain)["metrics"] == tables(probed)["metrics"]
    assert probed.table("probes").step.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10, 12]  # 0, 2, ...; windows of 0 and 5
    assert probed.table("layers").epoch.unique().tolist() == [0, 1]
    assert probed.table("overlaps").batch.unique().tolist() == ["other", "same"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    torch.manual_seed(0)
    return trained(tmp_path_factory.mktemp("measured"), mix="sam", **MEASURED)


def test_measurements_and_evaluations_change_nothing_of_the_training(measured, tmp_path):
    assert_same_bits(weights(measured), weights(trained(tmp_path, mix="sam", eval_every=100)))
    for name in TABLES:
        frame = measured.table(name).drop(columns=["validation_loss", "validation_accuracy"], errors="ignore")
        assert len(frame) and frame.select_dtypes("number").notna().any().all(), name


def test_probes_are_made_at_a_second_radius_too(measured):
    rows = measured.table("probes")
    assert rows.rho.tolist() == [0.05, 0.2] * (len(rows) // 2) and rows.step.is_monotonic_increasing
    first = rows[rows.step == 0].set_index("rho")
    assert first.loss.nunique() == first.grad_norm.nunique() == 1 and first.loss_sam.loc[0.2] > first.loss_sam.loc[0.05]


def test_rho_means_nothing_to_sgd(tmp_path):
    assert_same_bits(weights(trained(tmp_path, rho=0.05)), weights(trained(tmp_path, rho=0.5)))


def test_sam_with_rho_0_is_sgd(tmp_path):
    assert_same_bits(weights(trained(tmp_path)), weights(trained(tmp_path, mix="sam", rho=0.0)))


def test_another_seed_gives_another_run(tmp_path):
    a, b = weights(trained(tmp_path)), weights(trained(tmp_path, seed=2))
    assert not torch.equal(a["conv1.weight"], b["conv1.weight"])


def test_training_leaves_the_settings_of_torch_as_they_were(tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    trained(tmp_path, threads=2, deterministic=True, epochs=1, data_fraction=0.02)
    assert torch.get_num_threads() == threads and not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def settings() -> list:
    """What of torch's settings a caller can see."""
    precision, autocast = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")
    modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    return [torch.get_default_dtype(), torch.get_default_device(), precision, torch.get_num_threads(), autocast, *modes]


def test_the_same_configuration_gives_the_same_bits_twice_whatever_surrounds_it(measured, tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(2)
        for surrounding in (torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode()):
            stack.enter_context(surrounding)
        stack.enter_context(torch.device("meta"))
        before = settings()
        run = train(measured.config, tmp_path, progress=False)
        assert settings() == before
    assert_same_run(measured, run)


def test_trainings_in_threads_have_the_bits_of_each_alone(tmp_path):
    configs = [config(mix=mix, seed=seed) for mix in ("sgd", "shuffled-checkpoint13") for seed in (1, 2)]
    alone = [train(c, tmp_path / "alone", progress=False) for c in configs]
    failed, ready = [], threading.Barrier(4)

    def work(c):
        try:
            ready.wait()
            train(c, tmp_path / "threads", progress=False)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(c,)) for c in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for run in alone:
        assert_same_run(run, Run(run.config, tmp_path / "threads"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's memory alone is kept")
def test_from_a_training_on_memory_that_a_tensor_frees_is_there_for_the_next(tmp_path):
    """In a process of its own: page faults of ten tensors of 64 MB, one after the other, before and after."""
    code = """
import resource, sys, torch
from samlib.config import RunConfig
from samlib.train import train

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
config = RunConfig(dataset="digits", model="resnet6", width=2, data_fraction=0.1, epochs=1, device="cpu")
train(config, sys.argv[1], progress=False)
faults()
print(first, faults())
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    before, after = map(int, process.stdout.split())
    assert before > 1000 and after < before / 100


def test_a_finished_run_is_returned_at_once(tmp_path, monkeypatch):
    first = trained(tmp_path)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in first.folder.iterdir()}
    monkeypatch.setattr(samlib.train, "Training", lambda *_: pytest.fail("trained again"))
    again = trained(tmp_path)
    assert again.summary == first.summary
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in first.folder.iterdir()} == before
    assert sorted(before) == ["config.json", "lock", "metrics.csv", "summary.json", "weights.pt"]


# Divergence


def test_a_diverging_run_ends_as_diverged_and_is_not_tried_again(tmp_path, monkeypatch):
    run = trained(tmp_path, lr=1000.0, weight_decay=1.0, epochs=20, eval_every=5)
    summary = run.summary
    assert summary["status"] == "diverged" and 0 < summary["diverged_step"] < 20 * summary["steps_per_epoch"] - 1
    assert summary["steps"] == summary["diverged_step"] + 1
    monkeypatch.setattr(samlib.train, "Training", lambda *_: pytest.fail("trained again"))
    train(run.config, tmp_path)
    monkeypatch.undo()
    done = trained(tmp_path)
    frame = load_runs(tmp_path)
    assert frame.status.to_dict() == {run.id: "diverged", done.id: "done"}
    final = [c for c in frame if c.startswith(("test_a", "test_l", "train_a", "eval_train_", "memor", "corr"))]
    assert len(final) == 8 and frame.loc[run.id, final].isna().all() and frame.loc[done.id, final].notna().all()


@pytest.mark.parametrize("at", [0, 3, 6, 7, 13])  # 7 steps an epoch
def test_a_loss_that_is_not_finite_ends_the_run_at_that_step(tmp_path, monkeypatch, at):
    steps, step = [], EagerStep.__call__

    def blow_up(self, x, y):
        loss, right = step(self, x, y)
        steps.append(loss)
        return (loss * float("nan") if len(steps) - 1 == at else loss), right

    monkeypatch.setattr(EagerStep, "__call__", blow_up)
    run = trained(tmp_path)
    assert len(steps) == at + 1 and run.summary["status"] == "diverged" and run.summary["diverged_step"] == at
    assert run.table("metrics").empty if at < 7 else run.table("metrics").epoch.tolist() == [1]
    assert sorted(os.listdir(run.folder)) == sorted(
        ["config.json", "lock", "summary.json", *([] if at < 7 else ["metrics.csv"])]
    )


def test_weights_that_are_not_finite_after_an_epoch_are_not_measured(tmp_path, monkeypatch):
    step = EagerStep.__call__

    def spoil(self, x, y):
        result = step(self, x, y)
        with torch.no_grad():
            next(self.model.parameters()).fill_(float("nan"))
        return result

    monkeypatch.setattr(EagerStep, "__call__", spoil)
    run = trained(tmp_path, batch_size=1000, **MEASURED | {"persistence_steps": (0,)})
    assert run.summary["status"] == "diverged" and not (run.folder / "sharpness.csv").exists()


# Interrupted and resumed


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, steps: int) -> None:
    """Training stops in its step number `steps`, counted from now."""
    made, step = [], EagerStep.__call__

    def stop(self, x, y):
        made.append(0)
        if len(made) > steps:
            raise Interrupted
        return step(self, x, y)

    monkeypatch.setattr(EagerStep, "__call__", stop)


@pytest.fixture(scope="module", params=MIXES)
def any_whole(request, tmp_path_factory):
    """A run that was never interrupted, for each mix; a state after every step."""
    return trained(tmp_path_factory.mktemp("whole"), mix=request.param, state_seconds=0.0, **PROBED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole"), mix="checkpoint13", state_seconds=0.0, **PROBED)


def stopped_after(whole, root, monkeypatch, steps) -> Run:
    with monkeypatch.context() as patch:
        interrupt(patch, steps)
        with pytest.raises(Interrupted):
            train(whole.config, root, progress=False)
    return Run(whole.config, root)


@pytest.mark.parametrize("steps", [7, 13])  # 7 steps an epoch, so the 7th state lies between two epochs
def test_a_resumed_run_ends_in_the_same_bits(any_whole, tmp_path, monkeypatch, steps):
    stopped_after(any_whole, tmp_path, monkeypatch, steps)
    assert_same_run(any_whole, train(any_whole.config, tmp_path, progress=False))


@pytest.fixture(scope="module")
def whole_measured(tmp_path_factory):
    """A run with every table, a mix that shuffles, and a warm-up."""
    fields = MEASURED | {"mix": "shuffled-scale2x0.5", "mix_warmup": 0.5, "state_seconds": 0.0}
    return trained(tmp_path_factory.mktemp("whole"), **fields)


def test_every_table_of_a_resumed_run_has_the_same_bytes(whole_measured, tmp_path, monkeypatch):
    run = stopped_after(whole_measured, tmp_path, monkeypatch, 10)
    assert_same_run(whole_measured, train(run.config, tmp_path, progress=False))
    for name in set(TABLES) - {"metrics"}:  # whose seconds differ
        path = f"{name}.csv"
        assert (run.folder / path).read_bytes() == (whole_measured.folder / path).read_bytes(), name


def test_a_run_interrupted_again_and_again_ends_in_the_same_bits(whole, tmp_path, monkeypatch):
    stopped_after(whole, tmp_path, monkeypatch, 0)
    for _ in range(3):
        stopped_after(whole, tmp_path, monkeypatch, 2)
    assert_same_run(whole, train(whole.config, tmp_path, progress=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: resuming on one was not tested")
@pytest.mark.parametrize("mix", MIXES)
def test_on_a_gpu_deterministic_algorithms_resume_to_the_same_bits_too(tmp_path, monkeypatch, mix):
    on_gpu = {"device": "cuda", "deterministic": True, "state_seconds": 0.0} | PROBED
    whole = trained(tmp_path / "whole", mix=mix, **on_gpu)
    stopped_after(whole, tmp_path, monkeypatch, 9)
    assert_same_run(whole, train(whole.config, tmp_path, progress=False))


@pytest.mark.parametrize("name", ["metrics.csv", "probes.csv", "state.pt", "config.json"])
def test_a_file_lost_between_interruption_and_resumption_is_made_again(whole, tmp_path, monkeypatch, name, recwarn):
    run = stopped_after(whole, tmp_path, monkeypatch, 9)
    (run.folder / name).unlink()
    assert_same_run(whole, train(whole.config, tmp_path, progress=False))
    assert len(load_runs(tmp_path)) == 1 and not [w for w in recwarn if "state" in str(w.message)]


def test_a_config_of_another_run_in_the_folder_is_replaced_when_the_run_goes_on(whole, tmp_path, monkeypatch):
    run = stopped_after(whole, tmp_path, monkeypatch, 9)
    text = (run.folder / "config.json").read_text().replace(run.id, "another-run")
    (run.folder / "config.json").write_text(text)
    assert_same_run(whole, train(whole.config, tmp_path, progress=False))
    assert len(load_runs(tmp_path)) == 1


@pytest.mark.parametrize("change", ["another image", "one image less", "another picture", "nothing"])
def test_a_run_whose_images_changed_starts_anew_on_them_and_says_so(tmp_path, monkeypatch, change):
    draw = np.random.default_rng(0)

    def paint(name):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)

    for part, label, k in [(p, c, k) for p in ("train", "test") for c in "ab" for k in range(12)]:
        paint(f"{part}/{label}/{k}.png")
    fields = {"dataset": "imagefolder", "root": str(tmp_path / "images"), "data_fraction": 1.0, "state_seconds": 0.0}
    whole = trained(tmp_path / "before", **fields)
    run = stopped_after(whole, tmp_path / "stopped", monkeypatch, 2)
    first = tmp_path / "images" / "train" / "a" / "0.png"
    if change == "another image":
        paint("train/a/new.png")
    elif change == "one image less":
        first.unlink()
    elif change == "another picture":
        paint("train/a/0.png")
    if change == "nothing":
        assert_same_run(whole, train(run.config, tmp_path / "stopped", progress=False))
        return
    with pytest.warns(UserWarning) as warned:
        again = train(run.config, tmp_path / "stopped", progress=False)
    texts = [str(w.message) for w in warned if "state" in str(w.message)]
    assert all("the data have changed since the run was started" in text for text in texts[:-1])
    assert "starts anew" in texts[-1] and len(texts) == 3
    assert_same_run(again, trained(tmp_path / "fresh", **fields))


@pytest.mark.parametrize("names", [["state.pt"], ["state.pt", "state.previous.pt"]])
def test_damaged_states_are_set_aside_and_cost_only_time(whole, tmp_path, monkeypatch, names):
    run = stopped_after(whole, tmp_path, monkeypatch, 9)
    for name in names:
        os.truncate(run.folder / name, (run.folder / name).stat().st_size // 2)
    with pytest.warns(UserWarning) as warned:
        again = train(whole.config, tmp_path, progress=False)
    texts = [str(w.message) for w in warned if "state" in str(w.message)]
    assert len([text for text in texts if "is set aside" in text]) == len(names)
    assert ("starts anew" in texts[-1]) == (len(names) == 2)
    assert_same_run(whole, again)


def test_a_first_persistence_step_later_than_the_first_state_resumes(tmp_path, monkeypatch, recwarn):
    fields = {"probe_every": 1, "persistence_steps": (5,), "state_seconds": 0.0}
    whole = trained(tmp_path / "whole", **fields)
    stopped_after(whole, tmp_path, monkeypatch, 3)
    assert_same_run(whole, train(whole.config, tmp_path, progress=False))
    assert not [w for w in recwarn if "state" in str(w.message)]


def test_a_state_is_written_no_more_often_than_configured(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(Run, "save_state", lambda *_: saves.append(0))
    trained(tmp_path, state_seconds=1e6)
    assert not saves
    shutil.rmtree(tmp_path)
    trained(tmp_path, state_seconds=0.0)
    assert len(saves) == 14


# Refused


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"probe_every": 1, "persistence_steps": (14,)}, "persistence_steps: step 14 never comes, the last is 13"),
        ({"data_fraction": 0.001}, "data_fraction: 0.001 of class 0"),
        (
            {"data_fraction": 0.01, "curvature_every": 1, "batch_size": 4},
            "curvature_every: it needs 16 training images",
        ),
        ({"batch_size": 1000, "drop_last": True}, "batch_size: 1000 leaves no batch"),
        ({"dataset": "imagefolder", "root": "/nowhere/at/all"}, "root: '/nowhere/at/all/train' is not a folder"),
        pytest.param(
            {"device": "cuda"},
            "torch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_and_harms_no_run(tmp_path, fields, words):
    run = trained(tmp_path, epochs=1)
    before = {p.name: p.read_bytes() for p in run.folder.iterdir()}
    with pytest.raises(UserError) as refused:
        trained(tmp_path, **fields)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert {p.name: p.read_bytes() for p in run.folder.iterdir()} == before
    assert load_runs(tmp_path).index.tolist() == [run.id]


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="the run folder cannot be made"):
        trained(tmp_path / "runs")


# Small parts


def test_the_initial_learning_rate_momentum_and_mix_reach_the_optimizer(tmp_path):
    run = Run(config(mix="checkpoint13", rho=0.3, lr=0.2, momentum=0.5, weight_decay=0.01), tmp_path)
    (group,) = Training(run.config, run, torch.device("cpu")).optimizer.param_groups
    names = ("mix", "rho", "lr", "momentum", "weight_decay")
    assert [group[name] for name in names] == ["checkpoint13", 0.3, 0.2, 0.5, 0.01]
