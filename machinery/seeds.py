"""One program with several seeds, some of them at a time, and the word of each that failed.

Exercised by `python -m pytest tests/test_runs.py`.
"""
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from machinery.files import InputError
from machinery.process import alone, passing_on


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
    said = [line for line in lines if line.startswith("sweet: ") and not line.startswith("sweet: note")]
    return said[-1].removeprefix("sweet: ") if said else "", child.returncode


def run_seeds(command, root, seeds, critics, jobs, unfinished):
    """Run `command` with each seed, and then with each of the further critics, in a folder of its own under `root`;
    returns the folders. InputError, when all have ended, with those that failed. unfinished(folder, extra): the first
    stage of a run that is not done, for a process that ended without a word."""
    folders, children = {seed: Path(root) / f"seed{seed}" for seed in seeds}, []

    def one(seed):
        for kind in ("", *critics):
            extra = [f"--critic={kind}"] if kind else []
            whole = [*command, "--run", str(folders[seed]), "--seed", str(seed), *extra]
            if failed := failure(whole, Path(f"{folders[seed]}.log"), children):
                line = failed[0] or f"{unfinished(folders[seed], extra)}: it ended with status {failed[1]}"
                return f"{' '.join([f'seed {seed}', *extra])}: {line}"
        return ""
    Path(root).mkdir(parents=True, exist_ok=True)
    with alone(root), passing_on(children), ThreadPoolExecutor(jobs) as pool:
        ended = tqdm(pool.map(one, folders), total=len(folders), desc="seeds")
        failed = list(filter(None, ended))
    if failed:
        raise InputError(f"{root}: no table, {len(failed)} of {len(folders)} seeds failed: {'; '.join(failed)}. The "
                         "logs are beside the runs; the same command goes on with what is missing")
    return list(folders.values())
