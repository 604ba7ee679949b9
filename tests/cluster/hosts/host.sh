#!/bin/bash
# One host: runs in namespaces of its own. usage: host.sh NAME ADDRESS GATEWAY FOLDER
# FOLDER holds: home/, the host's only account's; key, the server's; passwd, which says where home is.
set -euo pipefail
name=$1 address=$2 gateway=$3 folder=$4
hostname "$name"
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount --bind "$folder/passwd" /etc/passwd
mkdir -p /run/sshd
touch "$folder/booted"
# The cable is plugged in from outside.
for _ in $(seq 100); do
  if ip link show eth0 >/dev/null 2>&1; then break; fi
  sleep 0.1
done
ip link set lo up
ip addr add "$address/24" dev eth0
ip link set eth0 up
ip route add default via "$gateway"
exec "$(command -v sshd)" -D -e -f /dev/null -h "$folder/key" -o "ListenAddress=$address" -o PidFile=none \
  -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o UsePAM=no -o StrictModes=no \
  -o MaxStartups=100 -o MaxSessions=100
