"""The grader: exact values, and a corpus of programs out to fool, hang or harm it (tests/programs.py), under every
containment that works here."""
import ast
import copy
import importlib
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import env
from env import Grader, Task, extract_code, grade, load_tasks
from machinery import sandbox, sandbox_worker
from tests.programs import PROGRAMS, RIGHT

pytestmark = pytest.mark.slow

COLBENCH = Path(__file__).resolve().parent.parent.parent / "shared" / "colbench" / "backend.jsonl"
FAST = {"call_seconds": 0.7, "answer_seconds": 6.0}


def task(source, *calls, **extra):
    return Task("p", source, {f"test{i}": call for i, call in enumerate(calls, 1)}, **extra)


SQUARE = task(RIGHT, "f(0)", "f(1)", "f(2)", "f(3)")


def kinds():
    """Each way to contain that works here, once: {first word of what is said: index}."""
    found = {}
    for way, (text, _, _) in enumerate(sandbox.ways()):
        found.setdefault(text.split(":")[0], way)
    return found


@pytest.fixture(params=["bubblewrap", "a PID namespace", "limits alone"])
def kind(request, monkeypatch):
    way = kinds()[request.param]
    if not sandbox.works(way):
        pytest.skip(f"{request.param} does not work here (bubblewrap: apt install bubblewrap)")
    monkeypatch.setattr(sandbox, "tightest_way", lambda: way)
    return request.param


# ------------------------------------------------------------------ hostile, awkward and benign programs

def test_every_program_of_the_corpus_gets_what_it_has_earned_and_harms_no_other(kind):
    if kind == "a PID namespace":
        pytest.skip("takes half a minute; runs with more containment and with less")
    names = list(PROGRAMS)
    random.Random(1).shuffle(names)
    answers = [text for i, name in enumerate(names) for text in (PROGRAMS[name][1], f"{RIGHT}# neighbour {i}\n")]
    rewards = grade(answers, [SQUARE] * len(answers), **FAST, workers=2)
    earned = {name: PROGRAMS[name][0] for name in names if PROGRAMS[name][0] is not None}
    assert len(names) >= 80
    assert {name: reward for name, reward in zip(names, rewards[::2]) if name in earned} == earned
    assert rewards[1::2] == [1.0] * len(names), "another program paid for it"


def family(root):
    """The processes that descend from one, by what /proc says: pids."""
    parents, found = {}, set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass
    while more := {pid for pid, parent in parents.items() if parent in found | {root}} - found:
        found |= more
    return found


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_orphans_are_gone_and_write_nothing_later(kind, tmp_path):
    os.chmod(tmp_path, 0o777)
    mark, before = tmp_path / "late", family(os.getpid())
    program = PROGRAMS["daemon"][1].replace("time.sleep(99)", f"time.sleep(1.5)\n            open({str(mark)!r}, 'w')")
    assert grade([program], [SQUARE], **FAST) == [1.0]
    assert family(os.getpid()) <= before
    time.sleep(2)
    assert not mark.exists()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_nothing_outlives_a_grader_that_is_killed(kind, tmp_path):
    """No folder, and not even the program that was running: the worker sees the end of its orders, kills everybody and
    leaves."""
    start = (f"from machinery import sandbox; sandbox.tightest_way = lambda: {sandbox.tightest_way()}; "
             "sandbox.run([('import os\\nos.fork()\\nwhile True: pass', ['1'])], 60, 60, 1)")
    os.chmod(tmp_path, 0o711)
    parent = subprocess.Popen([sys.executable, "-c", start], cwd=Path(env.__file__).parent,
                              env={**os.environ, "TMPDIR": str(tmp_path)})
    end = time.monotonic() + 20
    while len(family(parent.pid)) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    born = family(parent.pid)
    assert len(born) >= 4, "worker, stem, call and its child should be there by now"
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in born) and time.monotonic() < end:
        time.sleep(0.05)
    assert [pid for pid in born if os.path.exists(f"/proc/{pid}")] == [] and list(tmp_path.iterdir()) == []


