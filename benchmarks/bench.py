"""`python -m samlib bench [gpu]`: measures everything, prints the table, keeps it in benchmarks/results/."""


def bench(what: str, quick: bool = False) -> int:
    """what: cpu or gpu; quick: few and short repeats that show only that it works, and are not kept."""
    if what == "gpu":
        from benchmarks import gpu as table
    else:
        from benchmarks import cpu as table
    table.measure_all(quick)
    return 0
