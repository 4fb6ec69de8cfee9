"""Language models as explainers and judges, against a server on this machine that answers well, badly, or not."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from experiments.common.errors import UserError
from experiments.evaluation import explanations
from experiments.explaining import chat as module
from experiments.explaining.chat import Chat, ChatExplainer, ChatJudge
from experiments.explaining.words import CALLS, explaining, words
from seqboat.interp.explainers import Contexts, Explainer, Explanation, Judge, Record
from seqboat.interp.scorers import detection

KEY = "sk-a-secret-of-this-test"
TOKENS = np.array([[1, 2, 3, 4], [2, 2, 1, 3], [4, 4, 4, 4]])
ACTIVE = (TOKENS == 2) * np.array([[1.0], [3.0], [1.0]])
CONTEXTS = Contexts(TOKENS, "-abcd".__getitem__)
TEXT = Explanation("it fires on b")


def said(content):
    return 200, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


class Server(ThreadingHTTPServer):
    """Answers with the next of `answers`, (status, body) or functions of a handler, and the last one again."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests = [said("yes")], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that went away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            answer(self)
            return
        status, content = answer
        self.send_response(status, f"the key is {KEY}")
        if status == 302:
            self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setenv("SEQBOAT_EXPLAINER_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for this machine
    found = Server()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def test_an_explanation_and_its_predictions(server):
    chat = Chat(server.url, "a-model")
    explainer, judge = ChatExplainer(chat, examples=2, quiet=1, width=3), ChatJudge(chat, batch=2)
    assert isinstance(explainer, Explainer)
    assert isinstance(judge, Judge)
    server.answers = [said(" It fires\non b.\x00 "), said('Here: {"1": [2], "2": [1, 2]}'), said('```{"1": []}```')]
    explanation = explainer.explain(Record(CONTEXTS, ACTIVE))
    assert explanation == Explanation("It fires on b.", None)
    path, authorization, body = server.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (body["model"], body["temperature"]) == ("a-model", 0)
    assert body["messages"][1]["content"] == "<<b>> <<b>> a\na <<b>> c\nd d d"  # the strongest, the other, a quiet one
    p = judge.judge(explanation, CONTEXTS)
    np.testing.assert_array_equal(p, TOKENS == 2)
    assert "It fires on b." in server.requests[1][2]["messages"][0]["content"]
    assert server.requests[1][2]["messages"][1]["content"] == "1. 1:a 2:b 3:c 4:d\n2. 1:b 2:b 3:a 4:c"
    assert chat.usage.values() == {"calls": 3, "answers": 3, "kept": 0, "missing": 0, "failures": {}}
    shown = Contexts(TOKENS, CONTEXTS.symbol, np.arange(4) >= np.array([[2], [4], [4]]))
    server.answers = [said('{"1": [2]}')]
    np.testing.assert_array_equal(judge.judge(explanation, shown)[0], [np.nan, np.nan, 0, 1])
    assert server.requests[-1][2]["messages"][1]["content"] == "1. 1:c 2:d"


@pytest.mark.parametrize(
    "content",
    ["", "no", "[1]", '{"1": 2}', '{"1": [0]}', '{"1": [5]}', '{"1": [true]}', '{"1": [1.0]}', '{"1": ["1"]}', "}{",
     '{"1": null', '{"2": [1]}', "{" * 5000 + "}", '{"1":' + "[" * 100_000 + "}"],
)  # fmt: skip
def test_an_answer_that_is_not_a_list_of_tokens_is_none(server, content):
    chat = Chat(server.url, "m")
    server.answers = [said(content)]
    p = ChatJudge(chat).judge(TEXT, CONTEXTS.rows(np.array([0])))
    assert np.isnan(p).all()
    assert (chat.usage.answers, chat.usage.missing) == (1, 1)


def test_a_short_answer_counts_what_it_lacks_as_failed(server):
    server.answers = [said('{"1": [2], "2": [1, 2], "9": [1]}')]
    chat = Chat(server.url, "m")
    p = ChatJudge(chat).judge(TEXT, CONTEXTS)
    np.testing.assert_array_equal(np.isnan(p).all(1), [False, False, True])
    assert chat.usage.missing == 1
    # Two windows fire, of which one is asked about with the quiet one; nothing is answered about the second of a call.
    server.answers = [said('{"1": [2]}')]
    score = detection(ChatJudge(chat), TEXT, Record(CONTEXTS, ACTIVE), width=4).random
    assert (score.asked, score.failed) == (2, 0)
    server.answers = [said("{}")]
    score = detection(ChatJudge(chat), TEXT, Record(CONTEXTS, ACTIVE), width=4).random
    assert (score.asked, score.failed) == (2, 2)
    assert np.isnan(score.f1)


def slow(handler):
    time.sleep(0.5)


def dripping(handler):
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(40):
            handler.wfile.write(b" ")
            time.sleep(0.05)


def huge(handler):
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(400):
            handler.wfile.write(b" " * 65536)


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")


def nothing(handler):
    handler.connection.close()


@pytest.mark.parametrize(
    ("answer", "reason", "calls"),
    [
        ((500, b"error"), "HTTP 500", 3),
        ((429, b"later"), "HTTP 429", 3),
        ((401, f"wrong key {KEY}".encode()), "HTTP 401", 1),
        ((302, b""), "HTTP 302", 1),
        ((200, b"<html>"), "malformed", 3),
        ((200, b"\xff\xfe"), "malformed", 3),
        ((200, b"{}"), "malformed", 3),
        ((200, b'{"choices": []}'), "malformed", 3),
        ((200, b'{"choices": [{"message": {"content": null}}]}'), "malformed", 3),
        ((200, b"[" * 100_000), "malformed", 3),
        ((200, b"9" * 10_000), "malformed", 3),
        (slow, "too slow", 3),
        (dripping, "too slow", 3),
        (huge, "too large", 1),
        (cut, "malformed", 3),
        (nothing, "no connection", 3),
    ],
)
def test_a_failure_is_counted_and_says_nothing_of_the_key(server, answer, reason, calls, capsys, caplog):
    server.answers = [answer]
    chat = Chat(server.url, "m", timeout=0.2 if reason == "too slow" else 20.0)
    assert ChatExplainer(chat).explain(Record(CONTEXTS, ACTIVE)) == Explanation("")
    assert chat.usage.values() == {"calls": calls, "answers": 0, "kept": 0, "missing": 0, "failures": {reason: 1}}
    assert len(server.requests) == calls
    output = capsys.readouterr()
    assert KEY not in output.out + output.err + caplog.text + repr(chat) + str(chat.usage.values())


def test_a_later_try_may_succeed_and_the_budget_ends(server):
    server.answers = [(503, b""), (200, b"{"), said("good"), said("again")]
    chat = Chat(server.url, "m", budget=4)
    assert chat.ask("s", "u") == "good"
    assert chat.ask("s", "u") == "again"
    assert chat.ask("s", "u") is None
    assert chat.usage.values() == {
        "calls": 4,
        "answers": 2,
        "kept": 0,
        "missing": 0,
        "failures": {"beyond the budget": 1},
    }
    assert len(server.requests) == 4
    assert np.isnan(ChatJudge(chat).judge(TEXT, CONTEXTS)).all()


def test_what_was_answered_before_is_not_asked_again(server, tmp_path):
    path = tmp_path / "answers.jsonl"
    server.answers = [said(f"good {KEY}"), (400, b""), said("later")]
    first = Chat(server.url, "m", answers=path)
    assert [first.ask("s", "u"), first.ask("s", "other")] == ["good [key]", None]
    path.write_bytes(path.read_bytes() + b'\xff\n[1]\n{"question": "a"}\n{"question": "cut off')
    second = Chat(server.url, "m", answers=path, budget=1)
    assert [second.ask("s", "u"), second.ask("s", "other"), second.ask("s", "other")] == [
        "good [key]",
        "later",
        "later",
    ]
    assert second.usage.values() == {"calls": 1, "answers": 1, "kept": 2, "missing": 0, "failures": {}}
    third = Chat(server.url, "m", answers=path, budget=1)
    assert third.ask("s", "other") == "later", "kept after a line that was cut off"
    assert Chat(server.url, "another", answers=path, budget=1).ask("s", "u") == "later", "of another model"
    assert len(server.requests) == 4
    assert KEY not in path.read_bytes().decode(errors="replace")


def test_a_file_of_answers_that_cannot_be_used_is_named(server, tmp_path):
    with pytest.raises(UserError, match=r"could not read .*: Is a directory"):
        Chat(server.url, "m", answers=tmp_path)
    with pytest.raises(UserError, match=r"could not write .*gone"):
        Chat(server.url, "m", answers=tmp_path / "gone" / "answers.jsonl").ask("s", "u")


def test_nobody_is_asked_without_a_reason(server):
    chat = Chat(server.url, "m")
    assert ChatExplainer(chat).explain(Record(CONTEXTS, 0.0 * ACTIVE)) == Explanation("")
    assert np.isnan(ChatJudge(chat).judge(Explanation(""), CONTEXTS)).all()
    assert server.requests == []


def test_a_server_that_is_not_there(server):
    url = server.url
    server.shutdown()
    server.server_close()
    chat = Chat(url, "m", retries=0)
    assert chat.ask("s", "u") is None
    assert chat.usage.failures == {"no connection": 1}


def test_the_key_is_sent_and_never_kept_or_repeated(server, monkeypatch):
    chat = Chat(server.url, "m")
    server.answers = [said(f"your key is {KEY}.")]
    assert chat.ask("s", "u") == "your key is [key]."
    assert server.requests[-1][1] == f"Bearer {KEY}"
    assert KEY not in repr(vars(chat))
    assert KEY not in json.dumps(server.requests[-1][2])
    monkeypatch.setenv("OTHER_KEY", " none\n")
    other = Chat(server.url, "m", key_variable="OTHER_KEY")
    server.answers = [said("none fires")]
    assert other.ask("s", "u") == "none fires"
    assert server.requests[-1][1] == "Bearer none"
    monkeypatch.delenv("OTHER_KEY")
    other.ask("s", "u")
    assert server.requests[-1][1] is None


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("http://example.com/v1", KEY, "SEQBOAT_EXPLAINER_KEY would be sent unencrypted to another machine: use https"),
        ("https://example.com/v1", "a\nb" + KEY, "^SEQBOAT_EXPLAINER_KEY: it is not printable ASCII$"),
        ("https://example.com/v1", "\u00fc" + KEY, "^SEQBOAT_EXPLAINER_KEY: it is not printable ASCII$"),
        ("file:///etc/passwd", "", "the URL must be http"),
        (f"https://user:{KEY}@example.com/v1", "", "the URL must be http"),
        (f"https://example.com/v1?key={KEY}", "", "the URL must be http"),
        ("https:///v1", "", "the URL must be http"),
        ("http://[::1/v1", "", "the URL must be http"),
        ("http://localhost:port/v1", "", "the URL must be http"),
        ("http://local host/v1", "", "the URL must be http"),
        ("localhost:8000", "", "the URL must be http"),
    ],
)
def test_a_url_or_a_key_that_cannot_be_is_refused_without_repeating_it(monkeypatch, url, key, message):
    monkeypatch.setenv("SEQBOAT_EXPLAINER_KEY", key)
    with pytest.raises(UserError, match=message) as caught:
        Chat(url, "m")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:1/v1", "http://127.0.0.1/v1", "http://[::1]:1/v1", "https://e.org"])
