"""The far side of machinery/sandbox.py: all that runs in the same processes as strangers' programs.

This file is a program, not a module: its text is handed to a fresh Python (that of machinery/program.py, which finds
programs in answers, is an argument), `worker` starts, and for each job it forks
a stem, which forks a child for each call. What crosses back is one line a call, "INDEX HASH" or "INDEX !REASON".
Nothing here can be trusted once a program has begun to run; machinery/sandbox.py says why that does no harm.
"""
import _ast
import collections.abc
import contextlib
import ctypes
import datetime
import dis
import gc
import marshal
import math
import numbers
import operator
import os
import resource
import signal
import socket
import sys

PURE = set("bisect collections datetime heapq itertools math random re typing".split())  # modules without state
DOORS = set("""abc breakpoint classmethod compile contextlib copyreg delattr dir enum eval exec exit format format_map
    functools getattr globals hasattr help input locals obj object open operator property quit register setattr
    staticmethod super sys type types vars warnings EXCLUDED_ATTRIBUTES clear_overloads dataclass_transform final
    get_args get_origin get_overloads get_protocol_members get_type_hints no_type_check no_type_check_decorator overload
    override runtime_checkable""".split())  # names that lead out of a program's own names
ACTS = [dis.opmap[name] for name in ("DELETE_ATTR", "LOAD_BUILD_CLASS", "MATCH_CLASS", "STORE_ATTR")]
DATES = {datetime.datetime: datetime.datetime.isoformat, datetime.date: datetime.date.isoformat,
         datetime.time: datetime.time.isoformat, datetime.timedelta: datetime.timedelta.__str__}
VERSION = (ctypes.c_uint32 * 2)(0x20080522)  # of capset's arguments


def canonical(value, room):
    """Text that two values share exactly where Python's == calls them equal (NaN equals NaN). room: [letters left]."""
    def each(parts, order=list):
        return "(" + ",".join(order(canonical(part, room) for part in parts)) + ")"
    room[0] -= 1 + (len(value) if isinstance(value, (str, bytes, bytearray)) else 0)
    if room[0] < 0:
        raise ValueError("the value is too large to compare")
    if value is None:
        return "None"
    for kind, text in DATES.items():
        if isinstance(value, kind):
            apart = getattr(value, "utcoffset", lambda: None)()
            if apart is not None:
                day = datetime.datetime.combine(datetime.date(2000, 1, 2), value) if kind is datetime.time else value
                value = day.replace(tzinfo=None) - apart
            return f"{kind.__name__} {text(value) if apart is None else f'in UTC {value}'}"
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):  # scalars and arrays compare by value
        if value.dtype.kind in "mM":  # in whatever unit: as microseconds, and what is finer
            coarse = value.astype(f"{value.dtype.kind}8[us]")
            finer = "" if (coarse.astype(value.dtype) == value).all() else str(value)
            return finer + canonical(coarse.tolist(), room)
        if value.ndim:
            return f"array{value.shape}{canonical(value.tolist(), room)}"
        if value.dtype.char != "g":  # a long double is no Python number
            return canonical(value.item(), room)
    if isinstance(value, complex):
        return each([value.real, value.imag]) if value.imag else canonical(value.real, room)
    if isinstance(value, numbers.Number):  # bool, int, float, Fraction, Decimal
        finite = value == value and value not in (math.inf, -math.inf)
        return "{:x}/{:x}".format(*value.as_integer_ratio()) if finite else str(float(value))
    if isinstance(value, str):
        return f"s{len(value)}:{str.__str__(value)}"
    if isinstance(value, (bytes, bytearray)):
        return f"b{bytes(value).hex()}"
    if isinstance(value, range):
        return f"range {len(value)} {list(value[:2])}"
    if isinstance(value, type) and value.__module__ != "answer":
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, dict):
        return "dict" + each(value.items(), sorted)
    if isinstance(value, collections.abc.Set):
        return "set" + each(value, sorted)
    for sequence in (list, tuple, collections.deque):
        if isinstance(value, sequence):
            return sequence.__name__ + each(value)
    raise TypeError(f"a {kind} equals nothing but itself")


