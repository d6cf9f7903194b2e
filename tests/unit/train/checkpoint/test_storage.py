"""Checkpoints in one process: what is written, that it is whole or absent, who may read it, the copy beside training."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.one_run import opened

from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.report.schema import Line
from bert_fast.run_folder import checkpoints_in
from bert_fast.train.checkpoint import async_writer as saver_module
from bert_fast.train.checkpoint import storage as module
from bert_fast.train.checkpoint.async_writer import AsyncCheckpointWriter
from bert_fast.train.checkpoint.resume import check_key, latest_valid_checkpoint, resume_key
from bert_fast.train.checkpoint.snapshot import load_tensors, optimizer_counts, own_slices, rank_state, slices_to_write
from bert_fast.train.checkpoint.storage import (
    FORMAT,
    TensorSlice,
    as_bytes,
    latest_checkpoint,
    read_bytes,
    read_description,
    read_metadata,
    read_slices,
    remove_partial,
    verify_checkpoint,
    write_checkpoint,
)
from bert_fast.train.environment import Environment
from bert_fast.train.run import run
from bert_fast.train.setup.build import build
from bert_fast.train.setup.warmup import synthetic_input

VALUES = torch.arange(10.0)


def write(folder: Path, step: int, keep: int = 2, values: torch.Tensor = VALUES) -> Path:
    slices = [TensorSlice("w", 0, 10, values[:4].clone()), TensorSlice("w", 4, 10, values[4:].clone())]
    write_checkpoint(folder, [*slices, as_bytes("rank.0", {"x": torch.ones(2)})], {"step": step}, 0, keep, None)
    return folder / f"step-{step:08d}"


def read(path: Path, begin: int = 0, end: int = 10) -> torch.Tensor:
    values = torch.full((end - begin,), -1.0)
    read_slices(path, [TensorSlice("w", begin, 10, values)])
    return values


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("begin", "end"), [(0, 10), (0, 4), (3, 5), (4, 10), (9, 10)])
def test_any_slice_is_read_of_what_was_written_in_others(tmp_path: Path, begin: int, end: int) -> None:
    path = write(tmp_path, 3)
    assert torch.equal(read(path, begin, end), VALUES[begin:end])
    assert torch.equal(read_bytes(path, read_metadata(path), "rank.0")["x"], torch.ones(2))
    assert read_bytes(path, read_metadata(path), "rank.1") is None


def test_old_checkpoints_are_removed_and_the_newest_is_found(tmp_path: Path) -> None:
    for step in (5, 20, 100, 1000):
        write(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000100", "step-00001000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00001000"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_checkpoints_of_a_time_that_was_given_up_go(tmp_path: Path) -> None:
    """A run thrown back to before a damaged checkpoint must not end with that one alone."""
    write(tmp_path, 8)
    (write(tmp_path, 16) / "__0_0.distcp").write_bytes(b"damaged")
    write(tmp_path, 12, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000012"]


def test_a_digit_of_the_manifest(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    text = (path / "complete.json").read_text(encoding="utf-8")
    (path / "complete.json").write_text(text.replace('"step": 5', '"step": 6'), encoding="utf-8")
    assert verify_checkpoint(path) == "complete.json has changed since it was written"


def test_a_step_is_written_again_over_a_damaged_one(tmp_path: Path) -> None:
    (write(tmp_path, 5) / "tensors.json").write_bytes(b"")
    path = write(tmp_path, 5, values=VALUES + 1)
    assert torch.equal(read(path), VALUES + 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


class Crash(BaseException):
    """As kill -9: nothing that our code catches."""


@pytest.mark.parametrize("moment", ["FileSystemWriter", "write_data", "sha256_of", "write_json", "replace"])
def test_a_crash_at_any_moment_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write(tmp_path, 5, keep=1)
    owner = {"write_data": module.FileSystemWriter, "replace": module.os}.get(moment, module)
    real = getattr(owner, moment)

    def crash(*arguments: Any, **named: Any) -> Any:
        if moment == "write_data":
            real(*arguments, **named)  # all of the data is there, and nothing says so
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, crash)
        with pytest.raises(Crash):
            write(tmp_path, 6, keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000005"
    assert torch.equal(read(tmp_path / "step-00000005"), VALUES)
    remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    write(tmp_path, 6, keep=1)
    assert [p.name for p in checkpoints_in(tmp_path)] == ["step-00000006"]


def test_a_crash_between_the_two_renames_of_a_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5)
    real, calls = os.replace, []

    def second_crashes(source: Any, target: Any) -> None:
        if Path(target).suffix == ".json":
            return real(source, target)
        calls.append(target)
        if len(calls) == 2:
            raise Crash
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", second_crashes)
        with pytest.raises(Crash):
            write(tmp_path, 5)
    assert latest_checkpoint(tmp_path) is None
    remove_partial(tmp_path)
    assert torch.equal(read(tmp_path / "step-00000005"), VALUES)


@pytest.mark.parametrize("moment", ["write_data", "write_json"])
def test_what_cannot_be_written_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write(tmp_path, 5)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.FileSystemWriter if moment == "write_data" else module, moment, full)
        with pytest.raises(
            UserError, match=r"step 6 was not written: disk full.*The last complete one is step-00000005"
        ):
            write(tmp_path, 6)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("name", ["__0_0.distcp", "tensors.json", "complete.json"])
@pytest.mark.parametrize("how", ["missing", "cut", "empty", "a bit"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, how: str) -> None:
    path = write(tmp_path, 5)
    assert verify_checkpoint(path) is None
    victim = path / name
    content = victim.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    victim.unlink() if how == "missing" else victim.write_bytes(
        {"cut": content[:-7], "empty": b"", "a bit": flipped}[how]
    )
    wrong = verify_checkpoint(path)
    assert wrong is not None
    assert name in wrong


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "'bert_fast checkpoint 1', written before settings were renamed, and"),
        ("bert_fast checkpoint 3", "'bert_fast checkpoint 3', written before settings were renamed, and"),
        ("bert_fast checkpoint 9", "'bert_fast checkpoint 9' and"),
    ],
)
def test_another_format_is_refused_by_name(tmp_path: Path, name: str | None, said: str) -> None:
    path = write(tmp_path, 5)
    manifest = {"step": 5, "world_size": 2, "key": {}} | ({"format": name} if name else {})
    (path / "complete.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(
        UserError, match=f"of format {said} this code reads '{FORMAT}'; resume with the code that wrote"
    ):
        read_description(path)


def test_the_newest_sound_checkpoint_is_taken(tmp_path: Path, environment: Environment) -> None:
    said: list[str] = []
    first, second = write(tmp_path, 5), write(tmp_path, 6)
    (second / "__0_0.distcp").write_bytes(b"not this")
    assert latest_valid_checkpoint(tmp_path, environment, said.append) == first
    assert len(said) == 1
    assert "step-00000006 is damaged (__0_0.distcp has 8 bytes" in said[0]
    shutil.rmtree(first)
    with pytest.raises(UserError, match=r"step-00000006 is damaged .* no earlier one"):
        latest_valid_checkpoint(tmp_path, environment, said.append)
    shutil.rmtree(second)
    with pytest.raises(UserError, match="has no complete checkpoint"):
        latest_valid_checkpoint(tmp_path, environment, said.append)


def test_a_tensor_of_another_model_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    with pytest.raises(UserError, match="has no tensor v"):
        read_slices(path, [TensorSlice("v", 0, 10, torch.zeros(10))])
    with pytest.raises(UserError, match="has 10 numbers in w and the model 11"):
        read_slices(path, [TensorSlice("w", 0, 11, torch.zeros(11))])


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("where", [".metadata", "tensors.json", "complete.json", "__0_0.distcp"])
def test_no_file_of_a_checkpoint_is_run(tmp_path: Path, environment: Environment, where: str) -> None:
    """Of a folder that somebody has prepared, with hashes to match."""
    path, proof = write(tmp_path / "checkpoints", 5), tmp_path / "proof"
    if where == "__0_0.distcp":
        tensors = json.loads((path / "tensors.json").read_text(encoding="utf-8"))
        begin, length, name, _, _ = tensors["w"]["slices"][0]
        with open(path / where, "wb") as file:
            torch.save(Hostile(proof), file)
        tensors["w"]["slices"][0] = [begin, length, name, 0, (path / where).stat().st_size]
        (path / "tensors.json").write_text(json.dumps(tensors), encoding="utf-8")
    else:
        (path / where).write_bytes(pickle.dumps(Hostile(proof)))
    if where != "complete.json":
        description = json.loads((path / "complete.json").read_text(encoding="utf-8"))
        del description["sha256"]
        description["files"] = {
            each.name: {"bytes": each.stat().st_size, "sha256": hashlib.sha256(each.read_bytes()).hexdigest()}
            for each in path.iterdir()
            if each.name != "complete.json"
        }
        description["sha256"] = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        (path / "complete.json").write_text(json.dumps(description), encoding="utf-8")
        assert verify_checkpoint(path) is None, "hashes prove nothing against who can write them"
    with contextlib.nullcontext() if where == ".metadata" else pytest.raises(UserError):  # which nobody reads
        latest_valid_checkpoint(tmp_path / "checkpoints", environment, print)
        read(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dtype": "evil"}, "KeyError"),
        ({"numel": -1}, "-1 is not a count"),
        ({"slices": [[0, 10, "../../secret", 0, 8]]}, "not the name of a rank's file"),
        ({"slices": [[0, 1 << 70, "__0_0.distcp", 0, 8]]}, "is not a count"),
        ({"slices": 3}, "TypeError"),
    ],
)
def test_a_list_of_tensors_that_is_none_is_one_line(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    path = write(tmp_path, 5)
    tensors = json.loads((path / "tensors.json").read_text(encoding="utf-8"))
    tensors["w"] |= change
    (path / "tensors.json").write_text(json.dumps(tensors), encoding="utf-8")
    with pytest.raises(UserError, match=f"step-00000005 is damaged .*{what}"):
        read(path)


@pytest.mark.parametrize("slices", [[(0, 4)], [(0, 4), (5, 5)], [(0, 6), (4, 6)]])
def test_ranks_that_do_not_write_a_tensor_once_are_found(tmp_path: Path, slices: list[tuple[int, int]]) -> None:
    shares = [TensorSlice("w", begin, 10, torch.zeros(count)) for begin, count in slices]
    with pytest.raises(UserError, match="the ranks did not write w"):
        write_checkpoint(tmp_path, shares, {"step": 1}, 0, 2, None)


def test_what_the_user_puts_into_a_folder_of_checkpoints_stays(tmp_path: Path) -> None:
    """Whatever its name: beside checkpoints, in them, and in the remains of one that was not finished."""
    for name in (
        "step-best/complete.json",
        "step-best/weights.bin",
        "notes.txt",
        ".step-notes.tmp",
        ".step-00000003.tmp/mine",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine", encoding="utf-8")
    for step in (1, 2, 3, 4):
        path = write(tmp_path, step, keep=1)
        (path / "plots").mkdir()
        (path / "plots" / "a.svg").write_text("mine", encoding="utf-8")
        (path / "note.md").write_text("mine", encoding="utf-8")
    (tmp_path / "step-00000004" / "complete.json").unlink()  # a run that is thrown back to before it, and comes again
    write(tmp_path, 4, keep=1)
    (tmp_path / ".step-00000009.tmp").mkdir()
    (tmp_path / ".step-00000009.tmp" / "mine").write_text("mine", encoding="utf-8")
    remove_partial(tmp_path)
    assert [p.name for p in checkpoints_in(tmp_path)] == ["step-00000004"]
    mine = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and p.read_bytes() == b"mine"}
    assert {f"step-0000000{step}/{name}" for step in (1, 2, 3, 4) for name in ("plots/a.svg", "note.md")} < mine
    assert {"step-best/complete.json", "step-best/weights.bin", "notes.txt", ".step-notes.tmp"} < mine
    assert {"step-00000003/mine", ".step-00000009.tmp/mine"} < mine, "one went with its folder where it was renamed"
    assert not list(tmp_path.rglob("step-0000000[123]/*.distcp"))


# ---- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
def test_every_number_is_written_by_one_rank(world: int) -> None:
    sizes = [5, 1, 0, 17, 3]
    seen = [[0] * size for size in sizes]
    counts = []
    for rank in range(world):
        mine = list(own_slices(sizes, rank, world))
        counts.append(sum(end - begin for _, begin, end in mine))
        for index, begin, end in mine:
            for place in range(begin, end):
                seen[index][place] += 1
    assert all(count == 1 for tensor in seen for count in tensor)
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_machine_is_put_back_to_the_bit(
    make_config: Callable[..., Config], environment: Environment, tmp_path: Path, optimizer: str
) -> None:
    """Weights, moments, counts, random state: the next steps are the same."""
    config = make_config(f"optimizer.name={optimizer}")
    components = build(config, environment)

    def steps(first: int) -> list[float]:
        return [
            components.step(synthetic_input(config, environment, seed=first + i), lr=0.01).mlm_sum.item()
            for i in (0, 1)
        ]

    steps(0)
    copies = [TensorSlice(s.name, s.begin, s.numel, s.values.clone()) for s in slices_to_write(components, environment)]
    counts = json.loads(json.dumps(optimizer_counts(components)))
    mine = as_bytes("rank.0", rank_state(components, environment))
    write_checkpoint(tmp_path, [*copies, mine], {"step": 2}, 0, 2, None)
    expected, weights = steps(2), [p.detach().clone() for p in components.model.parameters()]
    other = build(config, environment)
    torch.manual_seed(77)
    load_tensors(tmp_path / "step-00000002", other, environment, counts, num_ranks=1)
    components = other
    assert steps(2) == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, other.model.parameters(), strict=True))


def test_without_the_same_ranks_random_state_stays(
    make_config: Callable[..., Config], environment: Environment, tmp_path: Path
) -> None:
    components = build(make_config(), environment)
    mine = as_bytes("rank.0", rank_state(components, environment))
    write_checkpoint(tmp_path, [*slices_to_write(components, environment), mine], {"step": 1}, 0, 2, None)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_tensors(tmp_path / "step-00000001", components, environment, optimizer_counts(components), num_ranks=2)
    assert torch.equal(torch.get_rng_state(), before)
    load_tensors(tmp_path / "step-00000001", components, environment, optimizer_counts(components), num_ranks=1)
    assert not torch.equal(torch.get_rng_state(), before)


# ---- beside training ------------------------------------------------------------------------------------------------


def test_the_update_waits_for_the_copy_and_not_for_the_writing(
    tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, real = threading.Event(), saver_module.write_checkpoint

    def slow(*arguments: Any) -> None:
        assert may_write.wait(20)
        real(*arguments)

    monkeypatch.setattr(saver_module, "write_checkpoint", slow)
    saver = AsyncCheckpointWriter(tmp_path, environment, 2, None)
    weights = VALUES.clone()
    saver.start([TensorSlice("w", 0, 10, weights)], {}, {"step": 1})
    saver.before_update()
    weights.fill_(-5.0)  # the update
    assert latest_checkpoint(tmp_path) is None
    may_write.set()
    saver.wait()
    assert torch.equal(read(tmp_path / "step-00000001"), VALUES)
    (record,) = saver.records
    assert record["stall_s"] > 0
    assert record["total_s"] >= record["copy_s"] > 0


def test_a_failure_in_the_background_is_raised_later(
    tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(saver_module, "write_checkpoint", fails)
    saver = AsyncCheckpointWriter(tmp_path, environment, 2, None)
    saver.start([], {}, {"step": 1})
    saver.before_update()
    with pytest.raises(UserError, match="no room"):
        saver.wait()
    assert saver.failed == "no room"


def test_own_work_is_timed_and_ends_with_an_error(
    tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a heartbeat tells of a rank that writes: more than nothing in the middle, nothing after it."""
    saver = AsyncCheckpointWriter(tmp_path, environment, 2, None)
    seen: dict[str, float] = {}

    def watched(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def look(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread().name == "checkpoint-writer":
                time.sleep(0.005)
                seen[name] = min(saver.own_work.seconds(), seen.get(name, 1.0))
            return real(*arguments, **named)

        patch.setattr(owner, name, look)

    (tmp_path / ".step-00000001.tmp").mkdir()  # a crash has left it, so there is something to remove
    with monkeypatch.context() as patch:
        for owner, name in (
            (module, "sha256_of"),
            (module, "remove_own"),
            (os, "mkdir"),
            (os, "fsync"),
            (os, "replace"),
        ):
            watched(patch, owner, name)
        saver.start([TensorSlice("a", 0, 10, VALUES)], {}, {"step": 1})
        saver.wait()
    assert seen.keys() == {"sha256_of", "remove_own", "mkdir", "fsync", "replace"}
    assert min(seen.values()) >= 0.005, seen
    assert saver.own_work.seconds() == 0.0

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    saver.start([TensorSlice("a", 0, 10, VALUES)], {}, {"step": 2})
    with pytest.raises(UserError, match="step 2 was not written: .*Input/output error"):
        saver.wait()
    assert saver.own_work.seconds() == 0.0


def test_a_rank_lost_while_writing_stays_a_lost_rank(
    tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be tried again, as what a person must mend may not."""

    def reset(*_: Any) -> None:
        raise RuntimeError("[gloo] Connection reset by peer\nframe #0")

    monkeypatch.setattr(saver_module, "write_checkpoint", reset)
    saver = AsyncCheckpointWriter(tmp_path, environment, 2, None)
    saver.start([], {}, {"step": 1})
    with pytest.raises(RuntimeError, match="step 1 was not written: .*Connection reset by peer$"):
        saver.wait()


@pytest.mark.parametrize("fails", [True, False])
def test_a_log_that_finds_the_disk_full_while_a_checkpoint_fills_it(
    make_config: Callable[..., Config], environment: Environment, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The checkpoint's error is the one that all ranks know. It is waited for, so that none leaves half of one behind."""
    full, filled = threading.Event(), threading.Event()

    def fill(*_: Any) -> None:
        assert full.wait(10)
        time.sleep(0.2)
        filled.set()
        if fails:
            raise UserError("checkpoint of step 1 was not written: disk full")

    def write(line: Line) -> None:
        if line.step == 1:  # the log is written first
            return
        full.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    config = make_config("train.max_steps=4", "train.log_every_steps=1", "checkpoint.every_steps=1")
    monkeypatch.setattr(saver_module, "write_checkpoint", fill)
    with opened(config) as context:
        monkeypatch.setattr(context.metrics, "write", write)
        expected = (UserError, "step 1 was not written") if fails else (OSError, "No space left")
        with pytest.raises(expected[0], match=expected[1]):
            run(context, time.time())
    assert filled.is_set(), "it was waited for"


# ---- who may go on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.hidden_size=32", "model.hidden_size was 16 and is now 32"),
        ("batch.micro_batch_size=4,batch.global_batch_size=4", "batch.global_batch_size"),
        ("balance.strategy=random", "balance.strategy was 'balanced' and is now 'random'"),
        ("optimizer.lr=0.002", "optimizer.lr"),
        ("schedule.total_steps=50", "schedule.total_steps"),
        ("communication.max_norm=2.0", "communication.max_norm"),
        ("communication.clip_groups=model", "communication.clip_groups"),
        ("communication.reduce_dtype=bf16", "communication.reduce_dtype"),
        ("train.seed=4", "train.seed was 0 and is now 4"),
        ("optimizer.use_apex=true", "optimizer.use_apex was False"),
    ],
)
def test_what_a_resumed_run_must_share(make_config: Callable[..., Config], override: str, named: str) -> None:
    first = resume_key(make_config(), "a" * 64, "b" * 64)
    other = resume_key(make_config(*override.split(",")), "a" * 64, "b" * 64)
    with pytest.raises(UserError, match=f"does not fit this config: .*{named}.*; resume with the run's own config"):
        check_key(Path("step-1"), first, other)


def test_another_model_is_refused_with_both_hashes(make_config: Callable[..., Config]) -> None:
    first, other = (resume_key(make_config(*each), "a" * 64, "b" * 64) for each in ((), ("model.num_layers=1",)))
    assert first["model"] != other["model"]
    with pytest.raises(UserError, match=f"another model \\(hash {first['model']}, now {other['model']}\\)"):
        check_key(Path("step-1"), first, other)


def test_another_data_set_is_refused_with_both_hashes(make_config: Callable[..., Config]) -> None:
    first, other = (resume_key(make_config(), train * 64, "b" * 64) for train in "ac")
    with pytest.raises(UserError, match="train data had the hash aaaaaaaaaaaaaaaa and has now cccccccccccccccc"):
        check_key(Path("step-1"), first, other)


def test_what_a_resumed_run_may_change(make_config: Callable[..., Config]) -> None:
    first = resume_key(make_config(), "a" * 64, "b" * 64)
    may = ("train.max_steps=9", "communication.bucket_mb=1.0", "run.name=x", "system.threads_per_rank=1")
    check_key(Path("step-1"), first, resume_key(make_config(*may), "a" * 64, "b" * 64))
