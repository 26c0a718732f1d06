"""What SANER's paper (arXiv 2411.17132) says of checkpoint 2 and flipped labels, in our words, and a control of it."""

from collections.abc import Iterator
from functools import partial

from samlib.analysis.ablation import by_setting
from samlib.analysis.claim import ASKED, Finding, claim
from samlib.analysis.claims_ablation import PAIRED, compared
from samlib.analysis.noise import COLUMNS, at_own_rho, beyond_chance
from samlib.analysis.results import Results, mix_name, setting_name
from samlib.analysis.stats import decide

HERE = {"subject": "noise", "notebook": "08_label_noise"}
SANER = "scale2x0.5"


def on_flips(results: Results, other: str, value: str, **rule: float) -> Iterator[Finding]:
    """SANER minus another update in every setting with flipped labels; beside SAM also each at its own ρ."""
    yield from (f for f in compared(results, SANER, other, value, **rule) if ", 0 % flipped" not in f.where)
    rows = at_own_rho(results, SANER, other, value).query("noise_fraction > 0") if other == "sam" else []
    for where, found in by_setting(rows) if len(rows) else ():
        what = f"SANER, at its own ρ, − SAM, at its own, {value.replace('_', ' ')}"
        yield Finding(where, found, decide(found, **rule), what=what)


@claim(
    **HERE, every=True, quote="Flipped labels' gradients dominate where 0 < g'/g < 1: in checkpoint 2 (in our words)",
    rule="beside as many random active parameters of the same kinds of layer, the share of checkpoint 2's parameters "
    "whose direction the flipped images set, and their share of its |g|, mean over a run's probes, and over the last "
    "third of them (added after the first numbers): the interval of the difference lies above zero",
)  # fmt: skip
def checkpoint2_carries_the_flips(results: Results) -> Iterator[Finding]:
    for mix in ("sam", "sgd"):
        for name in ("sets", "of_g"):
            for third, when in ((None, ""), (3, " in the last third")):
                for at, found in beyond_chance(results, name, 2, mix, third).items():
                    what = f"{mix_name(mix)}, {COLUMNS[name]}{when}"
                    yield Finding(setting_name(*at), found, decide(found, above=0), what=what)


# fmt: off
claim(**HERE, name="saner_memorizes_less", every=True,
      quote="Scaling checkpoint 2 down, α = 0.5, memorizes fewer flipped labels than SAM (in our words)",
      rule=f"memorized flips, SANER minus SAM, {PAIRED}, and each at its own: the interval lies below zero",
      )(partial(on_flips, other="sam", value="memorized", below=0))
claim(**HERE, name="saner_beats_sam", every=True,
      quote="Under label noise SANER tests above SAM (in our words)",
      rule=f"test accuracy, SANER minus SAM, {PAIRED}, and each at its own: the interval lies above zero",
      )(partial(on_flips, other="sam", value="test_accuracy", above=0))
# fmt: on


@claim(
    **HERE, document=ASKED, every=True,
    quote="It has to be checkpoint 2 that SANER scales, not as many random parameters",
    rule=f"SANER minus SANER with checkpoints shuffled in each layer, {PAIRED}: memorized flips below zero, test "
    "accuracy above",
)  # fmt: skip
def saner_needs_checkpoint2(results: Results) -> Iterator[Finding]:
    yield from on_flips(results, f"shuffled-{SANER}", "memorized", below=0)
    yield from on_flips(results, f"shuffled-{SANER}", "test_accuracy", above=0)
