"""Every setting of a run: its meaning, its default, the presets, and which settings exclude each other.

Paper: section 3.1 and appendix A for the numbers of the presets `8b` and `70b`; the defaults are those of the
toy world. Each field of `Config` is a flag of train.py with the same name: `python train.py --help`.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from chat import Chat
from distributed import check_device, load_tokenizer
from rollout import RolloutSettings, check_feedback


def option(default, text: str):
    """A field of Config whose explanation appears in --help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; each field is a flag of the command line. The defaults are the preset `toy`."""

    model: str = option("", "Hugging Face directory or hub name; empty: the toy world's own model")
    problems: str = option("toy", "toy, code_contests, humaneval_plus, mbpp_plus, or a file of problems")
    train_split: str = option("train", "split to train on")
    valid_split: str = option("valid", "split that chooses the best policy; empty: the last one is kept")
    test_split: str = option("test", "split of the table before and after; empty: no table")
    holdout: float = option(0.0, "share of a file's problems to keep for valid and test, half for each")
    limit_problems: int = option(0, "use only this number of problems from each split, the first; 0: all")
    output: str = option("runs/toy", "directory of the run")
    chat_template: str = option("", "file with a chat template, for base models that have none")
    template_options: str = option("", "JSON object of options for the chat template")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "device of all networks")
    dtype: str = option("float32", "number type of the computation; weights and optimiser state stay in fp32")
    cpu_offload: bool = option(False, "keep weights and optimiser state in main memory")
    gather_weights: bool = option(True, "sample with whole weights on every rank; else gather layer by layer")
    rollout_ranks: int = option(0, "number of ranks, the last ones, that only sample; the others train")
    overlap: bool = option(True, "rollout_ranks sample during training, with old weights; else in turns")
    attention: str = option("", "transformers' attention, sdpa or eager; empty: what it chooses")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    seed: int = option(0, "seed of everything random")
    iterations: int = option(20, "iterations, each a batch of rollouts and a pass of updates over it")
    batch_episodes: int = option(256, "rollouts per iteration (paper: 1024)")
    minibatch_episodes: int = option(64, "rollouts per update (paper: 256)")
    microbatch_tokens: int = option(16384, "tokens, padding included, of one forward and backward")
    logits_chunk: int = option(4096, "response tokens whose logits are in memory at once")
    turn_limit: int = option(3, "maximum number of responses in an episode")
    max_new_tokens: int = option(48, "maximum number of tokens in a response")
    context: int = option(512, "maximum number of tokens in a dialog")
    batch_rows: int = option(128, "dialogs that are sampled at once")
    temperature: float = option(1.0, "sampling temperature in training")
    feedback: str = option("true", "feedback in training: true, random or none (ablations)")
    examples: str = option("", "JSON file with a list of chat messages that precede every dialog (few-shot)")
    learning_rate: float = option(5e-4, "of the policy (paper: 2e-7)")
    value_learning_rate: float = option(5e-4, "of the critic (paper: 2e-7)")
    weight_decay: float = option(0.1, "AdamW, both networks")
    warmup_updates: int = option(10, "updates over which the learning rates rise linearly (paper: 50)")
    max_gradient_norm: float = option(1.0, "gradients are clipped to this norm, each network separately")
    beta: float = option(0.05, "weight of the KL penalty")
    gamma: float = option(1.0, "discount of a turn")
    clip: float = option(0.2, "clip range of the ratio and of the value")
    product_kl: bool = option(False, "ablation: KL of the token products instead of their geometric mean")
    token_level_values: bool = option(False, "ablation: a value before every response token")
    evaluate_every: int = option(5, "iterations between evaluations on the valid split")
    evaluation_temperature: float = option(0.2, "temperature of evaluations")
    evaluation_top_p: float = option(0.95, "top-p of evaluations")
    evaluation_rollouts: int = option(1, "rollouts per problem in evaluations")
    show_every: int = option(5, "iterations between those whose episodes episodes.jsonl and dialogs.txt show")
    checkpoint_every: int = option(5, "iterations between checkpoints")
    keep_checkpoints: int = option(2, "number of checkpoints to keep, the newest")
    resume: str = option("", "directory of a run to go on with, from its newest checkpoint")
    plan: bool = option(False, "print the memory that --ranks ranks would need, and end")
    ranks: int = option(8, "ranks of the plan")
    gpu_gib: float = option(79.0, "memory of a GPU of the plan, in GiB (an 80 GB H100 has 79)")

    def sampling(self) -> RolloutSettings:
        """How dialogs are sampled in training."""
        names = {entry.name for entry in fields(RolloutSettings)} & {entry.name for entry in fields(self)}
        return RolloutSettings(**{name: getattr(self, name) for name in names})

    def eval_sampling(self, feedback: str = "true") -> RolloutSettings:
        """How dialogs are sampled in evaluations: with their own temperature and top-p, and this feedback."""
        sharper = {"temperature": self.evaluation_temperature, "top_p": self.evaluation_top_p}
        return replace(self.sampling(), feedback=feedback, **sharper)

    def loading(self) -> dict:
        """Arguments of `load_model` that all networks share."""
        names = ("model", "device", "dtype", "attention", "cpu_offload")
        return {name: getattr(self, name) for name in names}

    def chat(self) -> Chat:
        """The model's tokenizer and chat template. Raises: ValueError if they cannot be used."""
        return Chat(load_tokenizer(self.model, self.chat_template), self.template_options)

    def check_ranks(self, ranks: int) -> None:
        """Raises: ValueError if this number of ranks cannot share the work."""
        learners, minibatch = ranks - self.rollout_ranks, self.minibatch_episodes
        if learners < 1 or minibatch % learners:
            left = f"{ranks} ranks less rollout_ranks {self.rollout_ranks} leave {learners} to train"
            raise ValueError(f"{left}, but minibatch_episodes {minibatch} must be a multiple of these")


