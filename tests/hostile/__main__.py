"""Attacks the commands with hostile names, numbers, files, signals, users, environments, configs
and sweeps.

    python -m tests.hostile
    python -m tests.hostile files users --seed 7
    python -m tests.hostile names --case "WORKDIR a?b"

A case passes if the outcome is right: correct numbers or bits, or one line on standard error that
says why not, with exit code 2 (130 and 143 where a signal stopped it, 1 where a disk was full).
What fails is told apart:

    traceback   a traceback, or the crash of an interpreter, reached the user
    silent      a number or a bit is wrong, or something that had to be refused was not,
                with exit code 0 and no word
    hang        the command had not ended after two minutes
    other       another exit code, or not one line
    unsteady    one of these, and passed when it was tried again

tests/chaos.py kills and damages runs that train, at random; here every case has a name and is the
same every time (what is drawn, as which bit is flipped, comes from --seed). Exits with 1 if a case
failed twice.
"""

import argparse
import collections
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

from tests import chaos
from tests.hostile import engine


def _environment(folder: Path) -> dict[str, str]:
    """Returns what every command runs under, unless its case says otherwise."""
    return chaos.environment(folder) | {
        "HOSTILE_FOLDER": str(folder),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(engine.ROOT), os.environ.get("PYTHONPATH", "")])
        ),
        # As in a UTF-8 locale; C's lets bytes through that are none.
        "PYTHONIOENCODING": "utf-8:strict",
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "TFDS_DATA_DIR": str(folder / "no-data"),
    }


def _print_table(tried: dict[str, collections.Counter]) -> None:
    columns = (
        "tried",
        "passed",
        "skipped",
        "unsteady",
        *(f"{kind}s" if kind in ("traceback", "hang") else kind for kind in KINDS),
    )
    print(f"{'group':<14}" + "".join(f"{column:>12}" for column in columns))
    tried = tried | {"all": sum(tried.values(), collections.Counter())}
    for group, counts in tried.items():
        numbers = (
            counts.total() - counts["skipped"],
            counts["passed"],
            counts["skipped"],
            counts["unsteady"],
            *(counts[k] for k in KINDS),
        )
        print(f"{group:<14}" + "".join(f"{number:>12}" for number in numbers))


KINDS = engine.KINDS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = engine.names_of_groups()
    parser.add_argument(
        "groups", metavar="GROUP", nargs="*", help=f"of {', '.join(known)} (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    parser.add_argument("--case", metavar="NAME", help="the case of this name alone")
    parser.add_argument("--list", action="store_true", help="names the cases and tries none")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)"
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="K", help="one case of K alone (%(default)s)"
    )
    arguments = parser.parse_args()
    groups = tuple(arguments.groups or known)
    if not set(groups) <= set(known):
        parser.error(f"groups are {', '.join(known)}")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ncjax-hostile-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)  # other users run in it, too
        os.environ.update(_environment(Path(folder)))
        import matplotlib.font_manager  # noqa: F401  (makes its list of fonts once, and says so where it cannot)

        cases = engine.cases(groups, arguments.seed)
        chosen = [i for i, case in enumerate(cases) if arguments.case in (None, case.name)]
        chosen = chosen[:: arguments.every]
        if arguments.list:
            print(*(f"{cases[i].group}: {cases[i].name!r}" for i in chosen), sep="\n")
            return 0
        tried = {group: collections.Counter() for group in groups}
        times = {group: 0.0 for group in groups}

        def say(number: int, result: tuple[str, str, float]) -> None:
            case, (kind, why, seconds) = cases[number], result
            tried[case.group][kind] += 1
            times[case.group] += seconds
            if kind in KINDS:
                again = shlex.join(
                    ["python", "-m", "tests.hostile", case.group, "--case", case.name]
                )
                seed = f" --seed {arguments.seed}" if arguments.seed else ""
                print(
                    f"FAILED ({kind}) {case.group}: {case.name!r}: {why}\n    {again}{seed}",
                    flush=True,
                )
            elif kind in ("skipped", "unsteady"):
                print(f"{kind} {case.group}: {case.name!r}: {why}", flush=True)

        engine.attempt_all(chosen, groups, arguments.seed, arguments.jobs, say)
    _print_table(tried)
    print(", ".join(f"{group} {seconds:.0f} s" for group, seconds in times.items()), end="; ")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return int(any(counts[kind] for counts in tried.values() for kind in KINDS))


if __name__ == "__main__":
    sys.exit(main())
