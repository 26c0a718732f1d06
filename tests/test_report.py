"""README, markdown report and HTML page say what the ledger says, and nothing of their own."""

import re
from dataclasses import replace

import nbformat
import pytest
from fake_runs import write_run, write_study

from samlib import PROJECT
from samlib.analysis import figures_claims
from samlib.analysis.claim import claims, columns, ledger, repeated
from samlib.analysis.figures import faults
from samlib.analysis.report import HEADLINES, STUDIES, readme, readme_table, report, write_html, write_readme
from samlib.analysis.results import NotMeasured, load
from samlib.analysis.stats import VERDICTS
from samlib.analysis.tables import SHAPES, claims_page, table
from samlib.config import UserError
from samlib.study import Analysis, Study

GRIDS = {"regimes": {"seed": [0, 1, 2], "mix": ["sgd", "sam"], "noise_fraction": [0.0, 0.4]}}


@pytest.fixture
def found(tmp_path):
    study = Study.load(write_study(tmp_path / "s.yaml", GRIDS, {"rho": 0.1}))
    for c in study.configs():
        write_run(tmp_path / "runs", c, test_accuracy=0.5 + 0.1 * (c.mix == "sam") + 0.01 * c.seed)
    return {"here": [load(study, tmp_path / "runs")]}


def test_the_readmes_table_is_the_ledgers_headlines_at_most_ten(found):
    said = ledger(found["here"])
    lines = readme_table(found).splitlines()
    assert len(lines) == 2 + len(HEADLINES) <= 12
    for name, line in zip(HEADLINES, lines[2:], strict=True):
        assert said.verdict[name] in line and said.claim[name].split("|")[0] in line


def test_a_number_in_the_readmes_prose_is_what_a_comparison_measured(found):
    mark = "<!-- here sam_beats_sgd: 100 % of the data, 40 % flipped -->"
    text = f"SAM is ahead by {mark}what was there<!-- / -->; it <!-- here sam_beats_sgd --><!-- / -->."
    new = readme(text, found)
    assert f"{mark}+10.0 ± 0.1 points (n=3)<!-- / -->; it <!-- here sam_beats_sgd -->holds<!-- / -->." in new
    assert readme(new, found) == new
    for form, shown in (("short", "+10.0 ± 0.1"), ("no unit", "+10.0 ± 0.1 (n=3)")):
        part = f"<!-- here sam_beats_sgd: 100 % of the data, 40 % flipped; {form} -->"
        assert readme(f"{part}<!-- / -->", found) == f"{part}{shown}<!-- / -->"
    twice, mark = found | {"again": found["here"]}, "<!-- again repeated: alike -->"
    alike = repeated(twice).alike["again"]
    assert alike > 0 and readme(f"{mark}<!-- / -->", twice) == f"{mark}{alike}<!-- / -->"
    named = "<!-- here sam_beats_sgd: 100 % of the data, 40 % flipped (a-study) -->"  # which agrees with others by now
    assert readme(f"{named}<!-- / -->", found) == f"{named}+10.0 ± 0.1 points (n=3)<!-- / -->"


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        (
            "<!-- there sam_beats_sgd -->",
            "there is no claim 'sam_beats_sgd' with a column 'there'; the columns are here",
        ),
        ("<!-- here sam_wins -->", "there is no claim 'sam_wins'"),
        ("<!-- here sam_beats_sgd: 5 % -->", "no comparison '5 %'; it has 100 % of the data, 0 % flipped"),
    ],
)
def test_a_number_that_nothing_measures_is_an_error_that_says_what_there_is(found, mark, says):
    with pytest.raises(UserError, match=re.escape(says)):
        readme(f"{mark}<!-- / -->", found)


def test_the_readme_says_what_the_published_runs_give():
    if not (found := columns(STUDIES)):
        pytest.skip("nothing is published under these studies")
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert readme(text, found) == text, "python -m samlib publish STUDY writes it anew"


def test_no_two_findings_of_a_claim_in_a_column_have_one_name():
    for parts in columns(STUDIES).values():
        names = [(c.name, f.comparison) for c in claims() for f in c.findings(*parts)]
        assert len(names) == len(set(names))


