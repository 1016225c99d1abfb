"""A run on disk: damage, a full disk and hostile files end in a sentence, and nothing whole is lost."""

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import checkpoints
from checkpoints import RunDirectory, restore_checkpoint, save_checkpoint
from config import parse_config


def trained(seed: int) -> dict[str, tuple]:
    """A network that has made two updates of AdamW, as checkpoints take it."""
    torch.manual_seed(seed)
    network = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1.0, (n + 1) / 10))
    for _ in range(2):
        network(torch.ones(1, 3)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    return {"policy": (network, optimiser, schedule)}


def save(run: Path, iteration: int, seed: int = 0) -> Path:
    directory = run / "checkpoints" / f"{iteration:06d}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    about = {"iteration": iteration, **dict.fromkeys(checkpoints.LOGS, 0), "prefetched": []}
    save_checkpoint(directory, trained(seed), about, 9)
    return directory


def test_a_model_with_tied_weights_is_saved_and_restored(tmp_path):
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        network = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **sizes))
        optimiser = torch.optim.AdamW(network.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: 1.0)
        network(torch.arange(5)[None]).logits.square().sum().backward()  # (1, 5) ids
        optimiser.step()
        states.append({"policy": (network, optimiser, schedule)})
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path / "checkpoints" / "000001", states[0], {}, 1)
    restore_checkpoint(tmp_path / "checkpoints" / "000001", states[1], updates=1)
    saved, restored = (state["policy"][0] for state in states)
    assert restored.lm_head.weight is restored.model.embed_tokens.weight
    for one, other in zip(saved.parameters(), restored.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_restored_optimiser_makes_the_same_next_update(tmp_path):
    directory, same, other = save(tmp_path, 1), trained(0), trained(1)
    restore_checkpoint(directory, other, updates=2)
    for network, optimiser, schedule in (same["policy"], other["policy"]):
        network(torch.ones(1, 3)).square().sum().backward()
        optimiser.step()
        schedule.step()
    (network, optimiser, _), (restored, restored_optimiser, _) = same["policy"], other["policy"]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), restored.parameters(), strict=True))
    assert optimiser.param_groups[0]["lr"] == restored_optimiser.param_groups[0]["lr"] == pytest.approx(0.04)


def test_a_parameter_that_no_loss_reaches_does_not_prevent_a_resume(tmp_path):
    """As in the part for images of a model that is trained on text."""
    networks = []
    for seed in (0, 1):
        state = trained(seed)
        network, optimiser, _ = state["policy"]
        network.for_images = torch.nn.Parameter(torch.full((2,), float(seed)))  # (2,)
        optimiser.param_groups[0]["params"].append(network.for_images)
        networks.append(state)
    networks[1]["policy"][1].state.clear()  # as before the first update
    save_checkpoint(tmp_path / "000001", networks[0], {}, 1)
    restore_checkpoint(tmp_path / "000001", networks[1], updates=2)
    (saved, optimiser, _), (restored, other, _) = (state["policy"] for state in networks)
    assert torch.equal(saved.for_images, restored.for_images)
    for one, same in zip((saved.weight, saved.bias), (restored.weight, restored.bias), strict=True):
        assert torch.equal(one, same)
        assert torch.equal(optimiser.state[one]["exp_avg_sq"], other.state[same]["exp_avg_sq"])
        assert optimiser.state[one]["step"] == other.state[same]["step"] == 2


@pytest.mark.parametrize("how", ["missing", "short", "no about", "cut about"])
def test_a_damaged_checkpoint_is_named_and_the_older_whole_one_is_used(tmp_path, capsys, how):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (tensors,) = newer.glob("*.safetensors")
    if how == "missing":
        tensors.unlink()
    elif how == "short":
        os.truncate(tensors, tensors.stat().st_size - 1)
    elif how == "no about":
        (newer / "about.json").unlink()
    else:
        os.truncate(newer / "about.json", 5)
    run = RunDirectory(tmp_path, resume=True)
    assert (run.newest, run.progress["iteration"]) == (older, 1)
    assert f"{newer} is damaged and left out: " in capsys.readouterr().err
    run.begin({}, resume=True)
    assert run.checkpoints() == [older]
    next(older.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="no checkpoint of .* is whole"):
        RunDirectory(tmp_path, resume=True)


def test_a_full_disk_is_told_in_a_sentence_and_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    older, write = save(tmp_path, 1), checkpoints.dcp.save

    def full(*arguments, **named):
        write(*arguments, **named)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.dcp, "save", full)
    with pytest.raises(
        OSError, match="000002 could not be written .*No space left.*; older checkpoints are whole"
    ):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [older.name]
    assert checkpoints.damage(older) == ""


def test_a_negative_size_in_a_checkpoint_is_damage(tmp_path):
    directory = save(tmp_path, 1)
    about = json.loads((directory / "about.json").read_text())
    for name in ("iteration", *checkpoints.LOGS):
        (directory / "about.json").write_text(json.dumps(about | {name: -1}))
        assert name in checkpoints.damage(directory)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("where", ["tensors", "about.json", ".metadata", "ahead.pickle"])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_nothing_in_a_run_that_somebody_hands_on_is_executed(tmp_path, where, dump):
    directory, planted = save(tmp_path, 1), tmp_path / "planted"
    (tensors,) = directory.glob("*.safetensors")
    place = tensors if where == "tensors" else directory / where
    with place.open("wb") as file:
        dump(Hostile(planted), file)
    if where == "tensors":
        with pytest.raises(ValueError, match="cannot be read"):
            restore_checkpoint(directory, trained(1), updates=2)
    elif where == "about.json":
        with pytest.raises(ValueError, match="no checkpoint of .* is whole"):
            RunDirectory(tmp_path, resume=True)
    else:  # files that DCP or earlier code would have unpickled
        assert RunDirectory(tmp_path, resume=True).prefetched == []
        restore_checkpoint(directory, trained(1), updates=2)
    assert not planted.exists()
    pickle.loads(pickle.dumps(Hostile(planted)))  # what would have happened
    assert planted.exists()


