# Sourced by quickstart.sh and test.sh: creates .venv and installs this project with pinned versions.
#   setup_env [EXTRAS]   e.g. setup_env dev
# PYTHON names the interpreter (default python3, 3.11 or newer). Safe to run again: pip then finds
# everything in place.
setup_env() {
    local extras=${1:+[$1]} venv=.venv
    if [ ! -x "$venv/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$venv"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
    python -m pip install --quiet --disable-pip-version-check \
        --constraint scripts/constraints.txt --editable ".$extras"
}
