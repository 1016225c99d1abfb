"""Networks on one process or many: load, shard, gather, save.

Paper: appendix A names 288 and 2,304 GPUs, not how they share the work. Here every GPU runs one process (a
*rank*) of the same program, and FSDP2 cuts each parameter, its gradient and its optimiser state into one
piece a rank. `fully_shard` wraps every decoder layer, then the rest: a layer's weights are whole only while
it runs.

What is split over ranks is the forward and backward passes; what is known to all is the batch itself, for
tokens are small. So statistics, advantages and the number of tokens in a loss are global by construction,
and train.py's arithmetic is that of one process. Losses are divided by global counts and gradients are
*summed* over the ranks (FSDP2 would average). Every rank must make the same number of passes: they wait for
each other in each.

With `split_teams` some ranks only sample, while the others train: two *teams*, each of which shares its work
as above. All that they tell each other is weights, once a batch, and episodes.

On one process in one number type nothing is sharded, and models are what `from_pretrained` gives.
Not here: tensor parallelism, mixtures of experts when sharded (their checkpoints have other names).
"""

import contextlib
import importlib.util
import json
import os
import pickle
import shutil
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP on one process: as meant
WEIGHT_FILES = ("*.safetensors", "*.bin")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
# Long because ranks wait for each other's rollouts; it is not what notices a failure.
TIMEOUT = timedelta(hours=4)


@contextlib.contextmanager
def friendly_errors(program: str) -> Iterator[None]:
    """What all programs do with bad input: end with exit code 2 and the error's sentence.

    A bug may raise the same types. Python's development mode (`python -X dev train.py`, or PYTHONDEVMODE=1
    before torchrun) shows the traceback first.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            traceback.print_exc()
        print(f"{program}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        sys.exit(2)


# ---- ranks -------------------------------------------------------------------------------------------------

_team: dist.ProcessGroup | None = None  # the ranks that share this rank's work; None: all


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
def process_group(device: str, alone: bool = True) -> Iterator[str]:
    """Join the ranks that torchrun has started, if it has; yields this rank's own device.

    An exception on one rank ends all of them within seconds, whatever they compute or wait for. Without
    torchrun there is one rank; unless it is `alone` it gets a process group of its own, so that FSDP2 gives
    a single GPU mixed precision and offloading too.
    """
    global _team
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    together = "RANK" in os.environ
    if not together and alone:
        yield device
        return
    # Gloo stands by on GPUs too, for objects and offloaded parameters.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    store = None if together else dist.HashStore()
    place = {} if together else {"store": store, "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=TIMEOUT, **place)
    if together:
        threading.Thread(target=_end_with_the_first, daemon=True).start()
    try:
        yield device
        dist.barrier()  # of both teams
    except BaseException:
        if together:
            _rendezvous().compare_set("failed", "", str(dist.get_rank()))  # the first to fail tells why
        raise
    finally:
        _team = None
    dist.destroy_process_group()


def _rendezvous() -> dist.TCPStore:
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*address, is_master=False, timeout=timedelta(days=365))


def _end_with_the_first() -> None:
    """End this process, in whatever it computes or waits for, when another rank has failed."""
    own, store = str(dist.get_rank()).encode(), _rendezvous()
    with contextlib.suppress(RuntimeError):  # the store is gone: all have ended well
        store.wait(["failed"])
        if store.get("failed") != own:
            os._exit(1)


def split_teams(last: int) -> bool:
    """Make the last ranks a team of their own, and the others too; is this one of the last?

    From here on `rank`, `ranks` and all that ranks do together mean the own team.
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
    """This rank's part of `count` things that lie in a row."""
    return slice(count * rank() // ranks(), count * (rank() + 1) // ranks())


def gather(things: list) -> list:
    """The lists of all ranks behind one another, on every rank."""
    if ranks() == 1:
        return things
    lists: list = [None] * ranks()
    dist.all_gather_object(lists, things, _team)
    return [thing for part in lists for thing in part]


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


def find_model(model: str, gguf_file: str = "") -> Path:
    """The directory of a model with weights in it; a hub name is downloaded, by rank 0 first.

    Raises: ValueError, one sentence, if there is no such model or it has no weights.
    """
    missing = [name for name in ("gguf", "accelerate") if gguf_file and not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"--gguf_file needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    directory = Path(model)
    if not directory.is_dir():
        for turn in range(2):
            if rank() == 0 or turn == 1:
                try:
                    wanted = [gguf_file] if gguf_file else HUB_FILES
                    directory = Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns="*/*"))
                except (OSError, ValueError) as error:
                    reason = type(error).__name__
                    raise ValueError(
                        f"{model} is not a directory, and the Hugging Face hub does not give it ({reason})"
                    ) from error
            barrier()
    wanted = [gguf_file] if gguf_file else WEIGHT_FILES
    if not any(any(directory.glob(pattern)) for pattern in wanted):
        names = ", ".join(sorted(path.name for path in directory.iterdir())) or "nothing"
        raise ValueError(f"{model} has no weights ({' or '.join(wanted)}), only {names}")
    return directory


