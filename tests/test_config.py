import json

import pytest
import torch
from pydantic import create_model

from samlib.config import RunConfig, UserError

# field, value, words of what is allowed
REFUSED = [
    ("epochs", "3", "valid integer"),
    ("epochs", 3.0, "valid integer"),
    ("epochs", True, "valid integer"),
    ("epochs", None, "valid integer"),
    ("epochs", 0, "greater than or equal to 1"),
    ("epochs", 10**9, "less than or equal to 100000"),
    ("batch_size", 1, "greater than or equal to 2"),
    ("width", 0, "greater than or equal to 1"),
    ("width", 4096, "less than or equal to 512"),
    ("image_size", 2, "greater than or equal to 4"),
    ("image_size", "16", "valid integer"),
    ("lr", "0.1", "valid number"),
    ("lr", True, "valid number"),
    ("lr", float("nan"), "finite"),
    ("lr", float("inf"), "finite"),
    ("lr", 0, "greater than 0"),
    ("lr", -0.1, "greater than 0"),
    ("lr", 10**400, "valid number"),
    ("rho", -0.05, "greater than or equal to 0"),
    ("rho", float("nan"), "finite"),
    ("rho", [0.05], "valid number"),
    ("momentum", 1, "less than 1"),
    ("weight_decay", 2, "less than or equal to 1"),
    ("data_fraction", 0, "greater than 0"),
    ("data_fraction", 1.5, "less than or equal to 1"),
    ("data_fraction", "10%", "valid number"),
    ("noise_fraction", 1, "less than 1"),
    ("noise_fraction", -0.1, "greater than or equal to 0"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**63, "less than 9223372036854775808"),
    ("data_seed", 1.5, "valid integer"),
    ("dataset", "mnist", "'digits', 'cifar10', 'cifar100', 'fashion-mnist' or 'imagefolder'"),
    ("dataset", None, "'digits'"),
    ("model", "../resnet18", "'resnet6', 'resnet10', 'resnet18' or 'resnet34'"),
    ("stem", "CIFAR", "'imagenet' or 'cifar'"),
    ("precision", "fp16", "'fp32', 'tf32' or 'bf16'"),
    ("device", "cuda:1", "'auto', 'cpu' or 'cuda'"),
    ("augment", 1, "valid boolean"),
    ("augment", "yes", "valid boolean"),
    ("root", "", "at least 1 character"),
    ("root", 7, "valid string"),
    ("root", "a\0b", "control characters"),
    ("root", "a\nb", "control characters"),
    ("root", "a" * 5000, "at most 1000 characters"),
    ("mix", "Sam", "known are sgd, sam, magnitude"),
    ("mix", 3, "valid string"),
    ("mix", "", "known are sgd"),
    ("mix", "checkpoint", "known are sgd"),
    ("mix", "checkpoint31", "in order"),
    ("mix", "checkpoint5", "known are sgd"),
    ("mix", "checkpoint1\n", "known are sgd"),
    ("mix", "scale3x", "scale<class>x<factor>"),
    ("mix", "scale5x2", "scale<class>x<factor>"),
    ("mix", "gain1xnan", "gain<class>x<factor>"),
    ("mix", "gain1x1" + "0" * 400, "up to 1e6"),
    ("mix", "sam/../../x", "known are sgd"),
    ("mix", "shuffled-sgd", "neither sgd nor a control"),
    ("mix", "shuffled-sam", "nothing to shuffle"),
    ("mix", "rescaled-length-sam", "neither sgd nor a control"),
    ("mix_warmup", 1.5, "less than or equal to 1"),
    ("mix_warmup", -0.1, "greater than or equal to 0"),
    ("probe_rho", -0.1, "greater than or equal to 0"),
    ("validation_fraction", 1, "less than 1"),
    ("persistence_lags", [0], "greater than or equal to 1"),
    ("noise_every", -1, "greater than or equal to 0"),
    ("eval_every", 0, "greater than or equal to 1"),
    ("probe_every", -1, "greater than or equal to 0"),
    ("scan_rhos", [], "the grid of rho is empty"),
    ("scan_rhos", [0.1, 0.1], "must increase"),
    ("scan_rhos", [0.2, 0.1], "must increase"),
    ("scan_rhos", [0.0, 0.1], "greater than 0"),
    ("scan_rhos", [0.1, "0.2"], "valid number"),
    ("scan_rhos", 0.1, "a list"),
    ("persistence_steps", "12", "a list"),
    ("persistence_steps", [-1], "greater than or equal to 0"),
    ("threads", 0, "greater than or equal to 1"),
    ("state_seconds", float("inf"), "finite"),
]


