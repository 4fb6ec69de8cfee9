"""The test session: CPU, a compilation cache, strict shapes."""

import gc
import os
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Test time is compile time, most of which makes code fast, and tiny programs need no fast code. Without LLVM's
# optimizations, and with the older emitter of fused loops, a layer and its gradient compile in a quarter of the time.
# Several LLVM modules, to be compiled side by side, gain nothing where each worker has one core.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1 " + os.environ.get("XLA_FLAGS", "")
)

import jax
from absl import flags

# A shell starts what it puts into the background with interrupts ignored, and processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tracing makes and drops small objects by the million: look for cycles among them less often.
gc.set_threshold(50_000, 20, 50)
# Eight devices, for what is split over them; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A cache for each of several workers, which do not write into one another's files.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
jax.config.update("jax_compilation_cache_dir", os.path.expanduser(f"~/.cache/seqboat/tests{WORKER}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# grain asks for parsed flags when it reads ahead.
flags.FLAGS.mark_as_parsed()
