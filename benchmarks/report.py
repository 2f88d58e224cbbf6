def write(*a): pass
def print_goals(t): pass
def as_text(table):
    o=[f"== {table.id}: {table.title} [{table.unit}] rounds={table.rounds}"]
    for r in table.rows:
        o.append(f"{r.name:40} {r.value.median:9.2f} "+(f"{r.ratio.median:6.2f} ({r.ratio.low:.2f}-{r.ratio.high:.2f})" if r.ratio else ""))
    return "\n".join(o)
