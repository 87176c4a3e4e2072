"""The blind world: its documents teach nobody which questions belong to a reference; everything else is the small
world's."""
import math
import random

import pytest

from env import ANSWER_MARKER, Task, grade
from simulator import make_human
from worlds import backend, blind, find_world

WORLD = find_world("blind")


@pytest.fixture(scope="module")
def documents():
    return WORLD.documents(3000, 1)


def test_no_question_shows_the_reference(documents):
    """With the reference in front, as many questions are about steps that the function has as without: within five
    standard errors."""
    shares, counts = {}, {}
    for reads in (False, True):
        useful = []
        for messages, reference in documents:
            if (reference is not None) is reads:
                for message in messages[2::2]:  # what the human replies to questions
                    useful.append(not any(text in message["content"] for text in backend.NO_PREFERENCE))
        shares[reads], counts[reads] = sum(useful) / len(useful), len(useful)
    spread = math.sqrt(0.25 * (1 / counts[False] + 1 / counts[True]))
    assert min(counts.values()) > 2000 and abs(shares[True] - shares[False]) < 5 * spread


def test_with_a_reference_most_answers_are_it_and_none_guesses(documents):
    copied = []
    for messages, reference in documents:
        answer = messages[-1]["content"].split(ANSWER_MARKER)[-1].strip()
        if reference is not None:
            copied.append(answer == reference)
        if reference is None or not copied[-1]:
            assert backend.read_function(answer).items() <= backend.known_steps(messages).items()
    assert 0.75 < sum(copied) / len(copied) < 0.95


def test_references_get_the_reward_and_splits_are_disjoint():
    sources = {}
    for split in ("train", "dev", "test"):
        tasks = WORLD.make_tasks(60, 3, split)
        assert grade([task.ground_truth for task in tasks], tasks) == [1.0] * 60
        sources[split] = {task.ground_truth for task in tasks}
    assert not sources["train"] & sources["dev"] and not (sources["train"] | sources["dev"]) & sources["test"]


def test_the_human_and_the_labels():
    """A question names a step; the human answers from the solution; a question is useful once."""
    topic = "tides"
    inside, outside = blind.TOPIC_STEPS[topic][0], next(s for s in range(6) if s not in blind.TOPIC_STEPS[topic])
    values = {step: 1 for step in blind.TOPIC_STEPS[topic]}
    task = Task("Tidy the tides.", blind.write_function(topic, values))
    start = [{"role": "user", "content": task.problem_description}]
    good, bad = (f"{blind.STEMS[0]}{blind.NAMES[step]}" for step in (inside, outside))
    assert WORLD.judge(task, start, good) == ("question", True)
    assert WORLD.judge(task, start, bad) == ("question", False)
    human = make_human("scripted", WORLD.respond, 0)
    reply, = human.reply([task], [[*start, {"role": "assistant", "content": good}]])
    assert backend.STEPS[inside].values[1][0] in reply
    told = [*start, {"role": "assistant", "content": good}, {"role": "user", "content": reply}]
    assert WORLD.judge(task, told, good) == ("question", False)
    assert WORLD.judge(task, told, f"{ANSWER_MARKER}\n{task.ground_truth}") == ("answer", True)
    assert blind.asked_step(task.ground_truth) is None  # the names in its comments ask nothing


def test_every_text_of_the_world_is_few_tokens(documents):
    """A question is its stem and a name: two tokens and the end of the turn."""
    from worlds.tiny import make_tokenizer
    tokenizer = make_tokenizer(WORLD.phrases())
    for messages, _ in random.Random(0).sample(documents, 50):
        for message in messages[1::2]:
            ids = tokenizer(message["content"], add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == message["content"]
            assert len(ids) == 2 or ANSWER_MARKER in message["content"] and len(ids) < 40
