#!/usr/bin/env bash
# Builds the image and tries it on a machine with no Docker and no image registry, as root on Debian.
#
#   apt-get install buildah debootstrap
#   scripts/try_image.sh            # or with --built, to try the image of the last time again
#
# The base image is a stand-in: Debian's own Python from debootstrap. pip's settings on this machine
# and the local folders they name hold while the image is built and leave no trace in it.
set -euo pipefail
cd "$(dirname "$0")/.."

WORK=${WORK:-$(mktemp -d)}
MIRROR=${MIRROR:-http://deb.debian.org/debian}
BASE=localhost/weft-base
IMAGE=localhost/weft
KEY=a-key-for-this-trial-only
PORT=18423
export BUILDAH_ISOLATION=chroot

say() { echo "try_image.sh: $*"; }
fail() { echo "try_image.sh: FAILED: $*" >&2; exit 1; }

make_base() {
    local root=$WORK/base container
    [ -d "$root/usr" ] || debootstrap --variant=minbase \
        --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$root" "$MIRROR" >"$WORK/debootstrap.log"
    ln -sf python3 "$root/usr/bin/python"
    container=$(buildah from scratch)
    buildah copy --quiet "$container" "$root" /
    buildah commit --quiet --rm "$container" "$BASE"
}

# What pip is told on this machine, from files and environment, as one file to mount.
pip_settings() {
    echo "[global]"
    python3 -m pip config list | sed -n "s/^[^.]*\(:env:\)\?\.\([a-z-]*\)='\(.*\)'$/\2 = \3/p" \
        | sed 's/\\n/ /g' | awk -F' = ' '!seen[$1]++'
}

build() {
    local mounts=(--volume "$WORK/pip.conf:/etc/pip.conf:ro") folder
    pip_settings >"$WORK/pip.conf"
    # An index in a folder refers to the files beside it.
    for folder in $(grep -o '/[a-zA-Z0-9_./-]*' "$WORK/pip.conf" | sed 's,^//*,/,; s,/simple$,,' | sort -u); do
        if [ -e "$folder" ] && [[ $folder != /etc/pip.conf ]]; then mounts+=(--volume "$folder:$folder:ro"); fi
    done
    buildah bud --quiet --pull-never --layers=false --format docker "${mounts[@]}" \
        --build-arg PYTHON_IMAGE="$BASE" --build-arg TORCH=cpu --tag "$IMAGE" .
}

run() { buildah run --user "$1" "${@:3}" "$2" -- "${command[@]}"; }

# The process in the container: buildah's own stand between it and this script.
leaf() {
    local pid=$1 child
    while child=$(pgrep -P "$pid" | head -1) && [ -n "$child" ]; do pid=$child; done
    echo "$pid"
}

if [ "${1:-}" != --built ]; then
    make_base
    SECONDS=0
    build
    say "built in $SECONDS s"
fi

server=
container=$(buildah from --pull-never "$IMAGE")
clean_up() {
    if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then kill -KILL "$(leaf "$server")"; fi
    buildah rm "$container" >/dev/null
}
trap clean_up EXIT

command=(weft serve)
if run 10001 "$container" >"$WORK/open.log" 2>&1; then fail "it serves 0.0.0.0 without keys"; fi
grep -q WEFT_API_KEYS "$WORK/open.log" || fail "the refusal does not name WEFT_API_KEYS"

# A user without a name, who may write nowhere, and a folder of models of the operator's own.
rm -rf "$WORK/models"
mkdir "$WORK/models"
cp -r embedded/model "$WORK/models/mine"
chmod -R a+rX "$WORK/models"
SECONDS=0
run 23456:23456 "$container" --env WEFT_API_KEYS=$KEY --env WEFT_PORT=$PORT --env http_proxy=http://127.0.0.1:9 \
    --volume "$WORK/models:/models:ro" >"$WORK/serve.log" 2>&1 &
server=$!
command=(python /opt/weft/bin/healthcheck.py)
until run 23456:23456 "$container" --env WEFT_PORT=$PORT --env http_proxy=http://127.0.0.1:9 2>/dev/null; do
    kill -0 $server || { cat "$WORK/serve.log"; fail "it ended while it started"; }
    [ $SECONDS -lt 300 ] || fail "it is not ready after 300 s"
    sleep 0.5
done
say "ready after $SECONDS s"
answer=$(curl --silent --fail "http://127.0.0.1:$PORT/v1/generate" -H "authorization: Bearer $KEY" \
    -H 'content-type: application/json' -d '{"prompt": "a red circle", "steps": 2}')
[[ $answer == *'"model":"mine"'* ]] || fail "the models in /models are not served"

# Told to stop amid a request, it answers that one and ends in less than `docker stop` waits.
curl --silent --output /dev/null --write-out '%{http_code}' "http://127.0.0.1:$PORT/v1/generate" -H "authorization: Bearer $KEY" \
    -H 'content-type: application/json' -d '{"prompt": "a red circle", "steps": 12, "guidance": "none"}' >"$WORK/status" &
request=$!
sleep 0.5
SECONDS=0
kill -TERM "$(leaf $server)"
wait $server || fail "its status is not 0: $(tail -3 "$WORK/serve.log")"
[ $SECONDS -lt 10 ] || fail "it did not end in 10 s"
wait $request
[[ $(cat "$WORK/status") =~ ^(200|503)$ ]] || fail "the request under way got $(cat "$WORK/status")"
say "ended after $SECONDS s; the request under way got $(cat "$WORK/status")"
server=
