#!/usr/bin/env bash
# Trains with several processes on this machine, each with CPU devices of its own; `--help` says how.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local_procs.sh N D [training arguments]

Starts N processes of `python -m experiments.train`, each with D CPU devices, that train together over localhost.
A line of process i begins with [i]. Ctrl-C or a SIGTERM asks all of them to save and end; a second one kills them.
If one fails, the others are asked to end, and are killed after GRACE_SECONDS (60).
The exit status is the first that is not zero. PYTHON in the environment is the interpreter (python).

example: launch/local_procs.sh 2 4 --config=configs/quickstart.py --workdir=runs/two
END
}
fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage && exit; }
[[ ${1:-} =~ ^[1-9][0-9]*$ && ${2:-} =~ ^[1-9][0-9]*$ ]] ||
  fail "the first two arguments are numbers, of processes and of devices in each: local_procs.sh 2 4 --config=..."
[[ -f experiments/train.py ]] || fail "there is no experiments/train.py here: start it from the root of the clone"
grace=${GRACE_SECONDS:-60} python=${PYTHON:-python}
[[ $grace =~ ^[0-9]+$ ]] || fail "GRACE_SECONDS is a number of seconds, not $grace"
command -v "$python" >/dev/null || fail "there is no $python: activate the environment, or set PYTHON"
n=$1 devices=$2
shift 2

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export JAX_PLATFORMS=cpu PYTHONUNBUFFERED=1
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

prefix() {
  trap '' INT TERM HUP # the last words of a process that is ending are wanted too
  local line
  while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

pids=() printers=() alive=0 asked='' killed='' first=0 deadline=
send() {
  local i
  [[ $1 != KILL ]] || killed=1
  for ((i = 0; i < n; i++)); do
    [[ ! ${pids[i]:-} ]] || kill "-$1" "${pids[i]}" 2>/dev/null || true
  done
}
# SIGINT becomes SIGTERM: the shell starts children in the background deaf to SIGINT, and SIGTERM makes them save.
# shellcheck disable=SC2329
on_signal() {
  send "${asked:-TERM}"
  asked=KILL
}
trap on_signal INT TERM HUP

for ((i = 0; i < n; i++)); do
  mkfifo "$folder/$i"
  prefix "$i" <"$folder/$i" &
  printers+=($!)
  "$python" -m experiments.train "$@" --coordinator_address="127.0.0.1:$port" --num_processes="$n" --process_id="$i" \
    >"$folder/$i" 2>&1 </dev/null &
  pids[i]=$!
  alive=$((alive + 1))
done
[[ ! $asked ]] || send TERM # asked while they were being started

while ((alive)); do
  sleep 0.2 || true
  for ((i = 0; i < n; i++)); do
    [[ ${pids[i]} ]] || continue
    kill -0 "${pids[i]}" 2>/dev/null && continue
    status=0
    wait "${pids[i]}" || status=$?
    pids[i]=''
    alive=$((alive - 1))
    if ((status && !first)); then
      first=$status
      printf 'process %s ended with status %s\n' "$i" "$status" >&2
      deadline=$((SECONDS + grace))
      send TERM
    fi
  done
  if [[ $deadline ]] && ((SECONDS >= deadline)); then send KILL; fi
done
if [[ $killed ]]; then # a child of a killed process may hold its output open for ever
  sleep 1
  kill -KILL "${printers[@]}" 2>/dev/null || true
fi
wait "${printers[@]}" || true
exit "$first"