def test_a_canary_folder_and_a_listening_socket_stay_untouched(kind, tmp_path, monkeypatch):
    if kind != "bubblewrap":
        pytest.skip("promised only under bubblewrap")
    (tmp_path / "canary").write_text("secret")
    os.chmod(tmp_path, 0o777)
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "1")
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    steal = f"""
import os, socket
def tries():
    yield lambda: open({str(tmp_path / 'canary')!r}).read()
    yield lambda: open({str(tmp_path / 'new')!r}, 'w')
    yield lambda: open({str(Path(env.__file__))!r}).read()
    yield lambda: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)
    yield lambda: open('/proc/1/environ').read()
    yield lambda: open('/etc/passwd').read()
    yield lambda: os.listdir({str(tmp_path.parent)!r})
    yield lambda: open('/usr/new', 'w')
    yield lambda: open('/new', 'w')
    yield lambda: os.environ['SECRET_OF_THE_PARENT']
    yield lambda: os.statvfs('/').f_flag & os.ST_RDONLY and open('/no such file')
def f(x):
    for i, attempt in enumerate(tries()):
        try:
            attempt()
        except (OSError, KeyError):
            continue
        return f'attempt {{i}} succeeded'
    return [x, x * x]
"""
    with server:
        assert grade([steal], [SQUARE], **FAST) == [1.0]
        assert (tmp_path / "canary").read_text() == "secret" and os.listdir(tmp_path) == ["canary"]
        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_program_sees_anothers_job_or_result(kind):
    """The worker forks before the job is read: nothing of an earlier program is in the memory that a later inherits."""
    spy = "import gc\ndef f(x):\n    return sum('MARK' + 'ED' in str(o) for o in gc.get_objects() if type(o) is list)"
    marked = "import os\nMARKED = 'MARKED'\ndef f(x):\n    return 'MARKED'"
    assert grade([marked, spy], [task("def f(x):\n    return 0", "f(0)")] * 2, workers=1) == [0.0, 1.0]


def test_says_once_which_containment_is_in_force(capfd):
    sandbox.tightest_way.cache_clear()
    for answer in (RIGHT + "# 1", RIGHT + "# 2"):
        grade([answer], [SQUARE])
    lines = [line for line in capfd.readouterr().err.splitlines() if "answers run under" in line]
    assert len(lines) == 1 and any(name in lines[0] for name in kinds())


def test_order_and_number_of_workers_change_nothing(kind):
    answers = [PROGRAMS[name][1] for name in ("wrong", "some_raise", "os_exit", "file_from_earlier_call", "right")]
    rewards = grade(answers, [SQUARE] * 5, workers=1, **FAST)
    assert grade(answers[::-1], [SQUARE] * 5, workers=3, **FAST)[::-1] == rewards == [0.5, 0.5, 0.75, 1.0, 1.0]


def test_a_grader_remembers_what_it_ran_but_not_what_ran_out(monkeypatch):
    runs, real = [], sandbox.Worker.run
    monkeypatch.setattr(sandbox.Worker, "run", lambda self, *job: runs.append(job[0]) or real(self, *job))
    right, slow = RIGHT + "\n# mine", "import time\ndef f(x):\n    time.sleep(9)"
    grader, once = Grader(**FAST), task(RIGHT, "f(1)")
    for _ in range(2):
        assert grader([right, slow], [once] * 2) == [1.0, 0.0]
    assert runs.count(RIGHT) == runs.count(right) == 1 and runs.count(slow) > 1
    assert Grader(**FAST)([right], [once]) == [1.0] and runs.count(right) == 2


def test_a_vandal_spoils_no_other_answer(kind):
    two = task("def f():\n    return len([1, 2])", "f()")
    vandal = "import builtins\nbuiltins.len = lambda x: 2\ndef f():\n    return len([])"
    honest = "def f():\n    return len([])"
    assert grade([vandal, honest, vandal + "\n#", honest + "\n#"], [two] * 4, workers=1) == [1.0, 0.0, 1.0, 0.0]