def test_write_readme_changes_what_is_between_its_marks_and_nothing_else(tmp_path):
    (tmp_path / "runs/published").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# A\n<!-- findings -->\nold\n<!-- /findings -->\nend\n")
    write_readme(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# A\n<!-- findings -->\n| claim |") and text.endswith("<!-- /findings -->\nend\n")


def test_the_markdown_report_has_the_ledgers_verdicts_and_what_is_not_measured_is_left_out(found, tmp_path):
    text = report(found["here"][0].study, tmp_path / "runs")
    assert "✔ holds" in text and "not measured" not in text and "## Batch size" not in text
    assert "+10.0 ± 0.1 points (n=3)" in text and "6 of" not in text and "12 of 12 runs are finished" in text


def test_the_page_of_all_claims_shows_every_claim_with_a_verdict_by_word_and_shape(found):
    html, said = claims_page(found).data, ledger(found["here"])
    assert html.count('class="v"') == len(said)
    for verdict in VERDICTS:
        assert html.count(f"{SHAPES[verdict]} {verdict}</span>") == (said.verdict == verdict).sum()


def test_the_page_of_all_claims_gives_a_reason_only_where_nobody_can_measure_it_here(found):
    html = re.sub(r' title="[^"]*"', "", claims_page(found).data)
    assert "benchmarks/ measures ratios" in html and "its configuration asks for none" not in html


def test_the_figures_of_all_studies_have_a_row_or_a_panel_a_study_and_can_be_read(tmp_path):
    found, grids, base = {}, {"regimes": GRIDS["regimes"]}, {"rho": 0.1, "augment": False}
    for name, mixes in (("plain", []), ("controls", ["checkpoint1", "shuffled-checkpoint1"])):  # both have two noises
        (tmp_path / name).mkdir()
        ablation = {"seed": [0, 1, 2], "noise_fraction": 0.4, "mix": ["sgd", "sam", *mixes]}
        study = Study.load(write_study(tmp_path / f"{name}.yaml", grids | {"ablation": ablation}, base))
        for c in study.configs():
            gain = {"sam": 0.2, "checkpoint1": 0.1, "shuffled-checkpoint1": 0.15}.get(c.mix, 0)
            if not (tmp_path / name / c.run_id).exists():
                write_run(tmp_path / name, c, test_accuracy=0.5 + gain + 0.01 * c.seed + 0.02 * (name == "plain"))
        found[name] = [load(study, tmp_path / name)]
    shares = load(write_study(tmp_path / "shares.yaml", grids, base), tmp_path / "plain")  # its runs, told once
    rows, panels = figures_claims.rivals(found | {"shares": [shares]}), figures_claims.checkpoints(found)
    assert not faults(rows) + faults(panels)
    labels = [label.get_text() for label in rows.axes[0].get_yticklabels()]
    assert labels == [f"{name}: 100 % of the data, 40 % flipped (n=3)" for name in found]
    (panel,) = panels.axes
    assert panel.get_title(loc="left").startswith("controls") and panel.get_title(loc="left").endswith("(n=3)")
    ends = sorted(round(float(m[0].get_xdata()[0]), 6) for m in panel.containers)
    assert ends == [10, 15, 20]  # points above SGD
    points = {m.get_label(): float(m[0].get_xdata()[0]) for m in rows.axes[0].containers}
    assert points == pytest.approx({"SGD": 51, "SAM": 71, "SGD, clean labels": 51})
    own = load(found["plain"][0].study, tmp_path / "controls")
    first = next(figures_claims.each_study({"own": [own]} | found))
    assert first is own and len([*figures_claims.each_study({"own": [own]} | found)]) == 2
    for drawn in (figures_claims.rivals, figures_claims.flatness, figures_claims.checkpoints):
        with pytest.raises(NotMeasured):
            drawn({})


def test_a_table_of_what_is_not_measured_is_its_sentence(found):
    from samlib.analysis import regimes

    assert table(regimes.batch_means, found["here"][0]).data.startswith("<p>Not measured: ")


def test_the_html_page_holds_the_notebooks_without_their_sources_and_needs_no_other_file(found, tmp_path):
    listed = [Analysis(notebook=name) for name in ("05_data_regimes", "06_x", "07_y")]
    study = replace(found["here"][0].study, notebooks=listed)
    with pytest.raises(UserError, match="no executed notebook"):
        write_html(study, tmp_path, tmp_path / "page.html")
    v4 = nbformat.v4
    picture = {"image/png": "iVBORw0KGgo="}
    shown = v4.new_output("display_data", picture, metadata={"image/png": {"alt": "a rising line"}})
    cells = [v4.new_markdown_cell("# What rises?"), v4.new_code_cell("secret = 1", outputs=[shown])]
    folder = tmp_path / "runs" / study.name
    folder.mkdir()
    nbformat.write(v4.new_notebook(cells=cells), folder / "05_data_regimes.ipynb")
    nbformat.write(v4.new_notebook(cells=cells), folder / "06_x.failed.ipynb")
    out = tmp_path / "deep" / "page.html"
    assert write_html(study, tmp_path / "runs", out) == str(out)
    page = out.read_text()
    assert "<li>06_x: failed when it was last executed</li><li>07_y: not executed</li>" in page
    assert page.count("<section") == 1 and '<a href="#05_data_regimes">What rises?</a>' in page
    assert "secret" not in page and 'alt="a rising line"' in page and "data:image/png;base64," in page
    assert not re.search(r'(src|href)="https?://[^"]*\.(js|css)|<script', page) and "width=device-width" in page
