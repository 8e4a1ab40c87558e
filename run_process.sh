#!/usr/bin/env bash
# The main job: for every stage, run_sample.py, run_select.py, run_train.py; then the before/after table.
# With config.method=dfusion run_fuse.py comes before run_train.py.
#   [PRESET=NAME] [LAUNCH="accelerate launch ..."] bash run_process.sh [--dry-run] [--config.x.y=value ...]
# The same command again goes on where it stopped. With several GPUs every step runs on all of them; LAUNCH overrides.
set -euo pipefail
case ${PYTHON:-} in [!/]*/*) PYTHON=$PWD/$PYTHON ;; esac # before the folder changes
cd "$(dirname "$0")"

for flag in "$@"; do
  case $flag in
    -h | --help)
      sed -n '2,5s/^# //p' run_process.sh
      echo "Settings: config/stage_process.py. Pages: README.md and docs/."
      exit ;;
    --config.stage=*) echo "run_process.sh sets config.stage itself; a single stage: python run_sample.py --config ... $flag" >&2; exit 1 ;;
  esac
done

if [ -n "${PRESET:-}" ]; then
  echo "preset $PRESET (PRESET is set)"
elif [[ ${CUDA_VISIBLE_DEVICES-all} == [!-]* ]] && command -v nvidia-smi >/dev/null && [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then
  PRESET=sdv1.4
  echo "preset $PRESET: CUDA is present (PRESET=shapes for the small world)"
else
  PRESET=shapes
  echo "preset $PRESET: no CUDA here (PRESET=sdv1.4 on a GPU for the paper's run)"
fi

. config/environment.sh
prepare_environment requirements.txt

config=(--config "config/stage_process.py:$PRESET") dry=
for flag in "$@"; do
  if [ "$flag" = --dry-run ]; then dry=1; else config+=("$flag"); fi
done
said=$("$PYTHON" -m b2diffurl.stages.preflight "${config[@]}")
read -r stages processes plateau folder <<<"$(tail -n 1 <<<"$said")" # a user's reward may print when it is imported
machine=${MACHINE_RANK:-$(sed -nE 's/.*--(machine|node)[_-]rank[= ]+([0-9]+).*/\2/p' <<<"${LAUNCH:-}")}
if [ "$dry" ]; then # says what the run will take
  exec "$PYTHON" -m b2diffurl.stages.dry_run "${config[@]}"
fi
mkdir -p "$folder" || { echo "config.save_path: $folder cannot be made" >&2; exit 1; }
if [ "${machine:-0}" = 0 ]; then # of several machines the first one locks and reports
  exec 9>>"$folder/.lock"
  export B2DIFFURL_LOCK=9 # the steps use this descriptor, so the lock is held from here to the end
  "$PYTHON" -m b2diffurl.run.lock "$folder"
fi

gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c GPU || true)
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)
fi
case $PYTHON in
  */*) PATH=$(cd "$(dirname "$PYTHON")" && pwd):$PATH ;; # for a LAUNCH that names accelerate or torchrun
esac
launch=("$PYTHON")
if [ -n "${LAUNCH:-}" ]; then
  read -ra launch <<<"$LAUNCH"
elif [ "$gpus" -gt 1 ]; then
  launch=("$PYTHON" -m accelerate.commands.launch --multi_gpu --num_machines 1 --main_process_port 0 --num_processes "$gpus" --mixed_precision no --dynamo_backend no)
fi

report() { # of several machines the first one writes it
  [ "${machine:-0}" != 0 ] || "$PYTHON" -m b2diffurl.report "$folder" >/dev/null || echo "report.html was not written"
}

lora=checkpoints/checkpoint_1/pytorch_lora_weights.safetensors # a stage that has it is complete
last_lora() { # the LoRA's average where config.train.ema_decay keeps one
  last=$folder/stage$((stages - 1))/checkpoints/checkpoint_1
  if [ -d "$last/ema" ]; then last=$last/ema; fi
}

if [ "$processes" = one ]; then # config.one_process: the same loop below in one warm process
  "${launch[@]}" -m b2diffurl.stages.loop "${config[@]}"
  while [ "$stages" -gt 1 ] && [ ! -e "$folder/stage$((stages - 1))/$lora" ]; do stages=$((stages - 1)); done # a plateau
  last_lora
else
  for ((stage = 0; stage < stages; stage++)); do
    if [ -e "$folder/stage$stage/$lora" ]; then
      echo "stage $stage: complete already"
      continue
    fi
    if [ "$plateau" -gt 0 ]; then # asked by all processes, on all machines
      said=$("${launch[@]}" -m b2diffurl.stages.plateau "${config[@]}" "--config.stage=$stage")
      if grep -qx plateau <<<"$said"; then
        echo "stage $stage is not begun: the reward has not risen over the last $((2 * plateau)) stages"
        stages=$stage
        break
      fi
    fi
    for step in ${processes//,/ }; do
      "${launch[@]}" "run_$step.py" "${config[@]}" "--config.stage=$stage"
    done
    report
  done
  last_lora
  "${launch[@]}" -m b2diffurl.evaluate "${config[@]}" --checkpoint "$last" --out "$folder"
  report
fi

echo "Everything is in $folder: report.html (open it in a browser), metrics.jsonl, the LoRA in ${last#"$folder"/}."
echo "Next: try your own prompts with --config.prompts.train=FILE --config.prompts.test=FILE --config.exp_name=NAME (see README.md)."
