#!/usr/bin/env bash
# Installs what the tests and the demo need of Debian, and nothing that is there already in any form: a
# containerd that came from elsewhere stays as it is. No service is started, stopped or restarted.
# Usage: system_packages.sh PYTHON
set -euo pipefail
python=$1
missing=()

need() { # need PACKAGE TEST...: note PACKAGE when the test fails
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}
has() { command -v "$1"; }
python_has() { "$python" -c "$1"; }

need containerd has containerd
need containerd has ctr
need runc has runc
need docker-registry has docker-registry
need skopeo has skopeo
need fuse3 has fusermount3
need iproute2 has ip
need prometheus has promtool
need prometheus has prometheus
need openssl has openssl
need gnupg has gpg
need gnupg has gpg-agent
need systemd-container has systemd-nspawn
need procps has ps
need python3.11 test -x /usr/bin/python3.11
need gcc has gcc
need libc6-dev test -e /usr/include/stdio.h
need pkg-config has pkg-config
need libfuse3-dev pkg-config --exists fuse3
need python3.11-dev python_has 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'
need python3.11-venv python_has 'import ensurepip'

if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi
echo "system packages: installing ${missing[*]}"
if [ "$(id -u)" -ne 0 ]; then
    echo "system packages: this needs root; install them by hand and run make again" >&2
    exit 1
fi

# Debian starts what it installs unless this file says no; one that is there already is its owner's decision.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-upgrade --no-install-recommends "${missing[@]}" >/dev/null
}
# The first try serves a machine whose package lists are fresh, the second one that never had any.
install || { apt-get update -qq && install; }
