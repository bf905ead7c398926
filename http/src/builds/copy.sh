# Unpacks an uploaded archive for a COPY step, inside the guest. Arguments: the archive, a pattern in it, the
# target, the owner and the mode that were asked for, and the owner when none was.
set -eu
archive=$1 source=$2 target=$3 owner=$4 mode=$5 fallback=$6
here=$PWD
work=$(mktemp -d /var/tmp/mica-copy.XXXXXX)
trap 'rm -rf -- "$work" "$archive"' EXIT
tar -xf "$archive" -C "$work" --no-same-owner
cd -- "$work"
while [ "${source#./}" != "$source" ]; do source=${source#./}; done
while [ "${source%/}" != "$source" ]; do source=${source%/}; done
[ -n "$source" ] || source=.
shopt -s nullglob globstar dotglob
if [ -e "./$source" ] || [ -L "./$source" ]; then
  found=("./$source")
else
  IFS=
  found=(./$source)
fi
if [ ${#found[@]} -eq 0 ]; then
  echo "COPY: nothing uploaded is called $source" >&2
  exit 1
fi
if [ -z "$owner" ] && id -u -- "$fallback" >/dev/null 2>&1; then owner=$fallback:; fi
for entry in "${found[@]}"; do
  if [ -n "$owner" ]; then chown -hR -- "$owner" "$entry"; fi
  if [ -n "$mode" ] && [ ! -L "$entry" ]; then chmod -R -- "$mode" "$entry"; fi
done
case $target in /*) ;; *) target=$here/$target ;; esac
into=0
case $target in */ | */.) into=1 ;; esac
if [ -d "$target" ] || [ ${#found[@]} -gt 1 ]; then into=1; fi
enter() {
  if [ ! -d "$1" ]; then
    mkdir -p -- "$1"
    if [ -n "$owner" ]; then chown -- "$owner" "$1"; fi
  fi
}
for entry in "${found[@]}"; do
  if [ -d "$entry" ] && [ ! -L "$entry" ]; then
    enter "$target"
    find "$entry" -mindepth 1 -maxdepth 1 -exec cp -a -t "$target" -- {} +
  elif [ $into = 1 ]; then
    enter "$target"
    cp -a -t "$target" -- "$entry"
  else
    enter "$(dirname -- "$target")"
    cp -a -T -- "$entry" "$target"
  fi
done
