"""Decides at which epochs training stops to measure, to save, or both."""

from typing import NamedTuple

from ncjax.config import Config, log_spaced_epochs


class Schedule(NamedTuple):
    """Holds the epochs at which training stops.

    Attributes:
      last: the final epoch.
      measured: the epochs after which all metrics are measured.
      saved: the epochs after which a checkpoint is written.
    """

    last: int
    measured: frozenset[int]
    saved: frozenset[int]

    def next_stop(self, epoch: int) -> int:
        """Returns the first stop after an epoch, or the final epoch if there is none."""
        return min((stop for stop in self.measured | self.saved if stop > epoch), default=self.last)

    def chunk(self, epoch: int, seconds: float, seconds_per_epoch: float) -> int:
        """Returns the number of epochs to train next.

        They take about `seconds`, are at least one, and do not pass the next stop. It is 0 after
        the final epoch.
        """
        most = max(1, int(seconds / seconds_per_epoch))
        return min(self.next_stop(epoch) - epoch, most)


def make_schedule(config: Config) -> Schedule:
    """Returns the schedule that a config asks for."""
    last, every = config.train.epochs, config.checkpoint.every
    regular = range(every, last, every) if every else ()
    return Schedule(
        last=last,
        measured=frozenset(config.log.epochs or log_spaced_epochs(last)),
        saved=frozenset({last, *config.checkpoint.marked, *regular}),
    )
