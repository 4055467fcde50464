#!/bin/sh
# The last layer of the sandbox image, the same on every base: places for a call to write, nothing to climb with.
set -eu
mkdir -p /job
chmod 1777 /job /tmp
# Programs that want this one find it writable, as far as /tmp is.
rm -rf /var/tmp
ln -s /tmp /var/tmp
find / -xdev -type f -perm /6000 -exec chmod ug-s {} +
for tool in gcc cc g++ c++ ld as make apt apt-get dpkg pip pip3; do
    rm -f "/usr/bin/$tool" "/usr/local/bin/$tool" "/bin/$tool"
done
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* "$HOME/.cache" /usr/share/doc /usr/share/man
python3 -m compileall -q /opt/loopguard
chmod -R a+rX,go-w /opt/loopguard
rm -f /opt/loopguard/harden.sh
