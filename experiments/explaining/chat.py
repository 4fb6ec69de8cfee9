"""Explainers and judges that ask a language model, on any server with OpenAI's chat completions.

    chat = Chat("http://127.0.0.1:8000/v1", "NAME")
    explanation = ChatExplainer(chat).explain(record)
    p = ChatJudge(chat).judge(explanation, contexts)
    chat.usage  # calls, answers, failures by their reason

A failed answer counts as none: an explanation without text, a probability of NaN. It is counted, and nothing is raised.
What the model writes is text and numbers to us; nothing of it is executed.

The key is the value of an environment variable, read anew for every call. It is neither kept nor written anywhere, and
cut out of what the model says; a server's error page is not shown either. Redirects are not followed, as they would
take the key elsewhere.

With `answers` in a file, a question that it has an answer to is not asked again, so that a stopped or changed command
pays for what is new alone.
"""

import collections
import contextlib
import dataclasses
import hashlib
import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from experiments.common.config import within
from experiments.common.errors import UserError, require
from experiments.common.files import json_line
from seqboat.interp.explainers import Contexts, Explanation, Record
from seqboat.interp.predicates import plain_symbol

LARGEST_ANSWER = 2**20  # bytes
LONGEST_TEXT = 400  # characters of an explanation
SHORTEST_SECRET = 8  # a shorter key is a word, as "none", that answers may have
RETRIED = {408, 429, 500, 502, 503, 504}
PAUSE = 0.5  # seconds before the second try; twice as long before every other

EXPLAIN = (
    "You see excerpts of token sequences, one per line. Tokens where a hidden unit fires are between << and >>. "
    "A unit can only depend on a token and the previous ones. Say in one sentence on which tokens it fires. "
    "Answer with this sentence alone."
)
JUDGE = (
    "A hidden unit fires on some tokens of a sequence: {explanation}\n"
    "You see excerpts, numbered, one a line; every token has its number before it. "
    "For every excerpt list the numbers of the tokens on which the unit fires. Answer with JSON alone, with every "
    'excerpt and an empty list where it does not fire, for example {{"1": [3, 7], "2": []}}.'
)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclasses.dataclass
class Usage:
    """How often a server was asked, how often it answered, why it did not, how many answers were `kept` from before,
    and how many contexts of a judge were `missing` in answers or not lists of their tokens."""

    calls: int = 0
    answers: int = 0
    kept: int = 0
    missing: int = 0
    failures: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def values(self) -> dict[str, Any]:
        """As plain values."""
        return {**dataclasses.asdict(self), "failures": dict(sorted(self.failures.items()))}


class _Failed(Exception):
    """One try failed. The reason never has words of the server or of a library."""

    def __init__(self, reason: str, again: bool = True):
        super().__init__(reason)
        self.reason, self.again = reason, again


