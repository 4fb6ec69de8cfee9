#!/usr/bin/env bash
# The part of tpu_pod.sh that runs on a worker, from the pushed files: install, start ARGUMENT..., status or stop.
#
# ~/seqboat/ (mode 700) holds code/, venv/, train.log, train.pid and, after the end, train.status.
set -euo pipefail
cd "$HOME/seqboat"

say() { printf '%s: %s\n' "$HOSTNAME" "$1"; }

running() { # after a reboot the process id may be another program's, so the command is looked at too
  [[ -s train.pid ]] && [[ $(tr '\0' ' ' 2>/dev/null <"/proc/$(<train.pid)/cmdline") == *experiments.train* ]]
}

refuse_if_running() {
  if running; then
    say "training is already running: stop it first" >&2
    exit 3
  fi
}

report() { # tpu_pod.sh reads these words
  if running; then
    say "running"
  elif [[ -s train.status ]]; then
    say "exited $(<train.status)"
  else
    say "not running"
  fi
}

case ${1:-} in
  install) # the new files are in new/
    refuse_if_running
    rm -rf code
    mv new code
    # The images' own Python is older than the 3.11 that the project needs, so uv brings one.
    python3 -m pip install --quiet --user uv
    [[ -x venv/bin/python ]] || python3 -m uv venv --quiet --python=3.12 venv
    python3 -m uv pip install --quiet --python=venv/bin/python --editable='./code[tpu]'
    ;;
  start)
    shift
    refuse_if_running
    rm -f train.pid train.status
    cd code
    # The SIGTERM of stop is for the training's own process; the shell around it only keeps the exit status.
    # shellcheck disable=SC2016
    nohup bash -c '"$@" & echo $! >../train.pid; wait $!; echo $? >../train.status' train \
      ../venv/bin/python -m experiments.train "$@" >>../train.log 2>&1 </dev/null &
    until [[ -s ../train.pid ]]; do sleep 0.1; done
    say "started"
    ;;
  status) report ;;
  stop)
    if running; then
      kill -TERM "$(<train.pid)"
      for ((left = 3000; left; left--)); do
        running || break
        sleep 0.2
      done
      ((left)) || { say "still running after 600 s" >&2 && exit 1; }
      [[ -s train.status ]] || sleep 1 # written just after the end
    fi
    report
    ;;
  *)
    echo "error: usage: tpu_worker.sh install | start ARGUMENT... | status | stop" >&2
    exit 2
    ;;
esac
