"""Whatever the program writes, and writes again: files that are not its own stay as they are, wherever they lie."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.one_run import execute
from support.run_files import run_record

from bert_fast import claims
from bert_fast.claims import MARK
from bert_fast.config import Config
from bert_fast.data import prepare as preparation
from bert_fast.data.formats.convert import export_store, find_sources, import_store
from bert_fast.data.prepare import Recipe, prepare
from bert_fast.data.samples import SampleParams
from bert_fast.data.store import Store
from bert_fast.errors import UserError
from bert_fast.run_folder import PENDING_RECORD, RECORD, check_folder, create_folder, run_folder, take_folder
from bert_fast.train import complete as completing
from bert_fast.train.checkpoint.storage import latest_checkpoint
from bert_fast.train.complete import complete, exit_code_of, finished_again
from bert_fast.train.run_record import finish

# Names as people give them, some of them nearly the program's own
MINE = (
    "NOTES.md", "plots/loss.svg", ".hidden", "train-00000.txt.bak", "train-notes.txt", "stamp.json.orig", "vocab.old.txt",
    "manifest-copy.json", "metrics.json.gz", "part-0-of-1.tfrecord.txt", "step-best/complete.json", "result_0.txt~",
    "__0_0.distcp.copy", "pieces-mine/000000.json", "parts-train-mine/00000.bin", "events.out.txt", ".config.yaml.swp",
)  # fmt: skip


class Crash(BaseException):
    """As kill -9: nothing that our code catches."""


def crash(*_: Any, **__: Any) -> Any:
    raise Crash


class Planted:
    """A user's own files in every folder below one, and what was in them."""

    def __init__(self, top: Path) -> None:
        self._files: dict[Path, bytes] = {}
        for folder in [top, *(path for path in top.rglob("*") if path.is_dir())]:
            for name in MINE:
                self.add(folder / name)

    def add(self, path: Path) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"mine: {path}", encoding="utf-8")
            self._files[path] = path.read_bytes()

    def check(self) -> None:
        assert self._files
        for path, content in self._files.items():
            assert path.is_file(), f"{path} is gone"
            assert path.read_bytes() == content, f"{path} was written over"


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings() -> tuple[str, ...]:
    return (
        "train.max_steps=6",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=1",
        "checkpoint.save_final_model=true",
    )


def test_a_run_started_over_resumed_and_finished(make_config: Callable[..., Config], settings: tuple[str, ...]) -> None:
    config = make_config(*settings, "train.max_steps=2")
    folder = run_folder(config)
    execute(config)
    planted = Planted(folder)
    take_folder(make_config(*settings), resume=True)
    context, summary = execute(make_config(*settings), resume=True)
    planted.check()
    finish(context, summary)
    planted.check()
    for path in (folder / "checkpoints").rglob("complete.json"):  # as after a crash before the first checkpoint
        if path.read_bytes() not in (b"", *[f"mine: {path}".encode()]):
            path.unlink()
    (folder / "metrics.json").unlink()
    assert latest_checkpoint(folder / "checkpoints") is None
    take_folder(config, resume=False)
    create_folder(config, resume=False, commit="a commit")
    planted.check()
    own = {path for path in contents(folder) if not path.read_bytes().startswith(b"mine")}
    assert {path.name for path in own} == {MARK, ".running.json", "config.yaml", "commit.txt"}, (
        "all that a run wrote is known"
    )


@pytest.mark.parametrize("name", ["commit.txt", "config.yaml", "NOTES.md", "checkpoints/weights.bin", ".running.json"])
def test_a_folder_that_only_looks_like_a_runs_is_refused(make_config: Callable[..., Config], name: str) -> None:
    """Whatever lies in it: a commit.txt proves nothing."""
    config = make_config()
    folder = run_folder(config)
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("{}", encoding="utf-8")
    before = contents(folder)
    for start in (take_folder, functools.partial(create_folder, commit="a commit")):
        with pytest.raises(UserError, match="holds files that are not a run's"):
            start(config, False)
    assert contents(folder) == before


