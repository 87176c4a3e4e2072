"""Seconds of a training step with one process and with two (torchrun, over gloo), on this machine.

    python -m bench.processes [--model DIR]

The demonstrations' stage is run with one epoch and with three, so that loading and saving cancel out; each command
three times, in turn. Without --model it is the small world's model. Two threads of one process and two processes of one
thread each have the same two cores.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
WAYS = {"one process, one thread": (ALONE, 1), "one process, two threads": (ALONE, 2),
        "two processes, one thread each": (TWO, 1)}
REPEATS = 3


def seconds_of(start, threads, epochs, flags):
    """(seconds, steps) of the demonstrations' stage of a new run."""
    with tempfile.TemporaryDirectory() as run:
        command = [*start, "sweet.py", "base", "--run", f"{run}/bench", "--threads", threads, "--base-epochs", epochs]
        subprocess.run([*map(str, command), *flags], cwd=ROOT, check=True, capture_output=True,
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        seconds = json.loads(Path(run, "bench/seconds.json").read_text())["base"]
        return seconds, len(json.loads(Path(run, "bench/base/log.json").read_text()))


def main(flags):
    found = {way: [] for way in WAYS}
    for _ in range(REPEATS):
        for way, (start, threads) in WAYS.items():
            short, long = (seconds_of(start, threads, epochs, flags) for epochs in (1, 3))
            found[way].append((long[0] - short[0]) / (long[1] - short[1]))
    print("| way | milliseconds a step, median of three (range) |\n| --- | --- |")
    for way, several in found.items():
        middle, low, high = (1000 * value for value in (statistics.median(several), min(several), max(several)))
        print(f"| {way} | {middle:.1f} ({low:.1f} to {high:.1f}) |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face directory; in bfloat16, 16 demonstrations, 8 a step")
    model = parser.parse_args().model
    main(["--base-documents", "2000"] if not model else
         ["--model", model, "--dtype", "bfloat16", "--base-documents", "16", "--base-batch-size", "8"])
