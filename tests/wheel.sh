#!/usr/bin/env bash
# Builds the wheel and uses it from an empty folder, in an empty environment, with no compiler on the PATH.
set -euo pipefail
python=$(realpath -s "${PYTHON:-python3}")
constraints=$(realpath constraints.txt)
work=$(mktemp -d)
trap "'$(command -v rm)' -rf '$work'" EXIT # an absolute path: PATH changes below

# Without CUDA, as on a machine that has no nvcc: everything else must build and run.
CMAKE_ARGS="-DEFFDET_CUDA=OFF" "$python" -m pip wheel -q --no-deps -w "$work/dist" .
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q -c "$constraints" torch numpy
"$work/venv/bin/pip" install -q -c "$constraints" "$work"/dist/*.whl

cd "$work"
export PATH="$work/venv/bin"
for tool in cc gcc c++ g++ clang nvcc cmake; do
  if command -v "$tool" > /dev/null; then
    echo "$tool is on the PATH: the check would prove nothing" >&2
    exit 1
  fi
done
python - <<'PYTHON'
import effdet, effdet_kernels, torch
from effdet_kernels import _native

assert _native.REASON is None, _native.REASON
with effdet_kernels.use_backend("cpu"):
    index, score, count, dropped = effdet_kernels.soft_nms(torch.rand(2, 9, 4), torch.rand(2, 9), max_det=5)
assert index.shape == (2, 5)
bench = effdet.create_model("tf_efficientdet_d0", bench_task="predict", pretrained_backbone=False).eval()
with torch.no_grad():
    rows = bench(torch.zeros(1, 3, 128, 128))
assert rows.shape == (1, 100, 6)
PYTHON
effdet info
effdet demo --out demo
echo "the wheel works without compiler and source tree"
