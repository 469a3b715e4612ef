"""Experiments that anybody can run again: ``python -m covergen.experiment ablation --tier toy``."""

from __future__ import annotations

import json
import operator
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from PIL import Image

from covergen import models
from covergen.data.audio import AudioNormalizer
from covergen.evaluation.report import short
from covergen.experiments.jobs import JobRunner
from covergen.models.base import InputSpec
from covergen.runs import config
from covergen.training.setup import demo_shards
from shard_tools import cli
from shard_tools.core.files import write_atomically
from shard_tools.remote.index_cache import resolve
from shard_tools.shards.index import open_index

PLANS = Path(__file__).parent / "experiments"
PARTS = {"about", "tiers", "judge", "rows", "thresholds", "shown"}
COMPARED = {"at_least": operator.ge, "at_most": operator.le}
COUNT = re.compile(r"_[\d.]+k?$")  # of covers, in a metric's name


@cli.checked
def main(name: str, tier: str = "toy", shards: str | None = None, out: str | None = None,
         rows: tuple[str, ...] | None = None, launcher: str | None = None,
         jobs: Annotated[int, cli.Range(0)] = 0, dry_run: bool = False) -> int:
    """Trains and evaluates every row of an experiment, and compares them in one table and one figure.

    Args:
        name: of an experiment that comes with covergen (ablation), or the path of a YAML file like those.
        tier: how much: toy is 20 minutes a row on two CPU cores, std is for a GPU.
        shards: folder of shards; default: the tier's demo world, made in the cache folder.
        out: where runs, evaluations, table.md, results.json and figure.png go; default runs/NAME-TIER.
        rows: only these, separated by commas.
        launcher: what starts a training, such as "accelerate launch --num_processes 8"; default: one process.
        jobs: how many trainings or evaluations run side by side, each on its share of the cores; 0: the tier's own.
        dry_run: print the commands and stop.
    """
    plan = read_plan(name, tier)
    for given in rows or ():
        if given not in (names := [row["name"] for row in plan["rows"]]):
            raise ValueError(f"--rows {given}: no such row, {cli.nearest(given, names)}")
    wanted = [row for row in plan["rows"] if not rows or row["name"] in rows]
    trained = [plan["judge"] | {"name": "judge"}, *wanted]
    folder = Path(out or f"runs/{Path(name).stem}-{tier}")
    data = shards or (f"<the demo world {tier}>" if dry_run else demo_shards(print, plan["tiers"][tier]["demo"]))
    start = [*(shlex.split(launcher) if launcher else [sys.executable]), "-m", "covergen.train"]
    trainings = {row["name"]: [*start, *words(training_of(plan, row, tier), shards=data, out=folder / "runs",
                                              name=row["name"])] for row in trained}
    evaluations, titles = {}, {}
    for row in wanted:
        for label, options in evaluations_of(row).items():
            evaluations[label] = [sys.executable, "-m", "covergen.evaluate", *words(
                plan["tiers"][tier]["evaluate"] | options, run=folder / "runs" / row["name"], shards=data,
                judge=folder / "runs" / "judge", out=folder / "evaluations" / f"{label}.json")]
            titles[label] = row["title"]
            for option, value in options.items():
                titles[label] = titles[label].replace(f"{{{option}:g}}", f"{value:g}")
    if dry_run:
        print(*map(shlex.join, [*trainings.values(), *evaluations.values()]), sep="\n")
        return 0
    for row in trained:
        check_training(row["name"], training_of(plan, row, tier), data)
    folder.mkdir(parents=True, exist_ok=True)
    runner = JobRunner(folder, jobs or plan["tiers"][tier].get("jobs", 1))
    runner.run([runner.training(row, command, plan["tiers"][tier]["judge_minutes" if row == "judge" else "minutes"])
                for row, command in trainings.items()])
    runner.run([(f"evaluate_{label}", command) for label, command in evaluations.items()
                if f"evaluate_{label}" not in runner.done])
    results = {label: json.loads((folder / "evaluations" / f"{label}.json").read_text()) for label in evaluations}
    verdicts = judged(plan.get("thresholds", {}).get(tier, {}), results)
    text = as_table(plan["shown"], titles, results) + "\n" + "".join(f"- {line}\n" for line in verdicts)
    write_atomically(folder / "table.md", text.encode())
    write_atomically(folder / "results.json",
                     (json.dumps({"tier": tier, "verdicts": verdicts, "results": results}, indent=1) + "\n").encode())
    print(text)
    try:
        figure([folder / "runs" / row["name"] for row in (wanted[0], wanted[-1])], data, folder / "figure.png")
    except subprocess.CalledProcessError as error:
        print(f"note: there is no figure: {error.stderr.strip()}")
    print(f"{folder}: table.md, results.json, figure.png")
    return 0


