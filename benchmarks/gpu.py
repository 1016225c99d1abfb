"""What a GPU can do: bf16, decoding, updates and memory, at 1B and 8B shapes with random weights.

    python benchmarks/gpu.py [--output FILE] [--parts PART ...] [--small]

Needs one GPU of 80 GB and less than 25 minutes, no network and no weights. Each part is a process with a
limit of seconds: one that fails, hangs or runs out of memory loses no other. FILE gets a line of JSON for
each measurement as it is made; the table that is printed at the end is also in FILE with the suffix .txt.

tests               tests/gpu
ratio 1b, ratio 8b  an iteration: how far the log-probs of sampling, prepare and update are from each other
decode ...          tokens/s of one step after another: as rollouts do it, in CUDA graphs, the same without,
                    and transformers' continuous batching with and without CUDA graphs
update              tokens/s and model FLOP utilisation at 8B's width; the peak of memory against the plan
iteration           seconds that an iteration of --preset 8b would take, computed from the others

With --small everything runs on the CPU with tiny models: that tests this program and measures nothing.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
# In front of this file's own directory, which has a sandbox.py too.
sys.path.insert(0, str(ROOT))
from benchmarks.gpu_parts import (  # noqa: E402
    LARGE,
    SMALL,
    Sizes,
    build,
    card_memory,
    compare_logprobs,
    decode_as_rollouts,
    decode_with_generate_batch,
    iteration_flops,
    measure_update,
    with_layers,
)
from config import PRESETS  # noqa: E402
from evaluate import table  # noqa: E402
from tools import plan  # noqa: E402

# Seconds that each part may take; together 22 minutes.
LIMITS = {
    "machine": 40,
    "tests": 180,
    "ratio 1b": 100,
    "ratio 8b": 140,
    "update": 200,
    "decode": 160,
    "decode eager": 140,
    "decode generate_batch": 160,
    "decode generate_batch graphs": 180,
}
# An iteration on 8 ranks. A simulated rollout phase (schedule.py) has 4,694 steps of 25.1 rows: 920 sampled
# tokens for each of 128 dialogs. Assumed: the tokens of a dialog, all of them and at a decoding step.
RANKS, SAMPLED_TOKENS, BUSY_ROWS, DIALOG_TOKENS, MEAN_CONTEXT = 8, 920, 25.1, 2500, 1500


# ---- measuring ---------------------------------------------------------------------------------------------


def measured(output: Path, row: dict, measure: Callable[..., dict], *arguments) -> None:
    """Append what `measure` returns to `row` and this to the output, or why it failed; free its memory."""
    try:
        row |= measure(*arguments)
    except Exception as error:  # whatever it is, the other cases can still be measured
        row["failed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    write(output, row)
    gc.collect()
    torch.cuda.empty_cache()


def write(output: Path, row: dict) -> None:
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def describe(sizes: Sizes) -> dict:
    """The card and the packages."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    if sizes.config.device != "cuda":
        return found | {"card": "none"}
    return found | {"card": torch.cuda.get_device_name(), "GiB": card_memory("cuda") / plan.GIB}


