"""Where strangers' programs run: warm processes that fork for each program, contain it, and report what it returned.

The reward is the only ground truth of the whole method, and it comes from running code that a language model wrote.
So this must be exact (a right answer gets 1.0 every time), contained (a hostile one fools, hangs and harms nobody) and
fast (a fresh Python for each call would take thirty times as long as the call).

    run(jobs) -> one thread and one warm *worker* process a core -> a forked *stem* a program -> a forked child a call

- The **parent** (your process) hands out jobs, each with a socket of its own, keeps the clock, and compares. It never
  parses, compiles or runs an answer, nor looks for the program in it, and what comes back of a call is one line: the
  hash (64 bits) of its value's canonical text, in which two values agree exactly where Python's == says so. Whatever an
  answer patches, forges or floods, it can give one guess a call.
- The **worker** only forks, kills and wipes. It never sees a job or a result, so that no program finds another one's
  answers in the memory that it inherits. It is process 1 of a namespace of its own, which no signal from inside can
  end, and from which nothing escapes: when it kills "everybody", that is everybody. A program that changes what it can
  of its worker (limits, priority, the folder's rights, shared memory) costs the worker its place, and nobody a reward.
- The **stem** gives up what rights there are, reads one job, finds the program in its answer (machinery/program.py),
  loads the modules that it names and forks a child for each call: definitions, modules, files and processes of one call
  are gone before the next. Programs that provably only compute (`leaves_no_trace`; most small functions) run in the
  stem itself; nothing is contained any less for that.

A fork costs what its memory costs: some 500 pages are copied or mapped for a small program, half of its time. So the
worker imports little, and one fork serves all calls of a program where that can be.

What is contained, with bubblewrap (Debian: `apt install bubblewrap`; used where a trial shows that it works): no
network; nothing is readable but the installed software (no home, no /proc, no environment), nothing writable but a
scratch folder of 64 MiB in memory (/tmp, too) that is wiped after every call. Always: one second a call, ten a program;
for each process 1 GiB of data, 4 GiB of address space, 16 MiB a file, 256 descriptors, no core dumps; output to
nowhere; 32 processes a call (threads count), where a user id or a namespace of its own makes them countable.
Without bubblewrap a PID namespace, or nothing but limits, whichever works first, and for root a user id that belongs to
nobody: rewards are exact and programs end in time, but they can read and write what your user can, and use the network
(/tmp is the real one). With limits alone, which is also all there is on macOS, a program of a user who is not root can
hunt down its worker and leave a process behind, or kill *all* your processes; and programs that run at the same time
share one limit on processes.
Not contained in any case: holes in the kernel, side channels, kernel keyrings, and answers that look for the reference
where they can read it. The sum over processes is not limited: 32 of them may take 32 GiB, and System V segments more.
Programs of one worker can leave each other notes (POSIX message queues). Wiping what a program left may take a second
or two beyond its ten. A grader that is killed leaves no process, and no file unless its worker was killed as well.

Limits of exactness: time is wall-clock (a program that ran out while others had the processors runs again, by itself,
at the end; a machine that is busy with something else can still cost a call); sets order what has no hash of its own by
address (None has the same one in all workers where `setarch` is); uuid4, os.urandom, numpy's default_rng() and the
clock are not seeded; a datetime64 is never a date, and an hour that the clocks run through twice is that of UTC; a
value may hold 10^6 letters and parts and nest about 300 deep; values of kinds that `canonical` does not know (Path,
UUID, Enum, dataclass, DataFrame, functions, your own classes) equal nothing; an OrderedDict compares like a dict, and a
float32 by its exact value; of two values that differ, one pair in 2^64 hashes alike.

No torch here. Exercised by `python -m pytest tests/test_grade.py`; measured by `python -m bench.grade`.
"""
import collections
import contextlib
import functools
import inspect
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
from typing import NamedTuple

from tqdm import tqdm

from kernels import ranks
from machinery import program
from machinery.files import note

COUNTER = itertools.count()
BUSY = 0.7  # of the time on a processor: whoever had less, and did not sleep, had to wait for others
REPORT = re.compile(rb"(\d{1,6}|ready) (-?[0-9]{1,20}|![ -~]{0,300})")


class Way(NamedTuple):
    """What can contain a worker."""
    says: str
    command: list   # in front of the worker's own
    own_user: bool  # each worker is a user of its own