def load_tokenizer(model: str, chat_template: str = "", gguf_file: str = ""):
    """The tokenizer of a model, with its own chat template or that of the file `chat_template`.

    Raises: ValueError, one sentence, if there is no tokenizer or no template.
    """
    directory = find_model(model, gguf_file)
    try:
        gguf = {"gguf_file": gguf_file} if gguf_file else {}
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, **gguf)
    except Exception as error:  # transformers raises what its parsers raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{model} has no tokenizer that transformers can read: {reason}") from error
    if chat_template:
        tokenizer.chat_template = Path(chat_template).read_text()
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {model} has no chat template: give one with --chat_template FILE")
    return tokenizer


def load_model(
    model: str,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "sdpa",
    gguf_file: str = "",
    state_dtype: str = "",
    gradient_checkpointing: bool = False,
    cpu_offload: bool = False,
    wrap: Callable[[PreTrainedModel], nn.Module] = lambda language_model: language_model,
) -> nn.Module:
    """A causal LM, or what `wrap` makes of it, sharded if there is a process group.

    Args:
        dtype: type of the computation, "auto" for the checkpoint's; state_dtype: of the parameters that the
            optimiser sees, and so of its state (default: `dtype`). They may differ only when sharded.
        attention: transformers' name of the implementation, such as sdpa, eager or flash_attention_2.
        wrap: given the LM, returns the network to be trained (the critic).
    Raises: ValueError, one sentence, if the model cannot be loaded.
    """
    directory = find_model(model, gguf_file)
    loaded = {"local_files_only": True} | ({"gguf_file": gguf_file} if gguf_file else {})
    try:
        config = AutoConfig.from_pretrained(directory, **loaded)
        # Dropout off, wherever the architecture keeps it: with it on, the ratio would not start at 1.
        for name, value in vars(config).items():
            if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
                setattr(config, name, 0.0)
        if dist.is_initialized():
            with torch.device("meta"):
                language_model = AutoModelForCausalLM.from_config(
                    config, dtype=getattr(torch, state_dtype or dtype), attn_implementation=attention
                )
        else:
            if gguf_file:
                loaded |= _dequantised()
            language_model = AutoModelForCausalLM.from_pretrained(
                directory, config=config, dtype=dtype, attn_implementation=attention, **loaded
            )
    except (ImportError, OSError, SafetensorError) as error:
        raise ValueError(f"{model} cannot be loaded: {str(error).partition(chr(10))[0]}") from error
    if gradient_checkpointing:
        # transformers 5.24 renames the method.
        enable = getattr(language_model, "activation_checkpointing_enable", None)
        (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})
    if dist.is_initialized():
        network = _shard(language_model, wrap, directory, device, getattr(torch, dtype), cpu_offload)
    else:
        network = wrap(language_model).to(device)
    return network.train(gradient_checkpointing)  # transformers checkpoints only when training


