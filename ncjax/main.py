"""Trains a sweep, measures neural collapse as it goes, and leaves data, figures and checkpoints in WORKDIR.

    python -m ncjax.main --config=configs/digits.py --workdir=runs/digits
    python -m ncjax.main --config=configs/mnist.py:smoke --config.sweep.weight_decay=0,1e-3 --workdir=runs/mnist

--config names a Python file, or file:variant (configs/digits.py where it is left out); --config.FIELD=VALUE overrides a
field, a,b,c where it takes several values. The same command run again continues where it stopped, or says that the run
is complete.
"""

import difflib
import shlex
import sys

from absl import flags
from ml_collections import config_flags

from ncjax import config as configuration
from ncjax import preflight
from ncjax.errors import InputError
from ncjax.interrupts import Interrupted, Requests


def main(argv: list[str]) -> int:
    """Runs one command line (`argv[0]` is the program); returns the exit code.

    0; 1 WORKDIR can be written no more; 2 bad input; 130 and 143 stopped by SIGINT and SIGTERM.
    """
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nFields of the config, with their defaults:\n\n{configuration.describe_fields()}")
        return 0
    try:
        plan = preflight.prepare(*_parse(argv))
    except InputError as error:
        return _refuse(error)

    command = f"python -m ncjax.main {shlex.join(argv[1:])}"
    try:
        with Requests() as requests:  # an exception in the middle of an import may be swallowed by it
            from ncjax import experiment  # imports JAX, which takes longer than to see that a flag is wrong
        requests.raise_if_any()
        experiment.run(plan)
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
    return 0


def _parse(argv: list[str]) -> tuple[configuration.Config, str]:
    """Config and WORKDIR of a command line, or InputError."""
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
        surplus = values(argv)[1:]
        config = config_flag.value.copy_and_resolve_references()
    except Exception as error:  # the config is the user's Python file: anything may be wrong in it
        raise InputError("command line", " ".join(argv[1:]), _last_line(error)) from error
    if surplus:
        raise InputError("command line", surplus[0], "no such argument; there are --config, --config.FIELD, --workdir")
    if not workdir.value:
        raise InputError("--workdir", workdir.value, "name a folder for the run, as in --workdir=runs/digits")
    return config, workdir.value


def _last_line(error: Exception) -> str:
    """What went wrong, without the traceback that ml_collections puts into its messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _refuse(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
