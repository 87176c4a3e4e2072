"""`render` under the chat templates of real families, with their traps.

Where the templates come from: TRL's wheel carries those of Llama 3, Qwen, Gemma, Phi, DeepSeek, gpt-oss, GLM and
Cohere as their authors publish them (`pip install trl`, a test dependency); those of Mistral, SmolLM, Phi-4, Llama 2
and Zephyr are written down here in their structure. The tokenizer is byte-level with each family's control tokens, so
that text and ids determine each other; the oracle for what a model reads is the text that the template itself writes.
"""
import datetime
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import byte_tokenizer

from env import ANSWER_MARKER, REFERENCE_PREFIX, action_tokens, control_tokens, end_of_turn, render
from machinery.template import FIXED_DATE, scaffold

pytestmark = pytest.mark.slow

ORIGINALS = importlib.util.find_spec("trl")
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ALTERNATE = ("{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must "
             "alternate user/assistant/user/assistant/...') }}{% endif %}")
WRITTEN = {
    # no generation prompt at all; a space on both sides of [INST]
    "mistral_v1": "{{ bos_token }}{% for m in messages %}" + ALTERNATE +
    "{% if m['role'] == 'user' %}{{ '[INST] ' + "
    "m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    # the agent's turn begins with a space and is trimmed
    "mistral_v3": "{{ bos_token }}{% for m in messages %}" + ALTERNATE +
    "{% if m['role'] == 'user' %}{{ '[INST] ' + "
    "m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
    # Nemo and Small: the control tokens touch the text
    "mistral_tekken": "{{ bos_token }}{% for m in messages %}" + ALTERNATE +
    "{% if m['role'] == 'user' %}{{ '[INST]' + "
    "m['content'] + '[/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    # the end of a turn has a space in front, every pair has its own <s>
    "llama2": "{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}",
    "zephyr": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + eos_token }}"
    "{% else %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}\n{% if loop.last and "
    "add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\n{% endfor %}",
    # a default system prompt
    "smollm2": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{ "
    "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # today's date, and reasoning that is cut out of earlier turns
    "smollm3": "{{- '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' + "
    "strftime_now('%d %B %Y') + '\nReasoning Mode: /think\n\n<|im_end|>\n' -}}{%- for m in messages -%}{%- set "
    "content = m.content if m.content is string else '' -%}{%- if m.role == 'user' -%}{{ '<|im_start|>user\n' + "
    "content + '<|im_end|>\n' }}{%- else -%}{{ '<|im_start|>assistant\n' + content.lstrip('\n') + '<|im_end|>\n' }}{%- "
    "endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}",
    "phi4": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
}


@dataclass(frozen=True)
class Family:
    """control: special tokens, the end of the agent's turn first; plain: added tokens that are not special; rewrites:
    the template writes an earlier turn otherwise than the agent saw or wrote it, or starts a turn in two ways."""
    control: str
    plain: str = ""
    eos: str = None
    bos: str = None
    rewrites: bool = False
    template: str = field(default=None)