MEDDLERS = {  # changes to the worker that would last, were it not replaced
    "file_size": "resource.prlimit(PID, resource.RLIMIT_FSIZE, (1, 1))",
    "data": "resource.prlimit(PID, resource.RLIMIT_DATA, (10 ** 7, 10 ** 7))",
    "processes": "resource.prlimit(PID, resource.RLIMIT_NPROC, (0, 0))",
    "priority": "os.setpriority(os.PRIO_PROCESS, PID, 19)",
    "affinity": "os.sched_setaffinity(PID, {0})",
    "memory": "ctypes.CDLL(None).process_vm_writev(PID, 0, 0, 0, 0, 0)",
    "trace": "ctypes.CDLL(None).ptrace(16, PID, 0, 0)",
    "shared_memory": "ctypes.CDLL(None).shmget(0, 10 ** 8, 0o1666)",
    "stop": "os.kill(PID, 19)",
    "rights": "os.chmod('.', 0o500)",
    "attribute": "os.setxattr('.', 'user.a', b'1')",
    "rules": "os.setxattr('.', 'system.posix_acl_default', bytes.fromhex('02000000' + ''.join("
             "t + '000000ffffffff' for t in ('01', '04', '20'))))",
    "messages": "ctypes.CDLL(None).msgget(0, 0o1666)",
    "folder": "os.rmdir(os.getcwd())",
}


def test_who_meddles_with_the_worker_harms_no_other_answer(kind):
    writes = ("def f(x):\n    with open('a', 'w') as file:\n        file.write('abc' * 10 ** 5)\n"
              "    return [x, x * x] if open('a').read() else 0\n")
    answers = []
    for name, act in MEDDLERS.items():
        code = act.replace("PID", "os.getppid() if os.getppid() == 1 else int(open(f'/proc/{os.getppid()}/stat').read()"
                                  ".rpartition(')')[2].split()[1])")
        answers += [f"import ctypes, os, resource\n# {name}\ndef f(x):\n    try:\n        {code}\n"
                    "    except Exception:\n        pass\n    return [x, x * x]\n", f"{writes}# {name}\n"]
    if kind == "bubblewrap":
        answers = [a.replace("os.getppid() if os.getppid() == 1 else int(open(f'/proc/{os.getppid()}/stat').read()"
                             ".rpartition(')')[2].split()[1])", "1") for a in answers]
    assert grade(answers, [SQUARE] * len(answers), **FAST, workers=1)[1::2] == [1.0] * len(MEDDLERS)


def test_devices_and_shared_memory_are_there(kind):
    answer = ("import multiprocessing, os, subprocess\ndef f(x):\n    open('/dev/null', 'w').write('x')\n"
              "    subprocess.run(['true'], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)\n"
              "    lock = multiprocessing.Lock()\n    assert len(open('/dev/urandom', 'rb').read(3)) == 3\n"
              "    return [x, x * x]\n")
    assert grade([answer], [SQUARE]) == [1.0]


def test_nothing_stays_from_one_call_to_the_next(kind):
    answer = ("import os, tempfile\ndef f(x):\n    seen = os.listdir('..'), os.listdir(tempfile.gettempdir())\n"
              "    open(os.path.join(tempfile.gettempdir(), 'state'), 'w').close()\n    open('state', 'w').close()\n"
              "    return [x, x * x] if 'state' not in str(seen) else seen\n")
    assert grade([answer], [SQUARE]) == [1.0]
    hoarder = ("def f(x):\n    memo = [0] * (4 * 10 ** 7)\n    def rec(n):\n"
               "        return memo[0] if n == 0 else rec(n - 1)\n    return [x, x * x + rec(3)]\n")
    assert grade([hoarder], [SQUARE], call_seconds=5.0) == [1.0]


def test_processes_of_one_call_are_gone_before_the_next(kind):
    answer = ("import os, time\ndef f(x):\n    if x == 0 and os.fork() == 0:\n        os.setsid()\n"
              "        while True:\n            open('alive', 'w').close()\n    time.sleep(0.2)\n"
              "    return [x, x * x] if x == 0 or not os.path.exists('alive') else 'it lives'\n")
    assert grade([answer], [SQUARE]) == [1.0]


