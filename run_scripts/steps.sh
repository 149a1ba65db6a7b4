# Sourced by scripts of many steps, which set `out`.

step() { # step NAME COMMAND...: once only; its output goes to OUT/NAME.log
    local name=$1 started=$SECONDS label
    shift
    [ ! -f "$out/$name.done" ] || return 0
    label=$(printf '%s: %-22s' "$(basename "$0" .sh)" "$name")
    [ ! -t 1 ] || printf '%s\r' "$label" # what is running, until it is done; steps may run side by side
    if ! "$@" >"$out/$name.log" 2>&1; then
        printf '%s FAILED after %d s\n' "$label" $((SECONDS - started))
        tail -n 15 "$out/$name.log" >&2
        return 1
    fi
    printf '%s %5d s\n' "$label" $((SECONDS - started)) | tee "$out/$name.done"
}
