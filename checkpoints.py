"""A run on disk: its directory, its checkpoints, and the models that it exports.

A run's directory holds `config.json`, `metrics.jsonl` (an object per iteration), `episodes.jsonl` and
`dialogs.txt` (some episodes now and then), `best/` (the best policy on the valid split, a Hugging Face
directory), `checkpoints/` and at the end `result.json`, `episodes.html` and, with matplotlib, `curves.png`;
where it is installed, TensorBoard gets the scalars of `metrics.jsonl` in `tensorboard/`.

A checkpoint has the states of networks and optimisers, written by torch's distributed checkpoint (DCP), so
that any number of ranks can read them, and `about.json`: the run's progress, and episodes that were sampled
for the next iteration. All of it is safetensors and JSON: reading somebody else's checkpoint runs no code.
Each file and directory is written beside the old one and then renamed: a run that was killed at any moment
resumes from its newest checkpoint, and then equals an uninterrupted one.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from transformers import PreTrainedModel

from distributed import barrier, empty_copy, rank, team
from tools.page import as_text

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # it is no requirement
    SummaryWriter = None

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP on one process, as intended
LOGS = ("metrics.jsonl", "episodes.jsonl", "dialogs.txt")
# What about.json must have: the iterations done, the sizes of the logs, episodes, the sizes of the files.
ABOUT = {"iteration": int, **dict.fromkeys(LOGS, int), "prefetched": list, "files": dict}


# ---- files and directories that are always whole -----------------------------------------------------------


def replace_whole(target: Path, beside: Path) -> None:
    """Rename `beside`, a file or a directory, to `target`, whose old content is deleted."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir():
        target.rename(old)  # a directory that is not empty cannot be renamed over
    beside.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file: `path` always has the whole old text or the whole new one."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text)
    replace_whole(path, beside)


def check_replaceable(directory: Path) -> None:
    """Check before the work that a model can be written to `directory` and replaces nothing but a model."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryDirectory(dir=directory.parent).cleanup()  # each rank makes its own
    if directory.exists() and any(directory.iterdir()) and not any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} holds something that is no model: give another place")


# ---- a run's directory -------------------------------------------------------------------------------------


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that the block takes to `seconds[phase]`."""
    began = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began


class RunDirectory:
    """The directory of a training run, and how far the run is.

    `progress` is plain JSON: the iterations done, the best valid score, the table before training, seconds by
    phase, and the sizes of the logs, to which a resumed run cuts them back.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        """Read what is there, write nothing. Raises: ValueError if another run's files would be lost."""
        self.path = path
        saved = self.checkpoints()
        if not resume and (saved or (path / "result.json").exists()):
            raise ValueError(f"{path} holds a run: go on with --resume {path}, or give another --output")
        self.newest: Path | None = None
        self.progress = {"iteration": 0, "best": -1.0, "before": None, **dict.fromkeys(LOGS, 0)}
        for directory in saved:
            reason = damage(directory)
            if not reason:
                self.newest, self.progress = directory, json.loads((directory / "about.json").read_text())
            elif rank() == 0:
                print(f"{directory} is damaged and left out: {reason}", file=sys.stderr)
        if saved and not self.newest:
            raise ValueError(f"no checkpoint of {path} is whole: it cannot be resumed")
        self.prefetched: list[dict] = self.progress.pop("prefetched", [])  # as plain JSON
        self.seconds: dict[str, float] = self.progress.setdefault("seconds", {})
        self.board: SummaryWriter | None = None  # the same scalars for TensorBoard, where it is installed

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints of the run, oldest first."""
        return checkpoints(self.path / "checkpoints")

    def begin(self, config: dict, resume: bool) -> None:
        """Make the directory ready to be written to, on rank 0, while the other ranks wait."""
        if rank() == 0:
            if not resume:
                shutil.rmtree(self.path / "checkpoints", ignore_errors=True)  # only unfinished ones are there
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            for later in self.checkpoints():
                if self.newest and later > self.newest:
                    shutil.rmtree(later)  # damaged
            (self.path / "result.json").unlink(missing_ok=True)
            write_whole(self.path / "config.json", json.dumps(config, indent=1))
            for name in LOGS:
                with (self.path / name).open("a"):
                    os.truncate(self.path / name, self.progress[name])
            if SummaryWriter:
                done = self.progress["iteration"]  # what a stopped run wrote beyond it is not shown
                self.board = SummaryWriter(self.path / "tensorboard", purge_step=done + 1)
        barrier()

    def log(self, metrics: dict, episodes: list[dict]) -> None:
        """Append an iteration's metrics and records of episodes, and add its seconds to those of the run."""
        self.progress["iteration"] = metrics["iteration"]
        for phase, spent in metrics["seconds"].items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        records = [{"iteration": metrics["iteration"]} | episode for episode in episodes]
        lines = (json.dumps(metrics) + "\n", "".join(json.dumps(record) + "\n" for record in records))
        for name, text in zip(LOGS, (*lines, "".join(map(as_text, records))), strict=True):
            if rank() == 0 and text:
                with (self.path / name).open("a") as file:
                    file.write(text)
                self.progress[name] = (self.path / name).stat().st_size
        if self.board:
            turns = {f"solved_by_turn/{n}": share for n, share in enumerate(metrics["solved_by_turn"], 1)}
            parts = {f"seconds/{phase}": spent for phase, spent in metrics["seconds"].items()}
            for name, value in (metrics | turns | parts).items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, metrics["iteration"])
            self.board.flush()

    def save(self, trained: dict[str, tuple], prefetch: Callable[[int], list], keep: int) -> None:
        """Write a checkpoint, unless this iteration has one; `prefetch` gives the next episodes."""
        iteration = self.progress["iteration"]
        directory = self.path / "checkpoints" / f"{iteration:06d}"
        # At iteration 0 nothing can be lost, and DCP would count a step that the optimisers have not made.
        if iteration > 0 and not directory.exists():
            save_checkpoint(directory, trained, self.progress | {"prefetched": prefetch(iteration)}, keep)


