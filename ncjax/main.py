"""Trains a sweep, measures neural collapse as it goes, and leaves data, figures and checkpoints in WORKDIR.

    python -m ncjax.main --config=configs/digits.py --workdir=runs/digits
    python -m ncjax.main --config=configs/mnist.py:smoke --config.sweep.weight_decay=0,1e-3 --workdir=runs/mnist

--config names a Python file, or file:variant (configs/digits.py where it is left out); --config.FIELD=VALUE overrides a
field, a,b,c where it takes several values. The same command run again continues where it stopped, or says that the run
is complete.

--dry-run           checks config, data and devices, prints what would be trained, and writes nothing
--coordinator=HOST:PORT --processes=N --process=I
                    one of N processes that train together, on as many hosts as there are; HOST:PORT is process 0. Tasks
                    of a SLURM step and hosts of a TPU slice need none of these; elsewhere, --coordinator=auto may do
"""

import difflib
import os
import shlex
import sys
import traceback
from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

from ncjax import config as configuration
from ncjax import preflight
from ncjax.errors import InputError, last_line
from ncjax.interrupts import Interrupted, Requests


class _Arguments(NamedTuple):
    """A command line that can be parsed: workdir is empty only of a dry run; processes None of one that is alone."""

    config: configuration.Config
    workdir: str
    dry_run: bool
    processes: preflight.Processes | None


def main(argv: list[str]) -> int:
    """Runs one command line (`argv[0]` is the program); returns the exit code.

    0; 1 WORKDIR can be written no more, or another process was lost; 2 bad input; 130 and 143 stopped by SIGINT and
    SIGTERM.
    """
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nFields of the config, with their defaults:\n\n{configuration.describe_fields()}")
        return 0
    try:
        arguments = _parse(argv)
        if arguments.dry_run:
            plan = preflight.examine(arguments.config, arguments.workdir or None)
        else:
            plan = preflight.prepare(arguments.config, arguments.workdir)
    except InputError as error:
        return _refuse(error)
    code = _run(arguments, plan, f"python -m ncjax.main {shlex.join(argv[1:])}")
    if code and arguments.processes:
        from ncjax import distributed

        distributed.leave(code)
    return code


def _run(arguments: _Arguments, plan: preflight.Plan, command: str) -> int:
    """Trains, or says what would be trained; returns the exit code."""
    try:
        with Requests() as requests:  # an exception in the middle of an import may be swallowed by it
            from ncjax import distributed, experiment  # import JAX, which takes longer than to see that a flag is wrong
        requests.raise_if_any()
        with distributed.joined(arguments.processes, command):
            (experiment.preview if arguments.dry_run else experiment.run)(plan)
    except InputError as error:
        return _refuse(error)
    except Interrupted as interruption:
        print(f"stopped by {interruption}; this continues:\n    {command}", file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:  # while figures are drawn
        print(f"stopped; this continues:\n    {command}", file=sys.stderr)
        return 130
    except OSError as error:
        reason = " ".join(str(error).split())
        print(
            f"error: {reason}; what is in {plan.workdir} is whole, and this continues:\n    {command}", file=sys.stderr
        )
        return 1
    except Exception:
        if not arguments.processes:
            raise
        traceback.print_exc()
        return 1
    return 0


def _parse(argv: list[str]) -> _Arguments:
    """A command line, or InputError."""
    for argument in argv[1:]:
        name, _, value = argument.removeprefix("--").partition("=")
        if name.startswith("config.") and name.removeprefix("config.") not in configuration.SCHEMA:
            near = difflib.get_close_matches(name.removeprefix("config."), configuration.SCHEMA, n=1, cutoff=0.8)
            hint = f"did you mean config.{near[0]}? " if near else ""
            raise InputError(name, value, f"no such field; {hint}--help lists them")
    values = flags.FlagValues()
    try:
        config_flag = config_flags.DEFINE_config_file("config", "configs/digits.py", flag_values=values, sys_argv=argv)
        workdir = flags.DEFINE_string("workdir", "", "", flag_values=values)
        dry_run = flags.DEFINE_boolean("dry-run", False, "", flag_values=values)
        coordinator = flags.DEFINE_string("coordinator", "", "", flag_values=values)
        count, number = (flags.DEFINE_integer(name, None, "", flag_values=values) for name in ("processes", "process"))
        surplus = values(argv)[1:]
        config = config_flag.value.copy_and_resolve_references()
    except Exception as error:  # the config is the user's Python file: anything may be wrong in it
        raise InputError("command line", " ".join(argv[1:]), last_line(error)) from error
    if surplus:
        known = "there are --config, --config.FIELD, --workdir and others; see --help"
        raise InputError("command line", surplus[0], f"no such argument; {known}")
    if not workdir.value and not dry_run.value:
        raise InputError("--workdir", workdir.value, "name a folder for the run, as in --workdir=runs/digits")
    processes = preflight.find_processes(coordinator.value, count.value, number.value, os.environ)
    return _Arguments(config, workdir.value or "", bool(dry_run.value), processes)


def _refuse(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
