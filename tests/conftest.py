"""For all tests."""

import signal

# Where the tests were started in the background, Ctrl-C is ignored, by whatever they start as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