def test_programs_of_a_root_have_no_rights(kind):
    """But one outside of bubblewrap: to read (CAP_DAC_READ_SEARCH, the value 4)."""
    if os.getuid():
        pytest.skip("needs root")
    answer = ("import ctypes, os\ndef f():\n    rights = (ctypes.c_uint32 * 6)()\n"
              "    ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522), rights)\n"
              "    return [os.getuid() > 0, rights[0] | rights[1] | rights[3] | rights[4]]\n")
    allowed = [[True, 0], [True, 4]][:1 if kind == "bubblewrap" else 2]
    tasks = [task(f"def f():\n    return {value}", "f()") for value in allowed]
    assert max(grade([answer] * len(tasks), tasks)) == 1.0


SPINNERS = """
import os, time
def f(x):
    for i in range(30):
        try:
            if os.fork() == 0:
                os.setsid()
                while True:
                    pass
        except OSError:
            pass
    time.sleep(0.5)
    return [x, x * x]
"""
BUSY_AND_RIGHT = """
import time
def f(x):
    end = time.process_time() + 0.15
    while time.process_time() < end:
        pass
    return [x, x * x]
"""


def test_a_program_that_takes_the_processors_costs_no_other_its_reward(kind):
    answers = [SPINNERS, BUSY_AND_RIGHT, SPINNERS + "#", BUSY_AND_RIGHT + "#"]
    assert grade(answers, [task(RIGHT, "f(1)", "f(2)")] * 4, workers=2, **FAST)[1::2] == [1.0] * 2


def test_who_sleeps_or_loops_is_not_run_again(kind, monkeypatch):
    runs, real = [], sandbox.Worker.run
    monkeypatch.setattr(sandbox.Worker, "run", lambda self, *job: runs.append(job[0]) or real(self, *job))
    monkeypatch.setattr(sandbox, "BUSY", 0.05)  # a loop gets more of a processor even where other guests take theirs
    sleeps, loops = ("def f(x):\n    time.sleep(9)\nimport time", "def f(x):\n    while x: pass\n    return [x, x * x]")
    assert grade([sleeps, loops], [task(RIGHT, "f(0)", "f(1)")] * 2, workers=2, **FAST) == [0.0, 0.5]
    assert runs.count(sleeps) == runs.count(loops) == 1


def test_what_dies_without_a_word_gets_one_more_try(kind, monkeypatch):
    real, tries = sandbox.listen, []

    def deaf(ours, *given):
        tries.append(1)
        if len(tries) > 1:
            real(ours, *given)
    monkeypatch.setattr(sandbox, "listen", deaf)
    assert grade([RIGHT + "#"], [task(RIGHT + "##", "f(1)")], workers=1) == [1.0] and len(tries) == 3


def test_a_flood_is_not_kept():
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        said = pool.submit(theirs.sendall, b"x" * 2 ** 25 + b"\nready !\n0 !no\n")
        tracemalloc.start()
        sandbox.listen(ours, reports := [], 1, 30, time.monotonic() + 60)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        said.result()
    assert reports == ["!no"] and peak < 2 ** 20


def test_what_is_no_report_is_not_read():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\n0 \n0\n 0 5\n0 5 \n0  5\n1 6\n0 +5\n0 5\x00\n-0 5\n0 77\n1 !\n")
        reports = []
        sandbox.listen(ours, reports, 2, 5, time.monotonic() + 5)
    assert reports == ["77", "!"]


@pytest.mark.parametrize("share", [False, True])
def test_a_call_can_start_only_so_many_processes(kind, share, monkeypatch):
    """share: a program with a door that we do not know has one process for all of its calls."""
    forks = """
import os, time
def f(x):
    for _ in range(100):
        try:
            if os.fork() == 0:
                time.sleep(99)
        except OSError:
            return [x, x * x]
    return 'no limit'
"""
    far_side = Path(sandbox_worker.__file__).read_text(encoding="utf-8")
    if share:
        fooled = far_side.replace("if __name__ ==", "leaves_no_trace = lambda code: True\n\n\nif __name__ ==")
        assert fooled != far_side
        monkeypatch.setattr(Path, "read_text", lambda path, **_: fooled)
    assert grade([forks], [SQUARE], **FAST) == [1.0]


