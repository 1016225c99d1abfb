"""Speed and memory as ratios; both sides of a ratio are measured in one run.

    python benchmarks/speed.py [rollout | update | scaling | memory ...] [--model DIR --problems FILE]

rollout   tokens/s of 3-turn dialogs: rollout(), a bare decoding loop, static `generate`, `generate_batch`
update    tokens/s of an update of both networks, against bare forward and backward passes without padding
scaling   one rank against two ranks with twice the episodes, one thread each
memory    peak of 1,024 log-probs and their gradients at V = 128,256, in chunks and all at once ("naive")
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# In front of this file's own directory, which has a sandbox.py too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy  # noqa: E402
from chat import observation_ids, prompt_ids  # noqa: E402
from config import Config  # noqa: E402
from data import Problem, first_message  # noqa: E402
from distributed import load_model, load_tokenizer  # noqa: E402
from ppo import chunked_logprobs, microbatches  # noqa: E402
from rollout import Episode, RolloutSettings, rollout  # noqa: E402
from sandbox import Sandbox  # noqa: E402
from sources import load_problems  # noqa: E402
from train import prepare, update  # noqa: E402
from value_head import ValueModel, trunk_of  # noqa: E402

LONGEST, ENDS = 128, 1 / 24


class Ending(nn.Module):
    """An output layer after which each token ends the response with probability `ENDS`."""

    def __init__(self, head: nn.Linear, end: int) -> None:
        super().__init__()
        self.head, self.weight, self.end = head, head.weight, end

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden)  # (..., V)
        logits[..., self.end] = -torch.inf
        logits[..., self.end] = logits.logsumexp(-1) + torch.tensor(ENDS / (1 - ENDS)).log()
        return logits


def make_model(tokenizer, width: int = 256, layers: int = 6) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    ).eval()


def side_by_side(columns: dict, rounds: int = 2) -> None:
    """Each column's best rate in interleaved rounds, and its ratio to the first one's."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, work in columns.items():
            began = time.perf_counter()
            tokens = work()
            seconds = time.perf_counter() - began
            if isinstance(tokens, tuple):  # it has timed itself
                tokens, seconds = tokens
            rate = tokens / seconds
            best[name] = max(best.get(name, 0.0), rate)
            print(f"  {name}: {rate:.0f} tokens/s", flush=True)
    first = next(iter(best.values()))
    for name, rate in best.items():
        print(f"{name:<44}{rate:>10.0f} tokens/s   the first is {first / rate:.2f} times as fast")


@dataclass
class Case:
    """What is measured: a real model, or a random one whose responses end at random."""

    policy: PreTrainedModel
    critic: ValueModel
    tokenizer: PreTrainedTokenizerBase
    problems: Sequence[Problem]
    settings: RolloutSettings


def load_case(model: str, problems: str) -> Case:
    """A Hugging Face directory in bf16 and its problems; without, a small random model in fp32."""
    if model:
        policy = load_model(model, dtype="bfloat16").requires_grad_(
            False
        )  # as the copy that a run samples with
        critic = load_model(model, dtype="bfloat16", wrap=ValueModel)
        settings = RolloutSettings(3, LONGEST, 2048, temperature=0.7, batch_rows=32)
        return Case(policy, critic, load_tokenizer(model), load_problems(problems, "test")[:64], settings)
    tokenizer, policy = toy.build_tokenizer(), make_model(toy.build_tokenizer())
    policy.set_output_embeddings(Ending(policy.get_output_embeddings(), tokenizer.eos_token_id))
    settings = RolloutSettings(3, LONGEST, 1024, batch_rows=16)
    return Case(policy, ValueModel(make_model(tokenizer)), tokenizer, toy.problems("test")[:32], settings)


def sample(case: Case) -> list[Episode]:
    with Sandbox() as sandbox:
        return rollout(case.policy, case.tokenizer, case.problems, sandbox, case.settings, seed=0)


