#!/usr/bin/env bash
# Loads the operator library that `make build` made, without rebuilding it, under other torch versions.
#
#   tests/compat/torch_abi.sh 2.11.0 2.12.1 2.14.1
#
# Each version gets an environment of its own under build/compat (plain torch may pull gigabytes of CUDA packages),
# made with the Python of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

[ $# -gt 0 ] || { echo "usage: $0 TORCH_VERSION..." >&2; exit 2; }
library=littlebit2_kernels/lib/liblittlebit2_torch.so
[ -f "$library" ] || { echo "$library does not exist; run 'make build' first" >&2; exit 1; }
before=$(sha256sum "$library")

for version in "$@"; do
  environment=build/compat/torch-$version
  [ -x "$environment/bin/python" ] || .venv/bin/python -m venv "$environment"
  "$environment/bin/python" -m pip install -qq "torch==$version" numpy
  PYTHONPATH=. "$environment/bin/python" tests/compat/smoke.py
done

[ "$before" = "$(sha256sum "$library")" ] || { echo "$library changed during the run" >&2; exit 1; }
