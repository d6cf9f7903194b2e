"""The supervisor of a Slurm job, against an srun and an scontrol made of a few lines each."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support.paths import ROOT
from support.run_files import run_record

from bert_fast.config import Config
from bert_fast.config.load import config_from_tree, load_config
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode, of_signal
from bert_fast.launch.slurm import (
    Job,
    Rendezvous,
    fit_to_nodes,
    master_port,
    read_job,
    rendezvous_address,
    srun_command,
)
from bert_fast.report.schema import TARGET_MISSED

VARIABLES = {"SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "node[1-2]"}

# Each start of ranks does the next line of the file `plan`: finish, missed, fail CODE, checkpoint CODE, wait CODE (for a
# signal, then save), deaf CODE (for a signal, then save nothing), user CODE (a rank reports an error of the user).
FAKE_SRUN = """\
import json, os, re, signal, sys, time
from pathlib import Path
here, line = Path(os.environ["FAKE"]), " ".join(sys.argv[1:])
if sys.argv[-1] == "true":
    node = re.search(r"--nodelist=(\\S+)", line)[1]
    dead = (here / "dead").read_text().split()
    if f"hangs:{node}" in dead:
        time.sleep(60)
    sys.exit(node in dead)
signals = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda n, f: signals.append(n))
steps = (here / "plan").read_text().splitlines()
what, _, rest = steps[0].partition(" ")
(here / "plan").write_text("\\n".join(steps[1:]))
names = {"address": "MASTER_ADDR", "port": "MASTER_PORT", "means": "BERT_FAST_RENDEZVOUS_ADDRESSES",
         "secret": "BERT_FAST_SECRET"}
with open(here / "calls", "a") as calls:
    calls.write(json.dumps({"line": line, **{key: os.environ.get(name) for key, name in names.items()}}) + "\\n")
