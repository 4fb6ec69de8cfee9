"""Peak memory of one contender, measured in its own process.

Freed memory is not kept here: left-overs of the setup would hide what a step needs.

`measure` runs this file in another process, with `main`'s arguments as a JSON object.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks import cases, contenders
from experiments.benchmarks.settings import Changes
from experiments.common.errors import UserError

PROCESS = Path("/proc/self")


def main(name: str, contender: str, rate: float, published: str | None, changes: dict[str, Any]) -> None:
    """Print the peak growth of the process in bytes while it computes gradients twice."""
    case = Changes(**changes)(cases.CASES[name])
    data, theirs = cases.make_data(case), contenders.Published(Path(published)) if published else None
    layer = theirs.layer(case) if theirs else None
    variables = theirs.variables(case, layer) if theirs else cases.init_layer(case)
    bias = cases.threshold(cases.router_logits(case, variables, data), rate)
    if contender == "published":
        assert theirs is not None
        runner = theirs.runner(case, data, layer, bias)
    elif contender == "transformer":
        runner = contenders.transformer(case, data)
    else:
        runner = contenders.ours(case, data, contender).runner(cases.with_router_bias(variables, bias))
    PROCESS.joinpath("clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    runner.run()
    runner.run()
    print(json.dumps(_status("VmHWM") - before))


def measure(name: str, contender: str, rate: float, published: Path | None, changes: Changes) -> int:
    """`main` in another process. Raises UserError with its last line of output if it fails."""
    if not PROCESS.is_dir():
        raise UserError("--suite=memory reads /proc, which only Linux has")
    given = {"name": name, "contender": contender, "rate": rate, "published": published and str(published)}
    words = json.dumps({**given, "changes": dataclasses.asdict(changes)})
    command = [sys.executable, "-m", "experiments.benchmarks.memory", words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError(f"memory of {contender} on {name} at {rate}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> int | None:
    """Resident memory of the process in bytes; None on systems without /proc."""
    return _status("VmRSS") if PROCESS.is_dir() else None


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", PROCESS.joinpath("status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