@dataclasses.dataclass(frozen=True)
class Chat:
    """A model on a server: POST to `url`/chat/completions, with no answer after `timeout` seconds, and then up to
    `retries` further tries, as after HTTP 408, 429 and 5xx. `budget` is the number of calls in all, tries included.
    `answers` is the file of those answered before, by the hash of server, model and question. `key_variable` names the
    environment variable with the key; if it is not set, none is sent.

    Raises UserError for a URL that is not plain http or https, for a key that would be sent unencrypted to another
    machine, and if the file cannot be read or written. Lines of it that are not of its form are passed over.
    """

    url: str
    model: str
    timeout: float = 60.0
    retries: int = 2
    budget: int = 1000
    key_variable: str = "SEQBOAT_EXPLAINER_KEY"
    answers: Path | None = None
    usage: Usage = dataclasses.field(default_factory=Usage, compare=False)
    _known: dict[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        within(self, 0, 10, "retries")
        within(self, 1, 10**6, "budget")
        require(0 < self.timeout <= 3600, f"timeout={self.timeout}: expected seconds, above 0 and at most 3600")
        # A URL with more than this may hold a secret, so it is not repeated.
        wrong = "explainer: the URL must be http://HOST[:PORT]/PATH or https://, without user, query or spaces"
        try:
            parts = urllib.parse.urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise UserError(wrong) from None
        plain = self.url.isascii() and self.url.isprintable() and " " not in self.url
        extra = "@" in parts.netloc or "?" in self.url or "#" in self.url
        require(bool(self.url.startswith(("http://", "https://")) and host and plain and not extra), wrong)
        self._key()
        if self.answers is not None:
            self._known.update(_read(self.answers))

    def ask(self, system: str, user: str) -> str | None:
        """The model's answer, or None, which `usage` counts."""
        question = hashlib.sha256(json.dumps([self.url, self.model, system, user]).encode()).hexdigest()
        if question in self._known:
            self.usage.kept += 1
            return self._known[question]
        for attempt in range(self.retries + 1):
            if self.usage.calls >= self.budget:
                self.usage.failures["beyond the budget"] += 1
                return None
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            self.usage.calls += 1
            try:
                answer = self._post(system, user)
            except _Failed as failed:
                if not failed.again or attempt == self.retries:
                    self.usage.failures[failed.reason] += 1
                    return None
            else:
                self.usage.answers += 1
                self._keep(question, answer)
                return answer
        raise AssertionError("unreachable")

    def _keep(self, question: str, answer: str) -> None:
        if self.answers is None:
            return
        self._known[question] = answer
        try:
            with open(self.answers, "a+b") as file:  # writes at the end, wherever it was read
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    file.write(b"" if file.read() == b"\n" else b"\n")
                file.write(json_line({"question": question, "answer": answer}).encode())
        except OSError as error:
            raise UserError(f"could not write {self.answers}: {error.strerror}") from error

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        require(key.isascii() and (not key or key.isprintable()), f"{self.key_variable}: it is not printable ASCII")
        require(
            not key or self.url.startswith("https:") or self._local,
            f"explainer: the key of {self.key_variable} would be sent unencrypted to another machine: use https, or "
            "unset it",
        )
        return key

    @property
    def _local(self) -> bool:
        return _loopback(str(urllib.parse.urlsplit(self.url).hostname))

    def _post(self, system: str, user: str) -> str:
        key = self._key()
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", body, headers)
        opener = urllib.request.build_opener(_Stay, *[urllib.request.ProxyHandler({})] * self._local)
        deadline = time.monotonic() + self.timeout
        with _without_details(), opener.open(request, timeout=self.timeout) as response:
            content = bytearray()
            while part := response.read1(65536):
                content += part
                if len(content) > LARGEST_ANSWER:
                    raise _Failed("too large", again=False)
                if time.monotonic() > deadline:
                    raise _Failed("too slow")
        with _without_details():
            answer = json.loads(content)["choices"][0]["message"]["content"]
        if not isinstance(answer, str):
            raise _Failed("malformed")
        return answer.replace(key, "[key]") if len(key) >= SHORTEST_SECRET else answer


def _read(path: Path) -> dict[str, str]:
    """Answers by question; a line that a stopped program left unfinished has none."""
    found = {}
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror}") from error
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            kept = json.loads(line)
            if isinstance(kept, dict) and all(isinstance(kept.get(name), str) for name in ("question", "answer")):
                found[kept["question"]] = kept["answer"]
    return found


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _without_details() -> Iterator[None]:
    """Any failure of a request as `_Failed`, without the words of its cause."""
    try:
        yield
    except _Failed:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise _Failed(f"HTTP {error.code}", again=error.code in RETRIED) from None
    except (TimeoutError, urllib.error.URLError) as error:
        slow = isinstance(getattr(error, "reason", error), TimeoutError)
        raise _Failed("too slow" if slow else "no connection") from None
    except (OSError, http.client.HTTPException):
        raise _Failed("no connection") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _Failed("malformed") from None


