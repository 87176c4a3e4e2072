"""A server that samples the policy's turns: `--policy-server URL`.

A server that is made for sampling (vLLM) writes many times faster than the loop in machinery/sampling.py. It is asked
with token ids and answers with token ids, so that what is trained on is what was sampled, token for token; text would
have to be tokenized again, which does not always give the same tokens. It does not score: a server's log-probs of a
prompt share no prefixes, so log-probs are computed here.

Three things can go wrong without a word, and each has its guard. Which model: a request names the directory of the
stage's model, and the server must list it (one model, or several where it knows adapters). Which weights: for some
turns of every call, the server's log-probs are compared with those of the model here. A difference is an error, not a
note: what comes after takes the turns for samples of this very policy, and nobody would see that they are not. Which
distribution: all that a model's generation_config might change is sent along.

A seed of each row's key goes with each request. What a server makes of it is its own affair: sums round otherwise where
it computes in batches of other sizes, so the same command need not write the same file.

Requests, tries and pauses: machinery/server.py. Exercised by `python -m pytest tests/test_policy_server.py`.
"""
import os
from itertools import groupby

from kernels.logprob import reference_sums
from machinery.bars import note
from machinery.files import InputError
from machinery.sampling import seed_of
from machinery.server import Endpoint, Server, listed
from machinery.template import control_tokens, end_of_turn, known_ids
from machinery.train import model_below

REQUESTS = Server(model="named by each request", parallel=64, timeout=600.0)
CHECKED = 8  # turns of each call whose log-probs are compared
# nats a token, the mean of absolute differences: about ten times what rounding gives
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def policy_server(machine):
    """The server of a Machine, or None. InputError where there is one to be and nobody is there."""
    return PolicyServer(machine) if machine.policy_server else None


class PolicyServer(Endpoint):
    """Samples in the place of a model that is loaded here, too."""

    def __init__(self, machine):
        super().__init__(machine.policy_server, REQUESTS)
        self.dtype = machine.dtype

    def sample(self, model, tokenizer, prompts, keys, *, max_tokens, temperature=1.0, top_p=1.0,
               memory=None, places=None):
        """As `sampling.sample` has it; a server remembers by itself. keys: tuples; where neighbours have the same
        prompt and differ in the last entry alone, they are one request. A turn is cut off at an id that is no token,
        too. InputError where the server serves another model, answers in another form, or is gone."""
        path = tokenizer.name_or_path
        self.model = self.name_of(path)
        end, control = end_of_turn(tokenizer), control_tokens(tokenizer)
        decoding = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [end, *control],
            "ignore_eos": True,  # the model's own ends; those above count
            "return_token_ids": True,
            "logprobs": 0,  # of the sampled tokens alone
        }
        requests = []

        def together(row):
            prompt, key = row
            return prompt, key[:-1]
        for (prompt, _), rows in groupby(zip(prompts, keys), together):
            (_, key), *others = rows
            seed = seed_of(key) >> 33  # small enough for any server
            requests.append({**decoding, "prompt": prompt, "n": 1 + len(others), "seed": seed})
        said = []
        for answer in self.complete(requests):
            said += answer or [None]
        if None in said:
            raise InputError(f"{self.url} does not answer any more: {self.gone}; what is finished is kept, and the "
                             "same command goes on")
        allowed = known_ids(tokenizer).difference(control)
        turns = [cut_off(ids, end, allowed) for ids, _ in said]
        for turn, (ids, _) in zip(turns, said):
            if len(turn) == len(ids) < max_tokens and turn[-1:] != [end]:
                raise InputError(f"{self.url}: a turn ends without a token that ends one; expected all ids that were "
                                 "sampled, the last one included")
        rows = list(zip(prompts, said))
        self.check(model, path, rows[::max(1, len(rows) // CHECKED)])
        return turns

    def name_of(self, path):
        """What the server calls the model of a directory or name. InputError where it does not list it."""
        with self._online():
            served = self._try(lambda: self._read(self.client.models.with_raw_response.list(), listed),
                               self.cfg.retries)
        for name in served or ():
            if os.path.abspath(name) == os.path.abspath(path):
                return name
        what = self.gone or f"serves {', '.join(served)}"
        raise InputError(f"{self.url}: {what}; expected {path}; serve it, and the same command goes on: "
                         f"{how_to_serve(path, self.dtype)}")

    def _complete(self, request):
        def ask():
            return self._read(self.client.completions.with_raw_response.create(
                model=self.model, prompt=request["prompt"], extra_body=request), choices)
        answer = self._try(ask, self.cfg.retries)
        if answer and (None in answer[0] or len(answer) != request["n"]):
            raise InputError(f"{self.url}: answers without token ids, their log-probs or all turns; expected vLLM from "
                             "0.10.2 on, or another server that knows return_token_ids, logprobs and n")
        return answer

    def check(self, model, path, rows):
        """InputError where the server's log-probs of some turns are not those of the model here."""
        examples, theirs = [], []
        for prompt, (ids, logprobs) in rows:
            numbers = range(1, len(ids) + 1)  # a token is a turn here, so that each has its own log-prob
            examples.append(([*prompt, *ids], [0] * len(prompt) + [*numbers]))
            theirs += logprobs
        ours = sum(reference_sums(model, examples), [])
        difference = sum(abs(a - b) for a, b in zip(ours, theirs)) / len(ours)
        most = TOLERANCE[self.dtype]
        if not difference <= most:
            raise InputError(f"{self.url}: its log-probs differ from those of {path} here by {difference:.2g} nats a "
                             f"token (at most {most:g}): other weights, another number format, or not the raw ones; "
                             f"serve it anew: {how_to_serve(path, self.dtype)}")


def choices(body):
    """[(ids, log-probs)] of the turns in a server's answer, None where it gives none."""
    found = []
    for choice in body["choices"]:
        logprobs = choice.get("logprobs") or {}
        found.append((choice.get("token_ids"), logprobs.get("token_logprobs")))
    return found


def cut_off(ids, end, allowed):
    """The turn that sampled ids begin with: up to its end-of-turn token, or to where one is not allowed."""
    turn = []
    for token in ids:
        if token not in allowed:
            break
        turn.append(token)
        if token == end:
            break
    return turn


def how_to_serve(path, dtype):
    """The command that serves a model under its own path."""
    model, adapters = path, ""
    if os.path.exists(f"{path}/adapter_config.json"):
        model, adapters = model_below(path), f" --enable-lora --lora-modules {path}={path}"
    return f"vllm serve {model} --dtype {dtype}{adapters}"


def tell_how_to_serve(folder, machine):
    """Say how to serve what a stage has left, if that is a model."""
    if any(folder.glob("*config.json")):
        note(f"serve it: {how_to_serve(folder, machine.dtype)}")
