#!/usr/bin/env bash
# Runs every fuzz target of the module for FUZZTIME each (default 30s), with
# FUZZPARALLEL workers (default: one for each core). Arguments narrow it to
# packages. What each target printed stays in the directory FUZZRECORD, where it
# is set, with a line for each in the file summary.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- ./...
record=${FUZZRECORD:-$(mktemp -d)}
[ -n "${FUZZRECORD:-}" ] || trap 'rm -rf "$record"' EXIT
mkdir -p "$record"

failed=0
for package in $(go list "$@"); do
	for target in $(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
		echo "== $package $target"
		log=$record/${package//\//_}.$target.log
		result=passed
		# Inputs are not worth a minute of minimising each, which is the default.
		go test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-30s}" -fuzzminimizetime 100x \
			${FUZZPARALLEL:+-parallel="$FUZZPARALLEL"} "$package" 2>&1 | tee "$log" || result=failed
		# The end of the time, in the midst of minimising, is no finding.
		if [ $result = failed ] && grep -q '^ *context deadline exceeded' "$log" && ! grep -q 'Failing input' "$log"; then
			result=passed
		fi
		[ $result = passed ] || failed=1
		echo "$package $target $result: $(grep -o 'elapsed: .*' "$log" | tail -1)" >>"$record/summary"
	done
done
exit $failed
