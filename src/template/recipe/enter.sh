# Runs one recipe inside a root file system that is being built.
# Arguments: ROOT RECIPE [ARGUMENT...]
# Called under `unshare --mount --pid --fork`, so every mount below ends with this process.
set -eu
root=$1
recipe=$2
shift 2

mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=0755 tmpfs "$root/dev"
for node in null zero full random urandom tty; do
    : >"$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,mode=0620,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"

# The machine's own way to the network: name service, certificates, local wheels.
build="$root/run/mica-build"
mkdir "$build"
cp "$recipe" "$build/recipe.sh"
for file in resolv.conf hosts; do
    cp -L "/etc/$file" "$build/$file" 2>/dev/null || : >"$build/$file"
    [ -e "$root/etc/$file" ] || : >"$root/etc/$file"
    mount --bind "$build/$file" "$root/etc/$file"
done
printf '127.0.0.1 localhost mica\n' >>"$build/hosts"
if [ -n "${MICA_BUILD_CA:-}" ]; then
    cp -L "$MICA_BUILD_CA" "$build/ca.crt"
fi
if [ -n "${MICA_BUILD_APT_CONF:-}" ]; then
    printf '%s\n' "$MICA_BUILD_APT_CONF" >"$build/apt.conf"
    APT_CONFIG=/run/mica-build/apt.conf
    export APT_CONFIG
fi
if [ -n "${PIP_FIND_LINKS:-}" ] && [ -d "$PIP_FIND_LINKS" ]; then
    mkdir "$build/wheels"
    mount --bind "$PIP_FIND_LINKS" "$build/wheels"
    PIP_FIND_LINKS=/run/mica-build/wheels
    export PIP_FIND_LINKS
fi
unset MICA_BUILD_CA MICA_BUILD_APT_CONF
exec chroot "$root" /bin/sh -eu /run/mica-build/recipe.sh "$@"
