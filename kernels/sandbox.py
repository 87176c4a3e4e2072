"""Where strangers' programs run: warm processes that fork for each program, contain it, and report what it returned.

The reward is the only ground truth of the whole method, and it comes from running code that a language model wrote.
So this must be exact (a right answer gets 1.0 every time), contained (a hostile one fools, hangs and harms nobody) and
fast (a fresh Python for each call would take thirty times as long as the call).

    run(jobs) -> one thread and one warm *worker* process a core -> a forked *stem* a program -> a forked child a call

- The **parent** (your process) hands out jobs, each with a socket of its own, keeps the clock, and compares. It never
  parses, compiles or runs an answer, and what comes back of a call is one line: the hash (64 bits) of its value's
  canonical text, in which two values agree exactly where Python's == says so. Whatever an answer patches, forges or
  floods, it can give one guess a call.
- The **worker** only forks, kills and wipes. It never sees a job or a result, so that no program finds another one's
  answers in the memory that it inherits. It is process 1 of a namespace of its own, which no signal from inside can
  end, and from which nothing escapes: when it kills "everybody", that is everybody. A program that changes what it can
  of its worker (limits, priority, shared memory) costs the worker its place, and nobody a reward.
- The **stem** gives up what rights there are, reads one job, loads the modules that it names and forks a child for each
  call: definitions, modules, files and processes of one call are gone before the next. Programs that provably only
  compute (`leaves_no_trace`; most small functions) run in the stem itself; nothing is contained any less for that.

A fork costs what its memory costs: some 500 pages are copied or mapped for a small program, half of its time. So the
worker imports little, and one fork serves all calls of a program where that can be.

What is contained, with bubblewrap (Debian: `apt install bubblewrap`; used where a trial shows that it works): no
network; nothing is readable but the installed software (no home, no /proc, no environment), nothing writable but a
scratch folder of 64 MiB in memory that is wiped after every call. Always: one second a call, ten a program; for each
process 1 GiB of data, 4 GiB of address space, 16 MiB a file, 256 descriptors, no core dumps; output to nowhere; 32
processes a call (threads count), where a user id or a namespace of its own makes them countable.
Without bubblewrap a PID namespace, or nothing but limits, whichever works first, and for root a user id that belongs
to nobody: rewards are exact and programs end in time, but they can read and write what your user can, and use the
network. With limits alone, which is also all there is on macOS, a program of a user who is not root can hunt down its
worker and leave a process behind, or kill *all* your processes; and programs that run at the same time share one
limit on processes.
Not contained in any case: holes in the kernel, side channels, kernel keyrings, and answers that look for the reference
where they can read it. The sum over processes is not limited: 32 of them may take 32 GiB.

Limits of exactness: time is wall-clock (the machine may be busy: the first call of a program that runs out gets one
more try); sets order what has no hash of its own by address (None has the same one in all workers where `setarch` is);
uuid4, os.urandom, numpy's default_rng() and the clock are not seeded; a value may hold 10^6 letters and parts and nest
about 300 deep; values of kinds that `canonical` does not know (Path, UUID, Enum, dataclass, DataFrame, functions, your
own classes) equal nothing; an OrderedDict compares like a dict, and a float32 by its exact value; of two values that
differ, one pair in 2^64 hashes alike.

No torch here. Exercised by `python -m pytest tests/test_grade.py`; measured by `python kernels/bench_grade.py`.
"""
import collections
import contextlib
import functools
import itertools
import marshal
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

COUNTER = itertools.count()
REPORT = re.compile(rb"(\d{1,6}|ready) (-?[0-9]{1,20}|![ -~]{0,300}|)")