# ---- checkpoints -------------------------------------------------------------------------------------------


def _weights(network: nn.Module, options: StateDictOptions | None = None) -> dict[str, torch.Tensor]:
    """A network's state, with tied weights under one name: files would hold them twice, or refuse them."""
    names = {name for name, _ in (*network.named_parameters(), *network.named_buffers())}
    state = get_model_state_dict(network, options=options)
    return {name: tensor for name, tensor in state.items() if name in names}


def _state(trained: dict[str, tuple]) -> dict:
    """All tensors that training changes, as DCP expects them: sharded, under the names of the parameters.

    Nothing else is needed: learning rates follow from the number of updates, random numbers from seed and
    iteration.
    """
    return {
        name: {
            "network": _weights(network),
            "optimiser": {"state": get_optimizer_state_dict(network, optimiser)["state"]},
        }
        for name, (network, optimiser, _) in trained.items()
    }


def save_checkpoint(directory: Path, trained: dict[str, tuple], about: dict, keep: int) -> None:
    """Write a checkpoint, and delete all but the newest `keep` of its kind.

    Args: trained: name to (network, optimiser, schedule); about: plain JSON, for about.json.
    """
    beside = directory.with_name(directory.name + ".partial")
    if rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
    barrier()
    try:
        writer = dcp.HuggingFaceStorageWriter(beside, save_distributed=True)
        dcp.save(_state(trained), storage_writer=writer, process_group=team())
        if rank() == 0:
            sizes = {path.name: path.stat().st_size for path in beside.iterdir()}
            (beside / "about.json").write_text(json.dumps(about | {"files": sizes}))
            replace_whole(directory, beside)
            for old in checkpoints(directory.parent)[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        shutil.rmtree(beside, ignore_errors=True)
        reason = str(error).strip().rpartition("\n")[2]
        raise OSError(f"{directory} could not be written ({reason}); older checkpoints are whole") from error
    barrier()


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    return sorted(path for path in directory.glob("*") if path.name.isdigit())


def damage(directory: Path) -> str:
    """What is wrong with the files of a checkpoint; empty if it is whole."""
    try:
        about = json.loads((directory / "about.json").read_text())
        wrong = [name for name, kind in ABOUT.items() if type(about[name]) is not kind]
        wrong += [name for name, kind in ABOUT.items() if kind is int and not wrong and about[name] < 0]
        sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
        wrong = wrong or [name for name, size in about["files"].items() if sizes.get(name) != size]
    except (KeyError, OSError, TypeError, ValueError) as error:
        return f"about.json cannot be read: {error!r}"
    return f"about.json says something else about {', '.join(wrong)}" if wrong else ""


def restore_checkpoint(directory: Path, trained: dict[str, tuple], updates: int) -> None:
    """Restore networks, optimisers and schedules as after so many `updates`, on any number of ranks."""
    reader, wanted = dcp.HuggingFaceStorageReader(directory), _state(trained)
    try:
        stored = {key.rpartition(".")[0] for key in reader.read_metadata().state_dict_metadata}
        for name, state in wanted.items():
            # A parameter that no loss reaches, as in a part for images, had no optimiser state to write.
            of = state["optimiser"]["state"]
            state["optimiser"]["state"] = {p: of[p] for p in of if f"{name}.optimiser.state.{p}" in stored}
        dcp.load(wanted, storage_reader=reader, process_group=team())  # into the same tensors
    except (dcp.CheckpointException, SafetensorError) as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise ValueError(f"{directory} cannot be read: {reason}") from error
    for _, _, schedule in trained.values():
        schedule.last_epoch = updates - 1
        schedule.step()


# ---- models ------------------------------------------------------------------------------------------------


def export(policy: PreTrainedModel, tokenizer, directory: Path, dtype: str) -> None:
    """Write policy and tokenizer as a Hugging Face directory, in `dtype`; rank 0 gathers all weights."""
    state = _weights(policy, StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank() == 0:
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
        beside = directory.with_name(directory.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        model = empty_copy(policy).to(getattr(torch, dtype))
        model.generation_config = policy.generation_config  # has all tokens that end a response
        model.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        replace_whole(directory, beside)
    barrier()
