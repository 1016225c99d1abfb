"""The loop: ratio 1 at the start, gradients that do not depend on the split, the same run from the same
seed, learning.
"""

import copy
import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import make_model
from transformers import LlamaConfig

import toy
from config import Config, parse_config
from distributed import friendly_errors, load_model, load_tokenizer
from episodes import draw_problems
from ppo import collate, microbatches, response_logprobs
from rollout import Episode, RolloutSettings, Turn, rollout
from tools import plan
from train import draw_minibatches, prepare, train, update
from value_head import ValueModel

CONFIG = Config(
    device="cpu", batch_episodes=12, minibatch_episodes=12, max_new_tokens=12, context=600, warmup_updates=1
)


@pytest.fixture(scope="module")
def episodes(model, tokenizer, sandbox):
    settings = RolloutSettings(max_new_tokens=12, context=600)
    return rollout(model, tokenizer, toy.problems("train")[:12], sandbox, settings, seed=0)


def networks(tokenizer):
    """The policy that sampled `episodes`, a critic, and optimisers whose steps are the gradients."""
    policy = make_model(len(tokenizer), end=tokenizer.eos_token_id)
    critic = ValueModel(make_model(len(tokenizer), seed=1))
    optimisers = [torch.optim.SGD(n.parameters(), lr=1.0) for n in (policy, critic)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1.0) for o in optimisers]
    return policy, critic, optimisers, schedules


def test_ratio_is_one_on_the_first_minibatch_and_kl_zero_for_equal_models(episodes, tokenizer):
    policy, critic, optimisers, schedules = networks(tokenizer)
    prepared, statistics = prepare(
        policy, networks(tokenizer)[0], critic, draw_minibatches(episodes, 0, CONFIG), CONFIG
    )
    assert statistics["kl"] == 0
    assert statistics["behaviour_gap"] < 1e-4
    result = update(policy, critic, optimisers, schedules, prepared[0], CONFIG)
    assert result["ratio_worst"] < 1e-5


