#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: tests and measurements of the GPU data path. From the repository's root:
#   bash bench/gpu_check.sh RESULTS_FOLDER [STEP ...]     (all when none is named)
#
#   tests   the kernels against their definitions          tune    how attention and products run best, kept in tuning.json
#   bench   the kernels against others                     paths   captured steps on the GPU, over lanes, and their failures
#   layer   where each microsecond of a step goes          hop     a round trip between two processes' devices, under MPS
#   poller  the driver's jitter                            step    whole decode steps, one process against two under MPS
#   growth  a step's p99 as contexts grow and attention nodes join, against what the models say, under MPS
#   nodes   engines as processes with --device cuda say the model's own tokens, also when one is killed, under MPS
#   ready   how soon an attention node with 40 GiB of KV is READY, by phase
#
# Needs python3 with torch, triton, numpy and pytest; nothing of this project need be installed. All but `tune` and
# `bench` need protobuf, msgspec, safetensors, gguf and ucxx (ucxx-cu12 or -cu13), `hop`, `step`, `growth` and `nodes`
# nvidia-cuda-mps-control as well, `nodes` also grpcio and structlog, `ready` all that this project depends on, and to
# measure whole nodes the project and an etcd binary. `NODES_DEVICE=cpu` lets `nodes` and `ready` run on CPUs, without
# MPS, `READY_KV_BYTES=256MiB` with less memory; with `NODES_MODEL=PATH` `nodes` tries that model after a small random
# one, and compares with transformers where it is told `NODES_REFERENCE=transformers`.
set -uo pipefail
out=${1:?a folder for the results}
shift
steps=${*:-tests tune bench layer paths hop poller step growth nodes ready}
mkdir -p "$out"
services=services/common:services/weight:services/attention:services/controller
export PYTHONPATH=kernels:$services:protos:tests:tests/attention${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 FLUME_TUNING_FILE="$out/tuning.json"
status=0
device=${NODES_DEVICE:-cuda}

# The project's own settings need plugins that may not be here.
run_tests() {
  local log=$1
  shift
  timeout 300 python3 -m pytest -q --import-mode=importlib -p no:cacheprovider -c /dev/null --rootdir=. \
    --confcutdir=tests/kernels/gpu -W ignore "$@" 2>&1 | tee "$out/$log" | tail -n 40 || status=1
}

# MPS for as long as the command runs; its pipes are its own.
under_mps() {
  local pipes
  pipes=$(mktemp -d)
  export CUDA_MPS_PIPE_DIRECTORY=$pipes CUDA_MPS_LOG_DIRECTORY=$pipes
  nvidia-cuda-mps-control -d || status=1
  "$@"
  echo quit | nvidia-cuda-mps-control
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

measure_hop() {
  timeout 120 python3 -m flume_attention.cuda.direct_round_trip 2>&1 | tee "$out/hop.log" || status=1
}

measure_steps() {
  timeout 500 python3 bench/gpu_step.py --microbatches 2 --out "$out/step.json" 2>&1 | tee "$out/step.log" || status=1
}

measure_growth() {
  timeout 550 python3 bench/gpu_growth.py --out "$out/growth.json" 2>&1 | tee "$out/growth.log" || status=1
}

# float32 must agree to the token; a killed node must cost none; bfloat16 says how far it agrees.
run_nodes() {
  local model
  for model in tiny ${NODES_MODEL:-}; do
    local name=nodes-${model##*/}
    for options in "" "--hop frames" --kill "--dtype bfloat16"; do
      # shellcheck disable=SC2086
      timeout 300 python3 bench/gpu_nodes.py --device "$device" --model "$model" $options \
        --reference "${NODES_REFERENCE:-own}" \
        --out "$out/$name${options// /}.json" 2>&1 | tee -a "$out/$name.log" || status=1
    done
  done
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.used --format=csv || true
for step in $steps; do
  case $step in
    tests) run_tests tests.log tests/kernels/gpu ;;
    tune)
      # Compiled side by side into triton's cache, measured one by one.
      for part in $(seq 0 11); do
        (
          python3 -m flume_kernels.gpu.decode_tuning --compile "$part" 12 --block-tokens 16 32 64 128
          python3 -m flume_kernels.gpu.decode_tuning --compile "$part" 12 --dtype float8_e4m3fn
          python3 -m flume_kernels.gpu.decode_tuning --compile "$part" 12 --queries 512 --shapes 1x32768
          python3 -m flume_kernels.gpu.linear_tuning --compile "$part" 12
        ) &
      done
      wait
      python3 bench/kernels.py --tune-only 2>&1 | tee "$out/tune.log" | tail -n 90 || status=1
      python3 -m flume_kernels.gpu.linear_tuning 2>&1 | tee "$out/tune_linear.log" | grep TB/s || status=1
      ;;
    bench) python3 bench/kernels.py --out "$out/kernels.json" 2>&1 | tee "$out/bench.log" || status=1 ;;
    layer) python3 bench/gpu_layer.py --out "$out/layer.json" 2>&1 | tee "$out/layer.log" || status=1 ;;
    paths)
      run_tests paths.log tests/weight/cuda/test_captured_steps.py tests/weight/cuda/test_lane_exchange.py \
        tests/attention/cuda/test_gpu_session.py tests/attention/cuda/test_direct_session.py
      ;;
    hop) under_mps measure_hop ;;
    poller) python3 bench/gpu_poller.py --out "$out/poller.json" 2>&1 | tee "$out/poller.log" || status=1 ;;
    step) under_mps measure_steps ;;
    ready)
      timeout 300 python3 bench/gpu_ready.py --device "$device" --kv-bytes "${READY_KV_BYTES:-40GiB}" \
        --out "$out/ready.json" 2>&1 | tee "$out/ready.log" || status=1
      ;;
    growth) under_mps measure_growth ;;
    nodes) if [ "$device" = cuda ]; then under_mps run_nodes; else run_nodes; fi ;;
    *) echo "no step $step" >&2; status=2 ;;
  esac
done
exit $status
