"""What the grader costs: easy answers a second, and references against themselves, against the same work unprotected.

    python -m bench.grade [a ColBench task file]
"""
import contextlib
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

import env


def easy(head, n):
    """n different right answers of ten calls, each far below a millisecond, and their tasks."""
    task = env.Task("p", "def f(x):\n    return x * x + 1\n", {f"test{i}": f"f({i})" for i in range(10)})
    return [f"{head}def f(x):\n    n = {i}\n    return x * x + n - {i - 1}\n" for i in range(n)], [task] * n


def unprotected(tasks):
    """The official grader's work: reference and answer (here the reference) exec'd in this process, compared by ==."""
    passed = 0
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(scratch)
        for task in tasks:
            for call in task.test_cases.values():
                values = []
                for source in (task.ground_truth, task.ground_truth):
                    space = {}
                    exec(source, space)
                    values.append(eval(call, space))
                with contextlib.suppress(ValueError):  # arrays have no single truth
                    passed += bool(values[0] == values[1])
    return passed


def timed(work, *given):
    start = time.perf_counter()
    result = work(*given)
    return time.perf_counter() - start, result


def main():
    env.grade(*easy("", 2))  # finds out how answers can be contained, once a process
    for name, head, n in (("small functions", "", 1000), ("a process a call, for importing os", "import os\n", 100)):
        seconds, rewards = timed(env.grade, *easy(head, n))
        print(f"{name}: {n / seconds:.0f} easy answers of ten calls a second, mean reward {sum(rewards) / n:g}")
    if len(sys.argv) > 1:
        tasks, ratios = env.load_tasks(sys.argv[1]), []
        for k in range(7):
            with multiprocessing.get_context("fork").Pool(1) as pool:  # it too loads what the tasks import each time
                plain, passed = pool.apply(timed, (unprotected, tasks))
            row = []
            for mark in ("", f"\n# run {k}"):  # the same text runs once; with a mark, reference and answer run apart
                ours, rewards = timed(env.grade, [t.ground_truth + mark for t in tasks], tasks)
                row.append(ours / plain)
                assert sum(reward == 1.0 for reward in rewards) >= 0.99 * passed / len(tasks[0].test_cases)
            ratios.append(row)
        once, apart = (sorted(column) for column in zip(*ratios))
        for name, column in (("", once), (" as different texts", apart)):
            print(f"references against themselves{name}, time here / unprotected, median of 7 (range): "
                  f"{statistics.median(column):.1f} ({column[0]:.1f} to {column[-1]:.1f})")


if __name__ == "__main__":
    main()
