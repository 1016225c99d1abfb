"""One process or many: errors, ranks, loading a model whole or sharded.

Paper: appendix A names 288 and 2,304 GPUs, not how they share the work. Here each GPU runs one process (a
*rank*) of the same program, and FSDP2 cuts each parameter, its gradient and its optimiser state into one
shard per rank. `fully_shard` wraps every decoder layer, then the rest: only the running layer has whole
weights.

The ranks split the forward and backward passes. They do not split the batch: tokens are small, so every rank
has all episodes. Statistics, advantages and the number of tokens in a loss are those of the whole batch, as
on one process. Losses are divided by global counts and gradients are
*summed* over the ranks (FSDP2 would average). Every rank makes the same number of forward passes: in each of
them the ranks wait for each other.

`split_teams` lets some ranks only sample, while the others train: two *teams*, each of which shares its work
as above. They send each other only weights and episodes, once an iteration (episodes.py).

On one process in one number type nothing is sharded, and models are what `from_pretrained` returns.
Not here: tensor parallelism, mixtures of experts when sharded (their checkpoints have other names).
"""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.logging import disable_progress_bar

from value_head import layers_of, use_float32_logits

disable_progress_bar()  # of loading and saving: they would mix with ours

WEIGHT_FILES = ("*.safetensors", "*.bin")
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # never run or ask about a model's own code
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
OUT_OF_MEMORY = (
    "out of GPU memory: lower --batch_rows (rollouts), --microbatch_tokens, --logits_chunk (updates), or try "
    "--gradient_checkpointing, --no-gather_weights, --cpu_offload; --resume goes on from the last checkpoint"
)
# Long, because ranks wait for each other's rollouts; `process_group` notices a failed rank at once.
TIMEOUT = timedelta(hours=4)


@contextlib.contextmanager
def friendly_errors(program: str) -> Iterator[None]:
    """End with exit code 2 and one sentence on bad input, as all our programs do.

    A bug may raise the same types: Python's development mode (`python -X dev train.py`, or PYTHONDEVMODE=1
    before torchrun) also prints the traceback.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if sys.flags.dev_mode:
            traceback.print_exc()
        memory = isinstance(error, torch.OutOfMemoryError)
        print(f"{program}: {OUT_OF_MEMORY if memory else str(error).partition(chr(10))[0]}", file=sys.stderr)
        sys.exit(2)


# ---- ranks -------------------------------------------------------------------------------------------------

_team: dist.ProcessGroup | None = None  # the ranks that share this rank's work; None: all ranks


def team() -> dist.ProcessGroup | None:
    """The process group of this rank's team; None if all ranks are one team, or there is one process."""
    return _team


def rank() -> int:
    """Which process of its team this is, 0 to ranks() - 1; rank 0 of those that train writes the files."""
    return dist.get_rank(_team) if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes share this one's work."""
    return dist.get_world_size(_team) if dist.is_initialized() else 1


