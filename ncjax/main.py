"""`python -m ncjax.main` is `ncjax train`."""

from ncjax.cli import command

if __name__ == "__main__":
    command.run("ncjax.cli.train")
