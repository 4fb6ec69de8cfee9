"""Results of launch/accelerator.sh as Markdown:  python -m experiments.pages.accelerator --results=DIR/results.json

writes DIR/summary.md. `experiments.pages.performance` puts the same section into docs/performance.md.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from experiments.benchmarks.output import Row, markdown, text
from experiments.common import cli
from experiments.common.errors import UserError
from experiments.common.files import user_path, write_text

_RESULTS = flags.DEFINE_string("results", "runs/accelerator/results.json", "Results of launch/accelerator.sh.")

NOT_RUN = "**Not run on a GPU or TPU.**"
# What a line of the summary names, in this order, where a row has it.
NAMES = ("case", "method", "contender", "lags", "rate")
VALUES = {
    "median_ms": "ms",
    "tflops": "TFLOP/s",
    "tokens_per_second": "tokens per second",
    "speedup": "times published",
}

# Parts that time layers by either form of attention, in blocks or by the kernel.
BLOCKS, PALLAS = ("layers_1", "layers_32", "layers_128"), "layers_pallas"


def main() -> None:
    path = user_path(_RESULTS.value or "", "--results")
    summary = path.with_name("summary.md")
    write_text(summary, section(path))
    print(f"wrote {summary}")


def section(path: Path) -> str:
    """A table of the parts, then the table of each. Raises UserError for another file."""
    try:
        found = json.loads(path.read_text())
        parts = found["parts"]
        versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
        lines = [f"### {found.get('device_kind', path.stem)}", ""]
        lines += [f"{found.get('hardware', 'unknown hardware')}; {versions}; `launch/accelerator.sh`.", ""]
        lines += [line for note in found.get("notes", []) for line in (note, "")]
        lines += ["| part | status | seconds | result |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {part['status']} | {part['seconds']} | {_result(part)} |" for name, part in parts.items()
        ]
        lines += _attention(parts)
        for name, part in parts.items():
            if part.get("rows"):
                lines += [
                    "",
                    f"#### {name.replace('_', ' ')}",
                    "",
                    f"    {part['command']}",
                    "",
                    *markdown(part["rows"]),
                ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a file of launch/accelerator.sh: {error!r}") from error
    return "\n".join(lines) + "\n"


def _attention(parts: dict[str, Any]) -> list[str]:
    """Which form of attention was faster, for every case and rate timed with both; of blocks the best part."""
    timed = lambda name: parts.get(name, {}).get("rows", [])
    times = lambda name: {(r["case"], r["rate"]): r["median_ms"] for r in timed(name) if r.get("contender") == "sparse"}
    blocks, rows = [times(name) for name in BLOCKS], []
    for (case, rate), pallas in times(PALLAS).items():
        if of := [found[case, rate] for found in blocks if (case, rate) in found]:
            faster = "pallas" if pallas < min(of) else "blocks"
            rows.append({"case": case, "rate": rate, "blocks_ms": min(of), "pallas_ms": pallas, "faster": faster})
    return ["", "#### attention", "", *markdown(rows)] if rows else []


def _result(part: dict[str, Any]) -> str:
    """A part's main numbers, or the last line that it printed."""
    if "rows" in part:
        return "; ".join(filter(None, map(_phrase, part["rows"])))
    last = next((line.strip() for line in reversed(part.get("output", [])) if line.strip()), "")
    return last.replace("|", "\\|")


def _phrase(row: Row) -> str:
    names = " ".join(text(row[name]) for name in NAMES if row.get(name) is not None)
    values = ", ".join(f"{text(row[name])} {unit}" for name, unit in VALUES.items() if row.get(name) is not None)
    if not values and "difference" in row:
        values = f"differs by {text(row['difference'])}"
    return f"{names}: {values}" if values else ""


if __name__ == "__main__":
    cli.run(main)
