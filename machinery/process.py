"""One process at a time in a run folder, and what happens to it on Ctrl-C.

Two processes that write the same files spoil both. The kernel keeps the lock (flock), so that it is gone with the
process that held it, killed or not; the file LOCK in the folder stays, and says who held it last. Every stage can go on
after a kill (machinery/files.py, machinery/train.py), so a signal ends the process at once, wherever it is: with one
line, and without asking the threads and the processes that it started, which end by themselves.

Exercised by `python -m pytest tests/test_runs.py`.
"""
import contextlib
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from kernels import ranks
from machinery.files import InputError, note

LOCK = ".lock"
KEPT = "what is finished is kept, the same command goes on from there"


class InUse(InputError):
    """Another process works in this folder."""


def open_lock(path):
    """The lock's file, for writing if that can be; None in a folder that can only be read and was never locked."""
    for mode in ("a+", "r"):
        with contextlib.suppress(OSError):
            return open(path, mode, encoding="utf-8")
    return None


def said_in(file):
    file.seek(0)
    return " ".join(file.read().split()) or "another process"


def holder(folder):
    """The process that holds a folder, in its words, or "". Only reads."""
    with contextlib.suppress(OSError), open(Path(folder) / LOCK, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return said_in(file)
    return ""


@contextlib.contextmanager
def alone(folder):
    """Hold a folder. InUse where another process does; a note where its file system has no locks. A folder that can
    only be read needs none. Of several processes of one run, the first holds it for all."""
    file = None if ranks.rank() else open_lock(Path(folder) / LOCK)
    if file is None:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"{folder} is in use by {said_in(file)}; wait for it to end, or take another --run") from None
        except OSError as error:
            note(f"sweet: note: {folder}: no locks on this file system ({error.strerror}); see to it that no other "
                 "process works there")
        with contextlib.suppress(OSError):  # opened for reading only
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}: "
                       f"{shlex.join(sys.argv)}")
            file.flush()
        yield


def stop(number, _):
    """What Ctrl-C and SIGTERM do: one line, and the end."""
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # in the middle of a print, or nobody listens
        if ranks.speaks():
            os.write(2, f"\nsweet: stopped by {signal.Signals(number).name}; {KEPT}\n".encode())
        sys.stdout.flush()
    os._exit(128 + number)


def stop_on_signals():
    """Stop decently from now on. Whoever started this process with a signal ignored (nohup, &) keeps it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


@contextlib.contextmanager
def passing_on(children):
    """While here, Ctrl-C and SIGTERM reach these processes (a list that may grow), too, before they act here."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number, frame):
        for child in list(children):
            child.send_signal(number)
        for child in list(children):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
        before[number](number, frame)
    for number in filter(lambda number: callable(before[number]), before):
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, before[number])


@contextlib.contextmanager
def one_line(options):
    """What a user can mend ends the program with one line: InputError, Ctrl-C, a disk that is full or read-only.
    options: .run, the folder; .running, the stage that runs, if one does. Several processes meet here, and the first
    that fails speaks for all."""
    try:
        if ranks.count() > 1:
            ranks.join()
        yield
    except KeyboardInterrupt:
        print(f"\nsweet: stopped; {KEPT}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # a disk can fill up in any library, each with an exception of its own
        if not ranks.speaks():
            sys.exit(1)
        if isinstance(error, InputError):
            sys.exit(f"{prefix(options)}{error}")
        if not isinstance(error, OSError) and "No space left" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        place = getattr(error, "filename", None) or options.run
        sys.exit(f"{prefix(options)}{place}: {reason}; what is finished is kept, run the same command again")


def prefix(options):
    return f"sweet: {options.running}: " if options.running else "sweet: "