def _dequantised() -> dict:
    """From 5.23 on transformers leaves GGUF weights in their blocks, which cannot be trained."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _shard(
    language_model, wrap, directory: Path, device: str, dtype: torch.dtype, offload: bool
) -> nn.Module:
    """Shard a model of the meta device, then read each rank's pieces: no rank ever holds all of it."""
    stored_names = {id(parameter): name for name, parameter in language_model.named_parameters()}
    network = wrap(language_model)
    names = {own: stored_names[id(p)] for own, p in network.named_parameters() if id(p) in stored_names}
    options = {"mesh": dist.DeviceMesh.from_group(_team or dist.group.WORLD, device.partition(":")[0])}
    options["offload_policy"] = CPUOffloadPolicy(pin_memory=device != "cpu") if offload else OffloadPolicy()
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    new = [m for m in network.modules() if {id(p) for p in m.parameters(recurse=False)} - stored_names.keys()]
    for head in new:
        fully_shard(head, **options)  # a new head keeps its own number type, fp32
    for part in (*language_model.get_decoder().layers, network):
        fully_shard(part, mp_policy=mixed, **options)
    for part in (module for module in network.modules() if isinstance(module, FSDPModule)):
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other; with factor 1 it is a plain sum
        part.set_gradient_divide_factor(1.0)
    for module in network.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device="cpu" if offload else device, recurse=False)
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device=device, recurse=False)
            language_model._init_weights(module)  # rotary frequencies: computed, not stored
    language_model.tie_weights()
    wanted = {names[own]: p.detach() for own, p in network.named_parameters() if own in names}
    reader = HuggingFaceStorageReader(str(directory))
    missing = sorted(wanted.keys() - reader.read_metadata().state_dict_metadata.keys())
    if missing:
        raise ValueError(
            f"the safetensors of {directory} lack {len(missing)} of {len(wanted)} weights, such as "
            f"{missing[0]}: save it once more with transformers' from_pretrained and save_pretrained"
        )
    dcp.load(wanted, storage_reader=reader, process_group=_team)
    return network


# ---- sharded networks at work ------------------------------------------------------------------------------


def as_forward(function: Callable, model: nn.Module, *arguments):
    """function(model, *arguments), with the root's weights whole inside, as FSDP2 does around `forward`."""
    if not isinstance(model, FSDPModule):
        return function(model, *arguments)
    model.as_forward = MethodType(function, model)
    register_fsdp_forward_method(model, "as_forward")
    return model.as_forward(*arguments)


def free_gathered(*networks: nn.Module) -> None:
    """Let go of root weights that no backward pass will free."""
    for network in networks:
        if isinstance(network, FSDPModule):
            network.reshard()


def clip_gradients(network: nn.Module, limit: float) -> float:
    """Scale gradients so that their norm, over all ranks, is at most `limit`; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@contextlib.contextmanager
def for_sampling(policy, device: str, dtype: str, gather_weights: bool) -> Iterator[PreTrainedModel]:
    """The policy as rollouts take it: each rank calls it as often as it likes, without regard to the others.

    With `gather_weights` each rank holds a whole copy in `dtype` meanwhile. Without, weights are gathered
    layer by layer in every forward, which all ranks must therefore run together: before each one they count
    who still works, and a rank that has finished runs empty forwards until nobody does.
    """
    if not isinstance(policy, FSDPModule):
        yield policy
    elif gather_weights:
        whole = _empty_copy(policy)
        for name, tensor in (*policy.named_parameters(), *policy.named_buffers()):
            if isinstance(tensor, DTensor):
                tensor = tensor.detach().full_tensor().to(device, getattr(torch, dtype))
                tensor = nn.Parameter(tensor, requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            setattr(whole.get_submodule(owner), leaf, tensor)
        whole.tie_weights()
        yield whole.eval()
    else:
        decoder = policy.get_decoder()
        as_forward(lambda model: None, policy)  # the root's weights stay whole until they are resharded
        counting = decoder.register_forward_pre_hook(lambda *_: total([1.0]) and None)
        yield policy
        counting.remove()
        nothing = torch.zeros(1, 1, dtype=torch.long, device=policy.device)  # (1, 1)
        with torch.no_grad():
            while total([0.0]) != [0.0]:
                decoder(nothing, use_cache=False)
        policy.reshard()


def broadcast(thing: object, source: int) -> object:
    """What the rank `source` of both teams gives as `thing`, on every rank; negative: from the end."""
    things = [thing]
    dist.broadcast_object_list(things, source % dist.get_world_size())
    return things[0]


def give_weights(policy: FSDPModule | None, dtype: str) -> None:
    """Send the trained policy, in `dtype`, to those that `take_weights`; None: no more will come."""
    broadcast(policy is not None, 0)
    for parameter in policy.parameters() if policy else ():
        dist.broadcast(parameter.detach().to(getattr(torch, dtype)).full_tensor(), 0)


def take_weights(policy: FSDPModule) -> bool:
    """Wait for the trained policy and copy it into this one, which has that `dtype`; False if none comes."""
    more = broadcast(None, 0)
    for parameter in policy.parameters() if more else ():
        # Of the shape of the whole parameter.
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        dist.broadcast(whole, 0)
        mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.detach().to_local().copy_(mine.to_local())
    return more


def _empty_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without weights, and without FSDP2's classes and hooks."""
    attention = policy.config._attn_implementation
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(policy.config, attn_implementation=attention)