UNKNOWN = ["learning_rate", "Lr", "epochs ", "", "model_config", "run_id", "x\ny", 1, None]

# A frozen id is the folder of a finished run: one that changes here would lose it.
IDS = [
    ({}, "cifar10-resnet18-w64-sgd-d1-n0-s42-44136fa3"),
    ({"mix": "sam", "noise_fraction": 0.2}, "cifar10-resnet18-w64-sam-rho0.05-d1-n0.2-s42-73047286"),
    (
        {"dataset": "digits", "model": "resnet10", "stem": "cifar", "width": 8, "epochs": 20, "mix": "checkpoint134"}
        | {"rho": 0.1, "seed": 0},
        "digits-resnet10-w8-checkpoint134-rho0.1-d1-n0-s0-7c25ad1d",
    ),
    (
        {"dataset": "imagefolder", "root": "data/cifar10", "image_size": 16, "data_fraction": 0.01, "probe_every": 10}
        | {"persistence_steps": (0, 100), "scan_rhos": (0.01, 0.1), "data_seed": 7},
        "imagefolder-resnet18-w64-sgd-d0.01-n0-s42-2b0dca00",
    ),
    (
        {"dataset": "cifar100", "lr": 0.05, "weight_decay": 1e-3, "augment": False, "mix": "scale3x0.1"}
        | {"precision": "bf16", "device": "cuda", "keep_weights": True},
        "cifar100-resnet18-w64-scale3x0.1-rho0.05-d1-n0-s42-20be5958",
    ),
]


