"""The benchmark's own measure: what is left out of a share must be able to show."""

import time

import pytest

from benchmarks import cpu
from samlib.config import RunConfig
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
