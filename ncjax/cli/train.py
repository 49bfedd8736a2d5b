"""Trains a sweep, measures neural collapse as it goes, and leaves data, figures and checkpoints.

    ncjax train --config=digits --workdir=runs/digits
    ncjax train --config=mnist:smoke --config.train.epochs=3 --workdir=runs/mnist

--config names a config that ships with ncjax (digits where it is left out) or the path of a Python
file with get_config(); NAME:VARIANT and FILE:VARIANT choose a variant. --config.FIELD=VALUE
overrides a field. Several values a,b,c of a number of `sweep` or `decay` train in one program; of
any other field, as in --config.train.optimizer=sgd,adamw, in one program each, into one history
(alternatives of a field that is itself a list are separated by semicolons, quoted for the shell:
--config.model.widths="256,256;512,512"). The same command run again continues where it stopped, or
says that the run is complete. `python -m ncjax.main` is `ncjax train`.

--dry-run           checks config, data and devices, prints what would be trained, writes nothing
--target=DEVICES    with --dry-run: compiles for accelerators that are not here, and prints what a
                    chip would hold and exchange. DEVICES is tpu:KIND:TOPOLOGY, as in tpu:v5e:2x2
                    (kinds v4, v5e, v5p, v6e; pip install "ncjax[tpu]"), or cuda:KIND:CARDS, as in
                    cuda:h100 and cuda:h100:4 (kinds a100, h100, h200; pip install "ncjax[cuda]")
--coordinator=HOST:PORT --processes=N --process=I
                    one of N processes that train together, on as many hosts as there are; HOST:PORT
                    is process 0. Tasks of a SLURM step and hosts of a TPU slice need none of these;
                    elsewhere, --coordinator=auto may do
"""

import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags
from ml_collections import config_dict, config_flags

import ncjax
from ncjax import config as configuration
from ncjax import environment, variation
from ncjax.errors import InputError, last_line, near
from ncjax.plan import (
    Plan,
    Processes,
    VariedPlan,
    examine,
    examine_varied,
    find_processes,
    prepare,
    prepare_varied,
)
from ncjax.runs.signals import Interrupted, Stopped
from ncjax.training import targets


