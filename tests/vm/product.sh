#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# ckpt itself in the VM, with the module loaded: guests are dumped by --engine kmod, killed and restored, as root and as a
# plain user who is a member of the group ckpt. Words: names of tests, and NAME=VALUE for their environment; without any, those of
# the list below, which is shorter on 6.1.
export PATH=/usr/bin:/bin HOME=/tmp TERM=dumb
export CKPT_BIN=/product/ckpt CKPT_TEST_GUESTS=/product/guests CKPT_TEST_GROUPS=900
chgrp 900 /dev/ckpt && chmod 0660 /dev/ckpt
# As `ulimit -l` of whoever may use the module has to be.
ulimit -l unlimited
tests=
for word in "$@"; do
    case "$word" in
    *=*) export "${word?}" ;;
    *) tests="$tests $word" ;;
    esac
done
if [ -z "$tests" ]; then
    export CKPT_TEST_STEPS="${CKPT_TEST_STEPS-2}"
    case "$(uname -r)" in
    6.1.*) tests="engines::private_memory::kmod incremental::a_chain_equals_a_full_checkpoint" ;;
    *)
        tests="engines::private_memory::kmod engines::workers::kmod engines::shared_memory::kmod engines::same_pages
            incremental::a_chain_equals_a_full_checkpoint incremental::a_guest_notices"
        ;;
    esac
fi
ckpt=/product/ckpt
"$ckpt" doctor || true
# A name of no test would pass.
for name in $tests; do
    /product/it --list "$name" 2>/dev/null | grep -q ': test$' || { echo "there is no such test: $name"; exit 1; }
done
# shellcheck disable=SC2086 # names without spaces
{ /product/it --test-threads=2 $tests; echo $? >/run/it.status; } 2>&1 | tee /run/it.log
status=$(cat /run/it.status)
if grep 'skipped: .*the kernel module is not loaded' /run/it.log; then
    echo "these have not been tested"
    status=1
fi
lsmod
rmmod ckpt || { echo "the module cannot be unloaded"; status=1; }
exit "$status"
