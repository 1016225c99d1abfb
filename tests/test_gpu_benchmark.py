"""benchmarks/gpu.py in miniature on the CPU: every part measures, one that fails or hangs loses no other."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import LIMITS, ROOT, as_table, compare_decoding, extrapolate, guarded, main, run_part
from benchmarks.gpu_parts import SMALL, build, forward_flops


def rows_of(output) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()]


# Not "tests", which takes long; a CPU has no CUDA graphs to run generate_batch with.
@pytest.mark.parametrize("part", ["ratio 1b", "ratio 8b", "update", "decode", "decode generate_batch"])
def test_a_part_measures_in_miniature(tmp_path, part):
    run_part(part, SMALL, tmp_path / "rows")
    rows = rows_of(tmp_path / "rows")
    assert len(rows) == (len(SMALL.rows) if part.startswith("decode") else 1)
    for row in rows:
        assert "failed" not in row and row["part"] == part
        assert all(value > 0 for name, value in row.items() if name.endswith("/s"))
    if part.startswith("ratio"):
        (row,) = rows
        assert row["first ratio - 1, worst"] == 0 and 0 < row["largest"] < 0.1
        assert row["gradient"] > 0
        assert row["sampled tokens"] == 2 * 3 * SMALL.config.max_new_tokens  # two dialogs, no right answer


def test_the_command_writes_a_line_for_each_measurement_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.guarded", lambda command, *_: main(command[2:]))  # in this process
    main(["--small", "--parts", "machine", "decode", "--output", str(tmp_path / "rows.jsonl")])
    rows = rows_of(tmp_path / "rows.jsonl")
    assert [row["part"] for row in rows] == ["machine", "decode", "decode", "iteration", "iteration"]
    assert "failed" in rows[-1]  # no update was measured
    table = (tmp_path / "rows.txt").read_text()
    assert table == as_table(rows) and "3 rows, 64 tokens" in table


def test_a_part_that_fails_or_hangs_is_a_row_and_the_next_one_runs(tmp_path):
    output = tmp_path / "rows"
    row = f"print('{{\"part\": \"a\"}}', file=open({str(output)!r}, 'a', 1))"
    for part, limit, ending in (
        ("a", 100, "exit(3)"),
        ("b", 1, "import time; time.sleep(600)"),
        ("c", 100, ""),
    ):
        guarded([sys.executable, "-c", f"{row}\n{ending}"], part, limit, output)
    failed = [row["failed"] for row in rows_of(output) if "failed" in row]
    assert failed == ["exit code 3", "not finished after 1 seconds"]
    assert len(rows_of(output)) == 5


def test_a_case_that_runs_out_of_memory_loses_no_other(tmp_path):
    def decode(model, sizes, rows: int, context: int) -> dict:
        if rows == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return {"tokens/s": 1.0}

    compare_decoding(SMALL, tmp_path / "rows", "decode", decode)
    first, second = rows_of(tmp_path / "rows")
    assert first["failed"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert second["tokens/s"] == 1


def test_all_parts_together_take_less_than_25_minutes():
    assert sum(LIMITS.values()) < 25 * 60


def test_operations_are_those_that_torch_counts():
    shape, lengths = SMALL.shapes["8b"], (30, 50)
    model = build(shape, "cpu").float()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for length in lengths:
            model(torch.ones(1, length, dtype=torch.long), use_cache=False)
    attention = shape.num_hidden_layers * sum(4 * shape.hidden_size * length**2 for length in lengths)
    # Half of it, because attention is causal; torch does not count the attention of a CPU.
    assert forward_flops(shape, lengths, sum(lengths)) == counter.get_total_flops() + attention / 2


def test_the_stored_table_and_iterations_are_those_of_the_stored_measurements():
    rows = rows_of(ROOT / "benchmarks" / "gpu.jsonl")
    assert (ROOT / "benchmarks" / "gpu.txt").read_text() == as_table(rows)
    for row in rows[-2:]:
        expected = extrapolate(rows, row["case"].removeprefix("with "))
        assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_an_iteration_is_the_sum_that_one_does_by_hand():
    cells = [
        {"rows": rows, "context": context, "ms a step": rows + context / 1000, "prefill tokens/s": 1e4}
        for rows in (8, 32)
        for context in (1000, 4000)
    ]
    rows = [{"part": "decode", "layers": 32} | cell for cell in cells]
    rows.append({"part": "decode", "layers": 16, "rows": 14, "context": 1000, "ms a step": 1.0})  # cut
    rows.append({"part": "update", "layers": 4, "prepare TFLOP/s": 400.0, "update TFLOP/s": 500.0})
    seconds = extrapolate(rows, "decode")
    # 25.1 rows of 1,500 tokens; 128 dialogs of 2,500 tokens, 920 of them sampled.
    assert seconds["seconds of decoding"] == pytest.approx(0.0266 * 128 * 920 / 25.1)
    assert seconds["seconds of prefill"] == pytest.approx(128 * 1580 / 1e4)
    weights, head = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 4096 * 128256
    attention = 32 * 2 * 4096 * 2500**2 * 128
    trunk, logits = 2 * weights * 128 * 2500 + attention, 2 * head * 128 * 920
    assert seconds["seconds of prepare"] == pytest.approx((3 * trunk + 2 * logits) / 400e12)
    assert seconds["seconds of update"] == pytest.approx(3 * (2 * trunk + logits) / 500e12)
    assert seconds["all"] == pytest.approx(sum(list(seconds.values())[:4]))
