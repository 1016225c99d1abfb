"""The dialog: what is sampled is what is trained on, and who shares the batch changes nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_architectures import tiny

import rollout as module
import toy
from chat import observation_ids, prompt_ids
from data import Problem, first_message
from ppo import collate, response_logprobs
from rollout import RolloutSettings, fitting, rollout, show
from sampling import sample_tokens
from sandbox import AssertTest, Verdict

SETTINGS = RolloutSettings(max_new_tokens=12, context=600, batch_rows=5)


@pytest.fixture(scope="module")
def episodes(model, tokenizer, sandbox):
    return rollout(model, tokenizer, toy.problems("test")[:11], sandbox, SETTINGS, seed=3)


def recorded_logprobs(episodes) -> torch.Tensor:
    """What was recorded while sampling, (R,)."""
    return torch.tensor([p for e in episodes for turn in e.turns for p in turn.behaviour_logprobs])


def tokens_of(episodes):
    return [episode.ids for episode in episodes]


def test_dialogs_are_ragged_and_have_all_turns(episodes):
    """Otherwise the tests below would prove little."""
    assert len({turn.end - turn.start for e in episodes for turn in e.turns}) > 3
    assert all(len(e.turns) == 3 for e in episodes)
    assert any(turn.truncated for e in episodes for turn in e.turns)
    assert not all(turn.truncated for e in episodes for turn in e.turns)


def test_recorded_logprobs_equal_those_of_the_training_forward(episodes, model):
    recorded = recorded_logprobs(episodes)  # (R,)
    with torch.no_grad():
        batch = collate(episodes, torch.device("cpu"))
        again, _ = response_logprobs(model, batch, SETTINGS.temperature)  # (R,)
    torch.testing.assert_close(recorded, again, atol=1e-4, rtol=0)


def test_recorded_logprobs_are_of_the_tempered_distribution(model, tokenizer, sandbox):
    warm = replace(SETTINGS, temperature=0.6)
    episodes = rollout(model, tokenizer, toy.problems("test")[:4], sandbox, warm, seed=0)
    recorded = recorded_logprobs(episodes)  # (R,)
    batch = collate(episodes, torch.device("cpu"))
    with torch.no_grad():
        tempered, plain = (response_logprobs(model, batch, t)[0] for t in (0.6, 1.0))  # (R,), (R,)
    torch.testing.assert_close(recorded, tempered, atol=1e-4, rtol=0)
    assert (recorded - plain).abs().max() > 0.1


def test_cached_decoding_equals_decoding_without_a_cache(episodes, model):
    """Greedy-free check: the noise of each dialog, applied to logits of full forwards, gives the same ids."""
    for episode in episodes[:3]:
        noise = np.random.default_rng([3, episode.index]).random(3 * SETTINGS.max_new_tokens)
        drawn = 0
        for turn in episode.turns:
            for position in range(turn.start, turn.end):
                with torch.no_grad():
                    logits = model(torch.tensor([episode.ids[:position]])).logits[:, -1]  # (1, V)
                token, _ = sample_tokens(logits, torch.tensor([noise[drawn]]), 1.0, 1.0)
                assert token.item() == episode.ids[position]
                drawn += 1


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_what_a_dialog_samples_does_not_depend_on_who_shares_the_batch(
    episodes, model, tokenizer, sandbox, rows
):
    again = rollout(
        model, tokenizer, toy.problems("test")[:11], sandbox, replace(SETTINGS, batch_rows=rows), seed=3
    )
    assert tokens_of(again) == tokens_of(episodes)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "granitemoehybrid"])
def test_a_model_with_recurrent_layers_samples_what_it_trains_on_whoever_shares_the_batch(
    kind, tokenizer, sandbox
):
    model, problems = tiny(kind).requires_grad_(False), toy.problems("test")[:9]
    model.resize_token_embeddings(len(tokenizer))
    together, alone = (
        rollout(model, tokenizer, problems, sandbox, replace(SETTINGS, batch_rows=rows), seed=3)
        for rows in (4, 1)
    )
    assert tokens_of(together) == tokens_of(alone)
    again, _ = response_logprobs(model, collate(together, torch.device("cpu")), 1.0)  # (R,)
    torch.testing.assert_close(recorded_logprobs(together), again, atol=1e-4, rtol=0)


def test_the_longest_waiting_half_is_asked_for_its_results_while_the_tests_of_the_rest_run_on(
    monkeypatch, model, tokenizer, sandbox
):
    events, decode = [], module.decode

    def submit(job):
        number, future = sum(event[0] == "submit" for event in events), sandbox.submit(job)
        events.append(("submit", number))
        return SimpleNamespace(result=lambda: events.append(("read", number)) or future.result())

    monkeypatch.setattr(module, "decode", lambda *given: events.append(("decode", 0)) or decode(*given))
    monkeypatch.setattr(module, "extract_code", lambda text, entry_point: "pass")
    watched, settings = SimpleNamespace(submit=submit), replace(SETTINGS, batch_rows=16)
    rollout(model, tokenizer, toy.problems("test")[:40], watched, settings, seed=3)
    assert [number for kind, number in events if kind == "read"] == list(range(120))
    waiting = running = longest = 0
    for kind, number in events:
        if kind == "read" and number < 70:  # later no new dialogs enter, and the last ones must be waited for
            longest = longest or waiting
            running += 1
            assert running <= (longest + 1) // 2
        elif kind == "decode":
            running = longest = 0
        waiting += {"submit": 1, "read": -1, "decode": 0}[kind]


def test_a_part_of_the_list_samples_what_the_whole_does(episodes, model, tokenizer, sandbox):
    part = rollout(model, tokenizer, toy.problems("test")[4:6], sandbox, SETTINGS, seed=3, first_index=4)
    assert tokens_of(part) == tokens_of(episodes)[4:6]


def test_another_seed_gives_other_dialogs(episodes, model, tokenizer, sandbox):
    other = rollout(model, tokenizer, toy.problems("test")[:11], sandbox, SETTINGS, seed=4)
    assert sum(a != b for a, b in zip(tokens_of(other), tokens_of(episodes), strict=True)) > 8


def test_only_prompts_and_feedback_stand_between_the_responses(episodes, tokenizer):
    for episode in episodes:
        expected = prompt_ids(tokenizer, first_message(episode.problem))
        for turn in episode.turns:
            assert turn.start == len(expected)
            expected += episode.ids[turn.start : turn.end]
            if turn.feedback:
                between = observation_ids(tokenizer, turn.feedback)
                expected += between if turn.truncated else between[1:]
        assert episode.ids == expected
        ends = [episode.ids[turn.end - 1] == tokenizer.eos_token_id for turn in episode.turns]
        assert ends == [not turn.truncated for turn in episode.turns]


def scripted(monkeypatch, tokenizer, responses):
    """Make the sampler give these texts, one after another, in a batch of one."""
    ids = [i for text in responses for i in tokenizer.encode(text + "<|end|>", add_special_tokens=False)]
    script = iter(ids)
    monkeypatch.setattr(
        module, "sample_tokens", lambda logits, *_: (torch.tensor([next(script)]), torch.zeros(len(logits)))
    )


def one_dialog(monkeypatch, model, tokenizer, sandbox, responses, **settings):
    scripted(monkeypatch, tokenizer, responses)
    setting = replace(SETTINGS, max_new_tokens=80, **settings)
    problems = toy.problems("test")
    return rollout(model, tokenizer, problems[:1], sandbox, setting, 0, feedback_problems=problems)[0]


def test_a_wrong_program_is_told_what_was_expected_and_a_right_one_ends_the_episode(
    monkeypatch, model, tokenizer, sandbox
):
    problem = toy.problems("test")[0]
    wrong, right = (f"```python\n{code}```" for code in (problem.incorrect_solutions[0], problem.answer))
    episode = one_dialog(monkeypatch, model, tokenizer, sandbox, ["no code", wrong, right])
    assert [turn.outcome for turn in episode.turns] == ["no valid code", "wrong answer", "passed"]
    assert episode.solved and episode.public_passed
    assert episode.private_verdicts == ("passed",) * len(problem.private_tests)
    for test in problem.public_tests:
        assert test.input.strip() in episode.turns[1].feedback
        assert f"Expected output:\n{test.output.strip()}\n" in episode.turns[1].feedback
    for test in problem.private_tests:
        assert test.input.strip() not in tokenizer.decode(episode.ids)
    assert "solved" in show(tokenizer, episode)


def test_a_program_that_knows_the_public_outputs_is_not_solved(monkeypatch, model, tokenizer, sandbox):
    tests = toy.problems("test")[0].public_tests
    known = {test.input.strip(): test.output.strip() for test in tests}
    episode = one_dialog(
        monkeypatch, model, tokenizer, sandbox, [f"```python\nprint({known}.get(input()))\n```"]
    )
    assert episode.public_passed and not episode.solved and len(episode.turns) == 1
    assert episode.private_verdicts == ("wrong answer",)  # they stop at the first that fails


def test_random_feedback_is_of_another_problem_and_none_says_nothing(monkeypatch, model, tokenizer, sandbox):
    problem = toy.problems("test")[0]
    wrong = [f"```python\n{problem.incorrect_solutions[0]}```"] * 3
    blind = one_dialog(monkeypatch, model, tokenizer, sandbox, wrong, feedback="none")
    assert [turn.feedback for turn in blind.turns] == ["Try again.", "Try again.", ""]
    misled = one_dialog(monkeypatch, model, tokenizer, sandbox, wrong, feedback="random")
    for turn in misled.turns[:2]:
        assert "Expected output" in turn.feedback
        assert not any(f"Input:\n{test.input}" in turn.feedback for test in problem.public_tests)


def test_random_feedback_of_a_function_asks_for_the_dialogs_own(monkeypatch, model, tokenizer, sandbox):
    functions = [
        Problem(
            f"{name}",
            f"Write {name}.",
            (AssertTest(f"assert {name}(1) == 2"),),
            (AssertTest("pass"),),
            entry_point=name,
        )
        for name in ("first", "second")
    ]
    scripted(monkeypatch, tokenizer, ["```python\npass\n```"] * 2)
    setting = replace(SETTINGS, max_new_tokens=80, context=2000, feedback="random", turn_limit=2)
    monkeypatch.setattr(module, "observation_ids", lambda *_: [0, 0])  # its words are not the toy's
    monkeypatch.setattr(module, "prompt_ids", lambda *_: [0, 0])
    (episode,) = rollout(model, tokenizer, functions[:1], sandbox, setting, 0, feedback_problems=functions)
    told, _, asked = episode.turns[0].feedback.partition("Try again.")
    assert "second(1)" in told and "first" not in told
    assert "first" in asked and "second" not in asked


def test_prompts_that_do_not_fit_are_found_before_anything_is_sampled(tokenizer, monkeypatch):
    short, other = toy.problems("test")[:2]
    long = replace(short, name="long", statement=short.statement * 200)
    kept = fitting([short, long, other], tokenizer, RolloutSettings(context=200, max_new_tokens=40))
    assert kept == [0, 2]
    for place, problem in enumerate((short, long)):
        need = len(prompt_ids(tokenizer, first_message(problem)))
        exact = RolloutSettings(context=need + 5, max_new_tokens=5)
        assert fitting([problem], tokenizer, exact) == [0], place
        assert fitting([problem], tokenizer, replace(exact, context=need + 4)) == []


def test_a_dialog_that_outgrows_the_context_ends_as_truncated(monkeypatch, model, tokenizer, sandbox):
    episode = one_dialog(monkeypatch, model, tokenizer, sandbox, ["no code"] * 3, context=100)
    assert episode.truncated and len(episode.turns) < 3 and not episode.solved
    with pytest.raises(ValueError, match="does not fit a context of 82"):
        rollout(
            model,
            tokenizer,
            toy.problems("test")[:1],
            sandbox,
            replace(SETTINGS, context=82, max_new_tokens=80),
            0,
        )


def test_outcome_is_that_of_the_first_failing_test(monkeypatch, model, tokenizer, sandbox):
    episode = one_dialog(monkeypatch, model, tokenizer, sandbox, ["```python\n1 / 0\n```"] * 3)
    assert {turn.outcome for turn in episode.turns} == {Verdict.EXCEPTION.value}
    assert "ZeroDivisionError" in episode.turns[0].feedback


def test_code_without_a_closing_fence_counts_if_it_compiles_as_in_a_response_that_was_cut(
    monkeypatch, model, tokenizer, sandbox
):
    open_block = "```python\n1 / 0"
    ended = one_dialog(monkeypatch, model, tokenizer, sandbox, [open_block] * 3)
    assert [turn.outcome for turn in ended.turns] == ["exception"] * 3
    setting = replace(SETTINGS, max_new_tokens=80, turn_limit=1)
    for text, outcome in (
        (open_block + "\n" * 200, "exception"),
        ("```python\n(1" + "\n" * 200, "no valid code"),
    ):
        scripted(monkeypatch, tokenizer, [text])
        (cut,) = rollout(model, tokenizer, toy.problems("test")[:1], sandbox, setting, 0)
        assert cut.turns[0].truncated and cut.turns[0].outcome == outcome


def test_examples_precede_the_dialog_as_its_earlier_turns(model, tokenizer, sandbox, tmp_path):
    path = tmp_path / "examples.json"
    problem, shown = toy.problems("train")[:2]
    examples = [
        {"role": "user", "content": first_message(shown)},
        {"role": "assistant", "content": f"```python\n{shown.answer}```"},
    ]
    path.write_text(json.dumps(examples))
    settings = RolloutSettings(turn_limit=1, max_new_tokens=4, context=600, examples=str(path))
    (episode,) = rollout(model, tokenizer, [problem], sandbox, settings, seed=0)
    whole = [*examples, {"role": "user", "content": first_message(problem)}]
    prompt = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(episode.ids[: episode.turns[0].start]) == prompt
    path.write_text(json.dumps(examples[:1]))
    with pytest.raises(ValueError, match="user and assistant by turns"):
        rollout(model, tokenizer, [problem], sandbox, settings, seed=0)