@pytest.mark.parametrize("token_level", [False, True])
def test_micro_batches_do_not_change_the_gradient(episodes, tokenizer, token_level):
    weights = []
    budgets = (100_000, 400, 150)
    for budget in budgets:
        config = replace(
            CONFIG, microbatch_tokens=budget, token_level_values=token_level, max_gradient_norm=1e9
        )
        policy, critic, optimisers, schedules = networks(tokenizer)
        groups = [[episodes]] if budget == max(budgets) else draw_minibatches(episodes, 0, config)
        prepared, _ = prepare(policy, make_model(len(tokenizer), seed=5), critic, groups, config)
        update(policy, critic, optimisers, schedules, *prepared, config)
        weights.append([p.detach() for n in (policy, critic) for p in n.parameters()])
    assert len(microbatches(episodes, 150)) > len(microbatches(episodes, 400)) > 1
    for other in weights[1:]:
        for a, b in zip(weights[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_advantages_are_one_number_a_turn(episodes, tokenizer):
    policy, critic, *_ = networks(tokenizer)
    groups = draw_minibatches(episodes, 0, replace(CONFIG, microbatch_tokens=600))[0]
    (prepared,), _ = prepare(policy, networks(tokenizer)[0], critic, [groups], CONFIG)
    targets = []
    for target, group in zip(prepared, groups, strict=True):
        tokens = [sum(turn.end - turn.start for turn in episode.turns) for episode in group]
        turns = [len(episode.turns) for episode in group]
        split = target.advantages.split(tokens), target.returns.split(turns), target.old_values.split(turns)
        targets += zip(*split, strict=True)
    raw = []
    episodes = [episode for group in groups for episode in group]
    assert len(groups) > 1
    for episode, (advantages, returns, old_values) in zip(episodes, targets, strict=True):
        sizes = [turn.end - turn.start for turn in episode.turns]
        pieces = advantages.split(sizes)
        assert all(piece.unique().numel() == 1 for piece in pieces)
        # The reference equals the policy, so the KL is 0 and returns are sums of rewards by hand.
        rewards = [-0.2 if turn.code is None else 0.0 for turn in episode.turns[:-1]]
        rewards.append(1.0 if episode.solved else -1.0)
        assert returns.tolist() == pytest.approx([sum(rewards[t:]) for t in range(len(rewards))])
        raw += [(g - v, piece[0]) for g, v, piece in zip(returns, old_values, pieces, strict=True)]
    plain, normalised = (torch.stack(column) for column in zip(*raw, strict=True))  # (N,), (N,)
    expected = (plain - plain.mean()) / plain.std(correction=0)
    torch.testing.assert_close(normalised, expected, atol=1e-4, rtol=1e-4)


def test_micro_batches_hold_every_episode_once_within_the_budget(episodes):
    groups = microbatches(episodes, 400)
    assert sorted(e.index for group in groups for e in group) == list(range(len(episodes)))
    assert all(max(len(episode.ids) for episode in group) * len(group) <= 400 for group in groups)


def test_every_pass_over_the_training_set_meets_every_problem_once():
    config = replace(CONFIG, batch_episodes=4)
    problems = list(range(10))
    drawn = [p for iteration in range(5) for p in draw_problems(problems, iteration, config)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == problems
    assert drawn[:10] != drawn[10:]


def test_ppo_learns_a_dialog_that_can_be_solved_only_by_reading_the_feedback():
    """Two arms.

    The first choice is a guess; the feedback names the right arm; the second choice must be that arm.
    """
    user, header, arms = 1, 2, (3, 4)
    policy, reference, critic = make_model(6), make_model(6), ValueModel(make_model(6, seed=1))
    config = replace(CONFIG, learning_rate=3e-3, batch_episodes=64, minibatch_episodes=16, beta=0.0)
    optimisers = [torch.optim.AdamW(n.parameters(), lr=3e-3) for n in (policy, critic)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1.0) for o in optimisers]
    generator = torch.Generator().manual_seed(0)

    def respond(episodes: list[Episode]) -> None:
        with torch.no_grad():
            logits = policy(torch.tensor([e.ids for e in episodes])).logits[:, -1]  # (n, V)
        logprobs = logits.log_softmax(-1)  # (n, V)
        tokens = torch.multinomial(logprobs.exp(), 1, generator=generator)  # (n, 1)
        for episode, token, logprob in zip(episodes, tokens, logprobs.gather(1, tokens), strict=True):
            start = len(episode.ids)
            episode.turns.append(Turn(start, start + 1, [logprob.item()], code="pass"))
            episode.ids.append(token.item())

    solved = []
    for _ in range(20):
        right = [arms[int(torch.randint(2, (1,), generator=generator))] for _ in range(64)]
        episodes = [Episode(None, [user, header], [], False, False, False, i) for i in range(64)]
        respond(episodes)
        again = [e for e, arm in zip(episodes, right, strict=True) if e.ids[-1] != arm]
        for episode in again:
            episode.ids += [user, right[episode.index], header]
        respond(again)
        for episode, arm in zip(episodes, right, strict=True):
            episode.solved = episode.ids[-1] == arm
        solved.append(sum(e.solved for e in episodes) / 64)
        minibatches = draw_minibatches(episodes, 0, config)
        prepared, _ = prepare(policy, reference, critic, minibatches, config)
        for microbatches_of_update in prepared:
            update(policy, critic, optimisers, schedules, microbatches_of_update, config)
    assert solved[0] < 0.7
    assert sum(solved[-5:]) / 5 > 0.95


def small_run(directory, monkeypatch, tokenizer, **settings):
    """A whole `train` on a tiny random model; returns its metrics without the clock."""
    base = directory / "base"
    make_model(len(tokenizer), end=tokenizer.eos_token_id).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = replace(
        CONFIG,
        model=str(base),
        output=str(directory / "run"),
        iterations=2,
        evaluate_every=1,
        limit_problems=6,
        minibatch_episodes=6,
        **settings,
    )
    train(config)
    lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_the_same_seed_gives_the_same_run(tmp_path, monkeypatch, tokenizer):
    first = small_run(tmp_path / "a", monkeypatch, tokenizer)
    second = small_run(tmp_path / "b", monkeypatch, tokenizer)
    assert first == second or all(
        a == b or math.isnan(a) and math.isnan(b)
        for x, y in zip(first, second, strict=True)
        for a, b in zip(x.values(), y.values(), strict=True)
        if not isinstance(a, list)
    )
    assert first[0]["first_ratio_worst"] < 1e-5
    needed = "reward solved_by_turn kl ratio clip_fraction entropy explained_variance invalid_code"
    assert {*needed.split(), "truncated_responses", "truncated_dialogs", "seconds"} <= {*first[0], "seconds"}
    other = small_run(tmp_path / "c", monkeypatch, tokenizer, seed=1)
    assert other[0]["entropy"] != first[0]["entropy"]
    files = {path.name for path in (tmp_path / "a" / "run").iterdir()}
    kept = {"episodes.jsonl", "episodes.html", "dialogs.txt"}
    assert {"config.json", "metrics.jsonl", "best", "result.json"} | kept <= files


def test_a_run_is_never_written_over(tmp_path, monkeypatch, tokenizer):
    small_run(tmp_path, monkeypatch, tokenizer, valid_split="", test_split="")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a run: go on with --resume .*, or give another --output"):
        small_run(tmp_path, monkeypatch, tokenizer, valid_split="", test_split="")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_problems_with_prompts_that_do_not_fit_are_left_out_and_counted(
    tmp_path, monkeypatch, tokenizer, capsys
):
    long = [replace(p, name=f"long {p.name}", statement="x" * 5000) for p in toy.problems("train")[:2]]
    monkeypatch.setattr(
        "episodes.load_problems", lambda source, name, holdout: [*long, *toy.problems(name)[:6]]
    )
    small_run(tmp_path, monkeypatch, tokenizer, valid_split="", test_split="")
    assert "left out: 2 of 6 train problems have a longer prompt than context" in capsys.readouterr().err
    assert "long" not in (tmp_path / "run" / "dialogs.txt").read_text()


def test_the_saved_policy_is_the_trained_one(tmp_path, monkeypatch, tokenizer, episodes):
    small_run(tmp_path, monkeypatch, tokenizer, valid_split="", test_split="", learning_rate=1e-2)
    base, best = (load_model(str(path)) for path in (tmp_path / "base", tmp_path / "run" / "best"))
    batch = collate(episodes, torch.device("cpu"))
    with torch.no_grad():
        gap = (response_logprobs(base, batch, 1.0)[0] - response_logprobs(best, batch, 1.0)[0]).abs().max()
    assert gap > 1e-3


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ["--batch_episodes", "10", "--minibatch_episodes", "4"],
            "batch_episodes 10 .* minibatch_episodes 4",
        ),
        (["--microbatch_tokens", "100"], "microbatch_tokens 100 .* context 512"),
        (["--preset", "8b", "--plan", "--rollout_ranks", "2"], "plan .* rollout_ranks"),
        (["--plan"], "plan needs a --model"),
        (["--preset", "8b", "--plan", "--ranks", "6"], "leave 6 to train, but minibatch_episodes 256"),
        (["--problems", "humaneval_plus"], "humaneval_plus needs a --model"),
        (["--batch_rows", "0"], "batch_rows is 0, but must be at least 1"),
        (["--limit_problems", "-5"], "limit_problems is -5, but must be at least 0"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--feedback", "ture"], "feedback is 'ture', but must be one of true, random, none"),
        (["--dtype", "foo"], "dtype is 'foo'"),
        (["--dtype", "float16"], "must be float32 or bfloat16"),
    ],
)
def test_settings_that_disagree_are_named(flags, named):
    with pytest.raises(ValueError, match=named):
        parse_config(flags)


