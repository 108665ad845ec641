#!/usr/bin/env bash
# Checks and measures gptk on a GPU, in less than six minutes on an H100: the tests that need CUDA
# (at most two minutes), then gptk beside transformers on the same card, which writes
# docs/benchmarks/gpu.md (four minutes).
#
# It expects a Python with PyTorch for CUDA and with gptk and its development packages, named by
# $PYTHON. By default that is the environment of `make setup`, which takes PyTorch from PyPI; on
# Linux this has CUDA. torchao, if it is installed, is tested and measured, too; Triton comes with
# PyTorch, and needs a C compiler.
#
#     make setup && .venv/bin/python -m pip install torchao
#     benchmarks/on_gpu.sh
#
# A Python that has all packages but gptk can run the checkout as it is:
#     python -m pip install --no-deps --no-build-isolation --editable .
#
# Without a CUDA device all of it is skipped with the reason, and the exit status is 0.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-.venv/bin/python}
page=${1:-docs/benchmarks/gpu.md}
status=0

"$python" -c "import gptk, torch; print('torch', torch.__version__, 'gptk', gptk.__version__)" ||
    { echo "$python cannot import torch and gptk; name one that can: PYTHON=…" >&2; exit 1; }
timeout 120 "$python" -m pytest tests/model/test_cuda.py -q -rs -p no:cacheprovider || status=$?
timeout 270 "$python" benchmarks/on_gpu.py --seconds 200 --write "$page" || status=$?
exit "$status"