def check_device(device: str) -> None:
    """Raises: ValueError, one sentence, if it is a GPU and there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, but there is no GPU that torch can use")


@contextlib.contextmanager
def process_group(device: str, unsharded: bool = True) -> Iterator[str]:
    """Join the other ranks, if torchrun has started this process; yields this rank's own device.

    An exception on one rank ends all of them within seconds, whatever they compute or wait for. Without
    torchrun there is one rank. If not `unsharded`, it gets a process group of one: then FSDP2 gives a single
    GPU mixed precision and offloading too.
    """
    global _team
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    # Gloo too where there are GPUs: for Python objects and offloaded parameters.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if "RANK" not in os.environ:
        if not unsharded:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        yield device
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)
        threading.Thread(target=_end_with_failed_rank, daemon=True).start()
        try:
            yield device
            dist.barrier()  # of both teams
        except BaseException:
            _rendezvous().compare_set("failed", "", str(dist.get_rank()))  # the first that fails prints why
            raise
        finally:
            _team = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _rendezvous() -> dist.TCPStore:
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*address, is_master=False, timeout=timedelta(days=365))


def _end_with_failed_rank() -> None:
    """Wait until another rank has failed, then end this process, whatever it computes or waits for."""
    own, store = str(dist.get_rank()).encode(), _rendezvous()
    with contextlib.suppress(RuntimeError):  # the store is gone: all have ended well
        store.wait(["failed"])
        if store.get("failed") != own:
            os._exit(1)


def split_teams(last: int) -> bool:
    """Make the last `last` ranks one team, the others a second one; true on the last ones.

    From then on `rank`, `ranks`, `gather`, `total` and `barrier` are those of the rank's own team.
    """
    global _team
    if last == 0:
        return False
    everyone = list(range(ranks()))
    _team, _ = dist.new_subgroups_by_enumeration([everyone[:-last], everyone[-last:]], timeout=TIMEOUT)
    return dist.get_rank() >= len(everyone) - last


def barrier() -> None:
    """Wait for all ranks."""
    if ranks() > 1:
        dist.barrier(_team)


def share(count: int) -> slice:
    """This rank's part of `count` items."""
    return slice(count * rank() // ranks(), count * (rank() + 1) // ranks())


def gather(items: list) -> list:
    """The lists of all ranks, concatenated, on every rank."""
    if ranks() == 1:
        return items
    lists: list = [None] * ranks()
    dist.all_gather_object(lists, items, _team)
    return [item for own in lists for item in own]


def total(numbers: Sequence[float]) -> list[float]:
    """Sums over the ranks, number by number, in double precision."""
    sums = torch.tensor(numbers, dtype=torch.float64)  # (n,)
    if ranks() > 1:
        dist.all_reduce(sums, group=_team)
    return sums.tolist()


def sandbox_workers() -> int:
    """This rank's share of the machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---- loading -----------------------------------------------------------------------------------------------


def find_model(model: str) -> Path:
    """The directory of a model with weights in it; a hub name is downloaded, by one rank a node."""
    directory = Path(model)
    if not directory.is_dir():
        try:  # the ranks lock the files that they download
            directory = Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns="*/*"))
        except (OSError, ValueError) as error:
            told = f"and the Hugging Face hub does not give it ({type(error).__name__})"
            raise ValueError(f"{model} is not a directory, {told}") from error
    if not any(any(directory.glob(pattern)) for pattern in WEIGHT_FILES):
        names = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
        remedy = ": docs/gguf.md says how it is converted" * (".gguf" in names)
        raise ValueError(f"{model} has no weights ({' or '.join(WEIGHT_FILES)}), only {names}{remedy}")
    return directory


def load_tokenizer(model: str, chat_template: str = ""):
    """The tokenizer of a model, with its own chat template or that of the file `chat_template`."""
    directory = find_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **LOCAL)
    except Exception as error:  # transformers raises what its parsers raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{model} has no tokenizer that transformers can read: {reason}") from error
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text()
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {model} has no chat template: give one with --chat_template FILE")
    return tokenizer


def load_config(model: str) -> PretrainedConfig:
    """A model's configuration."""
    try:
        return AutoConfig.from_pretrained(find_model(model), **LOCAL)
    except (ImportError, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{model} cannot be loaded: {str(error).partition(chr(10))[0]}") from error


def load_model(
    model: str,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "",
    state_dtype: str = "",
    gradient_checkpointing: bool = False,
    cpu_offload: bool = False,
    wrap: Callable[[PreTrainedModel], nn.Module] = lambda language_model: language_model,
) -> nn.Module:
    """A causal LM, or what `wrap` makes of it, sharded if there is a process group.

    It stays in evaluation mode: dropout and the noise of routers would move the ratio away from 1.

    Args:
        dtype: type of the computation, "auto" for the checkpoint's; state_dtype: of the parameters that the
            optimiser sees, and so of its state (default: `dtype`). They may differ only when sharded.
        attention: transformers' name of the implementation, sdpa or eager; empty: what it chooses.
        wrap: given the LM, returns the network to be trained (the critic).
    """
    directory, config = find_model(model), load_config(model)
    how = {"attn_implementation": attention or None}
    try:
        if dist.is_initialized():
            with torch.device("meta"):
                of_state = getattr(torch, state_dtype or dtype)
                language_model = AutoModelForCausalLM.from_config(config, dtype=of_state, **how)
            if (directory / "generation_config.json").exists():
                language_model.generation_config = GenerationConfig.from_pretrained(directory)
        else:
            how |= {"config": config, "dtype": dtype, **LOCAL}
            language_model = AutoModelForCausalLM.from_pretrained(directory, **how)
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{model} cannot be loaded: {str(error).partition(chr(10))[0]}") from error
    use_float32_logits(language_model)
    if gradient_checkpointing:
        for layer in layers_of(language_model):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if dist.is_initialized():
        network = _shard(language_model, wrap, directory, device, getattr(torch, dtype), cpu_offload)
    else:
        network = wrap(language_model).to(device)
    return network.eval()


def _shard(language_model, wrap, directory: Path, device: str, dtype: torch.dtype, offload: bool):
    """Shard a model of the meta device, then read each rank's pieces: no rank ever holds all of it."""
    reader = dcp.HuggingFaceStorageReader(str(directory))
    in_files = reader.read_metadata().state_dict_metadata.keys()
    # Parameters and buffers as the files name them; of tied weights the last name counts, one in the files.
    stored = revert_weight_conversion(language_model, language_model.state_dict(keep_vars=True))
    stored_names = {id(stored[name]): name for name in sorted(stored, key=in_files.__contains__)}
    if not {id(parameter) for parameter in language_model.parameters()} <= stored_names.keys():
        way = "train it on one process in one number type (--dtype float32)"
        form = "stores some weights in another form (each expert by itself)"
        raise ValueError(f"{directory} {form} and cannot be sharded: {way}")
    network = wrap(language_model)
    names = {own: stored_names.get(id(t)) for own, t in network.state_dict(keep_vars=True).items()}
    mesh = dist.DeviceMesh.from_group(_team or dist.group.WORLD, device.partition(":")[0])
    keep = fsdp.CPUOffloadPolicy(pin_memory=device != "cpu") if offload else fsdp.OffloadPolicy()
    options = {"mesh": mesh, "offload_policy": keep}
    mixed = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in list(network.modules()):
        if {id(parameter) for parameter in module.parameters(recurse=False)} - stored_names.keys():
            fsdp.fully_shard(module, **options)  # a new head keeps its own number type, fp32
    for part in (*layers_of(language_model), network):
        fsdp.fully_shard(part, mp_policy=mixed, **options)
    for part in (module for module in network.modules() if isinstance(module, fsdp.FSDPModule)):
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other; with factor 1 it is a plain sum
        part.set_gradient_divide_factor(1.0)
    for module in network.modules():
        tensors = *module.parameters(recurse=False), *module.buffers(recurse=False)
        if any(tensor.is_meta for tensor in tensors):
            module.to_empty(device="cpu" if offload else device, recurse=False)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    language_model.tie_weights()
    for parameter in language_model.parameters():
        parameter._is_hf_initialized = True  # it will be read
    # Rotary frequencies, an embedding's scale: computed, not stored. For code that is not its own, such as
    # FSDP2's class, transformers would leave out what a model computes for its layers.
    language_model.is_custom_code = lambda: False
    language_model.initialize_weights()
    wanted = {names[own]: t.detach() for own, t in network.state_dict(keep_vars=True).items() if names[own]}
    if missing := sorted(wanted.keys() - in_files):
        remedy = "save it once more with transformers' from_pretrained and save_pretrained"
        raise ValueError(f"the safetensors of {directory} lack weights such as {missing[0]}: {remedy}")
    dcp.load(wanted, storage_reader=reader, process_group=_team)
    return network


# ---- sharded networks at work ------------------------------------------------------------------------------


def as_forward(function: Callable, model: nn.Module, *arguments):
    """Call function(model, *arguments) with the root's weights gathered, as FSDP2 does for `forward`."""
    if not isinstance(model, fsdp.FSDPModule):
        return function(model, *arguments)
    model.as_forward = MethodType(function, model)
    fsdp.register_fsdp_forward_method(model, "as_forward")
    return model.as_forward(*arguments)


def free_gathered(*networks: nn.Module) -> None:
    """Free the root's gathered weights, where no backward pass will."""
    for network in networks:
        if isinstance(network, fsdp.FSDPModule):
            network.reshard()


def clip_gradients(network: nn.Module, limit: float) -> float:
    """Scale gradients so that their norm, over all ranks, is at most `limit`; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def empty_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without weights, and without FSDP2's classes and hooks."""
    attention = policy.config._attn_implementation
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(policy.config, attn_implementation=attention)