def refusal(values) -> str:
    with pytest.raises(UserError) as refused:
        RunConfig.parse(values)
    text = str(refused.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("field, value, allowed", REFUSED)
def test_a_refusal_names_the_field_the_value_and_what_is_allowed(field, value, allowed):
    text = refusal({field: value})
    assert text.startswith(field) and allowed in text
    items = value if isinstance(value, list) else []
    assert any(f"found {item!r:.100};" in text for item in (value, *items))


def test_an_integer_of_more_digits_than_python_prints_is_refused():
    assert refusal({"seed": 10**5000}).startswith("seed: found a number too long to print; ")


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    text = refusal({name: 1})
    assert "there is no such field; the fields are dataset, root, image_size," in text
    assert str(name) in text or repr(name) in text


@pytest.mark.parametrize("values", [None, [], "mix=sam", [("mix", "sam")]])
def test_what_is_no_mapping_is_refused(values):
    assert "a mapping of fields to values" in refusal(values)


def test_fields_that_do_not_fit_together_are_refused():
    assert "set probe_every" in refusal({"persistence_steps": [3]})
    assert "names a step twice" in refusal({"persistence_steps": [3, 3], "probe_every": 1})
    assert "set probe_every" in refusal({"probe_rho": 0.1})
    assert "set noise_fraction above 0" in refusal({"noise_every": 1})
    for mix in ("sgd", "sam"):
        assert f"mix_warmup leads from sam to another mix, not to {mix}" in refusal({"mix": mix, "mix_warmup": 0.1})


def test_several_mistakes_are_named_in_one_line():
    text = refusal({"lr": -1, "epochs": 0, "mox": "sam"})
    assert all(part in text for part in ("lr: found -1", "epochs: found 0", "mox: there is no such field"))


@pytest.mark.parametrize("values, run_id", IDS)
def test_a_run_id_stays_what_it_was(values, run_id):
    assert RunConfig.parse(values).run_id == run_id


@pytest.mark.parametrize("values, run_id", IDS)
def test_a_field_added_later_renames_no_run(values, run_id):
    later = create_model("Later", __base__=RunConfig, a_new_knob=(int, 3))
    assert later(**values).run_id == run_id
    assert later(**values, a_new_knob=4).run_id != run_id


def test_every_field_at_its_default_is_left_out_and_every_other_one_counts():
    everything = RunConfig().model_dump()
    assert RunConfig(**everything).run_id == RunConfig().run_id and not RunConfig(**everything).changed()
    other = {
        "dataset": "digits", "root": "elsewhere", "image_size": 16, "data_fraction": 0.5, "noise_fraction": 0.1,
        "augment": False, "drop_last": True, "model": "resnet10", "stem": "cifar", "width": 8, "mix": "sam", "rho": 0.1,
        "epochs": 3, "batch_size": 32, "lr": 0.2, "momentum": 0.0, "weight_decay": 0.0, "seed": 1, "data_seed": 1,
        "eval_every": 1, "probe_every": 1, "persistence_window": 3, "threshold_every": 1, "sharpness_every": 1,
        "curvature_every": 1, "scan_every": 1, "scan_rhos": (0.1,), "measure_samples": 16, "precision": "bf16",
        "graph": False, "deterministic": True, "threads": 2, "device": "cpu", "state_seconds": 1.0,
        "keep_weights": True, "validation_fraction": 0.1, "persistence_lags": (1, 2), "convergence_every": 1,
    }  # fmt: skip
    needs = {  # a field that means something beside another alone
        "persistence_steps": ((2,), {"probe_every": 1}),
        "probe_rho": (0.2, {"probe_every": 1}),
        "noise_every": (1, {"noise_fraction": 0.1}),
        "mix_warmup": (0.25, {"mix": "scale2x0.5"}),
    }
    assert other.keys() | needs.keys() == RunConfig.model_fields.keys()
    ids = {RunConfig(**{name: value}).run_id for name, value in other.items()} | {RunConfig().run_id}
    assert len(ids) == len(other) + 1
    for name, (value, beside) in needs.items():
        assert RunConfig(**beside, **{name: value}).run_id != RunConfig(**beside).run_id


def test_one_configuration_has_one_id_however_it_is_written():
    assert RunConfig(lr=1).run_id == RunConfig(lr=1.0).run_id
    assert RunConfig(noise_fraction=-0.0).run_id == RunConfig(noise_fraction=0).run_id == RunConfig().run_id
    assert RunConfig.parse({"scan_rhos": [0.1, 0.2]}) == RunConfig(scan_rhos=(0.1, 0.2))
    written = RunConfig(mix="sam", scan_rhos=(0.1, 0.2))
    assert RunConfig.parse(json.loads(written.model_dump_json())).run_id == written.run_id


def test_changed_lists_what_differs_from_the_defaults_sorted_as_json_values():
    config = RunConfig(scan_rhos=(0.1, 0.2), mix="sam", lr=0.1, epochs=3)
    assert config.changed() == {"epochs": 3, "mix": "sam", "scan_rhos": [0.1, 0.2]}
    assert list(config.changed()) == ["epochs", "mix", "scan_rhos"]


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValueError):
        RunConfig().lr = 0.2


def test_the_learning_rate_is_that_of_cosine_annealing_in_torch():
    config = RunConfig(epochs=17, lr=0.3)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=17)
    for epoch in range(17):
        assert config.learning_rate(epoch) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "epochs, warmup, steps", [(200, 0.25, 50), (30, 0.1, 3), (7, 1.0, 7), (5, 0.0, 0), (10, 1e-9, 0)]
)
def test_the_mix_is_warmed_linearly_and_whole_after_its_share_of_the_epochs(epochs, warmup, steps):
    config = RunConfig(mix="scale2x0.5", epochs=epochs, mix_warmup=warmup)
    expected = [min(1.0, epoch / steps) if steps else 1.0 for epoch in range(epochs)]
    assert [config.mix_progress(epoch) for epoch in range(epochs)] == expected


def test_due_is_every_so_many_epochs_and_after_the_last():
    config = RunConfig(epochs=7)
    assert [e for e in range(1, 8) if config.due(3, e)] == [3, 6, 7]
    assert [e for e in range(1, 8) if config.due(1, e)] == [1, 2, 3, 4, 5, 6, 7]
    assert [e for e in range(1, 8) if config.due(100, e)] == [7]
    assert [e for e in range(1, 8) if config.due(0, e)] == []


def test_the_data_seed_is_the_seed_unless_given():
    assert RunConfig(seed=3).subset_seed == 3
    assert RunConfig(seed=3, data_seed=0).subset_seed == 0
