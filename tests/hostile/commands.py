"""Command lines and config files that are wrong, of every command."""

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import chaos
from tests.hostile import engine
from tests.hostile.engine import Failure

_START = (
    "from ncjax.config import default_config\ndef get_config():\n    config = default_config()\n"
)
# An older config, which ml_collections alone checks: here any field may be added and removed.
_UNTYPED = (
    "from ml_collections import ConfigDict\nfrom ncjax.config import default_config, to_mapping\n"
    "def get_config():\n    config = ConfigDict(to_mapping(default_config()), "
    "type_safe=False)\n"
)
_BAD_CONFIGS: dict[str, str | bytes] = {
    "no get_config": "x = 1\n",
    "empty": "",
    "a syntax error": "def get_config(:\n",
    "a syntax error of many lines": "def get_config():\n    return (\n\n\n1 +\n",
    "tabs and spaces": "def get_config():\n\tx = 1\n        return x\n",
    "no UTF-8": b"# \xff\xfe\ndef get_config(): pass\n",
    "a null byte": b"def get_config(): pass\0\n",
    "binary": bytes(range(256)),
    "an import that fails": "import nowhere\n",
    "an exception while imported": "raise RuntimeError('one\\ntwo\\nthree')\n",
    "an exception": "def get_config():\n    raise KeyError('x')\n",
    "an exception without words": "def get_config():\n    raise ValueError\n",
    "an exception of a thousand lines": "def get_config():\n    raise ValueError('line\\n' * "
    "1000)\n",
    "an assertion": "def get_config():\n    assert False\n",
    "endless recursion": "def get_config():\n    return get_config()\n",
    "sys.exit": "import sys\ndef get_config():\n    sys.exit(0)\n",
    "sys.exit while imported": "import sys\nsys.exit()\n",
    "SystemExit with words": "raise SystemExit('I do not want to')\n",
    "KeyboardInterrupt": "def get_config():\n    raise KeyboardInterrupt\n",
    "BaseException": "def get_config():\n    raise BaseException('x')\n",
    "MemoryError": "def get_config():\n    return [0] * 10**15\n",
    "None": "def get_config():\n    return None\n",
    "a dict": "def get_config():\n    return {'train': {'epochs': 1}}\n",
    "a number": "def get_config():\n    return 3\n",
    "a string": "def get_config():\n    return 'config'\n",
    "a generator": "def get_config():\n    yield 1\n",
    "a class": "class get_config:\n    pass\n",
    "no function": "get_config = 3\n",
    "two arguments": "def get_config(a, b):\n    return a\n",
    "an argument that must be given": _START.replace("()", "(size)") + "    return config\n",
    "an empty config": "import ml_collections\ndef get_config():\n    return "
    "ml_collections.ConfigDict()\n",
    "a section missing": _UNTYPED + "    del config.train\n    return config\n",
    "a section a number": _UNTYPED + "    config.train = 3\n    return config\n",
    "a field more": _UNTYPED + "    config.train.colour = 'red'\n    return config\n",
    "a locked field": _START + "    config.train.colour = 'red'\n    return config\n",
    "a placeholder": "import ml_collections\n"
    + _START
    + "    config.train.epochs = ml_collections.config_dict.placeholder(int)\n    return config\n",
    "itself as a field": _UNTYPED + "    config.self = config\n    return config\n",
    "a function as a field": _START + "    config.train.epochs = print\n    return config\n",
    "an array as a field": "import numpy as np\n"
    + _START
    + "    config.train.epochs = np.eye(2)\n    return config\n",
    "NaN epochs": _START + "    config.train.epochs = float('nan')\n    return config\n",
    "bytes as a name": _START + "    config.data.name = b'digits'\n    return config\n",
    "a surrogate as a name": _START + "    config.data.name = '\\udcff'\n    return config\n",
    "keys that are numbers": _UNTYPED + "    config.train = {1: 2}\n    return config\n",
    "an iterator of widths": _START + "    config.model.widths = iter((8, 8))\n    return config\n",
    "nested widths": _START + "    config.model.widths = ((8, 8),)\n    return config\n",
    "a set of seeds": _START + "    config.sweep.seed = {0, 1}\n    return config\n",
    "a deep tuple": _START
    + "    x = ()\n    for _ in range(10**5):\n        x = (x,)\n"
    + "    config.sweep.seed = x\n    return config\n",
}
_NO_CONFIGS = (
    "",
    "nowhere.py",
    "configs",
    "/dev/null",
    "README.md",
    "configs/digits.py:x:y",
    ":smoke",
    "\0",
)

