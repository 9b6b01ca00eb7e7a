#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the kernels' tests, then configurations measured, then the bench. From the repository's root:
#   bash bench/gpu_check.sh RESULTS_FOLDER [tests|tune|bench ...]     (all three when none is named)
# Needs python3 with torch, triton, numpy and pytest; nothing of this project need be installed.
set -uo pipefail
out=${1:?a folder for the results}
shift
steps=${*:-tests tune bench}
mkdir -p "$out"
export PYTHONPATH=kernels:services/common:protos${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 FLUME_TUNING_FILE="$out/tuning.json"
status=0
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.used --format=csv || true
for step in $steps; do
  case $step in
    tests)
      python3 -m pytest -q --import-mode=importlib -p no:cacheprovider -c /dev/null --rootdir=. -W ignore \
        tests/kernels/gpu 2>&1 | tee "$out/tests.log" | tail -n 40 || status=1
      ;;
    tune)
      # Compiled side by side into triton's cache, measured one by one.
      for part in $(seq 0 11); do
        (
          python3 -m flume_kernels.gpu.decode_tuning --compile "$part" 12 --block-tokens 16 32 64 128
          python3 -m flume_kernels.gpu.decode_tuning --compile "$part" 12 --dtype float8_e4m3fn
          python3 -m flume_kernels.gpu.decode_tuning --compile "$part" 12 --queries 512 --shapes 1x32768
        ) &
      done
      wait
      python3 bench/kernels.py --tune-only 2>&1 | tee "$out/tune.log" | tail -n 90 || status=1
      ;;
    bench) python3 bench/kernels.py --out "$out/kernels.json" 2>&1 | tee "$out/bench.log" || status=1 ;;
    *) echo "no step $step" >&2; status=2 ;;
  esac
done
exit $status