def test_presets_hold_the_numbers_of_the_paper():
    config = parse_config(["--preset", "8b", "--beta", "0.1"])
    assert (config.batch_episodes, config.minibatch_episodes, config.learning_rate) == (1024, 256, 2e-7)
    assert config.beta == 0.1
    with pytest.raises(SystemExit):
        parse_config(["--preset", "9b"])


def test_the_plan_is_the_sum_that_one_does_by_hand(tmp_path):
    LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 100 + 2 * 64  # q, o; k, v; gate, up, down; norms
    policy = 3 * layer + 2 * 1000 * 64 + 64
    critic = 3 * layer + 1000 * 64 + 64 + 64 + 1
    config = replace(
        CONFIG,
        model=str(tmp_path),
        dtype="bfloat16",
        gradient_checkpointing=True,
        batch_rows=5,
        microbatch_tokens=1200,
        logits_chunk=10,
    )
    sizes = plan.memory(config, ranks=4)
    assert sizes["always"] == {
        "policy: weights": policy * 4 / 4,
        "policy: optimiser": policy * 8 / 4,
        "critic: weights": critic * 4 / 4,
        "critic: optimiser": critic * 8 / 4,
        "reference": policy * 2 / 4,
    }
    assert sizes["rollout"]["weights for sampling"] == 2 * policy
    assert sizes["rollout"]["keys and values"] == 3 * 600 * 3 * (2 * 32) * 2  # 12 dialogs on 4 ranks
    one_at_a_time = replace(config, context=plan.PREFILL_TOKENS + 1, batch_rows=1)
    of_a_token = sizes["rollout"]["prompts and feedback"] / (3 * 600)
    longest = plan.memory(one_at_a_time, ranks=4)["rollout"]["prompts and feedback"]
    assert longest == of_a_token * one_at_a_time.context  # a prompt goes through the model in one piece
    norms, queries, keys, mlp = 4 * 64, 4 * 64, 4 * 32, 4 * 100  # numbers a token, in bf16
    inside = 2 * (norms + queries + keys + mlp) + 4 * (2 * 64)  # and the norms' insides, in fp32
    assert sizes["update"]["activations"] == 1200 * (3 * 2 * 64 + inside)
    assert sizes["update"]["policy: gradients"] == policy
    assert sizes["update"]["logits chunk"] == 10 * 1000 * (2 + 20)
    layered = replace(config, cpu_offload=False, gather_weights=False)
    assert plan.memory(layered, 4)["rollout"]["weights for sampling"] == 2 * (2 * 1000 * 64 + 64) + 4 * layer


