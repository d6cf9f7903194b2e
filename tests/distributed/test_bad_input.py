"""Bad input and bad luck, end to end: one clear line on stderr, the right exit code, and nothing already written is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.tiny_task import prepare_data
from support.training_run import TORCHRUN, TrainingRun, Workspace, errors_of, last_step, lines

from bert_fast.claims import claimed
from bert_fast.config.load import load_config
from bert_fast.data.prepare import PREPARATION
from bert_fast.data.store import Store
from bert_fast.exit_codes import ExitCode, of_signal
from bert_fast.model.bert import BertForPretraining
from bert_fast.model.checkpoints import save_pretrained
from bert_fast.train.checkpoint.storage import latest_checkpoint, read_description, verify_checkpoint

pytestmark = pytest.mark.distributed

ONE_RANK = ("system.world_size=1", "batch.global_batch_size=8")
as_root = os.geteuid() == 0


def refused(
    workspace: Workspace,
    *overrides: str,
    code: ExitCode = ExitCode.USER_ERROR,
    resume: bool = False,
    launcher: Sequence[str] = (),
) -> str:
    """The one line that a person gets from a run with these overrides."""
    found, run = workspace.run(*overrides, resume=resume, launcher=launcher)
    assert found == code, run.stderr
    return the_error(run)


def the_error(run: TrainingRun) -> str:
    assert len(errors_of(run)) == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert not run.left_overs()
    return errors_of(run)[0].removeprefix("error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- found before a rank is started ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "communication.bucket_size=4",
            "unknown field communication.bucket_size; did you mean communication.bucket_mb?",
        ),
        ("comunication.bucket_mb=4", "unknown field comunication; did you mean communication?"),
        ("train.max_steps=many", "train.max_steps: .*integer.*'many'"),
        ("communication.clip=local", "communication.clip: .*'global_after_reduce'.*'local'"),
        ("batch.micro_batch_size=7", r"7 x 2 x 1 = 14; set batch\.global_batch_size=14"),
        ("model.num_heads=5", r"set model\.num_heads=4, the nearest number that does"),
        ("data.train=nowhere/train", r"no data at nowhere/train .*(prepare_data\.py|make data)"),
        (
            "checkpoint.init_from=nowhere",
            r"checkpoint\.init_from=nowhere is neither a folder with model\.safetensors",
        ),
    ],
)
def test_bad_setting(workspace: Workspace, override: str, says: str) -> None:
    assert re.search(says, refused(workspace, "run.folder=never", override))
    assert not (workspace.folder / "never").exists()


def test_port_in_use(workspace: Workspace) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(workspace, "run.folder=never", f"system.master_port={port}")
    assert re.search(rf"port {port} .*in use.*system\.master_port=0", line)
    assert not (workspace.folder / "never").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_folder_of_a_finished_run(workspace: Workspace, resume: bool) -> None:
    folder = workspace.folder / f"finished-{resume}"
    (folder / "model").mkdir(parents=True)
    for name in ("metrics.json", "metrics.jsonl", "result_0.txt", "model/model.safetensors"):
        (folder / name).write_text("precious\n", encoding="utf-8")
    before = contents(folder)
    assert "already holds a finished run" in refused(workspace, f"run.folder={folder.name}", resume=resume)
    assert contents(folder) == before


def test_resume_without_a_checkpoint(workspace: Workspace) -> None:
    assert "has no checkpoint" in refused(workspace, "run.folder=fresh", resume=True)
    assert not (workspace.folder / "fresh").exists()


def test_a_folder_that_is_no_run_of_ours_is_left_alone(workspace: Workspace) -> None:
    folder = workspace.folder / "thesis"
    folder.mkdir()
    (folder / "chapter-1.md").write_text("three years of work\n", encoding="utf-8")
    workspace.run("run.folder=thesis", "train.max_steps=1", *ONE_RANK)
    assert (folder / "chapter-1.md").exists()


# ---- found by the ranks ---------------------------------------------------------------------------------------------


def test_world_size_that_does_not_fit(workspace: Workspace) -> None:
    code, run = workspace.run("run.folder=never", launcher=(*TORCHRUN, "1"))
    assert code != 0
    (line,) = errors_of(run)  # torchrun says its own after it
    assert re.search(r"rank 0: the launcher started 1 ranks and system\.world_size=2", line)
    assert not (workspace.folder / "never").exists()


def test_checkpoint_of_another_model(workspace: Workspace, tmp_path: Path) -> None:
    shape = load_config(workspace.config).model.model_copy(update={"hidden_size": 48, "num_heads": 2})
    save_pretrained(BertForPretraining(shape), shape, tmp_path)
    line = refused(workspace, "run.folder=other_model", f"checkpoint.init_from={tmp_path}", *ONE_RANK)
    assert re.search(r"is of another model: embeddings\.word\.weight is \[200, 48\] .*\[200, 32\]", line)


def test_store_of_another_vocabulary(workspace: Workspace) -> None:
    line = refused(workspace, "run.folder=other_vocab", f"data.vocab_sha256={'f' * 64}", *ONE_RANK)
    assert re.search(r"was made with another vocabulary: hash .*expected fffff", line)


def test_truncated_store(workspace: Workspace, tiny_store: Path, tmp_path: Path) -> None:
    """With two ranks: both find it, one line says it."""
    shutil.copytree(tiny_store / "train", tmp_path / "train")
    with open(tmp_path / "train" / "samples.bin", "r+b") as file:
        file.truncate((tmp_path / "train" / "samples.bin").stat().st_size // 4 * 2)
    line = refused(workspace, "run.folder=truncated", f"data.train={tmp_path / 'train'}")
    assert re.search(r"store .*train is truncated: .*prepare the data again", line)


@pytest.mark.parametrize(
    "blocked", ["file", pytest.param("read-only", marks=pytest.mark.skipif(as_root, reason="root may write anywhere"))]
)
def test_results_folder_that_cannot_be_written(workspace: Workspace, tmp_path: Path, blocked: str) -> None:
    results = tmp_path / "results"
    if blocked == "file":
        results.write_text("not a folder\n", encoding="utf-8")
    else:
        results.mkdir(mode=0o555)
    line = refused(workspace, f"run.results_dir={results}", *ONE_RANK)
    assert re.search(r"cannot write .*results.*run\.results_dir", line)


# ---- bad luck in the middle of a run --------------------------------------------------------------------------------


def test_a_killed_rank_is_named_and_the_others_stop(workspace: Workspace) -> None:
    folder = workspace.folder / "killed"
    run = workspace.start("run.folder=killed", "train.max_steps=5000", "checkpoint.every_steps=5")
    run.wait_until(lambda: last_step(folder) >= 12)
    os.kill(run.pid_of_rank(1), signal.SIGKILL)
    assert run.wait() == ExitCode.LOST_RANK
    assert re.search(r"rank 1 by SIGKILL; the others were stopped.*--resume", the_error(run))
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert int(checkpoint.name.removeprefix("step-")) >= 5  # the one of step 10 may have been on its way
    assert [line["step"] for line in lines(folder)] == list(range(1, last_step(folder) + 1))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_ends_at_once_leaves_no_rank_behind(workspace: Workspace, number: signal.Signals) -> None:
    run = workspace.start("run.folder=never", "train.max_steps=5000")
    run.wait_until(lambda: set(run.processes().values()) == {"", "0", "1"})
    run.process.send_signal(number)
    assert run.wait() != ExitCode.OK
    assert not run.left_overs()


def test_sigterm_before_the_first_step_is_no_killed_rank(workspace: Workspace) -> None:
    run = workspace.start("run.folder=never", "train.max_steps=5000")
    run.wait_until(lambda: set(run.processes().values()) == {"", "0", "1"})
    time.sleep(0.3)  # the ranks are importing torch
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == of_signal(signal.SIGTERM)
    assert "killed" not in run.stderr
    assert not run.left_overs()


def test_a_loss_that_is_not_finite_stops_the_run(workspace: Workspace) -> None:
    """The first update by 1e30 ruins the weights: of steps 1 to 4 (from 0) three may be skipped."""
    blow_up = ("optimizer.lr=1e30", "schedule.warmup_steps=0", "communication.clip=none")
    line = refused(workspace, "run.folder=blown_up", "checkpoint.every_steps=1", *blow_up, code=ExitCode.TRAINING_ERROR)
    assert re.search(r"step [1-4]: loss or gradient is not finite, from rank 0, 1 on \S+; 4 steps in a row", line)
    assert "train.max_skipped_steps=3" in line
    assert re.search(r"Samples of that rank: \[\d+(, \d+){7}\].*optimizer\.lr", line)
    folder = workspace.folder / "blown_up"
    assert [entry["bad_step"] for entry in lines(folder, "skipped")] == [1, 2, 3, 4]
    assert latest_checkpoint(folder / "checkpoints") is not None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two MiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not as_root:
        pytest.skip("mounting a small file system needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full(workspace: Workspace, small_disk: Path) -> None:
    """A checkpoint of the tiny model takes a quarter of the disk. Those that were whole stay whole."""
    folder = small_disk / "run"
    often = ("checkpoint.every_steps=3", "checkpoint.keep_last=9")
    line = refused(workspace, f"run.folder={folder}", *often)
    assert re.search(r"checkpoint of step \d+ was not written: disk full .*; free space and --resume", line)
    assert not list(folder.rglob(".step-*"))
    kept = latest_checkpoint(folder / "checkpoints")
    assert kept is not None
    assert verify_checkpoint(kept) is None
    state = read_description(kept)["state"]
    assert state["progress"]["step"] == int(kept.name.removeprefix("step-")) >= 3


# ---- scripts/prepare_data.py ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("empty folder", "folder .*text holds no files"),
        ("blank file", "no document for the train split; is the text empty?"),
        ("latin-1", r"b\.txt is not UTF-8 text .*iconv"),
        ("no [MASK]", r"vocab\.txt has no \[MASK\]; it is no BERT vocabulary"),
        ("missing folder", "folder .*nowhere does not exist; pass --input"),
    ],
)
def test_prepare_data(tiny_store: Path, tmp_path: Path, case: str, says: str) -> None:
    """Into a folder that holds finished stores, which must stay."""
    text, out, vocab = tmp_path / "text", tmp_path / "out", tmp_path / "vocab.txt"
    text.mkdir()
    with claimed(out, PREPARATION):
        for split in ("train", "eval"):
            shutil.copytree(tiny_store / split, out / split)
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cat"]) + "\n", encoding="utf-8")
    if case in ("latin-1", "no [MASK]"):
        (text / "a.txt").write_text("the cat sees a dog .\nthe dog hears a cat .\n\n" * 20, encoding="utf-8")
    if case == "latin-1":
        (text / "b.txt").write_bytes("la vie est très belle .\n".encode("latin-1"))
    if case == "blank file":
        (text / "a.txt").write_text("\n\n\n", encoding="utf-8")
    flags = ["--vocab", vocab] if case == "no [MASK]" else ["--vocab-size", "200"]
    done = prepare_data(
        "--corpus", "mlcommons", "--input", tmp_path / "nowhere" if case == "missing folder" else text, "--out", out,
        "--eval-fraction", "0.3", *flags,
    )  # fmt: skip
    assert done.returncode == ExitCode.USER_ERROR
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(f"^error: .*{says}", done.stderr)
    for split in ("train", "eval"):
        Store(out / split).verify()


def test_verify_finds_a_changed_store(tiny_store: Path, tmp_path: Path) -> None:
    for split in ("train", "eval"):
        shutil.copytree(tiny_store / split, tmp_path / split)
    path = tmp_path / "eval" / "samples.bin"
    changed = bytearray(path.read_bytes())
    changed[100] ^= 1
    path.write_bytes(changed)
    done = prepare_data("verify", tmp_path)
    assert done.returncode == ExitCode.TARGET_MISSED
    assert re.search(r"bytes .*eval: samples\.bin changed since it was written.* WRONG", done.stdout)
    assert re.search(r"eval: looks wrong: .*bytes", done.stdout)