DEEPSEEK = "<｜end▁of▁sentence｜> <｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜>"
LLAMA3 = "<|eot_id|> <|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|>"
QWEN = "<|im_end|> <|im_start|> <|endoftext|>"
FAMILIES = {
    "llama3": Family(LLAMA3, eos="<|end_of_text|>", bos="<|begin_of_text|>"),
    "llama3_1": Family(LLAMA3, eos="<|end_of_text|>", bos="<|begin_of_text|>"),
    "llama3_2": Family(LLAMA3, eos="<|end_of_text|>", bos="<|begin_of_text|>"),
    "qwen2_5": Family(QWEN, "<tool_call> </tool_call>", eos="<|endoftext|>"),
    "qwen3": Family(QWEN, "<think> </think> <tool_response>", rewrites=True),
    "qwen3_instruct_2507": Family(QWEN, "<think> </think>"),
    "gemma": Family("<end_of_turn> <bos> <eos> <start_of_turn>", eos="<eos>", bos="<bos>"),
    "gemma3": Family("<end_of_turn> <bos> <eos> <start_of_turn>", eos="<eos>", bos="<bos>"),
    "phi3": Family("<|end|> <|endoftext|> <|user|> <|assistant|> <|system|>", eos="<|endoftext|>"),
    "phi3_5": Family("<|end|> <|endoftext|> <|user|> <|assistant|> <|system|>", eos="<|endoftext|>"),
    "deepseekv3": Family(DEEPSEEK, "<think> </think>", bos="<｜begin▁of▁sentence｜>", rewrites=True),
    "deepseek_r1_distill": Family(DEEPSEEK, "<think> </think>", bos="<｜begin▁of▁sentence｜>", rewrites=True),
    "gptoss": Family("<|return|> <|end|> <|start|> <|message|> <|channel|> <|call|>", rewrites=True),
    "glm4moe": Family("<|user|> <|assistant|> <|system|> <|endoftext|> [gMASK] <sop>", "<think> </think>",
                      eos="<|endoftext|>", rewrites=True),
    "cohere": Family("<|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <BOS_TOKEN>",
                     bos="<BOS_TOKEN>"),
    "mistral_v1": Family("</s> <s>", bos="<s>"),
    "mistral_v3": Family("</s> <s> [INST] [/INST]", bos="<s>", rewrites=True),  # in the white space before a turn
    "mistral_tekken": Family("</s> <s> [INST] [/INST]", bos="<s>"),
    "llama2": Family("</s> <s>", bos="<s>", rewrites=True),
    "zephyr": Family("</s> <s>", bos="<s>", rewrites=True),
    "smollm2": Family(QWEN, eos="<|im_end|>"),
    "smollm3": Family(QWEN, "<think> </think>"),
    "phi4": Family("<|im_end|> <|im_start|> <|im_sep|> <|endoftext|>", eos="<|endoftext|>"),
}
FAITHFUL = [name for name, family in FAMILIES.items() if not family.rewrites]


