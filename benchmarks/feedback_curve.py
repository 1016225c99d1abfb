"""README.md's picture, does the model learn to use feedback: `python benchmarks/feedback_curve.py`.

Trains the toy world with the default settings of `train.py`, stops every second iteration, and evaluates the
policy on the test split (temperature 0.2, top-p 0.95, three turns): once with true feedback and once with
random feedback, which belongs to another problem (the paper's probe of grounding). A model that does not read
its feedback solves as many problems with either; the distance between the curves is what it gains by reading.

It writes `feedback_curve.json` and, with matplotlib, `feedback_curve.png` in this directory. The run is in
`runs/feedback_curve`: call the program again after a stop, and it goes on. `--draw` only draws the picture.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # in front of this file's own directory, which has a sandbox.py too
from config import Config  # noqa: E402
from tools import plots  # noqa: E402
from train import train  # noqa: E402

RUN, RESULTS = ROOT / "runs" / "feedback_curve", Path(__file__).with_suffix(".json")
LAST, STEP = 20, 2  # iterations
# No valid split: then `best/` is the policy of the last iteration. No test split: no table before and after.
SETTINGS = Config(output=str(RUN), valid_split="", test_split="", checkpoint_every=STEP)


def evaluate(iteration: int) -> dict:
    """Shares of the test problems solved within one, two and three turns by `best/`, for both feedbacks."""
    place = RUN / f"evaluation-{iteration}"
    command = [sys.executable, "evaluate.py", "--model", str(RUN / "best"), "--output", str(place)]
    command += "--feedback true random --rollouts 1 --temperature 0.2 --top_p 0.95".split()
    command += ["--max_new_tokens", str(SETTINGS.max_new_tokens), "--context", str(SETTINGS.context)]
    if not (place / "summary.json").exists():
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    summaries = json.loads((place / "summary.json").read_text())
    return {summary["settings"]["feedback"]: summary["solved_by_turn"] for summary in summaries.values()}


def measure() -> None:
    """Train in stages, each of which resumes the one before, and evaluate the policy after each of them."""
    points = []
    for iteration in range(0, LAST + 1, STEP):
        if not (RUN / f"evaluation-{iteration}" / "summary.json").exists():
            begun = str(RUN) if (RUN / "config.json").exists() else ""
            train(replace(SETTINGS, iterations=iteration, resume=begun))
        points.append({"iteration": iteration} | evaluate(iteration))
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(point) for point in points) + "\n]\n")


def draw() -> None:
    """`feedback_curve.png` of the measured points."""
    if not plots.installed("feedback_curve.png"):
        return
    points = json.loads(RESULTS.read_text())
    iterations = [point["iteration"] for point in points]
    figure, axis = plots.pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    curves = {
        "true": ("#2a6fb0", "feedback about\nits own program"),
        "random": ("#c8453c", "feedback about another\nproblem (random feedback)"),
    }
    for kind, (colour, label) in curves.items():
        percent = [100 * point[kind][-1] for point in points]
        axis.plot(iterations, percent, color=colour, marker="o", markersize=4, linewidth=2)
        end = (iterations[-1] + 0.6, percent[-1])
        axis.text(*end, label, color=colour, verticalalignment="center", clip_on=False)
    axis.set_title("RLEF teaches a model to use feedback (toy world)", loc="left")
    axis.set(
        xlabel="training iterations", ylabel="test problems solved within three turns (%)", ylim=(-2, 102)
    )
    axis.set(xlim=(-0.4, LAST + 0.4), xticks=range(0, LAST + 1, 4), yticks=range(0, 101, 20))
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    if sys.argv[1:] != ["--draw"]:
        measure()
    draw()
