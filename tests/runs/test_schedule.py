"""The epochs at which training stops, by hand, without JAX."""

import pytest

from ncjax.runs.schedule import Schedule, make_schedule
from tests.helpers import small_config


def test_a_schedule_is_what_the_config_asks_for():
    config = small_config()
    config.train.epochs = 10
    config.log.epochs = (0, 5, 10)
    config.checkpoint.every, config.checkpoint.marked = 4, (7,)
    assert make_schedule(config) == Schedule(10, frozenset({0, 5, 10}), frozenset({4, 7, 8, 10}))


def test_a_config_that_names_no_epochs_is_measured_log_spaced_and_saved_at_the_end():
    config = small_config()
    config.train.epochs, config.log.epochs = 100, ()
    config.checkpoint.every, config.checkpoint.marked = 0, ()
    schedule = make_schedule(config)
    assert {0, 1, 100} <= schedule.measured
    assert len(schedule.measured) <= 12
    assert schedule.saved == {100}


@pytest.mark.parametrize(("epoch", "stop"), [(0, 3), (3, 4), (5, 9), (9, 9)])
def test_training_stops_at_the_next_epoch_that_is_measured_or_saved(epoch, stop):
    assert Schedule(9, frozenset({0, 3}), frozenset({4, 9})).next_stop(epoch) == stop


def test_the_final_epoch_is_a_stop_even_if_nothing_is_done_there():
    assert Schedule(9, frozenset({0}), frozenset()).next_stop(0) == 9


@pytest.mark.parametrize(
    ("epoch", "seconds", "pace", "chunk"),
    [
        (0, 2.0, float("inf"), 1),  # nothing is known of the first chunk
        (1, 2.0, 0.5, 4),
        (1, 2.0, 1e-3, 49),  # up to the next stop
        (1, 2.0, 5.0, 1),
        (1, 0.0, 1e-3, 1),  # one epoch to be traced
        (100, 2.0, 0.5, 0),
    ],
)
def test_a_chunk_takes_its_time_and_does_not_pass_a_stop(epoch, seconds, pace, chunk):
    schedule = Schedule(100, frozenset({0, 50, 100}), frozenset({100}))
    assert schedule.chunk(epoch, seconds, pace) == chunk
