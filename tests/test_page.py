"""The episodes that a run keeps: their numbers are those of the update, and a browser shows them as text."""

import html
import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import toy
from config import Config
from ppo import collate, response_logprobs
from rollout import Episode, RolloutSettings, Turn, rollout
from sandbox import TestResult, Verdict
from tools.page import as_text, write
from tools.records import EPISODES, choose, describe, logprobs_of, numbers_of, pieces
from train import draw_minibatches, prepare, update
from value_head import ValueModel

HOSTILE = "</script><script>document.title = 'mine'</script><img src=x onerror=document.title='mine'>"
CONFIG = Config(
    device="cpu",
    batch_episodes=12,
    minibatch_episodes=6,
    microbatch_tokens=300,
    max_new_tokens=12,
    context=600,
    warmup_updates=1,
)


@pytest.fixture(scope="module")
def episodes(model, tokenizer, sandbox) -> list[Episode]:
    settings = RolloutSettings(max_new_tokens=12, context=600)
    return rollout(model, tokenizer, toy.problems("train")[:12], sandbox, settings, seed=0)


def policy_logprobs(policy, episode: Episode) -> list[torch.Tensor]:
    """Log-probs of each turn's tokens, of this episode alone."""
    with torch.no_grad():
        logprobs, _ = response_logprobs(policy, collate([episode], torch.device("cpu")), 1.0)  # (R,)
    return list(logprobs.split([turn.end - turn.start for turn in episode.turns]))


@pytest.mark.parametrize("how", [{}, {"product_kl": True}, {"token_level_values": True}])
def test_the_numbers_are_those_of_the_update(episodes, tokenizer, how):
    config = replace(CONFIG, **how)
    policy, reference = (make_model(len(tokenizer), seed=seed) for seed in (0, 5))
    critic = ValueModel(make_model(len(tokenizer), seed=1))
    optimisers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (policy, critic)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 1.0) for optimiser in optimisers]
    prepared, _ = prepare(policy, reference, critic, draw_minibatches(episodes, 0, config), config)
    assert sum(map(len, prepared)) > 2

    wanted = episodes[3:6]
    old, initial = ([policy_logprobs(network, e) for e in wanted] for network in (policy, reference))
    with torch.no_grad():
        values = [
            critic(torch.tensor([e.ids]), torch.tensor([0]), torch.tensor([e.turns[0].start - 1]))
            for e in wanted
        ]
    before = logprobs_of(policy, wanted, config)
    for microbatches in prepared:
        update(policy, critic, optimisers, schedules, microbatches, config)
    numbers = numbers_of(prepared, before, logprobs_of(policy, wanted, config), config)
    assert len(numbers) == sum(len(episode.turns) for episode in wanted)

    # The advantages of all tokens, in the order of the micro-batches.
    of_batch = {}
    for microbatch in (m for microbatches in prepared for m in microbatches):
        lengths = [turn.end - turn.start for e in microbatch.episodes for turn in e.turns]
        keys = [(e.index, t) for e in microbatch.episodes for t in range(len(e.turns))]
        of_batch |= zip(keys, microbatch.advantages.split(lengths), strict=True)
    close = lambda expected: pytest.approx(expected, abs=2e-4)  # noqa: E731
    for place, episode in enumerate(wanted):
        kl = [
            (a - b).sum() if config.product_kl else (a - b).mean()
            for a, b in zip(old[place], initial[place], strict=True)
        ]
        rewards = [-0.2 if turn.code is None else 0.0 for turn in episode.turns[:-1]] + [
            1.0 if episode.solved else -1.0
        ]
        penalised = [r - config.beta * k.item() for r, k in zip(rewards, kl, strict=True)]
        new = policy_logprobs(policy, episode)
        for t in range(len(episode.turns)):
            of_turn, of_token = numbers[episode.index, t]["numbers"], numbers[episode.index, t]["tokens"]
            assert of_turn["r"] == close(rewards[t])
            assert of_turn["KL"] == close(kl[t].item())
            assert of_turn["R"] == close(penalised[t])
            assert of_turn["G"] == close(sum(penalised[t:]))
            assert of_turn["G - V"] == close(of_turn["G"] - of_turn["V"])
            assert of_token["log-prob"] == close(old[place][t].tolist())
            assert of_token["KL"] == close((old[place][t] - initial[place][t]).tolist())
            assert of_token["ratio"] == close((new[t] - old[place][t]).exp().tolist())
            assert of_token["advantage"] == close(of_batch[episode.index, t].tolist())
            assert of_turn["A"] == close(of_batch[episode.index, t].mean().item())
            assert len(of_token["entropy"]) == len(of_token["ratio"])
        if not config.token_level_values:
            assert numbers[episode.index, 0]["numbers"]["V"] == close(values[place].item())
    ratios = [ratio for turn in numbers.values() for ratio in turn["tokens"]["ratio"]]
    assert max(abs(ratio - 1) for ratio in ratios) > 0.01


