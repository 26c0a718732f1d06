"""The second document's Experiment 1 and its tables: which checkpoint does SAM's work, by its size or its direction?"""

from collections.abc import Iterable, Iterator

from samlib.analysis.ablation import by_setting
from samlib.analysis.claim import ASKED, Finding, claim
from samlib.analysis.results import SHARPNESS, Results, mix_name
from samlib.analysis.stats import HOLDS, MARGIN, UNDECIDED, decide

HERE = {"subject": "geometry", "notebook": "06_checkpoint_ablation"}
SUBSETS = ("checkpoint12", "checkpoint13", "checkpoint123")  # with checkpoint 1, above SAM in the document's table
KEPT = 0.8  # of what SAM takes off SGD's sharpness, for its flatness to be "maintained"
PAIRED = "paired by seed, same ρ"
POINT = f"{100 * MARGIN:g} point"


def compared(results: Results, a: str, b: str, value: str = "test_accuracy", **rule: float) -> Iterator[Finding]:
    """A finding a setting on a minus b; none where these runs hold no such pair."""
    for where, found in by_setting(results.pairs(a, b, value)):
        what = f"{mix_name(a)} − {mix_name(b)}, {value.replace('_', ' ')}"
        yield Finding(where, found, decide(found, **rule), what=what)


def says(
    name: str, quote: str, rule: str, pairs: Iterable[tuple[str, str]], values: Iterable[str] = ("test_accuracy",),
    documented: str = "", every: bool = False, **verdict: float,
) -> None:  # fmt: skip
    """The claim that the first of each pair of updates is above or below the second, paired by seed at the same ρ."""

    def findings(results: Results) -> Iterator[Finding]:
        for value in values:
            for a, b in pairs:
                yield from compared(results, a, b, value, **verdict)

    claim(**HERE, name=name, quote=quote, rule=rule, documented=documented, every=every)(findings)


# fmt: off
says("checkpoint1_contributes_most",
     "Which checkpoint among the four contributes most to finding the flat minima in SAM?",
     f"test accuracy of checkpoint 1 alone minus that of 2, 3 and 4 alone, {PAIRED}: the interval lies above zero",
     [("checkpoint1", f"checkpoint{k}") for k in (2, 3, 4)], above=0, every=True,
     documented="checkpoint 1: +1.2 to +2.2 points over SGD, the most of the four at every ρ")
says("others_end_sharper", "Repeating this experiment with other checkpoints resulted in sharper minima.",
     f"sharpness of checkpoint 2, 3 and 4 alone minus checkpoint 1's, {PAIRED}: the interval lies above zero",
     [(f"checkpoint{k}", "checkpoint1") for k in (2, 3, 4)], SHARPNESS, above=0)
says("subsets_with_checkpoint1_beat_sam",
     "Checkpoints 1+2, 1+3 and 1+2+3 test above SAM, in its second table (in our words)",
     f"test accuracy minus SAM's, {PAIRED}: the interval lies above zero", [(mix, "sam") for mix in SUBSETS], above=0,
     every=True, documented="+0.1 to +1.3 points")
says("a_constant_gain_does_as_well",
     "Instead of increasing magnitude follows ratio, increase with the fixed constant.",
     f"test accuracy of SGD with checkpoint 1 doubled minus checkpoint 1 alone, {PAIRED}: at most {POINT} below",
     [("gain1x2", "checkpoint1")], above=-MARGIN)
# fmt: on


@claim(
    **HERE, quote="SAM's ability to find flat minima was maintained.",
    documented="checkpoint 1: −0.2 to +0.6 points of test accuracy over SAM",
    every=True,
    rule=f"checkpoint 1 alone, {PAIRED}: its test accuracy is no more than {POINT} below SAM's, and it keeps at least "
    f"{100 * KEPT:g} % of what SAM takes off SGD's sharpness; undecided where SAM itself is not flatter than SGD",
)  # fmt: skip
def checkpoint1_keeps_flatness(results: Results) -> Iterator[Finding]:
    yield from compared(results, "checkpoint1", "sam", above=-MARGIN)
    for name in SHARPNESS:
        flatter = {where: decide(e, below=0) for where, e in by_setting(results.pairs("sam", "sgd", name))}
        to_sam, to_sgd = (results.pairs("checkpoint1", mix, name) for mix in ("sam", "sgd"))
        lost = KEPT * to_sam.difference + (1 - KEPT) * to_sgd.difference.reindex(to_sam.index)  # 0 at the margin
        for where, found in by_setting(to_sam.assign(difference=lost)):
            sam = flatter.get(where) == HOLDS
            verdict, note = (decide(found, below=0), "") if sam else (UNDECIDED, "SAM is not flatter than SGD here")
            yield Finding(where, found, verdict, note, f"checkpoint 1 above the margin, {name}")


@claim(
    **HERE, quote="The realistic ability of SAM is due to its effective learning rate, evidenced by checkpoint1, not "
    "direction modification.",
    every=True,
    rule=f"each parameter's, test accuracy, {PAIRED}: SAM's sizes with SGD's signs end no more than {POINT} below SAM, "
    f"and SAM's signs with SGD's sizes no more than {POINT} above SGD",
)  # fmt: skip
def learning_rate_not_direction(results: Results) -> Iterator[Finding]:
    yield from compared(results, "magnitude", "sam", above=-MARGIN)
    yield from compared(results, "direction", "sgd", below=MARGIN)


@claim(
    **HERE, document=ASKED, quote="The length of the whole step does it",
    every=True,
    rule=f"test accuracy, {PAIRED}: SGD's direction at SAM's (checkpoint 1's) length ends no more than {POINT} below "
    f"it, and SAM's direction at SGD's length no more than {POINT} above SGD",
)  # fmt: skip
def step_length_alone(results: Results) -> Iterator[Finding]:
    for length, whole in (("length-sam", "sam"), ("length-checkpoint1", "checkpoint1")):
        yield from compared(results, length, whole, above=-MARGIN)
    yield from compared(results, "rescaled-sam", "sgd", below=MARGIN)


@claim(
    **HERE, document=ASKED,
    quote="What counts is which parameters a checkpoint holds, not only how many",
    rule=f"test accuracy minus that with checkpoints shuffled in each layer, {PAIRED}: the interval lies above zero",
)  # fmt: skip
def which_parameters_not_how_many(results: Results) -> Iterator[Finding]:
    for mix in sorted(mix for mix in results.runs().mix.unique() if mix.startswith("shuffled-")):
        yield from compared(results, mix.removeprefix("shuffled-"), mix, above=0)


@claim(
    **HERE, document=ASKED,
    quote="As many random parameters as checkpoint 1 holds are ahead of as many as 2, 3 and 4 hold",
    rule=f"test accuracy of 1 shuffled minus that of 2, 3 and 4 shuffled, {PAIRED}: the interval lies above zero",
)  # fmt: skip
def as_many_random_parameters_lead(results: Results) -> Iterator[Finding]:
    for k in (2, 3, 4):
        yield from compared(results, "shuffled-checkpoint1", f"shuffled-checkpoint{k}", above=0)