def parts(code):
    """The code objects of a program: its own and those of all functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            yield from parts(constant)


def imports(code):
    """The modules that a program imports, anywhere in it."""
    return {step.argval for part in parts(code) if dis.opmap["IMPORT_NAME"] in part.co_code[::2]
            for step in dis.get_instructions(part) if step.opname == "IMPORT_NAME"}


def leaves_no_trace(code):
    """True where a program provably changes nothing but its own names: its calls may then share one process.

    Functions that only compute, on modules without state: no class, no attribute that is assigned to or leads into the
    interpreter. Any other program gets a fresh process for each call.
    """
    names = {name for part in parts(code) for name in part.co_names} - {"_", "__name__", "__annotations__"}
    dark = [name for name in names if name.startswith(("_", "ag_", "co_", "cr_", "f_", "gi_", "tb_"))]
    acts = [act for part in parts(code) for act in ACTS if act in part.co_code[::2]]
    return not (dark or acts or names & DOORS or imports(code) - PURE)


def seed():
    """Seed what is loaded, the same for every program."""
    for name, function in (("random", "seed"), ("numpy", "random.seed"), ("torch", "manual_seed")):
        if name in sys.modules:
            operator.attrgetter(function)(sys.modules[name])(0)


def statements(program):
    """The statements at the top level of a program: of source, or of those that are left of it."""
    return compile(program, "<answer>", "exec", _ast.PyCF_ONLY_AST).body


def place(body, line):
    """Which one of these statements is on a line."""
    return next(i for i, statement in enumerate(body) if statement.end_lineno >= line)


def together_again(body):
    """(program, code) of some statements."""
    program = _ast.Module(body, [])
    return program, compile(program, "<answer>", "exec")


def define(program, code, space):
    """Run the top level of a program, without the statements that fail: who wants its functions does not care for its
    examples. Returns the first failure, or None. A `raise` is no accident, and is raised."""
    failure = None
    while code:
        try:
            exec(code, space)
            code = None
        except BaseException as error:  # SystemExit included
            failure, body = failure or error, statements(program)
            i = place(body, error.__traceback__.tb_next.tb_lineno)
            if isinstance(body[i], _ast.Raise):
                raise
            program, code = together_again(body[i + 1:])
    return failure


def fresh():
    """A module for a program, and the seeds set."""
    seed()
    module = sys.modules["answer"] = type(sys)("answer")  # a module: dataclasses and pickle look their home up
    return module.__dict__


def run_call(index, program, code, call, out):
    """One test call on fresh definitions and fresh random seeds; writes a line that reports its value: a hash."""
    failure = None
    try:
        if isinstance(code, Exception):
            raise code
        space = fresh()
        failure = define(program, code, space)
        value = eval(call, space)
        if value is None:
            raise ValueError("the value is None")
        report = str(hash(canonical(value, [10 ** 6])))  # 64 bits, the same in every worker
        del value
        space.clear()  # what it made is freed on its own time, too
    except BaseException as error:  # whatever a stranger's program raises, SystemExit included, costs this call
        error = failure if failure and isinstance(error, NameError) else error  # why the name is not there
        line, trace = getattr(error, "lineno", None), error.__traceback__
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<answer>" else line
            trace = trace.tb_next
        report = f"!{type(error).__name__}: {ascii(str(error)[:200])[1:-1][:250]} (line {line})"
    os.write(out, f"\n{index} {report}\n".encode())


def descendants(pid):
    """All processes that descend from one, children before their parents, and stopped: the stopped cannot fork."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        for child in map(int, open(f"/proc/{pid}/task/{thread}/children").read().split()):
            os.kill(child, signal.SIGSTOP)
            yield from descendants(child)
            yield child


def end_all(everybody):
    """Kill and reap all that descends from this process: orphans come to it. everybody: nobody else is in its reach."""
    with contextlib.suppress(ChildProcessError):  # nobody is left
        while True:
            with contextlib.suppress(OSError):  # somebody ended by himself meanwhile
                for pid in [-1] if everybody else descendants(os.getpid()):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0 if everybody else os.WNOHANG)


def wipe():
    """Empty the scratch folder, whatever its contents forbid; what takes longer than a second or two stays."""
    if os.listdir("."):
        os.system("ulimit -t 1; chmod -R u+rwX . ; find . -mindepth 1 -delete")


def condition(libc):
    """What a program can change about its worker without being able to end it: limits, priority, the scratch folder,
    shared memory and messages."""
    found = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    here = os.stat(".")
    found += [os.getpriority(0, 0), here.st_mode, here.st_nlink, os.listdir(".")]
    if sys.platform == "linux":
        for count, which in ((libc.shmctl, 14), (libc.msgctl, 12)):  # SHM_INFO, MSG_INFO
            used = (ctypes.c_int * 64)()
            found += [count(0, which, used), used[0]]
        found += [os.sched_getaffinity(0), os.sched_getscheduler(0)]
        with contextlib.suppress(OSError):  # where files have none
            found += os.listxattr(".")
    return found


