#!/bin/bash
# All checks that need a GPU, in under 8 minutes: tests on CUDA, the same allocation as the CPU within noise, and the
# speed of sums inside the graph. Run it where the package is installed with the extra [gpu]:
#
#     tests/device/check.sh          # on CUDA
#     tests/device/check.sh cpu      # no GPU: the CPU stands in, with sums inside the graph, on fewer samples; no proof
#                                    # of CUDA
#
# PYTHON names the interpreter. Models of ../shared/zoo take part where they are. PATIENCE=8 gives each step 8 times its
# seconds, on a machine that others use.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
provider=${1:-cuda} python=${PYTHON:-$root/.venv/bin/python} failed=()
cd "$root/tests/device" || exit 1

step() { # NAME SECONDS COMMAND...
    local begin=$SECONDS
    echo "== $1"
    timeout $(($2 * ${PATIENCE:-1})) "${@:3}" || failed+=("$1")
    echo "== $1: $((SECONDS - begin)) s"
}

[ "$provider" = cpu ] || nvidia-smi --query-gpu=name,memory.free --format=csv
step "provider" 60 "$python" -c "
from rdoq_onnx.system.runtime import Runtime
print(Runtime('$provider').providers, Runtime('$provider').memory() >> 20, 'MiB free')"
step "tests" 120 "$python" -m pytest -q --rootdir "$root" -k "$([ "$provider" = cpu ] && echo cpu || echo cuda)" \
    ../gradients/test_sum_graph.py ../system/test_runtime.py ../probing/test_prefix.py
step "allocation" "$([ "$provider" = cpu ] && echo 380 || echo 180)" "$python" same_allocation.py --provider "$provider"
step "speed" 100 "$python" ../benchmarks/bench_speed.py --only graphs --model resnet20 --samples 64
echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
