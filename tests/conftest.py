"""The test session: CPU, a compilation cache, strict shapes."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Test time is compile time, a third of which makes code fast: tiny programs need no fast code.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
from absl import flags

# Eight devices, for what is split over them; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A cache for each of several workers, which do not write into one another's files.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
jax.config.update("jax_compilation_cache_dir", os.path.expanduser(f"~/.cache/seqboat/tests{WORKER}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# grain asks for parsed flags when it reads ahead.
flags.FLAGS.mark_as_parsed()
