"""Mutation testing of the files that compute: `python -m tests.mutation [FILE...]`, or `make mutation`.

This changes each file of `plan.toml` in one place at a time; the tests that run that place must fail. Mutants that
survive are printed, unless `equivalent` in `plan.toml` says why no test can detect them. The exit status is 1 if any
survives.

mutmut 3.8 provides the operators. Its own runner is not used: it assigns the lines of a module's fixture only to the
first test (our jobs run in such fixtures), skips decorated functions (all context managers and properties), and can't
try a sample.
"""

import argparse
import os
import random
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutation.mutants import Mutant, mutants
from tests.mutation.runs import PASSED, WRONG_SOURCE, Baseline, measure, preload, try_mutant

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "llama_stack_provider_moe"
PLAN = Path(__file__).with_name("plan.toml")
BASELINE_LIMIT_S = 1800.0


@dataclass
class Outcome:
    """The results for one file's mutants."""

    file: str
    made: int
    tried: int = 0
    killed: int = 0
    timeouts: int = 0
    survived: list[Mutant] = field(default_factory=list)
    unreached: list[Mutant] = field(default_factory=list)
    equivalent: list[Mutant] = field(default_factory=list)

    def row(self) -> str:
        """One row of the table."""
        return (
            f"{self.file:<32} {self.made:>6} {self.tried:>6} {self.killed:>7} {self.timeouts:>8} "
            f"{len(self.survived):>9} {len(self.unreached):>10} {len(self.equivalent):>11}"
        )


HEADER = f"{'file':<32}   made  tried  killed too slow  survived  unreached  equivalent"


def main() -> int:
    """Try the mutants of some files, or of all files in the plan."""
    plan = tomllib.loads(PLAN.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"below {PACKAGE}/; default: every file of plan.toml")
    parser.add_argument("--sample", type=int, default=40, metavar="N", help="random mutants per file; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--lines", metavar="A-B", help="only mutants in these lines")
    asked = parser.parse_args()
    files = [name.removeprefix(f"{PACKAGE}/") for name in asked.files] or list(plan["files"])
    if unknown := [name for name in files if name not in plan["files"]]:
        parser.error(f"FILE: {', '.join(unknown)} is not in {PLAN.name}; expected one of {', '.join(plan['files'])}")
    os.chdir(ROOT)
    print(f"seed {asked.seed}, at most {asked.sample or 'all'} mutants per file", flush=True)
    outcomes = [one_file(name, plan, asked.sample, asked.seed, asked.lines) for name in files]
    print("\n" + HEADER)
    for outcome in outcomes:
        print(outcome.row())
    return int(any(outcome.survived or outcome.unreached for outcome in outcomes))


def one_file(name: str, plan: dict[str, dict[str, list[str]]], most: int, seed: int, lines: str | None) -> Outcome:
    """Try the mutants of a file.

    Args:
        name: the file, below the package.
        plan: the contents of `plan.toml`.
        most: number of random mutants; 0: all.
        seed: seed of the sample.
        lines: only mutants in these lines, `A-B`.
    """
    path = ROOT / PACKAGE / name
    source = path.read_text(encoding="utf-8")
    made = list(mutants(source))
    outcome = Outcome(name, len(made))
    if lines is not None:
        first, _, last = lines.partition("-")
        made = [each for each in made if int(first) <= each.lines[0] <= int(last or first)]
    taken = made if most == 0 or len(made) <= most else random.Random(seed).sample(made, most)
    known = {(each["file"], each["removed"], each["added"]) for each in plan.get("equivalent", [])}  # type: ignore[index]
    baseline = checked_baseline(name, path, source, plan["files"][name])
    start = time.monotonic()
    for mutant in sorted(taken, key=lambda each: each.lines):
        outcome.tried += 1
        if (name, mutant.removed, mutant.added) in known:
            outcome.equivalent.append(mutant)
            continue
        judge(mutant, name, baseline, outcome)
    print(f"{name}: {outcome.tried} of {outcome.made} tried in {time.monotonic() - start:.0f} s", flush=True)
    return outcome


def checked_baseline(name: str, path: Path, source: str, tests: list[str]) -> Baseline:
    """Run the tests on the unchanged file, then in a forked process with its text as a mutant: both must pass."""
    baseline = measure(path, tests, BASELINE_LIMIT_S)
    if not baseline.passed:
        sys.exit(f"{name}: its tests fail on the unchanged file; run pytest on {' '.join(tests)}")
    preload(baseline.modules)
    some = [test for test, lines in baseline.lines.items() if lines][:3]
    if not some:  # pytest without a test name would run all tests
        sys.exit(f"{name}: its tests in {PLAN.name} run none of its lines: {' '.join(tests)}")
    if try_mutant(module_of(name), source, some, BASELINE_LIMIT_S) != PASSED:
        sys.exit(f"{name}: tests that pass on the unchanged file fail in a forked process: {' '.join(some)}")
    reached = {line for lines in baseline.lines.values() for line in lines}
    spent = sum(baseline.seconds.values())
    print(f"{name}: {len(baseline.lines)} tests, {spent:.0f} s, run {len(reached)} of its lines", flush=True)
    return baseline


def judge(mutant: Mutant, name: str, baseline: Baseline, outcome: Outcome) -> None:
    """Run the tests that reach a mutant and record the result."""
    tests = baseline.tests_of(*mutant.lines)
    if not tests:
        outcome.unreached.append(mutant)
        print(f"  no test: {name} {mutant}", flush=True)
        return
    limit_s = 30 + 5 * sum(baseline.seconds[test] for test in tests)
    code = try_mutant(module_of(name), mutant.source, tests, limit_s)
    if code == WRONG_SOURCE:
        sys.exit(f"{name}: the tests did not import the mutant: {' '.join(tests)}")
    if code == PASSED:
        outcome.survived.append(mutant)
        print(f"  survived {len(tests)} tests: {name} {mutant}", flush=True)
        return
    outcome.killed += 1
    outcome.timeouts += code is None


def module_of(name: str) -> str:
    """`compute/methods/breaker.py` -> its dotted name."""
    return ".".join([PACKAGE, *Path(name).with_suffix("").parts])


if __name__ == "__main__":
    sys.exit(main())