def test_a_key_may_be_sent_to_this_machine_or_encrypted(monkeypatch, url):
    monkeypatch.setenv("SEQBOAT_EXPLAINER_KEY", KEY)
    assert Chat(url, "m").url == url


@pytest.mark.parametrize(
    ("values", "field"), [({"timeout": 0.0}, "timeout"), ({"retries": -1}, "retries"), ({"budget": 0}, "budget")]
)
def test_numbers_that_cannot_be_are_refused(values, field):
    with pytest.raises((UserError, ValueError), match=f"^{field}="):
        Chat("https://example.com", "m", **values)
    with pytest.raises(ValueError, match="batch=0"):
        ChatJudge(Chat("https://example.com", "m"), batch=0)
    with pytest.raises(ValueError, match="examples=0"):
        ChatExplainer(Chat("https://example.com", "m"), examples=0)


def test_features_are_explained_and_judged_by_the_server(server, monkeypatch):
    """On one window of every sequence; the key is nowhere, though the answers have it."""
    monkeypatch.setattr(explanations, "answers", lambda run: False)
    task = type("Task", (), {"config": type("C", (), {"vocabulary_size": 5}), "symbol": "-abcd".__getitem__})()
    run = type("Run", (), {"task": task})()
    rng = np.random.default_rng(0)
    examples = [{"inputs": rng.integers(1, 5, 40), "lengths": np.array(40 - 8 * (n % 2))} for n in range(6)]
    asked = explaining(server.url, "a-model", 3)
    assert asked.chat.budget == 3 * CALLS
    server.answers = [said(f"It fires on {KEY}."), said('{"1": [1], "2": []}')]
    found = words(run, examples, asked)
    active = 1.0 * np.stack([example["inputs"] == 2 for example in examples])
    active *= np.arange(40) < np.array([int(example["lengths"]) for example in examples])[:, None]
    (first,) = found.of("m", 1, None, [7], active[None], active[None])
    assert first["text"] == "It fires on [key]."
    assert first["failed"] > 0, "the third excerpt has no answer"
    assert first["asked"] > first["failed"]
    assert set(first["scores"]) == set(explanations.COLUMNS) | {"detection_f1"}
    judged = [body["messages"][1]["content"] for _, _, body in server.requests[1:]]
    assert all(len(line.split()) <= 17 for content in judged for line in content.splitlines()), "windows alone"
    values = found.values()
    assert (values["name"], values["made_from"], values["scored_on"]) == ("a-model", 3, 3)
    assert values["usage"]["calls"] == len(server.requests)
    assert KEY not in json.dumps([values, first]) + repr(found.explaining)


def test_calls_without_an_answer_are_warned_of():
    assert explaining("predicates").unanswered() == ""
    asked = explaining("http://127.0.0.1:1/v1", "a-model")
    assert asked.chat is not None
    asked.chat.usage.calls = 5
    assert asked.unanswered() == ""
    asked.chat.usage.answers = 2
    asked.chat.usage.failures.update({"timeout": 1, "connection": 2})
    assert asked.unanswered() == "a-model answered 2 of 5 calls; questions given up: connection 2, timeout 1"


@pytest.mark.parametrize(
    ("explainer", "model", "message"),
    [
        ("predicates", "m", "--explainer_model: predicates need no model; name its server with --explainer=URL"),
        ("rules", None, "--explainer: expected predicates, or the URL of a server, http://HOST:PORT/v1"),
        ("http://127.0.0.1:1/v1", None, "--explainer_model=NAME is missing"),
        ("http://user:secret@host/v1", "m", "explainer: the URL must be"),
        ("ftp://host", "m", "explainer: the URL must be"),
    ],
)
def test_who_cannot_explain_is_refused(explainer, model, message):
    with pytest.raises(UserError, match=message) as found:
        explaining(explainer, model)
    assert "\n" not in str(found.value)
    assert "secret" not in str(found.value)
