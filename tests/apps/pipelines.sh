#!/bin/bash
# SPDX-License-Identifier: MIT OR Apache-2.0
# Pipelines and background jobs of bash, each result compared with a second computation. Protocol: see pool.py.
set -u
workdir=$1
steps=20
nonce=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
exec 3>>"$workdir/log"
echo "begin $nonce" >&3

fail() {
	echo "FAIL $nonce $*" >"$workdir/result.draft"
	mv "$workdir/result.draft" "$workdir/result"
	exit 1
}

compute() {
	seq 1 "$1" | awk -v salt="$nonce" '{ print ($1 * 7919) % 10007, salt }' | sort -n | uniq -c | md5sum | cut -d' ' -f1
}

# A background job that lives through all steps and is asked through a pair of pipes.
coproc squares { while read -r n; do echo $((n * n)); done; }

declare -A sums
for ((step = 1; step <= steps; step++)); do
	size=$((3000 + step * 500))
	compute $size >"$workdir/background.$step" &
	background=$!
	sums[$step]=$(compute $size)
	echo "$step" >&"${squares[1]}"
	read -r square <&"${squares[0]}"
	[ "$square" = $((step * step)) ] || fail "square of $step: $square"
	wait "$background" || fail "background job of step $step: status $?"
	[ "$(cat "$workdir/background.$step")" = "${sums[$step]}" ] || fail "step $step: the two sums differ"
	echo "step $step $nonce" >&3
done
[ ${#sums[@]} = $steps ] || fail "${#sums[@]} sums"
[ "$(compute 3500)" = "${sums[1]}" ] || fail "the first sum has changed"
echo "end $nonce" >&3
echo "OK $nonce" >"$workdir/result.draft"
mv "$workdir/result.draft" "$workdir/result"
