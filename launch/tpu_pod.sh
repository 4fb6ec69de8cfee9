#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU pod; `--help` says how. What runs on the workers is tpu_worker.sh.
set -euo pipefail
umask 077

usage() {
  cat <<'END'
usage: launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [options] [-- training arguments]

  create   request the pod and wait until it is there; needs --type and --version
  push     copy the committed files (HEAD) to all workers and install them there
  run      start the training on all workers, detached; needs --workdir and training arguments
  status   the state of the pod, and of the training on every worker
  logs     follow the training's output
  stop     ask the training to save and end (SIGTERM), and wait for it
  delete   give the pod back; asks for its name unless --yes

  --project=PROJECT    if it is not gcloud's own
  --type=TYPE          accelerator type, for instance v5litepod-16
  --version=VERSION    runtime version, for instance v2-alpha-tpuv5-lite
  --spot               a cheaper pod that may be taken away
  --workdir=/PATH      where checkpoints go: a file system that every worker mounts and that outlives the pod
  --setup=COMMAND      shell command that push runs last on every worker, for instance to mount that file system
  --retries=N          run stays, and after a preemption deletes, creates, pushes and runs again, at most N times;
                       needs --type and --version, and the --spot and --setup of the first pod
  --worker=N           for logs: which worker (0), or all
  --dry-run            print the commands, ready to be pasted, and run none
  --yes                delete without asking

POLL_SECONDS in the environment is the time between two looks at the pod (60).
example: launch/tpu_pod.sh run --name=pod --zone=us-west4-a --workdir=/mnt/runs/x -- --config=configs/quickstart.py
END
}
say() { printf '%s\n' "$1" >&2; }
fail() { say "error: $1" && exit "${2:-2}"; }

# Words quoted so that a POSIX shell returns them unchanged; printf %q writes $'..', which sh need not know.
quote() {
  local LC_ALL=C word line=
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      line+="$word "
      continue
    fi
    line+="'"
    while [[ $word == *\'* ]]; do
      line+="${word%%\'*}'\\''"
      word=${word#*\'}
    done
    line+="$word' "
  done
  printf '%s\n' "${line% }"
}
act() { if [[ $dry_run ]]; then quote "$@"; else "$@"; fi; }
tpus() { act gcloud compute tpus "$@" "${where[@]}"; }

# on_workers WHICH WORD...: ssh and the worker's shell parse a quoted command, and get these words back.
on_workers() { tpus tpu-vm ssh "$name" --worker="$1" --command="$(quote "${@:2}")"; }
program=(bash seqboat/code/launch/tpu_worker.sh)

request_state() { tpus queued-resources describe "$name" --format='value(state.state)' || echo UNKNOWN; }
pod_state() { tpus tpu-vm describe "$name" --format='value(state)' 2>/dev/null || request_state 2>/dev/null; }

create() {
  local state='' last='' flags=(--node-id="$name" --accelerator-type="$type" --runtime-version="$version")
  [[ ! $spot ]] || flags+=(--spot)
  tpus queued-resources create "$name" "${flags[@]}" || return
  if [[ $dry_run ]]; then request_state && return; fi
  until [[ $state == ACTIVE ]]; do
    state=$(request_state)
    [[ $state == "$last" ]] || say "the request for $name is $state"
    last=$state
    [[ ! $state =~ ^(FAILED|SUSPENDED)$ ]] || return 1
    [[ $state == ACTIVE ]] || sleep "$poll"
  done
}

# A folder of its own until it is known that no training runs from the old one.
unpack='mkdir -p seqboat && chmod 700 seqboat && rm -rf seqboat/new && mkdir seqboat/new &&
tar -xzf seqboat.tar.gz -C seqboat/new && rm seqboat.tar.gz && exec bash seqboat/new/launch/tpu_worker.sh install'

push() {
  [[ $dry_run || $folder ]] || folder=$(mktemp -d)
  local archive=${folder:+$folder/}seqboat.tar.gz
  [[ $dry_run || -z $(git -C "$root" status --porcelain) ]] || say "uncommitted changes are not pushed"
  act git -C "$root" archive --format=tar.gz --output="$archive" HEAD &&
    tpus tpu-vm scp "$archive" "$name:seqboat.tar.gz" --worker=all &&
    on_workers all bash -c "$unpack" &&
    if [[ $setup ]]; then on_workers all bash -c "$setup"; fi
}

run() { on_workers all "${program[@]}" start --workdir="$workdir" "${train[@]}"; }
delete() { tpus queued-resources delete "$name" --force --quiet; }
again() { delete && create && push && run; }

# One word for all workers: running, lost (a worker restarted), failed, ended; unknown where one could not be asked.
training_state() {
  local lines
  lines=$(on_workers all "${program[@]}" status 2>/dev/null </dev/null) && [[ $lines ]] || { echo unknown && return; }
  case $lines in
    *": running"*) echo running ;;
    *": not running"*) echo lost ;;
    *) if grep -qv ': exited 0$' <<<"$lines"; then echo failed; else echo ended; fi ;;
  esac
}

