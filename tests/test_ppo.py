"""Rewards, returns, losses: against plain loops and hand-computed cases.

Log-probs and values: unchanged by company.
"""

import math

import pytest
import torch
from conftest import make_model

import ppo
from ppo import (
    chunked_logprobs,
    collate,
    explained_variance,
    is_clipped,
    mean_per_turn,
    normalise,
    policy_loss,
    response_logprobs,
    turn_kl,
    turn_returns,
    turn_rewards,
    value_loss,
)
from rollout import Episode, Turn
from value_head import ValueModel


def make_episode(lengths, vocabulary=50, seed=0, solved=False, valid=None) -> Episode:
    """A dialog of random ids; `lengths` are alternately those of prompts and responses."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (sum(lengths),), generator=generator).tolist()
    turns, position = [], 0
    for prompt, response in zip(lengths[::2], lengths[1::2], strict=True):
        start = position + prompt
        position = start + response
        turns.append(Turn(start, position, [-1.0] * response))
    for turn, has_code in zip(turns, valid or [True] * len(turns), strict=True):
        turn.code = "pass" if has_code else None
    return Episode(None, ids, turns, solved, solved, False, 0)


RAGGED = [
    make_episode([5, 3, 4, 6], seed=1),
    make_episode([7, 1], seed=2),
    make_episode([3, 2, 2, 2, 9, 4], seed=3),
]
CPU = torch.device("cpu")


def test_batch_holds_exactly_the_sampled_ids():
    batch = collate(RAGGED, CPU)
    trained = batch.ids[batch.token_rows, batch.token_columns].tolist()
    assert trained == [i for e in RAGGED for turn in e.turns for i in e.ids[turn.start : turn.end]]
    last_of_prompt = batch.ids[batch.turn_rows, batch.prompt_columns].tolist()
    assert last_of_prompt == [e.ids[turn.start - 1] for e in RAGGED for turn in e.turns]


def test_chunked_logprobs_and_gradients_equal_the_plain_ones():
    torch.manual_seed(0)
    hidden = torch.randn(23, 8, requires_grad=True)  # (R, D)
    head = torch.nn.Linear(8, 50, bias=False)
    targets = torch.randint(0, 50, (23,))  # (R,)
    plain = torch.log_softmax(head(hidden) / 0.7, -1)  # (R, V)
    expected = plain[torch.arange(23), targets]  # (R,)
    expected.sum().backward()
    gradient, head_gradient = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    for chunk in (5, 23):  # several chunks, and all at once
        got, _ = chunked_logprobs(hidden, head, targets, temperature=0.7, chunk=chunk)
        got.sum().backward()
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(hidden.grad, gradient)
        torch.testing.assert_close(head.weight.grad, head_gradient)
        hidden.grad = head.weight.grad = None
        with torch.no_grad():
            got, entropies = chunked_logprobs(hidden, head, targets, temperature=0.7, chunk=chunk)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(entropies, -(plain.exp() * plain).sum(-1))


def test_logprobs_and_values_do_not_depend_on_padding_or_other_rows():
    model, critic = make_model(50), ValueModel(make_model(50, seed=1))
    together = collate(RAGGED, CPU)
    logprobs, _ = response_logprobs(model, together, 1.0)  # (R,)
    values = critic(together.ids, together.turn_rows, together.prompt_columns)  # (N,)
    alone, alone_values = [], []
    for episode in RAGGED:
        batch = collate([episode], CPU)
        alone.append(response_logprobs(model, batch, 1.0)[0])
        alone_values.append(critic(batch.ids, batch.turn_rows, batch.prompt_columns))
    torch.testing.assert_close(logprobs, torch.cat(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, torch.cat(alone_values), atol=1e-5, rtol=1e-5)


def test_what_stands_in_the_padding_changes_nothing():
    model, critic = make_model(50), ValueModel(make_model(50, seed=1))
    batch = collate(RAGGED, CPU)
    before = response_logprobs(model, batch, 1.0)[0], critic(batch.ids, batch.turn_rows, batch.prompt_columns)
    for row, episode in enumerate(RAGGED):
        batch.ids[row, len(episode.ids) :] = torch.randint(1, 50, (batch.ids.shape[1] - len(episode.ids),))
    after = response_logprobs(model, batch, 1.0)[0], critic(batch.ids, batch.turn_rows, batch.prompt_columns)
    torch.testing.assert_close(before, after, atol=0, rtol=0)


def test_the_critic_reads_the_last_prompt_token():
    """No token of a turn's own response changes its value; every one of them changes the next turn's."""
    critic = ValueModel(make_model(50, seed=1))
    episode = make_episode([5, 3, 4, 6])
    first, second = episode.turns

    def values() -> torch.Tensor:
        batch = collate([episode], CPU)
        return critic(batch.ids, batch.turn_rows, batch.prompt_columns).detach()  # (2,)

    before = values()
    for position in range(first.start, second.start):
        original, episode.ids[position] = episode.ids[position], episode.ids[position] % 49 + 1
        after = values()
        assert after[0] == before[0]
        assert after[1] != before[1]
        episode.ids[position] = original
    for position in range(second.start, second.end):
        episode.ids[position] = episode.ids[position] % 49 + 1
    assert torch.equal(values(), before)
    episode.ids[first.start - 1] = episode.ids[first.start - 1] % 49 + 1
    assert values()[0] != before[0]


def test_rewards_punish_invalid_code_on_turns_that_are_not_the_last_only():
    unsolved = make_episode([1, 1] * 3, valid=[False, True, False])
    solved = make_episode([1, 1] * 2, valid=[False, True], solved=True)
    assert turn_rewards([unsolved, solved]).tolist() == pytest.approx([-0.2, 0.0, -1.0, -0.2, 1.0])
    assert turn_rewards([make_episode([1, 1], valid=[False])]).tolist() == [-1.0]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_equal_a_plain_loop(gamma):
    rewards, rows = torch.randn(8), torch.tensor([0, 1, 1, 1, 2, 2, 3, 3])  # (N,), (N,)
    expected = [
        sum(gamma ** (i - t) * rewards[i].item() for i in range(t, 8) if rows[i] == rows[t]) for t in range(8)
    ]
    assert turn_returns(rewards, rows, gamma).tolist() == pytest.approx(expected, abs=1e-6)


def test_kl_is_the_log_ratio_of_geometric_means():
    # Turn 0: probabilities .5 .5 against .25 .5: geometric means .5 and sqrt(.125). Turn 1: .2 against .4.
    policy, initial = torch.tensor([0.5, 0.5, 0.2]).log(), torch.tensor([0.25, 0.5, 0.4]).log()  # (R,)
    of_token = torch.tensor([0, 0, 1])  # (R,)
    expected = [math.log(0.5 / math.sqrt(0.125)), math.log(0.5)]
    assert turn_kl(policy, initial, of_token, 2).tolist() == pytest.approx(expected)
    product = turn_kl(policy, initial, of_token, 2, product=True)
    assert product.tolist() == pytest.approx([math.log(2), math.log(0.5)])
    assert turn_kl(policy, policy, of_token, 2).tolist() == [0.0, 0.0]


def test_mean_per_turn_counts_each_turn_by_its_own_length():
    values, of_token = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 1])
    assert mean_per_turn(values, of_token, 2).tolist() == [2.0, 10.0]


def test_normalised_advantages_have_zero_mean_and_unit_deviation():
    advantages = normalise(torch.randn(100) * 3 + 5)
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(normalise(torch.ones(4))).all()


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.1, 1.5])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_policy_loss_equals_the_formula(ratio, advantage):
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)  # (1,)
    zero = torch.zeros(1)  # (1,) so that pi_old is 1 and, far above pi, so is nothing of pi_b
    loss = policy_loss(logprob, zero, torch.full((1,), -9.0), torch.tensor([advantage]))
    expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert loss.item() == pytest.approx(expected)
    loss.sum().backward()
    clipped = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert logprob.grad.item() == pytest.approx(0 if clipped else -ratio * advantage)


def test_the_behaviour_factor_is_a_constant_at_most_one():
    logprob = torch.tensor([math.log(0.5)], requires_grad=True)
    loss = policy_loss(logprob, logprob.detach(), torch.tensor([math.log(0.55)]), torch.ones(1))
    loss.sum().backward()
    assert loss.item() == pytest.approx(-0.5 / 0.55)
    assert logprob.grad.item() == pytest.approx(-0.5 / 0.55)
    above = policy_loss(logprob, logprob.detach(), torch.tensor([math.log(0.1)]), torch.ones(1))
    assert above.item() == pytest.approx(-1.0)


def test_value_loss_takes_the_worse_of_clipped_and_plain():
    values, old, returns = torch.tensor([0.5, 0.1, -0.5]), torch.zeros(3), torch.tensor([1.0, 1.0, -0.4])
    # 0.5 clips to 0.2: (0.2 - 1)^2 is worse; 0.1 is inside; -0.5 clips to -0.2: (-0.2 + 0.4)^2 is worse.
    assert value_loss(values, old, returns).tolist() == pytest.approx([0.32, 0.405, 0.02])


def test_explained_variance():
    returns = torch.tensor([1.0, -1.0, 0.5])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((3,), returns.mean().item()), returns) == pytest.approx(0, abs=1e-6)
    assert explained_variance(returns, torch.ones(3)) is None


@pytest.mark.parametrize("constant", [-0.7, -1.1, 0.3])
def test_turns_that_differ_by_rounding_only_push_nothing(constant):
    returns, values = torch.full((7,), constant), torch.zeros(7)  # (N,): all episodes failed alike
    assert (ppo.advantages(returns, values) == 0).all()
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-8  # (N,)
    assert (ppo.advantages(constant + noise, torch.zeros(1000)) == 0).all()


def test_clipped_tokens_are_those_without_gradient():
    new = torch.linspace(-1, 1, 41).repeat(2).requires_grad_()  # (R,)
    old, behaviour = torch.zeros(82), torch.full((82,), 0.1)  # (R,)
    advantages = torch.tensor([1.0, -1.0]).repeat_interleave(41)  # (R,)
    ppo.policy_loss(new, old, behaviour, advantages).sum().backward()
    clipped = is_clipped(ppo.policy_ratio(new, old, behaviour), advantages)
    assert torch.equal(clipped, new.grad == 0)
    assert 0 < clipped.sum() < 82


def test_the_worked_example_is_that_of_the_formulas(capsys):
    ppo.worked_example()
    rows = {line[:36].strip(): line[36:].split() for line in capsys.readouterr().out.splitlines()}
    # By hand: KL_1 = (0.2 + 0) / 2, KL_2 = (0.3 + 0 + 0) / 3; R = r - 0.05 KL; G_1 = R_1 + R_2.
    assert rows["KL_t"] == ["0.1", "0.1"]
    assert rows["G_t = R_t + G_t+1"] == ["0.79", "0.995"]
    assert rows["clipped (1) or not (0)"] == ["1.0", "0.0", "1.0", "0.0", "0.0"]