def test_a_link_in_the_place_of_a_runs_file_is_not_written_through(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config()
    folder = create_folder(config, resume=False, commit="a commit")
    (tmp_path / "mine.jsonl").write_text("mine", encoding="utf-8")
    (folder / "metrics.jsonl").symlink_to(tmp_path / "mine.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl is not a file that a run has written"):
        create_folder(config, resume=False, commit="a commit")
    assert (tmp_path / "mine.jsonl").read_text(encoding="utf-8") == "mine"


# ---- a run's last files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlperf", ["true", "false"])
def test_a_run_killed_while_it_finishes_is_finished_by_the_next_start(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mlperf: str
) -> None:
    """Between any two of its last files."""
    config = make_config("train.max_steps=2", f"mlperf.enabled={mlperf}")
    folder = run_folder(config)
    context, summary = execute(config)
    with monkeypatch.context() as patch:
        patch.setattr(completing, "read_record", crash)
        with pytest.raises(Crash):
            finish(context, summary)
    saved = (folder / PENDING_RECORD).read_bytes()
    for moment in ("cost_rows", "check_log", "write_report", "write_json", "unlink", "print_table"):
        if moment == "check_log" and mlperf == "false":
            continue
        (folder / "metrics.json").unlink(missing_ok=True)
        (folder / PENDING_RECORD).write_bytes(saved)
        with monkeypatch.context() as patch:
            patch.setattr(Path if moment == "unlink" else completing, moment, crash)
            with pytest.raises(Crash):
                complete(folder)
        (folder / ".running.json").write_text('{"host": "gone"}', encoding="utf-8")
        claims.release(folder)  # this process's claim alone: another's stays
        code = finished_again(folder)
        if moment == "print_table":  # the file that begins it was the last to go
            assert code is None
        else:
            assert code == 0
        assert exit_code_of(folder) == 0
        names = {path.name for path in folder.iterdir()}
        assert names >= {"metrics.json", "report.html", "cost.json"}
        assert PENDING_RECORD not in names
    record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert ("passed" in record["compliance"]) == (mlperf == "true")
    assert "its last files are made now" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds a finished run"):
        take_folder(config, resume=False)


def test_a_finished_run_of_an_older_form_is_refused_in_one_line(tmp_path: Path) -> None:
    """Its exit code is not guessed, and its last files are not made of it."""
    assert exit_code_of(tmp_path) is None
    older = {name: value for name, value in run_record().as_json().items() if name != "format"}
    for name, call in ((RECORD, exit_code_of), (PENDING_RECORD, complete)):
        (tmp_path / name).write_text(json.dumps(older), encoding="utf-8")
        with pytest.raises(
            UserError, match=rf"^.*/{name} was written before the settings were renamed \(it has no format\)"
        ):
            call(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {RECORD, PENDING_RECORD}


@pytest.mark.parametrize(("status", "code"), [("success", 0), ("target not reached", 1)])
def test_the_exit_code_of_a_finished_run(tmp_path: Path, status: str, code: int) -> None:
    (tmp_path / RECORD).write_text(json.dumps(run_record(status=status).as_json()), encoding="utf-8")
    assert exit_code_of(tmp_path) == code


# ---- half-made run folders ------------------------------------------------------------------------------------------

_CALLS = ("link", "replace", "unlink", "fsync", "mkdir", "rmdir")


@pytest.mark.parametrize("what", ["a kill", "a full disk"])
def test_a_start_cut_short_anywhere_can_be_repeated(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Between any two things that it does to the disk."""
    config = make_config()
    folder = run_folder(config)
    count = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        claims.release(folder)
        calls = [0]

        def cut(
            real: Callable[..., Any], name: str, calls: list[int] = calls, limit: int = count
        ) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                calls[0] += name != "unlink" or what == "a kill"
                if calls[0] > limit and (what == "a kill" or name in ("link", "fsync", "mkdir")):
                    raise Crash if what == "a kill" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for name in _CALLS:
                patch.setattr(os, name, cut(getattr(os, name), name))
            try:
                take_folder(config, resume=False)
                create_folder(config, resume=False, commit="a commit")
            except (Crash, UserError, OSError):
                pass
            else:
                break
        if (folder / ".running.json").exists():  # its process is gone
            (folder / ".running.json").write_text('{"host": "gone"}', encoding="utf-8")
        claims.release(folder)
        take_folder(config, resume=False)
        create_folder(config, resume=False, commit="a commit")
        assert {path.name for path in folder.iterdir() if not path.name.endswith(".tmp")} == {
            MARK, ".running.json", "config.yaml", "commit.txt",
        }, count  # fmt: skip
        count += 1
    assert count > 6


# ---- data -----------------------------------------------------------------------------------------------------------

PARAMS = SampleParams(max_seq_len=32, max_predictions=5, dupe_factor=1)


def recipe(folder: Path, **changes: Any) -> Recipe:
    # So small a vocabulary does not know every number
    settings = {"vocab_size": 120, "eval_fraction": 0.3, "max_unknown": 1.0, "params": PARAMS, **changes}
    return Recipe(corpus="prose", input=str(folder), **settings)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in range(12):
        lines = [
            f"The {word} number {name} is a sentence of its own.\n" for word in ("first", "second", "third", "fourth")
        ]
        (folder / f"{name}.txt").write_text("\n".join(lines * 3), encoding="utf-8")
    return folder


def quiet(_line: str) -> None:
    """Nothing."""


def test_a_preparation_made_again_otherwise(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data"
    prepare(recipe(texts), out, 1, quiet)
    for name in ("pieces-0123456789ab", "parts-train-0123456789ab"):  # of one that was killed
        (out / name).mkdir()
    planted = Planted(out)
    with monkeypatch.context() as patch:  # once stopped, with parts on the disk
        patch.setattr(preparation, "merge_parts", crash)
        with pytest.raises(Crash):
            prepare(recipe(texts, eval_max_samples=5), out, 1, quiet)
    prepare(recipe(texts, eval_max_samples=4), out, 1, quiet)
    prepare(Recipe(**{**vars(recipe(texts)), "eval_fraction": 0.4}), out, 1, quiet)
    planted.check()
    assert len(Store(out / "train")) > 0


@pytest.mark.parametrize(
    "name", ["vocab.txt", "text/train-00000.txt", "train/manifest.json", "eval/samples.bin", ".running.json"]
)
def test_a_preparation_beside_files_of_its_own_names_is_refused(texts: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "raw.xml").write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(
        UserError,
        match=r"holds files that are not a preparation's and that one would write over \(.*choose another --out",
    ):
        prepare(recipe(texts), tmp_path, 1, quiet)
    assert contents(tmp_path) == before


def test_a_vocabulary_of_the_users_is_used_and_kept(texts: Path, tmp_path: Path) -> None:
    """Though it lies where a trained one would go."""
    prepare(recipe(texts), tmp_path / "first", 1, quiet)
    out = tmp_path / "out"
    out.mkdir()
    mine = (tmp_path / "first/vocab.txt").read_bytes() + b"word\n"
    (out / "vocab.txt").write_bytes(mine)
    prepare(recipe(texts, vocab=str(out / "vocab.txt")), out, 1, quiet)
    with pytest.raises(UserError, match=r"vocab\.txt is not as this command wrote it; move it, name it with --vocab"):
        prepare(recipe(texts), out, 1, quiet)
    with pytest.raises(UserError, match="is not as this command wrote it"):
        prepare(recipe(texts, vocab=str(tmp_path / "first/vocab.txt")), out, 1, quiet)
    assert (out / "vocab.txt").read_bytes() == mine
    assert not list(out.glob("*.tmp"))


def test_a_store_of_an_earlier_version_is_ours(texts: Path, tmp_path: Path) -> None:
    """It has no mark; its stamp, or its manifest, says enough."""
    prepare(recipe(texts), tmp_path, 1, quiet)
    (tmp_path / MARK).unlink()
    prepare(recipe(texts, eval_max_samples=4), tmp_path, 1, quiet)
    assert (tmp_path / MARK).is_file()


@pytest.fixture
def exported(stores: Path, tmp_path: Path) -> Path:
    export_store(stores / "train", tmp_path / "out", "tfrecord", width=32, most_masked=8, per_file=40, log=quiet)
    return tmp_path / "out"


def test_an_export_and_an_import_made_again(stores: Path, exported: Path, vocab_file: Path, tmp_path: Path) -> None:
    count = len(Store(stores / "train"))
    planted = Planted(exported)
    export_store(stores / "train", exported, "tfrecord", width=32, most_masked=8, per_file=50, log=quiet)
    sources = [path for path in find_sources(exported) if Path(path).name.startswith("part-000")]
    assert len(sources) == -(-count // 50), "no part of the export before"
    back = tmp_path / "back"
    import_store(sources, back, vocab_file, num_workers=1, log=quiet)
    parts = tmp_path / "back.parts"
    parts.mkdir()
    for folder in (back, parts):
        for name in MINE:
            planted.add(folder / name)
    import_store(sources, back, vocab_file, max_samples=60, num_workers=1, log=quiet)
    planted.check()
    assert len(Store(back)) == 60


def test_an_export_or_an_import_over_files_of_those_names_is_refused(
    stores: Path, exported: Path, vocab_file: Path, tmp_path: Path
) -> None:
    for name in ("mine/part-00000-of-00003.tfrecord", "store/manifest.json", "other.parts/x-0123456789ab.bin"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"not an export's \(part-00000-of-00003\.tfrecord\)"):
        export_store(stores / "train", tmp_path / "mine", "tfrecord", width=32, most_masked=8, per_file=40, log=quiet)
    sources = find_sources(exported)
    with pytest.raises(UserError, match=r"not a store's and that one would write over \(manifest\.json\)"):
        import_store(sources, tmp_path / "store", vocab_file, num_workers=1, log=quiet)
    with pytest.raises(UserError, match=r"not an unfinished import's and that one would write over"):
        import_store(sources, tmp_path / "other", vocab_file, num_workers=1, log=quiet)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["prepare", "prepare beside an import", "import", "import in a preparation", "export"])
def test_a_folder_that_another_process_writes_is_refused_by_its_name(
    texts: Path, stores: Path, exported: Path, vocab_file: Path, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "data"
    claimed = out / "eval" if what == "prepare beside an import" else exported if what == "export" else out
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        note = {"host": socket.gethostname(), "pid": other.pid, "started": claims.start_time(other.pid), "job": None}
        claimed.mkdir(parents=True, exist_ok=True)
        kind = {"prepare": "a preparation", "import": "a store"}.get(what)
        if kind:
            (claimed / MARK).write_text(json.dumps({"format": claims.FORMAT, "kind": kind}), encoding="utf-8")
        (claimed / claims.LOCK).write_text(json.dumps(note), encoding="utf-8")
        before = contents(tmp_path)

        def write() -> None:
            if what.startswith("prepare"):
                prepare(recipe(texts), out, 1, quiet)
            elif what == "export":
                export_store(stores / "train", exported, "tfrecord", width=32, most_masked=8, per_file=9, log=quiet)
            else:
                target = out / "train" if what == "import in a preparation" else out
                import_store(find_sources(exported), target, vocab_file, num_workers=1, log=quiet)

        refused = f"is in use by process {other.pid} on this host; wait for it, stop it, or choose "
        with pytest.raises(UserError, match=refused):
            write()
        assert contents(tmp_path) == before
        assert other.stdin is not None
        other.stdin.close()


# ---- which folder, and when it is refused -----------------------------------------------------------------------------


def finish_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000004" / "complete.json").write_text("{}")


def test_folder_name_comes_from_name_and_seed(make_config: Callable[..., Config]) -> None:
    config = make_config("run.folder=null", "run.results_dir=out", "run.name=x", "train.seed=3")
    assert run_folder(config) == Path("out/x-seed3")
    assert run_folder(make_config("run.folder=elsewhere")) == Path("elsewhere")


@pytest.mark.parametrize("resume", [False, True])
def test_finished_run_is_refused(make_config: Callable[..., Config], resume: bool) -> None:
    config = make_config()
    folder = run_folder(config)
    finish_checkpoint(folder)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"already holds a finished run; choose another run\.name or run\.folder"):
        check_folder(config, resume)


def test_stopped_run_needs_resume(make_config: Callable[..., Config]) -> None:
    config = make_config()
    check_folder(config, False)
    finish_checkpoint(run_folder(config))
    with pytest.raises(UserError, match=r"holds a stopped run; continue it with --resume"):
        check_folder(config, False)
    check_folder(config, True)


def test_resume_needs_a_checkpoint(make_config: Callable[..., Config]) -> None:
    config = make_config()
    with pytest.raises(UserError, match=r"--resume: .* has no checkpoint; start the run without"):
        check_folder(config, True)
    (run_folder(config) / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint"):
        check_folder(config, True)


def test_create_folder_records_the_config_and_clears_remains(make_config: Callable[..., Config]) -> None:
    config = make_config()
    folder = create_folder(config, resume=False, commit="a commit")
    assert "hidden_size: 16" in (folder / "config.yaml").read_text()
    assert (folder / "commit.txt").read_text().strip()
    (folder / "result_0.txt").write_text("a crashed run's")
    create_folder(config, resume=False, commit="a commit")
    assert not (folder / "result_0.txt").exists()
    (folder / "result_0.txt").write_text("a stopped run's")
    create_folder(config, resume=True, commit="a commit")
    assert (folder / "result_0.txt").exists()


def test_a_folder_that_is_not_a_runs_is_not_removed(make_config: Callable[..., Config]) -> None:
    config = make_config()
    folder = run_folder(config)
    (folder / "other-seed0").mkdir(parents=True)
    (folder / "other-seed0" / "metrics.json").write_text("{}")

    def start() -> None:
        check_folder(config, False)
        create_folder(config, resume=False, commit="a commit")

    with pytest.raises(UserError):
        start()
    assert (folder / "other-seed0" / "metrics.json").exists()


def test_a_file_where_the_folder_should_be_is_kept(make_config: Callable[..., Config]) -> None:
    config = make_config()
    run_folder(config).write_text("notes")
    with pytest.raises(UserError, match=r"/run is a file, not a folder; choose another run\.name"):
        create_folder(config, resume=False, commit="a commit")
    assert run_folder(config).read_text() == "notes"
