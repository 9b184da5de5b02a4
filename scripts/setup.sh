#!/usr/bin/env bash
# Installs what building and testing needs from the distribution's packages (Debian 12, Ubuntu 24.04 and later). Does
# nothing, and asks for no privileges, where all of it is there.
set -euo pipefail

packages=(
  g++ cmake ninja-build ccache pkg-config python3 git
  libabsl-dev libprotobuf-dev protobuf-compiler libhwy-dev libxxhash-dev libfaiss-dev
  libcli11-dev libspdlog-dev libfmt-dev nlohmann-json3-dev
  libgtest-dev libgmock-dev libbenchmark-dev
)

installed() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }

missing=()
for package in "${packages[@]}"; do installed "$package" || missing+=("$package"); done
# Boost 1.81 or later: a package of its own on Debian 12, the default on Ubuntu 24.04.
boost_header=/usr/include/boost/version.hpp
boost_version() { sed -n 's/^#define BOOST_VERSION \([0-9]*\)/\1/p' "$boost_header" 2>/dev/null; }
need_boost=0
if [[ ! -e $boost_header || $(boost_version) -lt 108100 ]]; then need_boost=1; fi
if ((${#missing[@]} == 0 && !need_boost)); then exit 0; fi

as_root=()
if ((EUID != 0)); then as_root=(sudo); fi
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
if ((need_boost)); then
  boost=libboost-dev
  if [[ -n $(apt-cache search --names-only '^libboost1\.81-dev$') ]]; then boost=libboost1.81-dev; fi
  missing+=("$boost")
fi
echo "installing: ${missing[*]}"
"${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
