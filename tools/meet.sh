#!/usr/bin/env bash
# The end of `make quickstart`: meet the model that was just raised.
#
#   tools/meet.sh RUN
#
# Where a person sits at a terminal and the machine has a browser, the page is served on loopback
# (the address is the last line on the screen) with the earlier stages beside the model, to compare
# them. Without a browser it is the terminal chat; without a terminal (CI, a pipe) five questions are
# asked and the command ends by itself.
set -euo pipefail

run=$1
fledge=${FLEDGE:-.venv/bin/fledge}

if ! [[ -t 0 && -t 1 ]]; then
    exec "$fledge" chat "$run" --sample-conversation
fi

has_browser() {
    [[ ${BROWSER:-} || ${DISPLAY:-} || ${WAYLAND_DISPLAY:-} || $(uname) == Darwin ]]
}

if ! has_browser; then
    echo "No browser here: talking in the terminal. (The page: $fledge serve $run)"
    exec "$fledge" chat "$run"
fi

models=("$run") # its last stage
[[ -f $run/rl/LATEST && -f $run/sft/LATEST ]] && models+=("$run/sft")
[[ -f $run/sft/LATEST && -f $run/base/LATEST ]] && models+=("$run/base")
port=8000
if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    port=0 # taken: any free one
fi
echo "Meet it: open the address below in a browser. Ctrl-C ends the server."
exec "$fledge" serve --quiet --port "$port" "${models[@]}"