def ways():
    """The ways to contain a worker, the tightest first."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    shown = sorted({"/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives", sys.prefix,
                    sys.base_prefix, *packages})
    roads = set()
    for path in shown:
        roads |= {str(parent) for parent in Path(path).parents if len(parent.parts) > 1}
    roads = sorted(roads)
    root = os.getuid() == 0
    apart = "--unshare-pid --unshare-net --unshare-ipc --unshare-uts --cap-add ALL" if root else "--unshare-all"
    bwrap = f"bwrap {apart} --as-pid-1 --die-with-parent".split()
    bwrap += [word for path in [*roads, "/dev"] for word in ("--dir", path)]
    bwrap += [word for path in shown for word in ("--ro-bind-try", path, path)]
    bwrap += [word for name in ("null", "zero", "random", "urandom") for word in ("--dev-bind", *[f"/dev/{name}"] * 2)]
    bwrap += f"--size {2 ** 26} --tmpfs /scratch --symlink /scratch /dev/shm --chdir /scratch".split()
    bwrap += [] if "/tmp" in roads else "--symlink /scratch /tmp".split()  # where Python itself does not lie there
    bwrap += "--remount-ro /".split()
    unshare = f"unshare {'' if root else '--user --map-root-user'} --pid --ipc --fork --kill-child".split()
    worse = "they can read and write what you can (for more, apt install bubblewrap)"
    return [
        Way("bubblewrap: no network, no files of yours", bwrap, root),
        Way(f"a PID namespace: {worse}", unshare, root),
        Way(f"limits alone: {worse}", [], root),
        Way(f"limits alone: {worse}", [], False),
    ]


class Worker:
    """A warm process for one thread of `run`: it takes orders on one socket, and a socket for each program."""

    def __init__(self, way):
        self.way, self.process = way, None
        self.start()

    def start(self):
        self.close()
        _, command, own_user = ways()[self.way]
        uid = 0
        if own_user:  # nobody else's
            uid = 2 ** 30 + os.getpid() % 2 ** 20 * 2 ** 10 + next(COUNTER) % 2 ** 10
        # the kernel takes these first when memory runs out; same addresses for all (hash(None) may be one)
        lower = """echo 1000 2>/dev/null >/proc/self/oom_score_adj
            setarch -R true 2>/dev/null && exec setarch -R "$@"; exec "$@" """
        far_side = Path(__file__).with_name("sandbox_worker.py").read_text(encoding="utf-8")
        env = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1",
               "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": ".",
               "TMPDIR": ".", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("-packages"))}
        self.scratch = None if "bwrap" in command else tempfile.mkdtemp(prefix="sweet-")
        self.control, theirs = socket.socketpair()
        self.control.settimeout(10)
        with theirs:
            self.process = subprocess.Popen(
                ["sh", "-c", lower, "sh", *command, sys.executable, "-c", far_side, str(uid),
                 inspect.getsource(program)],
                env=env, cwd=self.scratch or "/", stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True)

    def close(self):
        if self.process:
            self.control.close()  # the worker sees it, cleans up and leaves
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
            self.process.kill()
            self.process.wait()
            if self.scratch and os.path.exists(self.scratch):  # a worker that was killed could not; may take time
                subprocess.run(["sh", "-c", '(chmod -R u+rwX "$0"; rm -rf "$0") >/dev/null 2>&1 &', self.scratch])
            self.process = None

    def run(self, source, calls, call_seconds, answer_seconds, last=True):
        """One report a call: the hash of its value, or "!" and what went wrong. Without `last`, None where a program
        ran out of time because others had the processors.

        The first call may have waited for an example at the top level: where it ran out, the next stem looks for that.
        """
        reports, tried, patience, end = [], None, 0, time.monotonic() + answer_seconds
        while len(reports) < len(calls) and time.monotonic() < end:
            known, start, ran_out = len(reports), time.monotonic(), False
            try:
                ours, theirs = socket.socketpair()
                with ours:
                    with theirs:
                        socket.send_fds(self.control, [b"B"], [theirs.fileno()])
                    ours.settimeout(answer_seconds)
                    ours.sendall(marshal.dumps((source, calls, known, patience)))
                    ours.shutdown(socket.SHUT_WR)
                    try:
                        listen(ours, reports, len(calls), call_seconds, end)
                    except TimeoutError:
                        ran_out = True
                took = time.monotonic() - start
                self.control.send(b"E")
                milliseconds, preempted = map(int, self.control.recv(40).split())  # ValueError: it says nothing
            except (OSError, ValueError):  # the worker did not survive this program
                with contextlib.suppress(OSError):  # where none can be started now, the next round tries again
                    self.start()
            else:
                usual = 15 if patience else 5  # whoever sleeps is preempted, too, when processes start and end
                if ran_out and not last and preempted > usual and milliseconds < 1000 * BUSY * took:
                    return None
            if ran_out and not reports:
                patience = call_seconds
            if len(reports) == known and (tried == known or ran_out and known):
                reports.append("!out of time, or its process died")
            tried = known
        return reports + ["!out of time: the program's was up"] * (len(calls) - len(reports))


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
            note(f"sweet: answers run under {text}")
            return way
    raise OSError("programs cannot be run here: no worker process starts")


def run(jobs, call_seconds=1.0, answer_seconds=10.0, workers=None):
    """Run (answer, calls) jobs, in parallel; for each job a list of reports, one a call: a hash of the value that the
    call returned, or "!" and what went wrong."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    left, reports = collections.deque(range(len(jobs))), {}
    workers = min(workers or max(1, cores // ranks.count()), len(jobs))
    if not jobs:
        return []
    way = tightest_way()
    with tqdm(total=len(jobs), desc="     grading", delay=3, leave=False) as bar:
        def serve(last):
            with contextlib.closing(Worker(way)) as one, contextlib.suppress(IndexError):
                while True:
                    i = left.popleft()
                    reports[i] = one.run(*jobs[i], call_seconds, answer_seconds, last)
                    bar.update(reports[i] is not None)
        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(serve, [False] * workers))
                left.extend(sorted(i for i in reports if reports[i] is None))
                if left:  # what had too little of the processors runs by itself
                    serve(True)
            finally:
                left.clear()  # after Ctrl-C nobody takes another job
    return [reports[i] for i in range(len(jobs))]


def failed(report):
    """Whether a call gave no value: its report is then "!" and what went wrong."""
    return report.startswith("!")