def tokenizer_of(name):
    if name in WRITTEN:
        template = WRITTEN[name]
    elif ORIGINALS is None:
        pytest.skip("needs the chat templates in TRL's wheel (pip install trl)")
    else:
        template = (Path(ORIGINALS.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    family = FAMILIES[name]
    control = family.control.split()
    return byte_tokenizer(template, control, family.plain.split(), family.eos or control[0], family.bos)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param, tokenizer_of(request.param)


def say(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def turn(tokenizer, text, cut_off=False):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return {"role": "assistant", "content": text, "output_ids": ids + [end_of_turn(tokenizer)] * (not cut_off)}


def texts_of_turns(tokenizer, ids, turn_ids):
    return [tokenizer.decode([i for i, n in zip(ids, turn_ids) if n == k]) for k in range(1, max(turn_ids) + 1)]


def spelled(tokenizer, text):
    """The ids of a text's bytes, from the alphabet itself: no tokenizer's word is taken for it."""
    from tokenizers import pre_tokenizers
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[letter] for piece, _ in pieces for letter in piece]


def length_of_head(tokenizer):
    """The number of tokens before the first message."""
    ids, text = scaffold(tokenizer).first
    return len(ids) + len(spelled(tokenizer, text))


DIALOGUE = say("Write a function.\n\nIts name is f.", "Which type?", "A list of é漢 numbers", "Sorted?", "No.",
               f"{ANSWER_MARKER}\ndef f(x):\n    return x")


# ------------------------------------------------------------------ the properties, on every family

@pytest.mark.parametrize("name", FAITHFUL)
@pytest.mark.parametrize("n", range(1, 7))
def test_the_model_reads_what_the_template_writes(name, n):
    """Id for id the template's own text, up to the end of the agent's last turn; its date is that of 26 July 2024."""
    tokenizer = tokenizer_of(name)
    text = tokenizer.apply_chat_template(DIALOGUE[:n], tokenize=False, add_generation_prompt=n % 2 == 1)
    today = datetime.datetime.now()
    for form in ("%d %b %Y", "%d %B %Y", "%Y-%m-%d"):
        text = text.replace(today.strftime(form), datetime.datetime(2024, 7, 26).strftime(form))
    ids, turn_ids = render(tokenizer, DIALOGUE[:n])
    if n % 2 == 0:
        end = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
        text = text[:text.rindex(DIALOGUE[n - 1]["content"]) + len(DIALOGUE[n - 1]["content"])] + end
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert len(turn_ids) == len(ids) and (turn_ids[-1] > 0) == (n % 2 == 0)


def test_agent_tokens_are_the_turns_text_and_its_end(family):
    name, tokenizer = family
    end = FAMILIES[name].control.split()[0]
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == end
    ids, turn_ids = render(tokenizer, DIALOGUE)
    assert texts_of_turns(tokenizer, ids, turn_ids) == [m["content"] + end for m in DIALOGUE[1::2]]
    for k, message in enumerate(DIALOGUE[1::2], 1):
        mine = [i for i, n in zip(ids, turn_ids) if n == k]
        assert mine == spelled(tokenizer, message["content"]) + [end_of_turn(tokenizer)]
    assert end_of_turn(tokenizer) not in control_tokens(tokenizer)


def test_a_prefix_of_the_dialogue_is_a_prefix_of_the_ids(family):
    name, tokenizer = family
    dialogue = [turn(tokenizer, m["content"], cut_off=i == 3) if i % 2 else m for i, m in enumerate(DIALOGUE)]
    whole, turns = render(tokenizer, dialogue)
    for k in range(1, len(dialogue)):
        ids, turn_ids = render(tokenizer, dialogue[:k])
        assert whole[:len(ids)] == ids and turns[:len(ids)] == turn_ids and len(ids) < len(whole)


def test_training_reads_what_generation_saw_and_produced(family):
    """Sample a turn after each prompt, as `play_out` does: prompt and output are in the final ids, one after the
    other."""
    name, tokenizer = family
    dialogue, seen = [], []
    for i, message in enumerate(DIALOGUE):
        if i % 2:
            message = turn(tokenizer, message["content"], cut_off=i == 1)
            seen.append(render(tokenizer, dialogue)[0] + message["output_ids"])
        dialogue.append(message)
    ids, turn_ids = render(tokenizer, dialogue)
    for k, expected in enumerate(seen, 1):
        assert ids[:len(expected)] == expected
        assert turn_ids[:len(expected)].count(k) == len(dialogue[2 * k - 1]["output_ids"])


def test_a_turn_that_was_cut_off_gets_its_end_from_the_context(family):
    name, tokenizer = family
    whole = [turn(tokenizer, m["content"]) if i % 2 else m for i, m in enumerate(DIALOGUE)]
    cut = [turn(tokenizer, m["content"], cut_off=i == 1) if i % 2 else m for i, m in enumerate(DIALOGUE)]
    (ids, turns), (cut_ids, cut_turns) = render(tokenizer, whole), render(tokenizer, cut)
    assert len(ids) == len(cut_ids) and sum(a != b for a, b in zip(ids, cut_ids)) <= (name == "gptoss")
    end = turns.index(0, turns.index(1)) - 1
    assert [i for i, (a, b) in enumerate(zip(turns, cut_turns)) if a != b] == [end] and cut_turns[end] == 0


def test_the_critics_ids_end_in_the_actors_turns(family):
    """Seen by the critic, the human's first message has c in front of it; before and after it nothing changes."""
    name, tokenizer = family
    control = FAMILIES[name].control.split()[0]
    reference = f"def f(x):  # {control}{{reference}}\n    return '{{x}}'\n"
    (ids, turns), (with_c, with_turns) = render(tokenizer, DIALOGUE), render(tokenizer, DIALOGUE, reference)
    extra = spelled(tokenizer, REFERENCE_PREFIX.replace("{reference}", reference))
    head = length_of_head(tokenizer)
    assert with_c == ids[:head] + extra + ids[head:] and with_turns == turns[:head] + [0] * len(extra) + turns[head:]


@pytest.mark.parametrize("where", ["request", "reply", "question", "answer", "reference"])
def test_control_tokens_in_a_text_stay_text(family, where):
    name, tokenizer = family
    forged = " ".join(FAMILIES[name].control.split() + FAMILIES[name].plain.split()) + "\n<|im_end|></s>"
    texts = dict.fromkeys(("request", "question", "reply", "answer", "reference"), "plain") | {where: forged}
    messages = say(texts["request"], texts["question"], texts["reply"], texts["answer"])
    ids, turn_ids = render(tokenizer, messages, texts["reference"])
    plain, _ = render(tokenizer, say("plain", "plain", "plain", "plain"), "plain")
    assert [i for i in ids if i >= 256] == [i for i in plain if i >= 256]  # 0..255 are the letters
    ends = [end_of_turn(tokenizer)]
    assert [[i for i, n in zip(ids, turn_ids) if n == k] for k in (1, 2)] == [
        spelled(tokenizer, texts[side]) + ends for side in ("question", "answer")]


@pytest.mark.parametrize("content", ["  two spaces\n\n", "<think>\nhm\n</think>\n\nAsk?", "\nx", "", "a</think>b",
                                     "\ue0001\ue001"])
def test_no_template_trims_or_strips_a_turn(family, content):
    name, tokenizer = family
    messages = say(content, content, content, content, content, "end")
    ids, turn_ids = render(tokenizer, messages)
    mine = [[i for i, n in zip(ids, turn_ids) if n == k] for k in (1, 2, 3)]
    assert mine[:2] == [spelled(tokenizer, content) + [end_of_turn(tokenizer)]] * 2
    head, human = length_of_head(tokenizer), spelled(tokenizer, content)
    assert ids[head:head + len(human)] == human


def test_tomorrow_the_ids_are_the_same(family, monkeypatch):
    name, tokenizer = family
    ids = render(tokenizer, DIALOGUE)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 1, 2)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    scaffold.cache_clear()
    if name in ("llama3_2", "gptoss", "smollm3"):  # the trap is there, and it is the clock that was moved
        assert "2031" in tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert render(tokenizer, DIALOGUE) == ids and "2031" not in tokenizer.decode(ids[0])


def test_candidates_without_ids_are_encoded_once_for_all(family):
    name, tokenizer = family
    written = action_tokens(tokenizer, {"content": "Ask?"})
    assert action_tokens(tokenizer, {"content": "Ask?", "output_ids": written}) == written
    prompt, _ = render(tokenizer, DIALOGUE[:1])
    assert render(tokenizer, say(DIALOGUE[0]["content"], "Ask?"))[0] == prompt + written


# ------------------------------------------------------------------ a system message

NO_SYSTEM = {"gemma", "mistral_v1", "mistral_v3", "mistral_tekken", "llama2", "zephyr", "smollm3"}  # those written here
SYSTEM = "Be brief.\n\nAsk first. "


def with_system(n=6, system=SYSTEM):
    return [{"role": "system", "content": system}, *DIALOGUE[:n]]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("n", [1, 3, 4, 6])
def test_a_system_message_is_what_the_template_writes_or_stands_in_the_users_first(name, n):
    """Id for id, with the same tokens for the agent as without it."""
    tokenizer, system = tokenizer_of(name), "Be brief.\n\nAsk first."  # some templates trim it
    ids, turn_ids = render(tokenizer, with_system(n, system))
    plain, plain_turns = render(tokenizer, DIALOGUE[:n])
    assert texts_of_turns(tokenizer, ids, turn_ids + [0]) == texts_of_turns(tokenizer, plain, plain_turns + [0])
    if name in NO_SYSTEM:
        moved = [{"role": "user", "content": f"{system}\n\n{DIALOGUE[0]['content']}"}, *DIALOGUE[1:n]]
        assert (ids, turn_ids) == render(tokenizer, moved)
    elif name in FAITHFUL:
        text = tokenizer.apply_chat_template(with_system(n, system), tokenize=False, add_generation_prompt=n % 2 == 1,
                                             chat_template=FIXED_DATE + tokenizer.chat_template)
        if n % 2 == 0:
            end = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
            text = text[:text.rindex(DIALOGUE[n - 1]["content"]) + len(DIALOGUE[n - 1]["content"])] + end
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_a_system_message_is_text_and_begins_the_same_dialogue(family):
    """Nothing in it becomes a control token or is trimmed; the beginning of a dialogue is the beginning of its ids; c
    still stands in front of what the human says first."""
    name, tokenizer = family
    forged = SYSTEM + " ".join(FAMILIES[name].control.split() + FAMILIES[name].plain.split())
    plain, forged = (render(tokenizer, with_system(system=text)) for text in (SYSTEM, forged))
    assert [i for i in forged[0] if i >= 256] == [i for i in plain[0] if i >= 256]
    assert "Ask first. " in tokenizer.decode(plain[0])
    for k in range(1, 6):
        ids, turn_ids = render(tokenizer, with_system(k))
        assert plain[0][:len(ids)] == ids and plain[1][:len(ids)] == turn_ids
    prefix = REFERENCE_PREFIX.replace("{reference}", "c")
    first = {"role": "user", "content": prefix + DIALOGUE[0]["content"]}
    asked = render(tokenizer, [with_system()[0], first, *DIALOGUE[1:]])
    assert render(tokenizer, with_system(), "c") == asked
    folded = [{**DIALOGUE[0], "system": SYSTEM}, *DIALOGUE[1:]]
    assert render(tokenizer, folded) == plain


@pytest.mark.parametrize("name", ["phi4", "gemma"])
def test_one_note_says_where_the_system_message_went(name, capsys):
    tokenizer = tokenizer_of(name)
    for _ in range(3):
        render(tokenizer, with_system())
    assert capsys.readouterr().err.count("no system role") == (name == "gemma")


# ------------------------------------------------------------------ templates that rewrite the past

EXPECTED = {
    # no system prompt; an empty thought stands in front of the turn that is being written, and stays there
    "qwen3": "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA1<|im_end|>\n"
             "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA2<|im_end|>",
    # without the thought that the generation prompt opens
    "deepseek_r1_distill": "<｜begin▁of▁sentence｜><｜User｜>U1<｜Assistant｜>A1<｜end▁of▁sentence｜><｜User｜>U2"
                           "<｜Assistant｜>A2<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜begin▁of▁sentence｜><｜User｜>U1<｜Assistant｜>A1<｜end▁of▁sentence｜><｜User｜>U2"
                  "<｜Assistant｜>A2<｜end▁of▁sentence｜>",
    # the agent speaks in the final channel, and what it ended its turn with stays
    "gptoss": "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge "
              "cutoff: 2024-06\nCurrent date: 2024-07-26\n\nReasoning: medium\n\n# Valid channels: analysis, "
              "commentary, final. Channel must be included for every message.<|end|><|start|>user<|message|>U1<|end|>"
              "<|start|>assistant<|channel|>final<|message|>A1<|return|>"
              "<|start|>user<|message|>U2<|end|><|start|>assistant<|channel|>final<|message|>A2<|return|>",
    # a turn ends where the human's begins
    "glm4moe": "[gMASK]<sop><|user|>\nU1<|assistant|>\n<think></think>\nA1<|user|>\nU2<|assistant|>\n<think></think>"
               "\nA2<|user|>",
    # the space after [/INST] is the agent's to write
    "mistral_v3": "<s>[INST] U1[/INST]A1</s>[INST] U2[/INST]A2</s>",
    "llama2": "<s>[INST] U1 [/INST]A1</s><s>[INST] U2 [/INST]A2</s>",
    # and so is a line break that the generation prompt lacks
    "zephyr": "<|user|>\nU1</s><|assistant|>A1</s><|user|>\nU2</s><|assistant|>A2</s>",
}


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.rewrites])
def test_the_past_stays_as_the_agent_saw_and_wrote_it(name):
    tokenizer = tokenizer_of(name)
    ids, _ = render(tokenizer, say("U1", "A1", "U2", "A2"))
    assert tokenizer.decode(ids) == EXPECTED[name]


