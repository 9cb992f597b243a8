# shellcheck shell=bash disable=SC2034
# What bin/up, bin/down and bin/test share: how they speak, and how they get their tools. Sourced; afterwards the
# working directory is the repository.
set -Eeuo pipefail
trap 'printf "%s: line %s: this failed: %s\n" "$0" "$LINENO" "$BASH_COMMAND" >&2' ERR

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
cd "$root"
state=$root/.hothouse
command=bin/${0##*/}
changed=false # whether this run installed anything

export LC_ALL=C.UTF-8 # Ansible insists on UTF-8, and a fresh machine may have no other such locale
export PATH=$root/.venv/bin:$PATH
export ANSIBLE_CONFIG=$root/ansible.cfg
unset ANSIBLE_INVENTORY VIRTUAL_ENV
# Python would compile all of Ansible anew at every start.
unset PYTHONDONTWRITEBYTECODE
# Debian's store of certificates, to which companies add their own, for pip and uv too.
export SSL_CERT_FILE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
export PIP_CERT=${PIP_CERT:-$SSL_CERT_FILE} PIP_DISABLE_PIP_VERSION_CHECK=1
export UV_PYTHON_DOWNLOADS=never

bold='' plain=''
if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
  bold=$'\e[1m' plain=$'\e[0m'
  export ANSIBLE_FORCE_COLOR=1 # its output goes through tee
fi

say() { printf '%s\n' "$@"; }

# fail WHAT [HOW TO MEND IT]...
fail() {
  printf '\n%s: %s\n' "$command" "$1" >&2
  shift
  (($# == 0)) || printf '  %s\n' "$@" >&2
  exit 1
}

# stage NAME: begins the next stage and remembers how long the one before took, in $stages and $took (milliseconds).
stages=() took=() stage_count=0 stage_began=0
now() { printf '%s' "$((${EPOCHREALTIME/[.,]/} / 1000))"; }
stage_end() {
  ((${#stages[@]} == ${#took[@]})) || took+=("$(($(now) - stage_began))")
}
stage() {
  stage_end
  stages+=("$1")
  stage_began=$(now)
  printf '\n%s[%d/%d] %s%s\n' "$bold" "${#stages[@]}" "$stage_count" "$1" "$plain"
}
seconds() { printf '%d.%d s' "$(($1 / 1000))" "$(($1 % 1000 / 100))"; }

as_root() {
  if ((EUID == 0)); then "$@"; else sudo "$@"; fi
}

# Debian 12 or 13, and root or sudo.
require_platform() {
  # shellcheck source=/dev/null
  local name=unknown id=unknown version=
  [[ ! -r /etc/os-release ]] || {
    name=$(. /etc/os-release && printf '%s' "$PRETTY_NAME")
    id=$(. /etc/os-release && printf '%s' "$ID")
    version=$(. /etc/os-release && printf '%s' "${VERSION_ID:-}")
  }
  [[ $id == debian && ($version == 12 || $version == 13) ]] ||
    fail "local hosts are made from Debian 12 or 13 only, and this is $name" \
      "Use such a machine, or deploy to real hosts with ansible-playbook (see README.md)."
  ((EUID == 0)) || command -v sudo >/dev/null ||
    fail "this needs root, for podman and for missing packages, and there is no sudo" "Run it as root."
}

# install_packages PACKAGE...: what of it is missing, after saying so.
install_packages() {
  local package missing=()
  for package; do
    [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
      missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  changed=true
  say "installing Debian packages: ${missing[*]}"
  as_root apt-get -o DPkg::Lock::Timeout=300 -qq update
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -y -q \
    install --no-install-recommends "${missing[@]}" ||
    fail "apt-get could not install ${missing[*]}" "Its message is above; mend that and run $command again."
}

# The machine's part of the tools: podman and what it needs to make hosts.
install_engine() {
  local packages=(
    aardvark-dns ca-certificates iproute2 mmdebstrap netavark openssh-client podman python3 python3-venv
    iptables nftables # netavark calls the one on Debian 12 and the other on Debian 13
  )
  # crun, podman's default, refuses control groups of version 1
  if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then packages+=(crun); else packages+=(runc); fi
  install_packages "${packages[@]}"
}

# install_tools run|test: the Python tools of uv.lock into .venv; `test` adds the development ones. Nothing to do costs
# some milliseconds.
install_tools() {
  local key uv options=(--locked)
  key=$(sha256sum pyproject.toml uv.lock | sha256sum)
  if [[ -x .venv/bin/ansible-playbook ]] && [[ $(cat ".venv/.hothouse-$1" 2>/dev/null) == "$key" ]]; then return; fi
  changed=true
  say "installing the Python tools that uv.lock names into .venv (about 600 MB)"
  uv=$(/usr/bin/python3 bin/lib/locked_uv.py)
  if ! .venv/bin/python -c '' 2>/dev/null; then
    /usr/bin/python3 -m venv --clear .venv
  fi
  if [[ $(.venv/bin/uv --version 2>/dev/null) != "uv ${uv%% *}"* ]]; then
    printf 'uv==%s\n' "$uv" |
      .venv/bin/python -m pip --quiet install --no-deps --require-hashes --requirement /dev/stdin
  fi
  [[ $1 == test ]] || options+=(--no-dev --inexact) # leaves the development tools where bin/test put them
  .venv/bin/uv sync "${options[@]}"
  printf '%s\n' "$key" >.venv/.hothouse-run
  [[ $1 == run ]] || printf '%s\n' "$key" >.venv/.hothouse-test
}

# make_key: that of the local hosts, which molecule/shared/create.yml gives them.
make_key() {
  [[ ! -e $state/ssh/id_ed25519 ]] || return 0
  (umask 077 && mkdir -p "$state/ssh")
  ssh-keygen -q -t ed25519 -N '' -C hothouse -f "$state/ssh/id_ed25519"
}

# lock up|test: one run at a time in this checkout. The lock is on the command's own file, so that none is left behind.
lock() {
  exec {lock_fd}<"bin/$1"
  flock --nonblock "$lock_fd" || fail "bin/$1 is running in this checkout already" "Wait until it is done."
}

# hosts_of NETWORK [podman's options...]: names of the containers that molecule/shared/create.yml made here on it.
hosts_of() {
  command -v podman >/dev/null || return 0
  as_root podman ps --format '{{.Names}}' --filter "label=hothouse.checkout=$state" --filter "network=$1" "${@:2}"
}

# idle_network NETWORK: whether it exists and no container is on it, ours or anybody's.
idle_network() {
  command -v podman >/dev/null && as_root podman network exists "$1" &&
    [[ -z $(as_root podman ps --all --quiet --filter "network=$1") ]]
}

# remove_hosts NETWORK: our containers on it and the network, and nothing else.
remove_hosts() {
  local names
  mapfile -t names < <(hosts_of "$1" --all)
  ((${#names[@]} == 0)) || as_root podman rm --force --time 0 "${names[@]}" >/dev/null
  if idle_network "$1"; then as_root podman network rm "$1" >/dev/null; fi
  rm -f "$state/ssh/$1".{config,known_hosts,yml}
}
