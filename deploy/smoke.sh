#!/usr/bin/env bash
# Builds the image, starts the stack and proves what it promises, one line a proof.
#
#   deploy/smoke.sh
#
# Exit code: 0 all of it holds; 1 some of it does not; 77 there is no Docker engine to try it with.
# SMOKE_MEMORY (2g) is the container's memory limit, SMOKE_SECONDS (20) how long it is put under load.
set -euo pipefail
cd "$(dirname "$0")/.."

MEMORY=${SMOKE_MEMORY:-2g}
SECONDS_OF_LOAD=${SMOKE_SECONDS:-20}
SAMPLE=examples/sunflower.jpg
SAMPLE_LABEL=sunflower
ENGINE=../shared/container/engine
work=$(mktemp -d)
export COMPOSE_PROJECT_NAME=camserve-smoke
export CAMSERVE_MEMORY=$MEMORY

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
fail() {
  say "FAILED: $*" >&2
  docker compose logs --tail 20 camserve >&2 || true
  exit 1
}

start_engine() {
  docker info >/dev/null 2>&1 && return
  if [[ -x $ENGINE ]] && "$ENGINE" >"$work/engine.log" 2>&1; then
    started_engine=yes
    return
  fi
  [[ ! -e $work/engine.log ]] || tail -5 "$work/engine.log" >&2
  echo 'skipped: no Docker engine answers, and none can be started here'
  exit 77
}

clean_up() {
  status=$?
  if docker info >/dev/null 2>&1; then
    docker compose down --volumes --timeout 5 >/dev/null 2>&1 || true
    docker image rm camserve:smoke-changed >/dev/null 2>&1 || true
    [[ -z ${started_engine:-} ]] || "$ENGINE" stop >/dev/null 2>&1 || true
  fi
  rm -rf "$work"
  exit "$status"
}

free_port() { # one that nothing listens on, as far as can be seen
  local port
  for port in $(shuf -i 20000-29999 -n 20); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
  done
}

inside() { docker compose exec -T camserve "$@"; }
state() { docker inspect --format "$1" "$container"; }