@dataclasses.dataclass(frozen=True)
class ChatExplainer:
    """Asks for a sentence on `examples` excerpts of `width` tokens around the largest activations of different
    sequences and on `quiet` excerpts, of one sequence each, where the feature does not fire."""

    chat: Chat
    examples: int = 12
    quiet: int = 4
    width: int = 16

    def __post_init__(self) -> None:
        within(self, 1, 1000, "examples", "width")
        within(self, 0, 1000, "quiet")

    def explain(self, record: Record) -> Explanation:
        """Without text if there is no answer, or if the feature never fires, which is not asked about."""
        a = np.where(record.active, record.activations, 0)
        if not a.any():
            return Explanation("")
        order = np.argsort(-a.max(1), kind="stable")[: self.examples]
        lines = [self._line(record, int(n), int(a[n].argmax())) for n in order.tolist() if a[n].max() > 0]
        middle = record.contexts.tokens.shape[1] // 2
        silent = np.flatnonzero(~record.active.any(1) & record.contexts.shown.any(1))[: self.quiet]
        lines += [self._line(record, int(n), middle) for n in silent.tolist()]
        answer = self.chat.ask(EXPLAIN, "\n".join(lines))
        return Explanation(_sentence(answer or ""))

    def _line(self, record: Record, sequence: int, position: int) -> str:
        contexts, start = record.contexts, max(position - self.width + 2, 0)
        found = []
        for t in range(start, min(start + self.width, contexts.tokens.shape[1])):
            if contexts.shown[sequence, t]:
                text = plain_symbol(contexts.symbol, int(contexts.tokens[sequence, t]))
                found.append(f"<<{text}>>" if record.active[sequence, t] else text)
        return " ".join(found)


@dataclasses.dataclass(frozen=True)
class ChatJudge:
    """Asks for the tokens on which the feature fires, `batch` contexts a call. The probability is 1 at those and 0 at
    the others of a context; a context that the answer lacks, or whose numbers are not those of its tokens, has none."""

    chat: Chat
    batch: int = 5

    def __post_init__(self) -> None:
        within(self, 1, 1000, "batch")

    def judge(self, explanation: Explanation, contexts: Contexts) -> Float[np.ndarray, "n L"]:
        """Nothing is asked without an explanation."""
        p = np.full(contexts.tokens.shape, np.nan)
        asked = np.flatnonzero(contexts.shown.any(1)) if explanation.text else np.zeros(0, int)
        for start in range(0, len(asked), self.batch):
            rows = asked[start : start + self.batch]
            places = [np.flatnonzero(contexts.shown[row]) for row in rows]
            answer = self.chat.ask(
                JUDGE.format(explanation=explanation.text),
                "\n".join(
                    f"{n}. {_numbered(contexts, row, place)}"
                    for n, (row, place) in enumerate(zip(rows, places, strict=True), 1)
                ),
            )
            given = _lists(answer)
            for n, (row, place) in enumerate(zip(rows, places, strict=True), 1):
                chosen = _tokens(given.get(str(n)), len(place))
                if chosen is None:
                    self.chat.usage.missing += answer is not None
                    continue
                p[row, place] = 0.0
                p[row, place[chosen]] = 1.0
        return p


def _numbered(contexts: Contexts, row: int, place: Int[np.ndarray, " n"]) -> str:
    words = (plain_symbol(contexts.symbol, token) for token in contexts.tokens[row, place].tolist())
    return " ".join(f"{n}:{word}" for n, word in enumerate(words, 1))


def _lists(answer: str | None) -> Mapping[str, Any]:
    """The JSON object in an answer, which may be between other words; empty without one."""
    text = answer or ""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
        return found if isinstance(found, dict) else {}
    return {}


def _tokens(given: Any, count: int) -> Sequence[int] | None:
    """Numbers from 1 to `count` as places, or None if they are something else."""
    if not isinstance(given, list) or any(type(n) is not int or not 1 <= n <= count for n in given):
        return None
    return [n - 1 for n in given]


def _sentence(text: str) -> str:
    """On one line, without characters that are not to be shown, and not longer than LONGEST_TEXT."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:LONGEST_TEXT]
