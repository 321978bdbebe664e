#!/usr/bin/env bash
# Installs what the tests and the demo run, as far as it is missing: Debian's
# packages, with apt. Says nothing when all is there. Services that come with
# the packages are not started; the tests and the demo start their own.
#
# With the argument evaluation, also what bootfs is compared with.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

# A command and the package that brings it.
needed='
dockerd          docker.io
docker           docker.io
docker-registry  docker-registry
docker-compose   docker-compose
skopeo           skopeo
umoci            umoci
casync           casync
sshd             openssh-server
nginx            nginx
promtool         prometheus
busybox          busybox-static
fsck.erofs       erofs-utils
mmdebstrap       mmdebstrap
zstd             zstd
getfattr         attr
setfacl          acl
getcap           libcap2-bin
podman           podman
newuidmap        uidmap
ctr              containerd
runc             runc
ip               iproute2
nsenter          util-linux
strace           strace
mkfs.ext4        e2fsprogs
mkfs.xfs         xfsprogs
'
[ "${1:-}" != evaluation ] || needed+='
ctr-remote       stargz-snapshotter
squashfuse_ll    squashfuse
mksquashfs       squashfs-tools
fuse-overlayfs   fuse-overlayfs
mkfs.erofs       erofs-utils
'
missing=()
while read -r command package; do
	[ -z "$command" ] || command -v "$command" >/dev/null || missing+=("$package")
done <<<"$needed"

# Debian roots are made from the machine's own apt sources: apt must know them.
known=$(apt-get indextargets --format '$(CODENAME)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null || true)
[ ${#missing[@]} -gt 0 ] || [ -z "$known" ] || exit 0
mapfile -t missing < <(printf '%s\n' ${missing[@]+"${missing[@]}"} | sort -u | grep .)

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
	echo "missing: ${missing[*]:-apt package lists}; install them, or run this as root on Debian 12" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
[ ${#missing[@]} -gt 0 ] || exit 0

policy=/usr/sbin/policy-rc.d # asked by package scripts before they start a service
if [ ! -e "$policy" ]; then
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod +x "$policy"
fi
echo "installing: ${missing[*]}"
apt-get install -y -qq --no-install-recommends debian-archive-keyring "${missing[@]}" >/dev/null