folder = Path(re.findall(r"run.folder=([^'\\s]+)", line)[-1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "commit.txt").write_text("0")
def save():
    (folder / "checkpoints/step-00000005").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints/step-00000005/complete.json").write_text("{}")
if what in ("finish", "missed"):
    (folder / "metrics.json").write_text((here / what).read_text())
    sys.exit(what == "missed")
if what == "checkpoint":
    save()
if what in ("wait", "deaf"):
    (here / "waiting").touch()
    while not signals:
        time.sleep(0.01)
    if what == "wait":
        save()
        (folder / "stopped.json").write_text(json.dumps({"step": 5, "signal": signal.Signals(signals[0]).name}))
else:
    def report(rank, kind, code, text):
        lines = {"rank": rank, "host": "node", "kind": kind, "exit_code": code, "text": text}
        (Path(os.environ["BERT_FAST_ERROR_FOLDER"]) / f"rank-{rank}.json").write_text(json.dumps(lines))
    report(0, "lost_rank", 4, "a consequence")
    report(1, *(("user_error", 2) if what == "user" else ("bug", 70)), "the cause")
time.sleep(0.1)
(here / "signals").write_text(" ".join(signal.Signals(number).name for number in signals))
sys.exit(int(rest or 1))
"""
FAKE_SCONTROL = """\
import os, sys
from pathlib import Path
here = Path(os.environ["FAKE"])
if sys.argv[1:3] == ["show", "hostnames"]:
    print((here / "nodes").read_text())
elif sys.argv[1] == "requeue":
    (here / "requeued").write_text(sys.argv[2])
else:
    print((here / "job").read_text())
"""


def tiny(**sections: dict[str, Any]) -> dict[str, Any]:
    """A config of 2 nodes x 2 ranks, as plain values."""
    tree: dict[str, Any] = {
        "run": {"name": "tiny"}, "batch": {"global_batch_size": 48, "micro_batch_size": 12}, "schedule": {"total_steps": 10},
        "train": {"max_steps": 10, "seed": 3}, "evaluation": {"every_samples": 480},
        "system": {"world_size": 4, "ranks_per_node": 2},
    }  # fmt: skip
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return tree


class Desk:
    """A folder with fakes on PATH in which the supervisor runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
            path = folder / "bin" / name
            path.write_text(f"#!{sys.executable} -IS\n{text}", encoding="utf-8")
            path.chmod(0o755)
        for name, status in (("finish", "success"), ("missed", TARGET_MISSED)):
            self.put(**{name: json.dumps(run_record(status=status).as_json())})
        self.put(nodes="localhost\nnode2", plan="finish", dead="", job="JobState=CANCELLED PreemptTime=None")
        self.config()

    def config(self, **sections: dict[str, Any]) -> None:
        (self.folder / "c.yaml").write_text(yaml.safe_dump(tiny(**sections)), encoding="utf-8")

    def put(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / name).write_text(text, encoding="utf-8")

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
        environment |= {
            **VARIABLES, "FAKE": str(self.folder), "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT), "NODE_TIMEOUT_S": "20", "RES_OPTIONS": "timeout:1 attempts:1",
            "MASTER_ADDR": "10.0.0.1", **variables,
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "bert_fast.launch.supervise",
            "--config",
            "c.yaml",
            "run.folder=out",
            *arguments,
        ]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        return self.end(self.start(*arguments, **variables))

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def signalled(self, number: signal.Signals, *arguments: str, **variables: str) -> tuple[int, str]:
        """Start, and send a signal to the supervisor once the ranks run."""
        process = self.start(*arguments, **variables)
        deadline = time.monotonic() + 30
        while not (self.folder / "waiting").exists():
            if time.monotonic() > deadline or process.poll() is not None:
                process.kill()
                raise AssertionError(self.end(process)[1])
            time.sleep(0.01)
        process.send_signal(number)
        return self.end(process)

    def calls(self) -> list[dict[str, str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def attempts(self) -> list[dict[str, Any]]:
        record = json.loads((self.out / "supervise.json").read_text(encoding="utf-8"))
        assert record["job"] == 31234
        return [attempt for start in record["starts"] for attempt in start["attempts"]]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def errors_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error:")]


def test_a_run(desk: Desk) -> None:
    code, output = desk.run()
    assert code == ExitCode.OK, output
    (call,) = desk.calls()
    assert "--ntasks=4 --ntasks-per-node=2 --kill-on-bad-exit=1" in call["line"]
    assert "--nodelist=localhost,node2" in call["line"]
    assert "--resume" not in call["line"]
    assert (call["address"], call["means"], call["port"]) == ("10.0.0.1", "10.0.0.1", str(20000 + 31234 % 20000))
    (attempt,) = desk.attempts()
    assert attempt["outcome"] == "finished"
    assert attempt["nodes_asked"] <= attempt["srun_started"] <= attempt["srun_ended"]
    assert not list(desk.folder.glob(".*errors*"))


def test_torchrun_once_a_node_and_extra_arguments(desk: Desk) -> None:
    code, output = desk.run("--style", "torchrun", SRUN_ARGS="--mpi=none --comment='two words'", MASTER_PORT="4711")
    assert code == ExitCode.OK, output
    (call,) = desk.calls()
    assert "--ntasks=2 --ntasks-per-node=1" in call["line"]
    assert "--mpi=none --comment=two words bash -c" in call["line"]
    assert "--nnodes=2 --nproc-per-node=2" in call["line"]
    assert call["means"] is None
    assert "--rdzv-endpoint=10.0.0.1:4711" in call["line"]
    assert "--rdzv-conf=is_host=$((SLURM_NODEID==0))" in call["line"]
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=110" in call["line"]


@pytest.mark.parametrize("node_id", ["0", "1"])
def test_the_shell_of_torchrun_keeps_arguments_whole(node_id: str) -> None:
    """Overrides with spaces and brackets arrive as they were given; only the first node is the host."""
    arguments = ["run.py", "batch=[1, 2]", "name=it's $HOME"]
    command = srun_command("torchrun", ["a", "b"], 2, Rendezvous("7", "10.0.0.1", 1), ["echo", *arguments])
    done = subprocess.run(
        command[command.index("bash") :], capture_output=True, text=True, env={**os.environ, "SLURM_NODEID": node_id}
    )
    assert done.stdout.strip().endswith(f"is_host={int(node_id == '0')} run.py batch=[1, 2] name=it's $HOME")


@pytest.mark.parametrize("name", VARIABLES)
def test_a_missing_variable(desk: Desk, name: str) -> None:
    code, output = desk.run(**{name: ""})
    assert code == ExitCode.USER_ERROR
    assert len(errors_of(output)) == 1
    assert name in errors_of(output)[0]
    assert not desk.calls()


def test_a_job_that_slurm_has_requeued() -> None:
    assert read_job(VARIABLES) == Job(31234, "node[1-2]", num_restarts=0)
    assert read_job({**VARIABLES, "SLURM_RESTART_COUNT": "1"}).num_restarts == 1
    with pytest.raises(UserError, match="'often'"):
        read_job({**VARIABLES, "SLURM_RESTART_COUNT": "often"})


def test_a_head_that_does_not_resolve(desk: Desk) -> None:
    desk.put(nodes="nowhere.invalid\nnode2")
    code, output = desk.run(MASTER_ADDR="")
    assert code == ExitCode.USER_ERROR
    assert len(errors_of(output)) == 1
    assert "nowhere.invalid" in errors_of(output)[0]
    assert "MASTER_ADDR" in errors_of(output)[0]
    assert not desk.calls()


def test_a_head_that_is_only_loopback() -> None:
    """As where /etc/hosts gives a machine's own name to 127.0.1.1: another node would look at itself."""
    with pytest.raises(UserError, match="cannot reach"):
        rendezvous_address("localhost", 2, None)
    assert rendezvous_address("localhost", 1, None) == "127.0.0.1"
    assert rendezvous_address("localhost", 2, "10.1.1.1") == "10.1.1.1"


def test_a_given_head_that_does_not_resolve(desk: Desk) -> None:
    code, output = desk.run(MASTER_ADDR="nowhere.invalid")
    assert code == ExitCode.USER_ERROR
    assert "MASTER_ADDR=nowhere.invalid does not resolve here" in errors_of(output)[0]
    assert not desk.calls()


def test_ports() -> None:
    assert master_port(19999, None) == 39999
    assert master_port(1, "4711") == 4711
    for text in ("70000", "http", "0"):
        with pytest.raises(UserError, match="MASTER_PORT"):
            master_port(1, text)


@pytest.mark.parametrize(("state", "timeout_s"), [("node2", "20"), ("hangs:node2", "6")])
def test_a_spare_takes_the_place_of_a_dead_node(desk: Desk, state: str, timeout_s: str) -> None:
    desk.put(nodes="localhost\nnode2\nnode3\nnode4", dead=state)
    code, output = desk.run(NODE_TIMEOUT_S=timeout_s)
    assert code == ExitCode.OK, output
    assert "--nodelist=localhost,node3 " in desk.calls()[0]["line"]
    assert "node node2 does not answer" in output
    assert "spare: node4" in output


def test_too_few_nodes(desk: Desk) -> None:
    desk.put(dead="node2")
    code, output = desk.run()
    assert code == ExitCode.USER_ERROR
    assert "1 nodes answer and the config needs 2" in errors_of(output)[0]


def test_fewer_nodes_keep_the_global_batch(desk: Desk) -> None:
    desk.config(recovery={"min_nodes": 1})
    desk.put(dead="node2")
    code, output = desk.run()
    assert code == ExitCode.OK, output
    line = desk.calls()[0]["line"]
    assert "--nodes=1 --nodelist=localhost --ntasks=2" in line
    assert (
        "system.world_size=2 system.ranks_per_node=2 batch.micro_batch_size=12 batch.gradient_accumulation_steps=2"
        in line
    )


def config(nodes: int, ranks: int, global_batch_size: int, micro_batch_size: int, min_nodes: int | None = 1) -> Config:
    batch = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
    batch["gradient_accumulation_steps"] = global_batch_size // (micro_batch_size * nodes * ranks)
    system = {"world_size": nodes * ranks, "ranks_per_node": ranks}
    return config_from_tree(tiny(batch=batch, system=system, recovery={"min_nodes": min_nodes}))


@pytest.mark.parametrize(
    ("there", "nodes", "local", "accumulation"),
    [(7, 6, 4, 2), (6, 6, 4, 2), (5, 4, 6, 2), (3, 3, 4, 4), (2, 2, 6, 4), (1, 1, 6, 8)],
)
def test_batch_arithmetic(there: int, nodes: int, local: int, accumulation: int) -> None:
    """8 nodes x 2 ranks, 96 samples, at most 6 of a rank at once: the most nodes that divide, the largest micro-batch."""
    used, overrides = fit_to_nodes(config(8, 2, 96, 6), there)
    assert used == nodes
    values = dict(item.split("=") for item in overrides)
    assert int(values["batch.micro_batch_size"]) == local
    assert int(values["batch.gradient_accumulation_steps"]) == accumulation
    assert local * accumulation * int(values["system.world_size"]) == 96


def test_enough_nodes_change_nothing() -> None:
    assert fit_to_nodes(config(2, 2, 48, 12), 2) == fit_to_nodes(config(2, 2, 48, 12), 5) == (2, [])


@pytest.mark.parametrize(("there", "nodes", "virtual"), [(7, 6, 4), (5, 4, 6), (2, 2, 12)])
def test_fewer_nodes_compute_as_many_ranks(there: int, nodes: int, virtual: int) -> None:
    """48 ranks of 2 samples on 8 nodes x 2 ranks: the largest number of nodes that shares them evenly."""
    batch = {"global_batch_size": 96, "micro_batch_size": 2, "virtual_ranks": 3}
    system = {"world_size": 16, "ranks_per_node": 2}
    tree = tiny(batch=batch, system=system, recovery={"min_nodes": 1})
    used, overrides = fit_to_nodes(config_from_tree(tree), there)
    assert (used, f"batch.virtual_ranks={virtual}") == (nodes, overrides[-1])
    for section, name, value in (re.split("[.=]", each) for each in overrides):
        tree[section][name] = int(value)
    config_from_tree(tree)  # accepts it: the global batch is the product


def test_no_number_of_nodes_divides() -> None:
    with pytest.raises(UserError, match="cannot be shared by 3 to 3 nodes"):
        fit_to_nodes(config(4, 2, 64, 8, min_nodes=3), 3)
    with pytest.raises(UserError, match="recovery.min_nodes=3"):
        fit_to_nodes(config(4, 2, 64, 8, min_nodes=3), 2)
    with pytest.raises(UserError, match="0 nodes answer"):
        fit_to_nodes(config(4, 2, 64, 8, min_nodes=1), 0)


def test_restarts_from_a_checkpoint_up_to_the_limit(desk: Desk) -> None:
    desk.config(recovery={"max_restarts": 2})
    desk.put(plan="fail 4\ncheckpoint 70\nfail 137\nfinish")
    code, output = desk.run()
    assert code == 137
    assert ["--resume" in call["line"] for call in desk.calls()] == [False, False, True]
    assert [attempt["outcome"] for attempt in desk.attempts()] == ["failed"] * 3
    assert desk.attempts()[0]["reason"] == "rank 1: the cause"
    assert output.count("failed: rank 1: the cause") == 3


def test_a_restart_that_helps(desk: Desk) -> None:
    desk.config(recovery={"max_restarts": 1})
    desk.put(plan="checkpoint 4\nfinish")
    assert desk.run()[0] == ExitCode.OK
    assert [attempt["outcome"] for attempt in desk.attempts()] == ["failed", "finished"]


def test_an_error_of_the_user_is_not_restarted(desk: Desk) -> None:
    desk.config(recovery={"max_restarts": 2})
    desk.put(plan="fail 2\nfinish")
    assert desk.run()[0] == ExitCode.USER_ERROR
    assert len(desk.calls()) == 1


@pytest.mark.parametrize(("style", "exit_code"), [("srun", 138), ("torchrun", 1)])
def test_usr1_saves_and_requeues(desk: Desk, style: str, exit_code: int) -> None:
    """The marker decides: torchrun ends with 1, as it does for a failure."""
    desk.config(recovery={"max_restarts": 3})
    desk.put(plan=f"wait {exit_code}\nfinish")
    code, output = desk.signalled(signal.SIGUSR1, "--style", style)
    assert code == ExitCode.OK, output
    assert (desk.folder / "requeued").read_text(encoding="utf-8") == "31234"
    assert (desk.folder / "signals").read_text(encoding="utf-8") == "SIGUSR1"
    assert "stopped by SIGUSR1 at step 5, all ranks saved" in output
    assert len(desk.calls()) == 1

    code, output = desk.run("--style", style, SLURM_RESTART_COUNT="1")  # Slurm starts it again
    assert code == ExitCode.OK, output
    assert "--resume" in desk.calls()[1]["line"]
    assert [attempt["outcome"] for attempt in desk.attempts()] == ["stopped", "finished"]


def test_what_a_rank_reports_as_an_error_of_the_user_is_not_restarted(desk: Desk) -> None:
    """Whatever code srun or torchrun makes of it."""
    desk.config(recovery={"max_restarts": 3})
    desk.put(plan="user 143\nfinish")
    code, output = desk.run()
    assert code == ExitCode.USER_ERROR
    assert "there is something to fix" in output
    assert len(desk.calls()) == 1


def test_another_port_for_every_attempt(desk: Desk) -> None:
    desk.config(recovery={"max_restarts": 2})
    desk.put(plan="fail 4\nfail 4\nfinish")
    assert desk.run()[0] == ExitCode.OK
    assert [call["port"] for call in desk.calls()] == ["31234", "31235", "31236"]


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(desk: Desk) -> None:
    """Each start is signalled at the step where the one before was."""
    requeued = []
    for start in range(4):
        desk.put(plan="wait 138")
        (desk.folder / "requeued").unlink(missing_ok=True)
        (desk.folder / "waiting").unlink(missing_ok=True)
        code, output = desk.signalled(signal.SIGUSR1, SLURM_RESTART_COUNT=str(start))
        requeued.append(desk.requeued)
    assert requeued == [True, True, False, False]
    assert "3 starts in a row have not got beyond step 5" in output
    assert code == of_signal(signal.SIGUSR1)


def test_term_saves_and_leaves_the_job_to_slurm(desk: Desk) -> None:
    desk.put(plan="wait 138")
    code, output = desk.signalled(signal.SIGTERM)
    assert code == of_signal(signal.SIGTERM)
    assert (desk.folder / "signals").read_text(encoding="utf-8") == "SIGUSR1"
    assert not desk.requeued
    assert "not requeued by us" in output


def test_term_in_the_grace_time_of_a_preemption_requeues(desk: Desk) -> None:
    """A job that ends within its grace time is over for Slurm, so it has to ask to be started again."""
    desk.put(plan="wait 138", job="JobId=31234 JobState=RUNNING PreemptTime=2030-01-01T00:00:00")
    assert desk.signalled(signal.SIGTERM)[0] == 0
    assert desk.requeued


def test_signalled_where_nothing_could_be_saved(desk: Desk) -> None:
    desk.config(recovery={"max_restarts": 3})
    desk.put(plan="deaf 138\nfinish")
    code, output = desk.signalled(signal.SIGUSR1)
    assert code == ExitCode.OK
    assert desk.requeued
    assert "signalled while it could not save" in output
    assert len(desk.calls()) == 1


def test_a_requeue_that_slurm_refuses(desk: Desk) -> None:
    desk.put(plan="wait 138")
    path = desk.folder / "bin/scontrol"
    path.write_text(path.read_text(encoding="utf-8").replace('(here / "requeued")', "sys.exit('disabled') #"))
    code, output = desk.signalled(signal.SIGUSR1)
    assert code == of_signal(signal.SIGUSR1)
    assert "could not be requeued: disabled; submit it again" in output


def test_runs_with_seeds_that_count_up(desk: Desk) -> None:
    desk.put(plan="finish\nfinish\nfinish")
    code, output = desk.run("--runs", "3")
    assert code == ExitCode.OK, output
    for index, call in enumerate(desk.calls()):
        assert shlex.split(call["line"])[-2:] == [f"run.folder=out/run_{index}", f"train.seed={3 + index}"]
    assert [attempt["run"] for attempt in desk.attempts()] == ["run_0", "run_1", "run_2"]


def test_finished_runs_are_skipped_and_the_stopped_one_goes_on(desk: Desk) -> None:
    desk.put(plan="finish\nwait 1\nfinish\nfinish")
    assert desk.signalled(signal.SIGUSR1, "--runs", "3")[0] == 0
    assert len(desk.calls()) == 2
    code, output = desk.run("--runs", "3", SLURM_RESTART_COUNT="1")
    assert code == ExitCode.OK, output
    assert "run_0: finished before, skipped" in output
    assert ["--resume" in call["line"] for call in desk.calls()] == [False, False, True, False]


def test_a_missed_target_is_an_end_and_is_told(desk: Desk) -> None:
    desk.config(recovery={"max_restarts": 2})
    desk.put(plan="missed\nfinish")
    code, output = desk.run("--runs", "2")
    assert code == ExitCode.TARGET_MISSED
    assert "target not reached: run_0" in output


def test_a_finished_run_is_not_submitted_twice(desk: Desk) -> None:
    assert desk.run()[0] == ExitCode.OK
    code, output = desk.run()
    assert code == ExitCode.USER_ERROR
    assert "already holds" in errors_of(output)[0]


def test_no_srun(desk: Desk) -> None:
    (desk.folder / "bin/srun").unlink()
    code, output = desk.run(PATH=f"{desk.folder}/bin")
    assert code == ExitCode.USER_ERROR
    assert "srun is not on PATH" in errors_of(output)[0]


@pytest.mark.parametrize(
    ("arguments", "variables", "word"),
    [
        (["--runs", "0"], {}, "--runs"),
        ([], {"NODE_TIMEOUT_S": "1e300"}, "NODE_TIMEOUT_S"),
        ([], {"NODE_TIMEOUT_S": "soon"}, "NODE_TIMEOUT_S"),
        (["batch.x=1"], {}, "batch.x"),
    ],
)
def test_bad_input(desk: Desk, arguments: list[str], variables: dict[str, str], word: str) -> None:
    code, output = desk.run(*arguments, **variables)
    assert code == ExitCode.USER_ERROR
    assert len(errors_of(output)) == 1
    assert word in errors_of(output)[0]


def test_the_number_of_runs_is_bounded(desk: Desk) -> None:
    code, output = desk.run("--runs", "9" * 20)
    assert code == ExitCode.USER_ERROR
    assert output.splitlines()[-1].endswith("--runs: 99999999999999999999 is not between 0 and 1,000,000")


def test_the_host_of_the_supervisor_needs_few_packages() -> None:
    """slurm/README.md names them: it is the batch script's Python, perhaps not that of the ranks in their container."""
    code = "import sys, bert_fast.launch.supervise; print(*sorted({'numpy', 'scipy', 'torch', 'rich'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (ExitCode.OK, "\n"), done.stderr


def test_every_start_of_the_ranks_gets_a_secret_that_is_on_no_command_line(desk: Desk) -> None:
    desk.put(plan="fail\nfinish")
    code, output = desk.run("recovery.max_restarts=1")
    assert code == ExitCode.OK, output
    calls = desk.calls()
    found = [call["secret"] for call in calls]
    assert len(found) == len(set(found)) == 2
    assert all(len(secret) == 64 for secret in found)
    assert not any(secret in call["line"] or secret in output for secret in found for call in calls)


def test_a_folder_that_no_run_has_marked_is_left_alone(desk: Desk) -> None:
    """Before the ranks have looked whether it is a run's at all."""
    (desk.folder / "out").mkdir()
    (desk.folder / "out" / "stopped.json").write_text("mine", encoding="utf-8")
    desk.put(plan="user 2")
    desk.run()
    assert (desk.folder / "out" / "stopped.json").read_text(encoding="utf-8") == "mine"


def test_a_record_that_is_not_ours_is_not_written_over(desk: Desk) -> None:
    (desk.folder / "out").mkdir()
    (desk.folder / "out" / "supervise.json").write_text("mine", encoding="utf-8")
    code, output = desk.run()
    assert code == ExitCode.USER_ERROR
    assert "supervise.json is no record of this program's; move it" in errors_of(output)[0]
    assert (desk.folder / "out" / "supervise.json").read_text(encoding="utf-8") == "mine"


# ---- scripts/submit_slurm.py --------------------------------------------------------------------------------------------


def submit(desk: Desk, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/submit_slurm.py"), "--config", "c.yaml", *arguments]
    environment = {**os.environ, "PATH": "/nowhere", **variables}
    return subprocess.run(command, cwd=desk.folder, env=environment, capture_output=True, text=True, timeout=60)


def test_dry_run_shows_the_script(desk: Desk) -> None:
    done = submit(
        desk, "--dry-run", "--time", "1:00:00", "--runs", "10", "--partition", "gpu", "recovery.spare_nodes=1"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/usr/bin/env bash\n")
    for line in ("#SBATCH --nodes=2-3", "#SBATCH --no-kill", "#SBATCH --partition=gpu", "export RUNS=10"):
        assert line in done.stdout.splitlines()
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    assert not (desk.folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--nodes", "3"], "--nodes 3 does not match"), ([], "no sbatch"), (["--runs", "0"], "--runs 0")],
)
def test_bad_submissions(desk: Desk, arguments: list[str], word: str) -> None:
    done = submit(desk, *arguments)
    assert done.returncode == ExitCode.USER_ERROR
    assert len(done.stderr.splitlines()) == 1
    assert word in done.stderr
    assert not (desk.folder / "runs").exists()


def test_of_two_submissions_in_a_second_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, desk: Desk
) -> None:
    import submit_slurm

    monkeypatch.setattr(submit_slurm.shutil, "which", lambda _name: "/bin/true")
    monkeypatch.setattr(submit_slurm.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout="12\n"))
    monkeypatch.setattr(submit_slurm, "copy_code", lambda _folder: None)
    config = load_config(str(desk.folder / "c.yaml"), [])
    assert submit_slurm.submit(config, tmp_path / "now", "first") == 12
    with pytest.raises(UserError, match=r"now is another submission's, of the same second or by hand; submit again"):
        submit_slurm.submit(config, tmp_path / "now", "second")
    assert (tmp_path / "now/job.sbatch").read_text(encoding="utf-8") == "first"


@pytest.mark.parametrize("name", ["pretrain.sbatch", "pretrain_pyxis.sbatch"])
def test_batch_scripts_tell_their_usage(name: str) -> None:
    script = ROOT / "slurm" / name
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"slurm/{name} CONFIG" in done.stderr


def test_the_container_script_wraps_the_ranks_alone(desk: Desk) -> None:
    variables = {
        **VARIABLES, "FAKE": str(desk.folder), "PATH": f"{desk.folder}/bin:{os.environ['PATH']}", "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT), "MASTER_ADDR": "10.0.0.1", "CONTAINER_IMAGE": "image.sqsh", "SRUN_ARGS": "--mpi=pmix",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "slurm/pretrain_pyxis.sbatch"), "c.yaml", "run.folder=out"],
        cwd=desk.folder, env={**os.environ, **variables}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    line = desk.calls()[0]["line"]
    here = desk.folder
    assert f"--container-image=image.sqsh --container-name=bert_fast_31234 --container-mounts={here}:{here}" in line
    assert f"--container-workdir={here} --mpi=pmix python " in line


ARRAY = {"SLURM_ARRAY_JOB_ID": "31234", "SLURM_ARRAY_TASK_ID": "15"}


def test_a_task_of_an_array_is_requeued_by_its_own_name(desk: Desk) -> None:
    """The id of an array's last task is the array's: requeueing that would start all of its tasks again."""
    assert read_job({**VARIABLES, **ARRAY}).name == "31234_15"
    assert read_job(VARIABLES).name == "31234"
    desk.put(plan="wait 0")
    code, output = desk.signalled(signal.SIGUSR1, **ARRAY)
    assert code == ExitCode.OK, output
    assert (desk.folder / "requeued").read_text(encoding="utf-8") == "31234_15"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_of_a_search_never_requeues_its_job(desk: Desk, number: signal.Signals) -> None:
    """Not even while Slurm preempts the job: the search has asked it to end, or decides itself."""
    desk.put(plan="wait 0", job="JobState=RUNNING PreemptTime=2026-11-27T08:00:00")
    code, output = desk.signalled(number, "--no-requeue", **ARRAY)
    assert code == of_signal(number), output
    assert not desk.requeued
    assert (desk.out / "stopped.json").exists()