def ways():
    """What can contain a worker, the tightest first: (what to say of it, the command in front, a user of its own?)."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    shown = sorted({"/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives", sys.prefix,
                    sys.base_prefix, *packages})
    roads = sorted({str(parent) for path in shown for parent in Path(path).parents if len(parent.parts) > 1})
    root = os.getuid() == 0
    apart = "--unshare-pid --unshare-net --unshare-ipc --unshare-uts --cap-add ALL" if root else "--unshare-all"
    bwrap = f"bwrap {apart} --as-pid-1 --die-with-parent".split()
    bwrap += [word for path in [*roads, "/dev"] for word in ("--dir", path)]
    bwrap += [word for path in shown for word in ("--ro-bind-try", path, path)]
    bwrap += [word for name in ("null", "zero", "random", "urandom") for word in ("--dev-bind", *[f"/dev/{name}"] * 2)]
    bwrap += f"--size {2 ** 26} --tmpfs /scratch --symlink /scratch /dev/shm --chdir /scratch --remount-ro /".split()
    unshare = f"unshare {'' if root else '--user --map-root-user'} --pid --fork --kill-child".split()
    worse = "they can read and write what you can (for more, apt install bubblewrap)"
    return [("bubblewrap: no network, no files of yours", bwrap, root), (f"a PID namespace: {worse}", unshare, root),
            (f"limits alone: {worse}", [], root), (f"limits alone: {worse}", [], False)]


class Worker:
    """A warm process for one thread of `run`: it takes orders on one socket, and a socket for each program."""

    def __init__(self, way):
        self.way, self.process = way, None
        self.start()

    def start(self):
        self.close()
        _, command, own = ways()[self.way]
        uid = 2 ** 30 + os.getpid() % 2 ** 20 * 2 ** 10 + next(COUNTER) % 2 ** 10 if own else 0  # nobody else's
        # the kernel takes these first when memory runs out; same addresses for all (hash(None) may be one)
        lower = """echo 1000 2>/dev/null >/proc/self/oom_score_adj
            setarch -R true 2>/dev/null && exec setarch -R "$@"; exec "$@" """
        far_side = Path(__file__).with_name("sandbox_worker.py").read_text(encoding="utf-8")
        env = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1",
               "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": ".",
               "TMPDIR": ".", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("-packages"))}
        self.scratch = tempfile.TemporaryDirectory(prefix="sweet-", ignore_cleanup_errors=True)
        self.control, theirs = socket.socketpair()
        self.control.settimeout(10)
        with theirs:
            self.process = subprocess.Popen(
                ["sh", "-c", lower, "sh", *command, sys.executable, "-c", far_side, str(uid)],
                env=env, cwd=self.scratch.name, stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True)

    def close(self):
        if self.process:
            self.control.close()  # the worker sees it, cleans up and leaves
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
            self.process.kill()
            self.process.wait()
            self.scratch.cleanup()
            self.process = None

    def run(self, source, calls, call_seconds, answer_seconds):
        """One report a call: the hash of its value, or "!" and what went wrong."""
        reports, end, patient = [], time.monotonic() + answer_seconds, True
        while len(reports) < len(calls) and time.monotonic() < end:
            known = len(reports)
            try:
                ours, theirs = socket.socketpair()
                with ours:
                    with theirs:
                        socket.send_fds(self.control, [b"B"], [theirs.fileno()])
                    ours.settimeout(answer_seconds)
                    ours.sendall(marshal.dumps((source, calls, known)))
                    ours.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(TimeoutError):
                        listen(ours, reports, len(calls), call_seconds, end)
                self.control.send(b"E")
                if not self.control.recv(1):
                    raise OSError("the worker did not survive this program")
            except OSError:
                with contextlib.suppress(OSError):  # where none can be started now, the next round tries again
                    self.start()
            if len(reports) == known:
                if not patient:
                    reports.append("!out of time, or its process died")
                patient = False  # the machine may have been busy: one more try a program
        return reports + ["!the program's time was up"] * (len(calls) - len(reports))


def listen(ours, reports, wanted, call_seconds, end):
    """Append a program's reports until all are there or its process ends. TimeoutError when a clock runs out."""
    tail, clock = b"", end
    while True:
        left = min(clock, end) - time.monotonic()
        if left <= 0:  # a program that floods is never waited for, so that recv alone would not see the time
            raise TimeoutError
        ours.settimeout(left)
        data = ours.recv(2 ** 16)
        *lines, tail = (tail[-400:] + data).split(b"\n")
        for line in filter(REPORT.fullmatch, lines):
            index, report = line.decode().split(" ", 1)
            if index == "ready" and clock == end:  # what it imports is loaded: the first call begins
                clock = time.monotonic() + call_seconds
            elif index == str(len(reports)) and len(reports) < wanted:
                reports.append(report)
                clock = time.monotonic() + call_seconds
        if not data or len(reports) == wanted:
            return


def works(way):
    """Can programs run, and import what is installed, in one of the `ways`? Found out by trying."""
    with contextlib.suppress(OSError), contextlib.closing(Worker(way)) as one:
        return one.run("import decimal, os", ["os.getpid()"], 5, 10)[0][0] != "!"


@functools.lru_cache(maxsize=1)
def tightest_way():
    """The first of the `ways` that works here; says so once."""
    for way, (text, _, _) in enumerate(ways()):
        if works(way):
            print(f"sweet: answers run under {text}", file=sys.stderr)
            return way
    raise OSError("programs cannot be run here: no worker process starts")


def run(jobs, call_seconds=1.0, answer_seconds=10.0, workers=None):
    """Run (source, calls) jobs, in parallel; for each job a list of reports, one a call: a hash of the value that the
    call returned, or "!" and what went wrong."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    left, reports, workers = collections.deque(enumerate(jobs)), {}, min(workers or cores, len(jobs))
    if not jobs:
        return []
    way = tightest_way()
    with tqdm(total=len(jobs), desc="     grading", delay=3, leave=False) as bar:
        def serve(_):
            with contextlib.closing(Worker(way)) as one, contextlib.suppress(IndexError):
                while True:
                    i, job = left.popleft()
                    reports[i] = one.run(*job, call_seconds, answer_seconds)
                    bar.update()
        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(serve, range(workers)))
            finally:
                left.clear()  # after Ctrl-C nobody takes another job
    return [reports[i] for i in range(len(jobs))]