@pytest.mark.parametrize("name", ["policy.network.bias", "policy.optimiser.state.bias.exp_avg"])
def test_a_checkpoint_without_a_tensor_is_named(tmp_path, name):
    directory = save(tmp_path, 1)
    (tensors,) = directory.glob("*.safetensors")
    state = load_file(tensors)
    del state[name]
    save_file(state, tensors)
    with pytest.raises(ValueError, match=f"000001 cannot be read: .*{name}"):
        restore_checkpoint(directory, trained(1), updates=2)


def test_a_directory_that_is_no_run_is_not_resumed(tmp_path):
    with pytest.raises(ValueError, match=f"--resume {tmp_path}: this is no run"):
        parse_config(["--resume", str(tmp_path)])


@pytest.mark.parametrize("text", ["", '{"model": "', "[]", "null", "5"])
def test_damaged_settings_of_a_run_are_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json cannot be read as the settings of a run"):
        parse_config(["--resume", str(tmp_path)])


@pytest.mark.parametrize(
    "changed", [{"turn_limit": "3"}, {"turn_limit": None}, {"beta": float("nan")}, {"model": [1]}]
)
def test_a_setting_of_another_type_is_named(tmp_path, changed):
    (tmp_path / "config.json").write_text(json.dumps(vars(parse_config([])) | changed))
    with pytest.raises(ValueError, match=f"{[*changed][0]} is .*, but must be a (value of|finite)"):
        parse_config(["--resume", str(tmp_path)])


@pytest.mark.parametrize(
    "flag", ["--beta=nan", "--clip=-1", "--learning_rate=inf", "--temperature=nan", "--evaluation_top_p=2"]
)
def test_a_number_that_no_run_can_use_is_named(flag):
    with pytest.raises(ValueError, match="is .*, but must be"):
        parse_config([flag])


@pytest.mark.parametrize("about", ["[]", "null", "{}", '{"iteration": 5}', "[{", "5"])
def test_a_checkpoint_that_says_nothing_about_itself_is_damaged(tmp_path, about):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (newer / "about.json").write_text(about)
    assert RunDirectory(tmp_path, resume=True).newest == older


@pytest.mark.parametrize(
    ("name", "other"),
    [("iteration", "5"), ("dialogs.txt", None), ("prefetched", None), ("prefetched", 5), ("files", ["a"])],
)
def test_a_checkpoint_that_says_something_else_about_itself_is_damaged(tmp_path, capsys, name, other):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    about = json.loads((newer / "about.json").read_text())
    (newer / "about.json").write_text(json.dumps(about | {name: other}))
    assert RunDirectory(tmp_path, resume=True).newest == older
    assert f"something else about {name}" in capsys.readouterr().err


def test_what_only_moves_memory_and_speed_may_change_on_resume(tmp_path):
    config = parse_config([])
    (tmp_path / "config.json").write_text(json.dumps({**vars(config)}))
    flags = "--batch_rows 7 --microbatch_tokens 4096 --logits_chunk 99 --no-gather_weights --cpu_offload"
    changed = parse_config(["--resume", str(tmp_path), *flags.split(), "--gradient_checkpointing"])
    assert (changed.batch_rows, changed.microbatch_tokens, changed.logits_chunk) == (7, 4096, 99)
    with pytest.raises(ValueError, match="was started with turn_limit 3, now 2"):
        parse_config(["--resume", str(tmp_path), "--turn_limit", "2"])


def test_a_preset_that_is_named_again_on_resume_resets_nothing_that_the_run_had_changed(tmp_path):
    config = parse_config("--preset 8b --iterations 7 --batch_rows 5 --device cpu".split())
    (tmp_path / "config.json").write_text(json.dumps({**vars(config)}))
    resumed = parse_config(["--preset", "8b", "--resume", str(tmp_path)])
    assert (resumed.iterations, resumed.batch_rows) == (7, 5)
    (tmp_path / "config.json").write_text(json.dumps({**vars(config), "max_new_tokens": 48}))
    with pytest.raises(ValueError, match="was started with max_new_tokens 48, now 1024"):
        parse_config(["--preset", "8b", "--resume", str(tmp_path)])


@pytest.mark.parametrize("installed", [True, False])
def test_scalars_go_to_tensorboard_where_it_is_installed(tmp_path, monkeypatch, installed):
    boards = []

    class Board:
        def __init__(self, directory: Path, purge_step: int) -> None:
            self.directory, self.first, self.scalars = directory, purge_step, {}
            boards.append(self)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars[name, step] = value

        def flush(self) -> None:
            pass

    monkeypatch.setattr(checkpoints, "SummaryWriter", Board if installed else None)
    save(tmp_path, 4)
    run = RunDirectory(tmp_path, resume=True)
    run.begin({}, resume=True)
    run.log({"iteration": 5, "kl": 0.5, "solved_by_turn": [0.1, 0.2], "seconds": {"update": 3.0}}, [])
    assert len(boards) == installed
    for board in boards:
        assert (board.directory, board.first) == (tmp_path / "tensorboard", 5)
        expected = {"iteration": 5, "kl": 0.5, "solved_by_turn/1": 0.1, "solved_by_turn/2": 0.2}
        assert {n: v for (n, step), v in board.scalars.items() if step == 5} == expected | {
            "seconds/update": 3
        }
