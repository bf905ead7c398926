# Makes a root file system that sandboxes can use of an image of containers. No arguments. Runs inside the root
# file system.
if ! command -v apt-get >/dev/null; then
    echo "the image has no apt-get: it is to be based on Debian or Ubuntu" >&2
    exit 1
fi
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d

missing=
for package in bash sudo ca-certificates; do
    dpkg-query --show --showformat='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
        missing="$missing $package"
done
if [ -n "$missing" ]; then
    apt-get update -q
    # Names of packages, without spaces.
    # shellcheck disable=SC2086
    apt-get install -q -y --no-install-recommends $missing
fi

# Uid 1000 where the image has left it free.
if ! getent passwd user >/dev/null; then
    uid='--uid 1000'
    ! getent passwd 1000 >/dev/null || uid=
    # shellcheck disable=SC2086
    useradd --create-home --home-dir /home/user --shell /bin/bash $uid --user-group user
fi
if [ ! -d /home/user ]; then
    mkdir -p /home/user
    chown user: /home/user
fi
# The clean-up that follows goes through the documents, and takes an empty directory away.
mkdir -p /usr/share/doc/mica
printf 'This system was made of an image of containers by mica template build.\n' >/usr/share/doc/mica/copyright
mkdir -p /etc/sudoers.d /usr/local/bin /usr/local/lib /code
printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' >/etc/sudoers.d/user
chmod 440 /etc/sudoers.d/user
# As in the templates of debootstrap.
chmod 777 /usr/local /usr/local/bin /usr/local/lib
chown user:user /code
