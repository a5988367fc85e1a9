#!/usr/bin/env bash
# Puts libtorch into .libtorch, once: the CPU half (1.2 GB), or all of it with CUDA=1 (4.1 GB).
#
# Safe to interrupt and to repeat: the new folder is built beside the old one and takes its place by rename, and a
# stamp in it says what it was made from. A link called .libtorch, or a LIBTORCH variable, is used as it is.
set -euo pipefail

# tch 0.24 is built against exactly this torch; its shared libraries ask for the others.
readonly CPU_PACKAGES=(
    torch==2.11.0
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cupti==13.0.85
)
# The last four bring headers and the compiler of our own kernels.
readonly CUDA_PACKAGES=(
    "${CPU_PACKAGES[@]}"
    nvidia-cublas==13.1.0.3
    nvidia-cuda-nvrtc==13.0.88
    nvidia-cudnn-cu13==9.19.0.56
    nvidia-cufft==12.0.0.61
    nvidia-cufile==1.15.1.6
    nvidia-curand==10.4.0.35
    nvidia-cusolver==12.0.4.66
    nvidia-cusparse==12.6.3.3
    nvidia-cusparselt-cu13==0.8.0
    nvidia-nccl-cu13==2.28.9
    nvidia-nvjitlink==13.0.88
    nvidia-nvshmem-cu13==3.4.5
    nvidia-nvtx==13.0.85
    nvidia-cuda-cccl==13.0.85
    nvidia-cuda-crt==13.0.88
    nvidia-cuda-nvcc==13.0.88
    nvidia-nvvm==13.0.88
)
# Which build of the packages to take; nothing of Python is used, so that the machine's own version does not matter.
readonly PYTHON_VERSION=3.11
# Free disk for the downloaded archives and what is in them.
readonly CPU_MIB=2200
readonly CUDA_MIB=7500

fail() {
    echo "setup: $*" >&2
    exit 1
}

cd "$(dirname "$0")/.."
root=$PWD
final=$root/.libtorch
stamp=recipe.txt

if [[ -n ${LIBTORCH:-} || -L $final ]]; then
    used=${LIBTORCH:-$final/torch}
    [[ -e $used/lib/libtorch_cpu.so ]] || fail "$used holds no libtorch: lib/libtorch_cpu.so is missing"
    exit 0
fi

cpu_recipe=$(printf '%s\n' "${CPU_PACKAGES[@]}")
cuda_recipe=$(printf '%s\n' "${CUDA_PACKAGES[@]}")
if [[ ${CUDA:-0} == 1 ]]; then
    packages=("${CUDA_PACKAGES[@]}") needed_mib=$CUDA_MIB accepted=("$cuda_recipe")
else
    # The CUDA half does no harm to who does not link it.
    packages=("${CPU_PACKAGES[@]}") needed_mib=$CPU_MIB accepted=("$cpu_recipe" "$cuda_recipe")
fi

is_installed() {
    local recipe
    [[ -f $final/$stamp ]] || return 1
    for recipe in "${accepted[@]}"; do
        [[ $(<"$final/$stamp") != "$recipe" ]] || return 0
    done
    return 1
}

is_installed && exit 0

# One set-up at a time; who waited finds the work done. The lock ends with the process.
exec 9<"$root"
flock 9
is_installed && exit 0

[[ $(uname -sm) == "Linux x86_64" ]] || fail "needs Linux on x86_64, this is $(uname -sm); set LIBTORCH to a libtorch 2.11.0"
command -v python3 >/dev/null || fail "python3 is missing; on Debian: apt install python3 python3-pip"
python3 -m pip --version >/dev/null 2>&1 || fail "python3 has no pip; on Debian: apt install python3-pip"

rm -rf "$root"/.libtorch.tmp-*
free_mib=$(df --output=avail -BM "$root" | tail -n 1 | tr -dc 0-9)
((free_mib >= needed_mib)) || fail "needs $needed_mib MiB of free disk in $root, there are $free_mib"

tmp=$(mktemp -d "$root/.libtorch.tmp-XXXXXX") || fail "cannot write in $root"
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
mkdir "$tmp/new" "$tmp/pip"

echo "setup: fetching libtorch 2.11.0 into .libtorch" >&2
# Temporary files go to the same disk, so that unpacking ends in a rename.
TMPDIR=$tmp/pip python3 -m pip install --no-deps --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
    --retries 2 --only-binary=:all: --python-version "$PYTHON_VERSION" --target "$tmp/new" "${packages[@]}" >&2 ||
    fail "pip could not fetch libtorch; see its message above, and check the network and the free disk"
[[ -e $tmp/new/torch/lib/libtorch_cpu.so ]] || fail "the torch package holds no lib/libtorch_cpu.so"

printf '%s\n' "${packages[@]}" >"$tmp/new/$stamp"
[[ ! -e $final ]] || mv "$final" "$tmp/old"
mv "$tmp/new" "$final"
echo "setup: libtorch is in .libtorch ($(du -sh "$final" | cut -f1))" >&2
