"""What SANER's paper (arXiv 2411.17132) says of checkpoint 2 and flipped labels, in our words, and two controls: as
many random parameters, and SGD of fewer epochs which memorizes as much."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product

from samlib.analysis.ablation import by_setting, pairs_at_equal
from samlib.analysis.claim import ASKED, Finding, claim
from samlib.analysis.claims_ablation import PAIRED, compared
from samlib.analysis.noise import COLUMNS, at_own_rho, beyond_chance
from samlib.analysis.results import REGIME, Results, at_chosen_rho, mix_name, setting_name
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


@claim(
    **HERE, document=ASKED, every=True,
    quote="Of the four checkpoints 2 alone holds more of the flips than chance has it",
    rule="beside as many random active parameters of the same kinds of layer, the share of a checkpoint's parameters "
    "whose direction the flipped images set, mean over a run's probes: above zero for 2, and below zero for 1, 3 and 4 "
    "(added after the first numbers)",
)  # fmt: skip
def checkpoint2_alone_carries_the_flips(results: Results) -> Iterator[Finding]:
    for mix, k in product(("sam", "sgd"), (1, 2, 3, 4)):
        for at, found in beyond_chance(results, "sets", k, mix).items():
            verdict = decide(found, above=0) if k == 2 else decide(found, below=0)
            yield Finding(setting_name(*at), found, verdict, what=f"checkpoint {k}, {mix_name(mix)}")


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


def says_at_equal(name: str, quote: str, rule: str, pairs: Iterable[tuple[str, str]], own_rho: bool = False) -> None:
    """The claim that the first of each pair is further above SGD that memorizes as much (SGD itself: by zero) than the
    second; no finding where no SGD does. own_rho: each at the ρ that its held-out accuracy chooses."""

    def findings(results: Results) -> Iterator[Finding]:
        for a, b in pairs:
            rows = pairs_at_equal(results, a, b, "test_at_equal")
            rows = at_chosen_rho(rows, (*REGIME, "augment")) if own_rho and len(rows) else rows
            for where, found in by_setting(rows):
                if found.n:
                    yield Finding(where, found, decide(found, above=0), what=f"{mix_name(a)} − {mix_name(b)}")

    rule += ", of how far its test accuracy is above that of SGD of fewer epochs which memorizes as many flips (made "
    rule += "after the first numbers; coarse where the shortest SGD memorizes about as much as chance does): above zero"
    claim(**HERE, document=ASKED, name=name, quote=quote, rule=rule)(findings)


# fmt: off
says_at_equal("sam_beats_sgd_memorizing_as_much", "SAM tests above SGD that memorizes as many flipped labels",
              "SAM at its best ρ on held-out images, and SAM at SGD's length, minus SGD",
              [("sam", "sgd"), ("rescaled-sam", "sgd")], own_rho=True)
says_at_equal("sizes_beat_sgd_memorizing_as_much",
              "Beside SGD that memorizes as much, SAM's sizes gain, and more than its signs",
              "SAM's sizes with SGD's signs, minus SGD and minus SGD's sizes with SAM's signs",
              [("magnitude", "sgd"), ("magnitude", "direction")])
says_at_equal("checkpoint1_beats_sgd_memorizing_as_much",
              "Beside SGD that memorizes as much, checkpoint 1 gains, and more than 2, 3 and 4",
              "checkpoint 1 alone, minus SGD and minus 2, 3 and 4 alone",
              [("checkpoint1", b) for b in ("sgd", "checkpoint2", "checkpoint3", "checkpoint4")])
says_at_equal("which_parameters_count_memorizing_as_much",
              "Beside SGD that memorizes as much, it counts which parameters a checkpoint holds, not only how many",
              "checkpoints 1, 2, 3, 4, 1+3+4 and SANER, minus those with checkpoints shuffled in each layer",
              [(mix, f"shuffled-{mix}") for mix in (*(f"checkpoint{k}" for k in (1, 2, 3, 4, 134)), SANER)])
# fmt: on
