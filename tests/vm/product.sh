#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# ckpt itself in the VM, with the module loaded: guests are dumped by --engine kmod, killed and restored, as root and as a
# plain user who is a member of the group ckpt. Words: names of tests; without any, those of the list below.
export PATH=/usr/bin:/bin HOME=/tmp TERM=dumb
export CKPT_BIN=/product/ckpt CKPT_TEST_GUESTS=/product/guests CKPT_TEST_GROUPS=900
chgrp 900 /dev/ckpt && chmod 0660 /dev/ckpt
# As `ulimit -l` of whoever may use the module has to be.
ulimit -l unlimited
if [ $# -eq 0 ]; then
    set -- engines::private_memory::kmod engines::workers::kmod engines::shared_memory::kmod engines::same_pages
fi
ckpt=/product/ckpt
"$ckpt" doctor || true
/product/it --test-threads=2 "$@"
status=$?
lsmod
rmmod ckpt || { echo "the module cannot be unloaded"; status=1; }
exit $status
