"""Which of transformers' causal language models can be trained here: a tiny one of each is tried.

    python benchmarks/models.py        # a few minutes; prints the table of docs/models.md

A model is *equal* if its own logits, those of training and those of sampling with our cache agree
(`check_logits` in sampling.py), and if a backward pass through policy and critic works. Otherwise it must be
refused in one sentence: anything else is a bug of ours, and is shown as FAILED. The tiny configurations are
those of tests/test_architectures.py; where they do not fit an architecture, it is not tried.
"""

import logging
import signal
import sys
import warnings
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch  # noqa: E402
import transformers  # noqa: E402
from test_architectures import tiny  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES  # noqa: E402

from ppo import collate, response_logprobs  # noqa: E402
from rollout import Episode, Turn  # noqa: E402
from sampling import check_architecture, check_logits  # noqa: E402
from value_head import ValueModel  # noqa: E402

CONTEXT, SECONDS = 200, 90  # tokens of the longest dialog; for a model, as default sizes of images are large
CAUSES = {
    "cache is not known": "a cache of another kind",
    "differ by": "other logits",
    "fails with": "another interface",
}


def tried(name: str) -> str:
    """What happens to an architecture: "equal", "refused: ...", "not tried: ..." or "FAILED: ..."."""
    try:
        model = tiny(name)
    except Exception as error:
        return f"not tried: {type(error).__name__}"
    try:
        check_architecture(model.config, CONTEXT)
        check_logits(model, 128, CONTEXT)
    except ValueError as error:
        return "refused: " + next((told for part, told in CAUSES.items() if part in str(error)), str(error))
    ids = [5 + n % 100 for n in range(60)]
    episode = Episode(None, ids, [Turn(5, 60, [])], False, False, False, 0)
    batch = collate([episode], torch.device("cpu"))
    response_logprobs(model, batch, 1.0)[0].sum().backward()
    ValueModel(tiny(name))(batch.ids, batch.turn_rows, batch.prompt_columns).sum().backward()
    return "equal"


def main() -> None:
    def too_long(*_) -> None:
        raise TimeoutError

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, too_long)
    found = defaultdict(list)
    for name in NAMES:
        signal.alarm(SECONDS)
        try:
            outcome = tried(name)
        except Exception as error:
            outcome = f"FAILED: {type(error).__name__} {error}"
        signal.alarm(0)
        found[outcome.partition(":")[0] if outcome.startswith("not tried") else outcome].append(name)
    print(f"transformers {transformers.__version__}\n\n| outcome | architectures |\n|---|---|")
    for outcome, names in sorted(found.items()):
        print(f"| {outcome} ({len(names)}) | {' '.join(names)} |")


if __name__ == "__main__":
    main()