def read_plan(name: str, tier: str) -> dict[str, Any]:
    """An experiment's YAML; ValueError if there is no such file or tier, or it is not a plan."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PLANS / f"{name}.yaml"
    if not path.is_file():
        known = [plan.stem for plan in PLANS.glob("*.yaml")]
        raise ValueError(f"{name}: no such experiment or YAML file, {cli.nearest(name, known)}")
    plan = config.read_yaml(path)
    if not isinstance(plan, dict) or not {"tiers", "judge", "rows", "shown"} <= plan.keys() <= PARTS:
        raise ValueError(f"{path}: expected the parts {', '.join(sorted(PARTS))}")
    check_plan(plan, tier, path)
    return plan


def check_plan(plan: dict[str, Any], tier: str, path: Path) -> None:
    """Raises ValueError for parts of a plan that are missing or of another kind than is expected."""
    def need(what: str, found: Any, kinds: dict[str, type | tuple[type, ...]], free: tuple[str, ...] = ()) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"{path}: {what} is {found!r:.80}, expected lines 'name: value'")
        if missing := kinds.keys() - found.keys() - set(free):
            raise ValueError(f"{path}: a {what} has no {', '.join(sorted(missing))}")
        for name, kind in kinds.items():
            if name in found and not isinstance(found[name], kind):
                raise ValueError(f"{path}: {name} of a {what} is {found[name]!r:.80}, expected "
                                 + {str: "text", dict: "lines 'name: value'", list: "a list"}.get(kind, "a number"))

    numbers = (int, float)
    need("plan", plan, {"tiers": dict, "judge": dict, "rows": list, "shown": list, "thresholds": dict}, ("thresholds",))
    if tier not in plan["tiers"]:
        raise ValueError(f"--tier {tier}: {path} has {', '.join(map(str, plan['tiers']))}")
    need("tier", plan["tiers"][tier], {"demo": str, "minutes": numbers, "judge_minutes": numbers, "evaluate": dict,
                                       "train": dict, "jobs": int}, ("train", "jobs"))
    need("judge", plan["judge"], {"train": dict, tier: dict}, ("train", tier))
    if not plan["rows"] or not all(isinstance(metric, str) for metric in plan["shown"]):
        raise ValueError(f"{path}: expected rows, and names of metrics that are shown")
    for row in plan["rows"]:
        need("row", row, {"name": str, "title": str, "train": dict, tier: dict, "evaluations": list},
             (tier, "evaluations"))
        if not re.fullmatch(r"\w[\w.-]*", row["name"]):
            raise ValueError(f"{path}: the row {row['name']!r:.80} would be a folder; expected letters, digits, - or _")
        for options in row.get("evaluations", []):
            need("row's evaluation", options, dict.fromkeys(options if isinstance(options, dict) else (), numbers))
    need("tier's thresholds", plan.get("thresholds", {}).get(tier, {}), {})
    for limits in plan.get("thresholds", {}).get(tier, {}).values():
        need("threshold", limits, {})
        for metric, limit in limits.items():
            if not isinstance(limit, dict) or not limit or not limit.keys() <= COMPARED.keys() or not all(
                    isinstance(bound, numbers) for bound in limit.values()):
                raise ValueError(f"{path}: the threshold of {metric} is {limit!r:.80}, expected "
                                 f"{' or '.join(COMPARED)} and a number")


def check_training(name: str, options: dict[str, Any], shards: str) -> None:
    """Raises ValueError, before hours of work, for a row whose model can't be configured or built."""
    run = config.resolve({"shards": shards} | {key: str(value) for key, value in options.items()})
    metadata = open_index(resolve(shards), "train").metadata
    audio = AudioNormalizer(metadata["audio"], run.training.audio_scale).size if metadata["audio"] else 0
    try:
        models.load(run.model).build(run.options, InputSpec(run.training.resolution or metadata["resolution"], audio))
    except ValueError as error:
        raise ValueError(f"row {name}: {error}") from None


