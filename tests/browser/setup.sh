#!/usr/bin/env bash
# Chromium, where it is missing: from the packages of Debian or Ubuntu, as root. Says what to do everywhere else.
set -euo pipefail
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "There is no Chromium, and this is not root on Debian or Ubuntu: install one yourself" >&2
    exit 1
fi
echo "Installing Chromium (about half a minute, once)" >&2
export DEBIAN_FRONTEND=noninteractive
timeout 90 apt-get update -qq >&2
timeout 240 apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
command -v chromium >/dev/null || { echo "The package chromium brought no browser (Ubuntu's is a snap)" >&2; exit 1; }