def test_what_another_grouping_rounds_is_not_shown_as_a_ratio(episodes, tokenizer):
    policy = make_model(len(tokenizer), seed=5)
    critic = ValueModel(make_model(len(tokenizer), seed=1))
    prepared, _ = prepare(policy, policy, critic, draw_minibatches(episodes, 0, CONFIG), CONFIG)
    for microbatch in (m for microbatches in prepared for m in microbatches):
        microbatch.old_logprobs = microbatch.old_logprobs + 0.1  # (R,) as in half precision
    before = logprobs_of(policy, episodes[:2], CONFIG)
    numbers = numbers_of(prepared, before, logprobs_of(policy, episodes[:2], CONFIG), CONFIG)
    assert {ratio for turn in numbers.values() for ratio in turn["tokens"]["ratio"]} == {1.0}


def ended(solved: bool, outcomes: list[str]) -> Episode:
    turns = [
        Turn(n + 1, n + 2, [-0.5], code=None if outcome == "no valid code" else "pass", text="x")
        for n, outcome in enumerate(outcomes)
    ]
    for turn, outcome in zip(turns, outcomes, strict=True):
        turn.results = [TestResult(Verdict(outcome))] if turn.code else None
    return Episode(
        toy.problems("train")[0], list(range(9)), turns, outcomes[-1] == "passed", solved, False, 0
    )


def test_the_chosen_episodes_differ_in_their_outcome():
    wrong, passed = "wrong answer", "passed"
    batch = [
        ended(False, [wrong] * 3),
        ended(True, [wrong, passed]),
        ended(False, [wrong, wrong, "exception"]),
        ended(False, [wrong] * 3),
        ended(True, [passed]),
        ended(True, [wrong, passed]),
        ended(False, [passed]),  # the public tests only
        ended(False, ["no valid code"] * 3),
        ended(True, [wrong, wrong, passed]),
    ]
    for place, episode in enumerate(batch):
        episode.index = place
    places = [episode.index for episode in choose(batch)]
    assert places == [4, 1, 8, 2, 7, 6]
    assert len(places) == EPISODES
    assert choose(batch[:1] * 20) == batch[:1]


def test_pieces_are_the_response_and_a_character_of_several_tokens_is_whole(tokenizer):
    ids = tokenizer.encode("print(a + b)\n", add_special_tokens=False) + [tokenizer.eos_token_id]
    assert pieces(tokenizer, ids) == [tokenizer.decode([i]) for i in ids]
    bytes_of = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    bytes_of.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    spelt = PreTrainedTokenizerFast(tokenizer_object=bytes_of)
    assert pieces(spelt, [*"aé≤b".encode()]) == ["a", "", "é", "", "", "≤", "b"]
    assert "".join(pieces(spelt, [*"aé".encode()][:2])) == "a\N{REPLACEMENT CHARACTER}"


def a_run(directory: Path, text: str) -> None:
    """A finished run of three iterations whose model wrote `text`."""
    episode = ended(True, ["wrong answer", "passed"])
    tokens = {name: [0.5, -0.5] for name in ("log-prob", "entropy", "KL", "advantage")}
    tokens |= {"text": [text, "<|end|>"], "ratio": [1.2, 0.9]}
    record = describe(episode, toy.build_tokenizer(), {})
    record["turns"][0] |= {"feedback": text, "tests": [["wrong answer", text]]}
    for turn, advantage in zip(record["turns"], (-0.75, 1.25), strict=True):
        turn["tokens"] = tokens
        turn["numbers"] = {name: 0.0 for name in ("r", "KL", "R", "G", "V", "G - V")} | {"A": advantage}
    kept = [record | {"iteration": number, "problem": text} for number in (1, 2, 3, 4)]
    kept.append(kept[-1] | {"solved": False, "public_passed": True})
    (directory / "episodes.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    shares = [{"iteration": number, "solved_by_turn": [0.1, 0.1 * number]} for number in (1, 2, 3, 4)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in shares) + '{"cut')
    probe = {kind: {"solved_by_turn": [0.0, 0.5]} for kind in ("true", "random")} | {"episodes": [record]}
    (directory / "result.json").write_text(json.dumps({"before": probe, "after": probe}))


def test_no_text_of_a_model_can_end_the_data(tmp_path):
    a_run(tmp_path, HOSTILE + "<!--")
    page = write(tmp_path).read_text()
    assert page.count("</script>") == 2 and page.count("<script") == 2
    assert "<img" not in page and "<!--" not in page
    stored = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert [episode["iteration"] for episode in stored["episodes"]] == [1, 3, 4, 4]
    assert stored["episodes"][0]["turns"][0]["tokens"]["text"][0] == HOSTILE + "<!--"
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_the_command_writes_a_page_or_ends_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["page.py", str(tmp_path)])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path("tools/page.py", run_name="__main__")
    assert refused.value.code == 2
    reason = "has no episodes of training: metrics.jsonl or episodes.jsonl is not there"
    assert capsys.readouterr().err == f"tools.page: {tmp_path} {reason}\n"
    a_run(tmp_path, "print(1)")
    (tmp_path / "result.json").unlink()  # the run goes on
    runpy.run_path("tools/page.py", run_name="__main__")
    assert capsys.readouterr().out == f"{tmp_path / 'episodes.html'}\n"
    assert "print(1)" in (tmp_path / "episodes.html").read_text()


