"""The second document's claims, each with its rule, stated before the numbers, and the verdict that the rule computes.

A claim is judged by the numbers of the runs at hand; `n` says how many. Shares are fractions, shown in percent.
"""

from typing import NamedTuple

import pandas as pd

from samlib.probes import BINS
from samlib.analysis.old_stats import Estimate, correlation, mean_interval

FACTOR = 1.5  # two shares agree when neither is more than this many times the other
LIFT = 1.1  # an overlap is above chance when its lift is above this
# The shares that the document gives: all along, or at the start and at the end of training.
DOCUMENT = {"checkpoint1": 0.60, "checkpoint2": (0.40, 0.20), "checkpoint3": (0.03, 0.10), "checkpoint4": (0.03, 0.06)}
DOCUMENT_SETS = {"reference": 6e6, "overlap": 4e6, "parameters": 1.1e7, "intersection": 1e5}  # Experiments 2 and 3


class Claim(NamedTuple):
    claim: str
    rule: str
    measured: str
    n: str
    verdict: str


def verdict(holds: bool | None) -> str:
    return {True: "holds", False: "does not hold", None: "cannot be judged"}[None if holds is None else bool(holds)]


def as_markdown(claims: list[Claim]) -> str:
    """The claims as one Markdown table."""
    lines = ["| claim | rule | measured | n | verdict |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {c.claim} | {c.rule} | {c.measured} | {c.n} | **{c.verdict}** |" for c in claims])


def percent(share: float, digits: int = 0) -> str:
    return "–" if share != share else f"{100 * share:.{digits}f} %"


