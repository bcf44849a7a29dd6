#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# ckpt itself in the VM, with the module loaded: guests are dumped by --engine kmod, killed and restored, as root and as a
# plain user who is a member of the group ckpt. Words: names of tests, and NAME=VALUE for their environment; without any, those of
# the list below, none of which may be skipped. Each kernel has a part, as both run at the same time; soft-dirty bits are for one before 6.7.
export PATH=/usr/bin:/bin HOME=/tmp TERM=dumb
export CKPT_BIN=/product/ckpt CKPT_TEST_GUESTS=/product/guests CKPT_TEST_GROUPS=900
# As `ulimit -l` of whoever may use the module has to be.
ulimit -l unlimited
ckpt=/product/ckpt
failed=0
is_open_to() { # OWNER:GROUP MODE
    is=$(stat -c '%U:%G %a' /dev/ckpt)
    [ "$is" = "$*" ] || { echo "/dev/ckpt is $is and not $*"; failed=1; }
}
says() { # WORDS COMMAND...
    words=$1
    shift
    "$@" | grep -F "$words" || { echo "nobody says: $words"; failed=1; }
}
as_plain() { /usr/bin/setpriv --reuid=1000 --regid=1000 "$@"; }
# udev gives the device to the group, by the rule that is installed as kmod/README.md says. It has a root directory of its own, and is
# gone before the tests: their jobs see its mounts.
for directory in dev proc sys run; do mount -o bind "/$directory" "/udev/$directory"; done
cp /etc/passwd /etc/group /udev/etc
udevadm() { SYSTEMD_IGNORE_CHROOT=1 chroot /udev /bin/udevadm "$@"; }
chroot /udev /lib/systemd/systemd-udevd --daemon
is_open_to root:root 600
cp /product/60-ckpt.rules /udev/etc/udev/rules.d
udevadm control --reload
rmmod ckpt && insmod /lib/ckpt/ckpt.ko
udevadm settle --timeout=60
is_open_to root:ckpt 660
chmod 0666 /dev/ckpt_testing
udevadm control --exit
for directory in dev proc sys run; do umount -l "/udev/$directory" || failed=1; done
# Whoever may not open the device is told so.
says "/dev/ckpt keeps memory" as_plain --groups=900 "$ckpt" doctor
says "closed to this user: join the group ckpt" as_plain --clear-groups "$ckpt" doctor
tests=
for word in "$@"; do
    case "$word" in
    *=*) export "${word?}" ;;
    *) tests="$tests $word" ;;
    esac
done
alone=
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
            engines::moment_of_processes::kmod engines::refused:: incremental::a_chain_equals_a_full_checkpoint incremental::a_guest_notices"
        alone=engines::alone::
        ;;
    esac
fi
"$ckpt" doctor || true
# A name of no test would pass.
for name in $tests $alone; do
    /product/it --list "$name" 2>/dev/null | grep -q ': test$' || { echo "there is no such test: $name"; exit 1; }
done
run() { # COMMAND...
    { "$@" || echo failed >>/run/it.failed; } 2>&1 | tee -a /run/it.log
}
# shellcheck disable=SC2086 # names without spaces
run /product/it --test-threads=2 $tests
[ -z "$alone" ] || CKPT_TEST_ALONE=yes run /product/it --test-threads=1 "$alone"
[ ! -e /run/it.failed ] || failed=1
if grep "skipped: .*$must_not_be_skipped" /run/it.log; then
    echo "these have not been tested"
    failed=1
fi
lsmod
rmmod ckpt || { echo "the module cannot be unloaded"; failed=1; }
# Nobody takes a module that was built to lose writes.
insmod /lib/ckpt/ckpt_skip_flush.ko
says "of another version than this ckpt" "$ckpt" doctor
exit "$failed"