watch() {
  local left=$retries before='' now
  say "watching $name; after Ctrl-C training continues, but is not restarted after a preemption"
  while sleep "$poll"; do
    now=$(pod_state)
    [[ $now != READY ]] || now=$(training_state)
    [[ $now == "$before" ]] || say "$name: $now"
    # A preempted pod ends its processes first: a worker's state counts when it is reported twice.
    case $now/$before in
      ended/ended) return ;;
      failed/failed) fail "the training failed: launch/tpu_pod.sh logs shows why" 1 ;;
      lost/lost | PREEMPTED/* | TERMINATED/* | SUSPENDED/* | FAILED/* | */again)
        ((left > 0)) || fail "$name is gone and no retry is left; the same work directory resumes from its checkpoint" 1
        left=$((left - 1))
        say "making $name again; $left retries left"
        if again; then now=''; else now=again; fi ;;
    esac
    before=$now
  done
}

dry_run='' yes='' spot='' name='' zone='' project='' type='' version='' workdir='' setup='' retries=0 worker=0
folder='' poll=${POLL_SECONDS:-60} root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
trap '[[ -z $folder ]] || rm -rf "$folder"' EXIT

command=${1:---help}
[[ $command =~ ^(create|push|run|status|logs|stop|delete|--help|-h)$ ]] || fail "unknown command $command: see --help"
[[ $command == -* ]] || shift
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    --help | -h) usage && exit ;;
    --spot | --yes) printf -v "${1#--}" 1 ;;
    --dry-run) dry_run=1 ;;
    --name=* | --zone=* | --project=* | --type=* | --version=* | --workdir=* | --setup=* | --retries=* | --worker=*)
      key=${1%%=*}
      printf -v "${key#--}" %s "${1#*=}" ;;
    *) fail "unknown option $1: options are written --name=value, and training arguments come after --" ;;
  esac
  shift
done
train=("${@:2}")

[[ $command != --help ]] || fail "no command: see launch/tpu_pod.sh --help"
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || fail "--name=NAME is missing or not a pod name: a-z, 0-9 and -"
[[ $zone ]] || fail "--zone=ZONE is missing: for instance --zone=us-west4-a"
[[ $retries =~ ^[0-9]+$ && $worker =~ ^([0-9]+|all)$ ]] || fail "--retries=N and --worker=N take a number"
if [[ $command == create || $retries != 0 ]]; then
  [[ $type && $version ]] || fail "--type=TYPE and --version=VERSION are missing: see --help for examples"
fi
if [[ $command == run ]]; then
  [[ $workdir == /* ]] || fail "--workdir=/PATH must be an absolute path on a file system that all workers mount"
  ((${#train[@]})) || fail "no training arguments: end the command with -- --config=configs/..."
  for word in "${train[@]}"; do
    [[ ! $word =~ ^--?workdir(=|$) ]] || fail "--workdir comes before the --, so that every pod gets the same one"
  done
elif ((${#train[@]})); then
  fail "only run takes training arguments"
fi
where=(--zone="$zone" ${project:+--project="$project"})

case $command in
  create) create || fail "no pod: see gcloud's message, and delete the request before another" 1 ;;
  push) push ;;
  run)
    run
    if [[ $dry_run && $retries != 0 ]]; then
      echo "# every $poll s:" && pod_state && on_workers all "${program[@]}" status
      echo "# when the pod was taken away:" && again
    elif [[ $retries != 0 ]]; then watch; fi ;;
  status)
    if [[ $dry_run ]]; then
      pod_state && on_workers all "${program[@]}" status
    else
      state=$(pod_state) && echo "$name: $state"
      [[ $state != READY ]] || on_workers all "${program[@]}" status
    fi ;;
  logs) on_workers "$worker" tail -n 100 -F seqboat/train.log ;;
  stop) on_workers all "${program[@]}" stop ;;
  delete)
    if [[ ! $yes && ! $dry_run ]]; then
      printf 'type %s to delete it: ' "$name" >&2
      IFS= read -r answer || true
      [[ ${answer:-} == "$name" ]] || fail "not deleted: the answer was not $name (--yes does not ask)" 1
    fi
    delete ;;
esac