PAPER = dict(
    problems="code_contests",
    dtype="bfloat16",
    gradient_checkpointing=True,
    batch_episodes=1024,
    minibatch_episodes=256,
    logits_chunk=1024,
    max_new_tokens=1024,
    context=8192,
    learning_rate=2e-7,
    value_learning_rate=2e-7,
    warmup_updates=50,
    evaluate_every=200,  # iterations of 4 updates: the paper evaluates every 800 updates
    evaluation_rollouts=20,
    checkpoint_every=20,
)
PRESETS = {
    "toy": {},
    "8b": PAPER
    | dict(model="meta-llama/Llama-3.1-8B-Instruct", output="runs/8b", iterations=3000, batch_rows=32),
    "70b": PAPER
    | dict(model="meta-llama/Llama-3.1-70B-Instruct", output="runs/70b", iterations=2000, batch_rows=8)
    | dict(gather_weights=False, microbatch_tokens=8192),
}
ATTENTION = ("", "sdpa", "eager")
MAY_BE_0 = ("limit_problems", "rollout_ranks", "seed", "iterations")
# What a resumed run may change without becoming another run. The last six only trade memory against speed: a
# run that ran out of memory can go on.
MAY_CHANGE = """
resume output iterations device checkpoint_every keep_checkpoints show_every
batch_rows microbatch_tokens logits_chunk gather_weights cpu_offload gradient_checkpointing
""".split()


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """The command line as a Config: a preset, or the run to resume, then the flags that differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="a set of defaults (default: toy)")
    for entry in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if entry.type is bool else {"type": entry.type}
        text = f"{entry.metadata['help']} (default: {entry.default!r})".replace("%", "%%")
        parser.add_argument(f"--{entry.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(arguments))
    preset = PRESETS[given.pop("preset") or "toy"]
    given = _resumed(given, preset) if "resume" in given else preset | given
    config = replace(Config(), **given)
    check(config)
    return config


def _resumed(given: dict, preset: dict) -> dict:
    """The settings of the run to resume, with those flags that may differ; a preset must agree with them."""
    path = Path(given["resume"]) / "config.json"
    try:
        stored = {**json.loads(path.read_text())}
    except (OSError, TypeError, ValueError) as error:
        told = f"{path} cannot be read as the settings of a run: {error}"
        raise ValueError(f"--resume {given['resume']}: this is no run, {told}") from error
    changed = {name: value for name, value in (preset | given).items() if name not in MAY_CHANGE}
    wrong = [f"{n} {stored.get(n)!r}, now {v!r}" for n, v in changed.items() if stored.get(n) != v]
    wrong += [f"{name}, which is no setting" for name in stored if name not in asdict(Config())]
    if wrong:
        raise ValueError(f"{given['resume']} was started with {'; '.join(wrong)}")
    return stored | given | {"output": given["resume"]}


def check(c: Config) -> None:
    """Raises: ValueError, one sentence, for a setting that no run can use or settings that disagree."""
    for entry in fields(Config):
        value, least = getattr(c, entry.name), int(entry.name not in MAY_BE_0)
        kinds = (int, float) if entry.type is float else entry.type
        if not isinstance(value, kinds) or (entry.type is float and not 0 <= value < math.inf):
            wanted = f"value of type {entry.type.__name__}"
            wanted = "finite number, not negative" if entry.type is float else wanted
            raise ValueError(f"{entry.name} is {value!r}, but must be a {wanted}")
        if entry.type is int and value < least:
            raise ValueError(f"{entry.name} is {value}, but must be at least {least}")
    check_feedback(c.feedback)
    check_device(c.device)
    top_p, batch, minibatch = c.evaluation_top_p, c.batch_episodes, c.minibatch_episodes
    tokens = c.microbatch_tokens
    no_model = not c.model and (c.plan or c.problems != "toy")
    disagree = {
        f"temperature is {c.temperature}, but training needs one above 0": c.temperature == 0,
        f"evaluation_top_p is {top_p}, but must be above 0 and at most 1": not 0 < top_p <= 1,
        f"sampling needs --attention sdpa or eager, not {c.attention}": c.attention not in ATTENTION,
        f"dtype is {c.dtype!r}, but must be float32 or bfloat16: float16 would need its losses scaled": (
            c.dtype not in ("float32", "bfloat16")
        ),
        f"{'a plan' if c.plan else c.problems} needs a --model: the toy's own knows only the toy": no_model,
        f"batch_episodes {batch} is not a multiple of minibatch_episodes {minibatch}": batch % minibatch,
        f"microbatch_tokens {tokens} cannot hold a dialog of context {c.context}": tokens < c.context,
        "a plan is of ranks that train: leave rollout_ranks out": c.plan and c.rollout_ranks,
    }
    for sentence, wrong in disagree.items():
        if wrong:
            raise ValueError(sentence)
    if c.plan:
        c.check_ranks(c.ranks)
