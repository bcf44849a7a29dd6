#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# ckpt itself in the VM, with the module loaded: guests are dumped by --engine kmod, killed and restored, as root and as a
# plain user who is a member of the group ckpt. Words: names of tests, and NAME=VALUE for their environment; without any, those of
# the list below, none of which may be skipped. Each kernel has a part, as both run at the same time; soft-dirty bits are for one before 6.7.
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
must_not_be_skipped='the kernel module is not loaded'
if [ -z "$tests" ]; then
    must_not_be_skipped=
    export CKPT_TEST_STEPS="${CKPT_TEST_STEPS-2}"
    case "$(uname -r)" in
    6.1.*)
        tests="engines::private_memory::kmod engines::spliced::kmod engines::moment::kmod engines::module::
            incremental::soft_dirty:: incremental::a_chain_equals_a_full_checkpoint"
        ;;
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
if grep "skipped: .*$must_not_be_skipped" /run/it.log; then
    echo "these have not been tested"
    status=1
fi
lsmod
# Whoever may not open the device is told so, and nobody takes a module that was built to lose writes.
says() { # WORDS COMMAND...
    words=$1
    shift
    "$@" | grep -F "$words" || { echo "nobody says: $words"; status=1; }
}
says "closed to this user: join the group ckpt" /usr/bin/setpriv --reuid=1000 --regid=1000 --clear-groups "$ckpt" doctor
rmmod ckpt || { echo "the module cannot be unloaded"; status=1; }
insmod /lib/ckpt/ckpt_skip_flush.ko
says "of another version than this ckpt" "$ckpt" doctor
exit "$status"
