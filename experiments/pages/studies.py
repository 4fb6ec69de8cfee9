"""Results of studies inside a page that is otherwise written by hand: the lines between

    <!-- study: NAME -->
    <!-- end of study -->

are what `section(result)` of experiments/studies/NAME.py makes of its JSON, if it has one, and a table of its bars.
Without the JSON, the lines say so.
"""

import json
import re
from pathlib import Path
from typing import Any

from experiments.common.errors import UserError
from experiments.pages.tables import made_on
from experiments.studies.protocol import find_study

BLOCK = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end of study -->)", re.DOTALL)


def fill(text: str, data: Path) -> str:
    """The page with all its sections made anew, from the directory docs/_data. Raises UserError for a file that is not
    of that study."""

    def made(found: re.Match) -> str:
        study = find_study(found[2])
        path = data / study.FOLDER / f"{found[2]}.json"
        if not path.exists():
            return f"{found[1]}\nNot run yet.\n\n{found[3]}"
        try:
            result = json.loads(path.read_text())
            own = [study.section(result)] if hasattr(study, "section") else []
            section = "\n".join([*own, bars(result)] if "bars" in result or not own else own)
            source = f"{made_on(result)}; [{path.name}](_data/{study.FOLDER}/{path.name})."
            return f"{found[1]}\n{section}\n    {result['command']}\n\n{source}\n\n{found[3]}"
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a file of experiments.study ({error!r}): run it again") from error

    return BLOCK.sub(made, text)


def bars(result: dict[str, Any]) -> str:
    """A row for every bar."""
    lines = ["| bar | value | | |", "|---|---|---|---|"]
    for bar in result["bars"]:
        limit = f"at {'most' if bar['at_most'] else 'least'} {bar['bar']:g}"
        lines.append(f"| {bar['name']} | {bar['value']:.3f} | {limit} | {'met' if bar['met'] else '**not met**'} |")
    return "\n".join(lines) + "\n"