def test_a_plan_that_does_not_fit_names_flags_that_need_less():
    config = parse_config(["--preset", "8b"])
    text, fits = plan.report(config, 8, 79 * plan.GIB)
    assert fits and "does not fit" not in text
    config = replace(config, gradient_checkpointing=False)
    text, fits = plan.report(config, 4, 79 * plan.GIB)
    assert not fits
    named = set(re.findall(r"--[\w-]+", text.rpartition("does not fit")[2]))
    less = ["--batch_rows=12", "--microbatch_tokens=8192", "--logits_chunk=512", "--gradient_checkpointing"]
    less += ["--no-gather_weights", "--cpu_offload", "--ranks=6"]
    assert named == {flag.partition("=")[0] for flag in less}
    before = plan.memory(config, 4)
    for flag in less:
        changed = parse_config(["--preset", "8b", "--no-gradient_checkpointing", flag])
        after = plan.memory(changed, changed.ranks if "ranks" in flag else 4)
        assert any(after[phase][part] < size for phase in before for part, size in before[phase].items())
    for ranks, enough in ((64, True), (32, False)):
        assert plan.report(parse_config(["--preset", "70b"]), ranks, 79 * plan.GIB)[1] == enough


def test_a_run_that_is_resumed_with_other_settings_names_them(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(replace(CONFIG, beta=0.1))))
    config = parse_config(["--resume", str(tmp_path), "--iterations", "7"])
    assert (config.beta, config.iterations, config.output) == (0.1, 7, str(tmp_path))
    with pytest.raises(ValueError, match=r"beta 0.1, now 0.2; seed 0, now 3$"):
        parse_config(["--resume", str(tmp_path), "--beta", "0.2", "--seed", "3"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "{}"}, r"has no weights \(\*.safetensors or \*.bin\), only config.json"),
        (None, "is not a directory, and the Hugging Face hub does not give it"),
    ],
)
def test_a_model_without_weights_ends_training_with_one_sentence(tmp_path, files, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tmp_path / "model"
    if files is not None:
        model.mkdir()
        for name, text in files.items():
            (model / name).write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        train(replace(CONFIG, model=str(model), output=str(tmp_path / "run")))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_template_names_the_flag_and_takes_its_file(tmp_path, tokenizer):
    make_model(len(tokenizer)).save_pretrained(tmp_path)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--chat_template FILE"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "template").write_text(tokenizer.chat_template)
    assert load_tokenizer(str(tmp_path), str(tmp_path / "template")).chat_template == tokenizer.chat_template


def test_dropout_is_off_and_checkpointed_gradients_are_the_plain_ones(tmp_path, tokenizer, episodes):
    model = make_model(len(tokenizer))
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    batch, gradients = collate(episodes, torch.device("cpu")), []
    for checkpointing in (True, False):
        policy = load_model(str(tmp_path), gradient_checkpointing=checkpointing)
        calls = []
        policy.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_, c=calls: c.append(1))
        response_logprobs(policy, batch, 1.0)[0].sum().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([p.grad for p in policy.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_ctrl_c_ends_the_building_of_the_toy_world_s_model_at_once(tmp_path):
    flags = ["train.py", "--output", str(tmp_path / "run"), "--device", "cpu"]
    changed_world = f"import data, runpy, sys; data.CLOSING, sys.argv = 'Again.\\n', {flags}"
    code = f"{changed_world}; runpy.run_path('train.py', run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while "warm start" not in (told := process.stderr.readline(40)):
        assert told
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == -signal.SIGINT
    process.stderr.close()
    assert not list(tmp_path.glob("**/model.safetensors"))


def test_a_gpu_out_of_memory_is_told_with_the_flags_that_help(capsys):
    with pytest.raises(SystemExit) as ended, friendly_errors("train.py"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(
        f"--{flag}" in message for flag in ("batch_rows", "microbatch_tokens", "cpu_offload", "resume")
    )
