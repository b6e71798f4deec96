"""Each kind of error carries the exit code that the command line promises."""

import signal

from benthic.base.errors import BenthicError, CheckpointError, DoesNotFit, InputError, Interrupted, did_you_mean


def test_exit_codes_are_the_documented_ones():
    assert BenthicError("x").exit_code == CheckpointError("x").exit_code == 1
    assert InputError("x").exit_code == 2
    assert DoesNotFit("x").exit_code == 3
    assert Interrupted(signal.SIGINT, "x").exit_code == 130
    assert Interrupted(signal.SIGTERM, "x").exit_code == 143


def test_the_nearest_name_is_offered_and_all_names_when_none_is_near():
    assert did_you_mean("max-step", ["max-steps", "seed"]) == "; did you mean 'max-steps'?"
    assert did_you_mean("zzz", ["b", "a"]) == "; known: a, b"
