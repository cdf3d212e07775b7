"""Fixtures of several test files."""

import signal

import pytest
from test_launch import RUN, run

# A shell lets its background jobs ignore SIGINT, and the runs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing disturbs. No test may change it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out, err = run(folder, "--name=a", *RUN)
    assert code == 0, out + err
    return folder / "a"