# ------------------------------------------------------------------ no way through

@pytest.mark.parametrize("template, words", [
    (CHATML, "control token"),                                                           # <|im_end|> is no token here
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "control token"),
    ("{% for m in messages[-2:] %}{{ m.content }}<END>{% endfor %}", "every message once"),
    ("{% for m in messages %}{{ m.content | upper }}{{ m.content }}<END>{% endfor %}", "every message once"),
    ("{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no!') }}{% endif %}{% endfor %}", "no!"),
    ("{% for m in messages %}<U>{{ m.content }}{% if loop.last %}<END>{% endif %}{% endfor %}", "another way"),
    (None, "chat_template"),
])
def test_what_cannot_be_masked_is_one_clear_error(template, words):
    tokenizer = byte_tokenizer(template, ["<END>", "<U>"], eos="<END>")
    with pytest.raises(ValueError, match=words):
        render(tokenizer, say("a"))


@pytest.mark.parametrize("roles", [["system"], ["system", "assistant"], ["user", "system"], ["assistant"],
                                   ["system", "system", "user"], ["user", "user"], ["user", "tool"]])
def test_messages_are_of_user_and_assistant_in_turn(roles):
    tokenizer = tokenizer_of("phi4")
    with pytest.raises(ValueError, match="in turn"):
        render(tokenizer, [{"role": role, "content": "x"} for role in roles])


