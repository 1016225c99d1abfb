"""A run on disk: its directory, its checkpoints, and the models that it exports.

A run's directory holds `config.json`, `metrics.jsonl` (an object per iteration), `episodes.jsonl` and
`dialogs.txt` (some episodes now and then), `best/` (the best policy on the valid split, a Hugging Face
directory), `checkpoints/` and at the end `result.json`, `episodes.html` and, with matplotlib, `curves.png`.

A checkpoint has the states of networks and optimisers, written by torch's distributed checkpoint (DCP), so
that any number of ranks can read them; `about.json` with the run's progress; and `prefetched.json`, episodes
of the next iteration. Each file and directory is written beside the old one and then renamed: a run that was
killed at any moment resumes from its newest checkpoint, and then equals an uninterrupted one.
"""

import contextlib
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from distributed import barrier, empty_copy, rank, team
from tools.page import as_text

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP on one process, as intended
LOGS = ("metrics.jsonl", "episodes.jsonl", "dialogs.txt")
# What DCP's own metadata consists of.
DCP_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
DCP_RECORDS = """
Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata StorageMeta
TensorProperties _MEM_FORMAT_ENCODING _StorageInfo
""".split()
OTHER_RECORDS = (("torch", "Size"), ("pathlib", "PosixPath"), ("torch.serialization", "_get_layout"))


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
    """Check before the work that a model can be written to `directory` and replaces nothing but a model.

    Raises: ValueError or OSError, one sentence.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = directory.with_name(directory.name + ".")
    tempfile.TemporaryDirectory(prefix=beside.name, dir=beside.parent).cleanup()  # each rank makes its own
    if directory.exists() and any(directory.iterdir()) and not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"{directory} holds something that is no model, and would be lost: give another place"
        )


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
        damaged = {directory: reason for directory in saved if (reason := damage(directory))}
        for directory, reason in damaged.items():
            if rank() == 0:
                print(f"{directory} is damaged and left out: {reason}", file=sys.stderr)
        if saved and len(damaged) == len(saved):
            raise ValueError(f"no checkpoint of {path} is whole: it cannot be resumed")
        self.newest = [directory for directory in saved if directory not in damaged][-1] if saved else None
        self.progress = {"iteration": 0, "best": -1.0, "before": None, **dict.fromkeys(LOGS, 0)}
        if self.newest:  # an older one may know fewer logs
            self.progress |= json.loads((self.newest / "about.json").read_text())
        self.seconds: dict[str, float] = self.progress.setdefault("seconds", {})

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

    def save(self, trained: dict[str, tuple], prefetch: Callable[[int], list], keep: int) -> None:
        """Write a checkpoint, unless this iteration has one; `prefetch` gives the next episodes."""
        iteration = self.progress["iteration"]
        directory = self.path / "checkpoints" / f"{iteration:06d}"
        # At iteration 0 nothing can be lost, and DCP would count a step that the optimisers have not made.
        if iteration > 0 and not directory.exists():
            save_checkpoint(directory, trained, self.progress, keep, prefetch(iteration))


# ---- checkpoints -------------------------------------------------------------------------------------------


def _state(trained: dict[str, tuple]) -> dict:
    """All tensors that training changes, as DCP expects them: sharded, under the names of the parameters.

    Nothing else is needed: learning rates follow from the number of updates, random numbers from seed and
    iteration.
    """
    return {
        name: {
            "network": get_model_state_dict(network),
            "optimiser": {"state": get_optimizer_state_dict(network, optimiser)["state"]},
        }
        for name, (network, optimiser, _) in trained.items()
    }


def _group() -> dict:
    """The arguments that tell DCP which ranks take part."""
    return {"process_group": team(), "no_dist": not dist.is_initialized()}


def save_checkpoint(
    directory: Path, trained: dict[str, tuple], about: dict, keep: int, prefetched: list
) -> None:
    """Write a checkpoint, and delete all but the newest `keep` of its kind.

    Args:
        trained: name to (network, optimiser, schedule); about: plain JSON, for about.json.
        prefetched: episodes of the next iteration, as plain JSON.
    Raises: OSError, one sentence, if it cannot be written; the older ones are left as they are.
    """
    beside = directory.with_name(directory.name + ".partial")
    if rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
    barrier()
    try:
        group = _group()
        dcp.save(_state(trained), checkpoint_id=beside, **group)
        if rank() == 0:
            (beside / "prefetched.json").write_text(json.dumps(prefetched))
            sizes = {path.name: path.stat().st_size for path in beside.iterdir()}
            (beside / "about.json").write_text(json.dumps(about | {"files": sizes}))
            replace_whole(directory, beside)
            for old in checkpoints(directory.parent)[:-keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, CheckpointException) as error:
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
        about.setdefault("episodes.jsonl", 0)  # older ones know no such log
        files = {**about.get("files", {".metadata": None})}
        whole = all(type(about[name]) is int for name in ("iteration", *LOGS))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        return f"about.json cannot be read: {error}"
    if not whole:
        return "about.json says no number of iterations, or no sizes of the logs"
    for name, size in files.items():
        if not (directory / name).exists():
            return f"{name} is missing"
        if size not in (None, found := (directory / name).stat().st_size):
            return f"{name} has {found} bytes instead of {size}"
    return ""


def read_prefetched(directory: Path) -> list:
    """The episodes of the next iteration that a checkpoint has, as plain JSON."""
    path = directory / "prefetched.json"
    try:
        return [*json.loads(path.read_text())] if path.exists() else []
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


class _MetadataUnpickler(pickle.Unpickler):
    """DCP pickles its metadata. A checkpoint from others must not run code: only plain records are read."""

    def find_class(self, module: str, name: str) -> object:
        if name in DCP_RECORDS and module in DCP_MODULES or (module, name) in OTHER_RECORDS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name), torch.dtype):
            return getattr(torch, name)
        raise ValueError(f"its .metadata names {module}.{name}, which no checkpoint needs")


class _Reader(dcp.FileSystemReader):
    """Reads a checkpoint without running anything that it says."""

    def read_metadata(self, *_arguments, **_named) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorsOnly(dcp.DefaultLoadPlanner):
    """Refuses what is not a tensor, because DCP would unpickle it."""

    def load_bytes(self, read_item, value) -> None:
        raise ValueError(
            f"the checkpoint has {read_item.dest_index.fqn} as something that is no tensor: not read"
        )


def restore_checkpoint(directory: Path, trained: dict[str, tuple], updates: int) -> None:
    """Restore networks, optimisers and schedules as after so many `updates`, on any number of ranks."""
    state = _state(trained)
    group = _group()
    try:
        dcp.load(state, storage_reader=_Reader(directory), planner=_TensorsOnly(), **group)
    except CheckpointException as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise ValueError(f"{directory} cannot be read: {reason}") from error
    for name, (network, optimiser, schedule) in trained.items():
        groups = get_optimizer_state_dict(network, optimiser)["param_groups"]
        set_model_state_dict(network, state[name]["network"])
        set_optimizer_state_dict(network, optimiser, state[name]["optimiser"] | {"param_groups": groups})
        schedule.last_epoch = updates
        for group, base, factor in zip(
            optimiser.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(updates)


# ---- models ------------------------------------------------------------------------------------------------


def export(policy: PreTrainedModel, tokenizer, directory: Path, dtype: str) -> None:
    """Write policy and tokenizer as a Hugging Face directory, in `dtype`; rank 0 gathers all weights."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(policy, options=options)
    if rank() == 0:
        # Tied weights have one name among the parameters, two in the state.
        names = {name for name, _ in policy.named_parameters()} | {name for name, _ in policy.named_buffers()}
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items() if name in names}
        beside = directory.with_name(directory.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        model = empty_copy(policy).to(getattr(torch, dtype))
        model.generation_config = policy.generation_config  # has all tokens that end a response
        model.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        replace_whole(directory, beside)
    barrier()