def test_a_flood_costs_only_its_own_call(kind):
    """Its clock runs although there is always something to read."""
    answers = [PROGRAMS["flood_everywhere"][1] + f"# {i}" for i in range(2)]
    assert grade(answers, [SQUARE] * 2, **FAST) == [0.75] * 2


def test_two_threads_may_grade_at_the_same_time(kind):
    with ThreadPoolExecutor(2) as pool:
        rewards = list(pool.map(lambda k: grade([f"{RIGHT}# {k} {i}" for i in range(8)], [SQUARE] * 8), range(2)))
    assert rewards == [[1.0] * 8] * 2


# ------------------------------------------------------------------ values

def test_the_reward_is_the_share_of_calls():
    reference = task("def f(x):\n    return x", "f(1)", "f(2)", "f(3)", "f(4)")
    assert grade(["def f(x):\n    return x if x < 3 else 0"], [reference]) == [0.5]
    assert grade(["anything"], [Task("p", "g")]) == [0.0]  # no tests: nothing was passed


def test_failures_and_none_never_count():
    for answer in ("", "def f(:", "raise ValueError", "def g():\n    return 1", "def f():\n    return None"):
        assert grade([answer, answer], [task("def f():\n    return 1", "f()"), task(answer, "f()")]) == [0.0, 0.0]



VALUES = [  # reference, answer, whether == calls them equal (NaN counting as equal to itself)
    ("float('nan')", "float('nan')", 1), ("[float('nan')]", "[float('nan')]", 1), ("{1, 2, 3}", "{3, 2, 1}", 1),
    ("{1, 2}", "frozenset([1, 2])", 1), ("{'a': 1, 'b': [2]}", "{'b': [2.0], 'a': True}", 1), ("{1: 2}", "{1: 3}", 0),
    ("{1: 2}", "{'1': 2}", 0), ("1", "'1'", 0), ("b'a'", "bytearray(b'a')", 1), ("b'a'", "'a'", 0),
    ("(1, 2)", "[1, 2]", 0), ("1 + 0j", "1", 1), ("1 + 1j", "1 + 2j", 0), ("range(0, 3)", "range(3)", 1),
    ("range(3)", "[0, 1, 2]", 0), ("0.1 + 0.2", "0.3", 0), ("-0.0", "0", 1), ("float('inf')", "1e400", 1),
    ("10 ** 30", "1e30", 0), ("2 ** 70", "2.0 ** 70", 1), ("'\\ud800'", "'\\ud800'", 1), ("'a\\x00b'", "'a\\x00b'", 1),
    ("'\\ud83d\\ude00'", "'\\U0001f600'", 0), ("['a,b']", "['a', 'b']", 0), ("['1/1']", "[1]", 0), ("[]", "()", 0),
    ("{}", "set()", 0), ("''", "[]", 0), ("False", "0.0", 1), ("[None]", "[None]", 1), ("None", "None", 0),
    ("datetime.datetime(2024, 1, 2)", "datetime.datetime(2024, 1, 1) + datetime.timedelta(1)", 1),
    ("datetime.date(2024, 1, 2)", "datetime.datetime(2024, 1, 2)", 0),
    ("datetime.timedelta(hours=24)", "datetime.timedelta(1)", 1), ("datetime.date(2024, 1, 2)", "'2024-01-02'", 0),
    ("datetime.datetime(2024, 1, 2, 12, tzinfo=datetime.timezone.utc)",
     "datetime.datetime(2024, 1, 2, 13, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))", 1),
    ("decimal.Decimal('0.5')", "fractions.Fraction(1, 2)", 1), ("decimal.Decimal('0.1')", "0.1", 0), ("int", "int", 1),
    ("int", "float", 0), ("collections.Counter('aab')", "{'a': 2, 'b': 1}", 1), ("{1: 0}.keys()", "{1}", 1),
    ("collections.namedtuple('P', 'x y')(1, 2)", "(1, 2)", 1), ("10 ** 400 + 1", "10 ** 400", 0),
    ("1 + 10 ** 400", "10 ** 400 + 1", 1),
    ("datetime.time(12, tzinfo=datetime.timezone.utc)",
     "datetime.time(13, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))", 1),
    ("datetime.time(0, 30, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))",
     "datetime.time(23, 30, tzinfo=datetime.timezone.utc)", 0),
    ("datetime.time(12)", "datetime.time(12, tzinfo=datetime.timezone.utc)", 0),
    ("datetime.date(2024, 1, 2)", "type('D', (datetime.date,), {})(2024, 1, 2)", 1),
    ("datetime.timedelta(1)", "type('D', (datetime.timedelta,), {})(1)", 1),
    ("datetime.timedelta(1)", "datetime.timedelta(2)", 0), ("datetime.time(1)", "datetime.time(2)", 0),
    ("datetime.datetime(2024, 1, 1, fold=1)", "datetime.datetime(2024, 1, 1)", 1),
    ("5", "type('O', (), {'as_integer_ratio': lambda self: (5, 1)})()", 0)]
