"""The offline world: its splits have nothing in common, and every public test tells all programs apart."""

import random
from collections import Counter
from dataclasses import replace

import pytest

import data
import toy
from distributed import load_model, load_tokenizer
from rollout import RolloutSettings, rollout
from sandbox import IoTest, Job, Verdict, outputs_match

SPLITS = ("train", "valid", "test")


def test_the_world_has_its_size():
    assert len(toy.FAMILIES) >= 3
    assert sum(len(family.rules) for family in toy.FAMILIES) >= 40
    assert all(len(set(family.programs())) == 320 for family in toy.FAMILIES)


def test_programs_have_three_to_eight_lines_and_all_lengths_are_as_frequent():
    lengths = Counter(p.answer.count("\n") for p in toy.problems("train"))
    assert sorted(lengths) == [3, 4, 5, 6, 7, 8]
    assert min(lengths.values()) > 1200 / 6 * 0.8


def test_a_told_problem_has_all_lines_but_the_first_in_its_statement_and_no_other_has():
    for problem in toy.problems("test"):
        told = problem.answer.split("\n", 1)[1] in problem.statement
        assert told == (toy.TOLD in problem.statement) == (problem.group == "told")


def test_a_hard_coded_program_passes_the_public_test_and_not_the_private_ones(sandbox):
    problems = toy.problems("test")[::8]
    families = {family.statement: family for family in toy.FAMILIES}
    programs = [toy._hard_coded(p, families[p.statement.split("\n")[0]]) for p in problems]
    jobs = [
        Job(code, p.public_tests + p.private_tests, p.limits)
        for p, code in zip(problems, programs, strict=True)
    ]
    for results in sandbox.run(jobs):
        verdicts = [result.verdict == Verdict.PASSED for result in results]
        assert verdicts[0] and not all(verdicts[1:])


def test_no_input_stands_in_two_splits():
    inputs = [{t.input for p in toy.problems(s) for t in p.public_tests + p.private_tests} for s in SPLITS]
    assert not inputs[0] & inputs[1] and not inputs[0] & inputs[2] and not inputs[1] & inputs[2]


def test_training_sees_neither_new_rules_nor_new_combinations():
    rl = {p.answer for s in ("train", "valid") for p in toy.problems(s)}
    test = {
        group: {p.answer for p in toy.problems("test") if p.group == group}
        for group in ("seen", "new combination", "new rule", "told")
    }
    assert not test["new combination"] & rl and not test["new rule"] & rl
    rules = {program.split("\n")[1] for program in rl}
    for group in ("seen", "new combination", "told"):
        assert {program.split("\n")[1] for program in test[group]} <= rules
    assert not {program.split("\n")[1] for program in test["new rule"]} & rules


def test_each_public_test_tells_the_answer_and_no_private_test_is_public():
    for problem in toy.problems("test"):
        (family,) = (f for f in toy.FAMILIES if f.statement == problem.statement.split("\n")[0])
        for test in problem.public_tests:
            fitting = [p for p in family.programs() if outputs_match(toy._output(p, test.input), test.output)]
            assert fitting == [problem.answer]
        assert not {t.input for t in problem.public_tests} & {t.input for t in problem.private_tests}


def test_the_sandbox_agrees_with_the_answers(sandbox):
    problems = toy.problems("test")[::8]
    jobs = [Job(p.answer, p.public_tests + p.private_tests, p.limits) for p in problems]
    assert all(r.verdict == Verdict.PASSED for results in sandbox.run(jobs) for r in results)
    jobs = [Job(p.incorrect_solutions[0], p.public_tests, p.limits) for p in problems]
    assert all(r.verdict == Verdict.WRONG_ANSWER for results in sandbox.run(jobs) for r in results)


def test_the_warm_start_shows_the_feedback_that_the_sandbox_gives(sandbox):
    problem = toy.problems("train")[0]
    for program in (*problem.incorrect_solutions, problem.answer, problem.answer.split("\n", 1)[1]):
        ours = [toy._result(program, test) for test in problem.public_tests]
        (theirs,) = sandbox.run([Job(program, problem.public_tests, problem.limits)])
        assert [(r.verdict, r.traceback) for r in ours] == [(r.verdict, r.traceback) for r in theirs]
        if ours[0].verdict != Verdict.EXCEPTION:
            assert [r.stdout for r in ours] == [r.stdout for r in theirs]


