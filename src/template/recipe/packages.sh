# Adds Debian packages. Arguments: the packages. Runs inside the root file system.
apt-get update -q
apt-get install -q -y "$@"
