"""`ncjax COMMAND` and `python -m ncjax COMMAND`."""

from typing import NoReturn

from ncjax.cli import command


def main() -> NoReturn:
    """Runs the command that the command line names, and exits with its exit code."""
    command.run("ncjax.cli.choose")


if __name__ == "__main__":
    main()