def test_the_tokenizer_gives_every_text_back(tokenizer):
    draw = random.Random(0)
    for _ in range(50):
        text = tokenizer.apply_chat_template(toy.warm_start_dialog(draw), tokenize=False)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    strange = "naïve ☃ \t\x00 123 ab```python\n"
    assert tokenizer.decode(tokenizer.encode(strange, add_special_tokens=False)) == strange


def test_the_base_is_built_once_and_loads(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = toy.ensure_base(tmp_path / "base", lessons=(2, 2))
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert toy.ensure_base(directory) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    again = AutoTokenizer.from_pretrained(directory)
    text = again.apply_chat_template(toy.warm_start_dialog(random.Random(1)), tokenize=False)
    assert again.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert AutoModelForCausalLM.from_pretrained(directory).config.vocab_size == len(again)


def test_the_stored_start_model_is_of_todays_world(tokenizer, sandbox):
    assert toy.fits(toy.STORED), "the toy world has changed: python toy.py toy-base makes the model anew"
    stored = load_tokenizer(str(toy.STORED))
    text = stored.apply_chat_template(toy.warm_start_dialog(random.Random(1)), tokenize=False)
    assert stored.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    settings = RolloutSettings(max_new_tokens=48, context=512)
    problems = toy.problems("train")[:64]
    episodes = rollout(load_model(str(toy.STORED)), stored, problems, sandbox, settings, seed=0)
    turns = [turn for episode in episodes for turn in episode.turns]
    assert sum(turn.code is None for turn in turns) < 0.2 * len(turns)
    assert sum(episode.solved for episode in episodes) < 0.3 * len(episodes)  # RLEF has something to teach


def test_a_changed_world_gets_a_start_model_of_its_own(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(toy, "ensure_base", built.append)
    assert toy.start_model(tmp_path / "base") == toy.STORED and not built
    monkeypatch.setattr(data, "CLOSING", "Again.\n")
    toy.start_model(tmp_path / "base")
    assert built == [tmp_path / "base"]


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'dev'"):
        toy.problems("dev")


def test_io_tests_end_with_a_newline():
    assert all(
        isinstance(t, IoTest) and t.input.endswith("\n")
        for p in toy.problems("valid")
        for t in p.public_tests
    )


def test_programs_that_call_input_several_times_get_their_lines():
    program = "a = input()\nb = int(input('?'))\nprint(a, b)\n"
    assert toy._output(program, "x\n7") == "?x 7\n"
    assert toy._output("import sys\nprint(sys.stdin.read().split())", "x\n7") == "['x', '7']\n"
    with pytest.raises(EOFError):
        toy._output(program, "x")


def test_a_family_that_cannot_be_told_apart_or_is_too_small_is_named():
    lines = replace(toy.FAMILIES[2], statement="lines", rules=("t = s + input()", "t = input() + s"))
    lines = replace(lines, separator="\n", words=(("abcdefghij",) * 2, ("klmnopqrst",) * 2))
    assert len(toy.inputs(lines, "train")) == 300
    twins = replace(lines, statement="twins", rules=(*lines.rules, "t = s + input() + ''"))
    with pytest.raises(ValueError, match=r"family 'twins' has 0 inputs for valid, .* \+ input\(\)\\n.* and "):
        toy.inputs(twins, "valid")
    few = replace(lines, statement="few", words=(("ab",), ("cd",)))
    with pytest.raises(
        ValueError, match="family 'few' has [0-4] inputs for train, but needs 300 .* more char"
    ):
        toy.inputs(few, "train")


@pytest.mark.parametrize("changed", ["FAMILIES", "CHAT_TEMPLATE", "CLOSING"])
def test_the_base_is_built_anew_when_what_it_was_taught_has_changed(tmp_path, monkeypatch, capsys, changed):
    directory = toy.ensure_base(tmp_path / "base", lessons=(1, 0))
    value = {"FAMILIES": toy.FAMILIES[:2], "CHAT_TEMPLATE": toy.CHAT_TEMPLATE + "\n", "CLOSING": "Again.\n"}
    monkeypatch.setattr(data if changed == "CLOSING" else toy, changed, value[changed])
    toy.ensure_base(directory, lessons=(1, 0))
    assert "was taught other families, tokens or prompts: it is built anew" in capsys.readouterr().err
    toy.ensure_base(directory)  # would take a minute
    assert "anew" not in capsys.readouterr().err
