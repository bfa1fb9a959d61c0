# Sourced by demo.sh and test.sh. `make_venv EXTRA` makes .venv with the package and one of its
# extras (demo, or dev, which holds demo), or keeps the one that is there and complete. Sets
# $python to its interpreter. PYTHON=... chooses another Python to start from.

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    say "featcache needs Python 3.11 or newer: none found (PYTHON=... names one)."
    return 1
}

# Identifies what the venv was made from. If pyproject.toml, Python or folder change, it is made again.
recipe_key() {
    "$python" - "$root" "$1" <<'EOF'
import hashlib, pathlib, sys
root, extra = sys.argv[1:]
recipe = (pathlib.Path(root) / "pyproject.toml").read_bytes()
print(extra, sys.version.split()[0], hashlib.sha256(recipe + root.encode()).hexdigest())
EOF
}

make_venv() {
    local extra=$1 venv=$root/.venv base
    python=$venv/bin/python
    [ -d "$venv/Scripts" ] && python=$venv/Scripts/python.exe # Windows
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base=$(find_python)
        if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
            say "$base cannot make virtual environments: install its venv package first (Debian, Ubuntu: apt-get install python3-venv)."
            return 1
        fi
        "$base" -m venv --clear "$venv"
        [ -d "$venv/Scripts" ] && python=$venv/Scripts/python.exe
    fi
    local done_by=$venv/.complete
    if [ -f "$done_by" ] && { grep -qxF "$(recipe_key "$extra")" "$done_by" ||
        grep -qxF "$(recipe_key dev)" "$done_by"; }; then
        return
    fi
    say "Installing featcache[$extra] into .venv (once; a few minutes, torch is large) ..."
    rm -f "$done_by"
    # The newest pip takes 84 s in place of the 106 s of Python 3.11's own. Quiet twice: errors only,
    # as setuptools warns of every editable installation. Not compiled ahead: of torch and its like a
    # small part is ever imported.
    local pip=("$python" -m pip install --quiet --quiet --disable-pip-version-check --no-compile)
    "${pip[@]}" --upgrade pip
    "${pip[@]}" --editable "$root[$extra]"
    recipe_key "$extra" >"$done_by"
}