def compare_rollouts(case: Case) -> None:
    model, tokenizer, settings, rows = case.policy, case.tokenizer, case.settings, case.settings.batch_rows
    sampling = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        max_new_tokens=LONGEST,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    prompts = [prompt_ids(tokenizer, first_message(p)) for p in case.problems]
    episodes = sample(case)
    context = sum(len(episode.ids) for episode in episodes) // len(episodes)
    print(f"{len(episodes)} dialogs of {context} tokens, {rows} rows")
    feedback = next(turn.feedback for episode in episodes for turn in episode.turns if turn.feedback)
    observation = observation_ids(tokenizer, feedback)

    def ours() -> int:
        return sum(turn.end - turn.start for episode in sample(case) for turn in episode.turns)

    @torch.no_grad()
    def bare(steps: int = 40) -> tuple[int, float]:
        """A loop over full rows at the dialogs' mean context; filling the cache is not counted."""
        cache = DynamicCache()
        ids = torch.randint(1000, (rows, context // 2))  # (rows, T) half of a dialog, as on average
        logits = model(ids, cache=cache, logits_to_keep=1).logits[:, -1]  # (rows, V)
        began = time.perf_counter()
        for _ in range(steps):
            token = torch.multinomial((logits.float() / settings.temperature).softmax(-1), 1)  # (rows, 1)
            logits = model(token, cache=cache).logits[:, -1]  # (rows, V)
        return steps * rows, time.perf_counter() - began

    def three_turns(respond) -> int:
        """`respond` maps dialogs to responses; a dialog's feedback is always the same."""
        dialogs, tokens = [list(ids) for ids in prompts], 0
        for _ in range(3):
            for dialog, response in zip(dialogs, respond(dialogs), strict=True):
                tokens += len(response)
                dialog += response + observation
        return tokens

    def static(dialogs: list[list[int]]) -> list[list[int]]:
        responses = []
        for start in range(0, len(dialogs), rows):
            part = dialogs[start : start + rows]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(d)) + d for d in part])  # (B, T) padded at the left
            mask = torch.tensor([[0] * (width - len(d)) + [1] * len(d) for d in part])  # (B, T)
            made = model.generate(ids, attention_mask=mask, generation_config=sampling)[:, width:].tolist()
            for row in made:
                end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                responses.append(row[:end])
        return responses

    def continuous(dialogs: list[list[int]]) -> list[list[int]]:
        made = model.generate_batch(dialogs, generation_config=sampling, progress_bar=False)
        made = sorted(made.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
        return [output.generated_tokens for output in made]

    columns = {"rollout()": ours, "bare decoding loop, all rows full": bare}
    columns["generate, static batches"] = lambda: three_turns(static)
    columns["generate_batch"] = lambda: three_turns(continuous)
    side_by_side(columns)


def compare_updates(case: Case) -> None:
    policy, critic, episodes = case.policy, case.critic, sample(case)
    if isinstance(head := policy.get_output_embeddings(), Ending):
        policy.set_output_embeddings(head.head)
    policy.requires_grad_(True)
    config = Config(device="cpu", temperature=case.settings.temperature)
    groups = microbatches(episodes, config.microbatch_tokens)
    (prepared,), _ = prepare(policy, policy, critic, [groups], config)
    optimisers = [torch.optim.SGD(network.parameters(), lr=0.0) for network in (policy, critic)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 1.0) for optimiser in optimisers]
    tokens, count = sum(len(episode.ids) for episode in episodes), len(episodes)
    every = torch.tensor([i for episode in episodes for i in episode.ids])  # (tokens,)
    rows = every[: tokens // count * count].reshape(count, -1)  # (episodes, mean length)
    response_tokens = sum(turn.end - turn.start for episode in episodes for turn in episode.turns)
    padded = sum(len(group) * len(group[0].ids) for group in groups)
    print(f"{tokens} tokens, {response_tokens} of them in responses, {padded - tokens} of padding")

    def ours() -> int:
        update(policy, critic, optimisers, schedules, prepared, config)
        return tokens

    def bare() -> int:
        """As many tokens in rows of equal length, as many groups, and logits for the same share of them."""
        for ids in rows.tensor_split(len(groups)):  # (B, T)
            hidden = trunk_of(policy)(ids, use_cache=False).last_hidden_state  # (B, T, D)
            hidden = hidden.flatten(0, 1)[: ids.numel() * response_tokens // tokens]  # (R, D)
            policy.get_output_embeddings()(hidden).log_softmax(-1)[:, 0].sum().backward()
            critic.trunk(ids, use_cache=False).last_hidden_state[:, :3].sum().backward()
        for optimiser in optimisers:
            optimiser.zero_grad()
        return rows.numel()

    side_by_side({"update()": ours, "bare forward and backward, no padding": bare})


def scale_weakly() -> None:
    """The whole loop on one and on two ranks, each with as many episodes a rank."""
    rates = {}
    with tempfile.TemporaryDirectory() as place:
        tokenizer = toy.build_tokenizer()
        make_model(tokenizer, 128, 4).save_pretrained(f"{place}/base")
        tokenizer.save_pretrained(f"{place}/base")
        for ranks in (1, 2):
            flags = {"model": f"{place}/base", "output": f"{place}/{ranks}", "iterations": 4, "device": "cpu"}
            flags |= {
                "batch_episodes": 64 * ranks,
                "minibatch_episodes": 32 * ranks,
                "microbatch_tokens": 4096,
            }
            flags |= {"valid_split": "", "test_split": ""}
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "train.py"]
            command += [f"--{name}={value}" for name, value in flags.items()]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            root = Path(__file__).parent.parent
            subprocess.run(command, cwd=root, env=environment, check=True, stderr=subprocess.DEVNULL)
            lines = (Path(place) / str(ranks) / "metrics.jsonl").read_text().splitlines()[1:]
            spent = [json.loads(line)["seconds"] for line in lines]
            rates[ranks] = {name: min(s[name] for s in spent) for name in ("rollout", "prepare", "update")}
    for phase, one in rates[1].items():
        two = rates[2][phase]
        print(f"{phase:<10}{one:>8.2f} s on one rank, {two:>6.2f} s on two: efficiency {one / two:.2f}")


def peak() -> int:
    """Peak memory so far in KiB. Not getrusage's, which in a child begins with its parent's memory."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def peak_of_logprobs(chunk: int) -> None:
    """Print the MiB by which 1,024 log-probs and their gradients raise the peak; chunk 0: all at once."""
    head, hidden = nn.Linear(64, 128_256, bias=False), torch.randn(1024, 64, requires_grad=True)
    targets = torch.arange(1024)
    (head(hidden[:1]).sum() * 0).backward()
    before = peak()
    if chunk:
        logprobs, _ = chunked_logprobs(hidden, head, targets, 1.0, chunk)
    else:
        logprobs = torch.log_softmax(head(hidden).float(), -1).gather(-1, targets[:, None])
    logprobs.sum().backward()
    print((peak() - before) / 1024)


def compare_memory() -> None:
    measured = {}
    for chunk in (0, 512, 128, 32):
        command = [sys.executable, __file__, f"--peak={chunk}"]
        # Free large blocks at once: then the peak is that of the memory in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        measured[chunk] = float(done.stdout)
        name = f"chunks of {chunk}" if chunk else "naive"
        print(f"{name:<16}{measured[chunk]:>8.0f} MiB   {measured[chunk] / measured[0]:>5.2f} of naive")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["rollout", "update", "scaling", "memory"])
    parser.add_argument("--model", default="", help="a Hugging Face directory; default: small and random")
    parser.add_argument("--problems", default="humaneval_plus", help="of --model: a problem set or file")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # used by `memory`
    arguments = parser.parse_args()
    if arguments.peak is not None:
        peak_of_logprobs(arguments.peak)
        sys.exit()
    for part in arguments.parts:
        print(part)
        if part in ("rollout", "update"):
            compare = {"rollout": compare_rollouts, "update": compare_updates}[part]
            compare(load_case(arguments.model, arguments.problems))
        else:
            {"scaling": scale_weakly, "memory": compare_memory}[part]()