def become(uid, libc):
    """Give up all rights of a root; outside of bubblewrap all but the one to read, where Python may lie in its home."""
    none, read, outside = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)(4, 4), os.path.exists("/proc")
    libc.prctl(8, outside)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if outside and libc.capset(VERSION, read):  # CAP_DAC_READ_SEARCH; not every root has it
        libc.capset(VERSION, none)


def endless(program, code, seconds):
    """End with the place of the statement at the top level in which a program is after so many seconds, counted from 1,
    or with 0 where it was done before."""
    def stop(_, frame):
        line = 0
        while frame:
            line = frame.f_lineno if frame.f_code.co_filename == "<answer>" else line
            frame = frame.f_back
        os._exit(1 + place(statements(program), line))
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    define(program, code, fresh())


def stem(out, uid, libc, processes, find_program):
    """One program's process: find it in the answer, load what it imports, run its calls, each in a process of its own.

    patience: 0, or how many seconds the top level may take: a statement that takes more is left out.
    """
    def apart(work, *given):
        child = os.fork()
        if child == 0:
            try:
                resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
                work(*given)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        end_all(uid or os.getppid() == 1)
        wipe()
        return os.waitstatus_to_exitcode(status)
    os.setpgid(0, 0)  # a group of its own to kill (a session would be slower to make)
    if uid:
        become(uid, libc)
    for what, most in (("CORE", 0), ("FSIZE", 2 ** 24), ("NOFILE", 256), ("AS", 2 ** 32), ("DATA", 2 ** 30)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))
    answer, calls, first, patience = marshal.load(open(out, "rb", closefd=False))
    try:
        program, code = find_program(answer, calls)
        hidden = {"random"} if "random" in program else set()  # as in __import__("random"), which is seeded, too
        for name in imports(code) | hidden:
            with contextlib.suppress(BaseException):  # a call will meet the failure again, and report it
                __import__(name)
                seed()  # numpy loads a part of itself only now
        together = leaves_no_trace(code)
        whole = code
        while patience and 0 < (k := apart(endless, program, code, patience)) <= len(statements(program)):
            body = statements(program)
            program, code = together_again(body[:k - 1] + body[k:])
        if patience and code is whole and first == 0:  # it was the call that did not end
            os.write(out, b"\n0 !out of time\n")
            first = 1
    except Exception as error:  # it does not compile: each call will say so
        program, code, together = "", error, True
    if together:  # none of these starts a process, and if one does all the same
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
    os.write(out, b"\nready !\n")
    for index, call in list(enumerate(calls))[first:]:
        if together:
            gc.collect()  # what the call before left behind
            run_call(index, program, code, call, out)
        else:
            apart(run_call, index, program, code, call, out)
            os.write(out, f"\n{index} !its process died\n".encode())  # counts only where no report came before


def worker(uid, find_program):
    """The warm process: forks a stem when told to, ends it when told to, and never sees a job or a result.

    uid: the user that stems become, where we are root (0: nobody else). find_program: machinery/program.py's.
    """
    control, libc = socket.socket(fileno=os.dup(0)), ctypes.CDLL(None)
    os.dup2(1, 0)  # both are /dev/null
    prctl = getattr(libc, "prctl", lambda *_: 0)  # Linux only
    prctl(4, 0)  # PR_SET_DUMPABLE: nobody looks into this process
    prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to us
    alone, processes = os.getpid() == 1, 32  # alone: process 1 of a PID namespace
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") and not uid else ()):
        with contextlib.suppress(OSError):  # the limit counts all that a user runs: add what is there already
            processes += len(os.listdir(f"/proc/{name}/task")) * (os.stat(f"/proc/{name}").st_uid == os.getuid())
    if uid:
        os.chown(".", uid, uid)
    compile("", "", "exec")  # sets the compiler up: once here, not in every stem
    gc.freeze()
    healthy = condition(libc)
    while fds := socket.recv_fds(control, 1, 1)[1]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        pid = os.fork()
        if pid == 0:
            try:
                control.close()
                prctl(36, 1)
                stem(fds[0], uid, libc, processes, find_program)
            finally:
                os._exit(0)
        os.close(fds[0])
        control.recv(1)  # the parent says when; or it is gone, which is the same
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        end_all(alone)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        wipe()
        if condition(libc) != healthy:
            return
        control.send(b"%d %d" % (1000 * (spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime),
                                 spent.ru_nivcsw - before.ru_nivcsw))


if __name__ == "__main__":
    try:
        finder = {}
        exec(sys.argv[2], finder)
        worker(int(sys.argv[1]), finder["find_program"])
    finally:
        os.rmdir(os.getcwd())  # the scratch folder; under bubblewrap it has gone with its memory, and this fails

