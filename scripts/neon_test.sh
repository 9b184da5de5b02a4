#!/usr/bin/env bash
# Builds the CPU kernels for 64-bit Arm and runs their tests under QEMU's user mode: the NEON level, which no x86 machine runs.
#   scripts/neon_test.sh [ctest arguments ...]
# Installs what it needs: the distribution's cross compiler, QEMU, and the sources of Highway and GoogleTest, which are
# built for Arm under build/neon/deps. Times under QEMU say nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
./scripts/setup.sh

packages=(g++-aarch64-linux-gnu qemu-user-static googletest dpkg-dev)
installed() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }
missing=()
for package in "${packages[@]}"; do installed "$package" || missing+=("$package"); done
if ((${#missing[@]})); then
  as_root=()
  if ((EUID != 0)); then as_root=(sudo); fi
  export DEBIAN_FRONTEND=noninteractive
  "${as_root[@]}" apt-get update -qq
  echo "installing: ${missing[*]}"
  "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

deps=$PWD/build/neon/deps
log=build/neon/deps.log
mkdir -p "$deps/src"

# The sources of the installed Highway, from where its package came, without a change to the system's list of sources.
fetch_highway() {
  local version
  version=$(dpkg-query -W -f='${Version}' libhwy-dev)
  mkdir -p apt/lists/partial apt/cache/archives/partial || return
  apt-cache policy libhwy-dev | awk '$1 ~ /^[0-9]+$/ && /Packages$/ {
    split($3, place, "/"); print "deb-src", $2, place[1], place[2]
  }' | sort -u >apt/sources.list
  local options=(-qq -o Dir::Etc::sourcelist="$PWD/apt/sources.list" -o Dir::Etc::sourceparts=-
    -o Dir::State::lists="$PWD/apt/lists" -o Dir::Cache="$PWD/apt/cache" -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update && apt-get "${options[@]}" source "highway=$version" && rm -r apt
}
build_dependency() {  # source folder, name, CMake arguments
  cmake -S "$1" -B "build/neon/deps/$2" -G Ninja --toolchain "$PWD/cmake/aarch64.cmake" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_INSTALL_PREFIX="$deps" -DCMAKE_INSTALL_LIBDIR=lib -DCMAKE_CXX_COMPILER_LAUNCHER=ccache "${@:3}" &&
    cmake --build "build/neon/deps/$2" --target install
}
build_dependencies() {
  find "$deps/src" -mindepth 1 -maxdepth 1 -exec rm -r {} + &&
    (cd "$deps/src" && fetch_highway) &&
    build_dependency "$(find "$deps/src" -maxdepth 1 -name 'highway-*' -type d)" highway -DBUILD_TESTING=OFF \
      -DHWY_ENABLE_TESTS=OFF -DHWY_ENABLE_EXAMPLES=OFF -DHWY_ENABLE_CONTRIB=OFF -DBUILD_SHARED_LIBS=OFF &&
    build_dependency /usr/src/googletest googletest &&
    touch "$deps/built"
}
if [[ ! -e $deps/built ]]; then
  build_dependencies >"$log" 2>&1 || { tail -50 "$log"; exit 1; }
fi
./scripts/build.sh neon
ctest --preset neon -j "$(nproc)" "$@"
