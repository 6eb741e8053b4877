"""The short form of fuzz_files.py: a few hundred cases of both kinds."""

import pytest
from fuzz_files import Hang, outcome, run

pytestmark = pytest.mark.slow


def test_mutated_adapter_files_load_right_or_are_refused_and_leave_no_trace(tmp_path):
    outcomes, failures = run("files", range(400), seed=1, folder=tmp_path)
    assert failures == []
    assert outcomes["loaded"] > 10
    assert outcomes["ValueError"] > 200


def test_mutated_configurations_are_read_right_or_refused_and_leave_no_trace(tmp_path):
    outcomes, failures = run("configs", range(100), seed=1, folder=tmp_path)
    assert failures == []
    assert outcomes["loaded"] > 3
    assert outcomes["ValueError"] > 50


def test_mutated_adapter_files_are_resized_without_a_base_or_refused(tmp_path):
    outcomes, failures = run("resized", range(200), seed=1, folder=tmp_path)
    assert failures == []
    assert outcomes["loaded"] > 5
    assert outcomes["BaseNeeded"] > 5


class Faulty:
    """Cases that do what must not be: another error, a trace, a hang."""

    def __init__(self, error, trace=False):
        self.error, self.trace = error, trace

    def write(self, number):
        return None

    def open(self, number, opened):
        raise self.error

    def check_untouched(self):
        if self.trace:
            raise AssertionError("not as before")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), MemoryError(), ValueError(""), Hang()])
def test_undocumented_errors_count_as_failures(error):
    with pytest.raises(type(error)):
        outcome(Faulty(error), 0)


def test_a_trace_counts_as_a_failure():
    with pytest.raises(AssertionError, match="not as before"):
        outcome(Faulty(ValueError("refused"), trace=True), 0)
