#!/usr/bin/env bash
# Checks and times everything on this machine's GPU or TPU in 12 minutes; `--help` says how.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/accelerator.sh [--out=DIR] [--minutes=12] [--wheels=DIR] [--published=FILE] [--only=PART,...]
                             [--train=listops|bytes|router] [--data=PATH] [--rehearse]
       launch/accelerator.sh --pack=DIR [--python=3.12]

Checks the kernels and layers against their references, times them beside the published PyTorch layer, times training
steps of the enwik8 recipe, and trains for the rest of the time. Each part has its own limit; if a check fails, nothing
is timed. Results are in DIR (runs/accelerator) as they come: results.json, log.txt, trace.tar.gz, and summary.md at the
end. If the variable OUT names a folder, they are copied there too. The same command resumes: a finished part is not run
again. To put them into docs/performance.md, copy results.json to docs/_data/performance/accelerators/NAME.json and run
python -m experiments.pages.results.

  --published  the authors' standalone PyTorch file; without it, or without torch, that part is skipped
  --train      listops (default): short expressions, or with --data=DIR, of prepared data, Long Range Arena's;
               bytes: the enwik8 recipe on the text file --data=FILE; router: selective copying
  --only       run these parts alone
  --rehearse   run all of it on the CPU with tiny sizes
  --pack       download what a machine with jax, flax, optax and orbax lacks, for Linux on x86-64; carry the folder
               there, where --wheels=DIR (wheels) installs it into DIR/site, without touching the machine's environment

The exit status is 1 if a check failed, in a rehearsal if any part did. PYTHON in the environment is the interpreter.
END
}
fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

[[ -f experiments/benchmark.py ]] || fail "there is no experiments/benchmark.py here: start it from the root of the clone"
out=runs/accelerator minutes=12 wheels=wheels published='' train=listops data='' only='' rehearse='' pack='' target=3.12
for argument; do
  value=${argument#*=}
  case $argument in
    --help | -h) usage && exit ;;
    --out=?*) out=$value ;;
    --minutes=*) minutes=$value ;;
    --wheels=?*) wheels=$value ;;
    --published=?*) published=$value ;;
    --train=*) train=$value ;;
    --data=?*) data=$value ;;
    --only=?*) only=$value ;;
    --rehearse) rehearse=1 ;;
    --pack=?*) pack=$value ;;
    --python=?*) target=$value ;;
    *) fail "unknown argument $argument; --help lists them" ;;
  esac
done
python=${PYTHON:-python}
command -v "$python" >/dev/null || fail "there is no $python: activate the environment, or set PYTHON"
[[ $minutes =~ ^[1-9][0-9]*$ ]] || fail "--minutes=$minutes: expected a whole number of minutes"
[[ ! $published || -f $published ]] || fail "--published=$published: there is no such file"
[[ ! $data || -e $data ]] || fail "--data=$data: there is no such file or folder"

# What requirements.txt needs, directly or not, and images with jax, flax, optax and orbax usually lack. `promise` has no
# wheel of its own: it is built here, of Python alone.
packed=(array-record cffi dm-tree docstring-parser googleapis-common-protos grain immutabledict importlib-resources
  ml-collections portpicker pycparser simple-parsing soundfile tensorboardX tensorflow-datasets tensorflow-metadata
  termcolor toml zipp)
if [[ $pack ]]; then
  platforms=()
  for libc in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=("--platform=${libc}_x86_64")
  done
  "$python" -m pip download --no-deps --only-binary=:all: --implementation=cp --python-version="$target" \
    "${platforms[@]}" --constraint=requirements.txt --dest="$pack" "${packed[@]}"
  "$python" -m pip wheel --no-deps --wheel-dir="$pack" promise
  exit
fi

