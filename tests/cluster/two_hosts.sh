#!/bin/bash
# Two hosts on one machine: a Ray head and a worker in network namespaces of their own, with separate addresses. Model,
# samples and scratch folder are in a folder that only the head sees. Needs root, iproute2 and the extra [ray]; not in CI.
#
#     tests/cluster/two_hosts.sh [MODEL CALIBRATION [OPTION...]]     # BIN: the folder of python and rdoq-onnx
#
# Checks that the bytes are those of a plain run for --workers auto and ray://, with a worker that joins late, and that
# a run whose head is killed ends with one line and goes on from --curves.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
model=${1:-$root/models/digits_cnn.onnx} calibration=${2:-$root/models/digits_calib.npz}
shift $(($# < 2 ? $# : 2))
options=(--bits 4 --effort fast "$@" --threads 1 --quiet)
bin=${BIN:-$root/.venv/bin}
export RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 HOME
folder=$(mktemp -d /tmp/rqXXXX) hidden=$(mktemp -d /tmp/rqXXXX) a=rq-head-$$ b=rq-work-$$
HOME=$folder

clean() {
    for n in $a $b; do
        ip netns pids $n 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del $n 2>/dev/null || true
    done
    rm -rf "$folder" "$hidden"
}
trap clean EXIT

cp "$model" "$hidden/model.onnx"
cp "$calibration" "$hidden/calib.npz"
mkdir "$hidden/tmp"
ip netns add $a
ip netns add $b
ip link add rq0 netns $a type veth peer name rq1 netns $b
ip -n $a addr add 10.77.0.1/24 dev rq0
ip -n $b addr add 10.77.0.2/24 dev rq1
for n in $a $b; do ip -n $n link set lo up; done
ip -n $a link set rq0 up
ip -n $b link set rq1 up

head() { # without CPUs: every block is computed on the other host
    cd / && ip netns exec $a "$bin/python" -m ray.scripts.scripts start --head --node-ip-address=10.77.0.1 --port=6379 --num-cpus=0 \
        --ray-client-server-port=10001 --include-dashboard=false --temp-dir="$folder/ray" >"$folder/head.log" 2>&1
}
worker() { # where the folder of the model is empty
    ip netns exec $b unshare -m sh -c "mount -t tmpfs none $hidden && cd / && exec $bin/python -m ray.scripts.scripts start \
        --address=10.77.0.1:6379 --node-ip-address=10.77.0.2 --num-cpus=1" >"$folder/worker.log" 2>&1
}
run() { (cd "$hidden" && TMPDIR=$hidden/tmp ip netns exec $a "$bin/rdoq-onnx" model.onnx "$1" --calibration calib.npz "${options[@]}" "${@:2}"); }
same() {
    cmp "$hidden/plain.onnx" "$hidden/$1"
    echo "ok: $2"
}

run plain.onnx
head
run late.onnx --workers auto &
sleep 15
worker
wait $!
same late.onnx "--workers auto, and the worker joined late"
run client.onnx --workers ray://10.77.0.1:10001
same client.onnx "--workers ray://10.77.0.1:10001"

run lost.onnx --workers auto --curves c.npz 2>"$folder/said" &
running=$!
for _ in $(seq 600); do
    ip netns pids $b | xargs -r ps -o args= | grep -q "ray::sum_block" && break
    sleep 0.1
done
ip netns pids $a | while read -r p; do
    case $(tr '\0' ' ' <"/proc/$p/cmdline" 2>/dev/null) in *gcs_server* | *raylet*) kill -9 "$p" ;; esac
done
code=0
wait $running || code=$?
lines=$(wc -l <"$folder/said")
cat "$folder/said"
[ $code = 2 ] && [ "$lines" = 1 ]
echo "ok: the head was killed, exit 2 and one line"
run lost.onnx --curves c.npz
same lost.onnx "a run went on from --curves"
