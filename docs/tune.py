"""How the small worlds' settings were chosen: tries on dev tasks, with a seed that no table uses (docs/tuning.md).

    python sweet.py pairs --run runs/tune --seed 100                          # what all tries share
    PYTHONPATH=. python docs/tune.py --run runs/tune rft multiturn actor      # appends a line a try to docs/tuning.md

`--task frontend` (both commands) tries the frontend's settings. The try with the best mean of both ways of decoding
became the default. SWEET without c takes SWEET's settings.
"""
import argparse
import dataclasses

import numpy as np
import torch

import actor
import sweet

BACKEND = {
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
FRONTEND = {
    "rft": [{"lr": lr, "epochs": epochs} for lr, epochs in ((3e-3, 20), (1e-3, 20), (3e-3, 40), (1e-3, 40))],
    "multiturn": [{"lr": lr, "beta": beta, "nll": nll, "epochs": 8} for lr, beta, nll in (
        (3e-3, 1.0, 1.0), (3e-3, 1.0, 3.0), (3e-3, 0.3, 1.0), (1e-3, 1.0, 3.0))],
    "actor": [{"lr": 3e-3, "beta": beta, "nll": nll, "epochs": epochs} for beta, nll, epochs in (
        (0.3, 0.3, 3), (1.0, 1.0, 3), (0.3, 1.0, 3), (0.3, 0.5, 2))],
}


def attempt(options, method, changes):
    """Train `method` with `changes` and measure it on dev tasks: a line for the record."""
    settings = sweet.settings_of(options)
    settings[method] = dataclasses.replace(settings[method], **changes)
    run = sweet.Run(options, settings)
    original = run.path
    run.path = lambda name: original(f"tries/{method}" if name == method else name)
    sweet.STAGES[method].work(run)
    tasks, means = run.held_out(), []
    keys = [(run.seed, "eval", i) for i in range(len(tasks))]
    for top_p in (1.0, 0.9):
        played = actor.play_tasks(*run.model(method), tasks, run.human(), keys, settings["rollout"], top_p=top_p,
                                  **run.rules)
        means.append(np.mean([t["reward"] == 1.0 if options.task == "backend" else t["reward"] for t in played]))
    words = ", ".join(f"{key} {value:g}" for key, value in changes.items())
    return f"| {method} | {words} | {100 * means[0]:.1f} | {100 * means[1]:.1f} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    line = argparse.ArgumentParser()
    line.add_argument("--task", default="backend")
    line.add_argument("--run", default="runs/tune")
    line.add_argument("methods", nargs="+", choices=list(BACKEND))
    given, tasks = line.parse_args(), {"backend": "400", "frontend": "200"}
    options = sweet.parser().parse_args(["--task", given.task, "--run", given.run, "--seed", "100", "--eval-split",
                                         "dev", "--eval-tasks", tasks[given.task]])
    for name in given.methods:
        for changes in (BACKEND if given.task == "backend" else FRONTEND)[name]:
            row = attempt(options, name, changes)
            with open("docs/tuning.md", "a", encoding="utf-8") as record:
                print(row, file=record)
            print(row, flush=True)