class _Arguments(NamedTuple):
    """A command line that can be parsed: workdir is empty only of a dry run; processes None of
    one that is alone; vary has the fields with several values; target is None without --target.
    """

    config: configuration.Config
    vary: dict[str, tuple]
    workdir: str
    dry_run: bool
    processes: Processes | None
    target: targets.Asked | None


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (`argv[0]` is the program; None: that of this process); returns the
    exit code.

    0; 1 WORKDIR can be written no more, or another process was lost; 2 bad input; 130 and 143
    stopped by SIGINT and SIGTERM.
    """
    argv = sys.argv if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(
            f"{__doc__}\nConfigs that ship with ncjax: {', '.join(shipped_configs())}\n\n"
            f"Fields of the config, with their defaults:\n\n{configuration.describe_fields()}"
        )
        return 0
    try:
        arguments = _parse(argv)
        if arguments.target:
            targets.prepare(arguments.target)
        plan = _plan(arguments)
    except InputError as error:
        return _refuse(error)
    code = _run(arguments, plan, f"python -m ncjax.main {shlex.join(argv[1:])}")
    if code and arguments.processes:
        from ncjax.runs import processes

        processes.leave(code)
    return code


def _plan(arguments: _Arguments) -> Plan | VariedPlan:
    """Checks what is to be trained; a dry run makes no folder."""
    config, vary, workdir = arguments.config, arguments.vary, arguments.workdir
    if arguments.dry_run:
        if vary:
            return examine_varied(config, vary, workdir or None)
        return examine(config, workdir or None)
    if vary:
        return prepare_varied(config, vary, workdir)
    return prepare(config, workdir)


def _run(arguments: _Arguments, plan: Plan | VariedPlan, command: str) -> int:
    """Trains, or says what would be trained; returns the exit code."""
    try:
        environment.import_jax()
        from ncjax.runs import loop, processes, varied

        with processes.joined(arguments.processes):
            target = targets.find(arguments.target) if arguments.target else None
            if isinstance(plan, VariedPlan):
                varied.preview(plan, target) if arguments.dry_run else varied.train_and_show(plan)
            else:
                loop.preview(plan, target) if arguments.dry_run else loop.train_and_show(plan)
    except InputError as error:
        return _refuse(error)
    except (Interrupted, Stopped) as stop:
        print(f"stopped by {stop}; this continues:\n    {command}", file=sys.stderr)
        return stop.exit_code
    except OSError as error:
        reason = " ".join(str(error).split())
        print(
            f"error: {reason}; what is in {plan.workdir} is whole, and this continues:\n    "
            f"{command}",
            file=sys.stderr,
        )
        return 1
    except Exception as error:
        if _is_out_of_memory(error):
            way_out = (
                "take fewer runs at once (config.sweep.runs_per_program), smaller layers or "
                "smaller batches"
            )
            return _refuse(InputError("memory", "less than a device needs", way_out))
        if not arguments.processes:
            raise
        traceback.print_exc()
        return 1
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """Returns whether XLA could not allocate an array; it says so in words alone."""
    return any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))


def _parse(argv: list[str]) -> _Arguments:
    """Reads a command line, or raises InputError."""
    values = flags.FlagValues()
    file = flags.DEFINE_string("config", "digits", "", flag_values=values)
    workdir = flags.DEFINE_string("workdir", "", "", flag_values=values)
    dry_run = flags.DEFINE_boolean("dry-run", False, "", flag_values=values)
    named = flags.DEFINE_string("target", None, "", flag_values=values)
    coordinator = flags.DEFINE_string("coordinator", "", "", flag_values=values)
    count, number = (
        flags.DEFINE_integer(name, None, "", flag_values=values)
        for name in ("processes", "process")
    )
    try:
        overrides = values(argv, known_only=True)
    except (flags.Error, ValueError, OSError) as error:  # OSError: of --flagfile
        raise _illegal(error, argv) from error
    config, vary = _load_varied(file.value or "", overrides)
    if not workdir.value and not dry_run.value:
        raise InputError(
            "--workdir", workdir.value, "name a folder for the run, as in --workdir=runs/digits"
        )
    processes = find_processes(coordinator.value, count.value, number.value, os.environ)
    target = None
    if named.value is not None:
        target = targets.parse(named.value)
        if not dry_run.value:
            raise InputError("--target", named.value, "nothing can train there; add --dry-run")
        if processes:
            raise InputError("--target", named.value, "one process compiles for all; start one")
    return _Arguments(config, vary, workdir.value or "", bool(dry_run.value), processes, target)


def load_config(named: str, overrides: Sequence[str] = ("ncjax",)) -> configuration.Config:
    """Returns a named config with some fields overridden, or raises InputError.

    Args:
      named: the name of a config that ships, as in "mnist", or the path of a Python file; with a
        variant behind a colon, as in "mnist:smoke".
      overrides: a command line of `--config.FIELD=VALUE`, after the name of the program.
    """
    return _override(_load_config(named), list(overrides))


def _load_varied(
    named: str, overrides: Sequence[str]
) -> tuple[configuration.Config, dict[str, tuple]]:
    """Returns what `load_config` does, and the values of the fields that are given several."""
    rest, texts = variation.split_arguments(overrides)
    loaded = _load_config(named)
    config = _override(loaded, rest)
    vary = {}
    for name, alternatives in texts.items():
        values = []
        for text in alternatives:
            one = _override(loaded, [rest[0], f"--config.{name}={text}"])
            values.append(configuration.flatten(configuration.to_mapping(one))[name])
        if isinstance(configuration.SCHEMA[name].default, tuple):
            values = [value if isinstance(value, tuple) else (value,) for value in values]
        vary[name] = tuple(values)
    return config, vary


def shipped_configs() -> dict[str, Path]:
    """Returns the file of every config that ships with ncjax, by name."""
    package = Path(ncjax.__file__).parent
    # A wheel has them inside of the package; a checkout, and what is installed from it as editable,
    # beside it.
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def _find_config(named: str) -> Path:
    """Returns the file that a name or a path means, or raises InputError where it cannot be
    read.
    """
    name = named.partition(":")[0]
    shipped = shipped_configs()
    if name in shipped:
        return shipped[name]
    hint = near(Path(name).stem, shipped)
    known = f"configs that ship are {', '.join(shipped)}; or name a Python file{hint}"
    if name.isidentifier():
        raise InputError("--config", named, f"no config has this name; {known}")
    try:
        Path(name).read_bytes()
    except ValueError as error:  # a null byte
        raise InputError("--config", named, f"{error}; {known}") from error
    except OSError as error:
        raise InputError("--config", named, f"{error.strerror}; {known}") from error
    return Path(name)


def _load_config(named: str) -> config_dict.ConfigDict:
    """Returns the config of a `file` or `file:variant`, ready for overrides, or raises InputError
    with the line of the file at fault.
    """
    file = _find_config(named)
    _, colon, variant = named.partition(":")
    values = flags.FlagValues()
    loaded = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[])
    logger = logging.getLogger("absl")
    logger.disabled = True  # it would say beside us that there is no config
    try:
        values(["", f"--config={file}{colon}{variant}"])
        config = loaded.value
        if isinstance(config, configuration.Config):
            # Not type-safe: where a tuple stands a scalar is accepted, or `validate` names the
            # field.
            config = config_dict.ConfigDict(configuration.to_mapping(config), type_safe=False)
        # This look raises the OSError of a get_config() that did.
        elif not hasattr(config, "copy_and_resolve_references"):
            raise TypeError(f"get_config() returned {type(config).__name__}, not a Config")
        # RecursionError: a value contains itself, or nests too deep.
        repr(configuration.flatten(config.to_dict()))
    except (Interrupted, Stopped):
        raise
    except BaseException as error:
        # The config is the user's Python file: anything may be wrong in it.
        raise InputError("--config", named, _fault(error, str(file))) from error
    finally:
        logger.disabled = False
        # ml_collections would load the next file on top of this one's names.
        sys.modules.pop("config_config", None)
    return config


def _fault(error: BaseException, file: str) -> str:
    """Says what went wrong, and in which line of a file, if in any: what a library raised may be
    a consequence.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SyntaxError) and cause.filename == file:
            return f"line {cause.lineno}: {cause.msg}"
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(cause.__traceback__)
            if frame.filename == file
        ]
        if lines:
            return f"line {lines[-1]}: {type(cause).__name__}: {cause}"
        cause = cause.__cause__ or cause.__context__
    return (
        "it has no get_config()" if getattr(error, "name", "") == "get_config" else last_line(error)
    )


