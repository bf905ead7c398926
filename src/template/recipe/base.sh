# Turns a minimal Debian into the root file system every template starts from.
# Arguments: the packages to install. Runs inside the root file system.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
cat >/etc/dpkg/dpkg.cfg.d/mica <<'END'
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/man/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
END
cat >/etc/apt/apt.conf.d/mica <<'END'
APT::Install-Recommends "false";
Acquire::Languages "none";
END

apt-get update -q
apt-get dist-upgrade -q -y
apt-get install -q -y "$@"

# A system-wide `pip install` is what a sandbox is for.
rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
ln -sf python3 /usr/bin/python

useradd --create-home --home-dir /home/user --shell /bin/bash --uid 1000 --user-group user
printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' >/etc/sudoers.d/user
chmod 440 /etc/sudoers.d/user
# As in E2B's own templates, so that `pip install` and `npm -g` work without sudo.
chmod 777 /usr/local
chmod 777 /usr/local/bin /usr/local/lib
mkdir -p /code
chown user:user /code
printf 'mica\n' >/etc/hostname
printf 'LANG=C.UTF-8\n' >/etc/default/locale