# Command lines, by command; {run} is a finished run, {folder} the case's own.
_BAD_LINES = {
    "train": """
--workdir
--workdir=
--nowhere
-x
x y
--workdir={folder}/a --workdir
--config
--flagfile=/nowhere
--flagfile={run}/config.json
--undefok
--noworkdir
--config.train=1
--config.=1
--config.train.epochs
--config.train.epochs=
--config.train.epochs=1e3
--config.train.epochs=0x
--config.train.epochs=1_0_
--config.train.epochs=10**9
--config.sweep=1
--config.sweep.seed=0,,1
--config.train.optimizer=sgd,
--config.train.optimizer=sgd,,adam
--config.train.optimizer=sgd;adam
--config.train.optimizer=sgd,sgd
--config.train.optimizer=sgd,adam --config.train.decay=coupled,decoupled
--config.train.optimizer=sgd,adamw --workdir={run}
--config.train.batch_size=8,1e9
--config.train.epochs=1,2
--config.model.widths=8;;9
--config.model.widths=8,8;8,8
--config.model.kind=mlp,conv
--config.model.network=a:B,c:D
--config.data.name=synthetic,nowhere
--config.compile.cache=user,off
--config.sweep.seed=[0,1
--config.sweep.seed=0-3
--config.sweep.seed=0,0
--config.sweep.weight_decay=1e-3;1e-2
--config.sweep.weight_decay=None
--config.model.widths=8x8
--config.model.widths=
--config.log.epochs=-1
--config.checkpoint.keep=0
--config.mesh.run=7
--config.mesh.data=3
--config.mesh.data=1000000
--config.data.name=../../etc
--config.data.name=mnist:9.9.9
--config.data.name=.
--config.data.dir=/dev/null --config.data.name=mnist
--config.data.pad=3
--config.data.pad=100000
--config.profile.dir=/dev/null/x
--config.compile.cache=on
--config.data.per_class=100000000
--config.data.num_classes=1
--config.train.batch_size=61
--coordinator=x
--coordinator=localhost:99999
--coordinator=localhost:0 --processes=2 --process=0
--processes=2
--process=0
--processes=x
--processes=0 --process=0 --coordinator=localhost:1
--processes=2 --process=2 --coordinator=localhost:12345
--coordinator=nowhere.invalid:1234 --processes=2 --process=1
--dry-run=maybe
--workdir=/dev/null
--workdir=/dev/null/x
--workdir=/proc/x
--workdir={run}/config.json
""",
    "show": """
{folder}
{folder}/nowhere
/dev/null
{run}/config.json
{run} {run}
{run} --epoch
{run} --epoch x
{run} --epoch -1
{run} --epoch 99999999999999999999
{run} --epoch 3.5
{run} --run x
{run} --run =
{run} --run seed=
{run} --run seed=5
{run} --run seed=nan
{run} --run seed=inf
{run} --run seed=0,seed=0
{run} --run epoch=3
{run} --run weight_decay=1e-2,seed=0,lr=1
{run} --export {folder}/x.npz
{run} --run weight_decay=0,seed=0 --export x
{run} --run weight_decay=0,seed=0 --export {folder}/no/x.npz
{run} --run weight_decay=0,seed=0 --export {folder}/x.txt
{run} --run weight_decay=0,seed=0 --export /dev/null/x.npz
{run} --run weight_decay=0,seed=0 --export {folder}/.npz/x.npz
{run} --verify --epoch 1
--json
{run} --colour
""",
    "plot": """
{folder}
{folder}/nowhere
/dev/null
{run}/history.nc
{run} {folder}
{run} --weight-decay x
{run} --weight-decay 0.5
{run} --weight-decay nan
{run} --weight-decay -1
{run} --out {folder}/x.pdf
{run} {run}/. --out /dev/null/x
{run} --out
{run} --colour
{run} --format gif
{run} --only nothing
{run} {unfinished} --out {run}/config.json
""",
    "report": """
{folder}
{folder}/nowhere
/dev/null
{run}/history.nc
{run} {folder}
{run} --out
{run} --out {folder}
{run} --out {run}/config.json
{run} --out {folder}/x.pdf
{run} {run}/. --out /dev/null/x.html
{run} --watch --out {folder}/x.html
{folder}/nowhere --watch
{run} --colour
""",
    "measure": """
{folder}
nowhere.npz
/dev/null
README.md
{features} --head
{features} --head nowhere.npz
{features} --head {features}
{features} --labels {head}
{features} --classes 0
{features} --classes 2
{features} --classes x
{features} --classes 1000000000000
{features} --classes 1000000000000000000000000000000
{features} --batch 0
{features} --batch -1
{features} --batch x
{features} --loss hinge
{features} --weight-decay 1e-3
{features} --head {head} --weight-decay nan
{features} --head {head} --weight-decay -1
{features} --head {head} --weight-decay x
{features} --head {head} --weight-decay 1e400
{features} --global-mean x
{features} --figures /dev/null
{features} --figures /dev/null/x
{features} --figures {run}/config.json
{features} --colour
{head}
{head} --labels {features}
{features} {head}
{features} --head {head} --classes 3
{features} --features-key nothing
{features} --labels-key nothing
{features} --head {head} --head-prefix fc
{features} --pool max
{features} --ignore-label x
{features} --ood nowhere.npz
{features} --ood {head}
{features} --csv --json
{features} --format gif
{features} --only nothing
""",
}
_PLACES = {"features": "tests/data/features.npz", "head": "tests/data/head.npz"}


