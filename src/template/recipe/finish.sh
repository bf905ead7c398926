# Removes what belongs to the build and not to the image. Runs inside the root file system.
find /usr/share/doc -type f ! -name copyright -delete
find /usr/share/doc -type d -empty -delete
rm -rf /usr/share/man/* /usr/share/info/* /usr/share/locale/*
apt-get clean
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/debconf/*-old /var/lib/dpkg/*-old
rm -rf /var/log/apt /var/log/*.log /var/cache/ldconfig /root/.cache/pip /home/user/.cache/pip
rm -f /usr/sbin/policy-rc.d /etc/ssh/ssh_host_* /var/lib/systemd/random-seed
: >/etc/machine-id
rm -f /var/lib/dbus/machine-id
