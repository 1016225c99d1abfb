"""How many decoding steps a rollout of the preset `8b` takes, simulated: `python benchmarks/schedule.py`.

The dialogs run through `rollout.rollout` itself, but without a model and without programs: responses have
random lengths (log-normal with a median of 300 tokens, cut at 1,024), prompts a median of 600 tokens, 12 % of
the responses pass, and a response's tests take 0.2 s, of 3 % of them 5 s (programs that hang). A decoding
step counts as 25 ms. These figures are assumptions about an 8B model on CodeContests, not measurements.

128 dialogs (1,024 on 8 ranks) share the rows of the cache. "half": results are read only when half of the
seated dialogs wait for their tests, as in our first version, which had 24 rows. Else results are also read
after so many steps. Means of five runs.
"""

import math
import random
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

# In front of this file's own directory, which has a sandbox.py too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout  # noqa: E402
from data import Problem  # noqa: E402
from sandbox import IoTest, TestResult, Verdict  # noqa: E402

PROMPT, END, FIRST = 0, 1, 2  # token ids; the ids of a response count upwards from FIRST
DIALOGS, LONGEST, MEDIAN, SIGMA = 128, 1024, 300, 0.6
STEP_SECONDS, PASSES, HANGS = 0.025, 0.12, 0.03


def survival(length: int) -> float:
    """Share of the responses that are longer than `length` tokens."""
    return 0.5 * math.erfc(math.log(length / MEDIAN) / (SIGMA * math.sqrt(2))) if length else 1.0


class Simulation:
    """What stands in for the model and the sandbox, and counts what they are asked to do."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.steps = self.row_steps = self.prefills = 0
        self.stalled = 0.0  # seconds in which decoding waited for tests

    def prefill(self, model, cache, rows: slice, new_ids: list[list[int]]) -> None:
        self.prefills += 1
        for row, ids in zip(range(rows.start, rows.stop), new_ids, strict=True):
            cache.lengths[row] += len(ids)

    def decode(self, model, cache, tokens: list[int]) -> torch.Tensor:
        self.steps += 1
        self.row_steps += len(tokens)
        cache.lengths[: len(tokens)] = [length + 1 for length in cache.lengths[: len(tokens)]]
        return torch.tensor(tokens, dtype=torch.float64)  # (n,) the last tokens instead of logits

    def sample_tokens(self, last: torch.Tensor, noise: torch.Tensor, *_) -> tuple[torch.Tensor, torch.Tensor]:
        following = [max(FIRST, int(token) + 1) for token in last]
        hazards = [1 - survival(t - FIRST + 1) / survival(t - FIRST) for t in following]
        ended = noise < torch.tensor(hazards)  # (n,)
        return torch.where(ended, END, torch.tensor(following)), torch.zeros(len(last))  # (n,), (n,)

    def now(self) -> float:
        return self.steps * STEP_SECONDS + self.stalled

    def submit(self, job) -> SimpleNamespace:
        ready = self.now() + (5.0 if self.draw.random() < HANGS else 0.2)
        passed = self.draw.random() < PASSES
        return SimpleNamespace(result=lambda: self.read(ready, passed))

    def read(self, ready: float, passed: bool) -> list[TestResult]:
        self.stalled += max(0.0, ready - self.now())
        return [TestResult(Verdict.PASSED if passed else Verdict.WRONG_ANSWER)]


def simulate(testing_steps: float, rows: int, seed: int) -> Simulation:
    """A rollout of one rank of `8b`."""
    simulation, prompts = Simulation(seed), random.Random(seed)
    rollout.TESTING_STEPS = testing_steps
    for name in ("prefill", "decode", "sample_tokens"):
        setattr(rollout, name, getattr(simulation, name))
    rollout.as_chat = lambda chat: chat
    rollout.prompt_ids = lambda *_: [PROMPT] * int(600 * math.exp(prompts.gauss(0, 0.5)))
    rollout.observation_ids = lambda *_: [PROMPT] * 300
    rollout.stop_ids = lambda chat: {END}
    rollout.extract_code = lambda text, entry_point: text
    nothing = SimpleNamespace(text=lambda ids: "pass", final_answer=lambda text: text)
    device = SimpleNamespace(type="cuda")
    model = SimpleNamespace(
        training=False, eval=bool, train=bool, num_parameters=lambda: 8_000_000_000, device=device
    )
    problem = Problem("simulated", "", (IoTest("", ""),), (IoTest("", ""),))
    settings = rollout.RolloutSettings(max_new_tokens=LONGEST, context=8192, batch_rows=rows)
    rollout.rollout(model, nothing, [problem] * DIALOGS, simulation, settings, seed)
    return simulation


if __name__ == "__main__":
    print("rows  read after   steps  busy rows  prefills  stalled s  total s   steps against the first")
    first = None
    for rows in (24, 32, 48):
        for testing_steps in (math.inf, 64, 32, 16, 8):
            runs = [simulate(testing_steps, rows, seed) for seed in range(5)]
            steps, prefills, stalled, total = (
                statistics.mean(figures)
                for figures in zip(*((r.steps, r.prefills, r.stalled, r.now()) for r in runs), strict=True)
            )
            first = first or steps
            named = "half" if testing_steps == math.inf else f"{testing_steps} steps"
            busy = sum(run.row_steps for run in runs) / sum(run.steps for run in runs)
            print(
                f"{rows:>4}  {named:>10}  {steps:>6.0f}  {busy:>9.1f}  {prefills:>8.0f}  {stalled:>9.0f}"
                f"  {total:>7.0f}  {steps / first - 1:>+24.0%}"
            )
