#!/usr/bin/env python3
"""Runs the project's tests: all stages, or those named on the command line.

Each stage writes to build/logs/STAGE.log; of a failed one the end is shown. Stages run side by side as far as two cores
and 24 GiB carry that. The last line counts what has passed and failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BUILD = PROJECT / "build"
TAIL = 60


@dataclass(frozen=True)
class Stage:
    """A list of commands. Each is a test by itself, unless ``counts`` is the name of a JUnit file with its tests."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    counts: str = ""

    @property
    def log(self) -> Path:
        return BUILD / "logs" / f"{self.name}.log"

    @property
    def junit(self) -> Path:
        return BUILD / "junit" / f"{self.name}.xml"


@dataclass(frozen=True)
class Outcome:
    stage: Stage
    seconds: float
    passed: int
    failed: int
    skipped: int
    failures: tuple[str, ...] = ()


def molecule(scenario: str) -> Stage:
    name = f"molecule-{scenario}"
    return Stage(name, (("molecule", "test", "--scenario-name", scenario),), counts=name)


# One group after the other, and within a group so many stages at a time, in this order.
GROUPS: tuple[tuple[int, tuple[Stage, ...]], ...] = (
    (
        3,
        (
            # It waits more than it computes, until it measures at its end: then the others have to be over.
            molecule("tls"),
            Stage(
                "lint",
                (
                    ("ruff", "check", "."),
                    ("ruff", "format", "--check", "."),
                    ("yamllint", "--strict", "."),
                    ("ansible-lint", "-q"),
                ),
            ),
            Stage("unit", (("pytest", "--quiet", "tests/unit"),), counts="unit"),
            molecule("plan"),
            Stage("demo", (("pytest", "--quiet", "-s", "tests/demo"),), counts="demo"),
        ),
    ),
    # What vLLM and LiteLLM need of memory leaves no room for a third.
    (2, (molecule("tenants"), molecule("default"), molecule("fleet"))),
)


def run(stage: Stage) -> Outcome:
    start = time.monotonic()
    stage.log.parent.mkdir(parents=True, exist_ok=True)
    stage.junit.parent.mkdir(parents=True, exist_ok=True)
    stage.junit.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NO_COLOR": "1",
        "PYTEST_ADDOPTS": f"-rP --junit-xml={stage.junit}" if stage.counts else "",
    }
    passed = failed = skipped = 0
    failures: list[str] = []
    with stage.log.open("w", encoding="utf-8") as log:
        for command in stage.commands:
            print("$", *command, file=log, flush=True)
            begin = time.monotonic()
            code = subprocess.run(command, check=False, cwd=PROJECT, env=environment, stdout=log, stderr=log).returncode
            print(f"-> {code} after {time.monotonic() - begin:.1f} s\n", file=log, flush=True)
            if stage.junit.exists() and stage.counts:
                tests, bad, skipped = counted(stage.junit)
                passed, failed = passed + tests - bad - skipped, failed + bad
                failures += failed_tests(stage.junit)
                stage.junit.rename(stage.junit.with_suffix(".done.xml"))
                failed += bool(code and not bad)
            else:
                passed, failed = passed + (code == 0), failed + (code != 0)
                failures += [f"{' '.join(command)} ended with {code}"] if code else []
    return Outcome(stage, time.monotonic() - start, passed, failed, skipped, tuple(failures))


def counted(junit: Path) -> tuple[int, int, int]:
    """Tests, failed and skipped ones of a JUnit file."""
    suites = list(ET.parse(junit).getroot().iter("testsuite"))  # noqa: S314 - pytest has just written it
    return (
        sum(int(suite.get("tests", 0)) for suite in suites),
        sum(int(suite.get("failures", 0)) + int(suite.get("errors", 0)) for suite in suites),
        sum(int(suite.get("skipped", 0)) for suite in suites),
    )


def failed_tests(junit: Path) -> list[str]:
    """Names of the tests that failed, each with the first line of why."""
    return [
        f"{case.get('classname')}::{case.get('name')}: {(why.get('message') or '').partition(chr(10))[0][:200]}"
        for case in ET.parse(junit).getroot().iter("testcase")  # noqa: S314 - pytest has just written it
        for why in (*case.iter("failure"), *case.iter("error"))
    ]


def report(outcome: Outcome) -> None:
    state = "failed" if outcome.failed else "passed"
    counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
    print(f"{outcome.stage.name:<18} {state}  {outcome.seconds:7.1f} s  {counts}", flush=True)
    if outcome.failed:
        lines = outcome.stage.log.read_text(encoding="utf-8", errors="replace").splitlines()
        print(
            *(f"    {line}" for line in lines[-TAIL:]), f"    The whole log: {outcome.stage.log}", sep="\n", flush=True
        )


def main() -> int:
    names = [stage.name for _, stages in GROUPS for stage in stages]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=", ".join(names))
    wanted = parser.parse_args().stages or names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    start = time.monotonic()
    outcomes: list[Outcome] = []
    for at_once, stages in GROUPS:
        with ThreadPoolExecutor(at_once) as pool:
            for running in as_completed([pool.submit(run, stage) for stage in stages if stage.name in wanted]):
                outcomes.append(running.result())
                report(outcomes[-1])
    failed = sum(outcome.failed for outcome in outcomes)
    print(f"All stages took {time.monotonic() - start:.1f} s")
    for outcome in outcomes:
        print(
            *(f"FAILED {outcome.stage.name}: {failure}" for failure in outcome.failures),
            sep="\n",
            end="\n" * bool(outcome.failures),
        )
    print(f"{sum(outcome.passed for outcome in outcomes)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
