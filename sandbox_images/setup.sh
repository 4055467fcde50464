#!/usr/bin/env bash
# Make the sandbox ready: find a Docker engine, or install and start one, and build the image that cells start from.
# Says nothing where nothing is to do; one line for each long step otherwise. Needs no terminal.
#
#   sandbox_images/setup.sh                  engine and image
#   sandbox_images/setup.sh --engine-only    engine
#   sandbox_images/setup.sh --image-only     the image; an engine has to be there
#   sandbox_images/setup.sh --check          only look; 0 where both are there
#
# Exit codes: 0 ready, 2 usage, 5 it cannot be had here (the last line says what to do).
set -euo pipefail

# Where dockerd and debootstrap live, also for a shell that does not look there.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
IMAGE=loopguard/python:1
DEBIAN_BASE=loopguard/debian-base:1
REGISTRY_BASE=python:3.12-slim-bookworm
ENGINE_LOG=/var/log/loopguard-dockerd.log
LOCK=${TMPDIR:-/tmp}/loopguard-setup-$(id -u).lock
ROOM_KIB=1500000 # what an image that is being put together takes on disk

say() { echo "loopguard: $*" >&2; }
give_up() { say "$*"; exit 5; }
has() { command -v "$1" >/dev/null 2>&1; }

docker_() { # an engine that hangs must not hang us; macOS has no `timeout`
    if has timeout; then timeout "${DOCKER_S:-30}" docker "$@"; else docker "$@"; fi
}

engine_answers() { docker_ version --format '{{.Server.Version}}' >/dev/null 2>&1; }

sha256() { if has sha256sum; then sha256sum; else shasum -a 256; fi; }

recipe() { (cd "$HERE" && cat setup.sh python/Dockerfile python/*.sh python/*.py python/languages/*.py) | sha256 | cut -c1-16; }

image_is_current() {
    [ "$(docker_ image inspect --format '{{index .Config.Labels "loopguard.recipe"}}' "$IMAGE" 2>/dev/null)" = "$(recipe)" ]
}

can_install() { [ "$(id -u)" = 0 ] && has apt-get; }

update_lists() {
    # Lists may be old or absent on a fresh machine; an update that fails for one source still leaves the others.
    apt-get update -qq >/dev/null 2>&1 || true
}

install_packages() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 \
        || give_up "apt-get could not install $*: install them yourself and run this again"
}

wait_for_engine() {
    for _ in $(seq 60); do
        engine_answers && return 0
        [ -z "${1:-}" ] || kill -0 "$1" 2>/dev/null || return 1
        sleep 0.5
    done
    return 1
}

start_engine() {
    if has systemctl && [ -d /run/systemd/system ]; then
        systemctl start docker >/dev/null 2>&1 && wait_for_engine && return 0
    fi
    # What an engine that was killed leaves behind stops the next one, also where its process is dead and not yet reaped,
    # and where the kernel has given its number to another. A living program has a link to its file.
    for note in /var/run/docker.pid /var/run/docker/containerd/containerd.pid; do
        [ -f "$note" ] || continue
        case "$(readlink "/proc/$(cat "$note")/exe" 2>/dev/null || true)" in
            */dockerd* | */containerd*) ;;
            *) rm -f "$note" ;;
        esac
    done
    # No service manager: start the engine by itself. The second try is for kernels whose firewall it cannot manage.
    for options in "" "--iptables=false --ip6tables=false --bridge=none"; do
        # shellcheck disable=SC2086  # the options are words
        setsid nohup dockerd $options >>"$ENGINE_LOG" 2>&1 </dev/null &
        wait_for_engine $! && return 0
    done
    return 1
}

ensure_engine() {
    engine_answers && return 0
    if ! can_install; then
        has docker \
            && give_up "no Docker engine answers: start Docker (or set DOCKER_HOST, or join the docker group) and run this again"
        give_up "there is no Docker: install it (https://docs.docker.com/engine/install) and run this again"
    fi
    if ! has dockerd || ! has docker; then
        say "no Docker engine here; installing the distribution's docker.io (about a minute)"
        update_lists
        # Since Debian 13 the docker command is a package of its own.
        packages=(docker.io iptables ca-certificates)
        ! apt-cache show docker-cli >/dev/null 2>&1 || packages+=(docker-cli)
        install_packages "${packages[@]}"
    fi
    say "starting the Docker engine (log: $ENGINE_LOG)"
    start_engine || give_up "the Docker engine did not start: see $ENGINE_LOG"
}

