#!/usr/bin/env bash
# Makes .venv/ in the tree with torch, fairseq and fairseq_qn (editable): run_scripts/setup.sh [EXTRA ...]
# Extras are those of setup.py: plot tensorboard hf oracle benchmark all test. Done already, no time.
# PYTHON=... picks the interpreter.
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, pip.conf) say where wheels come
# from; without an NVIDIA GPU a CPU build of torch (version ...+cpu) is taken wherever one of them offers it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
py=$root/.venv/bin/python
versions=run_scripts/tested-versions.txt
log=.venv/setup.log

find_python() { # prints the interpreter named, or the first that will do
    local candidate
    [ -n "${PYTHON:-}" ] && set -- "$PYTHON" || set -- python3.11 python3 python3.12 python3.13
    for candidate in "$@"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: needs Python 3.11 (which is tested) or later, with venv; found" \
        "$("${PYTHON:-python3}" -V 2>/dev/null || echo none). Install python3.11 and python3.11-venv," \
        "or name one: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

step() { # step WHAT COMMAND...: one line with the seconds; on failure the end of the log
    local start=$SECONDS what=$1
    shift
    printf 'setup: %-44s' "$what"
    if ! "$@" >>"$log" 2>&1; then
        printf ' FAILED after %d s\n' $((SECONDS - start))
        tail -n 25 "$log" >&2
        echo "setup: the whole log is $root/$log" >&2
        return 1
    fi
    printf ' %3d s\n' $((SECONDS - start))
}

pip() { "$py" -m pip "$@"; }

install_torch() {
    local torch
    torch=$(grep '^torch==' "$versions")
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then
        if ! pip install "$torch+cpu"; then
            echo "setup: pip's settings offer no CPU build of $torch; taking the default one," \
                "which may bring several GB" \
                "of CUDA packages. PIP_EXTRA_INDEX_URL set to PyTorch's CPU index avoids it." >&3
        fi
    fi
    pip install "$torch" "${build_tools[@]}"
}

install_fairseq() { # against the torch that is used, not the CUDA one that build isolation would fetch
    # Nearly all of its time goes into three C++ files that include all of torch: 38 s each at -O3 -g, 21 s
    # at -O1 -g0. They compile side by side without ninja only, whose build file they would share.
    mkdir -p .venv/build/no-ninja
    printf '#!/bin/sh\nexit 1\n' >.venv/build/no-ninja/ninja
    chmod +x .venv/build/no-ninja/ninja
    printf '[build_ext]\nparallel = %d\n' "$(getconf _NPROCESSORS_ONLN)" >.venv/build/parallel.cfg
    env -u CUDA_HOME PATH="$root/.venv/build/no-ninja:$PATH" \
        DIST_EXTRA_CONFIG="$root/.venv/build/parallel.cfg" \
        CFLAGS="-O1 -g0 -fwrapv" CXXFLAGS="-O1 -g0 -fwrapv" "$py" -m pip install --no-build-isolation "$1"
}

install_package() {
    pip install --no-build-isolation --use-pep517 -e ".${*:+[$(tr ' ' , <<<"$*")]}" || return
    # fairseq pulls torchaudio in, has no use for it here, and transformers cannot be imported beside one
    # that is broken
    "$py" -c 'import torchaudio' || pip uninstall -y torchaudio
}

stamp=.venv/setup.done
key() {
    { cat setup.py "$versions" run_scripts/setup.sh fairseq_qn/kernels/*.[ch]; echo "$root"; "$py" -V; } \
        2>&1 | cksum
}
have=$(tail -n 1 "$stamp" 2>/dev/null || true) # the extras that are there
if [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$(key)" ]; then
    missing=0
    for extra in "$@"; do
        case " $have " in *" $extra "*) ;; *) missing=1 ;; esac
    done
    [ $missing = 1 ] || exit 0
fi
extras=$(printf '%s\n' $have "$@" | sort -u | xargs)

exec 3>&2
started=$SECONDS
if [ "$(cat .venv/made-in 2>/dev/null || echo "$root")" != "$root" ] ||
    ! "$py" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    rm -rf .venv
    mkdir .venv
    step "virtual environment ($("$python" -V))" "$python" -m venv .venv
    echo "$root" >.venv/made-in # its scripts name this path: a moved tree gets a new environment
fi
rm -f "$stamp"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=$root/$versions
build_tools=(cython numpy setuptools wheel)
step "torch and build tools" install_torch
step "fairseq (compiled, minutes, unless cached)" install_fairseq fairseq-fixed==0.12.3.1
step "fairseq_qn${extras:+ [$extras]}" install_package $extras
printf '%s\n%s\n' "$(key)" "$extras" >"$stamp"
echo "setup: done in $((SECONDS - started)) s, in $root/.venv"
