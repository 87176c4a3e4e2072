"""The far side of kernels/sandbox.py: all that runs in the same processes as strangers' programs.

This file is a program, not a module: its text is handed to a fresh Python, `worker` starts, and for each job it forks
a stem, which forks a child for each call. What crosses back is one line a call, "INDEX DIGEST" or "INDEX !REASON".
Nothing here can be trusted once a program has begun to run; kernels/sandbox.py says why that does no harm.
"""
import ast
import builtins
import collections.abc
import contextlib
import ctypes
import datetime
import functools
import gc
import hashlib
import json
import math
import operator
import os
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import traceback

PURE = "bisect collections datetime heapq itertools json math random re".split()  # modules without state


def canonical(value, room):
    """Text that two values share exactly where Python's == calls them equal (NaN equals NaN). room: [letters left]."""
    def each(parts, order=list):
        return "(" + ",".join(order(canonical(part, room) for part in parts)) + ")"
    room[0] -= 1 + (len(value) if isinstance(value, (str, bytes, bytearray)) else 0)
    if room[0] < 0:
        raise ValueError("the value is too large to compare")
    kind = type(value).__name__
    if type(value).__module__ == "numpy" and kind in ("datetime64", "timedelta64"):
        return f"{kind} {value}"
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):  # scalars and arrays compare by value
        return f"array{value.shape}{canonical(value.tolist(), room)}" if value.ndim else canonical(value.item(), room)
    if isinstance(value, complex):
        return each([value.real, value.imag]) if value.imag else canonical(value.real, room)
    if hasattr(value, "as_integer_ratio") and not isinstance(value, type):  # bool, int, float, Fraction, Decimal
        finite = value == value and value not in (math.inf, -math.inf)
        return "{:x}/{:x}".format(*value.as_integer_ratio()) if finite else str(float(value))
    if isinstance(value, str):
        return f"s{len(value)}:{str.__str__(value)}"
    if isinstance(value, (bytes, bytearray)):
        return f"b{bytes(value).hex()}"
    if isinstance(value, dict):
        return "dict" + each(value.items(), sorted)
    if isinstance(value, collections.abc.Set):
        return "set" + each(value, sorted)
    for sequence in (list, tuple, collections.deque):
        if isinstance(value, sequence):
            return sequence.__name__ + each(value)
    if isinstance(value, datetime.datetime) and value.utcoffset() is not None:
        return f"utc {value.replace(tzinfo=None) - value.utcoffset()}"
    if value is None or isinstance(value, (datetime.date, datetime.time, datetime.timedelta)):
        return f"{kind} {value}"
    if isinstance(value, range):
        return f"range {len(value)} {list(value[:2])}"
    home = sys.modules.get(getattr(value, "__module__", None))  # a type or a function of an installed module
    if home and home.__name__ != "answer" and getattr(home, getattr(value, "__qualname__", ""), None) is value:
        return f"{home.__name__}.{value.__qualname__}"
    raise TypeError(f"a {kind} equals nothing but itself")


@functools.lru_cache(maxsize=1)
def doors():
    """Names that lead out of a program's own names: (builtins that do more than compute, modules inside PURE ones)."""
    plain = """abs all any ascii bin bool bytes chr complex dict divmod enumerate filter float format frozenset hash hex
        int isinstance issubclass iter len list map max min next oct ord pow print range repr reversed round set slice
        sorted str sum tuple zip True False None Exception""".split()
    inner = {name for home in PURE for name, value in vars(__import__(home)).items() if type(value) is type(sys)}
    return {name for name in dir(builtins) if name not in plain and not name.endswith("Error")}, inner


