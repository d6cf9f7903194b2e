"""The drills: each breaks a run in one way and says whether what was promised came true."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_fast.exit_codes import ExitCode, of_signal
from bert_fast.train.checkpoint.storage import latest_checkpoint, verify_checkpoint
from bert_fast.train.health.phases import CHECKPOINT, COMPUTE, GRADIENT_SYNC

from ..benchmarks.overlap.hosts import hosts, start_on
from .victim import VARIABLE
from .watched import HANG_S, PYTHONPATH, Drill, Ended, losses_of, weights_of

MOMENTS = {"compute": COMPUTE, "all-reduce": GRADIENT_SYNC, "checkpoint": CHECKPOINT}
# Wire formats that a run is killed with
LOSSY = {
    "topk_ef": ["communication.reduce_dtype=topk_ef"],
    "onebit_adam": [
        "communication.reduce_dtype=onebit",
        "communication.exact_steps=10",
        "optimizer.name=onebit_adam",
    ],
}
RESTART = "recovery.max_restarts=3"
SLOW = {"action": "slow", "seconds": 0.08, "rank": -1}
Row = dict[str, Any]


def undisturbed(drill: Drill) -> tuple[str, dict[int, list[float]], int]:
    """Weights and losses of the run that is left alone, and the size of its checkpoints."""
    folder = drill.new_folder("undisturbed")
    ended = drill.run(folder)
    assert ended.code == ExitCode.OK, ended.output
    latest = latest_checkpoint(folder / "checkpoints")
    assert latest is not None
    return weights_of(folder), losses_of(folder), sum(p.stat().st_size for p in latest.iterdir())


class Against:
    """Compares runs with the undisturbed one."""

    def __init__(self, drill: Drill) -> None:
        self.drill = drill
        self.weights, self.losses, self.checkpoint_bytes = undisturbed(drill)

    def same(self, folder: Path) -> bool:
        """The same final weights, and every loss that was ever logged is the undisturbed run's, to the bit."""
        losses = losses_of(folder)
        return (
            weights_of(folder) == self.weights
            and losses.keys() == self.losses.keys()
            and all(
                value == self.losses[step][0]
                for step, values in losses.items()
                for value in values
                if math.isfinite(value)
            )
        )


def row(name: str, promise: str, ended: Ended, folder: Path, against: Against, kept: bool, says: str = "") -> Row:
    """A line of the drill's table."""
    return {
        "fault": name,
        "promise": promise,
        "kept": bool(kept) and not ended.hung,
        "exit_code": ended.code,
        "same_weights": against.same(folder),
        "detect_s": ended.detect_s,
        "seconds": round(ended.seconds, 2),
        "hung": ended.hung,
        "says": says or (ended.errors[0].removeprefix("error: ")[:240] if ended.errors else ""),
    }


SAME = "same losses and weights as undisturbed"


