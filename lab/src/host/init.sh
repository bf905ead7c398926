#!/bin/sh
# The emulated host's init. QEMU starts it as process 1 on a root file system made by image.rs.
# It mounts, loads and configures what a bare-metal host of Mica would have, then hands over to
# tini (which reaps orphans) and `mica-lab inside` (the exec channel, which keeps the daemon).
# It never starts a shell for anybody: a step that fails says so on the console, and the rest runs.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8

say() { echo "mica-init: $*"; }
try() { "$@" || say "FAILED: $*"; }

try mount -t proc -o nosuid,nodev,noexec proc /proc
try mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
grep -q ' /dev devtmpfs ' /proc/mounts || try mount -t devtmpfs -o nosuid devtmpfs /dev
mkdir -p /dev/pts /dev/shm
try mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts /dev/pts
try mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm
try mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs /run
try mount -t tmpfs -o nosuid,nodev tmpfs /tmp
try mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
ln -sf /proc/self/fd /dev/fd
echo "+cpu +memory +pids +cpuset +io" > /sys/fs/cgroup/cgroup.subtree_control || say "FAILED: cgroup controllers"

try hostname mica-lab
try ip link set lo up
try modprobe virtio_net
try ip link set eth0 up
try ip addr add 10.0.2.15/24 dev eth0
try ip route add default via 10.0.2.2

# The kernel numbers NVMe drives in no fixed order; qemu.rs gives each a serial number.
drive() {
    for disk in /sys/block/nvme*; do
        if [ "$(tr -d ' ' < "$disk/device/serial" 2>/dev/null)" = "$1" ]; then
            echo "/dev/${disk##*/}"
            return
        fi
    done
    say "FAILED: there is no drive $1" >&2
}

try mount -t ext4 -o noatime "$(drive mica-tools)" /opt/mica

try modprobe xfs
store=$(drive mica-store)
if [ -z "$(blkid -p -s TYPE -o value "$store")" ]; then
    say "making the store's file system"
    try mkfs.xfs -q -m reflink=1,bigtime=1 "$store"
fi
try mount -t xfs -o noatime "$store" /var/lib/mica

try modprobe kvm-amd
for module in tun vhost_vsock; do modprobe -q "$module" || say "no module $module"; done

# What a host of thousands of sandboxes needs anyway.
ulimit -n 1048576
ulimit -l unlimited
echo 1048576 > /proc/sys/vm/max_map_count
echo 1 > /proc/sys/vm/overcommit_memory

say "ready after $(cut -d' ' -f1 /proc/uptime) s"
exec tini -- /opt/mica/bin/mica-lab inside
