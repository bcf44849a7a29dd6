#!/bin/bash
# SPDX-License-Identifier: MIT OR Apache-2.0
# gcc under make -j2 (with its jobserver pipe): a C project of generated files; the program made must print the right sum.
# Protocol: see pool.py; a step for each object file.
set -u
workdir=$1
files=20
nonce=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
log=$workdir/log
exec 3>>"$log"
echo "begin $nonce" >&3
project=$workdir/project
export TMPDIR=$workdir/tmp
mkdir -p "$project" "$TMPDIR"
expected=0
{
	echo '#include <stdio.h>'
	for ((i = 0; i < files; i++)); do echo "int part$i(int);"; done
	echo "int main(void) { long sum = 0;"
	for ((i = 0; i < files; i++)); do echo "sum += part$i($i);"; done
	echo "printf(\"%ld $nonce\\n\", sum); return 0; }"
} >"$project/main.c"
objects=main.o
for ((i = 0; i < files; i++)); do
	{
		for ((j = 0; j < 120; j++)); do
			echo "static int f$j(int x) { int y = x; for (int k = 0; k < $j; k++) y = y * 31 + k; return y & 0xff; }"
		done
		echo "int part$i(int x) { int sum = 0;"
		for ((j = 0; j < 120; j++)); do echo "sum ^= f$j(x);"; done
		echo "return (sum & 0) + x * $((i + 3)); }"
	} >"$project/part$i.c"
	expected=$((expected + i * (i + 3)))
	objects="$objects part$i.o"
done
cat >"$project/Makefile" <<MAKE
program: $objects
	gcc -o \$@ \$^
%.o: %.c
	gcc -O2 -c -o \$@ \$<
	@echo "step \$@ $nonce" >&3
MAKE
make -C "$project" -j2 >"$workdir/make.out" 2>&1 || make_failed=$?
got=$("$project/program")
echo "end $nonce" >&3
if [ -z "${make_failed:-}" ] && [ "$got" = "$expected $nonce" ]; then
	verdict="OK $nonce"
else
	verdict="FAIL $nonce make ${make_failed:-0}, program printed '$got' instead of '$expected $nonce'"
fi
echo "$verdict" >"$workdir/result.draft"
mv "$workdir/result.draft" "$workdir/result"
