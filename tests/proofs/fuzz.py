"""Damaged input against every command: ``python tests/proofs/fuzz.py --cases 2000 --seed 0``; a table of what came out.

Each case damages one artefact (bits, ends, names, hostile contents) and starts one command that reads it. It is right
when the command does its work or says in a line what is wrong, leaves all input as it was, writes nothing outside its
output, runs nothing, and stays within its bounds of time and memory. ``--only SEED`` repeats one case and keeps its
folder; ``--of NAME`` takes only targets with that in their name.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.proofs.damage import Damage, damage
from tests.proofs.sandbox import MEMORY, SECONDS, Outcome, snapshot, watched
from tests.proofs.targets import TARGETS, Case, Target
from tests.support import runs
from tests.support.material import ALONE, make_material

LONGEST = 4000  # characters of an error that anybody reads
ENDS = {0: "done", 1: "done, and says what is bad", 2: "refused"}


class Result(NamedTuple):
    seed: int
    target: str
    damage: Damage
    outcome: Outcome
    complaints: list[str]


def run_case(seed: int, base: Path, root: Path, targets: tuple[Target, ...] = TARGETS, harm: bool = True) -> Result:
    """One case in ``root``, an empty folder; without ``harm`` nothing is damaged, and the command must succeed."""
    rng = Random(f"case {seed}")
    target = rng.choices(targets, [target.weight for target in targets])[0]
    folder, home, marker = root / "a/b/box", root / "home", root / "it-was-run"
    for place in (folder / "in", folder / "out", home):
        place.mkdir(parents=True)
    for theirs, ours in target.given.items():
        (folder / ours).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (base / theirs).is_dir() else shutil.copy2)(base / theirs, folder / ours)
    pattern = rng.choice(target.files)
    files = [path for path in folder.glob(pattern) if path.is_file()]
    assert files, f"{target.name}: nothing is called {pattern}"
    done = damage(rng, files, marker) if harm else Damage("none", "nothing", ())
    before = snapshot(root)
    env = runs.environment(HOME=str(home), TMPDIR=str(home), XDG_CACHE_HOME=str(home), MPLCONFIGDIR=str(base / "mpl"),
                           COVERGEN_READERS=str(folder / "out/readers"), **ALONE)
    outcome = watched(target.module, [*target.flags, *rng.choice(target.options)], folder, env,
                      [folder / "out", home, base / "mpl"])
    after = snapshot(root)
    case = Case(folder, base, done, outcome, before, after)
    complaints = [*manners(outcome), *changes(case, [folder / "out", home])]
    complaints += [f"{marker.name}: something in the data was run"] * marker.exists()
    complaints += [f"status {outcome.status} of sound input"] * (not harm and outcome.status != 0)
    if not complaints:
        complaints = [*placed(case), *target.check(case)]
    return Result(seed, target.name, done, outcome, complaints)


def manners(outcome: Outcome) -> list[str]:
    """What a command does wrong whatever it was given."""
    complaints = [f"outside: {stray}" for stray in outcome.strays]
    if outcome.memory > MEMORY:
        complaints.append(f"{outcome.memory / 1e6:,.0f} MB of memory")
    if outcome.status is None:
        complaints.append(f"no end: stopped after {outcome.seconds:.0f} s of computing")
    elif outcome.status not in ENDS:
        complaints.append(f"exit status {outcome.status}")
    if "Traceback (most recent call last)" in outcome.said or "Exception ignored" in outcome.said:
        complaints.append("a traceback")
    errors = re.findall(r"(?m)^error: .*(?:\n(?!\S*error: ).*)*", outcome.said)
    if outcome.status == 2 and (not errors or len(errors[-1].split()) < 4 or len(errors[-1]) > LONGEST):
        complaints.append(f"refused without a clear line: {errors[-1][:200] if errors else 'nothing said'}")
    if outcome.status == 1 and not outcome.said.strip():
        complaints.append("status 1, and nothing said")
    return complaints


def placed(case: Case) -> list[str]:
    """An error names a file, a folder or an option, or nobody could mend anything."""
    error = case.outcome.said.rpartition("error: ")[2]
    names = ("/", "--", *(path.name for path in case.damage.paths))
    return [f"an error without a place: {error[:200]}"] * (
        case.outcome.status == 2 and not any(name in error for name in names))


def changes(case: Case, allowed: Iterable[Path]) -> list[str]:
    """What is new, gone or changed outside the folders that may change."""
    inside = tuple(f"{path}/" for path in allowed)
    differ = [path for path in case.before.keys() | case.after.keys()
              if case.before.get(path) != case.after.get(path) and not path.startswith(inside)]
    return [f"input changed: {path}" for path in sorted(differ)]


def run(seeds: Iterable[int], base: Path, targets: tuple[Target, ...] = TARGETS, keep: Path | None = None,
        harm: bool = True) -> Iterable[Result]:
    """Yields the result of each case; with ``keep`` its folder stays there. Without ``harm`` seeds are targets."""
    for seed in seeds:
        root = keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
        root.mkdir(parents=True, exist_ok=True)
        try:
            yield run_case(seed, base, root, targets if harm else (targets[seed],), harm)
        finally:
            if not keep:
                shutil.rmtree(root, ignore_errors=True)


def told(result: Result) -> str:
    """A failed case for people: what was done, what is wrong, the end of what was said, and how to repeat it."""
    said = "\n    | ".join(result.outcome.said.replace("\r", "\n").strip().splitlines()[-6:])
    verdict = "FAILED" if result.complaints else "right:"
    return (f"{verdict} seed {result.seed}, {result.target}, {result.damage.words}\n    "
            + "\n    ".join(complaint[:500] for complaint in result.complaints[:5]) + f"\n    | {said[-1500:]}")


def summary(results: list[Result]) -> str:
    """Counts by target and end."""
    counts: dict[str, Counter] = {}
    for result in results:
        end = "FAILED" if result.complaints else ENDS[result.outcome.status]
        counts.setdefault(result.target, Counter())[end] += 1
    columns = [*ENDS.values(), "FAILED"]
    lines = [f"{'':26}" + "".join(f"{column:>28}" for column in columns)]
    lines += [f"{name:26}" + "".join(f"{found[column]:28,}" for column in columns)
              for name, found in sorted(counts.items())]
    total = sum(counts.values(), Counter())
    kinds = Counter(result.damage.kind for result in results)
    lines.append(f"{'all':26}" + "".join(f"{total[column]:28,}" for column in columns))
    lines.append("damage: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    slowest, largest = (max(getattr(result.outcome, name) for result in results) for name in ("seconds", "memory"))
    lines.append(f"slowest {slowest:.1f} s (bound {SECONDS:.0f}), most memory {largest / 1e6:,.0f} MB above the "
                 f"beginning (bound {MEMORY / 1e6:,.0f})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next are the numbers after it")
    parser.add_argument("--only", type=int, help="the seed of one case, whose folder is kept")
    parser.add_argument("--of", default="", help="a part of the names of targets")
    parser.add_argument("--sound", action="store_true", help="damage nothing: every command must succeed")
    parser.add_argument("--base", type=Path, help="a folder for the sound material, kept for another time")
    words = parser.parse_args()
    targets = tuple(target for target in TARGETS if words.of in target.name)
    base = words.base or Path(tempfile.mkdtemp(prefix="fuzz-base-"))
    began, results = time.monotonic(), []
    if not (base / "made").exists():
        make_material(base)
        (base / "made").touch()
    print(f"material made in {time.monotonic() - began:.0f} s, in {base}", flush=True)
    keep = None if words.only is None else Path(tempfile.mkdtemp(prefix="fuzz-kept-"))
    seeds = range(words.seed, words.seed + words.cases) if keep is None else [words.only]
    if words.sound:
        seeds = range(len(targets))
    for result in run(seeds, base, targets, keep, not words.sound):
        results.append(result)
        if result.complaints or keep:
            print(told(result), flush=True)
        if len(results) % 100 == 0:
            print(f"{len(results):,} cases in {time.monotonic() - began:.0f} s", flush=True)
    print(summary(results))
    if keep:
        print(f"kept in {keep}")
    if words.base is None:
        shutil.rmtree(base)
    print(f"{sum(bool(result.complaints) for result in results)} of {len(results):,} cases failed, "
          f"{time.monotonic() - began:.0f} s")
    return int(any(result.complaints for result in results))


if __name__ == "__main__":
    sys.exit(main())
