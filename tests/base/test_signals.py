"""The first signal asks, the second ends the process at once."""

import signal
import subprocess
import sys
import time

import pytest

from benthic.base.errors import Interrupted
from benthic.base.signals import Stop

POLITE = """
import sys, time
from benthic.base.errors import Interrupted
from benthic.base.signals import Stop
stop = Stop()
stop.install()
print("ready", flush=True)
try:
    while True:
        time.sleep(0.01)
        stop.raise_if_requested("saved step 7")
except Interrupted as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""

# The main thread waits for ever inside C, as in a collective whose peer is gone: it never runs Python again.
STUCK = """
import ctypes, logging
from benthic.base.signals import Stop
logging.basicConfig()
Stop().install()
mutex, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
print("ready", flush=True)
libc.pthread_mutex_lock(mutex)
"""


def _start(program: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_lets_the_loop_end_and_gives_the_documented_exit_code(signum, code):
    process = _start(POLITE)
    process.send_signal(signum)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (code, "saved step 7\n")
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="blocks inside glibc")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_a_process_that_is_stuck_within_a_second(signum, code):
    process = _start(STUCK)
    process.send_signal(signum)
    assert "once more" in process.stderr.readline()
    assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signum)
    assert process.wait(timeout=10) == code
    assert time.monotonic() - sent < 1.0


def test_without_install_no_signal_handler_is_touched():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = Stop()
    stop.raise_if_requested("never")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_request_raises_with_the_code_of_its_signal():
    stop = Stop()
    stop.requested = signal.SIGTERM
    with pytest.raises(Interrupted, match="saved") as caught:
        stop.raise_if_requested("saved")
    assert caught.value.exit_code == 143
