"""Why there is nothing to learn from: what the data say, and the flag that helps.

A pair needs two dialogues of one task, or two candidates of one state, of which one is better. There are several ways
not to have one, and each has a remedy of its own, so the dialogues are counted before one is named.

Used by `sweet.py`; exercised by `python -m pytest tests/test_runs.py`.
"""
from machinery.schema import task_key


def by_task(trajectories):
    groups = {}
    for trajectory in trajectories:
        groups.setdefault(task_key(trajectory), []).append(trajectory)
    return list(groups.values())


def why_no_success(trajectories, cfg, marker, given):
    """Why none of these trajectories earns the full reward. cfg: how they were rolled out; marker: what an answer
    begins with; given: the user brought them, so that no flag of the rollout would change them."""
    n, last = len(trajectories), [trajectory["dialogue_history"][-1] for trajectory in trajectories]
    if not n:
        return "it holds no dialogue"
    cut = sum(len(turn.get("output_ids") or ()) >= cfg.max_tokens for turn in last)
    silent = sum(marker not in turn["content"] for turn in last)
    said = (f"no successful dialogue among {n} on {len(by_task(trajectories))} tasks ({silent} end without an answer, "
            f"{cut} in a turn that is cut off; the highest reward is {max(t['reward'] for t in trajectories):g})")
    if given:
        return f"{said}; bring some that succeed"
    if 2 * cut >= n:
        return f"{said}; raise --rollout-max-tokens (now {cfg.max_tokens})"
    if 2 * silent >= n:
        return f"{said}; raise --rollout-max-turns (now {cfg.max_turns})"
    return f"{said}; roll out more (--rollout-per-task, now {cfg.per_task}) or start from a better --model"


def why_no_pair(trajectories, cfg, marker, given, margin):
    """Why no two of these trajectories make a pair. margin: the difference of rewards that a pair needs, 0 for success
    against failure."""
    tasks, n = by_task(trajectories), len(trajectories)
    won = sum(trajectory["reward"] == 1.0 for trajectory in trajectories)
    most = max(map(len, tasks), default=0)
    more = "bring more dialogues a task" if given else f"raise --rollout-per-task (now {cfg.per_task})"
    if most == 1 and (won or margin):
        return f"one dialogue a task, and a pair needs two of the same task; {more}"
    rewards = [[t["reward"] for t in group] for group in tasks]
    widest = max((max(group) - min(group) for group in rewards), default=0.0)
    if margin and widest:
        return (f"rewards of one task differ by {widest:g} at most, which is below the margin; lower --pairs-margin "
                f"(now {margin:g})")
    if not won:
        by_reward = f", or pair by rewards, which differ by up to {widest:g}: --pairs-margin" if widest else ""
        return why_no_success(trajectories, cfg, marker, given) + by_reward
    if won == n:
        return f"all of the {n} dialogues on {len(tasks)} tasks succeed: none is worse; take harder tasks"
    texts = [{str([m["content"] for m in t["dialogue_history"]]) for t in group} for group in tasks]
    if all(len(group) == 1 for group in texts) and not given:
        return f"the dialogues of a task are all the same; raise --rollout-temperature (now {cfg.temperature:g})"
    return f"{won} of {n} dialogues succeed, but on each of the {len(tasks)} tasks either all or none; {more}"


def why_no_turn_pair(states, n, given):
    """Why no state has a better and a worse candidate. n: candidates that were sampled at each; given: the user
    brought them."""
    more = "bring more candidates a state" if given else f"raise --candidates-n (now {n})"
    if not states:
        return "it holds no state"
    if all(sum(c.get("count", 1) for c in state["candidates"]) < 2 for state in states):
        return f"one candidate a state, and a pair needs two; {more}"
    if all(len(state["candidates"]) < 2 for state in states):
        return f"the candidates of a state are all the same; {more}, or sample at more states (--candidates-states)"
    same = sum(len(state["candidates"]) > 1 for state in states)
    return (f"the critic gives all candidates of a state the same advantage, at each of the {same} states that have "
            "different ones: it has learned nothing; raise --critic-lr or --critic-epochs")
