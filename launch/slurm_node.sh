#!/usr/bin/env bash
# Ray on one node of a Slurm job, until the job ends it:  launch/slurm_node.sh ADDRESS PORT CLIENT_PORT
# The first node's, where Ray's head is.
set -euo pipefail
umask 077

# Its own folder, since Ray lets everybody write into its: a short one, for sockets have short paths.
folder=/tmp/ray-$UID-$SLURM_JOB_ID-$(cksum <<<"$SLURMD_NODENAME" | cut -d' ' -f1)
# What is left of an earlier start of this job, should Slurm have lost sight of it.
pkill -KILL -U "$UID" -f -- "$folder/" || true
rm -rf "$folder"
mkdir "$folder"

# Ports that are free, since this node may have another Ray; no time to drain, since the driver has ended before.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
settings=(--block --disable-usage-stats --temp-dir="$folder/ray" --min-worker-port=0 --max-worker-port=0)
settings+=(--dashboard-agent-listen-port=0)
if [[ $SLURM_NODEID == 0 ]]; then
    ray start --head --node-ip-address="$1" --port="$2" --ray-client-server-port="$3" --include-dashboard=false \
        "${settings[@]}" &>"$folder/said" &
else
    until (: <"/dev/tcp/$1/$2") 2>/dev/null; do sleep 1; done
    ray start --address="$1:$2" "${settings[@]}" &>"$folder/said" &
fi
ended=no
trap 'ended=yes; kill -TERM $!' TERM
while kill -0 $! 2>/dev/null; do wait $! || true; done
status=0
wait $! || status=$?
if [[ $ended == yes ]]; then
    status=0 # with any other one srun would kill the other nodes' scripts before they have tidied up
else
    cat "$folder/said" >&2
fi
rm -rf "$folder"
exit "$status"