def run_tests() -> dict:
    """What pytest says about tests/gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "tests/gpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(ended.stdout)
    return {"pytest": ended.stdout.strip().rpartition("\n")[2], "exit code": ended.returncode}


def compare_decoding(sizes: Sizes, output: Path, part: str, measure: Callable, *how: bool) -> None:
    """Measure at all numbers of rows and contexts."""
    shape, device, model = sizes.shapes["8b"], sizes.config.device, None
    cases = [(rows, context) for context in sizes.contexts for rows in sizes.rows]
    for rows, context in cases:
        layers, cached = shape.num_hidden_layers, rows * context * plan.key_value_numbers(shape)
        # 80 % for the weights (all of 8B's) and the cache, in bf16; what does not fit is measured with less.
        while 2 * (8e9 + cached) * layers / shape.num_hidden_layers > 0.8 * card_memory(device):
            layers //= 2
        if model is None or model.config.num_hidden_layers != layers:
            model = None  # frees the old one before the new one is built
            model = build(with_layers(shape, layers), device)
        row = {"part": part, "case": f"{rows} rows, {context} tokens"}
        row |= {"rows": rows, "context": context, "layers": layers}
        measured(output, row, measure, model, sizes, rows, context, *how)


# ---- an iteration ------------------------------------------------------------------------------------------


def extrapolate(rows: list[dict], how: str) -> dict:
    """Seconds of an iteration of --preset 8b on 8 such GPUs; what the ranks send each other is not in it.

    Args: rows: the measurements; how: the part that decodes.
    """
    shape, dialogs = plan.model_shape(PRESETS["8b"]["model"]), PRESETS["8b"]["batch_episodes"] // RANKS
    layers = max(row.get("layers", 0) for row in rows)  # of those that were not cut
    cells = [row for row in rows if row["part"].startswith("decode") and row.get("layers") == layers]
    steps = [cell for cell in cells if cell["part"] == how and "ms a step" in cell]
    contexts = sorted({cell["context"] for cell in steps})
    at_context = []  # milliseconds of a step
    for context in contexts:
        points = [(cell["rows"], cell["ms a step"]) for cell in steps if cell["context"] == context]
        at_context.append(np.interp(BUSY_ROWS, *zip(*points, strict=True)))
    step = float(np.interp(MEAN_CONTEXT, contexts, at_context)) / 1000
    (training,) = (row for row in rows if row["part"] == "update")
    flops = iteration_flops(shape, [DIALOG_TOKENS] * dialogs, SAMPLED_TOKENS * dialogs)
    prompts = dialogs * (DIALOG_TOKENS - SAMPLED_TOKENS)
    seconds = {
        "decoding": step * dialogs * SAMPLED_TOKENS / BUSY_ROWS,
        "prefill": prompts / max(cell.get("prefill tokens/s", 0.0) for cell in cells),
        "prepare": flops[0] / 1e12 / training["prepare TFLOP/s"],
        "update": flops[1] / 1e12 / training["update TFLOP/s"],
    }
    return {f"seconds of {phase}": spent for phase, spent in seconds.items()} | {"all": sum(seconds.values())}


# ---- the parts ---------------------------------------------------------------------------------------------


def run_part(part: str, sizes: Sizes, output: Path) -> None:
    """Measure everything of one part, in this process."""
    decoding = {
        "decode": (decode_as_rollouts, True),
        "decode eager": (decode_as_rollouts, False),
        "decode generate_batch": (decode_with_generate_batch, False),
        "decode generate_batch graphs": (decode_with_generate_batch, True),
    }
    row = {"part": part, "case": "8b"}
    if part in decoding:
        compare_decoding(sizes, output, part, *decoding[part])
    elif part == "machine":
        measured(output, row | {"case": ""}, describe, sizes)
    elif part == "tests":
        measured(output, row | {"case": "tests/gpu"}, run_tests)
    elif part == "update":
        with tempfile.TemporaryDirectory() as place:
            measured(output, row, measure_update, sizes, Path(place))
    else:
        name = part.removeprefix("ratio ")
        measured(output, row | {"case": name}, compare_logprobs, sizes, name)


def guarded(command: Sequence[str], part: str, seconds: float, output: Path) -> None:
    """Run a part as a process, until its time is over; what it had not measured by then is a row too."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
        failed = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        failed = f"not finished after {seconds:.0f} seconds"
    finally:  # also after Ctrl-C, which the part does not receive
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if failed:
        write(output, {"part": part, "case": "the rest", "failed": failed})


def as_table(rows: list[dict]) -> str:
    """All measurements, a table for each part."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        cells = {row["case"]: row for row in rows if row["part"] == part}
        for case, row in cells.items():
            figures = [(n, v) for n, v in row.items() if n not in ("part", "case", "rows", "context")]
            cells[case] = {n: f"{v:.4g}" if isinstance(v, float) else str(v) for n, v in figures}
        lines += [part, table(cells), ""]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "benchmarks" / "gpu.jsonl", help="file of the measurements")
    add("--parts", nargs="+", choices=LIMITS, default=[*LIMITS], metavar="PART", help="default: all")
    add("--small", action="store_true", help="tiny models on the CPU")
    add("--inside", action="store_true", help=argparse.SUPPRESS)  # this process is a part
    given = parser.parse_args(words)
    output = given.output.resolve()
    if given.inside:
        run_part(given.parts[0], SMALL if given.small else LARGE, output)
        return
    if not given.small and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: there is no GPU that torch can use; --small tries everything on the CPU")
    output.write_text("")
    for part in given.parts:
        command = [sys.executable, __file__, "--inside", "--parts", part, "--output", str(output)]
        guarded(command + ["--small"] * given.small, part, LIMITS[part], output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for how in ("decode", "decode eager"):
        measured(output, {"part": "iteration", "case": f"with {how}"}, extrapolate, rows, how)
    text = as_table([json.loads(line) for line in output.read_text().splitlines()])
    output.with_suffix(".txt").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
