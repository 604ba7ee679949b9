#!/usr/bin/env bash
# Prometheus, and Grafana where it is installed, for the runs of one folder on this machine, until Ctrl-C:
#   deploy/local-monitoring/start.sh [RUNS_FOLDER]
# Both listen on 127.0.0.1 only (PROMETHEUS_PORT, GRAFANA_PORT), and keep their data in the user's state folder, in one
# of its own for each PROMETHEUS_PORT: so several can run, each for its own runs.
set -euo pipefail

runs=${1:-${DISTRIBUTED_MUZERO_RUNS_DIR:-runs}}
prometheus_port=${PROMETHEUS_PORT:-9090}
grafana_port=${GRAFANA_PORT:-3000}
deployed=$(cd "$(dirname "${BASH_SOURCE[0]}")/../monitoring" && pwd)
state=${DISTRIBUTED_MUZERO_STATE_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/distributed_muzero}/monitoring/$prometheus_port

fail() {
  echo "error: $*" >&2
  exit 2
}

# What deploy/monitoring/prometheus.yml expects beside itself.
lay_out() {
  [[ -d $runs ]] || echo "there was no folder $runs yet: it is made, and holds no runs" >&2
  mkdir -p "$runs/.prometheus" "$state"
  chmod 700 "$state"
  rm -f "$state"/{runs,rules.yml,ray_token}
  ln -s "$(cd "$runs" && pwd)" "$state/runs"
  ln -s "$deployed/rules.yml" "$state/rules.yml"
  local token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  if [[ -n ${RAY_AUTH_TOKEN:-} ]]; then
    (umask 077 && printf %s "$RAY_AUTH_TOKEN" >"$state/ray_token")
  elif [[ -r $token ]]; then
    ln -s "$(cd "$(dirname "$token")" && pwd)/$(basename "$token")" "$state/ray_token"
  else
    : >"$state/ray_token"
  fi
  cp "$deployed/prometheus.yml" "$state/prometheus.yml"
}

start_prometheus() {
  prometheus --config.file="$state/prometheus.yml" --storage.tsdb.path="$state/prometheus" \
    --storage.tsdb.retention.time=30d --web.listen-address="127.0.0.1:$prometheus_port" \
    >"$state/prometheus.log" 2>&1 &
  await prometheus $! "$prometheus_port"
}

start_grafana() {
  GF_SERVER_HTTP_ADDR=127.0.0.1 GF_SERVER_HTTP_PORT=$grafana_port \
    GF_PATHS_DATA=$state/grafana GF_PATHS_LOGS=$state/grafana GF_PATHS_PLUGINS=$state/grafana/plugins \
    GF_PATHS_PROVISIONING=$deployed/grafana/provisioning \
    GF_AUTH_ANONYMOUS_ENABLED=true GF_AUTH_ANONYMOUS_ORG_ROLE=Viewer \
    GF_ANALYTICS_REPORTING_ENABLED=false GF_ANALYTICS_CHECK_FOR_UPDATES=false \
    DASHBOARDS=$deployed/grafana/dashboards PROMETHEUS_URL=http://127.0.0.1:$prometheus_port \
    "$@" --homepath "${GRAFANA_HOME:-/usr/share/grafana}" >"$state/grafana.log" 2>&1 &
  await grafana $! "$grafana_port"
}

answers() {
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

# check_free PORT VARIABLE
check_free() {
  ! answers "$1" || fail "port $1 of this machine is taken; choose another: $2=… $0 $runs"
}

# await NAME PID PORT: until it listens.
await() {
  for _ in {1..300}; do
    kill -0 "$2" 2>/dev/null || break
    if answers "$3"; then
      echo "$1: http://127.0.0.1:$3"
      return
    fi
    sleep 0.1
  done
  tail -n 5 "$state/$1.log" >&2
  fail "$1 doesn't listen on 127.0.0.1:$3; the lines above are the last of $state/$1.log"
}

end_all() {
  local pids
  pids=$(jobs -p)
  # shellcheck disable=SC2086 # several numbers
  [[ -z $pids ]] || kill $pids 2>/dev/null || true
  wait
}

[[ $runs != *://* ]] || fail "$runs is a URI; give the folder on this machine where its runs are at work"
command -v prometheus >/dev/null ||
  fail "prometheus isn't installed. Debian, Ubuntu: apt-get install prometheus, and systemctl disable --now prometheus," \
    "as its service would take the port. macOS: brew install prometheus"
grafana=()
if command -v grafana >/dev/null; then
  grafana=(grafana server)
elif command -v grafana-server >/dev/null; then
  grafana=(grafana-server)
fi
# Before anything is laid out: it may be another one's that runs.
check_free "$prometheus_port" PROMETHEUS_PORT
[[ ${#grafana[@]} == 0 ]] || check_free "$grafana_port" GRAFANA_PORT
lay_out
trap end_all EXIT
trap 'exit 0' INT TERM

start_prometheus
if [[ ${#grafana[@]} != 0 ]]; then
  start_grafana "${grafana[@]}"
else
  echo "grafana: not installed (https://grafana.com/grafana/download); Prometheus' own page shows graphs and alerts"
fi
echo "watching the runs in $runs that were started with --metrics-port; Ctrl-C ends this"
wait -n || true
fail "one of them has ended by itself; see $state/*.log"
