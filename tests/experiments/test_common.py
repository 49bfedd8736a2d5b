"""Commands of experiments end with a line and an exit code."""

import signal

import pytest

from experiments import common
from ncjax.errors import InputError
from ncjax.runs.signals import Interrupted


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("history", "x.nc", "it was not trained yet"), 2, "error: history: got 'x.nc'"),
        (Interrupted(signal.SIGTERM), 143, "stopped by SIGTERM; the same command continues"),
    ],
)
def test_a_command_that_cannot_end_says_why_in_one_line(error, code, said, capsys):
    def work():
        raise error

    with pytest.raises(SystemExit) as ended:
        common.run(work)
    assert ended.value.code == code
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
