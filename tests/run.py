#!/usr/bin/env python3
"""Runs the project's tests: all stages, or those named on the command line.

Each stage writes to build/logs/STAGE.log; of a failed one the end is shown. Stages run side by side as far as two cores
and 24 GiB carry that. Tests marked long are left out, but for --long. The last line counts what has passed and failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BUILD = PROJECT / "build"
TAIL = 60


@dataclass(frozen=True)
class Stage:
    """A list of commands. Each is a test by itself, unless ``counts`` is the name of a JUnit file with its tests."""

    name: str
    gib: int  # of memory, at most
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


def molecule(scenario: str, gib: int) -> Stage:
    name = f"molecule-{scenario}"
    return Stage(name, gib, (("molecule", "test", "--scenario-name", scenario),), counts=name)


AT_ONCE = 3
GIB = 20
# The longest first. Each starts as soon as there is room for it.
STAGES = (
    molecule("tenants", 9),
    molecule("tls", 4),
    Stage(
        "lint",
        2,
        (
            ("ruff", "check", "."),
            ("ruff", "format", "--check", "."),
            ("yamllint", "--strict", "."),
            ("ansible-lint", "-q"),
        ),
    ),
    Stage("unit", 1, (("pytest", "--quiet", "tests/unit"),), counts="unit"),
    molecule("default", 6),
    molecule("fleet", 8),
    molecule("plan", 2),
    Stage("demo", 3, (("pytest", "--quiet", "-s", "tests/demo"),), counts="demo"),
)


def run(stage: Stage, long: bool) -> Outcome:
    start = time.monotonic()
    stage.log.parent.mkdir(parents=True, exist_ok=True)
    stage.junit.parent.mkdir(parents=True, exist_ok=True)
    stage.junit.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NO_COLOR": "1",
        "PYTEST_ADDOPTS": shlex.join(["-rP", f"--junit-xml={stage.junit}", *([] if long else ["-m", "not long"])])
        if stage.counts
        else "",
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
                failures += [f"{' '.join(command)} ended with {code}"] if code and not bad else []
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


def run_all(stages: list[Stage], long: bool) -> Iterator[Outcome]:
    waiting, running = list(stages), dict[Future[Outcome], Stage]()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while waiting or running:
            for stage in list(waiting):
                room = GIB - sum(other.gib for other in running.values())
                if len(running) < AT_ONCE and stage.gib <= room:
                    waiting.remove(stage)
                    running[pool.submit(run, stage, long)] = stage
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(done)
                error = done.exception()
                yield Outcome(stage, 0, 0, 1, 0, (repr(error),)) if error else done.result()


def main() -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=", ".join(names))
    parser.add_argument("--long", action="store_true", help="also the tests that are marked long")
    asked = parser.parse_args()
    wanted = asked.stages or names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not asked.long:
        print("Tests that are marked long are left out, for they take 40 minutes: --long runs them.")
    start = time.monotonic()
    outcomes: list[Outcome] = []
    for outcome in run_all([stage for stage in STAGES if stage.name in wanted], asked.long):
        outcomes.append(outcome)
        report(outcome)
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
