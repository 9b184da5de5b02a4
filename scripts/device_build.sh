#!/usr/bin/env bash
# Builds what a machine with a GPU needs into build/device/bin, ready to be copied to another Linux machine: stripped
# binaries, and beside them the shared libraries that they need beyond glibc. cuBLAS, hundreds of megabytes, stays out: it is
# that machine's own, found through LD_LIBRARY_PATH. Ends with an error if anything else is needed.
#   scripts/device_build.sh [target...]    default: all that device_check.sh and device_bench.sh run
set -euo pipefail
cd "$(dirname "$0")/.."

targets=("$@")
((${#targets[@]})) || targets=(kvseekd cuda_test
  cuda_ladder_encode_test cuda_query_statistics_test sparse_decoder_test decoder_faults_test sparse_decode gpu_bench decode_bench)
bin=build/device/bin
bytes_max=$((48 << 20))
system='^(libcublas(Lt)?|linux-vdso|ld-linux[^.]*|libc|libm|libdl|librt|libpthread|libresolv)\.so'

# The preset sets DT_RPATH and not DT_RUNPATH, since that also holds for what the libraries beside the binaries need.
# Debian's Highway, spdlog and Abseil packages are made for shared linking, so libraries travel beside the binaries.
cmake --preset device -DKVSEEK_CUDA=ON >/dev/null
rm -f "$bin"/*.so*
cmake --build build/device -j "$(nproc)" --target "${targets[@]}"

# Libraries that ldd finds elsewhere, those of libraries included. FAISS links BLAS and LAPACK, which what we use of it never
# calls: the small reference ones do.
reference=/usr/lib/$(g++ -print-multiarch)
for target in "${targets[@]}"; do
  LD_LIBRARY_PATH=$reference/blas:$reference/lapack ldd "$bin/$target" | while read -r name _ path _; do
    if [[ $name =~ $system || $name == */* || $path == "$PWD/$bin/"* ]]; then continue; fi
    [[ -f $path ]] || { echo "$target: $name is not found" >&2; exit 1; }
    install -m 644 "$path" "$bin/$name"
  done
done

# What is there now must need nothing but glibc and what stands beside it.
problems=0
glibc_version=0
for file in "${targets[@]/#/$bin/}" "$bin"/*.so*; do
  [[ -f $file ]] || continue
  while read -r needed; do
    if [[ ! $needed =~ $system && ! -f $bin/$needed ]]; then
      echo "$file needs $needed" >&2
      problems=1
    fi
  done < <(readelf -d "$file" | sed -n 's/.*(NEEDED).*\[\(.*\)\].*/\1/p')
  version=$(readelf -V "$file" | grep -o 'GLIBC_2\.[0-9]*' | sort -uV | tail -1 || true)
  glibc_version=$(printf '%s\n' "$glibc_version" "${version#GLIBC_}" | sort -V | tail -1)
done
for target in "${targets[@]}"; do
  if ldd "$bin/$target" | awk '{print $1, $3}' | grep -vE "$system|^/" | grep -v " $PWD/$bin/"; then
    echo "$target finds the above outside $bin" >&2
    problems=1
  fi
done

bytes=$(du -sbc "${targets[@]/#/$bin/}" "$bin"/*.so* 2>/dev/null | tail -1 | cut -f1)
((bytes <= bytes_max)) || { echo "$bytes bytes, more than $bytes_max" >&2; problems=1; }
find "$bin" -type f -printf '%10s %f\n' | sort -k 2
echo "$bytes bytes in all; needs glibc $glibc_version or newer"
exit $problems
