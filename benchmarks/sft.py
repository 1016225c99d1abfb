"""Supervised fine-tuning (SFT) on a model's own solved rollouts: the simpler way to teach repair.

Paper: section 4 compares ways to elicit multi-turn repair (few-shot prompts, SFT, RLEF). Rollouts of the
initial model are sampled on the training set, the solved ones are kept, and the model is trained on them with
the cross-entropy loss. As in the paper, only the *last* response of a dialog is learned. The responses before
it are wrong; they and their feedback are the context.

    python evaluate.py --model BASE --problems toy --split train --temperature 1 --top_p 1 --output runs/own
    python -m benchmarks.sft --model BASE --episodes runs/own --output runs/sft

Differs: the paper uses rollouts of a larger model; `--episodes` accepts those of any model. Saved dialogs are
text, without the sampled ids, so they are encoded again. Truncated responses are left out, because they have
no end token.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import distributed
import ppo
from chat import Chat, as_chat, observation_ids, prompt_ids
from checkpoints import check_replaceable, export
from distributed import as_forward, friendly_errors, rank, ranks
from evaluate import read_run
from rollout import Episode, Turn
from sampling import check_architecture, check_logits


def last_response(chat, dialog: Sequence[dict]) -> Episode:
    """A dialog of chat messages as an episode; its only turn is the last response with its end token."""
    chat, text = as_chat(chat), dialog[-1]["content"]
    ids = prompt_ids(chat, dialog[0]["content"])
    for answer, asked in zip(dialog[1::2], dialog[2::2], strict=False):
        ids += chat.tokenizer.encode(answer["content"], add_special_tokens=False)
        ids += observation_ids(chat, asked["content"])
    start, behind = len(ids), observation_ids(chat, "?")
    end = behind[: behind.index(chat.end) + 1] if chat.end in chat.ends else [chat.tokenizer.eos_token_id]
    ids += chat.tokenizer.encode(text, add_special_tokens=False) + end
    turn = Turn(start, len(ids), [], text=text)
    return Episode(None, ids, [turn], public_passed=True, solved=True, truncated=False, index=0)


def fine_tune(policy, episodes: Sequence[Episode], args: argparse.Namespace) -> list[float]:
    """Train on the turns of `episodes`, on any number of ranks; returns each update's mean loss per token."""
    updates = len(episodes) // args.minibatch_episodes * args.epochs
    optimiser = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min(1.0, (n + 1) / 10) * (1 - n / updates)
    )
    losses, bar = [], tqdm(total=updates, desc="SFT", unit="update", disable=rank() > 0)
    for epoch in range(args.epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(episodes))
        for first in range(0, len(order) - args.minibatch_episodes + 1, args.minibatch_episodes):
            minibatch = [episodes[i] for i in order[first : first + args.minibatch_episodes]]
            tokens = sum(episode.turns[0].end - episode.turns[0].start for episode in minibatch)
            loss = 0.0
            for group in ppo.microbatches(minibatch, args.microbatch_tokens, ranks())[rank() :: ranks()]:
                batch = ppo.collate(group, args.device)
                logprobs, _ = as_forward(ppo.response_logprobs, policy, batch, 1.0)  # (R,)
                share = -logprobs.sum() / tokens
                share.backward()
                loss += share.item()
            distributed.clip_gradients(policy, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            losses += distributed.total([loss])
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
            bar.update()
    bar.close()
    return losses


def main() -> None:
    """The command line: read the rollouts, train on the solved ones, write the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face directory or hub name of the model to train")
    add("--episodes", required=True, help="directory of a run of evaluate.py with the rollouts")
    add("--output", required=True, help="Hugging Face directory to write")
    add("--epochs", type=int, default=2)
    add("--learning_rate", type=float, default=2e-6)
    add("--minibatch_episodes", type=int, default=64, help="dialogs per update")
    add("--microbatch_tokens", type=int, default=16384, help="tokens of a forward pass, padding included")
    add("--chat_template", default="", help="file with a chat template, for models that have none")
    add("--template_options", default="", help="JSON object of options for the chat template")
    add("--dtype", default="float32", help="number type of the computation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.epochs, args.minibatch_episodes) < 1:
        raise ValueError(
            f"--epochs {args.epochs} and --minibatch_episodes {args.minibatch_episodes} must be at least 1"
        )
    distributed.check_device(args.device)
    check_replaceable(Path(args.output))
    _, records = read_run(Path(args.episodes))
    solved = [entry for entry in records if entry["solved"] and not entry["turns"][-1]["truncated"]]
    if len(solved) < args.minibatch_episodes:
        raise ValueError(
            f"{args.episodes} has {len(solved)} solved rollouts, fewer than "
            f"--minibatch_episodes {args.minibatch_episodes}"
        )
    with distributed.process_group(args.device, args.dtype == "float32") as args.device:
        if args.minibatch_episodes % ranks():
            raise ValueError(
                f"--minibatch_episodes {args.minibatch_episodes} does not divide by {ranks()} ranks"
            )
        chat = Chat(distributed.load_tokenizer(args.model, args.chat_template), args.template_options)
        policy = distributed.load_model(args.model, args.device, args.dtype, state_dtype="float32")
        episodes = [last_response(chat, entry["dialog"]) for entry in solved]
        longest = max(len(episode.ids) for episode in episodes)
        check_architecture(policy.config, longest)
        check_logits(policy, len(chat.tokenizer), longest)
        torch.manual_seed(args.seed)
        losses = fine_tune(policy, episodes, args)
        export(policy, chat.tokenizer, Path(args.output), args.dtype)
        if rank() == 0:
            print(f"{len(solved)} of {len(records)} rollouts; loss {losses[0]:.3f}, at last {losses[-1]:.3f}")


if __name__ == "__main__":
    with friendly_errors("sft.py"):
        main()
