"""The paper's results (tables 1 to 3 and 4b), which `evaluate.py` prints below runs on the same problems."""

import re

COLUMNS = (  # problem set, split (empty: any), measure
    ("codecontests", "valid", "1@3"),
    ("codecontests", "test", "1@3"),
    ("humanevalplus", "", "1@3"),
    ("mbppplus", "", "1@3"),
    ("codecontests", "valid", "10@100"),
    ("codecontests", "test", "10@100"),
)
# In percent, at turn limit 3; "single turn" has three independent responses instead. On CodeContests' test
# split, 11.6, 9.5 and 25.9 are from table 3b; table 2 has 11.8, 9.7 and 26.2.
RESULTS = {
    "paper, 8B Instruct": (8.9, 10.5, 63.9, 60.5, 21.7, 24.8),
    "paper, 8B Instruct, single turn": (9.4, 11.6, 65.3, 58.3, None, None),
    "paper, 8B, few-shot": (8.5, 8.5, None, None, None, None),
    "paper, 8B, SFT": (10.3, 10.0, None, None, None, None),
    "paper, 8B, single-turn RL": (10.2, 10.9, None, None, None, None),
    "paper, 8B, RLEF without feedback": (12.2, 10.9, None, None, None, None),
    "paper, 8B, RLEF with token-level values": (13.1, 13.7, None, None, None, None),
    "paper, 8B, RLEF": (17.2, 16.0, 69.5, 63.1, 29.8, 28.7),
    "paper, 8B, RLEF, single turn": (16.2, 9.5, 67.5, 57.0, None, None),
    "paper, 70B Instruct": (25.9, 27.5, 75.0, 70.2, 50.2, 50.3),
    "paper, 70B Instruct, single turn": (25.6, 25.9, 73.2, 66.9, None, None),
    "paper, 70B, few-shot": (22.5, 20.3, None, None, None, None),
    "paper, 70B, SFT": (27.7, 27.2, None, None, None, None),
    "paper, 70B, single-turn RL": (31.1, 32.9, None, None, None, None),
    "paper, 70B, RLEF": (37.5, 40.1, 80.4, 72.2, 54.5, 54.5),
    "paper, 70B, RLEF, single turn": (25.8, 30.3, 78.6, 67.6, None, None),
    "paper, gpt-4o-2024-05-13": (None, 24.3, 80.7, 71.7, None, None),
    "paper, gpt-4o-2024-05-13, single turn": (None, 25.3, 82.8, 68.8, None, None),
}


def rows(problems: str, split: str) -> dict[str, dict[str, str]]:
    """The results on these problems by model and measure."""
    # The name of a set, of its repository on the hub and of its files differ in "_", "-" and capitals.
    source, found = re.sub("[^a-z]", "", problems.lower()), {}
    for model, results in RESULTS.items():
        for (name, only_split, measure), result in zip(COLUMNS, results, strict=True):
            if result and name in source and only_split in ("", split):
                found.setdefault(model, {})[measure] = f"{result / 100:.3f}"
    return found