def leaves_no_trace(tree):
    """True where a program provably changes nothing but its own names: its calls may then share one process.

    A white list: functions that only compute, on modules without state. No class, no attribute that is assigned to
    or leads into the interpreter; any other program gets a fresh process for each call.
    """
    banned, inner = doors()
    typing = "Any Callable Dict List Optional Set Tuple Union".split()
    for node in ast.walk(tree):
        imported = {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
        module, attribute = getattr(node, "module", None), getattr(node, "attr", "")
        if (isinstance(node, (ast.ClassDef, ast.AsyncFunctionDef, ast.MatchClass))
                or isinstance(node, ast.Import) and not imported <= set(PURE)
                or isinstance(node, ast.ImportFrom) and (module not in PURE or imported & {"*", *inner})
                and (module != "typing" or not imported <= set(typing))
                or any(name[0] == "_" for name in imported)
                or re.match("_|register|(gi|cr|ag|f|tb|co)_", attribute) or attribute in inner
                or attribute and not isinstance(node.ctx, ast.Load)
                or any(name in banned or str(name).startswith("__")
                       for name in (getattr(node, key, None) for key in ("id", "name", "arg")))):
            return False
    return True


def run_call(index, code, call, out):
    """One test call on fresh definitions and fresh random seeds; writes a line that reports its value: a digest."""
    try:
        if isinstance(code, Exception):
            raise code
        for name, seed in (("random", "seed"), ("numpy", "random.seed"), ("torch", "manual_seed")):
            if name in sys.modules:
                operator.attrgetter(seed)(sys.modules[name])(0)
        module = sys.modules["answer"] = type(sys)("answer")  # a module: dataclasses and pickle look their home up
        exec(code, module.__dict__)
        value = eval(call, module.__dict__)
        if value is None:
            raise ValueError("the value is None")
        report = hashlib.sha256(canonical(value, [10 ** 6]).encode("utf-8", "surrogatepass")).hexdigest()
        del value
        module.__dict__.clear()  # what it made is freed on its own time, too
    except BaseException as error:  # whatever a stranger's program raises, SystemExit included, costs this call
        frame, lines = error.__traceback__, [getattr(error, "lineno", None)]
        while frame:
            lines += [frame.tb_lineno] if frame.tb_frame.f_code.co_filename == "<answer>" else []
            frame = frame.tb_next
        text = traceback.format_exception_only(error)[-1].strip()
        report = f"!{ascii(text[:200])[1:-1][:250]} (line {lines[-1]})"
    os.write(out, f"\n{index} {report}\n".encode())


def end_all(alone):
    """Kill and reap all that descends from this process, whatever it ignores. alone: nobody else is in its reach."""
    found, fresh = {-1} if alone else set(), not alone
    while fresh:  # freeze until nobody new turns up (the frozen cannot fork), then kill
        family, fresh = found | {os.getpid()}, set()
        for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as stat:
                if int(stat.read().rpartition(")")[2].split()[1]) in family and int(name) not in family:
                    fresh.add(int(name))
                    os.kill(int(name), signal.SIGSTOP)
        found |= fresh
    for pid in found:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def wipe(folder):
    """Empty a folder. (Where that fails, so does the worker, and another one starts elsewhere.)"""
    for entry in os.scandir(folder):
        shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def condition(libc):
    """What a program can change about its worker without being able to end it: limits, priority, shared memory."""
    segments = (ctypes.c_int * 64)()
    linux = [libc.shmctl(0, 14, segments) and segments[0], os.sched_getaffinity(0), os.sched_getscheduler(0)] if (
        sys.platform == "linux") else []
    return [os.getpriority(0, 0), *map(resource.getrlimit, (
        getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))), *linux]


def become(uid, libc):
    """Give up all rights of a root, but one: to read, where its Python lies in its home. uid 0: we are not root."""
    if uid:
        libc.prctl(8, 1)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        header, none, read = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)(4, 4)
        kept = os.path.exists("/proc") and libc.capset(header, read) == 0
        if not kept and libc.capset(header, none):
            os._exit(1)


def stem(null, libc, prctl, uid, processes):
    """One program's process: read the job, load what it imports, run its calls, each in a process of its own."""
    os.setsid()
    become(uid, libc)
    prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: where the process above dies, so do we
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to us
    prctl(4, 1)
    for what, most in (("CORE", 0), ("FSIZE", 2 ** 24), ("NOFILE", 256), ("AS", 2 ** 32), ("DATA", 2 ** 30)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))
    job, out = b"", os.dup(1)
    while not job.endswith(b"\n"):
        job += os.read(0, 2 ** 20)
    os.dup2(null, 0)
    os.dup2(null, 1)
    source, calls = json.loads(job)
    try:
        tree = ast.parse(source)
        code, together = compile(tree, "<answer>", "exec"), leaves_no_trace(tree)
    except Exception as error:  # it does not compile: each call will say so
        code, together = error, True
    for node in () if together else ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            with contextlib.suppress(BaseException):  # a call will meet the failure again, and report it
                __import__(name)
    os.write(out, b"\nready \n")
    for index, call in calls:
        if together:
            gc.collect()  # what the call before left behind
            run_call(index, code, call, out)
        elif child := os.fork():
            os.waitpid(child, 0)
            end_all(os.getppid() == 1)
            with contextlib.suppress(OSError, RecursionError):  # the worker will see to it
                wipe(".")
            os.write(out, f"\n{index} !its process died\n".encode())  # counts only where no report came before
        else:
            prctl(1, signal.SIGKILL)
            os.mkdir(f"call{index}")
            os.chdir(f"call{index}")
            os.environ.update(HOME=os.getcwd(), TMPDIR=os.getcwd())
            resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
            run_call(index, code, call, out)
            os._exit(0)


def worker(uid):
    """The warm process: forks a stem when told to, ends it when told to, and never sees a job or a result.

    uid: the user that stems become, where we are root (0: nobody else).
    """
    control, null = socket.socket(fileno=os.dup(2)), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    libc = ctypes.CDLL(None)
    prctl = libc.prctl if sys.platform == "linux" else lambda *_: 0
    prctl(4, 0)  # PR_SET_DUMPABLE: nobody looks into this process
    prctl(36, 1)
    prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    alone, processes = os.getpid() == 1, 32  # alone: process 1 of a PID namespace
    end_all(alone)
    if uid:
        os.chown(".", uid, uid)
    elif os.path.exists("/proc/loadavg"):  # the limit counts all that the user runs: add that
        with open("/proc/loadavg", encoding="ascii") as load:
            processes += int(load.read().split("/")[1].split()[0])
    doors()  # once here, so that no stem has to
    gc.freeze()
    control.send(b"A")
    healthy = condition(libc)
    while control.recv(1):
        pid = os.fork()
        if pid == 0:
            control.close()
            stem(null, libc, prctl, uid, processes)
            os._exit(0)
        order = control.recv(1)  # the parent says when; or it is gone, which is the same
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        os.kill(pid, signal.SIGKILL)
        end_all(alone)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wipe(".")
        if not order or condition(libc) != healthy:
            return
        control.send(struct.pack("d", after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


if __name__ == "__main__":
    worker(int(sys.argv[1]))
