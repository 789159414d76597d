# Sourced by demo.sh and test.sh: makes .venv once, and again only when what it must hold has changed.
# usage: environment EXTRAS   (EXTRAS as in pip's brackets, or empty)

find_python() {
  local candidate
  for candidate in python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "wq needs Python 3.10 or newer; none was found on PATH." >&2
  return 1
}

environment() {
  local extras="$1" python stamp wanted
  python="$(find_python)"
  stamp=".venv/.installed${extras}"
  wanted="$(cat pyproject.toml constraints.txt | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras}"
    echo "$wanted" >"$stamp"
  fi
}
