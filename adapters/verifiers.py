"""ColBench as an environment of `verifiers` (PrimeIntellect): our tasks, human and grader, and the critic on each turn.

    import verifiers as vf
    env = vf.load_environment("adapters.verifiers", tasks="tasks.jsonl", human="http://localhost:8000/v1", max_turns=10,
                              critic="runs/mine/critic", initial="runs/mine/base")
    env.evaluate_sync(client, model, num_examples=20, state_columns=["trajectory"])

The agent speaks as in the paper: a turn is a question, or holds the marker and is the answer. The reward is the share
of tests passed. With a critic, each step of a trajectory has extras["critic_advantage"] (Eq. 3, nats a token), and the
metric `critic_advantage` is their mean; nothing learns from it unless you say so.

`verifiers` plays many dialogues at once, and a human, a grader and a model work on many at once: what comes up while
one of them is busy is handed over together, next (`Together`).

`pip install verifiers` (tried: 0.3.1, its classic `Environment`; it fits the versions in .ci/constraints.txt, and is
not among them). Exercised by `python -m pytest tests/test_adapters_verifiers.py`.
"""
import asyncio
import json
import queue
import threading
from concurrent.futures import Future

import verifiers as vf
from datasets import Dataset

from actor import Rollout, begin
from critic import judge_turns
from env import Task, load_tasks
from machinery.files import InputError
from machinery.schema import unfold
from machinery.server import Server, text_of
from machinery.several import ask
from machinery.train import Given, Machine, load_model
from worlds import find_world


class Together:
    """Calls `work(list of items) -> list of results` from many threads, with all items that wait at that moment."""

    def __init__(self, work):
        self.work, self.waiting, self.lock = work, queue.SimpleQueue(), threading.Lock()

    def __call__(self, item):
        future = Future()
        self.waiting.put((item, future))
        with self.lock:  # whoever holds it works for all
            batch = []
            while not self.waiting.empty():
                batch.append(self.waiting.get())
            try:
                results = self.work([one for one, _ in batch]) if batch else []
            except Exception as error:
                for _, other in batch:
                    other.set_exception(error)
            else:
                for (_, other), result in zip(batch, results):
                    other.set_result(result)
        return future.result()


class ColBench(vf.MultiTurnEnv):
    """Dialogues with a human who knows the solution. cfg: an actor.Rollout; human: simulator.Human; world:
    worlds.World."""

    def __init__(self, cfg, human, world, **kwargs):
        super().__init__(**kwargs)
        self.cfg, self.world = cfg, world

        def replies(dialogues):
            return ask(human, [one.task for one in dialogues], [one.messages for one in dialogues])
        self.reply = Together(replies)

    async def setup_state(self, state):
        state["dialogue"] = begin(Task.from_record(state["info"]), self.cfg, self.world.INSTRUCTIONS)

    async def env_response(self, messages, state):
        dialogue = state["dialogue"]
        if dialogue.step(text_of(messages[-1].content)):
            state["final_env_response"] = []
            return []
        reply = await asyncio.to_thread(self.reply, dialogue)
        if reply is None:
            raise vf.InfraError("the human does not reply any more")
        return [vf.UserMessage(content=dialogue.observe(reply)[-1]["content"])]


def rubric(grade, models):
    """The reward and, with (critic, tokenizer, initial model), the metric `critic_advantage`."""
    def rewards(dialogues):
        return grade([one.answer for one in dialogues], [one.task for one in dialogues])

    def advantages(dialogues):
        critic, tokenizer, initial = models
        found = []
        for one in dialogues:
            trajectory = {"task": one.task.to_record(), "dialogue_history": one.messages}
            found.append(judge_turns((critic, tokenizer), initial, trajectory))
        return found
    graded, judged = Together(rewards), Together(advantages)

    async def reward(state):
        """The share of tests passed; 0 without an answer (an error, or a context that is full)."""
        dialogue = state["dialogue"]
        return 0.0 if dialogue.answer is None else await asyncio.to_thread(graded, dialogue)

    async def critic_advantage(state):
        """The mean over the turns."""
        steps = state["trajectory"]
        if not steps:
            return 0.0
        found = await asyncio.to_thread(judged, state["dialogue"])
        for step, advantage in zip(steps, found):
            step["extras"]["critic_advantage"] = advantage
        return sum(found) / len(found)
    made = vf.Rubric(funcs=[reward])
    if models:
        made.add_metric(critic_advantage)
    return made


def load_environment(task="backend", tasks="", human="scripted", n=100, split="train", seed=0, max_turns=10,
                     critic="", initial="", **server):
    """What `vf.load_environment` calls. task, tasks, human, seed: as the flags of sweet.py; n, split: of a world's own
    tasks, where `tasks` names no file; critic, initial: folders of a run, critic/ and base/; server: the human's
    settings, model="..." and so on (machinery.server.Server). InputError on bad input."""
    world, machine, cfg = find_world(task), Machine(), Rollout(max_turns=max_turns)
    if bool(critic) != bool(initial):
        raise InputError("critic, initial: the critic's advantage needs both, RUN/critic and RUN/base")
    models = ()
    if critic:
        initial_model, _ = load_model(initial, machine)
        models = (*load_model(critic, machine), initial_model)
    rows = []
    for one in load_tasks(tasks, world.OPTIONAL) if tasks else world.make_tasks(n, seed, split):
        rows.append({
            "prompt": unfold(begin(one, cfg, world.INSTRUCTIONS).messages),
            "answer": one.ground_truth,
            "info": json.dumps(one.to_record()),
        })
    return ColBench(
        cfg,
        world.human(human, Server(**server), machine, seed),
        world,
        dataset=Dataset.from_list(rows),
        rubric=rubric(world.grader(Given().clip, cfg.call_seconds), models))
