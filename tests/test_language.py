"""House language: phrases that a native engineer would not use, and what to write instead (CONTRIBUTING.md)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("seqboat", "experiments", "configs", "launch", "notebooks", "tests", "docs", "examples")

# After "bytes", "cost" and the like, a rate is "per token", not "a token".
COUNTS = (
    "FLOPs?|bytes?|bits|elements?|examples?|tokens?|steps?|rows|numbers?|scalars?|costs?|keys?|pairs?|"
    "milliseconds|ms|registers|leaf|leaves|collective|bias|bucket"
)
UNITS = (
    "second|element|token|update|step|channel|row|direction|stream|position|thread|program|layer|distance|leaf|pixel"
)

# Pattern -> what to write instead. Identifiers count too: underscores are read as spaces.
BANNED = {
    r"\b(?:wak(?:e|es|ing|ened)|woken?|awake)\b": "activate",
    r"\b(?:go|goes|going|gone|went) on\b": "resume, continue",
    r"\bso many\b": "N, or the name of the count",
    r"\b(?:price[sd]?|pricing)\b": "penalty (of activation), cost",
    r"(?<!here )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|\w+er\b)": "is not a",
    r"\b(?:of|than) those before\b|\bthose before it\b": "previous",
    rf"\b(?:{COUNTS}) an? (?:{UNITS})\b": "per",
    r"\b(?:\d[\d,]*|step`?) updates\b|\bupdates of (?:a|the) (?:run|training)\b": "steps",
    r"\bexamples an update\b": "batch size",
    r"\bset(?:s|ting)? aside\b": "quarantine",
    r"\b(?:is|are|was) wanted\b|\bwhat is wanted\b": "expected",
    r"\b(?:results?|best|recipes?|numbers?) of the field\b": "best published",
    r"\b(?:stands?|stood|standing) (?:elsewhere|there|here|before|behind|where|beside)\b": "is",
}
PATTERNS = [(re.compile(pattern, re.IGNORECASE), instead) for pattern, instead in BANNED.items()]

# Lines with another meaning, without their indentation: names on disk, and quotations.
ALLOWED = {
    "seqboat/version.py": {
        '("train", "activation_price"): "activation_penalty",',
        'if isinstance(generated, dict) and generated.get("condition") == "price":',
    },
    "experiments/studies/continual.py": {
        'about = {"seeds": len(seeds), "prices": PENALTIES, "steps": steps, "batch": BATCH, "learning_rate": RATE}',
    },
    "tests/experiments/test_format_1.py": {
        'meta["config"] |= {"mesh": "fsdp=2,tensor=4", "hyper": {"condition": "price", "at": None}}',
        'old_names = {"hyper", "deviation", "carry", "blocks_per_trip", "activation_price", "tensorboard"}',
    },
}


def findings(line: str) -> list[tuple[str, str]]:
    """The banned phrases of a line, each with what to write instead."""
    spaced = line.replace("_", " ")
    return [(found[0], instead) for pattern, instead in PATTERNS for found in pattern.finditer(spaced)]


def files():
    inside = [path for folder in FOLDERS for end in ("py", "md") for path in (ROOT / folder).rglob(f"*.{end}")]
    # The list of these words, and the old names of what was renamed.
    others = {Path(__file__), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"}
    return sorted({*inside, *ROOT.glob("*.md")} - others)


def test_every_sentence_is_in_the_house_language():
    wrong = []
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip() not in ALLOWED.get(name, ()):
                wrong += [f"{name}:{number}: {phrase!r}: write {instead!r}" for phrase, instead in findings(line)]
    assert not wrong, "\n".join(wrong)


def test_allowed_lines_exist_and_are_needed():
    for name, lines in ALLOWED.items():
        text = {line.strip() for line in (ROOT / name).read_text().splitlines()}
        for line in lines:
            assert line in text, f"{name}: {line}"
            assert findings(line), f"{name}: {line}"


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("A unit wakes only for some tokens", "activate"),
        ("def test_a_run_goes_on(tmp_path):", "resume, continue"),
        ("attends to a cache of so many rows", "N, or the name of the count"),
        ("at a price of attention", "penalty (of activation), cost"),
        ("`x` is no Python file", "is not a"),
        ("the bias depends on those before it", "previous"),
        ("at 60 bytes an element", "per"),
        ("after 800 updates", "steps"),
        ("Damaged steps are set aside", "quarantine"),
        ("a tuple is wanted", "expected"),
        ("the best of the field", "best published"),
        ("where the rows stand here", "is"),
    ],
)
def test_what_is_banned_is_found(line, instead):
    assert [word for _, word in findings(line)] == [instead]


@pytest.mark.parametrize("line", ["taken", "there is no file", "blocks are no larger", "a second time", "an element"])
def test_other_meanings_are_not_found(line):
    assert not findings(line)
