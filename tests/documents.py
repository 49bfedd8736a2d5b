"""Runs the commands and the Python of a page, in their order and with the fewest epochs.

    python -m tests.documents docs/tutorial.md FOLDER

FOLDER is made; commands see this checkout's data of tests in it. What fails ends the run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

_BLOCK = re.compile(
    r"^```python\n(?P<python>.*?)^```$|^    (?P<command>ncjax .*?[^\\])$", re.M | re.S
)


def run(page: Path, folder: Path, flags: list[str]) -> int:
    """Runs a page in a new folder; returns how many of its commands and examples there were.

    Args:
      flags: added to every command that trains.
    """
    folder.mkdir(parents=True)
    (folder / "tests").symlink_to(ROOT / "tests")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    blocks = list(_BLOCK.finditer(page.read_text()))
    for block in blocks:
        if block["python"]:
            command = [sys.executable, "-c", block["python"]]
        else:
            words = block["command"].replace("\\\n", " ").split()
            command = [sys.executable, "-m", *words, *(flags if words[1] == "train" else [])]
        print("$", *command[2:], flush=True)
        subprocess.run(command, cwd=folder, env=environment, check=True)
    return len(blocks)


if __name__ == "__main__":
    count = run(Path(sys.argv[1]), Path(sys.argv[2]), ["--config.train.epochs=20"])
    print(count, "commands and examples")