def kill(against: Against, rng: random.Random, moment: str, ranks: int = 2) -> Row:
    """kill -9 of a random rank at a random step, in a given phase; the launcher starts all again."""
    drill = against.drill
    every = drill.every
    step = rng.randrange(every + 1, drill.steps - 1)
    if moment == "checkpoint":
        step = rng.randrange(1, (drill.steps - 1) // every) * every
    fault = {
        "action": "kill",
        "rank": rng.randrange(ranks),
        "step": step,
        "phase": MOMENTS[moment],
        "delay_s": rng.uniform(0.0, 0.06 if moment == "checkpoint" else 0.01),
    }
    folder = drill.new_folder(f"kill-{moment}")
    ended = drill.run(folder, RESTART, fault=fault)
    found = row(
        f"kill -9 in {moment}",
        SAME,
        ended,
        folder,
        against,
        ended.happened and ended.code == ExitCode.OK and against.same(folder),
    )
    shutil.rmtree(folder, ignore_errors=True)
    return {**found, "rank": fault["rank"], "step": step}


def kill_with_format(drill: Drill, rng: random.Random, name: str) -> Row:
    """The same with a wire format that keeps what it has not sent, in checkpoints too, against a run of that format."""
    against = Against(replace(drill, folder=drill.folder / name, settings=[*drill.settings, *LOSSY[name]]))
    found = kill(against, rng, "all-reduce")
    return {**found, "fault": f"{found['fault']} with {name}"}


def silence(against: Against, action: str) -> Row:
    """A rank that is stopped (SIGSTOP) or hangs: named within the time limit and 5 s, then all start again."""
    drill = against.drill
    folder = drill.new_folder(action)
    fault = {"action": action, "rank": 1, "step": drill.every + 2, "phase": COMPUTE}
    ended = drill.run(folder, RESTART, fault=fault)
    named = any("rank 1 (" in line for line in ended.errors)
    quick = ended.detect_s is not None and ended.detect_s <= drill.timeout_s + drill.slack_s
    kept = named and quick and ended.code == ExitCode.OK and against.same(folder)
    what = "SIGSTOP of a rank" if action == "stop" else "a rank that hangs"
    return row(what, f"named in {drill.timeout_s:.0f} + {drill.slack_s:.0f} s; {SAME}", ended, folder, against, kept)


def silent_disk(against: Against) -> Row:
    """A rank hangs while it writes its part of a checkpoint: named within that time limit and 5 s, then all start again."""
    drill = against.drill
    folder = drill.new_folder("silent-disk")
    fault = {"action": "hang in a write", "rank": 1}
    ended = drill.run(folder, RESTART, f"checkpoint.timeout_s={drill.timeout_s}", fault=fault)
    named = any("rank 1 (" in line and "writing its part of a checkpoint" in line for line in ended.errors)
    quick = ended.detect_s is not None and ended.detect_s <= drill.timeout_s + drill.slack_s
    kept = named and quick and ended.code == ExitCode.OK and against.same(folder)
    return row(
        "a rank's disk does not answer",
        f"named in {drill.timeout_s:.0f} + {drill.slack_s:.0f} s; {SAME}",
        ended,
        folder,
        against,
        kept,
    )


def not_a_number(against: Against) -> Row:
    """A rank whose weights turn to NaN: steps are skipped, the run stops, goes on from before."""
    drill = against.drill
    folder = drill.new_folder("nan")
    fault = {"action": "nan", "rank": 1, "step": drill.every + 3, "phase": COMPUTE}
    ended = drill.run(folder, RESTART, fault=fault)
    named = any("not finite" in line and "rank 1" in line for line in ended.errors)
    return row(
        "NaN on a rank",
        f"rank and step named; {SAME}",
        ended,
        folder,
        against,
        named and ended.code == ExitCode.OK and against.same(folder),
    )


def skewed_clock(against: Against) -> Row:
    """A rank's clock jumps by an hour."""
    drill = against.drill
    folder = drill.new_folder("skew")
    ended = drill.run(folder, fault={"action": "skew", "rank": 1, "step": 3, "phase": COMPUTE})
    found = row(
        "clock jumps by an hour", SAME, ended, folder, against, ended.code == ExitCode.OK and against.same(folder)
    )
    return {**found, "detect_s": None}  # nobody is lost


def stopped_halfway(drill: Drill, folder: Path, *more: str) -> Ended:
    """A run that SIGTERM ends after the second checkpoint."""

    def stop(process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            latest = latest_checkpoint(folder / "checkpoints")
            if latest is not None and int(latest.name.removeprefix("step-")) >= 2 * drill.every:
                process.send_signal(signal.SIGTERM)
                return
            time.sleep(0.01)

    return drill.run(folder, *more, fault=SLOW, meanwhile=stop)


def damaged_checkpoint(against: Against) -> Row:
    """A bit of the newest checkpoint has changed: the run says so and goes on from the one before."""
    drill = against.drill
    folder = drill.new_folder("damaged")
    first = stopped_halfway(drill, folder)
    latest = latest_checkpoint(folder / "checkpoints")
    if first.code != of_signal(signal.SIGTERM) or latest is None:
        return row("a checkpoint's bit flips", SAME, first, folder, against, False, "the run did not stop as told")
    victim = max(latest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    ended = drill.run(folder, "--resume")
    said = next((line for line in ended.output.splitlines() if "is damaged" in line), "")
    kept = bool(said) and ended.code == ExitCode.OK and against.same(folder)
    return row("a checkpoint's bit flips", f"said; {SAME}", ended, folder, against, kept, said)


def full_disk(against: Against, mount: Path) -> Row:
    """A file system with room for one or two checkpoints: a clear stop; after more room, the same weights."""
    drill = against.drill
    promise = f"clear stop, the last checkpoint sound; with room again {SAME}"
    mount.mkdir(parents=True, exist_ok=True)
    one = sum(
        p.stat().st_size
        for p in (latest_checkpoint(drill.folder / "001-undisturbed" / "checkpoints") or mount).iterdir()
    )
    size = int(2.6 * one / 1024) + 600
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(mount)], capture_output=True, text=True
    )
    if done.returncode:
        return {"fault": "disk full", "promise": promise, "kept": None, "says": f"not run: {done.stderr.strip()}"}
    folder = mount / "run"
    try:
        first = drill.run(folder, "checkpoint.keep_last=9", RESTART, fault=SLOW)
        latest = latest_checkpoint(folder / "checkpoints")
        clear = first.code == ExitCode.USER_ERROR and len(first.errors) == 1 and "disk full" in first.errors[0]
        sound = latest is not None and verify_checkpoint(latest) is None
        subprocess.run(["mount", "-o", "remount,size=256m", str(mount)], check=True)
        ended = drill.run(folder, "--resume", "checkpoint.keep_last=9")
        kept = clear and sound and ended.code == ExitCode.OK and against.same(folder)
        return row(
            "disk full", promise, ended, folder, against, kept, (first.errors or [""])[0].removeprefix("error: ")
        )
    finally:
        subprocess.run(["umount", str(mount)], check=False)


def lost_data(against: Against, store: Path, how: str) -> Row:
    """The training store vanishes, or its bytes change, under the run: a clear stop. Put back, the run ends as undisturbed.

    Args:
        store: a folder with train/ and eval/ that this drill may break.
    """
    drill = against.drill
    folder = drill.new_folder(how)
    data = (f"data.train={store / 'train'}", f"evaluation.data={store / 'eval'}", "data.scrub_mb_per_s=1000")
    victim, aside = store / "train" / "samples.bin", store / "aside.bin"
    shutil.copyfile(victim, aside)

    def break_it(process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None and not latest_checkpoint(folder / "checkpoints"):
            time.sleep(0.01)
        if how == "vanishes":
            victim.unlink()
        else:
            with open(victim, "r+b") as file:
                file.seek(victim.stat().st_size - 1)
                last = file.read(1)
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last[0] ^ 1]))

    first = drill.run(folder, *data, fault=SLOW, meanwhile=break_it)
    os.replace(aside, victim)
    word = "vanished" if how == "vanishes" else "changed under the run"
    clear = first.code == ExitCode.USER_ERROR and len(first.errors) == 1 and word in first.errors[0]
    ended = drill.run(folder, *data, "--resume")
    kept = clear and ended.code == ExitCode.OK and against.same(folder)
    return row(
        f"the data file {how}",
        f"clear stop; put back, {SAME}",
        ended,
        folder,
        against,
        kept,
        (first.errors or [first.output[-200:]])[0].removeprefix("error: "),
    )