def _bad_config(content: str | bytes, folder: Path) -> None:
    path = folder / "mine.py"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ran = engine.run_here("train", f"--config={path}", f"--workdir={folder / 'run'}")
    engine.check(ran, works=False, also=(130,) if b"KeyboardInterrupt" in path.read_bytes() else ())
    # A field that is wrong says so itself; all else is the file's fault, not the command line's.
    if (
        ran.code == 2
        and "config." not in ran.err.replace("config.py", "")
        and "mine.py" not in ran.err.partition("command line")[0]
    ):
        raise Failure("other", f"it does not say which file is wrong: {ran}")
    if (folder / "run").exists():
        raise Failure("other", f"refused only after it had begun: {ran}")


def _no_config(name: str, folder: Path) -> None:
    engine.check(
        engine.run_here("train", f"--config={name}", f"--workdir={folder / 'run'}"), works=False
    )


def _bad_line(command: str, line: str, folder: Path) -> None:
    places = {
        "folder": folder,
        "run": engine.trained(),
        "unfinished": engine.unfinished(),
    } | _PLACES
    words = [word.format_map(places) for word in line.split(" ") if word]
    if command == "train":
        words = [
            *chaos.SMALL,
            *([] if "--workdir" in line else [f"--workdir={folder / 'run'}"]),
            *words,
        ]
    ran = engine.run_here(command, *words, draw=command == "plot")
    engine.check(ran, works=False, also=(1,) if "--verify" in line else ())
    if (folder / "run" / "config.json").exists():
        raise Failure("other", f"refused only after it had begun: {ran}")


def _too_wide(folder: Path) -> None:
    """A network that no machine can hold, in a process of its own: JAX may abort."""
    flags = (*chaos.SMALL, "--config.model.widths=1000000,1000000", f"--workdir={folder / 'run'}")
    engine.check(engine.run("ncjax.main", *flags), works=False, also=(1,))


def cases(_: random.Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for what, content in _BAD_CONFIGS.items():
        yield f"config file: {what}", functools.partial(_bad_config, content)
    for name in _NO_CONFIGS:
        yield f"--config={name!a}", functools.partial(_no_config, name)
    yield "train --config.model.widths=1000000,1000000", _too_wide
    for command in ("show", "plot", "report", "measure"):
        yield f"{command} of nothing", functools.partial(_bad_line, command, "")
    for command, lines in _BAD_LINES.items():
        for line in lines.strip().splitlines():
            yield f"{command} {line}", functools.partial(_bad_line, command, line)
