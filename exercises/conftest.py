"""`python -m pytest exercises -q`: how far are you? One that is not begun is skipped, not an error."""


def pytest_terminal_summary(terminalreporter):
    counts = {kind: len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed", "skipped")}
    terminalreporter.write_line(f"{counts['passed']} of {sum(counts.values())} done")
