import pytest
from fake_runs import write_run, write_study

from samlib.analysis import claim as module
from samlib.analysis.claim import ASKED, Finding, by_chance, claim, claims, in_short, ledger, overall, repeated
from samlib.analysis.results import NotMeasured, load
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


def test_a_rule_of_several_parts_holds_in_a_setting_where_each_does_and_is_contradicted_where_any_is():
    def of(**settings):
        found = [Finding(name, "", v, what=f"part {k}") for name, vs in settings.items() for k, v in enumerate(vs)]
        return overall(found, every=True)

    assert of(a=["holds", "holds"]) == "holds" and of(a=["holds", "holds", "undecided"]) == "undecided"
    assert of(a=["holds", "contradicted"]) == "contradicted"
    assert of(a=["holds", "holds"], b=["holds", "holds"], c=["holds", "undecided"]) == "holds"
    assert of(a=["holds", "holds"], b=["holds", "contradicted"]) == "undecided"
    assert of(a=["not measured"]) == of() == "not measured"


def test_several_findings_are_shown_as_their_range_and_counts():
    def found(*values, **parts):
        sizes = [Estimate(v, v - 0.01, v + 0.01, 3, "points", True) for v in values]
        return [Finding("", e, w, **parts) for e, w in zip(sizes, ("holds", "undecided"), strict=True)]

    counts = "2 comparisons: 1 holds, 1 undecided"
    assert in_short(found(0.02, 0)) == f"+0.0 ± 1.0 points to +2.0 ± 1.0 points; {counts}"
    assert in_short(found(0.02, 0.02)) == f"+2.0 ± 1.0 points; {counts}"
    one = Finding("", Estimate(0.3, n=1, unit="points", signed=True), "undecided")  # a run alone makes no range
    assert in_short([*found(0.02, 0), one]).startswith("+0.0 ± 1.0 points to +2.0 ± 1.0 points; 3 comparisons")


def test_of_a_rule_of_several_parts_settings_are_counted_as_its_verdict_does():
    found = [Finding("a", "", "holds", what="1"), Finding("a", "", "undecided", what="2"), Finding("b", "", "holds")]
    assert in_short(found, every=True) == "2 settings of 3 comparisons: 1 holds, 1 undecided"
    assert in_short(found) == "3 comparisons: 2 hold, 1 undecided" and overall(found, every=True) == "undecided"


def test_different_quantities_have_no_range():
    sizes = [Estimate(v, v - 0.01, v + 0.01, 3, "points", True) for v in (0.02, 0.0)]
    found = [Finding("here", e, "holds", what=what) for e, what in zip(sizes, ("flips", "accuracy"), strict=True)]
    assert in_short(found) == "2 comparisons: 2 hold" and found[0].comparison == "flips: here"


def test_what_two_studies_measure_on_the_same_runs_counts_once_and_else_the_study_is_named(results, tmp_path, alone):
    @claim("noise", quote="", rule="")
    def gain(results):
        for e in results.differences("sam", "sgd", by=("rho",)):
            yield Finding("everywhere", e, decide(e, above=0))

    (tmp_path / "t.yaml").write_bytes((tmp_path / "s.yaml").read_bytes())
    again, (item,) = load(tmp_path / "t.yaml", tmp_path / "runs"), claims()
    assert item.findings(results, again) == item.findings(results) and len(item.findings(results)) == 1
    other = Study.load(write_study(tmp_path / "u.yaml", {"main": {"mix": ["sgd", "sam"], "seed": [5, 6], "width": 8}}))
    for config in other.configs():
        write_run(tmp_path / "runs", config, test_accuracy=0.8)
    found = item.findings(results, again, load(other, tmp_path / "runs"))
    assert [f.comparison for f in found] == ["everywhere (s)", "everywhere (u)"]


def test_a_claim_is_not_judged_on_what_came_before_an_error(results, alone):
    @claim("noise", quote="", rule="")
    def broken_off(results):
        yield Finding("", Estimate(1.0, 0.5, 1.5, 3), "holds")
        raise NotMeasured("the second half lacks its runs")

    (row,) = ledger(results).itertuples()
    assert (row.verdict, row.measured) == ("not measured", "the second half lacks its runs")


def test_every_claim_of_the_project_has_a_quote_and_a_rule_or_a_reason(results):
    assert claims() and all(c.quote and (c.rule or c.reason) for c in claims())
    assert set(ledger(results).verdict) <= set(VERDICTS)


def test_how_many_intervals_chance_alone_makes_wrong_is_one_in_twenty_of_those_that_can_decide(results, alone):
    @claim("noise", quote="", rule="")
    def many(results):
        sizes = [Estimate(1.0, 0.5, 1.5, 3)] * 9 + [Estimate(1.0, 0.9, 1.1, 2), Estimate(1.0, n=1), "words"]
        return [Finding(str(k), e, "undecided") for k, e in enumerate(sizes)]

    assert by_chance({"here": [results]}).to_numpy().tolist() == [["here", 11, 9, "0.5"]]


def test_what_other_seeds_decide_alike_or_the_other_way_is_counted(results, tmp_path, alone):
    said = {"s": "HHHCCUUNH", "again": "HUCCHHUH", "other": "HHHHHHHHH"}
    words = {"H": "holds", "C": "contradicted", "U": "undecided", "N": "not measured"}

    @claim("noise", quote="", rule="")
    def many(results):
        return [Finding(str(k), "", words[letter]) for k, letter in enumerate(said[results.study.name])]

    text = (tmp_path / "s.yaml").read_text()
    (tmp_path / "again.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text(text.replace("made-up digits", "other images"))
    again, other = (load(tmp_path / f"{name}.yaml", tmp_path / "runs") for name in ("again", "other"))
    counts = {"decided by first": 6, "of these it has": 5, "alike": 2, "undecided": 1, "the other way": 2}
    table = repeated({"first": [results], "again": [again], "elsewhere": [other]})
    assert table.to_dict("index") == {"again": counts | {"decided by it alone": 1}}
    with pytest.raises(NotMeasured, match="no other column is of the data of first"):
        repeated({"first": [results], "elsewhere": [other]})
