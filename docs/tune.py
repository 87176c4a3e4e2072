"""How the small world's settings were chosen: tries on dev tasks, with a seed that no table uses (docs/tuning.md).

    python sweet.py pairs --run runs/tune --seed 100      # what all tries share
    PYTHONPATH=. python docs/tune.py rft multiturn actor  # appends a line a try to docs/tuning.md

The try with the best mean of both ways of decoding became the default. SWEET without c takes SWEET's settings.
"""
import dataclasses
import sys

import numpy as np
import torch

import actor
import sweet

TRIES = {
    "rft": [{"lr": lr, "epochs": epochs} for lr, epochs in (
        (1e-3, 10), (3e-3, 10), (2e-3, 20), (3e-3, 20), (1e-3, 40), (2e-3, 40), (1e-3, 20), (1e-3, 80), (5e-4, 40),
        (5e-4, 80), (2e-3, 80), (3e-3, 40), (2e-3, 10), (1e-3, 120), (3e-4, 80))],
    "multiturn": [{"lr": lr, "beta": beta, "nll": nll, "epochs": epochs, "per_task": pairs}
                  for lr, beta, nll, epochs, pairs in (
        (1e-3, 1.0, 1.0, 2, 6), (1e-3, 1.0, 1.0, 4, 6), (1e-3, 1.0, 3.0, 4, 6), (1e-3, 1.0, 3.0, 8, 6),
        (2e-3, 1.0, 1.0, 4, 6), (1e-3, 3.0, 3.0, 4, 6), (1e-3, 1.0, 10.0, 8, 6), (1e-3, 1.0, 3.0, 16, 6),
        (1e-3, 1.0, 10.0, 16, 6), (1e-3, 1.0, 3.0, 8, 16), (1e-3, 1.0, 3.0, 4, 16), (1e-3, 0.3, 3.0, 8, 6),
        (5e-4, 1.0, 3.0, 16, 6), (2e-3, 1.0, 3.0, 8, 6), (1e-3, 1.0, 1.0, 8, 6), (1e-3, 0.3, 10.0, 8, 6),
        (1e-3, 1.0, 10.0, 8, 16), (1e-3, 3.0, 3.0, 16, 6), (5e-4, 1.0, 3.0, 8, 16))],
    "actor": [{"lr": lr, "beta": beta, "nll": nll, "epochs": epochs} for lr, beta, nll, epochs in (
        (5e-4, 1.0, 1.0, 4), (1e-3, 1.0, 1.0, 3), (1e-3, 1.0, 3.0, 2), (1e-3, 0.3, 1.0, 2), (5e-4, 1.0, 3.0, 4),
        (2e-3, 1.0, 3.0, 2), (1e-3, 1.0, 1.0, 4), (1e-3, 1.0, 3.0, 4))],
}


def attempt(method, changes, tasks=400):
    """Train `method` with `changes` and measure it on dev tasks: a line for the record."""
    options = sweet.parser().parse_args(["--run", "runs/tune", "--seed", "100", "--eval-split", "dev"])
    settings = sweet.settings_of(options)
    settings[method] = dataclasses.replace(settings[method], **changes)
    settings["eval"] = dataclasses.replace(settings["eval"], tasks=tasks)
    run = sweet.Run(options, settings)
    original = run.path
    run.path = lambda name: original(f"tries/{method}" if name == method else name)
    sweet.STAGES[method].work(run)
    success = []
    for top_p in (1.0, 0.9):
        keys = [(100, "eval", i) for i in range(tasks)]
        played = actor.play_tasks(*run.model(method), run.held_out(), run.human(), keys, settings["rollout"],
                                  top_p=top_p)
        success.append(np.mean([t["reward"] == 1.0 for t in played]))
    words = ", ".join(f"{key} {value:g}" for key, value in changes.items())
    return f"| {method} | {words} | {100 * success[0]:.1f} | {100 * success[1]:.1f} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        for changes in TRIES[name]:
            line = attempt(name, changes)
            with open("docs/tuning.md", "a", encoding="utf-8") as record:
                print(line, file=record)
            print(line, flush=True)
