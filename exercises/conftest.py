"""`python -m pytest exercises -q` ends with how many of the exercises are done."""


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(terminalreporter.stats.get('passed', ()))} of 8 done")
