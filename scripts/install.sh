#!/usr/bin/env bash
# Creates the virtual environment and installs the locked dependencies and Weft itself (editable).
#
#   scripts/install.sh [--dev] [--dependencies-only]
#
#   VENV    folder of the environment                 (.venv)
#   PYTHON  interpreter to create it with             (the first that is 3.11 or newer)
#   TORCH   cpu, cuda, or auto: cuda where nvidia-smi lists a GPU, otherwise cpu, or PyPI's build
#           of about 3 GB where PyTorch's own index does not answer                (auto)
#
# Does nothing if everything is installed already. Can be interrupted and run again.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VENV:-.venv}
VENV=${VENV%/}
TORCH=${TORCH:-auto}
asked=$TORCH
CPU_INDEX=https://download.pytorch.org/whl/cpu
lock=runtime
project=yes
for argument in "$@"; do
    case $argument in
        --dev) lock=dev ;;
        --dependencies-only) project=no ;;
        *) echo "install.sh: unknown argument '$argument'; allowed are --dev and --dependencies-only" >&2; exit 2 ;;
    esac
done

fail() { echo "install.sh: $*" >&2; exit 1; }
say() { echo "weft: $*"; }

case $TORCH in
    auto) if nvidia-smi -L 2>/dev/null | grep -q GPU; then TORCH=cuda; else TORCH=cpu; fi ;;
    cpu | cuda) ;;
    *) fail "TORCH is '$TORCH'; allowed are cpu, cuda and auto" ;;
esac

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        if new_enough "$PYTHON"; then echo "$PYTHON"; return; fi
        fail "PYTHON is '$PYTHON'; it must be Python 3.11 or newer"
    fi
    for candidate in python3 python3.11 python3.12 python3.13 python3.14; do
        if new_enough "$candidate"; then echo "$candidate"; return; fi
    done
    fail "Python 3.11 or newer is needed; none of these is: python3, python3.11 to python3.14"
}