proves_the_answer() {
  local label
  label=$(curl -fsS -F image=@$SAMPLE "$url/explain" | inside python -c '
import json, sys
answer = json.load(sys.stdin)["results"][0]
assert answer["explanations"][0]["heatmap"]["data"]
print(answer["predictions"][0]["label"])')
  [[ $label == "$SAMPLE_LABEL" ]] || fail "/explain says $label of a $SAMPLE_LABEL"
  say "/explain: $label, with its heatmap"
}

proves_the_walls() {
  [[ $(state '{{.HostConfig.ReadonlyRootfs}}') == true ]] || fail 'the root is writable'
  for place in / /opt/camserve /usr/local/lib /models; do
    ! inside touch "$place/written" 2>/dev/null || fail "$place is writable"
  done
  inside touch /tmp/written /cache/written || fail 'its volume or /tmp cannot be written'
  say 'the root is read-only; /cache and /tmp are not'
  inside python - <<'END' || fail 'a process has more rights than it needs'
import pathlib

wanted = {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0, "NoNewPrivs": 1}
for status in pathlib.Path("/proc").glob("[0-9]*/status"):
    fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
    for name, value in wanted.items():
        assert int(fields[name], 16) == value, (fields["Name"], name, fields[name])
    assert set(fields["Uid"].split() + fields["Gid"].split()) == {"10001"}, fields["Name"]
END
  say 'every process is user 10001, without capabilities, and can gain none'
  for tool in pip gcc cc make git apt-get; do
    [[ $tool == apt-get ]] || ! inside sh -c "command -v $tool" >/dev/null || fail "$tool is inside"
  done
  [[ $(docker compose port camserve 8000) == 127.0.0.1:* ]] || fail 'others can reach it'
  say 'no build tools inside; it listens on 127.0.0.1 alone'
}

proves_the_sbom() { # it was held against its schema when it was built
  local counted
  counted=$(inside python - <<'END'
import importlib.metadata, json, platform, re, subprocess, urllib.parse

with open("/usr/local/share/sbom/camserve.cdx.json") as file:
    document = json.load(file)
assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6"), document["bomFormat"]
purls = [each["purl"].partition("?")[0].lower() for each in document["components"]]
listed = set(map(urllib.parse.unquote, purls))
for each in importlib.metadata.distributions():
    name = re.sub(r"[-_.]+", "-", each.name).lower()
    if name != "camserve":
        assert f"pkg:pypi/{name}@{each.version}".lower() in listed, name
show = ["dpkg-query", "--show", "--showformat", "${db:Status-Abbrev}|${Package}\n"]
installed = subprocess.run(show, check=True, capture_output=True, text=True).stdout
debian = set(re.findall(r"^ii +[|](.+)$", installed, re.MULTILINE))
assert debian == {each.split("/")[-1].split("@")[0] for each in listed if each.startswith("pkg:deb/")}
assert f"pkg:generic/cpython@{platform.python_version()}" in listed
assert document["metadata"]["component"]["name"] == "camserve"
print(len(document["components"]))
END
  ) || fail 'the SBOM does not list what is inside'
  say "the SBOM in /usr/local/share/sbom lists all of the $counted packages"
}

ask_until() { # $1: a photograph, $2: when to end; prints the status of each answer
  while ((SECONDS < $2)); do
    curl -sS -o /dev/null -w '%{http_code}\n' --max-time 120 -F "image=@$1" \
      "$url/explain?include=overlay" 2>/dev/null || true
  done
}

load() { # $1: seconds. Small and large photographs from 24 clients; how often each status came
  local end=$((SECONDS + $1)) client photograph
  for client in $(seq 24); do
    photograph=$SAMPLE
    ((client % 4)) || photograph=$work/large.jpg
    ask_until "$photograph" "$end" >"$work/statuses.$client" &
  done
  wait
  sort "$work"/statuses.* | uniq -c | awk '{printf "%s%d times %s", sep, $1, $2; sep=", "}'
}

proves_the_memory_limit() {
  local statuses peak limit
  inside python -c '
import io, sys
from PIL import Image
large = io.BytesIO()
Image.open(sys.stdin.buffer).resize((6000, 4000)).save(large, "JPEG")
sys.stdout.buffer.write(large.getvalue())' <$SAMPLE >"$work/large.jpg"
  statuses=$(load "$SECONDS_OF_LOAD")
  grep -q 200 <<<"$statuses" || fail "nothing was answered under load: $statuses"
  ! grep -qE ' (000|5[0-9][0-9])' <<<"$statuses" || fail "under load: $statuses"
  [[ $(state '{{.RestartCount}} {{.State.OOMKilled}}') == '0 false' ]] || fail 'it was killed under load'
  peak=$(inside sh -c 'cat /sys/fs/cgroup/memory.peak 2>/dev/null ||
    cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes')
  limit=$(state '{{.HostConfig.Memory}}')
  [[ $limit -gt 0 && $peak -le $limit ]] || fail "memory: $peak of $limit bytes"
  say "under load of photographs of .3 and 24 megapixels: $statuses;" \
    "at most $((peak >> 20)) of $((limit >> 20)) MiB, not killed"
}

proves_a_clean_stop() {
  local statuses begun
  load 6 >"$work/while-stopping" &
  until grep -qs 200 "$work"/statuses.*; do sleep .2; done
  begun=$SECONDS
  docker compose stop camserve 2>/dev/null
  [[ $(state '{{.State.ExitCode}}') == 0 ]] || fail "SIGTERM: exit code $(state '{{.State.ExitCode}}')"
  say "SIGTERM under load: it ended with 0 after $((SECONDS - begun)) s"
  wait
}

proves_the_keys() {
  local key=a-key-of-this-test status ours=(-f docker-compose.yml -f deploy/compose/keys.yml)
  printf 'smoke:%s\n' "$(printf %s $key | sha256sum | cut -d ' ' -f 1)" >"$work/keys"
  chmod 755 "$work" && chmod 644 "$work/keys"
  export CAMSERVE_API_KEYS=$work/keys CAMSERVE_ADMIN_KEYS=$work/keys CAMSERVE_ADDRESS=127.0.0.1
  docker compose "${ours[@]}" up --detach --wait --wait-timeout 300 camserve 2>/dev/null ||
    fail 'it does not start with keys'
  status=$(curl -s -o /dev/null -w '%{http_code}' -F image=@$SAMPLE "$url/explain")
  [[ $status == 401 ]] || fail "without a key /explain answers $status"
  curl -fsS -o /dev/null -H "X-API-Key: $key" -F image=@$SAMPLE "$url/explain" ||
    fail 'with its key /explain is refused'
  docker compose "${ours[@]}" stop camserve 2>/dev/null
  say 'keys from a file: 401 without one, an answer with one'
}

proves_what_kserve_appends_is_ignored() {
  local told
  told=$(docker run --rm --network none --entrypoint sh camserve:latest \
    -c 'exec camserve --help' camserve --model_name m --predictor_host p --http_port 8080 2>&1) ||
    fail "an explainer of KServe does not start: $told"
  say 'arguments that KServe appends to an explainer do no harm'
}

proves_a_quick_rebuild() {
  local begun
  mkdir "$work/changed"
  cp -R Dockerfile .dockerignore LICENSE NOTICE README.md pyproject.toml api_schemas camserve service \
    "$work/changed"
  mkdir "$work/changed/deploy"
  cp -R deploy/image "$work/changed/deploy"
  echo "# changed" >>"$work/changed/service/app.py"
  echo "# changed" >>"$work/changed/pyproject.toml"
  begun=$SECONDS
  docker build --progress=plain --build-arg EXTRAS="${CAMSERVE_EXTRAS:-otel}" \
    --build-arg PYTHON_IMAGE="${PYTHON_IMAGE:-python:3.11-slim-bookworm}" \
    --build-arg PIP_INDEX_URL="${PIP_INDEX_URL:-}" \
    --build-arg PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-}" \
    --build-arg UNHASHED="${UNHASHED:-}" \
    -t camserve:smoke-changed "$work/changed" >"$work/rebuild.log" 2>&1 || fail "$(tail "$work/rebuild.log")"
  ((SECONDS - begun < 60)) || fail "a changed line took $((SECONDS - begun)) s to build"
  say "a line of code and one of pyproject.toml changed: the image is built again in" \
    "$((SECONDS - begun)) s"
}

start_engine
trap clean_up EXIT
CAMSERVE_PORT=$(free_port)
export CAMSERVE_PORT
url=http://127.0.0.1:$CAMSERVE_PORT

docker compose build --quiet camserve
say "the image is built: $(($(docker image inspect -f '{{.Size}}' camserve:latest) / 1000000)) MB"
docker compose up --detach --wait --wait-timeout 300 camserve 2>/dev/null || fail 'it does not get ready'
container=$(docker compose ps --quiet camserve)
say 'it is ready'
proves_the_answer
proves_the_walls
proves_the_sbom
proves_the_memory_limit
proves_a_clean_stop
proves_the_keys
proves_what_kserve_appends_is_ignored
proves_a_quick_rebuild
say 'all of it holds'
