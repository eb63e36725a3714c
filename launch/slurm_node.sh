#!/usr/bin/env bash
# Runs Ray on one node of a Slurm job until the job ends it:  launch/slurm_node.sh ADDRESS PORT CLIENT_PORT
# ADDRESS and the ports are those of the first node, which runs Ray's head.
set -euo pipefail
umask 077

# A private folder, since Ray creates its files world-writable; a short path, since Unix socket paths are limited.
folder=/tmp/ray-$UID-$SLURM_JOB_ID-$(cksum <<<"$SLURMD_NODENAME" | cut -d' ' -f1)
# Kills Ray processes of this and of earlier starts of the job on this node that Slurm no longer tracks.
clean_up() {
    pkill -KILL -U "$UID" -f -- "$folder/" || true
    rm -rf "$folder"
}
clean_up
mkdir "$folder"

# The job may send SIGTERM at any time, also while Ray starts.
ended=no
trap 'ended=yes; kill -TERM ${ray-} 2>/dev/null || true' TERM

# Free ports, since the node may run another Ray; no drain time, since the driver has ended by then.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
settings=(--block --disable-usage-stats --temp-dir="$folder/ray" --min-worker-port=0 --max-worker-port=0)
settings+=(--dashboard-agent-listen-port=0)
if [[ $SLURM_NODEID == 0 ]]; then
    settings+=(--head --node-ip-address="$1" --port="$2" --ray-client-server-port="$3" --include-dashboard=false)
else
    until [[ $ended == yes ]] || (: <"/dev/tcp/$1/$2") 2>/dev/null; do sleep 1; done
    settings+=(--address="$1:$2")
fi
status=0
if [[ $ended == no ]]; then
    ray start "${settings[@]}" &>"$folder/output" &
    ray=$!
    while [[ $ended == no ]] && kill -0 "$ray" 2>/dev/null; do wait "$ray" || status=$?; done
fi
if [[ $ended == yes ]]; then
    status=0 # any other status makes srun kill the other nodes' scripts before they have cleaned up
    for _ in {1..10}; do # Ray can miss the signal while it starts
        kill -0 "${ray-}" 2>/dev/null || break
        sleep 1
    done
else
    cat "$folder/output" >&2
fi
clean_up
exit "$status"
