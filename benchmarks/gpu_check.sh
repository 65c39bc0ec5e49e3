#!/usr/bin/env bash
# Everything that only a GPU can tell, in order of value, each stage with a time limit; results and logs go to $OUT.
# One argument: the folder that holds CIFAR-100, for the short trainings at the end.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
mkdir -p "$OUT"
data=${1:-}
summary="$OUT/summary.txt"
: >"$summary"

stage() { # stage NAME SECONDS COMMAND…
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  printf '%-22s status %3d  %4d s  %s\n' "$name" "$status" $((SECONDS - started)) \
    "$(tail -n 1 "$OUT/$name.log" | cut -c1-110)" | tee -a "$summary"
}

export TRITON_DEFAULT_FP_FUSION=1
stage install 240 python3 -m pip install --no-build-isolation --no-deps .
# From another folder, so that the installed package is what runs.
root=$PWD
work=$(mktemp -d)
cp -r tests benchmarks pyproject.toml "$work/"
cd "$work"
stage doctor 60 python3 -m fastcifar.doctor
stage gpu_tests 300 python3 -m pytest -q -m gpu tests
if command -v compute-sanitizer >/dev/null; then
  stage memcheck 120 compute-sanitizer --error-exitcode 9 python3 -m pytest -q -m gpu -k memcheck tests
fi
stage bench_depthwise 180 python3 -m benchmarks.depthwise --output "$OUT"
stage tune 180 python3 -m benchmarks.tune --output "$OUT"
stage static 180 python3 -m benchmarks.static --sm 90 --output "$OUT"
if [ -n "$data" ]; then
  stage train_demo 120 python3 -m fastcifar.train --data-dir "$data" --preset demo --output "$OUT/demo"
  stage train_fast 400 python3 -m fastcifar.train --data-dir "$data" --preset fast --output "$OUT/fast"
fi
cd "$root"
echo
cat "$summary"
