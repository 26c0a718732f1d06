"""The first document's claims: when SAM beats SGD, by data size and label noise."""

from collections.abc import Iterator

from samlib.analysis.claim import Finding, claim
from samlib.analysis.results import Results
from samlib.analysis.stats import decide


@claim(
    "regimes", notebook="05_data_regimes",
    quote="Sharpness-Aware Minimization (SAM) provides a generalization benefit over SGD: 100 % of the data, clean",
    rule="test accuracy, SAM minus SGD, paired by seed, each ρ: the 95 % interval lies above zero",
)  # fmt: skip
def sam_beats_sgd_on_all_clean_data(results: Results) -> Iterator[Finding]:
    gain = results.differences("sam", "sgd", by=("data_fraction", "noise_fraction", "rho"))
    for (data, noise, rho), difference in gain.items():
        if data == 1 and noise == 0:
            yield Finding(f"ρ = {rho:g}", difference, decide(difference, above=0))
