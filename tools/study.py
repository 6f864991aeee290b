#!/usr/bin/env python
"""Run a grid of models, seeds and data sets to the end, and write the report.

tools/study.py configs/studies/quick.yaml
tools/study.py configs/studies/cpu.yaml --budget 30 --jobs 2
tools/study.py configs/studies/cpu.yaml --report-only

Stopped at any point, the same command goes on where it was. The report is made from the files in
the study's folder of results, and from nothing else.
"""

import argparse
import signal
import sys
from fnmatch import fnmatch
from pathlib import Path

from tabulate import tabulate

from nuclei_d2.study.collect import collect_other
from nuclei_d2.study.datasets import prepare_datasets
from nuclei_d2.study.plan import Run, Study, load_study
from nuclei_d2.study.report import write_report
from nuclei_d2.study.runner import Commands, Runner
from nuclei_d2.utils.errors import NucleiError, run_tool


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="STUDY.yaml", help="such as those in configs/studies")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", help="of training for every model"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        default=["*"],
        help="runs to do, in the order of the patterns, such as 'fluorescence/*/seed0'",
    )
    parser.add_argument("--output", metavar="FOLDER", help="checkpoints and logs go here")
    parser.add_argument("--results", metavar="FOLDER", help="what the report is made from")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, do nothing")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the report")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.jobs < 1:
        raise NucleiError(f"--jobs is {args.jobs}; it counts runs at a time, from 1")
    overrides = {key: getattr(args, key) for key in ("budget", "output", "results")}
    study = load_study(args.study, **overrides)
    runner = Runner(study, Commands.in_folder(Path(__file__).parent), args.jobs)
    runs = choose_runs(study, args.only)
    if args.dry_run:
        print(plan_table(study, runner, runs))
        return
    failed = []
    if not args.report_only:
        # A stop from outside is handled like Ctrl-C: the processes of the runs end, too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        prepare_datasets(study.prepare)
        failed = runner.run_all(runs)
        for other in study.others.values():
            collect_other(study, other)
    written = write_report(study, args.study)
    print(f"report: {study.report_file}, and {len(written) - 1} files that belong to it")
    if failed:
        print(f"failed: {', '.join(run.key for run in failed)}", file=sys.stderr)
        sys.exit(1)


def choose_runs(study: Study, patterns: list[str]) -> list[Run]:
    """Those of each pattern in turn, each once.

    Raises:
        NucleiError: a pattern is that of no run.
    """
    chosen = {}
    for pattern in patterns:
        found = {run.key: run for run in study.runs() if fnmatch(run.key, pattern)}
        if not found:
            raise NucleiError(f"--only {pattern}: no such run; --dry-run lists them")
        chosen |= {key: run for key, run in found.items() if key not in chosen}
    return list(chosen.values())


def plan_table(study: Study, runner: Runner, runs: list[Run]) -> str:
    """The runs, their state, and the minutes of training that are left at most."""
    rows, total = [], 0.0
    for run in runs:
        state = runner.state(run)
        minutes = study.budget if run.is_trained and state != "done" else 0.0
        total += minutes or 0.0
        rows.append([run.key, run.model.config, state, "" if minutes is None else f"{minutes:g}"])
    if study.budget is not None:
        rows.append([f"{len(runs)} runs", "", "", f"{total:g}"])
    header = ["run", "config", "state", "minutes of training"]
    note = "Tests, validation and calibration come on top."
    return f"{tabulate(rows, header)}\n{note}"


if __name__ == "__main__":
    run_tool(main)
