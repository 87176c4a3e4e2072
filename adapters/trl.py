"""ColBench in TRL: tasks for trainers that sample by themselves, and the dialogue as an environment.

`python sweet.py export trl` writes RUN/trl.jsonl, one training task a line (pairs.jsonl trains under DPOTrainer as it
is):

    prompt              what the agent reads first, as messages
    privileged_context  the reference c: what the teacher of SDFTTrainer and SDPOTrainer, the same model, reads as well.
                        With TEACHER_PROMPT as SDFT's teacher_prompt_template it reads it as our critic does
    task                ColBench's record, as JSON text: columns would mix the test names of all tasks

`environment(run)` is for GRPOTrainer's `environment_factory`: there the agent asks and answers by calling tools, the
run's human replies, and its grader gives the reward. The environment says what to do, so the column prompt is left out:

    run = sweet.open_run(["--tasks", "tasks.jsonl", "--human", "http://localhost:8000/v1", "--run", "runs/mine"])
    tasks = load_dataset("json", data_files=str(export(run)), split="train").remove_columns("prompt")
    GRPOTrainer(model, args=GRPOConfig(...), train_dataset=tasks, environment_factory=environment(run)).train()

Exercised by `python -m pytest tests/test_adapters_trl.py`.
"""
import functools
import json

from actor import ask_human, begin
from env import ANSWER_MARKER, REFERENCE_PREFIX, Task
from machinery.files import InputError, write_lines
from machinery.schema import unfold

TEACHER_PROMPT = REFERENCE_PREFIX.format(reference="{privileged_context}") + "{prompt}"
INSTRUCTIONS = (
    "You are helping a person who needs a piece of work done but has described it only roughly. Call `ask` with one "
    "short question about what is missing, or, once you know enough, call `answer` with the complete result. You have "
    "{max_turns} calls at most, and the answer takes one of them.\n\n")
OVER = "Thank you, that is all."


def export(run):
    """Write the training tasks of a run for TRL; returns the path."""
    rows = []
    for task in run.training_tasks():
        messages = begin(task, run.settings["rollout"], run.instructions).messages
        rows.append({
            "prompt": unfold(messages),
            "privileged_context": task.ground_truth,
            "task": json.dumps(task.to_record(), ensure_ascii=False),
        })
    path = run.root / "trl.jsonl"
    run.root.mkdir(parents=True, exist_ok=True)
    write_lines(path, rows)
    print(f"{len(rows)} tasks for TRL: {path}")
    return path


def environment(run):
    """What GRPOTrainer makes its environments with: the human, the grader and the turns of a run (sweet.Run)."""
    return functools.partial(ColBench, run.human(), run.grade, run.settings["rollout"])


class ColBench:
    """One dialogue at a time. TRL offers every method to the model but `reset`, `get_reward` and those that begin with
    an underscore, and describes it by its docstring. human: simulator.Human; grade: see worlds.World.grader; cfg: an
    actor.Rollout."""

    def __init__(self, human, grade, cfg):
        self.human, self.grade, self.cfg = human, grade, cfg

    def reset(self, task, **columns):
        """Begin the dialogue of a row of `export`; returns what the agent reads."""
        self.dialogue = begin(Task.from_record(json.loads(task)), self.cfg, INSTRUCTIONS)
        return "\n\n".join(message["content"] for message in unfold(self.dialogue.messages))

    def ask(self, question: str) -> str:
        """Ask the person one short question about what is missing.

        Args:
            question: The question, in plain words.

        Returns:
            The person's reply.
        """
        if self._say(question):
            return OVER
        ask_human(self.human, [self.dialogue])
        return OVER if self._left() else self.dialogue.messages[-1]["content"]

    def answer(self, result: str) -> str:
        """Hand in the complete result. This ends the conversation.

        Args:
            result: The result: all of the program or page, and nothing else.

        Returns:
            A word of thanks.
        """
        self._say(f"{ANSWER_MARKER}\n{result}")
        return OVER

    def get_reward(self) -> float:
        """The grader's reward; 0 where the agent stopped without an answer. InputError where the human left."""
        if self._left():
            raise InputError("the human does not reply any more: this dialogue has no reward")
        if self.dialogue.answer is None:
            return 0.0
        reward, = self.grade([self.dialogue.answer], [self.dialogue.task])
        return reward

    def _say(self, text):
        """Take the agent's turn; True when the dialogue is over. ValueError, which the model reads, after its end."""
        if self.dialogue.answer is not None or self._left():
            raise ValueError("the conversation is over")
        return self.dialogue.step(text)

    def _left(self):
        """Whether the human owes a reply."""
        return self.dialogue.answer is None and self.dialogue.messages[-1]["role"] == "assistant"
