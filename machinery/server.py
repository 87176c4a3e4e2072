"""Many questions to a language-model server that may fail at any moment.

Any OpenAI-compatible server will do (vLLM, llama.cpp, `transformers serve`, a provider's). Three things make asking
it many thousand times bearable, and none is particular to SWEET-RL: some requests are in flight at a time and no more;
a request that failed in a way that may pass is sent again after a pause, longer each time and never quite the same
(back-off and jitter, so that a server which comes back is not met by everybody at once); and when the server is gone
for good, everybody stops asking, so that the caller can keep what is finished.

Used by `simulator.EndpointHuman`. Exercised by `python -m pytest tests/test_humans.py`.
"""
import asyncio
import concurrent.futures
import contextlib
import json
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from machinery.files import InputError
from machinery.optional import require
from machinery.train import arg

PAUSE = 0.5  # seconds before the second try


@dataclass(frozen=True)
class Server:
    """A human that is a language model, behind a URL or here; the first four are for a server."""
    model: str = ""
    """The model to ask for (default: the only one that the server lists)."""
    parallel: int = 16
    """Requests in flight at most."""
    timeout: float = 60.0
    """Seconds until a request without a whole answer counts as lost."""
    retries: int = arg(8, least=0)
    """Further tries of a request that failed; then the server counts as gone."""
    max_tokens: int = 128
    """Tokens of a reply at most."""
    temperature: float = arg(0.0, least=0)
    """Sampling temperature of the replies; 0: always the likeliest token."""
    leaks: Literal["keep", "replace"] = "replace"
    """A reply that shows code of the reference: keep it, or ask once more and then replace it."""
    prompt: str = ""
    """What it is told: a file with {solution}, {conversation} and, if wanted, {request}."""


def text_of(content):
    """The text of a message's content: a string, null, or a list of parts, of which the texts count. TypeError for
    anything else."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        texts = [part.get("text") for part in parts if part.get("type", "text") in ("text", "output_text")]
        return "".join(text for text in texts if isinstance(text, str))
    if content is not None and not isinstance(content, str):
        raise TypeError(f"the content is no text but {type(content).__name__}")
    return content or ""


def listed(body):
    """The names in a server's list of models."""
    return [model["id"] for model in body["data"]]


def said(body):
    """What the model says in a server's answer: "" if nothing, or if it refused."""
    message = body["choices"][0]["message"]
    return "" if message.get("refusal") else text_of(message.get("content")).strip()


def words_of(text):
    """What a server says in the body of an error: its message, wherever it puts it, or else all of the text."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        page = text.lstrip().startswith("<")  # of a proxy
        return re.sub(r"(?is)<(style|script)\b.*?</\1>|<[^>]*>", " ", text) if page else text
    for key in ("message", "detail", "error"):
        if isinstance(body, dict) and body.get(key):
            inner = body[key]
            return words_of(inner if isinstance(inner, str) else json.dumps(inner))
    return json.dumps(body, ensure_ascii=False)


class Endpoint:
    """A model behind an OpenAI-compatible server. The key, if it needs one, is read from OPENAI_API_KEY and appears in
    no message.

    Made with a URL, a `Server`, and a seed that is sent along at a temperature above 0; InputError if the URL holds a
    key, nobody is there, the key is refused, or it is open which model to ask for.
    """

    def __init__(self, url, cfg, seed=0):
        openai = require("openai", url)
        try:
            parts = urlsplit(url)
            plain = parts.port != 0 and parts.hostname and not (parts.username or parts.password or parts.query)
        except ValueError:  # a port that is no number
            plain = False
        if not plain:
            raise InputError("a server's URL should be like http://host:8000/v1, without a key: keys go into the "
                             "environment variable OPENAI_API_KEY")
        self.url, self.openai, self.cfg, self.jitter = url, openai, cfg, random.Random(0)
        self.seeded = {"seed": seed} if cfg.temperature else {}
        self.key, self.gone, self.status = os.environ.get("OPENAI_API_KEY"), None, 0
        with self._online():
            served = self._try(lambda: self._read(self.client.models.with_raw_response.list(), listed), 3,
                               patient=not cfg.model)
        if served is None and self.status in (0, 401, 403):  # any other answer shows that somebody is there
            raise InputError(f"{url}: {self.gone}")
        if not cfg.model and len(served or ()) != 1:
            known = f"It lists {served or 'none'}" if self.gone is None else self.gone
            raise InputError(f"{url}: which model? {known}; name one with --human-model")
        self.model, self.gone = cfg.model or served[0], None

    @contextlib.contextmanager
    def _online(self):
        """While it lasts, requests can be sent: a client, and the event loop of its requests in a thread of its own. (A
        request in an event loop can be given up at any moment; one in a thread ends when the server likes.)"""
        self.client = self.openai.AsyncOpenAI(base_url=self.url, api_key=self.key or "none", max_retries=0,
                                              timeout=None)
        self.loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(self.client.close(), self.loop).result()
            self.loop.call_soon_threadsafe(self.loop.stop)
            thread.join()
            self.loop.close()

    def _read(self, request, parse):
        """parse(the JSON value that answers a request). OpenAIError if it is not there, whole, in time: the request is
        dropped then, with its connection. ValueError if it is of another form."""
        future = asyncio.run_coroutine_threadsafe(request, self.loop)
        try:
            text = future.result(self.cfg.timeout).http_response.text
        except concurrent.futures.TimeoutError:
            raise self.openai.OpenAIError(f"no whole answer within {self.cfg.timeout:g} seconds") from None
        finally:
            future.cancel()
        try:
            return parse(json.loads(text))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"an answer of another form ({error!r}): {words_of(text)}") from None

    def _try(self, ask, retries, patient=True):
        """ask(), again while it fails in a way that may pass; None, and the reason in self.gone, if it failed for
        good. patient: an answer that says "not now" is one of these ways."""
        for attempt in range(retries + 1):
            if self.gone:
                return None
            try:
                return ask()
            except (self.openai.OpenAIError, ValueError) as error:
                if getattr(error, "code", None) == "content_filter":  # how some providers refuse
                    return ""
                # 0: nobody answered; 200: the body is cut off or of another form
                status = getattr(error, "status_code", 200 if isinstance(error, ValueError) else 0)
                response = getattr(error, "response", None)
                words = error if response is None else f"{status} {words_of(response.text)}"
                reason = f"{type(error).__name__}: {words}"
            passing = status < 400 or patient and (status >= 500 or status in (408, 409, 429))
            if not passing or attempt == retries:
                break
            time.sleep(min(30.0, PAUSE * 2 ** attempt) * (0.5 + 0.5 * self.jitter.random()))
        if self.key:
            reason = reason.replace(self.key, "***")
        self.status, self.gone = status, " ".join(reason.split())[:300]
        return None

    def _complete(self, messages):
        def ask():
            return self._read(self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, max_tokens=self.cfg.max_tokens,
                temperature=self.cfg.temperature, **self.seeded), said)
        return self._try(ask, self.cfg.retries)

    def complete(self, conversations):
        """The model's message after each conversation (a list of messages): "" if it was empty or refused, None if the
        server is gone, with the reason in `.gone`."""
        with self._online(), ThreadPoolExecutor(self.cfg.parallel) as pool:
            return list(pool.map(self._complete, conversations))