build() { # BASE NETWORK; silent, also where the engine has only its old builder and says so at every build
    said=$(DOCKER_S=900 docker_ build --quiet --network "$2" --build-arg BASE="$1" \
        --label loopguard.recipe="$(recipe)" --tag "$IMAGE" "$HERE/python" 2>&1) || { tail -n 5 <<<"$said" >&2; return 1; }
}

registry_answers() {
    # A closed network must cost seconds, not minutes.
    DOCKER_S=20 docker_ manifest inspect "$REGISTRY_BASE" >/dev/null 2>&1
}

workshop() { # a new folder where there is room, and where programs and devices work (a /tmp may be small, or noexec)
    for place in "${TMPDIR:-/tmp}" /var/tmp /var/lib /root; do
        [ "$(df -Pk "$place" 2>/dev/null | awk 'NR == 2 {print $4}')" -gt "$ROOM_KIB" ] 2>/dev/null || continue
        folder=$(mktemp -d "$place/loopguard-image.XXXXXX" 2>/dev/null) || continue
        if cp /bin/true "$folder/try" && "$folder/try" && mknod "$folder/null" c 1 3 && true >"$folder/null"; then
            rm -f "$folder/try" "$folder/null"
            echo "$folder"
            return 0
        fi 2>/dev/null
        rm -rf "$folder"
    done
    return 1
}

base_from_debian() {
    can_install || give_up "no registry answers, and putting the image together from Debian packages needs root"
    update_lists
    has debootstrap || install_packages debootstrap
    suite=bookworm origin=Debian components=main
    # shellcheck disable=SC1091  # every Debian and Ubuntu has it
    case "$(. /etc/os-release && echo "$ID")" in
        ubuntu) suite=$(. /etc/os-release && echo "$VERSION_CODENAME") origin=Ubuntu components=main,universe ;;
    esac
    # The mirror and the proxy that apt uses here; where apt knows none for this suite, debootstrap's own.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Origin: $origin" "Codename: $suite" \
        2>/dev/null | sort -u | head -n 1) || mirror=
    proxy=$(apt-config shell proxy Acquire::http::Proxy | sed "s/^proxy='\(.*\)'$/\1/") || proxy=
    [ -z "$proxy" ] || [ "$proxy" = DIRECT ] || export http_proxy="${http_proxy:-$proxy}"
    root=$(workshop) || give_up "no folder with $((ROOM_KIB / 1000)) MB to build in: point TMPDIR to one"
    trap 'rm -rf "$root"' EXIT
    say "no registry answers; putting the sandbox image together from $origin packages (about a minute)"
    debootstrap --variant=minbase --components="$components" --include=python3,python3-numpy,procps \
        "$suite" "$root/fs" ${mirror:+"$mirror"} >"$root/log" 2>&1 \
        || { tail -n 3 "$root/log" >&2; give_up "debootstrap failed: are $origin packages within reach?"; }
    rm -rf "$root"/fs/var/lib/apt/lists/* "$root"/fs/var/cache/apt/*
    tar -C "$root/fs" -c . | DOCKER_S=300 docker_ import - "$DEBIAN_BASE" >/dev/null
    rm -rf "$root"
    trap - EXIT
}

ensure_image() {
    image_is_current && return 0
    if ! docker_ image inspect "$DEBIAN_BASE" >/dev/null 2>&1; then
        if registry_answers; then
            say "building the sandbox image from $REGISTRY_BASE (a minute or two)"
            build "$REGISTRY_BASE" default && say "the sandbox image $IMAGE is ready" && return 0
        fi
        base_from_debian
    fi
    build "$DEBIAN_BASE" none || give_up "the sandbox image could not be built; to see why: docker build $HERE/python"
    say "the sandbox image $IMAGE is ready"
}

case "${1:-}" in
    --check) engine_answers && image_is_current && exit 0; exit 5 ;;
    "" | --engine-only | --image-only) ;;
    *) say "unknown option $1; see the head of $0"; exit 2 ;;
esac

# Two set-ups at once would build the same image twice.
exec 9>>"$LOCK"
! has flock || flock 9
if [ "${1:-}" = --image-only ]; then
    engine_answers || give_up "no Docker engine answers: run $0 without an option, or start Docker"
else
    ensure_engine 9>&-
fi
[ "${1:-}" = --engine-only ] || ensure_image 9>&-