def read_only_results(against: Against) -> Row:
    """The folder of checkpoints turns read-only in the middle (a file system that remounts itself after an error)."""
    drill = against.drill
    promise = f"clear stop, nothing lost; writable again {SAME}"
    folder = drill.new_folder("read-only")
    over = folder / "checkpoints"
    mounted: list[str] = []

    def turn(process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None and not latest_checkpoint(over):
            time.sleep(0.01)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(over)], capture_output=True, text=True)
        mounted.append(done.stderr.strip())

    first = drill.run(folder, RESTART, fault=SLOW, meanwhile=turn)
    if mounted != [""]:
        return {"fault": "results read-only", "promise": promise, "kept": None, "says": f"not run: {mounted}"}
    subprocess.run(["umount", str(over)], check=True)
    clear = first.code == ExitCode.USER_ERROR and len(first.errors) == 1 and "was not written" in first.errors[0]
    ended = drill.run(folder, "--resume")
    kept = clear and ended.code == ExitCode.OK and against.same(folder)
    return row(
        "results read-only",
        promise,
        ended,
        folder,
        against,
        kept,
        (first.errors or [first.output[-200:]])[0].removeprefix("error: "),
    )


def cut_network(against: Against) -> Row:
    """Two ranks on two hosts (network namespaces) whose link goes down: both stop in time; linked again, the run ends."""
    drill = against.drill
    promise = f"both stop in {drill.timeout_s:.0f} + {drill.slack_s:.0f} s; linked again, --resume: {SAME}"
    folder = drill.new_folder("cut")
    try:
        with hosts(2, None) as names:
            start = time.monotonic()
            processes = _on_hosts(drill, names, folder)
            while any(p.poll() is None for p in processes) and not latest_checkpoint(folder / "checkpoints"):
                time.sleep(0.01)
            subprocess.run(["ip", "-n", names[1], "link", "set", names[1], "down"], check=True)
            cut = time.monotonic()
            outputs, detect_s = [], 0.0
            for process in processes:
                try:
                    outputs.append(process.communicate(timeout=HANG_S)[0])
                except subprocess.TimeoutExpired:
                    process.kill()
                    outputs.append(process.communicate()[0] + "\nHANGS")
                detect_s = max(detect_s, time.monotonic() - cut)
            codes = [process.returncode for process in processes]
            first = Ended(codes[0], outputs[0], cut - start, detect_s)
            named = all(code == ExitCode.LOST_RANK for code in codes) and all(
                "lost contact" in text for text in outputs
            )
            subprocess.run(["ip", "-n", names[1], "link", "set", names[1], "up"], check=True)
            ended = [process.communicate(timeout=HANG_S) for process in _on_hosts(drill, names, folder, "--resume")]
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        return {"fault": "network cut", "promise": promise, "kept": None, "says": f"not run: {error}"}
    kept = named and detect_s <= drill.timeout_s + drill.slack_s and against.same(folder)
    outcome = row("network cut", promise, first, folder, against, kept)
    return {**outcome, "says": outcome["says"] or str(codes) + outputs[1][-200:], "exit_code": 0 if ended else None}


def _on_hosts(drill: Drill, names: list[str], folder: Path, *more: str) -> list[subprocess.Popen[str]]:
    command = drill.command(folder, "system.ranks_per_node=1", *more)
    variables = {"TORCH_CPP_LOG_LEVEL": "ERROR", VARIABLE: json.dumps(SLOW), "PYTHONPATH": PYTHONPATH}
    return start_on(names, command, 29533, **variables)
