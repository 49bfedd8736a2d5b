"""Trains a sweep, measures neural collapse as it goes, and leaves data, figures and checkpoints in WORKDIR.

    python -m ncjax.main --config=configs/digits.py --workdir=runs/digits
    python -m ncjax.main --config=configs/mnist.py:smoke --config.sweep.weight_decay=0,1e-3 --workdir=runs/mnist

--config names a Python file, or file:variant; --config.FIELD=VALUE overrides a field, a,b,c where it takes several
values. The same command run again continues where it stopped, or says that the run is complete.
"""

import difflib
import sys

from absl import flags
from ml_collections import config_flags

from ncjax import config as configuration
from ncjax import preflight
from ncjax.errors import InputError


def main(argv: list[str]) -> int:
    """Runs one command line (`argv[0]` is the program); returns the exit code: 0, 2 bad input, 130 interrupted."""
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nFields of the config, with their defaults:\n\n{configuration.describe_fields()}")
        return 0
    try:
        plan = preflight.prepare(*_parse(argv))
    except InputError as error:
        return _refuse(error)

    from ncjax import experiment  # imports JAX, which takes longer than to see that a flag is wrong

    try:
        experiment.run(plan)
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues the run in {plan.workdir}", file=sys.stderr)
        return 130
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
    config_flag = config_flags.DEFINE_config_file("config", "configs/digits.py", flag_values=values, sys_argv=argv)
    workdir = flags.DEFINE_string("workdir", "", "", flag_values=values)
    try:
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
