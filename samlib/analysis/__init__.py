"""Reads studies. How the parts fit:

    results.load(study) -> Results        runs, tables, pairs, differences: every number is read through it
    regimes, geometry, ablation, noise    tables: functions of a Results that return a DataFrame of Estimates
    claims_regimes, _geometry, _noise     claims: a quote, a rule, a function of a Results that yields findings
    tables.table, tables.draw             show a table or a figure, or say that it is not measured
    claim.ledger(results, notebook)       what all claims say of these runs, as a DataFrame
    figures_regimes, _geometry, _ablation functions of a Results (or a table) that return a Figure with a caption
    figures.save, figures.show            the one way to keep and to display it

A claim, whole:

    @claim("regimes", notebook="05_data_regimes", quote="SAM beats SGD", documented="+0.5 points",
           rule="test accuracy, SAM minus SGD, paired by seed, same ρ: the 95 % interval lies above zero")
    def sam_beats_sgd(results):
        for rho, difference in results.differences("sam", "sgd", by=("rho",)).items():
            yield Finding(f"ρ = {rho:g}", difference, decide(difference, above=0))

A figure, whole:

    def accuracy_over_rho(results):
        figure, axes = figures.figure()
        for mix, means in results.means("test_accuracy").groupby(level="mix"):
            ...
        return figures.describe(figure, "Test accuracy of each mix over ρ.", results.caption())

and in a notebook, a line each; what the runs lack is said in place of it, by the NotMeasured that the function raises:

    table(ledger(results, notebook="05_data_regimes"))
    draw(figures_regimes.accuracy_over_rho, results, "05_accuracy", folder)
    table(regimes.accuracy, results)

A notebook has one cell tagged `parameters`, and every code cell, that one too, is tagged `hide-input`: a report leaves
its source out. Its parameters are study, root, grid (and other grids), figures, overrides, annotated and explained.
"""
