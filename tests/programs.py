"""Programs that are right, awkward, or out to fool, hang or harm the grader, each with the reward that it has earned.

Data for tests/test_grade.py. The task is RIGHT on f(0), f(1), f(2), f(3): [x, x * x]. {name: (reward, answer)};
reward None: whatever it gets is its own affair, as long as its neighbours get theirs.
"""
RIGHT = "def f(x):\n    return [x, x * x]\n"
FENCED = f"Sure!\n```python\n{RIGHT}```\n"

PROGRAMS = {
    # benign and awkward
    "right": (1.0, RIGHT),
    "wrong": (0.5, """
def f(x):
    return [x, x + x]
"""),
    "float_is_int": (1.0, """
def f(x):
    return [float(x), x ** 2.0]
"""),
    "bool_is_int": (1.0, """
def f(x):
    return [x, x * x] if x > 1 else [bool(x), bool(x)]
"""),
    "tuple_is_no_list": (0.0, """
def f(x):
    return (x, x * x)
"""),
    "none": (0.0, """
def f(x):
    pass
"""),
    "empty": (0.0, ""),
    "prose": (0.0, "I would like to know more about the squares, please."),
    "syntax_error": (0.0, """
def f(x:
    return 1
"""),
    "null_byte": (0.0, RIGHT + "\0"),
    "surrogate_in_source": (0.0, "# \ud800\n" + RIGHT),
    "fenced": (1.0, """
Here it is:

```python
def f(x):
    return [x, x * x]
```
It squares **x**.
"""),
    "fenced_unlabelled": (1.0, """
Sure!
```
def f(x):
    return [x, x * x]
```
"""),
    "fenced_open": (1.0, """
Sure!
```python
def f(x):
    return [x, x * x]
"""),
    "fenced_crlf": (1.0, FENCED.replace("\n", "\r\n")),
    "fenced_shell_too": (1.0, """
```bash
pip install squares
```
```python
def f(x):
    return [x, x * x]
```
"""),
    "fence_at_end": (1.0, """
def f(x):
    return [x, x * x]
```
"""),
    "two_blocks": (1.0, """
```python
def g(x):
    return x * x
```
and
```python
def f(x):
    return [x, g(x)]
```
"""),
    "prints": (1.0, """
def f(x):
    print('x' * 1000)
    return [x, x * x]
"""),
    "helper_at_top": (1.0, """
def sq(x):
    return x * x

def f(x):
    return [x, sq(x)]
"""),
    "recursion_at_top": (1.0, """
def s(x):
    return 0 if not x else s(x - 1) + 2 * x - 1
def f(x):
    return [x, s(x)]
"""),
    "import_at_top": (1.0, """
import math
import os
from collections import Counter
def f(x):
    return [x, int(math.pow(x, 2))]
"""),
    "import_numpy": (1.0, """
import numpy as np
def f(x):
    return list(np.array([x, x * x]))
"""),
    "class_at_top": (1.0, """
class A:
    def __init__(self, x):
        self.x = x
    def sq(self):
        return self.x ** 2
def f(x):
    return [x, A(x).sq()]
"""),
    "dataclass": (1.0, """
from dataclasses import dataclass
@dataclass
class A:
    x: int = 0
def f(x):
    a = A(x)
    return [a.x, a.x ** 2]
"""),
    "generator": (0.0, """
def f(x):
    yield x
    yield x * x
"""),
    "generator_inside": (1.0, """
def g(x):
    yield x
    yield x * x
def f(x):
    return list(g(x))
"""),
    "main_block": (1.0, """
def f(x):
    return [x, x * x]
if __name__ == '__main__':
    raise SystemExit(3)
"""),
    "global_counter": (1.0, """
n = 0
def f(x):
    global n
    n += 1
    return [x, x * x] if n == 1 else 'a later call'
"""),
    "default_list": (1.0, """
def f(x, seen=[]):
    seen.append(x)
    return [x, x * x] if len(seen) == 1 else seen
"""),
    "list_subclass": (1.0, """
class L(list):
    pass
def f(x):
    return L([x, x * x])
"""),
    "reads_argv": (1.0, """
import sys
def f(x):
    sys.stdin.read()
    return [x, x * x]
"""),
    "some_raise": (0.5, """
def f(x):
    assert x < 2
    return [x, x * x]
"""),
    "raises_at_top": (0.0, """
def f(x):
    return [x, x * x]
raise ValueError
"""),
    "system_exit": (0.0, """
import sys
def f(x):
    sys.exit(0)
"""),
    "os_exit": (0.75, """
import os
def f(x):
    if x == 2:
        os._exit(0)
    return [x, x * x]
"""),
    # states that must not leak from one call to the next
    "patches_builtin_len": (1.0, """
import builtins
def f(x):
    r = len('abc')
    builtins.len = lambda s: 7
    return [x, x * x] if r == 3 else r
"""),
    "patches_module": (1.0, """
import math
def f(x):
    r = math.floor(1.5)
    math.floor = abs
    return [x, x * x] if r == 1 else r
"""),
    "patches_via_frame": (1.0, """
def f(x):
    g = (i for i in [1])
    b = g.gi_frame.f_builtins
    n = b.get('seen', 0)
    b['seen'] = 1
    return [x, x * x] if not n else n
"""),
    "patches_via_format_type": (1.0, """
def f(x):
    r = getattr(dict, 'q', 0)
    try:
        type(f).__call__ = 3
    except TypeError:
        pass
    return [x, x * x]
"""),
    "file_from_earlier_call": (1.0, """
import os
def f(x):
    n = len(os.listdir('.'))
    open(f'a{x}', 'w').write('x')
    return [x, x * x] if n == 0 else n
"""),
    "environment_leak": (1.0, """
import os
def f(x):
    n = os.environ.get('N')
    os.environ['N'] = '1'
    return [x, x * x] if n is None else n
"""),
    "late_generator": (None, """
def g():
    try:
        yield 1
    finally:
        while True:
            pass
def f(x):
    a = [g()]
    next(a[0])
    a.append(a)
    return [x, x * x]
"""),
    # loops, recursion, memory
    "one_call_loops": (0.75, """
def f(x):
    while x == 1:
        pass
    return [x, x * x]
"""),
    "one_call_sleeps": (0.75, """
import time
def f(x):
    time.sleep(99 if x == 1 else 0)
    return [x, x * x]
"""),
    "all_loop": (0.0, """
def f(x):
    while True:
        pass
"""),
    "loop_at_top": (0.0, """
while True:
    pass
"""),
    "regex_backtracking": (0.75, """
import re
def f(x):
    if x == 1:
        re.match(r'(a+)+$', 'a' * 60 + 'b')
    return [x, x * x]
"""),
    "deep_recursion": (0.75, """
def g(n):
    return g(n + 1)
def f(x):
    return g(0) if x == 1 else [x, x * x]
"""),
    "c_stack_overflow": (0.75, """
import sys
sys.setrecursionlimit(10 ** 9)
class A:
    def __repr__(self):
        return repr(self)
def f(x):
    return repr(A()) if x == 1 else [x, x * x]
"""),
    "memory_bomb": (0.75, """
def f(x):
    if x == 1:
        a = []
        while True:
            a.append(bytes(10 ** 7))
    return [x, x * x]
"""),
    "memory_at_once": (0.75, """
def f(x):
    return 'x' * 10 ** 11 if x == 1 else [x, x * x]
"""),
    "memory_caught": (1.0, """
def f(x):
    try:
        return [0] * 10 ** 11
    except MemoryError:
        return [x, x * x]
"""),
    "memory_private": (0.75, """
import mmap
def f(x):
    m = mmap.mmap(-1, 1500 * 2 ** 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if x == 1 else 0
    return [x, x * x]
"""),
    "mmap_shared": (0.75, """
import mmap
def f(x):
    m = mmap.mmap(-1, 2 ** 40) if x == 1 else 0
    return [x, x * x]
"""),
    "huge_power": (0.75, """
def f(x):
    return 9 ** 9 ** 9 if x == 1 else [x, x * x]
"""),
    "huge_int": (0.75, """
def f(x):
    return 1 << 10 ** 7 if x == 1 else [x, x * x]
"""),
    # processes and threads
    "fork_bomb": (0.75, """
import os
def f(x):
    while x == 1:
        try:
            os.fork()
        except OSError:
            pass
    return [x, x * x]
"""),
    "thread_bomb": (1.0, """
import threading, time
def f(x):
    try:
        for _ in range(5000):
            threading.Thread(target=time.sleep, args=(99,), daemon=True).start()
    except RuntimeError:
        return [x, x * x]
    return 'no limit'
"""),
    "fork_returns_twice": (1.0, """
import os
def f(x):
    os.fork()
    return [x, x * x]
"""),
    "fork_lies_first": (0.0, """
import os, time
def f(x):
    if os.fork():
        time.sleep(0.2)
        return [x, x * x]
    return 'a lie'
"""),
    "subprocess": (1.0, """
import subprocess
def f(x):
    return [x, int(subprocess.check_output(['sh', '-c', f'echo $(({x} * {x}))']))]
"""),
    "threads": (1.0, """
import threading
def f(x):
    r = [x]
    t = threading.Thread(target=lambda: r.append(x * x))
    t.start()
    t.join()
    return r
"""),
    "daemon": (1.0, """
import os, time, signal
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for s in range(1, 64):
                try:
                    signal.signal(s, signal.SIG_IGN)
                except (OSError, ValueError):
                    pass
            time.sleep(99)
        os._exit(0)
    return [x, x * x]
"""),
    # signals
    "kill_parent": (None, """
import os
def f(x):
    os.kill(os.getppid(), 9) if os.getppid() > 1 else 0
    return [x, x * x]
"""),
    "kill_group": (None, """
import os
def f(x):
    if x == 1:
        os.killpg(0, 9)
    return [x, x * x]
"""),
    "kill_self": (0.75, """
import os
def f(x):
    if x == 1:
        os.kill(os.getpid(), 9)
    return [x, x * x]
"""),
    "stop_self": (0.75, """
import os, signal
def f(x):
    if x == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return [x, x * x]
"""),
    "alarm": (0.75, """
import signal
def f(x):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    while x == 1:
        pass
    return [x, x * x]
"""),
    "segfault": (0.75, """
import ctypes
def f(x):
    if x == 1:
        ctypes.string_at(0)
    return [x, x * x]
"""),
    "ignores_sigterm": (0.75, """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def f(x):
    while x == 1:
        pass
    return [x, x * x]
"""),
    # forged results and floods
    "equal_to_everything": (0.0, """
class E:
    def __eq__(self, o):
        return True
    __hash__ = None
def f(x):
    return E()
"""),
    "int_equal_to_everything": (0.0, """
class E(int):
    def __eq__(self, o):
        return True
def f(x):
    return [E(9), E(9)]
"""),
    "list_equal_to_everything": (0.0, """
class L(list):
    def __eq__(self, o):
        return True
def f(x):
    return L()
"""),
    "lying_class": (0.0, """
class E:
    __class__ = list
    def __repr__(self):
        return '[0, 0]'
def f(x):
    return E()
"""),
    "lying_repr": (0.0, """
class E(str):
    def __repr__(self):
        return '[0, 0]'
    __str__ = __format__ = __repr__
def f(x):
    return E()
"""),
    "endless_repr": (0.75, """
class E:
    def __repr__(self):
        while True:
            pass
def f(x):
    return [E()] if x == 1 else [x, x * x]
"""),
    "exception_endless_str": (0.75, """
class E(Exception):
    def __str__(self):
        while True:
            pass
def f(x):
    if x == 1:
        raise E
    return [x, x * x]
"""),
    "patched_grader": (0.0, """
import sys, gc, hashlib
for o in gc.get_objects():
    if isinstance(o, dict) and 'canonical' in o:
        o['canonical'] = lambda *a: 'same for all'
def f(x):
    return 'anything'
"""),
    "patched_hash": (0.0, """
import hashlib
hashlib.sha256 = lambda b: type('H', (), {'hexdigest': lambda s: '0' * 64})()
def f(x):
    return 'anything'
"""),
    "forged_lines": (None, r"""
import os
for i in range(256):
    for fd in range(3, 64):
        try:
            os.write(fd, b'\n%d %064d\n' % (i, 0))
        except OSError:
            pass
def f(x):
    return [x, x * x]
"""),
    "junk_everywhere": (1.0, r"""
import os
def f(x):
    for fd in range(64):
        try:
            os.write(fd, b'\xff\x00junk' * 50)
        except OSError:
            pass
    return [x, x * x]
"""),
    "flood_everywhere": (0.75, """
import os
def f(x):
    while x == 1:
        for fd in range(64):
            try:
                os.write(fd, b'x' * 65536)
            except OSError:
                pass
    return [x, x * x]
"""),
    "flood_stdout": (0.75, """
def f(x):
    while x == 1:
        print('x' * 10 ** 6)
    return [x, x * x]
"""),
    "closed_descriptors": (0.75, """
import os
def f(x):
    if x == 1:
        os.closerange(0, 256)
    return [x, x * x]
"""),
    "self_containing": (0.75, """
def f(x):
    a = [x, x * x]
    if x == 1:
        a.append(a)
    return a
"""),
    "deep_nesting": (0.75, """
def f(x):
    a = [x, x * x]
    for _ in range(10 ** 5 * (x == 1)):
        a = [a]
    return a
"""),
    "wide_sharing": (0.75, """
def f(x):
    a = [x, x * x]
    for _ in range(60 * (x == 1)):
        a = [a, a]
    return a
"""),
    "huge_string": (0.75, """
def f(x):
    return 'x' * 10 ** 8 if x == 1 else [x, x * x]
"""),
    "colliding_set": (0.75, """
def f(x):
    return {i * (2 ** 61 - 1) for i in range(60000)} if x == 1 else [x, x * x]
"""),
    "deep_source": (0.0, "y = " + "-" * 50000 + "1\n" + RIGHT),
    "deep_parentheses": (0.0, "y = " + "(" * 5000 + "1" + ")" * 5000 + "\n" + RIGHT),
    "stray_code_object": (0.75, r"""
import types
def f(x):
    if x == 1:
        c = f.__code__.replace(co_code=b'\xff' * 100)
        exec(c)
    return [x, x * x]
"""),
    # files
    "scratch_file": (1.0, """
def f(x):
    open('a.txt', 'w').write(str(x * x))
    return [x, int(open('a.txt').read())]
"""),
    "sqlite": (1.0, """
import sqlite3
def f(x):
    c = sqlite3.connect('a.db')
    c.execute('create table t (x int)')
    c.execute('insert into t values (?)', (x * x,))
    c.commit()
    return [x, c.execute('select x from t').fetchone()[0]]
"""),
    "disk_filling": (1.0, """
def f(x):
    i = 0
    while x == 1:
        i += 1
        try:
            open(f'a{i % 9}', 'ab').write(b'x' * 10 ** 7)
        except OSError:
            break
    return [x, x * x]
"""),
    "undeletable_folder": (1.0, """
import os
def f(x):
    os.makedirs('a/b/c')
    os.chmod('a/b', 0)
    os.chmod('a', 0)
    return [x, x * x]
"""),
    "many_descriptors": (1.0, """
def f(x):
    a = []
    try:
        while True:
            a.append(open('/dev/null'))
    except OSError:
        return [x, x * x]
"""),
    "leaves_folder": (1.0, """
import os
def f(x):
    os.chdir('/')
    return [x, x * x]
"""),
}