def start_and_end(values: pd.Series) -> tuple[float, float]:
    """The means of the first and of the last tenth of the values, one of them at least."""
    k = max(1, len(values) // 10)
    return float(values.iloc[:k].mean()), float(values.iloc[-k:].mean())


def agree(a: float, b: float) -> bool:
    """Whether two shares agree within the factor.

    >>> agree(0.3, 0.4), agree(0.2, 0.4)
    (True, False)
    """
    return 1 / FACTOR <= a / b <= FACTOR if b else a == b


def fraction_claims(probes: pd.DataFrame, of: str) -> list[Claim]:
    """The document's claims on the shares over training; `of`: what the shares of `probes` are of, in words."""
    n, enough = f"{len(probes)} probes", len(probes) >= 20
    above = float((probes.checkpoint1 > DOCUMENT["checkpoint1"]).mean())
    start, end = start_and_end(probes.checkpoint1)
    claims = [
        Claim(
            f"over 60 % of {of} in checkpoint 1 during training",
            "above 60 % in at least 90 % of the probes",
            f"above in {percent(above)} of them; {percent(start)} → {percent(end)}",
            n,
            verdict(above >= 0.9 if enough else None),
        )
    ]
    for name in ("checkpoint2", "checkpoint3", "checkpoint4"):
        first, last = DOCUMENT[name]
        a, b = start_and_end(probes[name])
        right = agree(a, first) and agree(b, last)
        claims.append(
            Claim(
                f"checkpoint {name[-1]} from {percent(first)} to {percent(last)} of {of}",
                f"first and last tenth of the probes both within a factor {FACTOR:g}",
                f"{percent(a, 1)} → {percent(b, 1)}",
                n,
                verdict(right if enough else None),
            )
        )
    rule = "last tenth of the probes not below 95 % of the first"
    measured = f"{percent(start)} → {percent(end)}"
    kept = end >= 0.95 * start
    claims.append(Claim(f"checkpoint 1 does not decrease ({of})", rule, measured, n, verdict(kept if enough else None)))
    return claims


def ratio_claims(probes: pd.DataFrame) -> list[Claim]:
    """Project 2's two observations on the ratio |g'| / |g| within checkpoint 1."""
    inside = probes[list(BINS)].div(probes.checkpoint1, axis=0)
    ends = {name: start_and_end(inside[name]) for name in BINS}
    n, enough = f"{len(probes)} probes", len(probes) >= 20
    largest = max(BINS, key=lambda name: ends[name][0])
    start, end = ends["bin1"]
    large = [sum(ends[name][k] for name in BINS[2:]) for k in (0, 1)]  # ratio at least 1.5
    falls = largest == "bin1" and end < start / FACTOR
    return [
        Claim(
            "ratios below 1.2 are the most at first, then decrease fast",
            f"the largest of the seven in the first tenth of the probes, and down by a factor {FACTOR:g} in the last",
            f"{percent(start)} → {percent(end)} of checkpoint 1; largest at first: bin {largest[-1]}",
            n,
            verdict(falls if enough else None),
        ),
        Claim(
            "later the ratio increases",
            f"the share with a ratio of at least 1.5 up by a factor {FACTOR:g} from the first to the last tenth",
            f"{percent(large[0])} → {percent(large[1])} of checkpoint 1",
            n,
            verdict(large[1] > FACTOR * large[0] if enough else None),
        ),
    ]


def persistence_claims(table: pd.DataFrame) -> list[Claim]:
    """Experiment 2, a pair of claims a reference step: the document's share, and whether it is more than chance."""
    document, claims = DOCUMENT_SETS["overlap"] / DOCUMENT_SETS["reference"], []
    for step, rows in table.groupby("reference_step"):
        late = rows.sort_values("step").iloc[-max(1, len(rows) // 10) :]
        share, chance, lift = late.share.mean(), late.expected_share.mean(), late["lift"].mean()
        n, enough = f"{len(late)} of {len(rows)} later probes", len(rows) >= 10
        claims += [
            Claim(
                f"of the set at step {step}, {percent(document)} are in checkpoint 1 again at the end",
                f"last tenth of the later probes within a factor {FACTOR:g}",
                percent(share, 1),
                n,
                verdict(agree(share, document) if enough else None),
            ),
            Claim(
                f"they are there *because* they were at step {step}",
                f"lift above {LIFT:g} in the last tenth",
                f"chance {percent(chance, 1)}, lift {lift:.3f}",
                n,
                verdict(lift > LIFT if enough else None),
            ),
        ]
    return claims


def intersection_claims(table: pd.DataFrame, later: int = 5) -> list[Claim]:
    """Experiment 3: the same parameters do not stay over consecutive steps; `later` steps after the reference."""
    claims = []
    for step, rows in table.groupby("reference_step"):
        row = rows[rows.steps == later + 1]
        share, chance = (float(row[c].iloc[0]) if len(row) else float("nan") for c in ("share", "expected_share"))
        claims.append(
            Claim(
                f"{later} steps after step {step} few of the same parameters are left",
                "less than a tenth of the set has been in checkpoint 1 at every step since",
                f"{percent(share, 1)}; independent sets would leave {percent(chance, 1)}",
                f"{later + 1} consecutive sets" if len(row) else "0",
                verdict(share < 0.1 if len(row) else None),
            )
        )
    return claims


def convergence_claims(table: pd.DataFrame) -> list[Claim]:
    """ "60 % of parameters do not converge": at the last measured epoch, over the active parameters."""
    last = table.sort_values("epoch").iloc[-1]
    least, most = max(0.0, last.moving + last.not_at_zero - 1), last.moving  # of those that do both
    n = f"{int(last.active):,} active parameters, one run"
    return [
        Claim(
            "60 % of the parameters still move at the end",
            "at least 60 % would move by over 1 % of their weight in one more epoch of such steps",
            percent(last.moving, 1),
            n,
            verdict(last.moving >= 0.6),
        ),
        Claim(
            "60 % of the parameters are not at a minimum at the end",
            "at least 60 % have a gradient that differs from zero, corrected for the 5 % of chance",
            f"{percent(last.significant, 1)} differ, corrected {percent(last.not_at_zero, 1)}",
            n,
            "holds" if last.not_at_zero >= 0.6 else "not shown: too few gradients differ from zero on this sample",
        ),
        Claim(
            "60 % of the parameters do not converge",
            "at least 60 % do both: move, with a gradient that differs from zero",
            f"between {percent(least, 1)} and {percent(most, 1)}",
            n,
            verdict(least >= 0.6 if least >= 0.6 or most < 0.6 else None),
        ),
    ]


def threshold_claims(table: pd.DataFrame) -> list[Claim]:
    """Project 1's claims, on a table of thresholds_with_chance."""
    n, enough = f"{len(table)} epochs of one run", len(table) >= 5
    above = float((table.share > 0.6).mean())
    lift = mean_interval(table["lift"])
    trend = {name: correlation(table.epoch, table[name], "spearman") for name in ("threshold", "share")}
    return [
        Claim(
            "over 60 % of checkpoint 1 exceed the threshold",
            "above 60 % at 90 % of the epochs or more",
            f"at {percent(above)} of them; mean {percent(table.share.mean(), 1)}",
            n,
            verdict(above >= 0.9 if enough else None),
        ),
        Claim(
            "*therefore* checkpoint 1 has the large gradients",
            f"the mean lift over k / active is above {LIFT:g}",
            f"chance {percent(table.chance.mean(), 1)}, lift {lift.format(1, 3)}",
            n,
            verdict(lift.mean > LIFT if enough else None),
        ),
        Claim(
            "the gradient magnitude increases in training",
            "Spearman of the threshold with the epoch: interval above 0",
            interval(trend["threshold"]),
            n,
            judged(trend["threshold"]),
        ),
        Claim(
            "the share above the threshold increases",
            "Spearman of the share with the epoch: interval above 0",
            interval(trend["share"]),
            n,
            judged(trend["share"]),
        ),
    ]


def interval(estimate: Estimate) -> str:
    """A correlation with its interval, in words."""
    bounds = "no interval" if estimate.low != estimate.low else f"{estimate.low:+.2f} to {estimate.high:+.2f}"
    return "not defined" if estimate.mean != estimate.mean else f"{estimate.mean:+.2f} ({bounds}, n={estimate.n})"


def judged(estimate: Estimate, precise: float = 0.3) -> str:
    """A positive correlation: shown, refuted (negative, or its interval holds 0 and is narrow), or neither."""
    if estimate.low > 0:
        return verdict(True)
    return verdict(False if estimate.high < 0 or estimate.half < precise else None)


def generalization_claims(runs: pd.DataFrame, table: pd.DataFrame) -> list[Claim]:
    """Project 3: `runs` of checkpoint1_by_run, `table` of correlations."""
    rows = {(r.runs, r.method): Estimate(r.r, r.low, r.high, r.n) for r in table.itertuples()}
    order = correlation(-runs.rho, runs.last_quarter, "spearman")
    n = f"{len(runs)} runs, {runs.rho.nunique()} ρ"
    return [
        Claim(
            "a larger ρ means fewer parameters in checkpoint 1",
            "Spearman of −ρ with the share: interval above 0",
            interval(order),
            n,
            judged(order),
        ),
        Claim(
            "more checkpoint 1, better test accuracy",
            "Pearson over all runs: interval above 0; refuted if it is below 0, or holds 0 and is narrower than ±0.3",
            interval(rows["all runs", "Pearson"]),
            n,
            judged(rows["all runs", "Pearson"]),
        ),
        Claim(
            "and not only because ρ moves both",
            "Pearson within ρ, by the same rule",
            interval(rows["within ρ", "Pearson"]),
            n,
            judged(rows["within ρ", "Pearson"]),
        ),
    ]


def scan_claims(table: pd.DataFrame, rho: float) -> list[Claim]:
    """ "Each parameter has its own threshold", on a table of leaving, by epoch; rho: the one to look at."""
    claims = []
    for epoch, rows in table[table.kind == "all"].groupby("epoch"):
        at = rows.iloc[(rows.rho - rho).abs().argmin()]
        fall = 1 - rows.share.iloc[-1] / rows.share.iloc[0]
        n = f"{int(rows.still.iloc[0]):,} parameters, {len(rows)} ρ"
        claims += [
            Claim(
                f"on fixed weights (epoch {epoch}) checkpoint 1 shrinks as ρ grows",
                "its share falls by a tenth or more from the smallest to the largest ρ",
                f"{percent(rows.share.iloc[0])} → {percent(rows.share.iloc[-1])}",
                n,
                verdict(fall >= 0.1),
            ),
            Claim(
                f"each parameter has its own threshold (epoch {epoch})",
                f"at ρ = {at.rho:g} at least 90 % of the members never were outside at a smaller ρ",
                f"{percent(1 - at.newcomers, 1)} never were",
                n,
                verdict(at.newcomers <= 0.1),
            ),
        ]
    return claims


def trends(table: pd.DataFrame) -> dict[str, str]:
    """Spearman of the threshold, and of the share above it, with the epoch, in words."""
    return {name: interval(correlation(table.epoch, table[name], "spearman")) for name in ("threshold", "share")}


def noise_of_entries(diagonal: pd.DataFrame) -> float:
    """At the last epoch: an entry's median error over half the distance of the quartiles, mean over checkpoints."""
    last = diagonal[(diagonal.epoch == diagonal.epoch.max()) & (diagonal.checkpoint > 0)]
    return float((last.noise / ((last.q75 - last.q25) / 2)).mean())


def curvature_claims(ranks: pd.Series, diagonal: pd.DataFrame, clear: float = 0.1) -> list[Claim]:
    """Flat or sharp: `ranks`, Spearman of |diagonal| and |g| among the active, by epoch; `diagonal`: that table."""
    last = diagonal[diagonal.epoch == diagonal.epoch.max()].set_index("checkpoint").drop(index=0)
    first, others = last.loc[1], last.drop(index=1)
    rest = (others["mean"] * others.parameters).sum() / others.parameters.sum()
    error = ((others.standard_error * others.parameters) ** 2).sum() ** 0.5 / others.parameters.sum()
    apart, both = first["mean"] - rest, (first.standard_error**2 + error**2) ** 0.5
    n = f"{len(ranks)} epochs of one run"
    return [
        Claim(
            "a higher gradient magnitude means more flatness",
            f"rank correlation of \\|diagonal\\| and \\|g\\| below −{clear:g} at every epoch",
            f"{ranks.min():+.2f} to {ranks.max():+.2f}",
            n,
            verdict(ranks.max() < -clear),
        ),
        Claim(
            "a higher gradient magnitude means a sharper region",
            f"the same above +{clear:g} at every epoch, an entry's error under a quarter of the quartiles' distance",
            f"{ranks.min():+.2f} to {ranks.max():+.2f}; error {noise_of_entries(diagonal) / 2:.2f} of that distance",
            n,
            verdict(ranks.min() > clear if noise_of_entries(diagonal) < 0.5 or ranks.min() <= clear else None),
        ),
        Claim(
            "checkpoint 1 is in a sharper region than the other checkpoints",
            f"at the last epoch its mean diagonal is above theirs by a factor {FACTOR:g} and by two standard errors",
            f"{first['mean']:.1e} against {rest:.1e}, difference {apart:.1e} ± {both:.0e}",
            f"{int(last.parameters.sum()):,} parameters",
            verdict(apart > 2 * both and first["mean"] > FACTOR * rest),
        ),
    ]


def prediction_claims(table: pd.DataFrame) -> list[Claim]:
    """Is a checkpoint a matter of the second order? `table`: geometry.at_rho at the run's own rho."""
    gain = ((table.right - table.constant) / (1 - table.constant)).min()
    return [
        Claim(
            f"at ρ = {table.rho.iloc[0]:g} the checkpoints are decided to second order",
            "at every epoch the expansion gets at least 75 % of those right that the commonest code misses",
            f"at least {percent(gain)}",
            f"{len(table)} epochs, {int(table.parameters.iloc[0]):,} parameters",
            verdict(gain >= 0.75),
        )
    ]