def test_the_text_of_an_episode_has_its_numbers_and_ratios(tmp_path):
    a_run(tmp_path, "print(1)")
    text = as_text(json.loads((tmp_path / "episodes.jsonl").read_text().splitlines()[0]))
    assert text.startswith(
        "iteration 1, print(1), solved\n\nuser:\n" + toy.problems("train")[0].statement.strip()
    )
    assert "r 0.000  KL 0.000  R 0.000  G 0.000  V 0.000  G - V 0.000  A -0.750\n" in text
    assert "A 1.250\ntokens and their ratios: 'print(1)' 1.200  '<|end|>' 0.900\n" in text
    assert "assistant, turn 2, passed:\nprint(1)<|end|>" in text


def in_browser(page: Path) -> str:
    """The document in a headless browser after its scripts have run."""
    names = "chromium chromium-browser google-chrome".split()
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom"
    place = ["--virtual-time-budget=5000", f"--user-data-dir={page.parent / 'browser'}", page.as_uri()]
    ran = subprocess.run([browser, *flags.split(), *place], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    ("public", "verdicts", "told"),
    [
        (False, (), "3, not run, because the public tests did not pass"),
        (True, ("passed",) * 3, "3 passed"),
        (True, ("passed", "timeout"), "1 passed, number 2 timeout, 1 not run"),
    ],
)
def test_private_tests_are_told_with_their_verdicts(tokenizer, public, verdicts, told):
    problem = toy.problems("test")[0]
    ids = tokenizer.encode("?!")
    turns = [Turn(1, 2, [0.0], code="print()", results=[TestResult(Verdict.PASSED)])]
    solved = len(verdicts) == 3
    record = describe(Episode(problem, ids, turns, public, solved, False, 0, verdicts), tokenizer, {})
    assert record["private"] == told
    record["turns"][0] |= {"numbers": {}, "tokens": {"text": ["!"], "ratio": [1.0]}}
    assert as_text(record | {"iteration": 1}).endswith(f"private tests: {told}\n\n\n")


# What a reader does: choose an outcome and a colour, touch a token. Then the frame's owner gets the document.
READER = """<script>
const [iteration, result, colour] = document.querySelectorAll("#controls select");
for (const [select, value] of [[result, "not solved: a private test failed"], [colour, "ratio"]]) {
  select.value = value;
  select.dispatchEvent(new Event("change"));
}
document.querySelector("#episode .tokens span").click();
document.body.dataset.width = innerWidth;
document.body.dataset.overflow = document.documentElement.scrollWidth > innerWidth;
parent.postMessage(document.documentElement.outerHTML, "*");
</script>"""
# A headless window has at least 500 pixels; a frame can be as narrow as a phone.
FRAME = """<iframe src="episodes.html" width="WIDTH" height="900" style="border: 0"></iframe><script>
onmessage = (message) => { document.body.textContent = message.data; };
</script>"""


@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_what_is_chosen_and_hostile_markup_as_text(tmp_path, width):
    a_run(tmp_path, HOSTILE)
    page, frame = write(tmp_path), tmp_path / "frame.html"
    page.write_text(page.read_text().replace("</html>", f"{READER}</html>"))
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    shown = html.unescape(in_browser(frame))
    assert f"<title>Episodes of {tmp_path.name}</title>" in shown
    assert f'data-width="{width}" data-overflow="false"' in shown
    assert "<img" not in shown and shown.count("<script") == 3  # the data, the page's own and the reader's
    listed, episode, pair, token = (
        re.search(rf'id="{name}"[^>]*>(.*)', shown, re.DOTALL)[1]
        for name in ("list", "episode", "pair", "token")
    )
    text = html.escape(HOSTILE, quote=False)
    assert listed.partition('id="episode"')[0].count("<button") == 1
    span = f'<span style="background: rgba(var(--blue), 0.500)" class="here">{text}</span>'
    assert span in episode and text in pair
    assert "<span>ratio 1.200</span>" in token and text in token
    assert "before training: solved in 2 turns" in pair
