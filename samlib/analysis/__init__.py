"""Reads studies. How the parts fit:

    results.load(study) -> Results     runs, tables, pairs, differences: every number is read through it
    regimes, geometry, ablation, noise tables: functions of a Results that return a DataFrame of Estimates
    claims_*                           claims: a quote, a rule, a function of a Results that yields findings
    claim.ledger(results, notebook)    what all claims say of these runs, as a DataFrame
    figures_*                          functions of a Results that return a Figure with a caption
    tables.table, tables.draw          show a table or a figure, or say that it is not measured

CONTRIBUTING.md has a claim, a figure and a notebook, whole.
"""