def _override(config: config_dict.ConfigDict, argv: list[str]) -> configuration.Config:
    """Returns a config with the fields that a command line overrides, or raises InputError.

    ml_collections parses overrides into its own untyped ConfigDict, which ends here.
    """
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        if name.startswith("config.") and name.removeprefix("config.") not in configuration.SCHEMA:
            hint = near(name, [f"config.{field}" for field in configuration.SCHEMA])
            raise InputError(name, value, f"no such field; --help lists them{hint}")
    values = flags.FlagValues()
    try:
        overridden = config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=argv
        )
        surplus = values(argv)[1:]
        nested = overridden.value.copy_and_resolve_references().to_dict()
    except Exception as error:  # ml_collections raises many types
        raise _illegal(error, argv) from error
    if surplus:
        known = "there are --config, --config.FIELD, --workdir and others; see --help"
        raise InputError("command line", surplus[0], f"no such argument; {known}")
    return configuration.from_mapping(nested)


def _illegal(error: Exception, argv: list[str]) -> InputError:
    """Translates what absl says of a command line, `flag --NAME=VALUE: REASON` where a value is
    not of its type.
    """
    illegal = re.match(r"flag --([\w.-]+)=(.*?): ", str(error), re.DOTALL)
    if illegal is None:
        lacks = (
            "the config lacks a field that is named here: "
            if isinstance(error, KeyError | AttributeError)
            else ""
        )
        return InputError("command line", " ".join(argv[1:]), lacks + last_line(error))
    name, value = illegal.groups()
    field = configuration.SCHEMA.get(name.removeprefix("config."))
    return InputError(
        name if field else f"--{name}", value, field.must if field else last_line(error)
    )


def _refuse(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
