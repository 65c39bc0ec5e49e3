#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call, without a network.
#
#   benchmarks/gpu_check.sh [--list] [DATA [STAGE…]]
#
# DATA: folder of CIFAR-100, or "synthetic" (the default). STAGE: some of the stages below, in that order; by default
# all. Whatever is asked for, the package is installed first. --list only prints the commands. Stages stand in order of
# value; each has a time limit, and all end within $TOTAL seconds (default 570): name the missing ones in another call.
# aw_sngan and dcgan are judged by the classifier that `train` makes in the same call. After each stage $OUT holds
# summary.txt and results.tar.gz: logs, measurements, run folders without checkpoints.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
list=
if [ "${1:-}" = --list ]; then
  list=1
  shift
fi
data=${1:-synthetic}
shift
chosen=" ${*:-doctor tests train bench_steps bench_operators tune aw_sngan static dcgan memcheck} "
OUT=${OUT:-gpu-results}
TOTAL=${TOTAL:-570}
work=$(mktemp -d)
results=$work/results
if [ "$data" = synthetic ]; then
  set -- --dataset synthetic
else
  data=$(cd "$data" && pwd) || exit 2
  set -- --data-dir "$data"
fi

stage() { # stage NAME SECONDS COMMAND…
  local name=$1 limit=$2 started=$SECONDS status left
  shift 2
  case "$chosen" in *" $name "*) ;; *) [ "$name" = install ] || return 0 ;; esac
  if [ -n "$list" ]; then
    printf '%s\t%s\n' "$name" "$*"
    return
  fi
  left=$((TOTAL - SECONDS))
  if [ "$left" -lt 15 ]; then
    printf '%-16s no time left\n' "$name" | tee -a "$OUT/summary.txt"
    return
  fi
  # Interrupted, pytest and training still keep what they have.
  timeout --signal=INT --kill-after=10 "$((limit < left - 10 ? limit : left - 10))" "$@" >"$results/$name.log" 2>&1
  status=$?
  printf '%-16s status %3d  %4d s  %s\n' "$name" "$status" $((SECONDS - started)) \
    "$(tail -n 1 "$results/$name.log" | cut -c1-120)" | tee -a "$OUT/summary.txt"
  tar -czf "$OUT/results.tar.gz" -C "$work" --exclude=checkpoints results
}

if [ -z "$list" ]; then
  mkdir -p "$OUT" "$results"
  OUT=$(cd "$OUT" && pwd)
  : >"$OUT/summary.txt"
  # From another folder, so that the installed package is what runs.
  cp -r "$here/tests" "$here/benchmarks" "$here/pyproject.toml" "$work/"
  cd "$work" || exit 2
fi

export TRITON_DEFAULT_FP_FUSION=1
bench=(python3 -m pytest -q --benchmark-only --output "$results")
# The most valuable first; then all others, the augmentations among them, which have most to compile.
gpu_tests=(tests/test_{depthwise_gpu,batch_norm_gpu,spectral_gpu,aw_hinge_native,aw_hinge_gpu,capture_gpu}.py)
for file in "$here"/tests/test_*.py; do
  file=tests/${file##*/}
  case " ${gpu_tests[*]} " in
  *" $file "*) ;;
  *) grep -q 'pytest\.mark\.gpu' "$here/$file" && gpu_tests+=("$file") ;;
  esac
done
workers=()
python3 -c 'import xdist' 2>/dev/null && workers=(-n 12)
stage install 240 python3 -m pip install --quiet --no-build-isolation --no-deps "$here"
stage doctor 60 python3 -m fastcifar.doctor
stage tests 200 python3 -m pytest -q -m gpu ${workers[@]+"${workers[@]}"} "${gpu_tests[@]}"
stage train 240 python3 -m fastcifar.train "$@" --preset fast --tta --output "$results/train"
stage bench_steps 240 "${bench[@]}" benchmarks/test_bench_steps.py benchmarks/test_bench_gan_step.py \
  benchmarks/test_bench_spectral.py benchmarks/test_bench_aw_hinge.py benchmarks/test_bench_augment.py
stage bench_operators 240 "${bench[@]}" benchmarks/test_bench_operators.py
stage tune 180 python3 -m benchmarks.tune --output "$results"
judge=()
if [ -n "$list" ] || [ -f "$results/train/result.json" ]; then
  judge=(--classifier "$results/train")
fi
stage aw_sngan 200 python3 -m fastcifar.train "$@" --model aw_sngan --steps 10000 ${judge[@]+"${judge[@]}"} \
  --output "$results/aw_sngan"
stage static 200 python3 -m benchmarks.static --sm 90 --workers "$(nproc)" --output "$results"
stage dcgan 120 python3 -m fastcifar.train "$@" --model dcgan --steps 5000 ${judge[@]+"${judge[@]}"} \
  --output "$results/dcgan"
if [ -n "$list" ] || command -v compute-sanitizer >/dev/null; then
  # Memory that the allocator keeps would hide what is read or written beside a tensor.
  stage memcheck 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
    python3 -m pytest -q -m gpu -k memcheck "${gpu_tests[@]}"
fi
if [ -z "$list" ]; then
  echo
  cat "$OUT/summary.txt"
fi
rm -rf "$work"