# Creating an environment deletes everything else in its folder.
check_folder() {
    if [ -n "$(ls -A "$VENV" 2>/dev/null)" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
        fail "VENV is '$VENV', which has other files than a virtual environment; name a folder that" \
            "is new or empty"
    fi
    if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c '' && ! new_enough "$VENV/bin/python"; then
        fail "VENV is '$VENV', whose Python is older than 3.11; name another folder, or delete it"
    fi
}

has_pip() { "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

# uv unpacks many packages at once and is several times as fast as pip. It does not read pip's own
# configuration, so it is left out where that names another index or a proxy.
fetch_uv() {
    local configured certificates
    configured=$("$VENV/bin/python" -m pip config list)
    if grep -qE '\.(index-url|no-index|proxy)=' <<<"$configured"; then return; fi
    # Behind a proxy that inspects TLS, uv needs the certificates of the system, which newer
    # versions of pip trust by themselves, or those that pip is configured with.
    export UV_SYSTEM_CERTS=1
    certificates=$(sed -n "s/^[^=]*\.cert='\(.*\)'$/\1/p" <<<"$configured" | head -n 1)
    if [ -n "$certificates" ]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$certificates}; fi
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --retries 1 \
        --only-binary :all: --require-hashes --target "$tools" -r requirements/uv.lock 2>/dev/null
}

# Takes arguments that uv and pip both understand. Whatever uv cannot install, pip does. Without a
# terminal they print errors only; with one they show what they download.
install_packages() {
    local options=() shown=/dev/null
    if [ -t 1 ]; then shown=/dev/stderr; else options+=(--quiet); fi
    # A test run imports a part of all modules, and Python compiles those when it first does.
    if [ $lock = runtime ]; then options+=(--compile-bytecode); fi
    if [ -x "$tools/bin/uv" ] && UV_HTTP_RETRIES=0 "$tools/bin/uv" pip install \
        --python "$VENV/bin/python" ${options[@]+"${options[@]}"} "$@" 2>"$shown"; then
        return
    fi
    options=(--disable-pip-version-check)
    if [ ! -t 1 ]; then options+=(-qq); fi
    if [ $lock = dev ]; then options+=(--no-compile); fi
    "$VENV/bin/python" -m pip install "${options[@]}" "$@"
}

# Both write INSTALLER once the other files of a package are there. uv takes every package that has a
# folder of metadata for installed, which an interrupted installation leaves behind.
forget_interrupted() {
    local metadata
    for metadata in "$VENV"/lib/python3*/site-packages/*.dist-info; do
        if [ -d "$metadata" ] && [ ! -e "$metadata/INSTALLER" ]; then rm -r "$metadata"; fi
    done
}

installed_torch() {
    "$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' \
        2>/dev/null || true
}

install_torch() {
    local wanted installed
    wanted=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
    installed=$(installed_torch)
    # A CUDA build works on a CPU too, so only a CPU build is ever replaced.
    case $TORCH:$installed in
        cuda:*+cpu) ;;
        *:"$wanted" | *:"$wanted"+*) return ;;
    esac
    # Torch first: otherwise another package would pull in the newest build, with CUDA.
    if [ "$TORCH" = cpu ] && [ "$(uname -s)" = Linux ]; then
        say "installing torch $wanted for the CPU (about 200 MB)"
        if PIP_RETRIES=2 PIP_TIMEOUT=15 install_packages --no-deps --index-url "$CPU_INDEX" \
            --only-binary :all: --require-hashes -r requirements/torch-cpu.lock \
            2> >(grep -v "^WARNING: Retrying" >&2); then return; fi
        if [ "$asked" = cpu ]; then
            fail "torch $wanted for the CPU could not be installed from $CPU_INDEX; try again, or" \
                "set TORCH=cuda for PyPI's build, which includes CUDA and also works on a CPU (about 3 GB)"
        fi
        say "PyTorch's CPU index did not answer; installing PyPI's build, which includes CUDA (about 3 GB)"
    else
        say "installing torch $wanted from PyPI"
    fi
    install_packages --no-deps --force-reinstall --only-binary :all: --require-hashes \
        -r requirements/torch.lock
}

install() {
    # uv creates environments without pip, whose packages are kept.
    if ! has_pip; then "$VENV/bin/python" -m ensurepip >/dev/null 2>&1 || true; fi
    if ! has_pip; then
        say "creating $VENV with $(find_python)"
        "$(find_python)" -m venv --clear "$VENV"
    fi
    forget_interrupted
    tools=$(mktemp -d)
    trap 'rm -rf "$tools"' EXIT
    fetch_uv || true
    # The lock is complete and only wheels are used: nothing is unpinned, and no package runs code
    # while it is installed.
    say "installing the packages of requirements/$lock.lock"
    install_packages --no-deps --only-binary :all: --require-hashes -r "requirements/$lock.lock"
    install_torch
    if [ $project = yes ]; then
        say "installing weft"
        install_packages --no-deps --no-build-isolation --no-index --editable .
    fi
    "$VENV/bin/python" -m pip check >/dev/null || "$VENV/bin/python" -m pip check
}

# The stamp is written last and identifies everything that was installed from, so that the next run
# notices a changed lock, project or torch and finishes an interrupted installation.
key() {
    cat pyproject.toml constraints.txt requirements/*.lock scripts/install.sh | cksum
    echo "$TORCH $project $PWD"
}
stamp=$VENV/.weft-$lock
find_python >/dev/null
if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(key)" ]; then exit 0; fi

check_folder
mkdir -p "$VENV"
if command -v flock >/dev/null; then
    exec 9>"$VENV.lock"
    flock 9
fi
SECONDS=0
install
if [ $lock = dev ]; then key >"$VENV/.weft-runtime"; fi
key >"$stamp"
say "installed in $SECONDS s"
