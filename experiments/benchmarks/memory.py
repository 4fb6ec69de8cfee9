"""Peak memory of one contender, measured in its own process.

Freed memory is not kept here: left-overs of the setup would hide what a step needs.

python -m experiments.benchmarks.memory CASE CONTENDER RATE [PUBLISHED]
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from experiments.benchmarks import cases, contenders
from experiments.common.errors import UserError

PROCESS = Path("/proc/self")


def main(name: str, contender: str, rate: str, published: str | None = None) -> None:
    """Print the peak growth of the process in bytes while it computes gradients twice."""
    case = cases.CASES[name]
    data, theirs = cases.make_data(case), contenders.Published(Path(published)) if published else None
    layer = theirs.layer(case) if theirs else None
    variables = theirs.variables(case, layer) if theirs else cases.init_layer(case)
    bias = cases.router_bias(case, variables, data, float(rate))
    if contender == "published":
        assert theirs is not None
        runner = theirs.runner(case, layer, data, bias)
    elif contender == "transformer":
        runner = contenders.transformer(case, data)
    else:
        runner = contenders.ours(case, cases.with_router_bias(variables, bias), data, contender)
    PROCESS.joinpath("clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    runner.run()
    runner.run()
    print(json.dumps(_status("VmHWM") - before))


def measure(name: str, contender: str, rate: float, published: Path | None) -> int:
    """`main` in another process. Raises UserError with its last line of output if it fails."""
    if not PROCESS.is_dir():
        raise UserError("--suite=memory reads /proc, which only Linux has")
    command = [sys.executable, "-m", "experiments.benchmarks.memory", name, contender, str(rate)]
    done = subprocess.run(command + ([str(published)] if published else []), capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError(f"memory of {contender} on {name} at {rate}: {words}")
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
    main(*sys.argv[1:])
