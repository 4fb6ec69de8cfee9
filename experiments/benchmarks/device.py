"""What launch/accelerator.sh runs on: prints versions and devices; without a GPU or TPU it fails, but for an argument.

Needs only jax, before anything else is imported.
"""

import subprocess
import sys

import jax


def main() -> None:
    print(sys.version, jax.__version__, jax.devices())
    if jax.default_backend() == "gpu":
        subprocess.run(["nvidia-smi"], check=False)
    if jax.default_backend() == "cpu" and not sys.argv[1:]:
        sys.exit("jax finds no GPU or TPU")


if __name__ == "__main__":
    main()
