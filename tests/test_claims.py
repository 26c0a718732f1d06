import pytest
from fake_runs import write_run, write_study

from samlib.analysis import claim as module
from samlib.analysis.claim import ASKED, Finding, claim, claims, in_short, ledger, overall
from samlib.analysis.results import load
from samlib.analysis.stats import VERDICTS, Estimate, decide
from samlib.study import Study


@pytest.fixture
def results(tmp_path):
    study = Study.load(write_study(tmp_path / "s.yaml", {"main": {"mix": ["sgd", "sam"], "seed": [0, 1, 2]}}))
    for config in study.configs():
        write_run(tmp_path / "runs", config, test_accuracy=0.8 + 0.01 * config.seed + 0.05 * (config.mix == "sam"))
    return load(study, tmp_path / "runs")


@pytest.fixture
def alone(monkeypatch):
    """A registry of its own."""
    claims()
    monkeypatch.setattr(module, "_registry", {})


def test_a_claim_is_judged_by_its_rule_on_the_runs(results, alone):
    @claim("regimes", notebook="05_data_regimes", quote="SAM beats SGD", rule="above zero", documented="+0.5")
    def sam_wins(results):
        return [Finding("all", e, decide(e, above=0)) for e in results.differences("sam", "sgd", by=("rho",))]

    row = ledger(results).loc["sam_wins"]
    assert (row.measured, row.n, row.verdict, row.documented) == ("+5.0 ± 0.1 points (n=3)", "3", "holds", "+0.5")
    assert ledger(results, "05_data_regimes").verdict.tolist() == ["holds"]
    assert ledger(results, "06_checkpoint_ablation").empty and not claims(subject="noise")
    assert row.claim == "“SAM beats SGD”"


def test_what_is_told_or_asked_here_stands_without_quotation_marks(results, alone):
    claim("noise", quote="Fewer flips (in our words)", name="told", not_measured="no paper")
    claim("noise", quote="It is checkpoint 2", document=ASKED, name="asked", not_measured="no run")
    claim("noise", quote="their interaction, read as: it grows", name="read", not_measured="no run")
    quoted = "“their interaction”, read as: it grows"
    assert ledger(results).claim.tolist() == ["Fewer flips (in our words)", "It is checkpoint 2", quoted]


def test_a_claim_without_its_tables_is_not_measured_and_says_why(results, alone):
    @claim("noise", quote="", rule="")
    def needs_a_table(results):
        return [Finding("", results.table("noise").run.iloc[0], "holds")]

    @claim("noise", quote="", rule="")
    def finds_nothing(results):
        yield from ()

    claim("noise", quote="", name="cannot_be", not_measured="its data are not published")
    table = ledger(results)
    assert table.verdict.tolist() == ["not measured"] * 3
    assert "has the table 'noise'" in table.measured["needs_a_table"]
    assert "of this kind" in table.measured["finds_nothing"]
    assert table.measured["cannot_be"] == "its data are not published"


def test_a_claims_error_is_not_hidden_as_a_verdict(results, alone):
    @claim("noise", quote="", rule="")
    def broken(results):
        raise KeyError("column")

    with pytest.raises(KeyError):
        ledger(results)


def test_a_claim_holds_overall_where_most_hold_and_none_is_contradicted():
    def of(*verdicts):
        return overall([Finding("", "", v) for v in verdicts])

    assert of("holds", "holds", "undecided", "not measured") == "holds"
    assert of("holds", "undecided") == "undecided"
    assert of("holds", "holds", "contradicted") == "undecided"
    assert of("contradicted", "contradicted", "undecided") == "contradicted"
    assert of("not measured") == of() == "not measured"


def test_several_findings_are_shown_as_their_range_and_counts():
    found = [
        Finding("", Estimate(v, v - 0.01, v + 0.01, 3, "points", True), w)
        for v, w in ((0.02, "holds"), (0, "undecided"))
    ]
    assert in_short(found) == "+0.0 ± 1.0 points to +2.0 ± 1.0 points; 2 comparisons: 1 holds, 1 undecided"


def test_every_claim_of_the_project_has_a_quote_and_a_rule_or_a_reason(results):
    assert claims() and all(c.quote and (c.rule or c.reason) for c in claims())
    assert set(ledger(results).verdict) <= set(VERDICTS)
