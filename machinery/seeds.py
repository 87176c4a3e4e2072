"""Many runs by one command: several seeds side by side, those of one seed one after the other, and the word of each
that failed.

Exercised by `python -m pytest tests/test_runs.py`.
"""
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from machinery.files import InputError
from machinery.process import alone, passing_on

PASSING = re.compile(r"sweet: (note|\d+ of \d+,)")  # what a run says on its way


def failure(command, log, children):
    """Run a command with its output at the end of a file: None where it ended well, or its own line on how it failed,
    and its status."""
    begin = log.stat().st_size if log.exists() else 0
    with open(log, "ab") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file)
        children.append(child)
        if not child.wait():
            return None
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("sweet: ") and not PASSING.match(line)]
    return said[-1].removeprefix("sweet: ") if said else "", child.returncode


def run_chains(command, root, chains, jobs, unfinished):
    """Run `command` with the words of each run, `jobs` chains side by side, the runs of a chain in their order.

    chains: {name of a chain, and of its log: {what a run is called: its words}}. unfinished(words): the first stage of
    a run that is not done, "" where all are: it is not started then. InputError, when all have ended, with the chains
    that failed.
    """
    children, one_at_a_time = [], threading.Lock()

    def one(name):
        for title, words in chains[name].items():
            with one_at_a_time:
                todo = unfinished(words)
            if todo and (failed := failure([*command, *words], Path(root) / f"{name}.log", children)):
                with one_at_a_time:
                    return f"{title}: {failed[0] or f'{unfinished(words)}: it ended with status {failed[1]}'}"
            bar.update()
        return ""
    Path(root).mkdir(parents=True, exist_ok=True)
    total = sum(map(len, chains.values()))
    with alone(root), passing_on(children), ThreadPoolExecutor(jobs) as pool, tqdm(total=total, desc="runs") as bar:
        failed = list(filter(None, pool.map(one, chains)))
    if failed:
        raise InputError(f"{root}: no table, {len(failed)} of {len(chains)} seeds failed: {'; '.join(failed)}. The "
                         "logs are beside the runs; the same command goes on with what is missing")
