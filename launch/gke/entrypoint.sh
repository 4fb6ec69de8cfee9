#!/usr/bin/env bash
# The container's main process: training, whose exit status tells Kubernetes whether it is done.
#
# After a SIGTERM the program saves and exits 0, and a pod that exits 0 counts as completed, so a drained node would end
# an unfinished run. Here that is 143, a failure that the restart policy answers. (A run that has just finished on its
# own starts once more, finds nothing left to train, and exits 0.)
set -euo pipefail

training='' asked='' interrupted=''
# shellcheck disable=SC2329
on_term() {
  asked=1 interrupted=1
  [[ ! $training ]] || kill -TERM "$training" 2>/dev/null || true
}
trap on_term TERM

python -m experiments.train "$@" &
training=$!
[[ ! $asked ]] || kill -TERM "$training"
while :; do # a trapped signal ends the wait, not the training
  interrupted='' status=0
  wait "$training" || status=$?
  [[ $interrupted ]] || break
done
[[ ! $asked || $status != 0 ]] || status=143
exit "$status"