NUMPY = [("numpy.float64(0.5)", "0.5", 1), ("numpy.int64(3)", "3", 1), ("numpy.bool_(True)", "True", 1),
         ("numpy.array([1, 2])", "numpy.array([1.0, 2.0])", 1), ("numpy.array([1, 2])", "numpy.array([1, 3])", 0),
         ("numpy.zeros((2, 1))", "numpy.zeros((1, 2))", 0), ("[numpy.bool_(True)]", "[True]", 1),
         ("numpy.array([numpy.nan])", "numpy.array([numpy.nan])", 1), ("numpy.longdouble(0.5)", "0.5", 1),
         ("numpy.datetime64('2024-01-01')", "numpy.datetime64('2024-01-01T00:00')", 1),
         ("numpy.datetime64('2024-01-01')", "numpy.datetime64('2024-01-02')", 0),
         ("numpy.datetime64('2024-01-01T00:00:00.000000001')", "numpy.datetime64('2024-01-01T00:00:00')", 0),
         ("numpy.timedelta64(60, 's')", "numpy.timedelta64(1, 'm')", 1),
         ("numpy.array(['2024-01-01'], 'M8[D]')", "numpy.array(['2024-01-01'], 'M8[s]')", 1)]


def test_values_compare_as_python_sees_them(kind):
    heads = ["import datetime, decimal, fractions, collections"] * len(VALUES) + ["import numpy"] * len(NUMPY)

    def returns(head, expression):
        return f"{head}\ndef f():\n    return {expression}\n"
    tasks = [task(returns(head, reference), "f()") for head, (reference, _, _) in zip(heads, VALUES + NUMPY)]
    answers = [returns(head, answer) + "#" for head, (_, answer, _) in zip(heads, VALUES + NUMPY)]
    wanted = [(answer, float(equal)) for answer, (_, _, equal) in zip(answers, VALUES + NUMPY)]
    assert list(zip(answers, grade(answers, tasks))) == wanted


def test_hash_order_random_numbers_and_scratch_agree_with_themselves(kind):
    sources = ["def f():\n    return list({'a', 'bc', 'def', 'q', 3.5, ('x',)})\n",
               "import random\ndef f():\n    return [random.random() for _ in range(3)]\n",
               "import numpy\ndef f():\n    return numpy.random.rand(3)\n",
               "def f():\n    return __import__('random').random()\n",
               "import importlib\ndef f():\n    return importlib.import_module('random').random()\n",
               "def f():\n    exec('import random')\n    return eval('random.random()')\n",
               "def f():\n    return hash(None)\n",  # it orders sets, and is an address before Python 3.12
               "import os, sqlite3\ndef f():\n    sqlite3.connect('a.db').execute('create table t (x int)')\n"
               "    return sorted(os.listdir('.'))\n"]
    if kind == "bubblewrap" and "/tmp" not in " ".join(sandbox.ways()[0][1]).split(" --dir ")[1:]:
        # elsewhere it is the real one, and where Python lies below it, it cannot be written
        sources.append("def f():\n    open('/tmp/a', 'w').write('a')\n    return open('/tmp/a').read()\n")
    tasks = [task(source, "f()", "f()") for source in sources] * 3
    answers = [f"{t.ground_truth}# {i}" for i, t in enumerate(tasks)]
    assert grade(answers, tasks, workers=2) == [1.0] * len(tasks)


