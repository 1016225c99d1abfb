"""Where the episodes of an iteration come from.

Paper: appendix A. There, sampling and training run asynchronously on GPUs of their own. Here all ranks do
both, in turns, so that the policy that samples is the policy that is trained. With `--rollout_ranks N` the
last N ranks only sample and the others only train. With `overlap` they sample the next batch meanwhile: its
weights are one iteration old, and the factor w of the policy loss corrects for that.

`EpisodeSource.take` hides all of that from train.py's loop. An episode's problem and random numbers depend
only on the seed, the iteration and its place in the batch: neither ranks nor a stop change what is sampled.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from chat import Chat
from config import Config
from data import Problem
from distributed import as_forward, empty_copy, gather, load_model, rank, share, total
from rollout import Episode, RolloutSettings, Turn, check_others, fitting, rollout, too_long
from sandbox import Sandbox, TestResult, Verdict
from sources import load_problems, one_for_all_splits, select
from value_head import trunk_of, use_float32_logits


def draw_problems(problems: Sequence[Problem], iteration: int, config: Config) -> list[Problem]:
    """The problems of an iteration: whole passes over the training set, each in an order of its own."""
    first, size = iteration * config.batch_episodes, len(problems)
    last = first + config.batch_episodes - 1
    generators = (np.random.default_rng([config.seed, n]) for n in range(first // size, last // size + 1))
    order = np.concatenate([generator.permutation(size) for generator in generators])
    return [problems[int(i)] for i in order[first % size :][: config.batch_episodes]]


def load_splits(config: Config, chat: Chat) -> list[Sequence[Problem]]:
    """The problems of the splits train, valid and test whose prompts leave room for a response."""
    names = (config.train_split, config.valid_split, config.test_split)
    if rank() == 0 and one_for_all_splits(config.problems) and not config.holdout and any(names[1:]):
        told = "is train, valid and test at once; --holdout 0.1 keeps a tenth of it for the last two"
        print(f"{config.problems} {told}")
    splits: list[Sequence[Problem]] = []
    for name in names:
        problems = load_problems(config.problems, name, config.holdout) if name else []
        problems = problems[: config.limit_problems or None]
        places = fitting(problems, chat, config.sampling())
        if len(places) < len(problems):
            message = too_long(problems, places, f"{name} problems", config.sampling())
            if not places:
                raise ValueError(message)
            if rank() == 0:
                print(f"left out: {message}", file=sys.stderr)
            problems = select(problems, places)
        splits.append(problems)
    # The table before and after has random feedback too, from training problems.
    for problems in splits[: 2 if config.feedback == "random" else bool(splits[2])]:
        if problems:
            check_others(problems)
    return splits


class Sampler:
    """Everything that sampling needs except the policy; the ranks of a team share the work."""

    def __init__(self, config: Config, chat: Chat, sandbox: Sandbox, training: Sequence[Problem]) -> None:
        self.config, self.chat, self.sandbox, self.training = config, chat, sandbox, training

    def sample(
        self,
        policy: PreTrainedModel,
        problems: Sequence[Problem],
        settings: RolloutSettings,
        seed: int,
        first_index: int = 0,
        others: Sequence[Problem] = (),
    ) -> list[Episode]:
        """An episode for each entry of `problems`, on every rank; random feedback comes from `others`.

        Episode i draws its noise from the stream (seed, first_index + i), whatever the number of ranks.
        """
        config, mine = self.config, share(len(problems))
        how = settings, seed, first_index + mine.start, rank() == 0, others
        with for_sampling(policy, config.device, config.dtype, config.gather_weights) as model:
            episodes = rollout(model, self.chat, problems[mine], self.sandbox, *how)
        return _with_problems(gather(_without_problems(episodes)), problems)

    def batch(self, policy: PreTrainedModel, iteration: int) -> list[Episode]:
        """The training episodes of an iteration."""
        drawn = draw_problems(self.training, iteration, self.config)
        first, settings = iteration * self.config.batch_episodes, self.config.sampling()
        return self.sample(policy, drawn, settings, self.config.seed + 1, first, self.training)


class StopRequest:
    """Calling it returns whether SIGTERM or Ctrl-C has arrived since the first call.

    A signal before the first call ends the process at once, because nothing can be lost yet; so does a second
    signal.
    """

    def __init__(self) -> None:
        self.watched = self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def __call__(self) -> bool:
        self.watched = True
        return self.received

    def _note(self, number: int, _frame: object) -> None:
        if self.received or not self.watched:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = True
        os.write(2, b"\nstopping at the next point where no work is lost; press again to stop at once\n")


class EpisodeSource:
    """The episodes of each iteration, for the ranks that train."""

    def __init__(self, sampler: Sampler, policy, first: int, prefetched: list[dict], stopped: Callable):
        """Args: first: the next iteration; prefetched: its episodes, if a checkpoint has them."""
        self.sampler, self.policy, self.stopped, self.config = sampler, policy, stopped, sampler.config
        stopped()  # from now on a signal stops the run where no work is lost
        self.overlap = self.config.rollout_ranks > 0 and self.config.overlap
        self.prefetched = [_from_json(entry) for entry in prefetched]  # received, not yet used
        if self.overlap and not prefetched and first < self.config.iterations:
            give_weights(policy, self.config.dtype)

    def stop_requested(self) -> bool:
        """Whether `stopped()` is true on any rank that trains."""
        return any(gather([self.stopped()]))

    def take(self, iteration: int) -> list[Episode] | None:
        """The episodes of an iteration; None if a stop was requested before they were used."""
        if not self.overlap and self.stop_requested():
            return None
        episodes = self._fetch(iteration)
        if self.stop_requested():  # sampling may have taken long
            return None
        self.prefetched = []
        if self.overlap and iteration + 1 < self.config.iterations:
            give_weights(self.policy, self.config.dtype)  # they sample the next batch during the updates
        return episodes

    def prefetch(self, iteration: int) -> list[dict]:
        """Fetch the episodes of the next iteration, as plain JSON for a checkpoint.

        Empty without `overlap`: then a resumed run samples the same episodes again.
        """
        if not self.overlap or iteration == self.config.iterations:
            return []
        self._fetch(iteration)
        return [asdict(episode) for episode in self.prefetched]

    def _fetch(self, iteration: int) -> list[Episode]:
        if not self.config.rollout_ranks:
            return self.sampler.batch(self.policy, iteration)
        if not self.prefetched:
            if not self.overlap:
                give_weights(self.policy, self.config.dtype)
            self.prefetched = broadcast(None, -self.config.rollout_ranks)
        return _with_problems(self.prefetched, draw_problems(self.sampler.training, iteration, self.config))

    def close(self) -> None:
        """Tell the ranks that only sample that no more weights will come."""
        if self.config.rollout_ranks:
            give_weights(None, self.config.dtype)


def sample_for_learners(sampler: Sampler, first: int, stopped: Callable[[], bool]) -> None:
    """The work of a rank that only samples, from iteration `first` on: take weights, sample, send; repeat."""
    policy = load_model(**sampler.config.loading())
    stopped()  # from now on a signal to all ranks does not end this one: those that train want its batch
    while take_weights(policy):
        broadcast(_without_problems(sampler.batch(policy, first)), -sampler.config.rollout_ranks)
        first += 1


def _without_problems(episodes: Sequence[Episode]) -> list[Episode]:
    """To be sent: the tests of problems can be large, and every rank has them."""
    return [replace(episode, problem=None) for episode in episodes]


def _with_problems(episodes: Sequence[Episode], problems: Sequence[Problem]) -> list[Episode]:
    return [replace(episode, problem=p) for episode, p in zip(episodes, problems, strict=True)]


def _from_json(entry: dict) -> Episode:
    """The inverse of `asdict` for an episode without its problem."""
    turns = [Turn(**turn) for turn in entry["turns"]]
    for turn in turns:
        turn.results = turn.results and [
            TestResult(**r | {"verdict": Verdict(r["verdict"])}) for r in turn.results
        ]
    return Episode(**entry | {"turns": turns})


# ---- the policy's weights, for those that sample -----------------------------------------------------------


@contextlib.contextmanager
def for_sampling(policy, device: str, dtype: str, gather_weights: bool) -> Iterator[PreTrainedModel]:
    """The policy in a form that each rank can run any number of times, whatever the other ranks do.

    With `gather_weights` each rank has a whole copy in `dtype` for that time. Without, every forward gathers
    the weights layer by layer, so all ranks must run it together: before each one they count the ranks that
    still sample, and a rank that has finished runs empty forwards until none does.
    """
    if not isinstance(policy, FSDPModule):
        yield policy
    elif gather_weights:
        whole = empty_copy(policy)
        for name, tensor in (*policy.named_parameters(), *policy.named_buffers()):
            if isinstance(tensor, DTensor):
                tensor = tensor.detach().full_tensor().to(device, getattr(torch, dtype))
                tensor = nn.Parameter(tensor, requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(owner), leaf, tensor)
        whole.tie_weights()
        use_float32_logits(whole)
        yield whole.eval()
    else:
        decoder = trunk_of(policy)
        as_forward(lambda model: None, policy)  # gathers the root's weights until `reshard`
        counting = decoder.register_forward_pre_hook(lambda *_: total([1.0]) and None)
        yield policy
        counting.remove()
        nothing = torch.zeros(1, 1, dtype=torch.long, device=policy.device)  # (1, 1)
        with torch.no_grad():
            while total([0.0]) != [0.0]:
                decoder(nothing, use_cache=False)
        policy.reshard()


def broadcast(thing: object, source: int) -> object:
    """The `thing` of rank `source`, on every rank of both teams; a negative `source` counts from the end."""
    things = [thing]
    dist.broadcast_object_list(things, source % dist.get_world_size())
    return things[0]


def give_weights(policy: FSDPModule | None, dtype: str) -> None:
    """Send the trained policy, in `dtype`, to the ranks in `take_weights`; None: no more will come."""
    broadcast(policy is not None, 0)
    for parameter in policy.parameters() if policy else ():
        dist.broadcast(parameter.detach().to(getattr(torch, dtype)).full_tensor(), 0)


def take_weights(policy: FSDPModule) -> bool:
    """Wait for the trained policy and copy it into this one, of the same dtype; False if none will come."""
    more = broadcast(None, 0)
    for parameter in policy.parameters() if more else ():
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)  # not sharded
        dist.broadcast(whole, 0)
        mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.detach().to_local().copy_(mine.to_local())
    return more
