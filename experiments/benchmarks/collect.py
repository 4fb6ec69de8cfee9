"""Adds a part of launch/accelerator.sh to its results: python -m experiments.benchmarks.collect DIR PART STATUS SECONDS

Moves DIR/PART.json, if the part wrote one, into DIR/results.json, and DIR/PART.log to the end of DIR/log.txt, so that
DIR holds few files however it ends. Uses the standard library only: it runs after every part, and jax starts slowly.
"""

import json
import sys
from pathlib import Path
from typing import Any

STATES = {"0": "done", "124": "out of time", "skipped": "skipped"}
# Equal for all parts, and stored once.
COMMON = ("hardware", "device_kind", "versions")
LINES = 12


def add(directory: Path, name: str, status: str, seconds: int) -> dict[str, Any]:
    """The results with this part, as written."""
    results_path, log, rows = directory / "results.json", directory / f"{name}.log", directory / f"{name}.json"
    results = json.loads(results_path.read_text()) if results_path.exists() else {"parts": {}}
    output = log.read_text(errors="replace") if log.exists() else ""
    part: dict[str, Any] = {"status": STATES.get(status, f"failed, status {status}"), "seconds": seconds}
    if rows.exists():
        found = json.loads(rows.read_text())
        results |= {key: found.pop(key) for key in COMMON}
        part |= found
    else:
        part["output"] = output.splitlines()[-LINES:]
    results["parts"][name] = part
    with (directory / "log.txt").open("a") as file:
        file.write(f"== {name}: {part['status']} after {seconds} s\n{output}\n")
    partial = directory / "results.json.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(results_path)
    for path in (log, rows, directory / f"{name}.png"):
        path.unlink(missing_ok=True)
    return part


if __name__ == "__main__":
    part = add(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
    why = ": " + " ".join(part["output"]) if part["status"] == "skipped" else f" after {part['seconds']} s"
    print(f"{sys.argv[2]:26} {part['status']}{why}", flush=True)