def test_a_broken_reference_is_reported_with_its_line(kind, tmp_path, capfd):
    bad = "def f(x):\n    y = 1\n    return 1 / x\n"
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n" + json.dumps(task(bad, "f(1)", "f(0)").to_record()) + "\n")
    assert grade([bad + "#"], load_tasks(file)) == [0.5]
    told = [line for line in capfd.readouterr().err.splitlines() if "broken" in line]
    assert told == [f"{file}, line 2: broken task: its reference fails on test2, f(0): "
                    "ZeroDivisionError: division by zero (line 3)"]
    slow = task("def f(x):\n    while x:\n        pass\n    return 1\n", "f(0)", "f(1)")
    assert grade([slow.ground_truth], [slow], **FAST) == [0.5]
    assert "task: broken task: its reference fails on test2, f(1): out of time" in capfd.readouterr().err


def test_there_is_one_task_for_each_answer():
    with pytest.raises(ValueError, match="2 answers to 1 tasks"):
        grade(["a", "b"], [SQUARE])
    assert grade([], []) == []


def test_extract_code():
    assert extract_code("x = 1") == "x = 1"
    assert extract_code("a\n```python\nx = 1\n```\nb") == "x = 1\n"
    assert extract_code("a\n~~~py\nx = 1\n~~~\nb\n```python\ny = 2\n```") == "x = 1\n\ny = 2\n"
    assert extract_code("```py3\nx = 1\n````\nb") == "x = 1\n"
    blank = "s = '''\n   \n'''\n"
    assert extract_code(f"```python\n{blank}```") == blank
    assert extract_code("- here:\n   ```python\n   x = 1\n   ```\n") == "x = 1\n"
    start = time.process_time()  # of this process alone: a busy machine makes no difference
    assert extract_code("```" + "a" * 20000 + "`\n" + "```" + " " * 20000 + "`") is not None
    assert time.process_time() - start < 2, "not linear in the length of a line"
    quoted = 'def f():\n    """\n    ```\n    no\n    ```\n    """\n'
    assert extract_code(quoted) == quoted


@pytest.mark.parametrize("source", [
    "import os", "from os import path", "import math as m\nm.floor = 1", "x.__class__", "x._y", "g.gi_frame",
    "getattr(x, 'y')", "type('A', (), {})", "class A: pass", "x.y = 1", "del x.y", "x.y += 1", "for x.y in z: pass",
    "with a as x.y: pass", "open('a')", "exec('a')", "eval('a')", "__import__('os')", "globals()", "import re.enum",
    "from collections import abc", "match x:\n    case object(gi_frame=f): pass", "import typing\ntyping.sys",
    "import math.os", "def __f__(): pass", "f = print; f = input", "from . import a",
    "import re\nre.enum.sys", "from re import enum", "import string", "from random import _inst", "import json",
    "from typing import get_type_hints", "'{0.a}'.format(f)", "import typing\ntyping.overload(f)",
    "from typing import get_args", "import typing as t\nt.final(f)",
    "try:\n    f.a\nexcept AttributeError as e:\n    y = e.obj",
    "import datetime\ndatetime.sys", "def f(a=open): pass", "x = __builtins__"])
def test_what_may_leave_a_trace_gets_a_process_for_each_call(source):
    assert not sandbox_worker.leaves_no_trace(compile(source, "<answer>", "exec"))


@pytest.mark.parametrize("source", [
    RIGHT, "import math\ny = math.pi", "import re, random\ny = re.sub('a', 'b', str(random.random()))",
    "from typing import List\ndef f(x: List[int]) -> int:\n    return sum(x)", "def f(): yield 1",
    "from math import *", "async def f(): pass", "import typing", "def f(x): return {'_': 'open'}[x]",
    "def f(_x): return _x\nif __name__ == '__main__':\n    print(f(3))",
    "from collections import Counter\nx = Counter('ab').most_common(1)", "for _ in range(3): pass",
    "try:\n    1 / 0\nexcept ValueError as e:\n    pass", "x = [i for i in range(3) if i]\nx[0] = 1\nprint(f'{x!r}')"])
def test_small_functions_share_a_process(source):
    assert sandbox_worker.leaves_no_trace(compile(source, "<answer>", "exec"))


