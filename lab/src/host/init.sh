#!/bin/sh
# The emulated host's init. The kernel starts it as process 1 on a root file system made by
# image.rs. It mounts, loads and configures what a bare-metal host of Mica would have, then hands
# over to tini (which reaps orphans) and `mica-lab inside` (the exec channel, which keeps the
# daemon). It never starts a shell for anybody: a step that fails says so on the console, and the
# rest runs. Every program started here costs a tenth of a second of emulation, so they are few,
# and what can run side by side does.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8

say() { echo "mica-init: $*"; }
try() { "$@" || say "FAILED: $*"; }

# /etc/fstab, by image.rs: proc, sys, dev, devpts, shm, run, tmp and cgroup2.
try mount --all

# The kernel finds NVMe drives side by side with this script and numbers them in no fixed order;
# qemu.rs gives each a serial number, which the kernel pads with spaces.
drive() {
    tries=0
    while [ "$tries" -lt 300 ]; do
        for disk in /sys/block/nvme*; do
            if read -r serial < "$disk/device/serial" && [ "$serial" = "$1" ] &&
                [ -b "/dev/${disk##*/}" ]; then
                echo "/dev/${disk##*/}"
                return
            fi
        done 2> /dev/null
        tries=$((tries + 1))
        sleep 0.1
    done
    say "FAILED: there is no drive $1" >&2
}

network() {
    try modprobe virtio_net
    ip -batch - <<EOF || say "FAILED: configure the network"
link set lo up
link set eth0 up
address add 10.0.2.15/24 dev eth0
route add default via 10.0.2.2
EOF
}

tools() {
    try mount -t ext4 -o noatime "$(drive mica-tools)" /opt/mica
}

store() {
    try modprobe xfs
    device=$(drive mica-store)
    if ! mount -t xfs -o noatime "$device" /var/lib/mica 2> /dev/null; then
        # Only a drive without any file system is formatted; a damaged one is left for a person.
        if [ -z "$(blkid -p -s TYPE -o value "$device")" ]; then
            say "making the store's file system"
            try mkfs.xfs -q -m reflink=1,bigtime=1 "$device"
        fi
        try mount -t xfs -o noatime "$device" /var/lib/mica
    fi
}

network &
tools &
store &
try modprobe kvm-amd &

# What a host of thousands of sandboxes needs anyway.
echo mica-lab > /proc/sys/kernel/hostname
echo "+cpu +memory +pids +cpuset +io" > /sys/fs/cgroup/cgroup.subtree_control ||
    say "FAILED: cgroup controllers"
echo 1048576 > /proc/sys/vm/max_map_count
echo 1 > /proc/sys/vm/overcommit_memory
ulimit -n 1048576
ulimit -l unlimited

wait
read -r uptime idle < /proc/uptime
say "ready after $uptime s"
exec tini -- /opt/mica/bin/mica-lab inside
