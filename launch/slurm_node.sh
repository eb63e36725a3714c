#!/usr/bin/env bash
# Ray on one node of a Slurm job, until the job ends it:  launch/slurm_node.sh ADDRESS PORT CLIENT_PORT
# The first node's, where Ray's head is.
set -euo pipefail
umask 077

# Its own folder, since Ray lets everybody write into its: a short one, for sockets have short paths.
folder=/tmp/ray-$UID-$SLURM_JOB_ID-$(cksum <<<"$SLURMD_NODENAME" | cut -d' ' -f1)
# Kills what is left of Ray, here and of an earlier start of this job, should Slurm have lost sight of it.
clean_up() {
    pkill -KILL -U "$UID" -f -- "$folder/" || true
    rm -rf "$folder"
}
clean_up
mkdir "$folder"

# The job may ask it to end at any moment, while Ray starts too.
ended=no
trap 'ended=yes; kill -TERM ${ray-} 2>/dev/null || true' TERM

# Ports that are free, since this node may have another Ray; no time to drain, since the driver has ended before.
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
    ray start "${settings[@]}" &>"$folder/said" &
    ray=$!
    while [[ $ended == no ]] && kill -0 "$ray" 2>/dev/null; do wait "$ray" || status=$?; done
fi
if [[ $ended == yes ]]; then
    status=0 # with any other one srun would kill the other nodes' scripts before they have tidied up
    for _ in {1..10}; do # a Ray that is just starting can lose the signal
        kill -0 "${ray-}" 2>/dev/null || break
        sleep 1
    done
else
    cat "$folder/said" >&2
fi
clean_up
exit "$status"