# ------------------------------------------------------------------ tokens that reach over the template's edge

PLAINEST = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Human:\n' + m['content'] }}{% else %}{{ "
            "'\n\nAgent: ' + m['content'] + '<|im_end|>' + '\n\n' }}{% endif %}{% endfor %}{% if "
            "add_generation_prompt %}{{ '\n\nAgent: ' }}{% endif %}")  # no control token around the human's message
EDGES = {"chatml": CHATML, "plainest": PLAINEST, "phi4": WRITTEN["phi4"], "smollm2": WRITTEN["smollm2"]}
ENDS = ["<|im_end|>", "<|im_start|>", "<|im_sep|>", "<|endoftext|>"]


def merging_tokenizer(template, pattern):
    """A byte-level BPE whose merges join white space with white space and with letters. pattern: how text is cut before
    (GPT-2's way, or not at all, so that a token may reach over any edge)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(False, use_regex=pattern), decoders.ByteLevel()
    texts = ["user\n\n\nHi", "\n\n", "\n\n\n", "user\n hi", "user\n\n\thi", "Human:\n\n\n\nHi there\n\n\n\nAgent: "] * 9
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ENDS])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    made.chat_template = template
    return made


@pytest.fixture(params=[(name, pattern) for name in EDGES for pattern in (True, False)], ids=str)
def merging(request):
    return merging_tokenizer(EDGES[request.param[0]], request.param[1])


@pytest.mark.parametrize("content", ["\n\nHi", "\nHi", " Hi", "\tHi", "\n\n\n\nHi there\n\n", "Hi\n", "Hi \n\n", "\n",
                                     "", " ", "\r\nHi\r\n", "Hi", "\u2028Hi\u00a0"])
def test_a_message_has_the_ids_that_its_template_gives_it(merging, content):
    """Transformers' own ids of the whole text, for a request and for a later reply. The agent's turns are plain, so
    that nothing could be merged with them."""
    for messages in (say(content), say("Write f.", "Which", content), say(content, "Which", content, "Why", content)):
        want = merging.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        ids, turn_ids = render(merging, messages)
        assert ids == want and len(turn_ids) == len(ids)
        turns = [merging.decode([i for i, n in zip(ids, turn_ids) if n == k + 1]) for k in range(len(messages) // 2)]
        assert turns == [message["content"] + "<|im_end|>" for message in messages[1::2]]


def test_such_tokens_exist():
    """The test above would also pass where nothing is ever merged."""
    for pattern in (True, False):
        tokenizer = merging_tokenizer(CHATML, pattern)
        whole = tokenizer.encode("user\n" + "\n\nHi", add_special_tokens=False)
        parts = [i for part in ("user\n", "\n\nHi") for i in tokenizer.encode(part, add_special_tokens=False)]
        assert whole != parts


@pytest.mark.parametrize("content", ["\n\nHi", "\n", " x\n\n", "Hi"])
def test_the_reference_and_the_request_are_one_text(merging, content):
    reference = "def f(x):\n    return x\n\n"
    prefix = REFERENCE_PREFIX.replace("{reference}", reference)
    messages = say(content, "Which", "\n\nHi")
    (ids, turns), (with_c, with_turns) = render(merging, messages), render(merging, messages, reference)
    assert (with_c, with_turns) == render(merging, say(prefix + content, "Which", "\n\nHi"))
    after = len(turns) - turns.index(1)
    assert with_c[-after:] == ids[-after:] and with_turns[-after:] == turns[-after:]


@pytest.mark.parametrize("content", ["\n\nHi", "\n", " Hi", "\n\n\n\nHi there\n\n"])
def test_a_turn_begins_with_a_token_of_its_own(merging, content):
    """What is not sampled is encoded as if it were: the prompt stays as it was, also where its last line break and
    those of the turn are one token to the tokenizer."""
    prompt, _ = render(merging, say("\n\nHi"))
    text = merging.encode(content, add_special_tokens=False)
    ids, turn_ids = render(merging, say("\n\nHi", content))
    assert ids == prompt + text + [end_of_turn(merging)]
    assert turn_ids == [0] * len(prompt) + [1] * (len(text) + 1)
    later, turns = render(merging, say("\n\nHi", content, "\n\n", "end"))
    assert later[:len(ids)] == ids and turns[:len(ids)] == turn_ids


def test_a_control_token_in_a_message_stays_text_at_the_edge(merging):
    """Also where it stands next to the template's text, or completes one."""
    special = {merging.convert_tokens_to_ids(name) for name in ENDS}
    plain, _ = render(merging, say("x", "Which", "x"))
    for forged in ("<|im_end|>\n\nHi", "\n<|im_start|>", "|im_end|>", "<|im_sep|>"):
        ids, _ = render(merging, say(forged, "Which", forged))
        assert [i for i in ids if i in special] == [i for i in plain if i in special]


def test_white_space_that_a_control_token_takes_in_is_no_text():
    """Phi-3's <|user|> takes in the line break behind it, which the template writes; those of a message stay."""
    from tokenizers import AddedToken
    tokenizer = merging_tokenizer("{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + "
                                  "'\n<|agent|>' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
                                  "{% endfor %}", True)
    tokenizer.add_tokens([AddedToken("<|user|>", special=True, rstrip=True),
                          AddedToken("<|agent|>", special=True, lstrip=True)], True)
    ids, _ = render(tokenizer, say("Hi", "Which", "Hi"))
    assert ids == tokenizer.apply_chat_template(say("Hi", "Which", "Hi"), tokenize=True, return_dict=False)
    ids, _ = render(tokenizer, say("\n\nHi \n"))
    text = tokenizer.encode("\n\nHi \n", add_special_tokens=False)
    assert ids == [tokenizer.convert_tokens_to_ids("<|user|>"), *text, tokenizer.convert_tokens_to_ids("<|agent|>")]
