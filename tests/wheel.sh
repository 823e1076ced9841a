#!/usr/bin/env bash
# Builds the sdist, from it the wheel, and uses that from an empty folder, in an empty environment, with no compiler on the PATH.
set -euo pipefail
python=$(realpath -s "${PYTHON:-python3}")
constraints=$(realpath constraints.txt)
work=$(mktemp -d)
trap "'$(command -v rm)' -rf '$work'" EXIT # an absolute path: PATH changes below

"$python" -m venv "$work/build"
"$work/build/bin/pip" install -q build
"$work/build/bin/python" -m build -q --sdist -o "$work/dist" .
# Without CUDA, as on a machine that has no nvcc: everything else must build, without a warning, and run.
CMAKE_ARGS="-DEFFDET_CUDA=OFF -DCMAKE_COMPILE_WARNING_AS_ERROR=ON" \
  "$python" -m pip wheel -q --no-deps -w "$work/dist" "$work"/dist/*.tar.gz
"$python" - "$work"/dist/* <<'PYTHON'
import sys, tarfile, zipfile

sdist, wheel = sorted(sys.argv[1:], key=lambda name: name.endswith(".whl"))
sources = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
shared = sources & files
assert {"effdet/py.typed", "effdet_kernels/py.typed"} <= shared
assert any(name.startswith("effdet/assets/") and name.endswith(".pth") for name in shared)
assert {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "pyproject.toml", "CMakeLists.txt"} <= sources
assert {name.partition("/")[0] for name in sources if "/" in name} == {"csrc", "effdet", "effdet_kernels"}
assert {name.partition("/")[0] for name in files} == {"effdet", "effdet_kernels"}
PYTHON
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

# From the wheel to the first boxes, its dependencies being there.
effdet scenes drawn --count 1 --seed 7 --split val
pip uninstall -q -y effdet-kernels
SECONDS=0
pip install -q --no-deps dist/*.whl
effdet detect drawn/images --out found
echo "installed and detected in $SECONDS s"
if [ "$SECONDS" -ge 60 ]; then
  echo "a minute is the most that it may take" >&2
  exit 1
fi
echo "the wheel works without compiler and source tree"
