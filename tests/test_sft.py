"""Supervised fine-tuning learns the last response of a dialog, and nothing else."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model

from benchmarks.sft import fine_tune, last_response, main
from distributed import load_model, load_tokenizer

DIALOG = [
    {"role": "user", "content": "Read a word and print another.\n\n"},
    {"role": "assistant", "content": "```python\ns = input().strip()\n```"},
    {"role": "user", "content": "Wrong.\n"},
    {"role": "assistant", "content": "```python\nprint(t)\n```"},
]
SETTINGS = {"epochs": 1, "learning_rate": 1e-2, "minibatch_episodes": 4, "microbatch_tokens": 4096}


def test_ids_are_those_of_the_template_and_the_turn_is_the_last_response_with_its_end(tokenizer):
    episode = last_response(tokenizer, DIALOG)
    assert tokenizer.decode(episode.ids) == tokenizer.apply_chat_template(DIALOG, tokenize=False)
    (turn,) = episode.turns
    assert tokenizer.decode(episode.ids[turn.start : turn.end]) == DIALOG[-1]["content"] + "<|end|>"
    assert turn.end == len(episode.ids)


def test_loss_is_the_cross_entropy_of_the_last_response_only(tokenizer):
    model = make_model(len(tokenizer))
    episodes = [last_response(tokenizer, DIALOG[-2:]), last_response(tokenizer, DIALOG)] * 2
    losses, tokens = 0.0, 0
    for episode in episodes:
        with torch.no_grad():
            logits = model(torch.tensor([episode.ids])).logits[0, :-1]  # (T-1, V)
        start = episode.turns[0].start
        losses += F.cross_entropy(logits[start - 1 :], torch.tensor(episode.ids[start:]), reduction="sum")
        tokens += len(episode.ids) - start
    args = argparse.Namespace(**SETTINGS, device="cpu", seed=0)
    for budget in (4096, len(episodes[1].ids)):  # micro-batches do not change it
        args.microbatch_tokens = budget
        (loss,) = fine_tune(make_model(len(tokenizer)), episodes, args)
        torch.testing.assert_close(torch.tensor(loss), losses / tokens, atol=1e-5, rtol=1e-5)


def write_run(directory: Path, solved: int) -> None:
    directory.mkdir()
    (directory / "settings.json").write_text("{}")
    entry = {"dialog": DIALOG, "turns": [{"truncated": False}, {"truncated": False}]}
    lines = [json.dumps(entry | {"solved": number < solved}) + "\n" for number in range(8)]
    (directory / "episodes.jsonl").write_text("".join(lines))


def test_command_learns_solved_rollouts_and_refuses_too_few(tmp_path, tokenizer, monkeypatch, capsys):
    base, output = tmp_path / "base", tmp_path / "sft"
    make_model(len(tokenizer), end=tokenizer.eos_token_id).save_pretrained(base)
    tokenizer.save_pretrained(base)

    def command(episodes: Path) -> None:
        flags = ["--model", base, "--minibatch_episodes", 4, "--epochs", 40, "--learning_rate", 1e-2]
        words = ["sft.py", *flags, "--device", "cpu", "--output", output, "--episodes", episodes]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        main()

    write_run(tmp_path / "few", solved=3)
    with pytest.raises(ValueError, match="3 solved rollouts, fewer than --minibatch_episodes 4"):
        command(tmp_path / "few")
    write_run(tmp_path / "own", solved=5)
    command(tmp_path / "own")
    assert capsys.readouterr().out.startswith("5 of 8 rollouts")
    episode = last_response(tokenizer, DIALOG)
    with torch.no_grad():
        guess = load_model(str(output))(torch.tensor([episode.ids])).logits[0].argmax(-1)  # (T,)
    start = episode.turns[0].start
    assert guess[start - 1 : -1].tolist() == episode.ids[start:]
    assert load_tokenizer(str(output)).chat_template == tokenizer.chat_template
