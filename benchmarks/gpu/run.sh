#!/usr/bin/env bash
# Install what prepare.sh collected into a temporary folder, and measure: bash benchmarks/gpu/run.sh
#
# Options go to run.py. The folder is .gpu, or $GPU_WHEELS; nothing is changed outside of /tmp, but the
# results and the page in this checkout. `python3` must be one that has torch; PYTHON names another.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
from=${GPU_WHEELS:-$root/.gpu}
python=${PYTHON:-python3}
site=$(mktemp -d /tmp/moenas-gpu-site.XXXXXX)

if [ ! -d "$from/wheels" ]; then
    echo "$0: no $from/wheels; run benchmarks/gpu/prepare.sh where there is a network" >&2
    exit 2
fi
"$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" "$from"/wheels/*.whl
if [ -f "$from/ray.tar.xz" ]; then
    "$python" -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter='data')" \
        "$from/ray.tar.xz" "$site" || echo "$0: Ray was not unpacked; its group will fail" >&2
fi
export PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$site/cache}"
cd "$root"
exec "$python" benchmarks/gpu/run.py "$@"