# ---- saving ------------------------------------------------------------------------------------------------


def check_replaceable(directory: Path) -> None:
    """Before the work: can a model be written to `directory`, and is nothing lost but a model by it?

    Raises: ValueError or OSError, one sentence.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = directory.with_name(directory.name + ".")
    tempfile.TemporaryDirectory(prefix=beside.name, dir=beside.parent).cleanup()  # each rank makes its own
    if directory.exists() and any(directory.iterdir()) and not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"{directory} holds something that is no model, and would be lost: give another place"
        )


def replace_whole(directory: Path, beside: Path) -> None:
    """Rename `beside` to `directory`, whose old content goes: what stands there is always whole."""
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    beside.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


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
        _empty_copy(policy).to(getattr(torch, dtype)).save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
        replace_whole(directory, beside)
    barrier()


def _state(trained: dict[str, tuple]) -> dict:
    """All that changes while training, as DCP takes it: sharded tensors under the names of the parameters."""
    random_states = {f"rank {rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states[f"rank {rank()}, cuda"] = torch.cuda.get_rng_state()
    return {"random": random_states} | {
        name: {
            "network": get_model_state_dict(network),
            "optimiser": get_optimizer_state_dict(network, optimiser),
            "schedule": schedule.state_dict(),
        }
        for name, (network, optimiser, schedule) in trained.items()
    }


def save_checkpoint(directory: Path, trained: dict[str, tuple], about: dict, keep: int, ahead: list) -> None:
    """Write a checkpoint beside `directory`, rename it, and drop all but the newest `keep` of its kind.

    Args:
        trained: name to (network, optimiser, schedule); about: plain JSON, for about.json.
        ahead: episodes that were sampled before their turn, for `read_ahead`.
    """
    beside = directory.with_name(directory.name + ".partial")
    if rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
    barrier()
    dcp.save(_state(trained), checkpoint_id=beside, process_group=_team, no_dist=not dist.is_initialized())
    if rank() == 0:
        (beside / "about.json").write_text(json.dumps(about | {"ranks": ranks()}))
        if ahead:
            (beside / "ahead.pickle").write_bytes(pickle.dumps(ahead))
        replace_whole(directory, beside)
        for old in checkpoints(directory.parent)[:-keep]:
            shutil.rmtree(old)
    barrier()


def checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints in a directory, oldest first."""
    return sorted(path for path in directory.glob("*") if path.name.isdigit())


def read_ahead(directory: Path) -> list:
    """The episodes that were sampled before their turn when a checkpoint was saved."""
    path = directory / "ahead.pickle"
    return pickle.loads(path.read_bytes()) if path.exists() else []


def restore_checkpoint(directory: Path, trained: dict[str, tuple]) -> None:
    """Bring networks, optimisers, schedules and random states to where they were; on any number of ranks."""
    state = _state(trained)
    if json.loads((directory / "about.json").read_text())["ranks"] != ranks():
        del state["random"]  # each rank had its own
    dcp.load(state, checkpoint_id=directory, process_group=_team, no_dist=not dist.is_initialized())
    for name, (network, optimiser, schedule) in trained.items():
        set_model_state_dict(network, state[name]["network"])
        set_optimizer_state_dict(network, optimiser, state[name]["optimiser"])
        schedule.load_state_dict(state[name]["schedule"])
    if "random" in state:
        torch.set_rng_state(state["random"][f"rank {rank()}"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random"][f"rank {rank()}, cuda"])