def training_of(plan: dict[str, Any], row: dict[str, Any], tier: str) -> dict[str, Any]:
    """The flags of a row's training: the tier's, then the row's, then the row's for the tier."""
    return plan["tiers"][tier].get("train", {}) | row.get("train", {}) | row.get(tier, {})


def evaluations_of(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A row's evaluations: label -> flags."""
    several = row.get("evaluations") or [{}]
    return {"_".join([row["name"], *(f"{name}_{value:g}" for name, value in flags.items())]): flags
            for flags in several}


def words(options: dict[str, Any], **more: Any) -> list[str]:
    """Options as the words of a command line."""
    return [word for name, value in {**options, **more}.items()
            for word in (f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value))]


def judged(thresholds: dict[str, dict[str, dict[str, float]]], results: dict[str, Any]) -> list[str]:
    """What was promised before the run, and what came of it, a line each."""
    lines = []
    for label, limits in thresholds.items():
        for metric, limit in limits.items():
            metric, p = metric.removesuffix(" p"), metric.endswith(" p")
            for kind, bound in limit.items():
                figure = results.get(label, {}).get("table", {}).get("run", {}).get(metric)
                value = figure and figure.get("p" if p else "value")
                verdict = ("not evaluated" if value is None else
                           f"{short(value)}, {'reached' if COMPARED[kind](value, bound) else 'MISSED'}")
                what = f"{'p of ' if p else ''}{metric} {kind.replace('_', ' ')} {bound:g}"
                lines.append(f"{label}: {what}: {verdict}")
    return lines


def as_table(shown: list[str], titles: dict[str, str], results: dict[str, Any]) -> str:
    """Rows as Markdown: each figure with its interval, below them what real covers reach and chance."""
    def cell(figure: dict[str, float] | None) -> str:
        if not figure or figure["value"] is None:
            return ""
        interval = f" [{short(figure['low'])}, {short(figure['high'])}]" if "low" in figure else ""
        return short(figure["value"]) + interval + (f", p {figure['p']:.0e}" if figure.get("p") else "")

    known: list[str] = []
    for name in shown:  # fid is fid_400 and r@10 is r@10 of 400 where there are 400 songs
        known += dict.fromkeys(metric for result in results.values() for metric in result["table"]["run"]
                               if name in (metric, metric.split(" ")[0], COUNT.sub("", metric)))
    lines = ["| | " + " | ".join(known) + " |", "|---" * (len(known) + 1) + "|"]
    rows = [(titles[label], result["table"]["run"]) for label, result in results.items()]
    for title, row in [*rows, ("real covers", next(iter(results.values()))["table"]["real"])]:
        lines.append(f"| {title} | " + " | ".join(cell(row.get(metric)) for metric in known) + " |")
    return "\n".join(lines) + "\n"


def figure(runs: Sequence[Path], shards: str, path: Path) -> None:
    """The genre x noise matrices of runs, one below the other."""
    parts = []
    for number, folder in enumerate(runs):
        part = path.with_name(f".{path.stem}-{number}.png")
        subprocess.run([sys.executable, "-m", "covergen.analyze", "matrix",
                        *words({}, run=folder, shards=shards, out=part)], check=True, text=True, capture_output=True)
        with Image.open(part) as picture:
            parts.append(picture.convert("RGB"))
        part.unlink()
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    whole.save(path)


if __name__ == "__main__":
    cli.run(main)
