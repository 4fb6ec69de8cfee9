"""Peak memory of one contender, in a process of its own, so that a peak belongs to it alone.

python -m experiments.benchmarks.memory CASE CONTENDER RATE KEEP_MEMORY [PUBLISHED]
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

from experiments import cli
from experiments.benchmarks import cases, contenders
from experiments.errors import UserError


def main(name: str, contender: str, rate: str, keep_memory: str, published: str | None = None) -> None:
    """Print by how many bytes the process grew while it computed gradients twice."""
    if keep_memory == "True":
        cli.keep_memory()
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
    before = _peak()
    runner.run()
    runner.run()
    print(json.dumps(_peak() - before))


def measure(name: str, contender: str, rate: float, published: Path | None, keep_memory: bool) -> int:
    """`main` in another process. Raises UserError with its last words if it fails."""
    command = [sys.executable, "-m", "experiments.benchmarks.memory", name, contender, str(rate), str(keep_memory)]
    done = subprocess.run(command + ([str(published)] if published else []), capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise UserError(f"memory of {contender} on {name} at {rate}: {words}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