def test_every_module_inside_a_pure_one_is_a_door():
    inside = {name for module in sandbox_worker.PURE for name, value in vars(importlib.import_module(module)).items()
              if isinstance(value, type(sys)) and name[0] != "_"}
    assert inside - sandbox_worker.PURE <= sandbox_worker.DOORS | {"stdlib_re"}


# ------------------------------------------------------------------ real tasks, and an independent oracle

def real_tasks():
    if not COLBENCH.exists():
        pytest.skip(f"the real ColBench tasks are not at {COLBENCH}")
    return load_tasks(COLBENCH)


def test_real_references_agree_with_themselves(kind):
    tasks = real_tasks()
    rewards = grade([f"{t.ground_truth}\n# a run of its own" for t in tasks], tasks)
    assert len(rewards) == 200 and sum(reward == 1.0 for reward in rewards) >= 198


class Edit(ast.NodeTransformer):
    """Change the n-th place of a program that can be changed: a number, an operator or a comparison."""
    SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.Lt: ast.LtE,
             ast.Gt: ast.GtE, ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or,
             ast.Or: ast.And, ast.In: ast.NotIn}

    def __init__(self, n):
        self.n = n

    def generic_visit(self, node):
        super().generic_visit(node)
        number = isinstance(node, ast.Constant) and type(node.value) in (int, float)
        if number or type(node) in self.SWAPS:
            self.n -= 1
            if self.n == -1:
                return ast.copy_location(ast.Constant(node.value + 1), node) if number else self.SWAPS[type(node)]()
        return node


ORACLE = """
import random, sys, json
sys.stdout = open('/dev/null', 'w')
def same(a, b):
    try:
        return bool(a == b or a != a and b != b)
    except Exception:
        import numpy
        return bool(numpy.array_equal(a, b))
values = []
for source in json.load(sys.stdin):
    random.seed(0)
    if 'numpy' in source:
        import numpy
        numpy.random.seed(0)
    space = {'__name__': 'answer'}
    try:
        exec(source, space)
        values.append(eval(sys.argv[1], space))
    except BaseException as error:
        values.append(None)
sys.__stdout__.write(str(int(values[0] is not None and values[1] is not None and same(*values))))
"""


def oracle(job):
    """The slow, obvious way: a new interpreter for each call, both programs in it, compared with ==."""
    source, reference, calls, folder = job
    variables = {"PYTHONHASHSEED": "0", "PATH": os.environ["PATH"], "HOME": folder, "OMP_NUM_THREADS": "1"}
    passed = 0
    for call in calls:
        try:
            done = subprocess.run([sys.executable, "-s", "-c", ORACLE, call], input=json.dumps([reference, source]),
                                  capture_output=True, text=True, timeout=4, cwd=folder, env=variables)
            passed += done.stdout.strip() == "1"
        except subprocess.TimeoutExpired:
            pass
    return passed / len(calls)


def test_mutants_of_the_real_references_get_the_oracles_reward(tmp_path):
    """One edit each; three calls a task, so that the oracle takes a minute."""
    rng, answers, tasks = random.Random(0), [], []
    for t in real_tasks():
        if "sqlite" in t.ground_truth or "open(" in t.ground_truth:
            continue  # these leave files, which the oracle's calls would share
        tree, probe = ast.parse(t.ground_truth), Edit(-1)
        probe.visit(copy.deepcopy(tree))
        if places := -1 - probe.n:
            answers.append(ast.unparse(ast.fix_missing_locations(Edit(rng.randrange(places)).visit(tree))))
            tasks.append(task(t.ground_truth, *rng.sample(sorted(t.test_cases.values()), 3)))
    rewards = grade(answers, tasks)
    jobs = [(a, t.ground_truth, list(t.test_cases.values()), str(tmp_path)) for a, t in zip(answers, tasks)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        expected = pool.map(oracle, jobs, chunksize=4)
    assert len(answers) >= 150
    assert 0.2 < sum(r == 1.0 for r in rewards) / len(rewards) < 0.8, "the mutants are too easy to tell, or no mutants"
    assert list(enumerate(rewards)) == list(enumerate(expected))