patience=1
fields='' size=() # of the layers, where they are not the recipes'
narrow=dtype=bfloat16 kernel_cases=lm,text cases=lm,text rates=0.12,1 rounds=(--rounds=10 --seconds=1) steps=()
if [[ $rehearse ]]; then
  export JAX_PLATFORMS=cpu
  fields=features=16,key_size=16,value_size=32,window_size=16,block_size=32, size=(--length=64 --batch=1 --depth=1)
  narrow='' kernel_cases=lm cases=lm rates=1 rounds=(--rounds=1 --seconds=0) minutes=60 patience=10
  steps=(--config.train.steps=4 --config.train.batch_size=4 --config.train.log_every=2 --config.train.evaluate_every=4
    --config.train.checkpoint_every=4 --config.model.layers=1 --config.model.features=16 --config.model.value_size=32)
  [[ $train == bytes ]] || steps+=(--config.task.train_examples=64 --config.task.test_examples=16)
fi
case $train in
  listops)
    training=(--config=configs/quickstart.py)
    [[ ! $rehearse ]] || steps+=(--config.task.validation_examples=16)
    [[ ! $data ]] || training=(--config=configs/lra/listops.py --config.data_dir="$data") steps=()
    ;;
  bytes)
    [[ -f $data ]] || fail "--train=bytes needs --data=FILE, a text file"
    training=(--config=configs/lm/bytes.py --config.task.files="(\"$data\",)" --config.model.dtype=bfloat16
      --config.train.log_every=10)
    ;;
  router) training=(--config=configs/synthetic/selective_copy.py:credit_router) ;;
  *) fail "--train=$train: must be listops, bytes or router" ;;
esac

mkdir -p "$out"
touch "$out/finished"
# Parts compile the same programs, and so does the next run of a part that ran out of time. What was compiled before
# has no time of its own: `compile_seconds` is then that of reading it.
JAX_COMPILATION_CACHE_DIR=$(cd "$out" && pwd)/compiled
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
# Measuring every product's candidates takes XLA longer than all else together: eight capacities have many products.
given_flags=${XLA_FLAGS:-}
export XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false${XLA_FLAGS:+ $XLA_FLAGS}"
deadline=$((SECONDS + 60 * minutes))
TRAINING_SECONDS=75 # kept for the last part
export PYTHONUNBUFFERED=1

running=''
# shellcheck disable=SC2329
on_signal() {
  trap '' INT TERM HUP
  [[ ! $running ]] || { kill -TERM "$running" 2>/dev/null && wait "$running"; } || true
  exit 130
}
copy_out() {
  [[ ${OUT:-} && -d ${OUT:-} && ! $OUT -ef $out ]] || return 0
  local name
  for name in results.json log.txt summary.md trace.tar.gz; do [[ ! -f $out/$name ]] || cp "$out/$name" "$OUT/"; done
}
# shellcheck disable=SC2329
at_end() {
  [[ ! -f $out/results.json ]] || "$python" -m experiments.pages.accelerator --results="$out/results.json" || true
  copy_out
}
trap on_signal INT TERM HUP
trap at_end EXIT

# part NAME SECONDS COMMAND...: runs it, unless it is finished, with its output in NAME.log and its rows in NAME.json,
# and adds both to results.json. Its status is in `status`: that of the command, 124 if it ran out of time, or 0.
failed=''
part() {
  local name=$1 limit=$2 left began=$SECONDS
  shift 2
  limit=$((limit * patience)) status=0
  [[ ! $only || ,$only, == *",$name,"* ]] || return 0
  if grep -qx "$name" "$out/finished"; then
    printf '%-26s finished before\n' "$name"
    return 0
  fi
  left=$((deadline - SECONDS))
  [[ $name == train ]] || left=$((left - TRAINING_SECONDS))
  ((limit < left)) || limit=$left
  if ((left < 5)); then
    printf '%-26s no time left\n' "$name"
    return 0
  fi
  timeout --preserve-status --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null &
  running=$!
  wait "$running" || status=$?
  running=''
  ((SECONDS - began < limit || status == 0)) || status=124
  "$python" -m experiments.benchmarks.collect "$out" "$name" "$status" "$((SECONDS - began))"
  if ((status)); then failed+=" $name"; else echo "$name" >>"$out/finished"; fi
  copy_out
}
# skip NAME WHY
skip() {
  [[ ! $only || ,$only, == *",$1,"* ]] || return 0
  echo "$2" >"$out/$1.log"
  "$python" -m experiments.benchmarks.collect "$out" "$1" skipped 0
}
# A part of the benchmark: bench NAME SECONDS SUITE FIELDS FLAGS...
bench() {
  local name=$1 limit=$2 suite=$3 changed=$fields$4
  shift 4
  part "$name" "$limit" "$python" -m experiments.benchmark --suite="$suite" --layer="${changed%,}" --out="$out/$name" \
    --noforms --notransformer "${rounds[@]}" "$@" "${size[@]}"
}
# A check: what is wrong is not timed. Running out of time is not a wrong result.
check() {
  bench "$@"
  if ((status && status != 124)); then
    printf 'error: %s failed, so nothing is timed; see %s\n' "$1" "$out/log.txt" >&2
    exit 1
  fi
}

