"""Stage `tests`: the tests marked `gpu`. Their junit file is kept."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from .stage import ROOT, Context, NotAvailable

# What pyproject.toml has may name plugins that an image does not bring
_SETTINGS = """[pytest]
addopts = -q --strict-markers
pythonpath = {root} {root}/tests {root}/scripts
markers =
    gpu: needs a CUDA device
    slow: takes more than a few seconds
"""


def run(context: Context) -> None:
    result = context.result
    settings, report = context.scratch / "pytest.ini", context.out / "tests.xml"
    settings.write_text(_SETTINGS.format(root=ROOT), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-c",
        str(settings),
        f"--rootdir={ROOT}",
        f"--confcutdir={ROOT}",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        str(ROOT / "tests" / "gpu"),
    ]
    code = subprocess.run(command, cwd=ROOT).returncode
    if not report.is_file():
        result.failures.append(f"pytest ended with exit code {code} and left no report; see tests.log")
        return
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    result.metrics |= {"tests/passed": passed, **{f"tests/{k}": v for k, v in counts.items() if k != "tests"}}
    result.summary = f"{passed} of {counts['tests']} passed, {counts['skipped']} skipped"
    for case in suite.iter("testcase"):
        for bad in (*case.iter("failure"), *case.iter("error")):
            first = (bad.get("message") or "").strip().splitlines()
            result.failures.append(f"{case.get('name')}: {first[0][:200] if first else 'failed'}")
    if code not in (0, 1, 5) and not result.failures:
        result.failures.append(f"pytest ended with exit code {code}; see tests.log")
    if not result.failures and passed == 0:
        raise NotAvailable(f"all {counts['tests']} tests were skipped: no CUDA device")