if compgen -G "$wheels/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target="$wheels/site" "$wheels"/*.whl
  export PYTHONPATH=$wheels/site${PYTHONPATH:+:$PYTHONPATH}
fi
part environment 60 "$python" -m experiments.benchmarks.device ${rehearse:+--rehearse}
((!status)) || fail "jax does not start or finds no GPU or TPU; see $out/log.txt; --rehearse runs on a CPU"

check kernels 90 kernels '' --cases="$kernel_cases" --rates="$rates"
check kernels_bfloat16 90 kernels dtype=bfloat16 --cases="$kernel_cases" --rates="$rates"
check agreement 90 agreement attention_method=blocks --cases="$cases" --rates="$rates"
check agreement_pallas 90 agreement attention_method=pallas --cases=lm --rates="$rates"

bench language_model 120 language_model "attention_method=blocks,$narrow" --rates="$rates"
bench language_model_pallas 120 language_model "attention_method=pallas,$narrow" --rates="$rates" --profile="$out/trace"
[[ ! -d $out/trace ]] || { tar -czf "$out/trace.tar.gz" -C "$out" trace && rm -r "$out/trace"; }
# Is it bound by launches? Does batching blocks fuse? Loops or kernels?
bench layers_pallas 90 layers "attention_method=pallas,$narrow" --cases="$cases" --rates="$rates"
for blocks in 32 1 128; do
  bench "layers_$blocks" 90 layers "attention_method=blocks,blocks_per_iteration=$blocks,$narrow" --cases="$cases" --rates="$rates"
done
ema=(--batch=8) wide=features=616
[[ ! $rehearse ]] || ema=() wide=''
bench ema 60 ema_methods "$wide" --cases=enwik8 "${ema[@]}"
if [[ ! $published ]]; then
  skip published "no --published=FILE"
elif ! "$python" -c 'import torch, einops' 2>/dev/null; then
  skip published "no torch or no einops"
else
  # Two libraries share the memory.
  XLA_PYTHON_CLIENT_PREALLOCATE=false \
    bench published 90 layers '' --cases="$cases" --rates="$rates" --published="$published"
fi
[[ $rehearse ]] || XLA_FLAGS="$given_flags" bench language_model_autotuned 150 language_model "attention_method=pallas,$narrow" --rates="$rates"
# Known to have crashed on a second run of the graph: last of its group, in its own process.
XLA_FLAGS="$XLA_FLAGS --xla_gpu_enable_command_buffer=+WHILE" \
  bench layers_command_buffers 40 layers "$narrow" --cases=lm --rates="$rates"
bench language_model_float32 90 language_model '' --rates="$rates"
if command -v ncu >/dev/null && [[ ! $rehearse ]]; then
  part counters 45 ncu --set full --launch-count 1 --kernel-name 'regex:(score|query)_gradient' \
    "$python" -m experiments.benchmark --suite=kernels --cases=lm --rates=1 --layer=dtype=bfloat16 --rounds=1 --seconds=0
else
  skip counters "no ncu"
fi
# SIGTERM at the limit makes it save and end with status 0.
left=$((deadline - SECONDS - 25))
XLA_FLAGS="$given_flags" part train "$left" "$python" -m experiments.train --workdir="$out/train" "${training[@]}" "${steps[@]}"

[[ ! $rehearse || ! $failed ]] || { printf 'error: failed:%s; see %s\n' "$failed" "$out/log.txt" >&2 && exit 1; }
